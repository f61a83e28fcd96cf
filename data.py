"""Records and where they come from: published formats, and the miniature's own world of shapes.

Everything that is trained on or asked about is a Record: a picture, the turns of the prompt, the answer. Readers
turn published files into records as they are; what they leave out is counted and reported, never passed over
in silence. The second half of the file is a small world that draws its own pictures, so that the whole method
can be trained and measured on a laptop. This file knows nothing of training.
"""

import functools
import itertools
import json
import random
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lmeye import ANSWER, IMAGE, QUESTION, UserError, dialogue


class Record(NamedTuple):
    """One picture with one answer. `turns` is (question, answer, …, question), or empty for a caption."""

    image: Path | Image.Image
    turns: tuple
    answer: str
    kind: str = "all"  # of question, where the data has kinds: accuracy is reported for each

    @property
    def question(self):
        return dialogue(self.turns)


# ---- Reading published formats -------------------------------------------------------------------------------


def read_records(path, images, stage):
    """Records of a file or folder, told apart by content → (list, Counter of what was skipped and why).

    A folder: `a.jpg` beside `a.txt`, the caption. A JSON list of LLaVA's kind: `image` is joined to the folder
    `images`; stage 1 takes the caption and ignores the "describe it" prompt, stage 2 makes a record of each turn.
    UserError if the path holds nothing that can be read, or nothing for this stage.
    """
    path, skipped = Path(path), Counter()
    if path.is_dir():
        records = read_caption_folder(path, skipped)
    elif path.is_file():
        records = read_llava(path, Path(images or path.parent), stage, skipped)
    else:
        raise UserError(f"--data {path}: no such file or folder")
    if stage == 2 and any(not r.turns for r in records):
        raise UserError(f"--data {path}: holds captions, and stage 2 learns from questions: use it with --stage 1")
    if not records:
        why = ", ".join(f"{reason} ({n})" for reason, n in skipped.items()) or "it is empty"
        raise UserError(f"--data {path}: nothing to train on for stage {stage}: {why}")
    return records, skipped


def read_caption_folder(folder, skipped):
    """`a.jpg` (or .jpeg, .png, .webp) beside `a.txt`, in any depth → records."""
    records = []
    for image in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
        text = image.with_suffix(".txt")
        caption = " ".join(text.read_text("utf-8", "replace").split()) if text.is_file() else ""
        if caption:
            records.append(Record(image, (), caption))
        else:
            skipped["picture without a caption in a .txt beside it"] += 1
    return records


def read_llava(path, images, stage, skipped):
    """LLaVA's JSON: a list of {"image": …, "conversations": [{"from": "human" | "gpt", "value": …}, …]}."""
    try:
        items = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"--data {path}: is not JSON ({error})") from error
    if not isinstance(items, list):
        raise UserError(f"--data {path}: a list of records is expected, found {type(items).__name__}")
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    root = images.resolve()
    records = []
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
            skipped["not a record with a list of conversations"] += 1
        elif not isinstance(item.get("image"), str) or not item["image"]:
            skipped["no picture"] += 1
        elif not (root / item["image"]).resolve().is_relative_to(root):
            skipped["picture path leaves --images"] += 1
        else:
            turns = llava_turns(item["conversations"])
            if not turns:
                skipped["turns do not alternate between human and gpt, or are empty"] += 1
            elif stage == 2:
                records += [Record(root / item["image"], turns[:n], turns[n]) for n in range(1, len(turns), 2)]
            elif len(turns) == 2:
                records.append(Record(root / item["image"], (), turns[1]))
            else:
                skipped["a conversation of several turns, not a caption"] += 1
    return records


def llava_turns(conversation):
    """(question, answer, question, …) with the <image> mark taken out, or () if the turns are not of that kind."""
    turns = []
    for i, turn in enumerate(conversation):
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str) or turn.get("from") != ("human", "gpt")[i % 2]:
            return ()
        turns.append(text.replace("<image>", "").strip())
    return tuple(turns) if turns and len(turns) % 2 == 0 and all(turns) else ()


# ---- Pictures and their features -----------------------------------------------------------------------------


def load_image(source):
    """A path (or a picture, returned as it is) → RGB picture, turned as its EXIF says. UserError if unreadable."""
    if isinstance(source, Image.Image):
        return source
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{source}: no such picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{source}: can't be read as a picture: {reason}") from error


class Dataset(NamedTuple):
    """Records with the CLIP features of their pictures, each picture encoded once."""

    records: list
    features: torch.Tensor  # (P, C)
    picture: torch.Tensor  # (R,) the row of `features` of each record

    def batch(self, rows):
        """Indices of records → (f (B, C), questions or None for captions, answers)."""
        records = [self.records[i] for i in rows]
        questions = [r.question for r in records] if records[0].turns else None
        return self.features[self.picture[rows]], questions, [r.answer for r in records]


