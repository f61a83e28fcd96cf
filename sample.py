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
import contextlib
import json
import math
import os
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import lmeye
from lmeye import CHECKPOINT, PRESETS, LMEye, UserError, dialogue


def note(text):
    print(f"note: {lmeye.printable(str(text))}", file=sys.stderr)


def newest(out, model):
    """The checkpoint of a model ("*": of any) below `out` that was written last. UserError if there is none."""
    found = sorted(Path(out).glob(f"{model}/*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint below {out}/: make one with  python train.py --stage 1  and then  --stage 2")
    return found[-1]


def load(args, path):
    """(model with its adapter, stage). The checkpoint tells layers and preset; models of no preset, the user names."""
    _, saved, *_ = lmeye.read_checkpoint(path)
    if saved.preset in PRESETS:
        args.preset = saved.preset
    elif not (args.llm and args.clip):
        raise UserError(f"{path}: belongs to models of your own: name them with  --llm {saved.llm} --clip {saved.clip}")
    args.n_features, args.n_slots, args.interaction = saved.n_features, saved.n_slots, saved.interaction
    model = LMEye.from_settings(lmeye.settings_from(args))
    return model, model.load(path)


def look(model, path):
    """A picture file → its feature f (1, C)."""
    picture = data.load_image(path)
    if model.settings.preset == "mini" and picture.size != (data.SIDE, data.SIDE):
        note(f"{path}: the miniature knows only its own world, shapes in a picture of {data.SIDE} × {data.SIDE} pixels")
    return model.encode_image(model.preprocess(picture)[None])


def check_words(model, text):
    """Tell which words of questions the miniature's vocabulary lacks."""
    unknown = [word for word in text.split() if model.tokenizer.unk_token_id in model.ids(word)]
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
    turns, prompt = (), "question (none: end) > " if sys.stdin.isatty() else ""
    for question in iter(lambda: input(prompt).strip().encode("utf-8", "replace").decode(), ""):
        check_words(model, question)
        for past in [turns[n:] for n in range(0, len(turns) + 1, 2)]:  # all turns; without the earliest; …; none
            try:
                turns = *past, question, answer(model, f, dialogue((*past, question)), options)
                break
            except UserError as error:  # longer than the language model's context
                note("the context is full: asked without the earliest turn" if past else error)


def batch(model, pictures, questions, options, batch_size):
    """Ask every question about every picture (none: write captions), and print a line of JSON for each answer."""
    f = {path: look(model, path) for path in tqdm(pictures, desc="pictures", disable=None)}
    asked = [(path, question) for path in pictures for question in questions or [None]]
    for start in tqdm(range(0, len(asked), batch_size), desc="answers", disable=None):
        part = asked[start:start + batch_size]
        answers = model.generate(torch.cat([f[path] for path, _ in part]), [q for _, q in part] if questions else None,
                                 **options)
        for (path, question), text in zip(part, answers):
            line = {"image": path} | ({"question": question} if question else {}) | {"answer": lmeye.printable(text)}
            print(json.dumps(line, ensure_ascii=False), flush=True)


# ---- Looking into an answer ----------------------------------------------------------------------------------

SECOND = "what color is the background?"  # shown beside the question, to see the gaze move


def gaze(model, picture, question, answer):
    """How much each place of the picture moved log p(answer): input × gradient, summed over channels → (h, w), 0 to 1.
    The places are a ViT's patch embeddings, or those of a ResNet's last feature map that is at least 7 × 7."""
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
        with model.decompose.register_forward_hook(lambda module, inputs, out: out * keep):
            lost.append(whole - log_p(model, f, question, answer))
    return lost


def rivals(model, checkpoint, f, gray):
    """Yield (name, model, feature that it sees): this model, and what its answer is to be compared with."""
    yield model.settings.interaction, model, f
    if model.settings.interaction == "full":
        silent = copy(model)  # with the same weights
        silent.settings = replace(model.settings, interaction="norequest")
        yield "full, its request set to zero", silent, f
    for name in ("norequest", "static"):
        path = Path(checkpoint).resolve().parent.with_name(f"stage2-{name}") / CHECKPOINT
        if path.is_file() and name != model.settings.interaction:
            rival = LMEye(lmeye.read_checkpoint(path)[1], model.llm, model.tokenizer, model.clip, model.preprocess,
                          model.clip_tokenizer)
            rival.load(path)
            yield f"{name}, as trained", rival, f
    yield "blind: a gray picture", model, gray


def inspect_answer(model, checkpoint, path, questions, out):
    """Draw what led to an answer: the gaze for two questions, p under the rivals, what each feature was worth."""
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
        veil = Image.fromarray((200 * (1 - gaze(model, source, question, said))).byte().numpy())
        veil = veil.resize(side, Image.Resampling.BICUBIC)
        page.paste(Image.composite(Image.new("RGB", side, "#888888"), picture, veil), (x, 30))
        write(x, 8, question, "#555555")
        write(x, 292, f"{said}   p = {math.exp(log_p(model, f, question, said)):.2f}")
        lost = without(model, f, question, said) if model.settings.interaction != "static" else []
        write(x, 322, "log p lost without each feature" if lost else "", "#555555")
        for i, value in enumerate(lost):
            bar(x, 342 + 18 * i, abs(value) / max(1e-6, *map(abs, lost)), f"f{i + 1}  {value:+.2f}", "#1f77b4")
    write(20, 292, "its answer, and p of the first one", "#555555")
    for i, (name, rival, seen) in enumerate(rivals(model, checkpoint, f, gray)):
        p = math.exp(log_p(rival, seen, questions[0], answers[0]))
        write(20, 322 + 38 * i, f"{name}: {rival.generate(seen, questions[:1])[0]}")
        bar(20, 340 + 38 * i, p, f"{p:.2f}", "#2ca02c")
    page.save(out, "PNG")
    print(out)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE… [QUESTION]",
                        help="pictures, then a question; the last word is a picture if it is a file or ends like one")
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
    for name, low, high in (("max_tokens", 1, 10 ** 6), ("batch_size", 1, 10 ** 6), ("top_k", 0, 10 ** 6),
                            ("temperature", 0, 100), ("top_p", 0, 1), ("seed", 0, 10 ** 9)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} has to be from {low} to {high}")
    return args


