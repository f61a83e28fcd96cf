"""Look into an answer, and at what a run left.

    python tests/lab/look.py answer cat.jpg "what is it?"            where it looks, what its request is worth
    python tests/lab/look.py logs RUN/log.csv [OTHER/log.csv]        the losses of a run, and of another
    python tests/lab/look.py sheet RUN --images photos.zip           twelve pictures with a run's answers
    python tests/lab/look.py sheet RUN --images photos.zip --wrong   twelve of its failures
    python tests/lab/look.py compare RUN RUN --images photos.zip     two runs side by side, for human judges

Each draws a PNG and prints its path. A picture that is there already is renamed. RUN is the folder of a run
or of an evaluation, or an answers.jsonl; --images is the folder or zip of its pictures.
"""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C meanwhile ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import json
import math
import random
import sys
import textwrap
from copy import copy
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import lmeye
import sample
from lmeye import CHECKPOINT, LMEye, UserError, printable

BLUE, RED, GREEN, GRAY = "#1f77b4", "#d62728", "#2ca02c", "#555555"
LIGHT_BLUE, LIGHT_RED, LIGHT_GRAY = "#9ecae1", "#f7b6b6", "#bbbbbb"
FONT = ImageFont.load_default(13)


def save(page, path):
    """Write a picture as a PNG and print its path. What is there already is renamed."""
    sample.set_aside(path)
    page.save(path, "PNG")
    print(path)


# ---- Looking into an answer --------------------------------------------------------------------------------

SECOND = "what color is the background?"  # asked beside the first: so one sees the place of interest move
SCALE = 1024  # of the loss, lest small gradients vanish in fp16; saliency is relative anyway


def saliency(model, picture, question, answer):
    """How much each place of a PIL picture moved log p(answer) → (h, w) from 0 to 1, fp32, on the CPU.

    It is input × gradient (Shrikumar et al., arXiv 1605.01713), summed over channels. The places are a ViT's
    patch embeddings, or those of a ResNet's last map of at least 7 × 7. UserError for other image towers.
    """
    visual = model.clip.visual
    if not (hasattr(visual, "ln_pre") or hasattr(visual, "layer4")):
        raise UserError("only CLIP's own image towers, ViT and ResNet, can be looked into")
    is_vit, maps = hasattr(visual, "ln_pre"), []

    def keep(layer, inputs, output):
        if is_vit or output.shape[-1] >= 7:  # a ResNet's later maps are too coarse
            maps.append(output)

    names = ("ln_pre",) if is_vit else ("layer1", "layer2", "layer3", "layer4")
    hooks = [getattr(visual, name).register_forward_hook(keep) for name in names]
    pixels = model.preprocess(picture)[None].to(model.device, model.clip_text.transformer.get_cast_dtype())
    f = model.clip.encode_image(pixels.requires_grad_()).float()  # model.encode_image has no gradients
    for hook in hooks:
        hook.remove()
    loss = model(f, model.tokenize([question], [answer]))
    (gradient,) = torch.autograd.grad(SCALE * loss, maps[-1])
    product = (maps[-1].float() * gradient.float())[0]
    if is_vit:  # (1 + h·w, channels), the class token first
        places = product[1:].sum(1).unflatten(0, visual.grid_size)
    else:  # (channels, h, w)
        places = product.sum(0)
    places = places.detach().abs().cpu()
    return places / places.max().clamp(min=1e-9)


@torch.no_grad()
def log_p(model, f, question, answer):
    """Log-probability of an answer and its end, given f (1, C)."""
    return -model(f, model.tokenize([question], [answer])).item()


def leave_one_out(model, f, question, answer):
    """What log p(answer) loses if one of the decomposed features is zero: N numbers. f is (1, C)."""
    N, W = model.settings.n_features, model.request.out_features
    whole, losses = log_p(model, f, question, answer), []
    for i in range(N):
        keep = torch.ones(N * W, device=model.device)
        keep[i * W:(i + 1) * W] = 0
        with model.decompose.register_forward_hook(lambda layer, inputs, output: output * keep):
            losses.append(whole - log_p(model, f, question, answer))
    return losses


