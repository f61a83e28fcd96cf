"""The miniature's world: one to four objects of a kind on a plain background.

A scene is "two small red circles at the left on a blue background". One scene in ten, by a hash of its words,
is held out: neither CLIP nor the language model nor LMEye ever trains on it.
"""

import itertools
import random
import re
import zlib
from typing import NamedTuple

import tokenizers
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from lmeye import ANSWER, IMAGE, QUESTION

SIDE = 64  # pixels
NUMBERS = ("one", "two", "three", "four")
SIZES = {"small": 11, "large": 18}  # an object's side in pixels
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 214), "yellow": (245, 215, 40),
          "white": (245, 245, 245), "black": (20, 20, 20)}
OUTLINE = (128, 128, 128)  # of every object: with it the tiny CLIP learns shape and number sooner
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
GROUPS = {  # where the objects of a group stand, in units of the room that one object takes
    "one": [[(0, 0)]],
    "two": [[(-.5, 0), (.5, 0)], [(0, -.5), (0, .5)]],
    "three": [[(-.5, -.5), (.5, -.5), (0, .5)], [(0, -.5), (-.5, .5), (.5, .5)]],
    "four": [[(-.5, -.5), (.5, -.5), (-.5, .5), (.5, .5)]],
}
KINDS = ("color", "shape", "size", "number", "place", "background", "yes/no")
OFTEN = (1, 1, 1, 1, 1, 1, 4)  # how often each kind is trained on: comparing takes most practice


class Scene(NamedTuple):
    number: str
    size: str
    color: str
    shape: str
    place: str
    background: str

    @property
    def noun(self):
        """The shape, in the plural where there are several."""
        if self.number == "one":
            return self.shape
        return self.shape + ("es" if self.shape == "cross" else "s")


VALUES = {  # what each attribute of a scene can be
    "number": NUMBERS, "size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES, "place": tuple(PLACES),
    "background": tuple(COLORS),
}
SCENES = [s for s in map(Scene._make, itertools.product(*VALUES.values())) if s.color != s.background]
HELD_OUT = [s for s in SCENES if zlib.crc32(" ".join(s).encode()) % 10 == 0]
TRAINING = [s for s in SCENES if zlib.crc32(" ".join(s).encode()) % 10 != 0]
HOW_OFTEN = None  # each scene is drawn: all are as likely
# How much each attribute counts in CLIP's loss: more where it is hard to see.
CLIP_WEIGHTS = {"number": 2, "size": 1, "color": 2, "shape": 4, "place": 2, "background": 0.5}


def draw(scene, rng):
    """A scene → RGB picture, SIDE × SIDE. `rng`, a random.Random, decides on arrangement and jitter."""
    picture = Image.new("RGB", (SIDE, SIDE), COLORS[scene.background])
    canvas = ImageDraw.Draw(picture)
    room = SIZES[scene.size] + 2 + rng.randint(0, 2)
    group = rng.choice(GROUPS[scene.number])
    center = []  # of the group: pushed to its side of the picture, or near the middle
    for axis, side in enumerate(PLACES[scene.place]):
        reach = SIDE / 2 - 1 - (max(spot[axis] for spot in group) + .5) * room
        offset = side * (reach - rng.uniform(0, 3)) if side else rng.uniform(-3, 3)
        center.append(SIDE / 2 + offset)
    for spot in group:
        x = center[0] + spot[0] * room + rng.uniform(-1, 1)
        y = center[1] + spot[1] * room + rng.uniform(-1, 1)
        draw_shape(canvas, scene, x, y, r=SIZES[scene.size] / 2 + rng.uniform(-.5, .5))
    return picture


def draw_shape(canvas, scene, x, y, r):
    """Draw one object with its center at (x, y), r pixels from there to its edge."""
    fill = COLORS[scene.color]
    box = (x - r, y - r, x + r, y + r)
    if scene.shape == "circle":
        canvas.ellipse(box, fill, OUTLINE)
    elif scene.shape == "square":
        canvas.rectangle((x - .9 * r, y - .9 * r, x + .9 * r, y + .9 * r), fill, OUTLINE)
    elif scene.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill, OUTLINE)
    elif scene.shape == "cross":
        t = r / 3
        corners = [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t),
                   (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)]
        canvas.polygon([(x + dx, y + dy) for dx, dy in corners], fill, OUTLINE)
    else:  # a ring
        canvas.ellipse(box, fill, OUTLINE)
        hole = (x - .5 * r, y - .5 * r, x + .5 * r, y + .5 * r)
        canvas.ellipse(hole, COLORS[scene.background], OUTLINE)


