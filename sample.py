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
    print(f"note: {text}", file=sys.stderr)


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
        while turns and not fits(model, dialogue((*turns, question))):
            turns = turns[2:]
            note("the language model's context is full: the earliest turn is forgotten")
        try:
            turns += (question, answer(model, f, dialogue((*turns, question)), options))
        except UserError as error:
            note(error)


def read_line(prompt):
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def fits(model, question):
    try:
        return model.tokens([question], [""]) is not None
    except UserError:
        return False


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


def look_with_gradient(model, picture):
    """A picture → (its feature f (1, C), a map (1, channels, h, w) of CLIP's image tower on f's way), with gradient.

    The map is a ViT's patch embeddings; of a ResNet the last one that is at least 8 × 8 (its very last is 7 × 7 at
    CLIP's full size, but 2 × 2 in the miniature).
    """
    visual, kept = model.clip.visual, []
    if hasattr(visual, "transformer"):
        def keep(module, inputs):  # (1, 1 + h·w, channels), the class token first
            side = round((inputs[0].shape[1] - 1) ** 0.5)
            patches = inputs[0][:, 1:].mT.unflatten(2, (side, side))
            kept.append(patches)
            return (torch.cat([inputs[0][:, :1], patches.flatten(2).mT], 1), *inputs[1:])
        handles = [visual.transformer.register_forward_pre_hook(keep)]
    else:
        handles = [getattr(visual, name).register_forward_hook(lambda module, inputs, out: kept.append(out))
                   for name in ("layer1", "layer2", "layer3", "layer4")]
    pixels = model.preprocess(picture)[None].to(model.device, model.text.transformer.get_cast_dtype()).requires_grad_()
    f = model.clip.encode_image(pixels).float()
    for handle in handles:
        handle.remove()
    return f, [m for m in kept if m.shape[-1] >= 8][-1] if len(kept) > 1 else kept[0]


def gaze(model, picture, question, answer):
    """How much each place of the picture moved log p(answer): input × gradient → (h, w) from 0 to 1."""
    f, seen = look_with_gradient(model, picture)
    gradient, = torch.autograd.grad(-model.loss_sum(f, model.tokens([question], [answer])), seen)
    moved = (seen * gradient).sum(1)[0].float().abs().detach().cpu()
    return moved / moved.max().clamp(min=1e-9)


@torch.no_grad()
def log_p(model, f, question, answer):
    """Log-probability of an answer and its end."""
    return -model.loss_sum(f, model.tokens([question], [answer])).item()


def without(model, f, question, answer):
    """What log p(answer) loses by the absence of each decomposed feature: N numbers."""
    lost = []
    for i in range(model.settings.n_features):
        keep = (torch.arange(model.settings.n_features, device=model.device) != i).repeat_interleave(
            model.request.out_features)
        handle = model.decompose.register_forward_hook(lambda module, inputs, out: out * keep)
        lost.append(log_p(model, f, question, answer))
        handle.remove()
    return [log_p(model, f, question, answer) - p for p in lost]


def rivals(model, checkpoint):
    """{name: model}: this one; with its request silenced; norequest and static as trained, where they lie beside it."""
    parts = model.llm, model.tokenizer, model.clip, model.preprocess, model.clip_tokenizer
    found = {model.settings.interaction: (model.settings.interaction, checkpoint)}
    if model.settings.interaction == "full":
        found["full, request silenced"] = ("norequest", None)
    found |= {name: (name, Path(checkpoint).parent.parent / f"stage2-{name}" / CHECKPOINT) for name in ("norequest", "static")
              if name != model.settings.interaction}
    for name, (interaction, path) in found.items():
        if path is None or Path(path).is_file():
            rival = LMEye(replace(model.settings, interaction=interaction), *parts).eval()
            if path is None:
                rival.load_state_dict(model.state_dict())
            else:
                rival.load(path)
            yield name, rival


def inspect_answer(model, checkpoint, path, questions, out):
    """Draw one picture of what led to an answer: see the README."""
    picture = data.load_image(path)
    picture = ImageOps.fit(picture, (256, 256), Image.Resampling.NEAREST if picture.width < 256 else Image.Resampling.BICUBIC)
    f, gray = (model.encode_image(model.preprocess(p)[None]) for p in (data.load_image(path), Image.new("RGB", picture.size, "gray")))
    page = Image.new("RGB", (3 * 276 + 20, max(530, 352 + 18 * model.settings.n_features)), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)

    def write(x, y, text, color="black"):
        canvas.text((x, y), text if len(text) < 42 else text[:40] + "…", color, font)

    def bar(x, y, share, text, color):
        canvas.rectangle((x, y, x + max(1, round(120 * min(1, abs(share)))), y + 12), color if share >= 0 else "#bbbbbb")
        write(x + 126, y - 2, text)

    page.paste(picture, (20, 30))
    write(20, 8, Path(path).name)
    for column, question in enumerate(questions, 1):
        x, said = 20 + 276 * column, model.generate(f, [question])[0]
        heat = gaze(model, data.load_image(path), question, said)
        heat = F.interpolate(heat[None, None], (256, 256), mode="bicubic").clamp(0, 1)[0, 0]
        veil = Image.fromarray((200 * (1 - heat)).byte().numpy())
        page.paste(Image.composite(Image.new("RGB", picture.size, "#888888"), picture, veil), (x, 30))
        write(x, 8, question, "#555555")
        write(x, 292, f"{said}   p = {math.exp(log_p(model, f, question, said)):.2f}")
        if model.settings.interaction != "static":
            lost = without(model, f, question, said)
            write(x, 322, "log p lost without each feature", "#555555")
            for i, value in enumerate(lost):
                bar(x, 342 + 18 * i, value / max(1e-6, *map(abs, lost)), f"f{i + 1}  {value:+.2f}", "#1f77b4")
    write(20, 292, f"p of its answer to: {questions[0]}", "#555555")
    answer_ = model.generate(f, [questions[0]])[0]
    shown = list(rivals(model, checkpoint))
    for i, (name, rival, features) in enumerate([*((n, r, f) for n, r in shown), ("blind: a gray picture", model, gray)]):
        p = math.exp(log_p(rival, features, questions[0], answer_))
        write(20, 316 + 38 * i, f"{name}: {rival.generate(features, [questions[0]])[0]}")
        bar(20, 334 + 38 * i, p, f"{p:.2f}", "#2ca02c")
    page.save(out)
    print(out)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE… [QUESTION]",
                        help="pictures, and behind them a question; the last word is taken for a picture if it is a "
                             "file or ends as picture files do")
    parser.add_argument("--questions", metavar="FILE", help="a text file, a question a line")
    parser.add_argument("--inspect", metavar="PNG", help="draw where the model looks and what its request is worth; "
                        f"a second question may follow the first (default: {SECOND})")
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
        if not 2 <= len(args.inputs) <= 3:
            raise UserError("--inspect takes one picture and one or two questions")
    if args.questions:
        try:
            questions += Path(args.questions).read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--questions {args.questions}: can't be read ({error})") from error
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