def compared_with(model, checkpoint, f, gray):
    """A model, and what it is compared with → a list of (name, model, the feature that it is shown). The
    controls `norequest` and `static` are looked for beside the run of the checkpoint."""
    shown, run = [(model.settings.variant, model, f)], Path(checkpoint).resolve().parent
    if model.settings.variant == "lmeye":
        silent = copy(model)  # with the same weights
        silent.settings = replace(model.settings, variant="norequest")
        shown.append(("the same, its request zero", silent, f))
        for name in ("norequest", "static"):
            name_of_run = run.name.replace("stage2", f"stage2-{name}", 1).replace("static-align", "static")
            path = run.with_name(name_of_run) / CHECKPOINT
            if path.is_file():
                frozen = (model.llm, model.tokenizer, model.clip, model.preprocess, model.clip_tokenizer)
                other = LMEye(lmeye.read_adapter(path)[1], *frozen)
                other.load(path)
                shown.append((f"{name}, as trained", other, f))
    return [*shown, ("blind: a gray picture", model, gray)]


SIDE = 256  # of a picture on the page, in pixels
LEFT, MIDDLE, RIGHT = 20, 40 + SIDE, 60 + 2 * SIDE  # where the page's columns begin


def draw_answer(model, checkpoint, path, questions):
    """What led to the answers to two questions about a picture file → a page.

    Left the picture, and below it what the model and others answer to the first question, with the
    probability that each gives to the model's answer. Then for each question: the picture, gray where nothing
    moved the answer, and below it what the answer's log p loses without each of the N features.
    """
    source = data.load_image(path)
    f = model.encode_image(model.preprocess(source)[None])
    gray = model.encode_image(model.preprocess(Image.new("RGB", source.size, "gray"))[None])
    picture = ImageOps.fit(source, (SIDE, SIDE))
    answers = model.generate(f.expand(2, -1), questions)
    page = Image.new("RGB", (848, max(530, 352 + 18 * model.settings.n_features)), "white")
    canvas = ImageDraw.Draw(page)

    def write(x, y, text, color="black"):
        text = printable(text)
        canvas.text((x, y), text if len(text) < 42 else text[:40] + "…", color, FONT)

    write(LEFT, 8, Path(path).name)
    page.paste(picture, (LEFT, 30))
    write(LEFT, 292, "answers, and p of the first one", GRAY)
    y = 322
    for name, other, seen in compared_with(model, checkpoint, f, gray):
        p = math.exp(log_p(other, seen, questions[0], answers[0]))
        write(LEFT, y, f"{name}: {other.generate(seen, questions[:1])[0]}")
        canvas.rectangle((LEFT, y + 18, LEFT + 120 * p, y + 30), GREEN)
        write(LEFT + 120 * p + 6, y + 16, f"{p:.2f}")
        y += 38

    lost = [[], []]  # for each question, by each feature; `static` has none
    if model.settings.variant != "static":
        lost = [leave_one_out(model, f, *asked) for asked in zip(questions, answers)]
    largest = max([1e-6, *map(abs, lost[0] + lost[1])])  # both panels have one scale
    for x, question, answer, of_answer in zip((MIDDLE, RIGHT), questions, answers, lost):
        fog = 200 * (1 - saliency(model, source, question, answer))
        fog = Image.fromarray(fog.byte().numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        write(x, 8, question, GRAY)
        page.paste(Image.composite(Image.new("RGB", (SIDE, SIDE), "#888888"), picture, fog), (x, 30))
        write(x, 292, f"{answer}, p = {math.exp(log_p(model, f, question, answer)):.2f}")
        write(x, 322, "log p gained | lost without a feature" if of_answer else "", GRAY)
        for i, loss in enumerate(of_answer):
            zero, end, y = x + 80, x + 80 + 75 * loss / largest, 343 + 18 * i
            canvas.rectangle((min(zero, end), y, max(zero, end), y + 12), BLUE)
            canvas.line((zero, y - 3, zero, y + 15), GRAY)
            write(x + 170, y - 2, f"f{i + 1}: {loss:+.2f}")
    return page


def look_into_answer(args):
    checkpoint = args.checkpoint or sample.newest("out")
    model, stage = sample.load_trained(checkpoint)
    if stage == 1:
        raise UserError(f"{checkpoint}: has seen stage 1 only, captions: to look into answers, train stage 2")
    sample.note_unknown_words(model, f"{args.question} {args.second}")
    save(draw_answer(model, checkpoint, args.picture, [args.question, args.second]), args.png)


# ---- The losses of a run, and of another -------------------------------------------------------------------


def draw_curves(curves):
    """Draw a list of (name, color, points) → a page. Points are (step, loss); the losses' axis is log."""
    page = Image.new("RGB", (800, 480), "white")
    canvas = ImageDraw.Draw(page)
    left, right, top, bottom = 60, 770, 44 + 18 * len(curves), 420  # of the field
    xs, ys = [], []
    for _, _, points in curves:
        xs += [step for step, _ in points]
        ys += [math.log(loss) for _, loss in points]

    def at(step, loss):
        x = (step - min(xs)) / max(max(xs) - min(xs), 1e-9)
        y = (math.log(loss) - min(ys)) / max(max(ys) - min(ys), 1e-9)
        return left + (right - left) * x, bottom - (bottom - top) * y

    for share in (0, 0.25, 0.5, 0.75, 1):
        step = min(xs) + share * (max(xs) - min(xs))
        loss = math.exp(min(ys) + share * (max(ys) - min(ys)))
        x, y = at(step, loss)
        canvas.text((x, bottom + 8), f"{step:,.0f}", "black", FONT, "ma")
        canvas.line((left, y, right, y), "#dddddd")
        canvas.text((left - 6, y), f"{loss:.3g}", "black", FONT, "rm")
    canvas.text(((left + right) / 2, 470), "step", "black", FONT, "md")
    canvas.text((8, top - 26), "loss of a token (logarithmic)", "black", FONT)
    for i, (name, color, points) in enumerate(curves):
        canvas.text((left, 8 + 18 * i), name, color, FONT)
        places = [at(step, loss) for step, loss in points]
        canvas.line(places, color, 2)
        for x, y in places:
            canvas.ellipse((x - 2, y - 2, x + 2, y + 2), color)  # a single point is no line
    return page


def read_log(path):
    """A run's log.csv → {column: [(step, loss), …]} of its columns of losses. UserError if it is none.

    A loss that is not finite, or not above zero, has no place on a logarithmic axis: a note tells how many.
    """
    found, left_out = {"loss": [], "val_loss": [], "val_loss_shuffled": []}, 0
    try:
        for row in csv.DictReader(Path(path).read_text("utf-8").splitlines()):
            for column, points in found.items():
                loss = float(row[column] or "nan")  # there is not a validation at each step
                if 0 < loss < math.inf:
                    points.append((float(row["step"]), loss))
                elif row[column]:
                    left_out += 1
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: is not as train.py writes a log.csv ({error!r})") from error
    if not found["loss"]:
        raise UserError(f"{path}: holds no losses: is it a log.csv of a run?")
    if left_out:
        sample.note(f"{path}: {left_out} losses that are not finite and above zero are not drawn")
    return found


def look_at_logs(args):
    curves = []
    for path, shades in ((args.other, (LIGHT_RED, RED, LIGHT_GRAY)), (args.log, (LIGHT_BLUE, BLUE, GRAY))):
        log = read_log(path) if path else {}
        for (column, points), color in zip(log.items(), shades):
            if points:
                step, loss = points[-1]
                print(f"{path}: {column} {loss:.4f} at step {step:,.0f}")
                curves.append((f"{path}: {column}", color, points))
    save(draw_curves(curves), args.png)


# ---- Sheets of answers -------------------------------------------------------------------------------------

FIELDS = ("image", "answer", "truth", "category", "right", "blind_right")  # of answers.jsonl


def read_answers(path):
    """The answers of an evaluation, dicts with at least FIELDS, and "asked", the turns up to the question.
    `path` is an answers.jsonl, its folder or that of the run. UserError, with the line, if it is none."""
    for file in (Path(path), Path(path, "answers.jsonl"), Path(path, "evaluation", "answers.jsonl")):
        if file.is_file():
            break
    rows = []
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        try:
            if line:
                row = json.loads(line)
                row["asked"] = " / ".join(row["turns"]) or "(caption)"
                rows.append({name: row[name] for name in FIELDS} | row)  # an error if one is missing
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}, line {number}: is not as sample.py writes it ({error!r})") from error
    if not rows:
        raise UserError(f"{file}: holds no answers")
    return rows


