"""The experiments behind what the lab book (README.md, beside this file) claims.

    python tests/lab/evidence.py                        what there is, what each shows, and how long it takes
    python tests/lab/evidence.py ablation               one of them: prints tables, and says where its pictures lie
    python tests/lab/evidence.py ablation --seeds 1     with fewer models than the lab book's
    python tests/lab/evidence.py swap --out s0/out s1/out s2/out
                                                        on several miniatures: what differs from one set of frozen
                                                        models to the next moves results more than phase 2's seeds do

All work on the miniature below out/, whose first stage has to be there: python train.py --stage 1 --preset mini. What
was trained is kept in out/mini/evidence and not trained again: remove the folder to start anew. As many models are
trained at once as there are processor cores, one thread each.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import board
import data
import lmeye
import look
import measure
import miniature
import rivals
import sample
import shapes
import train
from lmeye import CHECKPOINT, LMEye, UserError

OUT = Path("out/mini")

# ---- The models ----------------------------------------------------------------------------------------------


def tell_scene(model, dataset):
    """A Dataset of boards with a code of the scene in the place of CLIP's feature: a number for each color and each shape
    of each cell, 8 where it is there, else 0: with the 4.7 objects of a training board, a code's sum is that of |f|, 74."""
    captions, numbers = captions_of("board"), {}
    cells = [board.word_for(cell) for cell in board.CELLS]
    for cell in cells:
        for value in board.COLORS + board.SHAPES:
            numbers[cell, value] = len(numbers)
    codes = np.zeros((len(dataset.records), model.align.in_features), np.float16)  # a few of its columns stay empty
    for code, record in zip(codes, dataset.records):
        for word in captions[record.image].split():  # top-left red circle right blue cross …
            if word in cells:
                cell = word
            else:
                code[numbers[cell, word]] = 8
    return dataset._replace(features=codes, picture=np.arange(len(codes)))


def tell_question_and_scene(model, dataset):
    return rivals.tell_question(model, tell_scene(model, dataset))


class Variant(NamedTuple):
    """What differs from the miniature as it is."""
    interaction: str = "full"
    kind: type = LMEye
    n_features: int = 5
    n_slots: int = 1
    tell: Callable = rivals.tell_nothing  # (model, Dataset) → the Dataset that it is trained and measured on
    own_phase_1: bool = False  # phase 1 is of its own: other layers, or another Dataset
    train_align: bool = False  # phase 2 goes on training `align` and `img`


FOUR = ("full", "norequest", "static", "static, 2 tokens")  # those that are compared
FIVE = (*FOUR, "a slot without a request")
ALIGN = ("full", "full, align trained", "norequest", "norequest, align trained", "static", "static, 2 tokens")
COMPARED = {"mini": FIVE, "board": FOUR, "smollm2": ("full", "norequest", "static, 2 tokens")}  # by world
BUDGET = {"static": 1, "static, 2 tokens": 2, "static, 5 tokens": 5, "static, 8 tokens": 8, "full": 2, "full, Q=4": 5,
          "full, Q=7": 8}  # tokens that a picture takes: with `full` one, and the slots
ORACLES = ("full", "norequest", "static, 2 tokens", "full, the request is told", "full, v is told", "full, f is told",
           "full, the text transformer thawed", "all three, N=9")
CONNECTORS = ("static", "static, curved", "static, 2 tokens", "static, 5 tokens", "a slot without a request", "full",
              "full, align trained", "norequest, align trained", "full, request without a bias",
              "static, patches in 2 tokens", "static, 16 patches", "Q-Former", "Q-Former that reads the question",
              "full, a word of each patch")
EXERCISES = {
    "a curved decomposition": rivals.CurvedDecomposition, "two rounds of requests": rivals.TwoRounds,
    "the request read after the first layer": rivals.EarlierRequest, "no picture in <img>": rivals.NoPictureToken,
    "no text transformer": rivals.NoTextTransformer,
}
VARIANTS = {
    "full": Variant(), "norequest": Variant("norequest"), "static": Variant("static"),
    "full, align trained": Variant(train_align=True),
    "norequest, align trained": Variant("norequest", train_align=True),
    "static, 2 tokens": Variant("static", rivals.picture_tokens(2), own_phase_1=True),
    "static, 5 tokens": Variant("static", rivals.picture_tokens(5), own_phase_1=True),
    "static, 8 tokens": Variant("static", rivals.picture_tokens(8), own_phase_1=True),
    "full, N=1": Variant(n_features=1), "full, N=10": Variant(n_features=10), "full, N=20": Variant(n_features=20),
    "full, Q=2": Variant(n_slots=2), "full, Q=4": Variant(n_slots=4), "full, Q=7": Variant(n_slots=7),
    "a slot without a request": Variant("norequest", rivals.SlotWithoutRequest),
    "full, the request is told": Variant(kind=rivals.RequestTold, tell=rivals.tell_question),
    "full, v is told": Variant("norequest", rivals.AnswerTold, tell=rivals.tell_answer),
    "full, f is told": Variant(tell=tell_scene, own_phase_1=True),
    "full, the text transformer thawed": Variant(kind=rivals.TextTransformerThawed),
    "all three, N=9": Variant(kind=rivals.RequestToldAndThawed, n_features=9, tell=tell_question_and_scene,
                              own_phase_1=True),
    "full, in its chat template": Variant(kind=rivals.ChatTemplate, tell=rivals.tell_in_own_tokens, own_phase_1=True),
    "full, request without a bias": Variant(kind=rivals.RequestWithoutBias),
    "static, curved": Variant("static", rivals.CurvedPicture, own_phase_1=True),
    "static, patches in 2 tokens": Variant("static", rivals.patch_tokens(2), tell=rivals.tell_patches, own_phase_1=True),
    "static, 16 patches": Variant("static", rivals.patch_tokens(16), tell=rivals.tell_patches, own_phase_1=True),
    "Q-Former": Variant("static", rivals.q_former(False), tell=rivals.tell_patches, own_phase_1=True),
    "Q-Former that reads the question": Variant("static", rivals.q_former(True), tell=rivals.tell_patches, own_phase_1=True),
    "full, a word of each patch": Variant(kind=rivals.WordOfEachPatch, n_features=16, tell=rivals.tell_patches),
}
for name, kind in EXERCISES.items():
    VARIANTS[name] = Variant(kind=kind)