def encode(model, records, skipped, batch_size=128):
    """Compute the CLIP features of the records' pictures → Dataset. Decoding runs in threads.

    Records whose picture is missing or broken are left out, and each such picture is counted in `skipped`.
    """
    def key(record):
        return record.image if isinstance(record.image, Path) else id(record.image)

    def pixels(record):
        try:
            return model.preprocess(load_image(record.image))
        except UserError as error:
            return error

    pictures = list({key(r): r for r in records}.values())  # one record for each picture
    features, row = [], {}
    with ThreadPoolExecutor() as pool, tqdm(total=len(pictures), desc="CLIP features", disable=None) as bar:
        for start in range(0, len(pictures), batch_size):
            chunk, good = pictures[start:start + batch_size], []
            for record, x in zip(chunk, pool.map(pixels, chunk)):
                if isinstance(x, UserError):
                    skipped[str(x)] += 1
                else:
                    row[key(record)] = len(row)
                    good.append(x)
            if good:
                features.append(model.encode_image(torch.stack(good)))
            bar.update(len(chunk))
    records = [r for r in records if key(r) in row]
    if not records:
        raise UserError(f"not one of {len(pictures)} pictures can be read; the first: {next(iter(skipped))}")
    return Dataset(records, torch.cat(features), torch.tensor([row[key(r)] for r in records]))


def split(dataset, share=0.02, most=500, fewest=50):
    """Set some pictures with their records aside, always the same → (training, held-out Dataset).

    Of fewer than `fewest` pictures none is held out, and the second is None.
    """
    P = len(dataset.features)
    if P < fewest:
        return dataset, None
    aside = torch.zeros(P, dtype=torch.bool)
    aside[torch.randperm(P, generator=torch.Generator().manual_seed(0))[:min(most, max(1, round(share * P)))]] = True
    def part(keep):
        return dataset._replace(records=list(itertools.compress(dataset.records, keep)), picture=dataset.picture[keep])
    return part(~aside[dataset.picture]), part(aside[dataset.picture])


@functools.lru_cache(maxsize=2)
def shuffle(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def rows_of(step, size, n, seed):
    """Which `size` of n records a step trains on: each epoch is a new shuffle. A function of its arguments alone,
    so that a run can be taken up at any step."""
    return [int(shuffle(n, seed, place // n)[place % n]) for place in range(step * size, (step + 1) * size)]


# ---- The miniature's world -----------------------------------------------------------------------------------
#
# A scene is one to four objects of a kind: "two small red circles at the left on a blue background". One scene in
# ten, by a hash of its words, is held out: neither CLIP nor the language model nor LMEye ever trains on it.

SIDE = 64  # pixels
NUMBERS = ("one", "two", "three", "four")
SIZES = {"small": 11, "large": 18}  # an object's side in pixels
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 214), "yellow": (245, 215, 40),
          "white": (245, 245, 245), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
GROUPS = {  # where the objects of a group stand, in units of the room that one object takes
    "one": [[(0, 0)]],
    "two": [[(-.5, 0), (.5, 0)], [(0, -.5), (0, .5)]],
    "three": [[(-.5, -.5), (.5, -.5), (0, .5)], [(0, -.5), (-.5, .5), (.5, .5)]],
    "four": [[(-.5, -.5), (.5, -.5), (-.5, .5), (.5, .5)]],
}
KINDS = ("color", "shape", "size", "number", "place", "background", "yes/no")
OFTEN = (1, 1, 1, 1, 1, 1, 4)  # how often each kind is trained on: comparing takes more practice than looking up


class Scene(NamedTuple):
    number: str
    size: str
    color: str
    shape: str
    place: str
    background: str

    @property
    def noun(self):
        return self.shape if self.number == "one" else self.shape + ("es" if self.shape == "cross" else "s")


SCENES = [Scene(*s) for s in itertools.product(NUMBERS, SIZES, COLORS, SHAPES, PLACES, COLORS) if s[2] != s[5]]
VALUES = {name: sorted({getattr(s, name) for s in SCENES}) for name in Scene._fields}


def held_out(scene):
    return zlib.crc32(" ".join(scene).encode()) % 10 == 0


def draw(scene, rng):
    """Draw a scene → RGB picture, SIDE × SIDE; `rng` (random.Random) decides on arrangement and jitter."""
    picture = Image.new("RGB", (SIDE, SIDE), COLORS[scene.background])
    canvas = ImageDraw.Draw(picture)
    room = SIZES[scene.size] + 2 + rng.randint(0, 2)
    group = rng.choice(GROUPS[scene.number])
    center = []  # of the group: pushed to its side of the picture, or near the middle
    for axis, side in enumerate(PLACES[scene.place]):
        reach = SIDE / 2 - 1 - (max(spot[axis] for spot in group) + .5) * room
        center.append(SIDE / 2 + (side * (reach - rng.uniform(0, 3)) if side else rng.uniform(-3, 3)))
    for spot in group:
        x, y = (c + s * room + rng.uniform(-1, 1) for c, s in zip(center, spot))
        draw_shape(canvas, scene, x, y, r=SIZES[scene.size] / 2 + rng.uniform(-.5, .5))
    return picture


def draw_shape(canvas, scene, x, y, r):
    """One object with its center at (x, y), r pixels from there to its edge."""
    color, box = COLORS[scene.color], (x - r, y - r, x + r, y + r)
    if scene.shape == "circle":
        canvas.ellipse(box, color)
    elif scene.shape == "square":
        canvas.rectangle((x - .9 * r, y - .9 * r, x + .9 * r, y + .9 * r), color)
    elif scene.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], color)
    elif scene.shape == "cross":
        canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), color)
        canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), color)
    else:  # a ring
        canvas.ellipse(box, color)
        canvas.ellipse((x - .6 * r, y - .6 * r, x + .6 * r, y + .6 * r), COLORS[scene.background])


