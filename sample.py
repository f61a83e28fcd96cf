"""Ask a trained LMEye about pictures.

    python sample.py picture.jpg "what shape is it?"          the answer, as it is written
    python sample.py picture.jpg                              a chat about the picture: a question a line
    python sample.py a.jpg b.jpg c.jpg "what shape is it?"    a batch: a line of JSON for each picture
    python sample.py a.jpg b.jpg --questions questions.txt    each line of the file, asked about each picture
    python sample.py picture.jpg "what shape is it?" --inspect look.png    where it looks, and what the request is worth

The newest checkpoint below --out answers, unless --checkpoint names another. One that has only seen stage 1 writes
captions. Answers go to the standard output, everything else to the standard error.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import lmeye
from lmeye import CHECKPOINT, PRESETS, LMEye, UserError, dialogue

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def note(text):
    print(f"note: {lmeye.printable(str(text))}", file=sys.stderr)


def newest(out):
    """The checkpoint below `out` that was written last. UserError if there is none."""
    found = sorted(Path(out).glob(f"*/*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint below {out}/: make one with  python train.py --stage 1  and then  --stage 2")
    return found[-1]


def load(args, path):
    """(model with its adapter, stage). The checkpoint tells the shape of the layers and which preset it belongs to;
    models that are no preset's are loaded only where the user names them."""
    _, saved, *_ = lmeye.read_checkpoint(path)
    if saved.preset in PRESETS:
        args.preset = saved.preset
    elif not (args.llm and args.clip):
        raise UserError(f"{path}: belongs to models of your own: name them with  --llm {saved.llm} --clip {saved.clip}")
    args.n_features, args.n_slots, args.interaction = saved.n_features, saved.n_slots, saved.interaction
    settings = lmeye.settings_from(args)
    if settings.preset == "mini" and not Path(settings.llm).is_dir():
        raise UserError(f"the miniature's own models are not below {args.out}/: name their folder with --out")
    model = LMEye.from_settings(settings).eval()
    return model, model.load(path)


def look(model, path):
    """A picture file → its feature f (1, C)."""
    picture = data.load_image(path)
    if model.settings.preset == "mini" and picture.size != (data.SIDE, data.SIDE):
        note(f"{path}: the miniature knows only its own world, shapes in a picture of {data.SIDE} × {data.SIDE} pixels")
    return model.encode_image(model.preprocess(picture)[None])


def check_words(model, question):
    """Tell which words of a question the model's vocabulary lacks."""
    unknown = [word for word in question.split() if model.tokenizer.unk_token_id in model.ids(word)]
    if unknown and model.settings.preset == "mini":
        note(f"the miniature does not know: {' '.join(unknown)}")


def answer(model, f, question, options):
    """Print the answer to one question as it is written, and return it. No question: a caption."""
    ids, shown = [], ""
    for token in model.stream(f, question and [question], **options):
        ids += token.tolist()
        text = lmeye.printable(model.decode(ids))
        if text.startswith(shown) and not text.endswith("\ufffd"):  # half of a character is not shown
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()
    return shown


def chat(model, f, options):
    """Read questions, a line each, until an empty one; earlier turns are context, and each turn asks anew."""
    if sys.stdin.isatty():
        note("a chat about the picture: a question a line, an empty line ends it")
    turns = ()
    while question := read_line("> " if sys.stdin.isatty() else ""):
        check_words(model, question)
        while True:
            try:
                turns += question, answer(model, f, dialogue((*turns, question)), options)
            except UserError as error:  # longer than the language model's context
                note("the context is full: the earliest turn is forgotten" if turns else error)
                if turns:
                    turns = turns[2:]
                    continue
            break


def read_line(prompt):
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def batch(model, pictures, questions, options, batch_size):
    """Ask every question about every picture (none: write captions), and print a line of JSON for each answer."""
    f = {path: look(model, path) for path in tqdm(pictures, desc="pictures", disable=None)}
    asked = [(path, question) for path in pictures for question in questions or [None]]
    for start in tqdm(range(0, len(asked), batch_size), desc="answers", disable=None):
        part = asked[start:start + batch_size]
        features = torch.cat([f[path] for path, _ in part])
        answers = model.generate(features, [q for _, q in part] if questions else None, **options)
        for (path, question), text in zip(part, answers):
            line = {"image": path, "question": question, "answer": lmeye.printable(text)}
            print(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False), flush=True)