# The worlds of boards, which differ in how many layers CLIP's text transformer has.
BOARDS = {"board": 2, "board-4-layers": 4, "board-6-layers": 6}
# How a world's models are trained, by phase. World "smollm2" is the miniature's pictures and CLIP with a published
# language model; its rates are those that train.py finds for it.
RECIPES = {
    "mini": {1: train.DEFAULTS["mini", 1], 2: train.DEFAULTS["mini", 2]},
    "board": {1: train.DEFAULTS["mini", 1], 2: train.DEFAULTS["mini", 2]},
    "smollm2": {1: dict(steps=150, batch_size=16, lr=0.11), 2: dict(steps=3000, batch_size=32, lr=0.021)},
}
# Learning rates of phase 2 that are not the default. Those of the miniature are the best of `tune`. On boards, of what
# `tune-board` tries, `static` alone has its best; the others keep the default, 0.01. What has a transformer to train has
# 0.003: of 0.001 and 0.003 the better in 800 steps for the thawed one and for the Q-Former that reads the question.
LR = {"mini": {"full": 5e-3, "full, align trained": 5e-3, "static, 2 tokens": 2e-2, "a slot without a request": 2e-2},
      "board": {"static": 1.2e-2, "full, the text transformer thawed": 3e-3, "all three, N=9": 3e-3, "Q-Former": 3e-3,
                "Q-Former that reads the question": 3e-3},
      "smollm2": {"static, 2 tokens": 0.063}}  # of 0.021, the default, and 0.063 the better; see the lab book for the others
for world in BOARDS:
    RECIPES[world], LR[world] = RECIPES["board"], LR["board"]
# Learning rates of a phase 1 of its own that is not the world's: here, too, there is attention to train.
LR_PHASE_1 = {"Q-Former": 3e-3, "Q-Former that reads the question": 3e-3}
TRIED = {"mini": (5e-3, 1e-2, 2e-2), "board": (3e-3, 6e-3, 1.2e-2)}  # to tune


def home(world):
    """The folder with what is trained for a world."""
    return OUT if world == "mini" else OUT / "evidence" / world


def phase_1_of(world):
    """The folder of a world's phase 1."""
    return OUT / "stage1" if world == "mini" else home(world) / "phase-1"


def frozen_models(world):
    """(folder of the language model, folder of CLIP) of a world."""
    if world == "smollm2":
        return OUT.with_name("smollm2"), OUT / "clip"
    return home("board" if world in BOARDS else world) / "llm", home(world) / "clip"


def seed_of_set():
    """The seed of this folder's miniature. All else that is frozen in phase 2, and all data, are made with it, too, so that
    one set has nothing in common with the next; the seeds of phase 2 begin at 0 in each set."""
    return json.loads((OUT / "stage1" / "run.json").read_text("utf-8"))["seed"]


def new_model(world, name, seed, llm="llm"):
    """One of VARIANTS with new layers, between the frozen models of a world. `llm` names another language model, a
    folder in out/mini/evidence."""
    variant = VARIANTS[name]
    folder, clip = frozen_models(world)
    if llm != "llm":
        folder = OUT / "evidence" / llm
    settings = replace(lmeye.PRESETS["mini"], llm=str(folder), clip=f"local-dir:{clip}",
                       interaction=variant.interaction, n_features=variant.n_features, n_slots=variant.n_slots)
    torch.manual_seed(seed)
    return variant.kind.from_settings(settings)


# ---- The data ------------------------------------------------------------------------------------------------


def make_folder(folder, write):
    """Let write(part) fill a folder, which gets its name when it is complete. Nothing happens where it is there."""
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    if part.is_dir():
        shutil.rmtree(part)  # of a program that was killed
    part.mkdir(parents=True)
    write(part)
    part.rename(folder)


def data_folder(world, pictures=None):
    """The folder with the data files of a world, written where it is missing; with another number of training pictures
    than usual, a folder of its own."""
    if world not in BOARDS and pictures is None:
        return OUT  # where tests/lab/miniature.py wrote
    folder = home("board") / "data" if pictures is None else OUT / "evidence" / f"{world}-{pictures}"
    if world in BOARDS:
        make_folder(folder, lambda part: board.write_data(part, pictures or 8000, seed=seed_of_set()))
    else:
        make_folder(folder, lambda part: miniature.write_data(part, seed_of_set(), pictures))
    return folder


@functools.lru_cache
def datasets(world, stage, pictures):
    """(training, validation Dataset) of a world."""
    folder, model, found = data_folder(world, pictures), new_model(world, "full", 0), []
    for prefix in ("", "val_"):
        file = folder / f"{prefix}{'captions' if stage == 1 else 'questions'}.json"
        records, skips = data.read_records([file], [folder / "pictures.zip"], stage)
        found.append(data.encode(model, records, skips, home(world) / "features"))
        if skips:
            print(f"{file}:")
            data.report_skips(skips)
    return tuple(found)


def captions_of(world):
    """{picture: its caption} of a world."""
    captions = {}
    for part in datasets(world, 1, None):
        for record in part.records:
            captions[record.image] = record.answer
    return captions


def held_out_picture(world, i):
    """The picture of the i-th of the scenes that are held out, which write_data wrote in that order."""
    return data.Member(str(data_folder(world) / "pictures.zip"), f"val/{i:06d}.png")


def encoded(world, model, records):
    """Records that an experiment makes → Dataset; what is left out is printed."""
    skips = []
    dataset = data.encode(model, records, skips, home(world) / "features")
    data.report_skips(skips)
    return dataset


# Which word of the miniature's captions names what: "two small red circles at the left on a blue background"
CAPTION_WORDS = {"number": 0, "size": 1, "color": 2, "shape": 3, "place": 6, "background": 9}


def scene_of(caption):
    """A whole caption of the miniature → its Scene."""
    words, values = caption.split(), {}
    for name, at in CAPTION_WORDS.items():
        values[name] = words[at]
    for shape in shapes.SHAPES:
        if values["shape"].startswith(shape):  # circle, or circles
            values["shape"] = shape
    return shapes.Scene(**values)


# ---- Training and measuring ----------------------------------------------------------------------------------


def is_complete(folder):
    """Whether a run in a folder came to its end."""
    return (folder / CHECKPOINT).is_file() and not (folder / train.STATE).exists()


def train_phase(stage, model, world, name, folder, seed, lr=None, limit=None, pictures=None, steps=None):
    """Train a phase by its recipe, or on the first `limit` records; goes on where it was broken off, and takes what is
    complete as it is. UserError if that was trained by another recipe."""
    recipe, variant = RECIPES[world][stage], VARIANTS[name]
    steps, lr = steps or recipe["steps"], lr or recipe["lr"]
    if is_complete(folder):
        run = json.loads((folder / "run.json").read_text("utf-8"))
        for what, value in (("steps", steps), ("batch size", recipe["batch_size"]), ("learning rate", lr), ("seed", seed)):
            if run[what] != value:
                raise UserError(f"{folder}: was trained with {what} {run[what]}, and is to have {value}: rename or remove it")
        model.load(folder / CHECKPOINT)
        return
    dataset, val = datasets(world, stage, pictures)
    dataset, val = variant.tell(model, dataset), variant.tell(model, val)
    if limit:
        dataset = dataset.take(np.arange(len(dataset.records)) < limit)
    train.train_adapter(model, stage, dataset, val, folder, steps, recipe["batch_size"], lr, seed=seed,
                        train_align=variant.train_align and stage == 2, resume=True)
    (folder / train.STATE).unlink()