def describe(scene, named=Scene._fields):
    """A caption that names these attributes; without its number a scene is in the plural, "red things"."""
    words = [getattr(scene, name) for name in ("number", "size", "color") if name in named]
    one = "number" in named and scene.number == "one"
    if "shape" in named:
        words.append(scene.noun if one else scene._replace(number="many").noun)
    else:
        words.append("thing" if one else "things")
    if "place" in named:
        words.append(f"at the {scene.place}")
    if "background" in named:
        words.append(f"on a {scene.background} background")
    return " ".join(words)


def ask(scene, kind, rng, named=Scene._fields):
    """A question of this kind (one of KINDS) about these attributes of a scene → (question, answer)."""
    one = scene.number == "one"
    are, they = ("is", "it") if one else ("are", "they")
    them = rng.choice((they, f"the {scene.noun}")) if "shape" in named else they
    if kind != "yes/no":
        question = {
            "color": f"what color {are} {them}?",
            "shape": f"what shape {are} {they}?",
            "size": f"how big {are} {them}?",
            "number": f"how many {rng.choice(('', 'things '))}are there?",
            "place": f"where {are} {them}?",
            "background": "what color is the background?",
        }[kind]
        return question, getattr(scene, kind)

    name, answer = rng.choice(named), rng.choice(("yes", "no"))
    value = getattr(scene, name)
    if answer == "no":
        value = rng.choice([v for v in VALUES[name] if v != value])
    noun = scene._replace(shape=value).noun  # for a question about the shape
    question = {
        "number": f"{'is' if value == 'one' else 'are'} there {value}?",
        "background": f"is the background {value}?",
        "shape": f"is it a {noun}?" if one else f"are they {noun}?",
        "place": f"{are} {them} at the {value}?",
        "size": f"{are} {them} {value}?",
        "color": f"{are} {them} {value}?",
    }[name]
    return question, answer


def part_captions():
    """{attribute: {value: a caption that names this alone}}."""
    found = {}
    for name, values in VALUES.items():
        found[name] = {value: describe(TRAINING[0]._replace(**{name: value}), [name]) for value in values}
    return found


def draw_kinds(scene, rng, held_out):
    """Kinds of the questions in each conversation about a scene. Of a held-out one each kind is asked once;
    else there are six questions in four or five conversations, so one in four comes behind another."""
    if held_out:
        return [[kind] for kind in KINDS]
    conversations = [[kind] for kind in rng.choices(KINDS, OFTEN, k=rng.choice((4, 5)))]
    for kinds in conversations[:6 - len(conversations)]:
        kinds += rng.choices(KINDS, OFTEN)
    return conversations


def build_tokenizer(ends):
    """A tokenizer of the world's own words, see `word_tokenizer`."""
    rng = random.Random(0)
    texts = [IMAGE, QUESTION, "thing things", ANSWER, "yes no", "describe the picture"]
    texts += [describe(scene) for scene in HELD_OUT]
    for scene in HELD_OUT:
        texts += [ask(scene, kind, rng)[0] for kind in KINDS]
    return word_tokenizer(texts, ends)


def word_tokenizer(texts, ends):
    """A tokenizer of the words of texts, in lower case. <end> has the highest id: there CLIP reads a text.

    With `ends`, texts are framed as CLIP's tokenizer does, [start … end]; without, as OPT's, [start …].
    """
    word = r"\n?\w+:|[\w/-]+"
    words = sorted(set(re.findall(word, "\n".join(texts).lower())))
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *words, "<start>", "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(word), "removed", invert=True)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>" if ends else "<start> $A",
        special_tokens=[(t, vocabulary[t]) for t in ("<start>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                   bos_token="<start>", eos_token="<end>")