# ---- Looking into an answer ----------------------------------------------------------------------------------

SECOND = "what color is the background?"  # shown beside the question, to see the gaze move


def gaze(model, picture, question, answer):
    """How much each place of the picture moved log p(answer): input × gradient, summed over channels → (h, w), 0 to 1.

    The places are the patch embeddings of a ViT; of a ResNet the last feature map that is at least 7 × 7, which at
    CLIP's own sizes is its very last.
    """
    visual, kept = model.clip.visual, []
    names = ("ln_pre",) if hasattr(visual, "ln_pre") else ("layer1", "layer2", "layer3", "layer4")
    if not all(hasattr(visual, name) for name in names):
        raise UserError("--inspect knows CLIP's own image towers, ViT and ResNet; this one is another")
    hooks = [getattr(visual, name).register_forward_hook(lambda *call: kept.append(call[-1])) for name in names]
    pixels = model.preprocess(picture)[None].to(model.device, model.text.transformer.get_cast_dtype())
    f = model.clip.encode_image(pixels.requires_grad_()).float()
    for hook in hooks:
        hook.remove()
    loss = 1024 * model.loss_sum(f, model.tokens([question], [answer]))  # lest small gradients vanish in fp16
    maps = [x.float() * g.float() for x, g in zip(kept, torch.autograd.grad(loss, kept))]
    if maps[0].ndim == 3:  # (1, 1 + h·w, channels), the class token first
        places = maps[0][0, 1:].sum(-1).unflatten(0, (round((maps[0].shape[1] - 1) ** 0.5), -1))
    else:
        places = [m for m in maps if m.shape[-1] >= 7][-1][0].sum(0)
    return places.abs().cpu() / places.abs().max().clamp(min=1e-9)


@torch.no_grad()
def log_p(model, f, question, answer):
    """Log-probability of an answer and its end."""
    return -model.loss_sum(f, model.tokens([question], [answer])).item()


def without(model, f, question, answer):
    """What log p(answer) loses when one of the decomposed features is zero: N numbers."""
    N, W = model.settings.n_features, model.request.out_features
    whole, lost = log_p(model, f, question, answer), []
    for i in range(N):
        keep = (torch.arange(N, device=model.device) != i).repeat_interleave(W)
        hook = model.decompose.register_forward_hook(lambda module, inputs, out: out * keep)
        lost.append(whole - log_p(model, f, question, answer))
        hook.remove()
    return lost


def rivals(model, checkpoint):
    """Yield (name, model): this one; the same with its request zero; norequest and static, if trained beside it."""
    yield model.settings.interaction, model
    frozen = model.llm, model.tokenizer, model.clip, model.preprocess, model.clip_tokenizer
    if model.settings.interaction == "full":
        silent = LMEye(replace(model.settings, interaction="norequest"), *frozen)
        silent.load_state_dict(model.state_dict())
        yield "full, its request set to zero", silent
    for name in ("norequest", "static"):
        path = Path(checkpoint).resolve().parent.with_name(f"stage2-{name}") / CHECKPOINT
        if path.is_file() and name != model.settings.interaction:
            rival = LMEye(lmeye.read_checkpoint(path)[1], *frozen)
            rival.load(path)
            yield f"{name}, as trained", rival


