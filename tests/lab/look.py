"""Look into an answer, and at what a run left.

    python tests/lab/look.py answer picture.jpg "what shape is it?"     where it looks, and what the request is worth
    python tests/lab/look.py curve out/mini/stage2/log.csv              the loss of a run
    python tests/lab/look.py logs mine/log.csv reference/log.csv        the loss of a run over that of another
    python tests/lab/look.py differences tables.md                      what evidence.py found, as a picture
    python tests/lab/look.py sheet RUN/evaluation/answers.jsonl         twelve pictures with the model's answers
    python tests/lab/look.py sheet RUN/evaluation/answers.jsonl --wrong     its failures, up to four of each category

Each draws a PNG and prints its path. A file that is there already is never written over.
"""

import argparse
import csv
import itertools
import json
import math
import os
import sys
import tarfile
import textwrap
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import lmeye
import sample
from lmeye import CHECKPOINT, LMEye, UserError

BLUE, RED, GREEN, GRAY = "#1f77b4", "#d62728", "#2ca02c", "#555555"
LIGHT_BLUE, LIGHT_RED = "#9ecae1", "#f7b6b6"


def refuse_existing(path):
    """UserError if there is something at `path`: pictures are not written over."""
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already, and is not written over: name another file, or remove it")


def save(page, path):
    """Write a picture as a PNG and print its path. UserError if there is something already."""
    refuse_existing(path)
    with open(path, "xb") as file:
        page.save(file, "PNG")
    print(path)


# ---- Looking into an answer ----------------------------------------------------------------------------------

SECOND = "what color is the background?"  # shown beside the question, to see the place move that the model looks at
SCALE = 1024  # of the loss, lest small gradients vanish in fp16; saliency is divided by its largest value anyway


def saliency(model, picture, question, answer):
    """How much each place of a PIL picture moved log p(answer): input × gradient (Shrikumar et al., arXiv 1605.01713),
    summed over channels → (h, w) from 0 to 1, fp32, on the CPU.

    The places are a ViT's patch embeddings, or those of a ResNet's last feature map of at least 7 × 7. UserError for
    other image towers.
    """
    visual = model.clip.visual
    if hasattr(visual, "ln_pre"):
        layers = [visual.ln_pre]
    elif hasattr(visual, "layer4"):
        layers = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    else:
        raise UserError("only CLIP's own image towers can be looked into, ViT and ResNet; this one is another")

    outputs = []

    def keep(layer, inputs, output):
        outputs.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    pixels = model.preprocess(picture)[None].to(model.device).to(model.clip_text.transformer.get_cast_dtype())
    f = model.clip.encode_image(pixels.requires_grad_()).float()
    for hook in hooks:
        hook.remove()
    loss = model(f, model.tokenize([question], [answer]))
    gradients = torch.autograd.grad(SCALE * loss, outputs)

    if outputs[0].ndim == 3:  # (1, 1 + h·w, channels), the class token first
        x, gradient = outputs[0][0, 1:].float(), gradients[0][0, 1:].float()
        places = (x * gradient).sum(1).unflatten(0, visual.grid_size)
    else:  # (1, channels, h, w) each, from the largest map to the smallest
        last = 0
        for i, output in enumerate(outputs):
            if output.shape[-1] >= 7:
                last = i
        places = (outputs[last][0].float() * gradients[last][0].float()).sum(0)
    places = places.detach().abs().cpu()
    return places / places.max().clamp(min=1e-9)


@torch.no_grad()
def log_p(model, f, question, answer):
    """Log-probability of an answer and its end, given f (1, C)."""
    return -model(f, model.tokenize([question], [answer])).item()


def leave_one_out(model, f, question, answer):
    """What log p(answer) loses when one of the decomposed features is zero: a list of N numbers. f is (1, C)."""
    N, W = model.settings.n_features, model.request.out_features
    whole, losses = log_p(model, f, question, answer), []
    for i in range(N):
        keep = torch.ones(N, W, device=model.device)
        keep[i] = 0

        def without_one(layer, inputs, output):
            return output * keep.flatten()

        hook = model.decompose.register_forward_hook(without_one)
        losses.append(whole - log_p(model, f, question, answer))
        hook.remove()
    return losses