def trained(world, name, seed, lr=None, llm="llm", limit=None, pictures=None, steps=None):
    """A model after both phases, trained unless it was before. Phase 1 is the world's; but what has layers or a Dataset of
    its own there, or stands beside another language model, has one of its own, with the same seed: several processes may
    train at once, and none waits for another."""
    lr = lr or LR[world].get(name) or RECIPES[world][2]["lr"]
    label = f"{name}-{seed}-lr{lr:g}".replace(", ", "-").replace(" ", "-").replace("<img>", "img")
    if llm != "llm":
        label += f"-{llm}"
    for option, value in (("limit", limit), ("pictures", pictures), ("steps", steps)):
        if value:
            label += f"-{option}{value}"
    folder = OUT / "evidence" / world / label
    model = new_model(world, name, seed, llm)
    if not is_complete(folder):
        if llm != "llm" or VARIANTS[name].own_phase_1:
            train_phase(1, model, world, name, folder.with_name(f"{label}-phase-1"), seed, LR_PHASE_1.get(name))
        else:
            model.load(phase_1_of(world) / CHECKPOINT)
    train_phase(2, model, world, name, folder, seed, lr, limit, pictures, steps)
    return model.eval()


def shares(model, dataset, blind=False):
    """{column: share of right answers}."""
    scores, _ = sample.predict_and_score(model, dataset, "answers", blind)
    return {column: float(np.nanmean(values)) for column, values in scores.items()}


class Run(NamedTuple):
    """A model to be trained and measured."""
    world: str
    name: str  # one of VARIANTS
    seed: int
    options: dict  # further arguments of `trained`
    tuning: bool = False  # measured on the pictures that choices are made with, which the tables leave out
    blind: bool = False  # also measured where it is shown other pictures


class Measured(NamedTuple):
    seeing: dict  # {column: share of right answers}
    blind: dict  # the same, where the model was shown other pictures; empty if that was not measured


def runs_of(world, name, seeds, blind=False, **options):
    """The same model with each of these seeds."""
    return [Run(world, name, seed, options, blind=blind) for seed in seeds]


def held_out(world, tuning=False):
    """The validation records that tables are made of; or those of the other pictures, a quarter, to tune with."""
    _, val = datasets(world, 2, None)
    return val.take((val.picture % 4 == 0) == tuning)


def measure_run(run):
    model = trained(run.world, run.name, run.seed, **run.options)
    val = VARIANTS[run.name].tell(model, held_out(run.world, run.tuning))
    return Measured(shares(model, val), shares(model, val, blind=True) if run.blind else {})