def inspect_answer(model, checkpoint, path, questions, out):
    """Draw what led to an answer: the picture, the gaze for two questions, the answer's probability under the rivals,
    and what each decomposed feature was worth."""
    source = data.load_image(path)
    f, gray = (model.encode_image(model.preprocess(p)[None]) for p in (source, Image.new("RGB", source.size, "gray")))
    side = (256, 256)
    picture = ImageOps.fit(source, side, Image.Resampling.NEAREST if source.width < 256 else Image.Resampling.BICUBIC)
    page = Image.new("RGB", (848, max(530, 352 + 18 * model.settings.n_features)), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)

    def write(x, y, text, color="black"):
        canvas.text((x, y), text if len(text) < 42 else text[:40] + "…", color, font)

    def bar(x, y, share, text, color):
        canvas.rectangle((x, y, x + max(1, 120 * share), y + 12), color)
        write(x + 126, y - 2, text)

    page.paste(picture, (20, 30))
    write(20, 8, Path(path).name)
    answers = model.generate(f.expand(2, -1), questions)
    for x, question, said in zip((296, 572), questions, answers):
        heat = F.interpolate(gaze(model, source, question, said)[None, None], side, mode="bicubic").clamp(0, 1)[0, 0]
        veil = Image.fromarray((200 * (1 - heat)).byte().numpy())
        page.paste(Image.composite(Image.new("RGB", side, "#888888"), picture, veil), (x, 30))
        write(x, 8, question, "#555555")
        write(x, 292, f"{said}   p = {math.exp(log_p(model, f, question, said)):.2f}")
        lost = without(model, f, question, said) if model.settings.interaction != "static" else []
        for i, value in enumerate(lost):
            write(x, 322, "log p lost without each feature", "#555555")
            bar(x, 342 + 18 * i, abs(value) / max(1e-6, *map(abs, lost)), f"f{i + 1}  {value:+.2f}", "#1f77b4")
    write(20, 292, "its answer, and p of the first one", "#555555")
    shown = [(name, rival, f) for name, rival in rivals(model, checkpoint)]
    for i, (name, rival, seen) in enumerate([*shown, ("blind: a gray picture", model, gray)]):
        p = math.exp(log_p(rival, seen, questions[0], answers[0]))
        write(20, 322 + 38 * i, f"{name}: {rival.generate(seen, questions[:1])[0]}")
        bar(20, 340 + 38 * i, p, f"{p:.2f}", "#2ca02c")
    page.save(out, "PNG")
    print(out)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE… [QUESTION]",
                        help="pictures, and behind them a question; the last word is taken for a picture if it is a "
                             "file or ends as picture files do")
    parser.add_argument("--questions", metavar="FILE", help="a text file, a question a line")
    parser.add_argument("--inspect", metavar="PNG", help="draw where the model looks and what its request is worth, "
                        f"for its likeliest answer; a second question may follow the first (default: {SECOND})")
    parser.add_argument("--checkpoint", metavar="FILE", help=f"an {CHECKPOINT} (default: the newest below --out)")
    parser.add_argument("--out", default="out", help="where train.py wrote (default: out)")
    parser.add_argument("--max-tokens", type=int, default=64, help="the longest answer (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens only (0: from all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold P in sum")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered at once (default: 32)")
    lmeye.add_flags(parser, ("llm", "clip", "precision"))
    args = parser.parse_args()
    if args.max_tokens < 1 or args.batch_size < 1 or args.top_k < 0 or args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("--max-tokens and --batch-size start at 1, --top-k and --temperature at 0, --top-p is in (0, 1]")
    return args


def main():
    args = parse_args()
    *pictures, last = args.inputs
    is_picture = not pictures or os.path.isfile(last) or last.lower().endswith(PICTURES)
    pictures, questions = (args.inputs, []) if is_picture else (pictures, [last])
    if args.inspect:
        pictures, questions = args.inputs[:1], (args.inputs[1:] + [SECOND])[:2]
        if not 2 <= len(args.inputs) <= 3 or args.questions:
            raise UserError("--inspect takes one picture and one or two questions")
    if args.questions:
        questions += Path(args.questions).read_text("utf-8", "replace").splitlines()
    questions = [q.strip() for q in questions]
    if not all(questions):
        raise UserError("the question is empty")
    for path in pictures:
        data.load_image(path)  # a wrong picture is told before the models are loaded

    checkpoint = args.checkpoint or newest(args.out)
    model, stage = load(args, checkpoint)
    if stage == 1 and questions:
        note("this checkpoint has seen stage 1 only, captions. To get answers:  python train.py --stage 2")
        questions = []
    for question in questions:
        check_words(model, question)
    options = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                   generator=torch.Generator(model.device).manual_seed(args.seed))
    if args.inspect:
        if stage == 1:
            raise UserError("--inspect looks into answers: it needs a checkpoint of stage 2")
        inspect_answer(model, checkpoint, pictures[0], questions, args.inspect)
    elif len(pictures) > 1 or args.questions:
        if stage == 2 and not questions:
            raise UserError("several pictures: behind them a question is needed, or --questions FILE")
        batch(model, pictures, questions, options, args.batch_size)
    elif stage == 1 or questions:
        answer(model, look(model, pictures[0]), questions[0] if questions else None, options)
    else:
        chat(model, look(model, pictures[0]), options)


if __name__ == "__main__":
    lmeye.run(main)
