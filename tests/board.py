"""A world with more to a picture: one, two, four or nine objects on a 3 × 3 board, each with its color and its shape.

It has the names of the world in data.py, so that stage 0 can train a CLIP and a language model for it. One object is
4.6 bits of information, nine are 42, and a question concerns one of them.
"""

import random
from typing import NamedTuple

from PIL import Image, ImageDraw

import data
from data import Record

SIDE, WORDS = 64, 32
COLORS, SHAPES = ("red", "green", "blue", "yellow", "white"), data.SHAPES
CELLS = [f"{row}{column}" for row in ("top_", "", "bottom_") for column in ("left", "middle", "right")]
NUMBERS = (1, 2, 4, 9)
KINDS_OF_QUESTION = ("color", "shape", "yes/no")
VALUES = {f"{cell}_{what}": (*values, None) for cell in CELLS for what, values in (("color", COLORS), ("shape", SHAPES))}
WEIGHTS = {name: 1.3 if name.endswith("shape") else 1 for name in VALUES}
Scene = NamedTuple("Scene", [(name, str | None) for name in VALUES])


def place(cell):
    """The word for a cell, one word so that it can be looked up: top-left, middle, …"""
    return cell.strip("_").replace("_", "-")


def attributes(scene):
    """Those of the cells that are not empty."""
    return [name for name, value in zip(scene._fields, scene) if value]


def some_scene(rng, number):
    cells = rng.sample(CELLS, number)
    return Scene(*(rng.choice(values[:-1]) if name.rpartition("_")[0] in cells else None
                   for name, values in VALUES.items()))


def scenes(seed, each):
    rng = random.Random(seed)
    return [some_scene(rng, number) for number in NUMBERS for _ in range(each if number > 1 else each // 4)]


HELD_OUT = list(dict.fromkeys(scenes("held out", 150)))
KEPT_OUT = set(HELD_OUT)
TRAINING = [s for s in scenes("training", 20_000) if s not in KEPT_OUT]


def draw(scene, rng):
    """Draw a board → RGB picture, SIDE × SIDE; `rng` decides on jitter."""
    picture = Image.new("RGB", (SIDE, SIDE), data.COLORS["black"])
    canvas = ImageDraw.Draw(picture)
    for i, cell in enumerate(CELLS):
        color, shape = scene[2 * i:2 * i + 2]
        if color:
            x, y = ((at + .5) * SIDE / 3 + rng.uniform(-1.5, 1.5) for at in (i % 3, i // 3))
            thing = data.Scene("one", "large", color, shape, "middle", "black")
            data.draw_shape(canvas, thing, x, y, r=8.5 + rng.uniform(-.5, .5))
    return picture


def describe(scene, named=None):
    """A caption that names these attributes, object by object: "top-left red circle right blue thing"."""
    words = []
    for i, cell in enumerate(CELLS):
        color, shape = (value if value and (named is None or name in named) else None
                        for name, value in list(zip(VALUES, scene))[2 * i:2 * i + 2])
        if color or shape:
            words += [place(cell), *[color] * bool(color), shape or "thing"]
    return " ".join(words)


def ask(scene, kind, rng, named=None):
    """A question about one of these attributes → (question, answer). `kind`: an attribute, or one of KINDS_OF_QUESTION."""
    named = list(named or attributes(scene))
    name = kind if kind in VALUES else rng.choice([n for n in named if n.endswith(kind)] if kind != "yes/no" else named)
    cell, _, what = name.rpartition("_")
    value = getattr(scene, name)
    if kind == "yes/no":
        yes = rng.random() < .5
        said = value if yes else rng.choice([v for v in VALUES[name][:-1] if v != value])
        return f"is the {place(cell)} thing {'a ' if what == 'shape' else ''}{said}?", "yes" if yes else "no"
    return f"what {what} is the {place(cell)} thing?", value


def records(stage, held_out=False, pictures=8000, questions=6, seed=0):
    """Captions for stage 1, questions for stage 2; `kind` is the number of objects and the kind of question."""
    rng = random.Random(f"{stage} {held_out} {seed}")
    found = []
    for scene in HELD_OUT if held_out else rng.choices(TRAINING, k=pictures):
        picture = draw(scene, rng)
        if stage == 1:
            found.append(Record(picture, (), describe(scene)))
            continue
        for kind in KINDS_OF_QUESTION if held_out else rng.choices(KINDS_OF_QUESTION, (1, 1, 2), k=questions):
            question, answer = ask(scene, kind, rng)
            found.append(Record(picture, (question,), answer, f"{len(attributes(scene)) // 2} {kind}"))
    return found


def build_tokenizer(ends):
    cells, values = " ".join(map(place, CELLS)), " ".join(COLORS + SHAPES)
    return data.build_tokenizer(ends, [f"{cells} {values} what color shape is the thing a"])