def baselines(model, checkpoint, f, gray):
    """This model, and what its answer is to be compared with → a list of (name, model, the feature that it is shown).

    Those that were trained without a request, or without <img-d>, are looked for beside the run of the checkpoint.
    """
    shown = [(model.settings.variant, model, f)]
    if model.settings.variant == "full":
        silent = copy(model)  # with the same weights
        silent.settings = replace(model.settings, variant="norequest")
        shown.append(("full, its request set to zero", silent, f))
    for name in ("norequest", "static"):
        path = Path(checkpoint).resolve().parent.with_name(f"stage2-{name}") / CHECKPOINT
        if name != model.settings.variant and path.is_file():
            settings = lmeye.read_adapter(path)[1]
            other = LMEye(settings, model.llm, model.tokenizer, model.clip, model.preprocess, model.clip_tokenizer)
            other.load(path)
            shown.append((f"{name}, as trained", other, f))
    shown.append(("blind: a gray picture", model, gray))
    return shown


SIDE = 256  # of a picture on the page, in pixels
LEFT, MIDDLE, RIGHT = 20, 40 + SIDE, 60 + 2 * SIDE  # where the page's columns begin


def draw_answer(model, checkpoint, path, questions):
    """What led to the answers to two questions about a picture file → a page.

    Left the picture, and below it what the baselines answer to the first question, with the probability that each gives
    to the model's own answer. In the middle and at the right, for each question: the picture, gray where nothing moved
    the answer, and below it what the answer's log-probability loses without each of the N features.
    """
    source = data.load_image(path)
    f = model.encode_image(model.preprocess(source)[None])
    gray = model.encode_image(model.preprocess(Image.new("RGB", source.size, "gray"))[None])
    enlarge = Image.Resampling.NEAREST if source.width < SIDE else Image.Resampling.BICUBIC
    picture = ImageOps.fit(source, (SIDE, SIDE), enlarge)
    room = model.max_text_tokens - max(len(ids) for ids in model.token_ids(questions, questions)[0]) - 1  # 1: the end
    answers = model.generate(f.expand(2, -1), questions, max_tokens=max(1, min(64, room)))

    page = Image.new("RGB", (848, max(530, 352 + 18 * model.settings.n_features)), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)

    def write(x, y, text, color="black"):
        text = lmeye.printable(text)
        canvas.text((x, y), text if len(text) < 42 else text[:40] + "…", color, font)

    def bar(x, y, share, text, color):
        canvas.rectangle((x, y, x + max(1, 120 * share), y + 12), color)
        write(x + 126, y - 2, text)

    write(LEFT, 8, Path(path).name)
    page.paste(picture, (LEFT, 30))
    write(LEFT, 292, "its answer, and p of the first one", GRAY)
    y = 322
    for name, other, seen in baselines(model, checkpoint, f, gray):
        p = math.exp(log_p(other, seen, questions[0], answers[0]))
        write(LEFT, y, f"{name}: {other.generate(seen, questions[:1])[0]}")
        bar(LEFT, y + 18, p, f"{p:.2f}", GREEN)
        y += 38

    for x, question, answer in zip((MIDDLE, RIGHT), questions, answers):
        fog = 200 * (1 - saliency(model, source, question, answer))
        fog = Image.fromarray(fog.byte().numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        write(x, 8, question, GRAY)
        page.paste(Image.composite(Image.new("RGB", (SIDE, SIDE), "#888888"), picture, fog), (x, 30))
        write(x, 292, f"{answer}, p = {math.exp(log_p(model, f, question, answer)):.2f}")
        if model.settings.variant == "static":
            continue  # has no decomposed features
        write(x, 322, "log p lost without each feature", GRAY)
        losses = leave_one_out(model, f, question, answer)
        largest = max(1e-6, max(abs(loss) for loss in losses))
        for i, loss in enumerate(losses):
            bar(x, 342 + 18 * i, abs(loss) / largest, f"f{i + 1}: {loss:+.2f}", BLUE)
    return page


def look_into_answer(args):
    refuse_existing(args.png)
    questions = [args.question.strip(), args.second.strip()]
    for question in questions:
        if os.path.isfile(question):
            raise UserError(f"{question}: is a file, where a question is needed; one picture is looked at at a time")
        if not data.is_text(question):
            raise UserError("a question is empty or unreadable")
    data.load_image(args.picture)  # a wrong picture is told before the models are loaded
    checkpoint = args.checkpoint or sample.newest(args)
    model, stage = sample.load_trained(args, checkpoint)
    if stage == 1:
        raise UserError(f"{checkpoint}: has seen stage 1 only, captions: to look into answers, train stage 2")
    sample.note_unknown_words(model, " ".join(questions))
    save(draw_answer(model, checkpoint, args.picture, questions), args.png)


# ---- Curves --------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    name: str
    color: str
    points: list  # of (x, y)


def position(value, low, high, log):
    """Where a value stands between low and high, from 0 to 1, on a linear or logarithmic axis."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def marks(low, high, log):
    """Five values from low to high, evenly spaced on their axis."""
    shares = (0, 0.25, 0.5, 0.75, 1)
    return [low * (high / low) ** share if log else low + share * (high - low) for share in shares]


def draw_curves(curves, x_name, log_x=False, log_y=False):
    """Draw a list of Curve → a page. A logarithmic axis needs values above zero."""
    width, height, left, right, bottom = 800, 480, 60, 30, 60
    top = 24 + 18 * len(curves)
    page = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    xs, ys = [], []
    for curve in curves:
        xs += [x for x, _ in curve.points]
        ys += [y for _, y in curve.points]

    def at_x(x):
        return left + (width - left - right) * position(x, min(xs), max(xs), log_x)

    def at_y(y):
        return height - bottom - (height - bottom - top) * position(y, min(ys), max(ys), log_y)

    for x in marks(min(xs), max(xs), log_x):
        text = f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        canvas.text((at_x(x), height - bottom + 8), text, "black", font, "ma")
    for y in marks(min(ys), max(ys), log_y):
        canvas.line((left, at_y(y), width - right, at_y(y)), "#dddddd")
        canvas.text((left - 6, at_y(y)), f"{y:.3g}", "black", font, "rm")
    canvas.text((width / 2, height - 10), x_name, "black", font, "md")
    for i, curve in enumerate(curves):
        canvas.text((left, 12 + 18 * i), curve.name, curve.color, font)
        if len(curve.points) > 1:
            canvas.line([(at_x(x), at_y(y)) for x, y in curve.points], curve.color, 2)
        for x, y in curve.points if len(curve.points) < 20 else []:
            canvas.ellipse((at_x(x) - 3, at_y(y) - 3, at_x(x) + 3, at_y(y) + 3), curve.color)
    return page


def tile(pages, columns=2):
    """Pages of one size → one page, with so many of them beside each other."""
    width, height = pages[0].size
    whole = Image.new("RGB", (columns * width, math.ceil(len(pages) / columns) * height), "white")
    for i, page in enumerate(pages):
        row, column = divmod(i, columns)
        whole.paste(page, (column * width, row * height))
    return whole


def read_log(path):
    """A run's log.csv → {column: [(step, loss), …]} of its three columns of losses. UserError if it is none.

    A loss that is not finite, or not above zero, has no place on a logarithmic axis: it is left out, and a note on the
    standard error counts them.
    """
    found, left_out = {"loss": [], "val_loss": [], "val_loss_shuffled": []}, 0
    rows = csv.DictReader(data.read_text(path).splitlines())
    try:
        for row in rows:
            for column, points in found.items():
                if row[column] == "":
                    continue  # a step without a validation
                step, loss = float(row["step"]), float(row[column])
                if 0 < loss < math.inf:
                    points.append((step, loss))
                else:
                    left_out += 1
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {rows.line_num}: is not as train.py writes a log.csv "
                        f"({type(error).__name__}: {error})") from error
    if not found["loss"]:
        raise UserError(f"{path}: holds no losses: is it a log.csv of a run?")
    if left_out:
        print(f"note: {path}: {left_out} losses that are not finite and above zero are not drawn", file=sys.stderr)
    return found


def look_at_curve(args):
    png = args.png or Path(args.log).with_name("loss.png")
    refuse_existing(png)
    log, curves = read_log(args.log), []
    for column, color in (("loss", BLUE), ("val_loss", RED), ("val_loss_shuffled", "#7f7f7f")):
        if log[column]:
            curves.append(Curve(column.replace("_", " "), color, log[column]))
    save(draw_curves(curves, "step", log_y=True), png)


def look_at_logs(args):
    refuse_existing(args.png)
    curves = []
    for path, color, light in ((args.reference, RED, LIGHT_RED), (args.log, BLUE, LIGHT_BLUE)):
        log = read_log(path)
        curves.append(Curve(f"{path}: loss", light, log["loss"]))
        if log["val_loss"]:
            curves.append(Curve(f"{path}: val loss", color, log["val_loss"]))
        for column, points in log.items():
            if points:
                step, value = points[-1]
                print(f"{path}: {column} {value:.4f} at step {step:,.0f}")
    save(draw_curves(curves, "step", log_y=True), args.png)


# ---- Differences with their intervals ------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean, and half the width of its 95% interval."""
    mean: float
    half: float


def read_differences(path):
    """The rows "one − other" of the tables of evidence.py in a file → {row: {column: Interval}}. Shares of answers that
    are "yes" are left out. UserError if there are none, or if one has no interval."""
    rows, columns = {}, []
    for number, line in enumerate(data.read_text(path).splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| |"):
            columns = cells[1:]
        elif " − " in cells[0]:
            found = rows.setdefault(cells[0], {})
            for column, cell in zip(columns, cells[1:]):
                try:
                    mean, half = cell.split(" ± ")
                    interval = Interval(float(mean), float(half))
                except ValueError:
                    raise UserError(f"{path}, line {number}: {cell} is no mean with its interval, as 1.5 ± 0.5") from None
                if not column.endswith("says yes"):
                    found[column.removesuffix(": right")] = interval
    if not rows:
        raise UserError(f"{path}: holds no rows of differences, as evidence.py prints for several folders")
    return rows


def draw_differences(rows):
    """Draw {row: {column: Interval}}: a group for each column, in it a dot with its interval for each row."""
    columns = []
    for found in rows.values():
        columns += [column for column in found if column not in columns]
    colors = dict(zip(rows, itertools.cycle((BLUE, RED, GREEN, "#ff7f0e", "#9467bd", GRAY))))
    width, left, right, step = 800, 110, 20, 9
    top, group = 40 + 18 * len(rows), step * len(rows) + 12
    page = Image.new("RGB", (width, top + group * len(columns) + 40), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    ends = [0.0]
    for found in rows.values():
        for mean, half in found.values():
            ends += [mean - half, mean + half]
    low, high = 10 * math.floor(min(ends) / 10), 10 * math.ceil(max(ends) / 10)

    def at(value):
        return left + (width - left - right) * position(value, low, high, False)

    for value in range(low, high + 1, 10):
        canvas.line((at(value), top, at(value), page.height - 36), "black" if value == 0 else "#dddddd")
        canvas.text((at(value), page.height - 30), f"{value:+d}" if value else "0", "black", font, "ma")
    canvas.text((left, 12), "points by which one is ahead of another (right of 0) or behind it, with 95% intervals:", "black", font)
    for i, row in enumerate(rows):
        canvas.text((left, 32 + 18 * i), row.replace(" − ", " against "), colors[row], font)  # the font has no minus
    for i, column in enumerate(columns):
        canvas.text((left - 12, top + group * i + group / 2), column, "black", font, "rm")
        for k, (row, found) in enumerate(rows.items()):
            if column in found:
                mean, half = found[column]
                y = top + group * i + 10 + step * k
                canvas.line((at(mean - half), y, at(mean + half), y), colors[row], 2)
                canvas.ellipse((at(mean) - 3, y - 3, at(mean) + 3, y + 3), colors[row])
    return page


def look_at_differences(args):
    refuse_existing(args.png)
    save(draw_differences(read_differences(args.tables)), args.png)


# ---- Sheets of answers ---------------------------------------------------------------------------------------


class Cell(NamedTuple):
    image: str | data.Member
    lines: list  # of (text, color)


def draw_sheet(cells, columns=4, size=192):
    """Draw pictures with lines of text below them, from a list of Cell → a page. UserError if one can't be read."""
    font, wrapped = ImageFont.load_default(13), []
    for cell in cells:
        lines = []
        for text, color in cell.lines:
            for line in textwrap.wrap(lmeye.printable(text), 28)[:4]:
                lines.append((line, color))
        wrapped.append(lines)
    height = size + 20 + 16 * max(len(lines) for lines in wrapped)
    page = Image.new("RGB", (columns * (size + 20) + 20, math.ceil(len(cells) / columns) * height + 10), "white")
    canvas = ImageDraw.Draw(page)
    for i, (cell, lines) in enumerate(zip(cells, wrapped)):
        x, y = 20 + i % columns * (size + 20), 10 + i // columns * height
        picture = data.load_image(cell.image)
        enlarge = Image.Resampling.NEAREST if picture.width < size else Image.Resampling.BICUBIC
        page.paste(picture.resize((size, size), enlarge), (x, y))
        for k, (line, color) in enumerate(lines):
            canvas.text((x, y + size + 4 + 16 * k), line, color, font)
    return page


def read_answers(path):
    """An answers.jsonl of an evaluation → its rows, dicts of texts. UserError, with the line, if it is none."""
    rows = []
    for number, line in enumerate(data.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = {name: row[name] for name in ("image", "question", "answer", "truth", "category")}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: is not as an evaluation writes it "
                            f"({type(error).__name__}: {error})") from error
        for name, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{path}, line {number}, {name}: is not a text")
        rows.append(texts)
    if not rows:
        raise UserError(f"{path}: holds no answers")
    return rows


def find_picture(text):
    """What an evaluation wrote of a picture, a path or "ARCHIVE: NAME" → a path or Member, for `data.load_image`."""
    parts = text.split(": ")
    for i in range(1, len(parts)):
        archive, name = ": ".join(parts[:i]), ": ".join(parts[i:])
        if os.path.isfile(archive) and not os.path.isfile(text):
            if not tarfile.is_tarfile(archive):
                return data.Member(archive, name)
            with tarfile.open(archive, ignore_zeros=True) as tar:
                for info in tar:
                    if info.name == name:
                        return data.Member(archive, name, info.offset_data, info.size)
    return text


def choose_failures(rows, each=4, most=40):
    """Up to `each` rows of each category whose answer is not the truth, `most` in all; prints how many there are. A row
    without a truth is neither right nor wrong."""
    chosen, failures = [], {}
    for row in rows:
        if row["truth"] and row["answer"].lower() != row["truth"].lower():
            failures[row["category"]] = failures.get(row["category"], 0) + 1
            if failures[row["category"]] <= each:
                chosen.append(row)
    for category, n in sorted(failures.items()):
        print(f"{lmeye.printable(category)}: {n:,} failures")
    return sorted(chosen, key=lambda row: row["category"])[:most]


def look_at_sheet(args):
    png = args.png or Path(args.answers).with_name("failures.png" if args.wrong else "sheet.png")
    refuse_existing(png)
    rows = read_answers(args.answers)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]  # always the same order
    chosen = choose_failures(rows) if args.wrong else rows[:12]
    if not chosen:
        print("there is nothing to draw: no answer differs from its truth")
        return
    cells = []
    for row in chosen:
        lines = [(row["question"] or "(caption)", GRAY), (row["answer"], "black")]
        if row["answer"].lower() != row["truth"].lower():
            lines.append((row["truth"], RED))
        cells.append(Cell(find_picture(row["image"]), lines))
    save(draw_sheet(cells), png)


# ---- The command line ----------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="answer, curve, logs, differences or sheet")

    answer = commands.add_parser("answer", help="draw what led to an answer")
    answer.set_defaults(look=look_into_answer, out=None)  # the folder below which checkpoints are looked for
    answer.add_argument("picture")
    answer.add_argument("question")
    answer.add_argument("second", nargs="?", default=SECOND, help=f"another question, to compare (default: {SECOND})")
    answer.add_argument("--out", dest="png", metavar="PNG", default="look.png", help="(default: look.png)")
    answer.add_argument("--checkpoint", metavar="FILE", help=f"an {CHECKPOINT} (default: the newest below out)")
    answer.add_argument("--llm", help="as for train.py, where its models were your own")
    answer.add_argument("--clip", help="as for train.py, where its models were your own")
    answer.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="as for train.py (default: auto)")

    curve = commands.add_parser("curve", help="draw the losses of a run")
    curve.set_defaults(look=look_at_curve)
    curve.add_argument("log", help="the log.csv of a run")
    curve.add_argument("png", nargs="?", help="(default: loss.png beside the log)")

    logs = commands.add_parser("logs", help="draw the losses of two runs, one over the other")
    logs.set_defaults(look=look_at_logs)
    logs.add_argument("log", help="the log.csv of a run")
    logs.add_argument("reference", help="that of another one, to compare with")
    logs.add_argument("png", nargs="?", default="logs.png", help="(default: logs.png)")

    differences = commands.add_parser("differences", help="draw what evidence.py found between rows, with intervals")
    differences.set_defaults(look=look_at_differences)
    differences.add_argument("tables", help="a file with what evidence.py printed for several folders (--out A B C)")
    differences.add_argument("png", nargs="?", default="differences.png", help="(default: differences.png)")

    sheet = commands.add_parser("sheet", help="draw pictures with answers")
    sheet.set_defaults(look=look_at_sheet)
    sheet.add_argument("answers", help="the answers.jsonl of an evaluation; to be called from the folder that it was "
                       "made in, where its pictures are found")
    sheet.add_argument("png", nargs="?", help="(default: sheet.png, or failures.png, beside the answers)")
    sheet.add_argument("--wrong", action="store_true", help="failures only, up to four of each category, at most 40")
    return parser.parse_args()


def main():
    args = parse_args()
    args.look(args)


if __name__ == "__main__":
    lmeye.run_main(main)