def questions(answers):
    """What was asked about what, in order: runs can be compared where it is the same."""
    return [(row["image"], row["asked"]) for row in answers]


def draw_sheet(cells, images, columns=4, size=192):
    """Draw a list of (image, [(text, color), …]) → a page of pictures, each with its whole texts below it.
    `images` is the folder or zip of the pictures. UserError if one can't be read."""
    pictures, below = data.Pictures(images), []  # below: the lines of each, with their colors
    for _, texts in cells:
        lines = []
        for text, color in texts:
            lines += [(line, color) for line in textwrap.wrap(printable(text), 28)]
        below.append(lines)
    width, height = size + 20, size + 20 + 16 * max(map(len, below))
    page = Image.new("RGB", (columns * width + 20, math.ceil(len(cells) / columns) * height + 10), "white")
    canvas = ImageDraw.Draw(page)
    for i, ((image, _), lines) in enumerate(zip(cells, below)):
        x, y = 20 + i % columns * width, 10 + i // columns * height
        picture = data.decode_image(pictures.open(image))
        page.paste(ImageOps.pad(picture, (size, size), color="white"), (x, y))
        for k, (line, color) in enumerate(lines):
            canvas.text((x, y + size + 4 + 16 * k), line, color, FONT)
    return page


def look_at_sheet(args):
    rows = read_answers(args.run)
    random.Random(0).shuffle(rows)  # always the same order
    if args.wrong:
        wrong = [row for row in rows if row["right"] is False]  # None: nobody knows
        print(f"{len(wrong):,} of {len(rows):,} answers are wrong")
        if not wrong:
            raise UserError(f"{args.run}: there is nothing to draw")
        rows = sorted(wrong[:args.number], key=lambda row: row["category"])
    cells = []
    for row in rows[:args.number]:
        texts = [(row["asked"], GRAY), (row["answer"], "black")]
        if row["right"] is False:
            texts.append((f"truth: {row['truth']}", RED))
        cells.append((row["image"], texts))
    save(draw_sheet(cells, args.images), args.png)


