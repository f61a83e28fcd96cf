"""A world with more to a picture: one, two, four or nine objects on a 3 × 3 board, each with its color and its shape.

One object is 4.6 bits of information, nine are 42, and a question concerns one of them. `WORLD` is what miniature.py
trains a CLIP and a language model on, `write_data` writes the same files as it does; evidence.py calls both.
"""

import io
import random
import zipfile
from collections import namedtuple
from pathlib import Path

from PIL import Image, ImageDraw

import miniature
import shapes

SIDE = 64  # pixels
COLORS, SHAPES = ("red", "green", "blue", "yellow", "white"), shapes.SHAPES
CELLS = ("top_left", "top_middle", "top_right", "left", "middle", "right", "bottom_left", "bottom_middle",
         "bottom_right")
NUMBERS = (1, 2, 4, 9)  # of objects
KINDS = ("color", "shape", "yes/no")  # of questions
OFTEN = (1, 1, 2)  # how often each kind is trained on

VALUES = {}  # {attribute: its values}; None where a cell is empty
WEIGHTS = {}  # {attribute: how often CLIP's captions name it}
for cell in CELLS:
    VALUES[f"{cell}_color"], WEIGHTS[f"{cell}_color"] = (*COLORS, None), 1
    VALUES[f"{cell}_shape"], WEIGHTS[f"{cell}_shape"] = (*SHAPES, None), 1.3
Scene = namedtuple("Scene", VALUES)  # a color and a shape of each cell, or None and None


def word_for(cell):
    """A cell as one word, which a reader can look up: top-left, middle, …"""
    return cell.replace("_", "-")


def attributes(scene):
    """The names of those attributes that a scene has: of the cells that are not empty."""
    return [name for name in VALUES if getattr(scene, name)]


def number_of_objects(scene):
    return len(attributes(scene)) // 2


def random_scene(rng, number):
    """A scene with so many objects."""
    filled, values = rng.sample(CELLS, number), {}
    for cell in CELLS:
        values[f"{cell}_color"] = rng.choice(COLORS) if cell in filled else None
        values[f"{cell}_shape"] = rng.choice(SHAPES) if cell in filled else None
    return Scene(**values)


def random_scenes(seed, each):
    """So many scenes of each number of objects, but a quarter of them with one object: there are only 225."""
    rng, scenes = random.Random(seed), []
    for number in NUMBERS:
        for _ in range(each if number > 1 else each // 4):
            scenes.append(random_scene(rng, number))
    return scenes


HELD_OUT = list(dict.fromkeys(random_scenes("held out", 150)))  # each once, in order
KEPT_OUT = set(HELD_OUT)
TRAINING = [scene for scene in random_scenes("training", 20_000) if scene not in KEPT_OUT]


def draw(scene, rng):
    """Draw a board → RGB picture, SIDE × SIDE; `rng` (random.Random) decides on jitter."""
    picture = Image.new("RGB", (SIDE, SIDE), shapes.COLORS["black"])
    canvas = ImageDraw.Draw(picture)
    for i, cell in enumerate(CELLS):
        color, shape = getattr(scene, f"{cell}_color"), getattr(scene, f"{cell}_shape")
        if color:
            row, column = divmod(i, 3)
            x = (column + 0.5) * SIDE / 3 + rng.uniform(-1.5, 1.5)
            y = (row + 0.5) * SIDE / 3 + rng.uniform(-1.5, 1.5)
            thing = shapes.Scene("one", "large", color, shape, "middle", "black")
            shapes.draw_shape(canvas, thing, x, y, r=8.5 + rng.uniform(-0.5, 0.5))
    return picture


def describe(scene, named=None):
    """A caption that names these attributes (None: all), object by object: "top-left red circle right blue thing"."""
    words = []
    for cell in CELLS:
        told = {}
        for what in ("color", "shape"):
            name = f"{cell}_{what}"
            told[what] = getattr(scene, name) if named is None or name in named else None
        if told["color"]:
            words += [word_for(cell), told["color"], told["shape"] or "thing"]
        elif told["shape"]:
            words += [word_for(cell), told["shape"]]
    return " ".join(words)


def ask(scene, kind, rng, named=None):
    """A question about one of the attributes `named` (None: of all) → (question, answer). `kind` is the attribute
    itself, or one of KINDS."""
    choice = list(named or attributes(scene))
    if kind in ("color", "shape"):
        choice = [name for name in choice if name.endswith(kind)]
    name = kind if kind in VALUES else rng.choice(choice)
    cell, _, what = name.rpartition("_")
    value = getattr(scene, name)
    if kind != "yes/no":
        return f"what {what} is the {word_for(cell)} thing?", value
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        value = rng.choice([v for v in VALUES[name] if v not in (value, None)])
    return is_it(name, value), answer


def is_it(name, value):
    """The question whether an attribute has this value."""
    cell, _, what = name.rpartition("_")
    return f"is the {word_for(cell)} thing {'a ' if what == 'shape' else ''}{value}?"


def build_tokenizer(ends):
    """The tokenizer of the boards' words: see shapes.build_tokenizer."""
    cells = " ".join(word_for(cell) for cell in CELLS)
    return shapes.build_tokenizer(ends, [f"{cells} {' '.join(COLORS + SHAPES)} what color shape is the thing a"])


WORLD = miniature.World(TRAINING, VALUES, WEIGHTS, attributes, draw, describe, ask, build_tokenizer, SIDE, 32)


def record(image, human, gpt, category="all"):
    """A record in LLaVA's shape: one question, one answer."""
    return {"id": Path(image).stem, "image": image, "category": category, "conversations": [
        {"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}


def write_data(folder, pictures=8000, questions=6, seed=0):
    """Write pictures with captions and questions into a folder: `pictures` random boards to train on, with so many
    questions each, and each held-out board once, with a question of each kind.

    The category of a question is the number of objects and its kind, "4 color".
    """
    rng = random.Random(f"boards {seed}")
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for part, prefix, scenes in (("train", "", rng.choices(TRAINING, k=pictures)), ("val", "val_", HELD_OUT)):
            captions, asked = [], []
            for i, scene in enumerate(scenes):
                image, file = f"{part}/{i:06d}.png", io.BytesIO()
                draw(scene, rng).save(file, "PNG", compress_level=1)
                archive.writestr(image, file.getvalue())
                captions.append(record(image, "Describe the picture.\n<image>", describe(scene)))
                for kind in rng.choices(KINDS, OFTEN, k=questions) if part == "train" else KINDS:
                    question, answer = ask(scene, kind, rng)
                    asked.append(record(image, "<image>\n" + question, answer, f"{number_of_objects(scene)} {kind}"))
            miniature.write_json(folder / f"{prefix}captions.json", captions)
            miniature.write_json(folder / f"{prefix}questions.json", asked)