def main():
    args = parse_args()
    *pictures, last = args.inputs
    is_picture = not pictures or os.path.isfile(last) or last.lower().endswith(data.ENDINGS)
    pictures, questions = (args.inputs, []) if is_picture else (pictures, [last])
    if args.inspect:
        pictures, questions = args.inputs[:1], (args.inputs[1:] + [SECOND])[:2]
        if not 2 <= len(args.inputs) <= 3 or args.questions or any(map(os.path.isfile, questions)):
            raise UserError("--inspect takes one picture and one or two questions")
    if args.questions:
        questions += filter(str.strip, Path(args.questions).read_text("utf-8-sig", "replace").splitlines())
    questions = [q.strip() for q in questions]
    if not all(map(data.is_text, questions)):
        raise UserError("the question is empty or unreadable")
    for path in pictures:
        data.load_image(path)  # a wrong picture is told before the models are loaded

    own = args.llm and args.clip
    checkpoint = args.checkpoint or newest(args.out, lmeye.settings_from(args).preset if own else "*")
    model, stage = load(args, checkpoint)
    if args.inspect and stage == 1:
        raise UserError("--inspect looks into answers: it needs a checkpoint of stage 2")
    if stage == 1 and questions:
        note("this checkpoint has seen stage 1 only, captions. To get answers:  python train.py --stage 2")
        questions = []
    check_words(model, " ".join(questions))
    options = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                   generator=torch.Generator(model.device).manual_seed(args.seed))
    if args.inspect:
        inspect_answer(model, checkpoint, pictures[0], questions, args.inspect)
    elif len(pictures) > 1 or args.questions:
        if stage == 2 and not questions:
            raise UserError("several pictures: behind them a question is needed, or --questions FILE")
        batch(model, pictures, questions, options, args.batch_size)
    elif stage == 1 or questions:
        answer(model, look(model, pictures[0]), questions[0] if questions else None, options)
    else:
        with contextlib.suppress(EOFError):
            chat(model, look(model, pictures[0]), options)


if __name__ == "__main__":
    lmeye.run(main)