def pair_blindly(first, second, names, number, rng):
    """The answers of two runs → (cells of a sheet, key): up to `number` questions on which they differ, as A
    and B, in an order that only the key tells. UserError if they were not asked the same, or never differ."""
    if questions(first) != questions(second):
        raise UserError(f"{names[0]} and {names[1]} were not asked the same questions")
    differ = [pair for pair in zip(first, second) if pair[0]["answer"] != pair[1]["answer"]]
    print(f"the two differ on {len(differ):,} of {len(first):,} questions")
    if not differ:
        raise UserError("there is nothing to judge")
    cells, key = [], []
    for n, pair in enumerate(rng.sample(differ, min(number, len(differ))), 1):
        a, b = rng.sample((0, 1), 2)
        texts = [f"{n}. {pair[0]['asked']}", f"A: {pair[a]['answer']}", f"B: {pair[b]['answer']}"]
        cells.append((pair[0]["image"], list(zip(texts, (GRAY, "black", "black")))))
        key.append({"number": n, "A": names[a], "B": names[b], "truth": pair[0]["truth"]})
    return cells, key


def compare(args):
    names, key_path = (args.run, args.other), Path(args.png).with_suffix(".key.json")
    rng = random.SystemRandom()  # who has seen the key of one sheet knows nothing about the next
    cells, key = pair_blindly(read_answers(args.run), read_answers(args.other), names, args.number, rng)
    save(draw_sheet(cells, args.images), args.png)
    sample.set_aside(key_path)
    lmeye.write_atomically(key_path, json.dumps(key, indent=1, ensure_ascii=False).encode())
    print(f"{key_path}: which run is A and which B; not for the judges")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(required=True, metavar="answer, logs, sheet or compare")

    def command(name, look, *positional):
        part = commands.add_parser(name)
        part.set_defaults(look=look)
        for argument in positional:
            part.add_argument(argument)
        part.add_argument("--png", default=f"{name}.png", help=f"where to draw (default: {name}.png)")
        if name in ("sheet", "compare"):
            part.add_argument("--images", default=".", help="folder or zip of the pictures (default: here)")
            part.add_argument("--number", type=int, default=12, help="of pictures, at most (default: 12)")
        return part.add_argument

    add = command("answer", look_into_answer, "picture", "question")
    add("second", nargs="?", default=SECOND, help=f"another question, to compare (default: {SECOND})")
    add("--checkpoint", metavar="FILE", help=f"an {CHECKPOINT} (default: the newest below out)")
    add = command("logs", look_at_logs, "log")
    add("other", nargs="?", help="the log.csv of another run, to compare with")
    add = command("sheet", look_at_sheet, "run")
    add("--wrong", action="store_true", help="failures only")
    command("compare", compare, "run", "other")
    args = parser.parse_args()
    if getattr(args, "number", 1) < 1:
        parser.error("--number has to be at least 1")
    args.look(args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lmeye.run_main(main)