def measure_runs(runs):
    """{row: [Run, …]} → {row: [Measured, …]}, several at a time, each in a process of its own."""
    for of_row in runs.values():
        for run in of_row:
            prepare(run.world, run.options.get("pictures"))
    workers = torch.get_num_threads()
    if torch.cuda.is_available():  # small models leave a GPU idle: the processor, which starts the kernels, is the limit
        workers = max(1, min(8, os.cpu_count() // 2))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quietly, (OUT,))
    futures, found = [], {}
    try:
        for row, of_row in runs.items():
            for run in of_row:
                futures.append((row, run.seed, pool.submit(measure_run, run)))
        for row, seed, future in tqdm(futures, desc="models", disable=None):
            measured = future.result()
            found.setdefault(row, []).append(measured)
            tqdm.write(f"{row}, seed {seed}: {100 * measured.seeing['all']:.1f}% right", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def quietly(out):
    """What a process of `measure_runs` begins with: one thread, no words of its own among those of the others, and an end
    when the program ends, even if that is killed."""
    threading.Thread(target=miniature.end_with_parent, daemon=True).start()
    use(out)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def make_llm(folder, **recipe):
    """Train a language model of this set where it is missing; `recipe` is what differs from the miniature's own."""
    make_folder(folder, lambda part: miniature.train_llm(part, seed_of_set(), **recipe))


def make_board_llm(folder, width=128):
    make_llm(folder, world=board.WORLD, steps=3000, width=width)


@functools.lru_cache
def prepare(world, pictures):
    """See that the frozen models, the data and phase 1 of a world are there."""
    if not is_complete(OUT / "stage1"):
        raise UserError("there is no phase 1 yet: run  python train.py --stage 1 --preset mini")
    if world in BOARDS:
        make_folder(home(world) / "clip", lambda part: miniature.train_clip(
            part, seed_of_set(), board.WORLD, steps=2000, width=12, text_layers=BOARDS[world]))
        make_board_llm(home("board") / "llm")
    if world == "smollm2" and not frozen_models(world)[0].is_dir():
        raise UserError(f"{frozen_models(world)[0]} is missing: run  python tests/lab/smollm2.py --out {OUT.parent}")
    if not is_complete(phase_1_of(world)):
        train_phase(1, new_model(world, "full", seed_of_set()), world, "full", phase_1_of(world), seed_of_set())
    datasets(world, 2, pictures)  # once, here, and not by several processes at once


# ---- Tables and pictures -------------------------------------------------------------------------------------

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5% of n - 1 degrees;
# of more than ten 2.26 is rather too wide


def mean_and_interval(values):
    """Mean and half the width of its 95% interval (Student's t), in percent → text."""
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        half = STUDENT.get(len(values), 2.26) * statistics.stdev(values) / len(values) ** 0.5
        text += f" ± {100 * half:.1f}"
    return text


def markdown(rows):
    """{name: [{column: share}, one for each seed]} → a table in Markdown, with a dash where a row lacks a column."""
    columns = []
    for seeds in rows.values():
        for of_seed in seeds:
            columns += [column for column in of_seed if column not in columns]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = []
        for column in columns:
            values = [of_seed[column] for of_seed in seeds if column in of_seed]
            cells.append(mean_and_interval(values) if len(values) == len(seeds) else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows_of(found):
    """What `measure_runs` gives → the rows of a table; where `full` was also shown other pictures, that is row "blind"."""
    rows = {}
    for row, of_row in found.items():
        rows[row] = [measured.seeing for measured in of_row]
    if "full" in found and found["full"][0].blind:
        rows["blind"] = [measured.blind for measured in found["full"]]
    return rows


def save(page, name):
    """Write a picture into out/mini/evidence; an earlier one of that name gets another."""
    sample.set_aside(OUT / "evidence" / name)
    look.save(page, OUT / "evidence" / name)


# ---- Does asking help? ---------------------------------------------------------------------------------------


def tune(world, seeds):
    """Train each with each learning rate, and a seed that no table has; on held-out pictures that no table has."""
    runs, rows = {}, {}
    for name in COMPARED[world]:
        for lr in TRIED[world]:
            runs[f"{name}, lr {lr:g}"] = [Run(world, name, 100, {"lr": lr}, tuning=True)]
    found = measure_runs(runs)
    for name in COMPARED[world]:
        rows[name] = [{f"{lr:g}": found[f"{name}, lr {lr:g}"][0].seeing["all"] for lr in TRIED[world]}]
    print(f"{world}: held-out accuracy in percent by learning rate of phase 2, seed 100\n\n{markdown(rows)}\n", flush=True)


def with_blind(world, seeds, **options):
    """The rows of a table: those that are compared, and `full` shown other pictures."""
    runs = {}
    for name in COMPARED[world]:
        runs[name] = runs_of(world, name, range(seeds), blind=name == "full", **options)
    return rows_of(measure_runs(runs))


def ablation(world, seeds):
    rows = with_blind(world, seeds)
    print(f"held-out accuracy in percent; trained in phase 2: {sizes(world, COMPARED[world])}")
    return rows


def compared(world, seeds, names, **options):
    """The rows of a table of these models as they are."""
    return rows_of(measure_runs({name: runs_of(world, name, range(seeds), **options) for name in names}))


def with_trap(world, rows, records, **options):
    """The rows of a table of models, with what each gets right of these records in a column more."""
    trap = encoded(world, new_model(world, "full", 0), records)
    for name, of_row in rows.items():
        for seed, of_seed in enumerate(of_row):
            model = trained(world, name, seed, **options)
            of_seed["the trap"] = shares(model, VARIANTS[name].tell(model, trap))["all"]
    return rows


def align(world, seeds, llm="llm"):
    """`static` trains `align` on questions, `full` only on captions: is that what static tokens gain by?"""
    print("held-out accuracy in percent; in the last column that on the trap of `hallucination`")
    return with_trap(world, compared(world, seeds, ALIGN, llm=llm), absent_records("the trap"), llm=llm)


def align_without_hints(world, seeds):
    return align(world, seeds, llm_without_hints())


def sizes(world, names):
    """How many numbers each trains in phase 2, as text."""
    found = []
    for name in names:
        trained_tensors = new_model(world, name, 0).set_trained(2, VARIANTS[name].train_align).values()
        found.append(f"{name} {sum(p.numel() for p in trained_tensors):,}")
    return ", ".join(found) + " numbers"


def hints(world, seeds):
    """The same with a language model that never read anything in the place of <img-d>."""
    return with_other_llm(world, seeds, llm_without_hints())


def llm_without_hints():
    llm = "llm-without-hints"
    make_llm(OUT / "evidence" / llm, hint_share=0.0)
    return llm


def more_hints(world, seeds):
    """The same with a language model that read hints behind <img> as well, where a second picture token will stand."""
    return with_other_llm(world, seeds, llm_with_more_hints())


def llm_with_more_hints():
    llm = "llm-with-more-hints"
    make_llm(OUT / "evidence" / llm, world=world_in_phrases())
    return llm


def with_other_llm(world, seeds, llm):
    rows = with_blind(world, seeds, llm=llm)
    print(f"held-out accuracy in percent; the language model reads the true caption:\n\n"
          f"{markdown({'the true caption': [text_ceiling(world, llm)]})}\n")
    return rows


def world_in_phrases():
    """The miniature's world, but in 40% of the captions that name three or more attributes, the last one or two stand in
    a phrase of their own behind the rest, as a hint does behind a question."""
    rng = random.Random(0)

    def describe(scene, named):
        if len(named) < 3 or rng.random() >= 0.4:
            return shapes.describe(scene, named)
        n = len(named) - rng.randint(1, 2)
        return f"{shapes.describe(scene, named[:n])} {shapes.describe(scene, named[n:])}"

    return miniature.WORLD._replace(describe=describe)


def swap(world, seeds):
    """Each held-out picture is asked its six questions about one attribute each. Into the answer to one of them goes the
    request of another, or the v that another picture gave to its own question of the same kind; only those with two
    different true answers count. Whose truth does the answer tell?"""
    val = held_out(world)
    val = val.take(np.array([record.category != "yes/no" for record in val.records]))
    rng, rows = np.random.default_rng(0), {}
    kinds, of_kind, of_picture = np.array([record.category for record in val.records]), {}, {}
    for i, record in enumerate(val.records):
        of_kind.setdefault(record.category, []).append(i)
        of_picture.setdefault(val.picture[i], []).append(i)
    other_question, other_picture = [], []
    for i, record in enumerate(val.records):
        others = [j for j in of_picture[val.picture[i]] if val.records[j].answer != record.answer]
        other_question.append(rng.choice(others))
        others = [j for j in of_kind[record.category] if val.records[j].answer != record.answer]
        other_picture.append(rng.choice(others))
    of_color = np.isin(kinds, ("color", "background"))
    both_colors, everywhere = of_color & of_color[other_question], np.full(len(kinds), True)
    for seed in range(seeds):
        model = trained(world, "full", seed)
        request, v = requests_and_v(model, val)
        swapped = answers_given(model, val, request=request[other_question])
        for name, texts, of, counted in (
            ("its own request", answers_given(model, val, request=request), other_question, everywhere),
            ("another question's request", swapped, other_question, everywhere),
            ("the same, both about colors", swapped, other_question, both_colors),
            ("no request", answers_given(model, val, request=torch.zeros_like(request)), other_question, everywhere),
            ("another picture's v", answers_given(model, val, v=v[other_picture]), other_picture, everywhere),
        ):
            rows.setdefault(name, []).append(whose_truth(val, texts, of, counted))
    print("whose true answer the model tells, in percent of the answers")
    return rows


def answers_given(model, dataset, request=None, v=None):
    """The answers of a model whose requests (R, W), or whose v (R, C), are replaced by these: nothing else that it
    reads, neither picture nor question, changes."""
    texts = []
    for start in range(0, len(dataset.records), 256):
        rows = np.arange(start, min(start + 256, len(dataset.records)))
        if v is None:
            replaced = {"ask": lambda h: request[rows].to(h)}
        else:
            replaced = {"interact": lambda f, r: v[rows].to(f)}
        with mock.patch.multiple(model, **replaced):
            texts += model.generate(dataset.f(rows), [dataset.records[i].question for i in rows], max_tokens=8)
    return texts


def whose_truth(dataset, texts, other, counted):
    """Shares of texts that tell the true answer to their own record, to the other one, or to neither; of those
    `counted` (R,) alone."""
    texts, truths = np.array(texts), np.array([record.answer for record in dataset.records])
    own, others = texts == truths, texts == truths[other]
    neither = ~own & ~others
    return {"its own": float(own[counted].mean()), "the other's": float(others[counted].mean()),
            "neither's": float(neither[counted].mean())}


def by_objects(share):
    """{"4 color": …, "4 shape": …, "4 yes/no": …, "all": …}, for each number of objects → {"4: what": the mean of color and
    shape, "4: yes/no": …, "all": …}; what is not there is left out."""
    table = {f"{n}: what": (share[f"{n} color"] + share[f"{n} shape"]) / 2 for n in board.NUMBERS}
    for n in board.NUMBERS:
        if f"{n} yes/no" in share:
            table[f"{n}: yes/no"] = share[f"{n} yes/no"]
    if "all" in share:
        table["all"] = share["all"]
    return table


def boards(world, seeds):
    runs = {name: runs_of(world, name, range(seeds), blind=name == "full") for name in FOUR}
    for name in ("full, N=1", "full, N=20", "full, Q=4", "static, 5 tokens"):
        runs[f"{name} (one seed)"] = runs_of(world, name, [0])
    for name in ("full", "static, 2 tokens"):
        runs[f"{name}, 7,000 steps, 20,000 pictures (one seed)"] = runs_of(world, name, [0], steps=7000, pictures=20_000)
    shares_of = rows_of(measure_runs(runs))
    shares_of["for comparison: the language model reads the caption"] = [text_ceiling(world)]
    shares_of["for comparison: a linear probe of f"] = [probe_ceiling()]
    print("held-out accuracy in percent by number of objects")
    return rows_by_objects(shares_of)


def oracles(world, seeds):
    """Where does it break? One part at a time is told what it would have to find out: what is left is lost elsewhere."""
    return compared_by_objects(world, seeds, ORACLES)


def connectors(world, seeds):
    times = [f"{name} {ratio:.2f}" for name, ratio in first_token_times(world, CONNECTORS).items()]
    print(f"time from a picture's features to the first token, {CONNECTORS[0]} = 1: {', '.join(times)}")
    return with_trap(world, compared_by_objects(world, seeds, CONNECTORS), trap_of_boards(world))


def trap_of_boards(world):
    """Yes/no questions about one thing of a held-out board: its color and its shape, each once as it is and once as
    another thing of the same board has it. Of the boards that tables are made of, those with several colors or shapes."""
    rng, records = random.Random(0), []
    for i, scene in enumerate(board.HELD_OUT):
        if i % 4 == 0:  # chosen with, as in `held_out`
            continue
        for what in ("color", "shape"):
            names = [name for name in board.attributes(scene) if name.endswith(what)]
            name = rng.choice(names)
            own, on_board = getattr(scene, name), [getattr(scene, other) for other in names]
            lures = [value for value in on_board if value != own]
            if lures:
                for value, answer in ((own, "yes"), (rng.choice(lures), "no")):
                    records.append(data.Record(held_out_picture(world, i), (board.is_it(name, value),), answer))
    return records


def compared_by_objects(world, seeds, names):
    rows = rows_by_objects(compared(world, seeds, names))
    print(f"held-out accuracy in percent by number of objects; trained in phase 2: {sizes(world, names)}")
    return rows


def rows_by_objects(shares_of):
    """{row: [shares of a board's kinds of questions, …]} → the rows of a table by number of objects."""
    rows = {}
    for name, of_row in shares_of.items():
        rows[name] = [by_objects(share) for share in of_row]
    return rows


def first_token_times(world, names, batch_size=64, rounds=15):
    """Median seconds until the first token of so many answers is known, in multiples of those of the first of `names`.
    (Trained or not, a model takes the same time. The slot without a request runs a pass whose state it does not use: its
    time is this program's, not the least possible.)"""
    val, functions = held_out(world), []
    val = val.take(np.arange(len(val.records)) < batch_size)
    questions = [record.question for record in val.records]

    def answer(model, f):
        next(model.stream(f, questions))

    for name in names:
        model = new_model(world, name, 0)
        f = VARIANTS[name].tell(model, val).f(range(batch_size))
        functions.append(functools.partial(answer, model, f))
    times = measure.seconds(*functions, repeat=rounds)
    return {name: taken / times[0] for name, taken in zip(names, times)}


def depth(world, seeds):
    """A request moves what EOS attends to from the text transformer's second layer on: do more layers select better?"""
    runs = {}
    for name in ("full", "norequest", "static, 2 tokens"):
        for of_depth, layers in BOARDS.items():
            runs[f"{name}, {layers} layers"] = runs_of(of_depth, name, range(seeds))
    rows = rows_by_objects(rows_of(measure_runs(runs)))
    print("held-out accuracy in percent by number of objects, and by layers of CLIP's text transformer")
    return rows


def budget(world, seeds):
    """When does asking pay? The same number of picture tokens, asked and static, with language models of three widths."""
    llms = {64: "board-llm-64", 128: "llm", 256: "board-llm-256"}  # by width
    runs, ceilings = {}, {}
    for width, llm in llms.items():
        if llm != "llm":
            make_board_llm(OUT / "evidence" / llm, width)
        ceilings[f"width {width}"] = [by_objects(text_ceiling(world, llm))]
        for name in BUDGET:
            runs[f"width {width}: {name}"] = runs_of(world, name, range(seeds), llm=llm)
    print(f"the language models read the true caption\n\n{markdown(ceilings)}\n")
    rows = rows_by_objects(rows_of(measure_runs(runs)))
    panels = [draw_budget(rows, llms, column) for column in ("2: what", "4: what", "9: what", "all")]
    save(look.tile(panels), "budget.png")
    print("held-out accuracy in percent by number of objects")
    return rows


def draw_budget(rows, widths, column):
    """One column of the table over the tokens that a picture takes: asked in blue, static in red, the darker the wider."""
    curves = []
    for how, colors in (("full", ("#9ecae1", "#4292c6", "#08306b")), ("static", ("#fcae91", "#fb6a4a", "#99000d"))):
        names = [name for name in BUDGET if name.startswith(how)]
        for width, color in zip(widths, colors):
            points = [(BUDGET[name], 100 * mean_of(rows[f"width {width}: {name}"])[column]) for name in names]
            curves.append(look.Curve(f"{how}, language model of width {width}", color, points))
    return look.draw_curves(curves, f"tokens that a picture takes; percent right, {column}")


@torch.no_grad()
def text_ceiling(world, llm="llm"):
    """The frozen language model reads the true caption in the place of the picture → {category: share of right}."""
    model, val, right = new_model(world, "full", 0, llm), held_out(world), {}
    captions = captions_of(world)
    for start in range(0, len(val.records), 256):
        texts, records = [], val.records[start:start + 256]
        for record in records:
            texts.append(f"{lmeye.IMAGE} {captions[record.image]}{lmeye.QUESTION}{record.question}{lmeye.ANSWER}")
        ids, mask = model.to_device(*lmeye.pad(model.tokenizer(texts).input_ids, side="left"))
        logits = model.llm(input_ids=ids, attention_mask=mask).logits[:, -1]
        words = logits.argmax(-1).tolist()  # all answers are one word
        for record, word in zip(records, words):
            right.setdefault(record.category, []).append(model.decode([word]) == record.answer)
    return {category: statistics.mean(hits) for category, hits in right.items()}


@torch.no_grad()
def board_features(model, scenes, rng):
    """Boards, drawn → (f (R, C), the number of each attribute's value (R, 18), -1 for an empty cell), on the CPU."""
    f, labels = [], []
    for start in range(0, len(scenes), 256):
        pictures = [board.draw(scene, rng) for scene in scenes[start:start + 256]]
        f.append(model.encode_image(torch.stack([model.preprocess(picture) for picture in pictures])).cpu())
    for scene in scenes:
        labels.append([values.index(getattr(scene, name)) for name, values in board.VALUES.items()])
    labels = torch.tensor(labels)
    return torch.cat(f), labels.masked_fill(labels == 5, -1)  # the sixth value is None


def probe_ceiling():
    """A linear probe of the CLIP feature for each cell's color and shape, trained for 3,000 steps on 20,000 boards →
    {category: share of right answers, over all held-out boards}."""
    model, right, rng = new_model("board", "full", 0), {}, random.Random(0)
    f, labels = board_features(model, random.Random(1).choices(board.TRAINING, k=20_000), rng)
    val_f, val_labels = board_features(model, board.HELD_OUT, rng)
    torch.manual_seed(0)
    probe = torch.nn.Linear(f.shape[1], 5 * len(board.VALUES))
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        rows = torch.randint(len(f), (512,))
        loss = F.cross_entropy(probe(f[rows]).view(-1, 5), labels[rows].view(-1), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    hit = probe(val_f).view(len(val_f), -1, 5).argmax(-1) == val_labels  # (scenes, attributes)
    there = val_labels >= 0
    number = there.sum(1) // 2  # of objects
    for n in board.NUMBERS:
        for i, what in enumerate(("color", "shape")):  # in turn among the attributes
            of_kind = there & (number == n)[:, None] & (torch.arange(len(board.VALUES)) % 2 == i)
            right[f"{n} {what}"] = hit[of_kind].float().mean().item()
    return right


# ---- How much does it take? ----------------------------------------------------------------------------------


def samples(world, seeds):
    sizes, names = (100, 1000, 10_000, 100_000), ("full", "static", "static, 2 tokens")
    runs, rows, curves = {}, {}, []
    for n in sizes:
        for name in names:
            runs[f"{name}, {n:,}"] = runs_of(world, name, range(seeds), limit=n, pictures=17_000)
    found = measure_runs(runs)
    for n in sizes:
        rows[f"{n:,}"] = []
        for seed in range(seeds):
            rows[f"{n:,}"].append({name: found[f"{name}, {n:,}"][seed].seeing["all"] for name in names})
    print(f"held-out accuracy in percent over the number of phase-2 records, {seeds} seeds, mean ± 95% interval\n\n"
          + markdown(rows))
    for name, color in zip(names, (look.BLUE, look.RED, look.GRAY)):
        points = []
        for n in sizes:
            points.append((n, 100 * statistics.mean(m.seeing["all"] for m in found[f"{name}, {n:,}"])))
        curves.append(look.Curve(name, color, points))
    save(look.draw_curves(curves, "records of phase 2", log_x=True), "samples.png")


SIZES = ((64, 2), (256, 2), (128, 3))  # width and layers of the language models beside the miniature's own
LLM_STEPS = 550  # of the miniature's own language model


def scaling(world, seeds):
    lr = RECIPES[world][2]["lr"]  # for all rows, where `full` has another elsewhere
    runs = {"width 128, 2 layers, N=5, Q=1": runs_of(world, "full", range(seeds), lr=lr)}
    models = {"width 128, 2 layers, N=5, Q=1": "llm"}
    for width, layers in SIZES:
        llm, row = f"llm-{width}x{layers}", f"width {width}, {layers} layers"
        make_llm(OUT / "evidence" / llm, steps=LLM_STEPS, width=width, layers=layers)
        runs[row], models[row] = runs_of(world, "full", range(seeds), lr=lr, llm=llm), llm
    for more in ("N=1", "N=10", "Q=2", "Q=4"):
        runs[more] = runs_of(world, f"full, {more}", range(seeds))
    rows = {}
    for row, shares_of_row in rows_of(measure_runs(runs)).items():
        rows[row] = [{"LMEye": share["all"]} for share in shares_of_row]
    for row, llm in models.items():
        for of_seed in rows[row]:
            of_seed["the language model reads the caption"] = statistics.mean(text_ceiling(world, llm).values())
    print(f"held-out accuracy in percent, {seeds} seeds, mean ± 95% interval\n\n{markdown(rows)}")


# ---- What does a request say? --------------------------------------------------------------------------------

ASKED = {  # worded alike for all pictures: what a request says of the picture is not from its words
    "color": "what color are they?", "shape": "what shape are they?", "size": "how big are they?",
    "number": "how many are there?", "place": "where are they?", "background": "what color is the background?",
    "yes/no": "is the background red?",
}


def requests(world, seeds):
    model, untrained = trained(world, "full", 0), new_model(world, "full", 0)
    untrained.load(phase_1_of(world) / CHECKPOINT)
    records, scenes = [], []
    for i, scene in enumerate(shapes.HELD_OUT):
        for category, question in ASKED.items():
            records.append(data.Record(held_out_picture("mini", i), (question,), "", category))
            scenes.append(scene)
    asked = encoded(world, model, records)
    request, v = requests_and_v(model, asked)
    vectors = {"request": request, "v": v, "f": asked.f(range(len(records))),
               "request, before phase 2": requests_and_v(untrained, asked)[0]}
    category = np.array([record.category for record in records])
    labels = {"kind of question": category}
    for name in shapes.Scene._fields:
        labels[name] = np.array([getattr(scene, name) for scene in scenes])
    picture, rows = torch.from_numpy(asked.picture), {}
    for name, x in vectors.items():
        rows[f"{name}: linear"] = [{label: linear(x, y, picture) for label, y in labels.items()}]
        rows[f"{name}: nearest"] = [{label: nearest(x, y, picture) for label, y in labels.items()}]
        mixed = {label: np.random.default_rng(0).permutation(y) for label, y in labels.items()}
        rows[f"{name}: linear, labels shuffled"] = [{label: linear(x, y, picture) for label, y in mixed.items()}]
    print(f"what a probe finds, percent right\n\n{markdown(rows)}\n")

    asked_for, others = {}, {}
    for name in shapes.Scene._fields:
        of_others = []
        for other in shapes.Scene._fields:
            of_kind = category == other
            found = linear(v[of_kind], labels[name][of_kind], picture[of_kind])
            if other == name:
                asked_for[name] = found
            else:
                of_others.append(found)
        others[name] = statistics.mean(of_others)
    rows = {"where it was asked for": [asked_for], "where another kind was (mean of five)": [others]}
    print(f"an attribute read from v by a linear probe\n\n{markdown(rows)}")
    save(draw_scatter({"requests": request, "v, after the interaction": v}, category), f"requests-{world}.png")


@torch.no_grad()
def requests_and_v(model, dataset):
    """The request (R, W) and v (R, C) of each record, on the CPU: what leaves `request`, and what enters `transmit`."""
    request, v = [], []

    def keep_request(layer, inputs, output):
        request.append(output.cpu())

    def keep_v(layer, inputs, output):
        v.append(inputs[0].cpu())

    hooks = [model.request.register_forward_hook(keep_request), model.transmit.register_forward_hook(keep_v)]
    for start in range(0, len(dataset.records), 256):
        f, tokens = dataset.batch(range(start, min(start + 256, len(dataset.records))))
        model.read_prompt(*model.to_device(f, tokens.question, tokens.question_mask))
    for hook in hooks:
        hook.remove()
    return torch.cat(request), torch.cat(v)


def linear(x, y, picture):
    """A linear probe: ridge regression from x (R, ·) onto labels y (R,), one-hot → share of right labels.

    Fitted on every other picture, tested on the rest. Its strength is the best of five on a fifth of the pictures that
    it is fitted on.
    """
    _, y = np.unique(y, return_inverse=True)
    values = y.max() + 1
    y = torch.from_numpy(y)
    fitted = picture % 2 == 0
    first_fit = fitted & (picture // 2 % 5 > 0)
    x = (x - x[fitted].mean(0)) / x[fitted].std(0).clamp(min=1e-6)
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.double)], 1)

    def solve(rows, strength):
        a = x[rows].T @ x[rows] + strength * rows.sum() * torch.eye(x.shape[1], dtype=torch.double)
        return torch.linalg.solve(a, x[rows].T @ F.one_hot(y[rows], values).double())

    def right(w, rows):
        return ((x[rows] @ w).argmax(1) == y[rows]).double().mean().item()

    best, best_share = None, -1.0
    for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1):
        share = right(solve(first_fit, strength), fitted & ~first_fit)
        if share > best_share:
            best, best_share = strength, share
    return right(solve(fitted, best), ~fitted)


def nearest(x, y, picture):
    """The label of the nearest vector among those of every other picture → share of right labels."""
    fitted = picture % 2 == 0
    x = (x - x[fitted].mean(0)) / x[fitted].std(0).clamp(min=1e-6)
    neighbour = torch.cdist(x[~fitted], x[fitted]).argmin(1)
    return float((y[fitted][neighbour] == y[~fitted]).mean())


def draw_scatter(panels, labels, size=420):
    """{title: vectors (R, ·)} → a page with the first two principal components of each, colored by label (R,)."""
    names = list(dict.fromkeys(labels))
    colors = dict(zip(names, ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#111111")))
    page = Image.new("RGB", (len(panels) * (size + 20) + 140, size + 50), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    left, top = 20, 34
    for title, x in panels.items():
        x = x - x.mean(0)
        _, s, axes = torch.linalg.svd(x, full_matrices=False)
        points = (x @ axes[:2].T).numpy()  # (R, 2)
        share = (s[:2] ** 2).sum() / (s ** 2).sum()
        low, high = np.percentile(points, (0.5, 99.5), 0)
        canvas.text((left, 10), f"{title}: two components, {100 * share:.0f}% of the variance", "black", font)
        canvas.rectangle((left, top, left + size - 10, top + size - 10), outline="#cccccc")
        for (a, b), label in zip(np.clip((points - low) / (high - low), 0, 1), labels):
            px, py = left + 5 + a * (size - 20), top + 5 + (1 - b) * (size - 20)
            canvas.ellipse((px - 1.5, py - 1.5, px + 1.5, py + 1.5), colors[label])
        left += size + 20
    for i, name in enumerate(names):
        canvas.text((left, 40 + 20 * i), name, colors[name], font)
    return page


# ---- What is not there, captions, side by side, exercises ----------------------------------------------------


def hallucination_without_hints(world, seeds):
    return hallucination(world, seeds, llm_without_hints())


def hallucination_with_more_hints(world, seeds):
    return hallucination(world, seeds, llm_with_more_hints())


def hallucination(world, seeds, llm="llm"):
    """POPE (Li et al., arXiv 2305.10355): half of the questions are about what is there, half about what is absent.

    That is chosen at random, as the most frequent of what is absent, or as what most often comes with what is there.
    The last column is the miniature's own trap: the color that is in the picture, but of the background.
    """
    tests, encoder = {}, new_model(world, "full", 0)
    for how in ("random", "popular", "adversarial", "the trap"):
        tests[how] = encoded(world, encoder, absent_records(how))
    rows = {}
    for name in COMPARED[world]:
        rows[name] = []
        for seed in range(seeds):
            model, of_seed = trained(world, name, seed, llm=llm), {}
            for how, test in tests.items():
                scores, texts = sample.predict_and_score(model, test, how)
                of_seed[f"{how}: right"] = float(np.nanmean(scores["all"]))
                of_seed[f"{how}: says yes"] = texts.count("yes") / len(texts)
            rows[name].append(of_seed)
    print("yes/no questions about color and shape, half of them about what is absent; percent")
    return rows


def absent_records(how):
    """Yes/no questions about the color and shape of the held-out pictures, the "no" of each chosen as `how` says."""
    rng, records = random.Random(0), []
    alone, together = Counter(), Counter()  # how often a fact, or two of them, are in the training pictures
    training, _ = datasets("mini", 1, None)
    for record in training.records:
        facts = list(scene_of(record.answer)._asdict().items())
        alone.update(facts)
        together.update(itertools.permutations(facts, 2))

    def absent(scene, name):
        if how == "the trap":
            return scene.background
        values = [value for value in shapes.VALUES[name] if value != getattr(scene, name)]
        if how == "random":
            return rng.choice(values)
        if how == "popular":
            return max(values, key=lambda value: alone[name, value])
        others = [fact for fact in scene._asdict().items() if fact[0] != name]
        return max(values, key=lambda value: sum(together[(name, value), fact] for fact in others))

    names = ("color", "shape")
    if how == "the trap":
        names = ("color",)  # a background has no shape
    for i, scene in enumerate(shapes.HELD_OUT):
        one = scene.number == "one"
        for name in names:
            for value, answer in ((getattr(scene, name), "yes"), (absent(scene, name), "no")):
                if name == "shape":
                    value = ("a " if one else "") + scene._replace(shape=value).noun
                question = f"{'is it' if one else 'are they'} {value}?"
                records.append(data.Record(held_out_picture("mini", i), (question,), answer))
    return records


def captions(world, seeds):
    """What the captions after phase 1 alone get right, word by word."""
    model = new_model(world, "full", 0)
    model.load(phase_1_of(world) / CHECKPOINT)
    _, val = datasets(world, 1, None)
    columns = []
    for blind in (False, True):
        scores, texts = sample.predict_and_score(model, val, "captions", blind)
        right = {}
        for name, at in CAPTION_WORDS.items():
            pairs = [(text.split()[at:at + 1], r.answer.split()[at:at + 1]) for text, r in zip(texts, val.records)]
            right[name] = np.array([said == true for said, true in pairs], float)
        columns.append(right | {"CLIPScore": scores["CLIPScore"]})
    print("captions after phase 1, by the word that names an attribute, in percent (CLIPScore × 100), with 95% "
          "bootstrap intervals over pictures\n\n| | captions | blind |\n|---|---|---|")
    for name in columns[0]:
        cells = []
        for column in columns:
            low, high = sample.bootstrap_interval(column[name], val.picture)
            cells.append(f"{100 * column[name].mean():.1f} ({100 * low:.1f}–{100 * high:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


def compare(world, seeds):
    """Answers of `full` and of `static`, in an order that the sheet does not tell; the key is in a file of its own."""
    names, (_, val) = ("full", "static"), datasets(world, 2, None)
    answers = [sample.predict_and_score(trained(world, name, 0), val, name)[1] for name in names]
    differ = [i for i in range(len(val.records)) if answers[0][i] != answers[1][i]]
    print(f"the two differ on {len(differ)} of {len(val.records)} questions")
    if not differ:
        return
    rng, cells, key = random.Random(0), [], []
    for number, i in enumerate(rng.sample(differ, min(24, len(differ))), 1):
        a, b = rng.sample((0, 1), 2)
        record = val.records[i]
        lines = [(f"{number}. {record.question}", look.GRAY), (f"A: {answers[a][i]}", "black"),
                 (f"B: {answers[b][i]}", "black")]
        cells.append(look.Cell(record.image, lines))
        key.append({"picture": number, "A": names[a], "B": names[b], "truth": record.answer})
    save(look.draw_sheet(cells, columns=6), "compare.png")
    path = OUT / "evidence" / "compare-key.json"
    sample.set_aside(path)
    path.write_text(json.dumps(key, indent=1), "utf-8")
    print(f"its key: {path}")


def exercises(world, seeds):
    lr = RECIPES[world][2]["lr"]  # for all rows, where `full` has another elsewhere
    runs = {name: runs_of(world, name, range(seeds), lr=lr) for name in ("full", *EXERCISES)}
    print("held-out accuracy in percent")
    return rows_of(measure_runs(runs))


# ---- The command line ----------------------------------------------------------------------------------------


class Experiment(NamedTuple):
    run: Callable
    world: str
    seeds: int  # of the lab book, where models are trained
    minutes: int  # with that many seeds, on two cores of a CPU, after `ablation` where it uses the models of that
    shows: str


EXPERIMENTS = {
    "ablation": Experiment(ablation, "mini", 2, 7, "full, norequest, static and others, by kind of question"),
    "hints": Experiment(hints, "mini", 2, 10,
        "the same with a language model that was never taught to read in the slot"),
    "more-hints": Experiment(more_hints, "mini", 2, 10,
        "the same with one that was taught to read behind <img> as well"),
    "swap": Experiment(swap, "mini", 2, 1,
        "whose truth is told where another question's request is put into the answer"),
    "hallucination": Experiment(hallucination, "mini", 2, 1,
        "yes/no questions about what is absent, as POPE chooses them"),
    "hallucination-without-hints": Experiment(hallucination_without_hints, "mini", 2, 1,
        "the same with the language models of hints; after hints"),
    "hallucination-more-hints": Experiment(hallucination_with_more_hints, "mini", 2, 1,
        "the same with those of more-hints; after more-hints"),
    "align": Experiment(align, "mini", 2, 4, "with align trained in phase 2, as static trains it"),
    "align-without-hints": Experiment(align_without_hints, "mini", 2, 5,
        "the same with the language models of hints; after hints"),
    "requests": Experiment(requests, "mini", 1, 1,
        "what a linear and a nearest-neighbour probe find in a request, and in v"),
    "captions": Experiment(captions, "mini", 1, 1, "what captions get right after phase 1 alone, word by word"),
    "compare": Experiment(compare, "mini", 1, 1,
        "answers of full and static side by side, the order hidden: for human judges"),
    "tune": Experiment(tune, "mini", 1, 15, "the learning rate of phase 2, for each of the five alike"),
    "samples": Experiment(samples, "mini", 1, 10, "accuracy over the number of phase-2 records: a table and a curve"),
    "scaling": Experiment(scaling, "mini", 1, 12, "accuracy over the language model's size, N and the number of slots"),
    "exercises": Experiment(exercises, "mini", 1, 5, "the exercises of the README, solved"),
    "smollm2": Experiment(ablation, "smollm2", 1, 200,
        "three rows of ablation with a published language model; after tests/lab/smollm2.py"),
    "swap-smollm2": Experiment(swap, "smollm2", 1, 13, "the same as swap with it; these three after smollm2"),
    "hallucination-smollm2": Experiment(hallucination, "smollm2", 1, 20, "the same as hallucination with it"),
    "requests-smollm2": Experiment(requests, "smollm2", 1, 6, "the same as requests with it"),
    "board": Experiment(boards, "board", 3, 35,
        "the four where a picture holds one to nine objects, with two ceilings"),
    "oracles": Experiment(oracles, "board", 2, 15,
        "boards, with one part of the method told what it has to find out; after board"),
    "connectors": Experiment(connectors, "board", 1, 15,
        "boards, by fourteen ways to bring a picture into a language model; after board"),
    "depth": Experiment(depth, "board", 1, 25,
        "boards, with two, four and six layers in CLIP's text transformer; after board"),
    "budget": Experiment(budget, "board", 1, 45,
        "boards, by tokens to a picture, asked and static, and by the language model's width; after board"),
    "tune-board": Experiment(tune, "board", 1, 10, "the same as tune on boards; after board"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, help="of phase 2, where models are trained (default: the lab book's); "
                        "tune, captions, requests and compare take one")
    parser.add_argument("--out", nargs="+", default=["out"], help="the folders that hold a miniature (default: out)")
    args = parser.parse_args()
    if args.seeds is not None and not 1 <= args.seeds <= 100:
        parser.error("--seeds has to be from 1 to 100")
    if args.experiment is None:
        print("minutes  seeds  experiment                    (about, on two cores; what was trained is kept, and not trained again)")
        for name, experiment in EXPERIMENTS.items():
            print(f"{experiment.minutes:7}{experiment.seeds:7}  {name:28}  {experiment.shows}")
        return
    experiment, of_sets = EXPERIMENTS[args.experiment], {}
    seeds = args.seeds or experiment.seeds
    for out in args.out:
        use(Path(out, "mini"))
        prepare("mini", None)
        (OUT / "evidence").mkdir(exist_ok=True)
        prepare(experiment.world, None)
        rows = experiment.run(experiment.world, seeds)
        if rows:
            print(f"{OUT}; seeds of phase 2: {seeds}, mean ± 95% interval\n\n{markdown(rows)}\n", flush=True)
            for name, of_seeds in rows.items():
                of_sets.setdefault(name, []).append(mean_of(of_seeds))
    if len(args.out) > 1 and of_sets:
        print(f"mean over {len(args.out)} sets of frozen models ± 95% interval over them\n\n{markdown(of_sets)}\n")
        gains = {}
        for one in ("full", "full, align trained"):
            for other in of_sets:
                if one in of_sets and other not in (one, "full", "blind"):
                    gains[f"{one} − {other}"] = differences(of_sets[one], of_sets[other])
        if gains:
            print(f"differences, set by set\n\n{markdown(gains)}")


def use(out):
    """Take the miniature in this folder from now on."""
    global OUT
    OUT = out
    datasets.cache_clear()
    prepare.cache_clear()


def mean_of(shares_of_seeds):
    """[{column: share}, …] → {column: their mean}."""
    means = {}
    for column in shares_of_seeds[0]:
        means[column] = statistics.mean([of_seed[column] for of_seed in shares_of_seeds])
    return means


def differences(first, second):
    """Two lists of {column: share} → the list of what the first has more."""
    rows = []
    for a, b in zip(first, second):
        rows.append({column: a[column] - b[column] for column in a if column in b})
    return rows


if __name__ == "__main__":
    lmeye.run_main(main)