def describe(scene, named=Scene._fields):
    """A caption that names these attributes; without its number a scene is in the plural, "red things"."""
    words = [getattr(scene, name) for name in ("number", "size", "color") if name in named]
    one = "number" in named and scene.number == "one"
    noun = scene.noun if one else scene._replace(number="many").noun
    words.append(noun if "shape" in named else "thing" if one else "things")
    words += [f"at the {scene.place}"] if "place" in named else []
    words += [f"on a {scene.background} background"] if "background" in named else []
    return " ".join(words)


def ask(scene, kind, rng, named=Scene._fields):
    """A question of this kind about these attributes of a scene → (question, answer)."""
    one = scene.number == "one"
    are, they = ("is", "it") if one else ("are", "they")
    them = rng.choice((they, f"the {scene.noun}")) if "shape" in named else they
    if kind == "yes/no":
        name, yes = rng.choice(named), rng.random() < .5
        value = getattr(scene, name) if yes else rng.choice([v for v in VALUES[name] if v != getattr(scene, name)])
        question = {
            "number": f"{'is' if value == 'one' else 'are'} there {value}?",
            "background": f"is the background {value}?",
            "shape": f"{are} {they} {'a ' if one else ''}{scene._replace(shape=value).noun}?",
            "place": f"{are} {them} at the {value}?",
        }.get(name, f"{are} {them} {value}?")
        return question, "yes" if yes else "no"
    return {
        "color": f"what color {are} {them}?",
        "shape": f"what shape {are} {they}?",
        "size": f"how big {are} {them}?",
        "number": f"how many {rng.choice(('', 'things '))}are there?",
        "place": f"where {are} {them}?",
        "background": "what color is the background?",
    }[kind], getattr(scene, kind)


def miniature(stage, held_out_scenes=False, pictures=6000, questions=6, seed=0):
    """The miniature's records: captions for stage 1, questions for stage 2.

    For training: `pictures` of random scenes that are not held out, `questions` about each; every fourth question
    comes after another one and its answer, as in a chat. Held out: each such scene once, with each kind asked once.
    """
    rng = random.Random(f"{stage} {held_out_scenes} {seed}")
    scenes = [s for s in SCENES if held_out(s) == held_out_scenes]
    records = []
    for scene in scenes if held_out_scenes else rng.choices(scenes, k=pictures):
        picture = draw(scene, rng)
        if stage == 1:
            records.append(Record(picture, (), describe(scene)))
            continue
        for kind in KINDS if held_out_scenes else rng.choices(KINDS, OFTEN, k=questions):
            before = ask(scene, rng.choice(KINDS), rng) if not held_out_scenes and rng.random() < .25 else ()
            question, answer = ask(scene, kind, rng)
            records.append(Record(picture, (*before, question), answer, kind))
    return records


def build_tokenizer(ends):
    """A tokenizer of the world's own words: lower case, no punctuation, <end> the highest id (CLIP pools there).

    With `ends`, texts are framed as CLIP's tokenizer does, [start … end]; without, as OPT's, [start …].
    """
    rng = random.Random(0)
    texts = [IMAGE, QUESTION + "thing things", ANSWER + " yes no"]
    texts += [describe(s) for s in SCENES] + [ask(s, kind, rng)[0] for s in SCENES for kind in KINDS]
    word = r"\n?\w+:|[\w/]+"
    words = sorted({w for text in texts for w in re.findall(word, text.lower())})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *words, "<start>", "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(word), "removed", invert=True)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>" if ends else "<start> $A",
        special_tokens=[(t, vocabulary[t]) for t in ("<start>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                   bos_token="<start>", eos_token="<end>")
