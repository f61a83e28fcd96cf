"""Records and where they come from: published formats, and the miniature's own world of shapes.

Everything that is trained on or asked about is a Record: a picture, the turns of the prompt, the answer. Readers
turn published files into records as they are; what they leave out is counted and reported, never passed over
in silence. The last part of the file is a small world that draws its own pictures, so that the whole method
can be trained and measured on a laptop. This file knows nothing of training.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lmeye import ANSWER, IMAGE, QUESTION, Tokens, UserError, dialogue, pad

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of pictures
MOST_BYTES = 100_000_000  # of one file inside an archive, unpacked
MOST_PIXELS = 100_000_000  # of one picture; this takes the place of Pillow's own two limits, which warn and raise
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")  # about what it mends by itself


class Member(NamedTuple):
    """A file inside a zip archive or a tar shard, read in place."""

    archive: str
    name: str
    offset: int = -1  # where its bytes begin in a tar; a zip has a directory of its own
    size: int = 0

    def __str__(self):
        return f"{self.archive}: {self.name}"


class Record(NamedTuple):
    """One picture with one answer. `turns` is (question, answer, …, question), or empty for a caption."""

    image: str | Member | Image.Image
    turns: tuple
    answer: str
    kind: str = "all"  # of question, where the data has kinds: accuracy is reported for each
    key: str | int = ""  # the published id: COCO's image_id, VQA's question_id, VCR's annot_id
    answers: tuple = ()  # VQA: what the ten annotators said; `answer` is what most of them said
    choices: tuple = ()  # VCR: the four texts to choose from; `answer` is the right one

    @property
    def question(self):
        return dialogue(self.turns)


# ---- Reading published formats -------------------------------------------------------------------------------
#
# Each reader yields samples (picture, caption or "", turns, {further fields of Record}) or, where there is none, the
# reason, a string. A picture is a Path or a Member, or else a name that is yet to be found under --images.

MALFORMED = "a record that lacks a field, or has one of another type"


def read_records(paths, images, stage):
    """Records of files and folders, told apart by content → (list, Counter of what was skipped and why).

    The names of pictures are joined to the folders or zip archives `images` (without any: to the data file's folder).
    Stage 1 takes captions, stage 2 makes a record of each turn of a conversation, the earlier turns in its prompt.
    UserError if a path is not there or can't be parsed, or if nothing remains.
    """
    for path in paths:
        if not (os.path.isfile(path) or os.path.isdir(path)):  # nor a pipe, which would be waited for
            raise UserError(f"--data {path}: no such file or folder")
    records, skipped, tables = [], Counter(), {"images": [], "annotations": [], "questions": []}
    own = [open_root(path if path.is_dir() else path.parent) for path in map(Path, paths)]  # where each lies
    roots = [open_root(Path(root)) for root in images or []]
    sources = ((read_path(Path(path), tables), roots or [place]) for path, place in zip(paths, own))
    joined = join_tables(tables), roots or own  # a generator, too: it begins when the files have filled the tables
    for samples, places in itertools.chain(sources, [joined]):
        for sample in samples:
            found = sample if isinstance(sample, str) else make_records(*sample, places, stage)
            if isinstance(found, str):
                skipped[found] += 1
            else:
                records += found
    if not records:
        why = ", ".join(f"{reason} ({n:,})" for reason, n in skipped.most_common(5)) or "there are no records"
        raise UserError(f"--data {' '.join(map(str, paths))}: nothing to train on for stage {stage}: {why}")
    return records, skipped


def make_records(picture, caption, turns, more, roots, stage):
    """A sample → its records for a stage, or the reason why it has none, a string."""
    texts = (*turns, *itertools.chain(*more.get("choices", ())), *([caption] if caption or not turns else []))
    if not all(map(is_text, texts)):
        return "an empty or unreadable text"
    if isinstance(picture, Path):
        picture = str(picture)
    elif isinstance(picture, str) and not (picture := find_picture(roots, picture)):
        return "picture is not inside --images"
    if stage == 1 and caption:
        return [Record(picture, (), caption, **more)]
    if stage == 2 and turns:
        choices = more.pop("choices", ((),) * len(turns))  # VCR's, for each turn
        return [Record(picture, turns[:n], turns[n], choices=choices[n // 2], **more) for n in range(1, len(turns), 2)]
    return "questions, not a caption" if stage == 1 else "a caption, for --stage 1"


def read_path(path, tables):
    """Samples of one file or folder. Files that are tables to be joined (COCO, VQA) are added to `tables`."""
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return itertools.chain.from_iterable(map(read_shard, shards)) if shards else read_caption_folder(path)
    if tarfile.is_tarfile(path):
        return read_shard(path)
    content = read_json(path)
    found = [name for name in tables if isinstance(content, dict) and isinstance(content.get(name), list)]
    for name in found:
        # VQA's two files name the pictures' split here; COCO's one counts its own pictures
        split = str(content.get("data_subtype", path if "images" in found else "val2014"))
        tables[name] += [row | {"split": split} if isinstance(row, dict) else row for row in content[name]]
    return [] if found else map(read_item, content if isinstance(content, list) else [content])


def read_json(path):
    """What a JSON file holds, or a list of what the lines of JSON Lines hold, None for one that can't be parsed."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--data {path}: can't be read as text ({error})") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        content = [parse_line(line) for line in text.split("\n") if line.strip()]
        if not any(isinstance(item, dict) for item in content):
            raise UserError(f"--data {path}: is neither JSON nor JSON Lines: {error}") from error
        return content


def parse_line(line):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)


def read_caption_folder(folder):
    """`a.jpg` (or with another of ENDINGS) beside `a.txt`, in any depth."""
    for image in sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS):
        text = image.with_suffix(".txt")
        caption = " ".join(text.read_text("utf-8-sig", "replace").split()) if text.is_file() else ""
        yield (image, caption, (), {}) if caption else "a picture without a caption in a .txt beside it"


def read_shard(path):
    """A WebDataset shard: `key.jpg` with `key.txt` (a caption) or `key.json` (a caption or a conversation)."""
    groups = {}
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: its pictures are read in place
            for info in tar:
                folder, file = os.path.split(info.name)
                key, _, ending = file.lower().rpartition(".")
                group = groups.setdefault((folder, key), {})
                if not info.isfile() or info.size > MOST_BYTES:
                    yield "a link, a folder or an oversized file in a tar shard"
                elif "." + ending in ENDINGS:
                    group["image"] = Member(str(path), info.name, info.offset_data, info.size)
                elif ending in ("txt", "json"):
                    group[ending] = tar.extractfile(info).read().decode("utf-8-sig", "replace")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"--data {path}: is no whole tar archive without compression ({error})") from error
    for group in filter(None, groups.values()):
        item = {"caption": group["txt"]} if "txt" in group else parse_line(group.get("json", ""))
        if "image" not in group:
            yield "a text without its picture in a tar shard"
        else:
            yield read_item(item | {"image": group["image"]}) if isinstance(item, dict) else "a picture without a text"


def read_item(item):
    """One record of a list or of JSON Lines: of LLaVA's kind, of VCR's, of LMEye's release, or with a caption."""
    try:
        if item is None:
            return "a line is not JSON"
        if "answer_choices" in item:
            return read_vcr(item)
        if "questions" in item:
            texts = [re.fullmatch(r"\s*(?:\d+[.)]\s*)?(Question|Answer):\s*(.+)", t, re.S) for t in item["questions"]]
            turns = tuple(match[2].strip() for match in texts)
            if [match[1] for match in texts] != ["Question", "Answer"] * (len(turns) // 2) or not turns:
                return "questions and answers do not alternate"
            name = item["image_id"] if isinstance(item["image_id"], str) else f"{item['image_id']:012d}.jpg"
            return name, str(item.get("caption") or "").strip(), turns, {}
        if not isinstance(item.get("image"), (str, Member)) or not item["image"]:
            return "no picture"
        if isinstance(item.get("caption"), str) and "conversations" not in item:
            return item["image"], " ".join(item["caption"].split()), (), {}
        turns = tuple(turn["value"].replace("<image>", "").strip() for turn in item["conversations"])
        speakers = [turn["from"] for turn in item["conversations"]]
        if not turns or not all(turns) or speakers != ["human", "gpt"] * (len(turns) // 2):
            return "turns do not alternate between human and gpt, or are empty"
        return item["image"], item.get("caption") or (turns[1] if len(turns) == 2 else ""), turns, {}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return MALFORMED


def read_vcr(item):
    """VCR: the answer, then its rationale. Text is a list of words; [0, 1] in it names two of `objects`, from 0."""
    def render(words):
        text = " ".join(" and ".join(f"{item['objects'][i]} {i + 1}" for i in word) if isinstance(word, list) else word
                        for word in words)
        return re.sub(r" (['’]) ?(?=(?:s|t|re|ve|ll|d|m)\b)", r"\1", re.sub(r" (?=[?.!,;:])", "", text))

    if "answer_label" not in item or "rationale_label" not in item:
        return "no label"
    answers, whys = (tuple(map(render, item[name])) for name in ("answer_choices", "rationale_choices"))
    turns = (render(item["question"]), answers[item["answer_label"]], "Why?", whys[item["rationale_label"]])
    return item["img_fn"], "", turns, {"key": str(item.get("annot_id", "")), "choices": (answers, whys)}


def join_tables(tables):
    """COCO's captions with their pictures, VQA's questions with their answers."""
    images, questions = ({(row["split"], str(row.get(key))): row for row in tables[name] if isinstance(row, dict)}
                         for name, key in (("images", "id"), ("questions", "question_id")))
    for row in tables["annotations"]:
        try:
            if "question_id" not in row:
                image = images.get((row["split"], str(row["image_id"])))
                yield (image["file_name"], " ".join(row["caption"].split()), (), {"key": row["image_id"]}) \
                    if image else "a caption without its picture"
            elif question := questions.pop((row["split"], str(row["question_id"])), None):
                name = f"COCO_{question['split']}_{question['image_id']:012d}.jpg"
                yield name, "", (question["question"], row["multiple_choice_answer"]), {
                    "kind": str(row["answer_type"]), "key": row["question_id"],
                    "answers": tuple(str(a["answer"]) for a in row.get("answers", ()))}
            else:
                yield "an answer without its question"
        except (AttributeError, KeyError, TypeError, ValueError):
            yield MALFORMED
    yield from ["a question without an answer"] * len(questions)


def is_text(value):
    """Whether a value is text that says something and can be written down (JSON can hold halves of characters)."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode("utf-8", "ignore").decode()


# ---- Published data that fetches itself ----------------------------------------------------------------------

PUBLISHED = {  # what a stage takes without --data: its folder, then the records and the pictures, as file and address
    1: ("llava-cc3m-595k", {
        "chat.json": "https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K/resolve/main/chat.json",
        "images.zip": "https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K/resolve/main/images.zip"}),
    2: ("llava-instruct-150k", {
        "llava_instruct_150k.json": "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/"
                                    "llava_instruct_150k.json",
        "train2017.zip": "http://images.cocodataset.org/zips/train2017.zip"}),
}


def fetch(stage, out, agreed):
    """Have the published data of a stage below `out` → ([records], [pictures]) for `read_records`.

    States sizes and place first, and downloads only if `agreed` or told so on a terminal. UserError without that,
    without room on the disk, or if a download breaks off: the next call goes on where it ended.
    """
    name, files = PUBLISHED[stage]
    folder = Path(out, "data", name)
    missing = {folder / file: url for file, url in files.items() if not (folder / file).is_file()}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {path: remote_size(url) for path, url in missing.items()}
        need = sum(sizes.values()) - sum(part.stat().st_size for part in folder.glob("*.part"))
        print(f"--stage {stage} without --data takes {name}: {need / 1e9:.2f} GB to download into {folder}/")
        if not agreed and not (sys.stdin.isatty() and input("Download now? [y/N] ").strip().lower() in ("y", "yes")):
            raise UserError("nothing was downloaded: add --download to agree, or name data of your own with --data")
        if need > (free := shutil.disk_usage(folder).free):
            raise UserError(f"{folder}: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
        for path, url in missing.items():
            download(url, path, sizes[path])
    return tuple([str(folder / file)] for file in files)


def remote_size(url):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: can't be reached ({error}); name data of your own with --data") from error


def download(url, path, size):
    """Fetch a file of `size` bytes into path.part, from where an earlier try ended, and rename it when it is whole."""
    with open(f"{path}.part", "ab") as part:
        done = part.tell()
        try:
            if done != size:
                request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if 0 < done < size else {})
                with urllib.request.urlopen(request, timeout=60) as answer:
                    if answer.status != 206:  # the whole file: a first try, or a server without ranges
                        part.truncate(done := 0)
                    with tqdm.wrapattr(part, "write", total=size, initial=done, desc=path.name, disable=None) as file:
                        shutil.copyfileobj(answer, file)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url}: the download broke off ({error}); the same command goes on from there") from error
        part.flush()
        if part.seek(0, os.SEEK_END) != size:
            raise UserError(f"{url}: the download ended before its {size:,} bytes; the same command goes on from there")
    os.replace(f"{path}.part", path)


# ---- Pictures ------------------------------------------------------------------------------------------------

open_zip = functools.lru_cache(zipfile.ZipFile)


def open_root(root):
    """A folder or zip archive of --images → (its path, None or {name: name in the archive})."""
    if root.is_dir():
        return str(root), None
    try:
        names = {name: name for name in open_zip(str(root)).namelist() if name and not name.endswith("/")}
    except Exception as error:  # zipfile raises half a dozen kinds at broken archives
        raise UserError(f"--images {root}: is neither a folder nor a zip archive ({error})") from error
    tops = {name.partition("/")[0] for name in names} - {"__MACOSX"}
    if len(tops) == 1:  # everything in one folder, as in COCO's train2017.zip: its name may be left out
        names |= {name.partition("/")[2]: name for name in list(names)}
    return str(root), names


def find_picture(roots, name):
    """A name → the path or Member inside one of the roots, or None: also where it leads out of them."""
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name:
        return None
    for root, names in roots:
        if names is None and (len(roots) == 1 or os.path.exists(os.path.join(root, name))):
            return os.path.join(root, name)
        if names and name in names:
            return Member(root, names[name])
    return None


def load_image(source):
    """A path, Member or picture (returned as it is) → RGB picture, turned as its EXIF says. UserError if unreadable."""
    if isinstance(source, Image.Image):
        return source
    try:
        with Image.open(read_member(source) if isinstance(source, Member) else source) as image:
            if image.width * image.height > MOST_PIXELS or max(image.size) > 100 * min(image.size):
                raise ValueError(f"{image.width} × {image.height} pixels are too many, or too narrow")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # gray of 16 bits, which Pillow would cut off at 255
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{source}: no such picture") from None
    except Exception as error:  # Pillow's decoders raise what they like at broken bytes
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{source}: can't be read as a picture: {reason}") from error


def read_member(member):
    """The bytes of a file in an archive, as a stream."""
    if member.offset >= 0:
        with open(member.archive, "rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.size))
    info = open_zip(member.archive).getinfo(member.name)
    if info.file_size > MOST_BYTES:
        raise ValueError(f"unpacks to {info.file_size:,} bytes")
    return io.BytesIO(open_zip(member.archive).read(info))


# ---- Features: each picture goes through CLIP once ------------------------------------------------------------


class Dataset(NamedTuple):
    """Records with the CLIP features of their pictures and with their token ids."""

    records: list
    tokens: list  # (ids of the question, ids of the answer) of each record
    features: np.ndarray  # (P, C) float16, mapped from a file
    picture: np.ndarray  # (R,) the row of `features` of each record

    def f(self, rows):
        return torch.from_numpy(self.features[self.picture[rows]]).float()  # (B, C)

    def batch(self, rows):
        """Indices of records → (f (B, C), Tokens)."""
        questions, answers = zip(*(self.tokens[i] for i in rows))
        return self.f(rows), Tokens(*pad(questions, left=True), *pad(answers))

    def take(self, keep):
        """The records where `keep` (R,) is true, with the same features."""
        return self._replace(records=list(itertools.compress(self.records, keep)),
                             tokens=list(itertools.compress(self.tokens, keep)), picture=self.picture[keep])


def encode(model, records, skipped, folder=None):
    """Features and tokens of records → Dataset. Left out, and counted in `skipped`: records whose picture can't be
    read, and those longer than the language model's context. With `folder`, the features are kept in a file there."""
    keys = [id(r.image) if isinstance(r.image, Image.Image) else r.image for r in records]  # id: in memory
    images = dict(zip(keys, (r.image for r in records)))
    features = encode_images(model, list(images.values()), folder)
    row = {key: i for i, key in enumerate(images)}
    picture = np.array([row[key] for key in keys])
    broken = np.isnan(features[:, 0])
    for image in itertools.compress(images.values(), broken):
        try:
            load_image(image)
            skipped["a picture that could not be read when the features were computed"] += 1
        except UserError as error:
            skipped[str(error)] += 1
    tokens = []
    for start in tqdm(range(0, len(records), 1000), desc="tokens", disable=None if len(records) > 50_000 else True):
        part = records[start:start + 1000]
        questions = [r.question for r in part] if part[0].turns else None
        tokens += [tuple(np.array(ids, np.int32) for ids in pair)
                   for pair in zip(*model.token_ids(questions, [r.answer for r in part]))]
    longest = [max(map(len, (a, *model.token_ids(None, r.choices)[1]) if r.choices else (a,)))
               for r, (_, a) in zip(records, tokens)]
    fits = np.array([len(q) + n <= model.room for (q, _), n in zip(tokens, longest)])
    skipped["longer than the language model's context"] += int((~fits).sum())
    keep = fits & ~broken[picture]
    if not keep.any():
        raise UserError(f"not one of {len(records)} records can be used: {skipped.most_common(1)[0][0]}")
    return Dataset(records, tokens, features, picture).take(keep)


def encode_images(model, images, folder=None, batch_size=128):
    """CLIP features of pictures (P, C), float16, mapped from a file; the row of one that can't be read is NaN.

    The file is written batch by batch. Its name is a hash of the CLIP and of the pictures, and its length tells how
    far it is, so a pass that was broken off goes on from the last whole batch. Without `folder` it is a temporary one.
    """
    C = model.clip.visual.output_dim
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with open(f"{folder}/{features_key(model, images)}.f16", "a+b") if folder else tempfile.TemporaryFile() as file:
        size = file.seek(0, os.SEEK_END) // (2 * C)  # pictures in the file
        done = size if size == len(images) else size - size % batch_size
        file.truncate(done * 2 * C)
        with tqdm(total=len(images), initial=done, desc="CLIP features", disable=None) as bar:
            for pixels in decode(model.preprocess, images[done:], batch_size):
                good = [x for x in pixels if x is not None]
                rows = np.full((len(pixels), C), np.nan, np.float16)
                if good:
                    rows[[x is not None for x in pixels]] = model.encode_image(torch.stack(good)).cpu().numpy()
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(pixels))
        return np.memmap(file, np.float16, "r", shape=(len(images), C))


def features_key(model, images):
    """A hash of what decides the features: the CLIP, and each picture's place, its file's size and time of change."""
    key = hashlib.sha256(model.settings.clip.encode())
    for p in model.clip.visual.parameters():
        key.update(p.detach().flatten()[:4].float().cpu().numpy().tobytes())

    @functools.lru_cache  # an archive has many pictures
    def state(file):
        stat = os.stat(file) if os.path.exists(file) else None
        return stat and (stat.st_size, stat.st_mtime_ns)

    for image in images:
        key.update(repr((image, state(image.archive if isinstance(image, Member) else image))).encode())
    return key.hexdigest()[:16]


def decode(preprocess, images, batch_size, ahead=3):
    """Yield lists of `batch_size` pixel tensors (3, S, S), None for what can't be read; threads work `ahead` batches
    before. (Pillow's decoding and resizing run without Python's lock, so threads do what processes would.)"""
    def pixels(image):
        try:
            return preprocess(load_image(image))
        except UserError:
            return None

    queue = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), batch_size):
            queue.append([pool.submit(pixels, image) for image in images[start:start + batch_size]])
            if len(queue) > ahead:
                yield [future.result() for future in queue.popleft()]
        while queue:
            yield [future.result() for future in queue.popleft()]


def split(dataset, share=0.02, most=500, fewest=50):
    """Set some pictures with their records aside, always the same → (training, held-out Dataset).

    Of fewer than `fewest` pictures none is held out, and the second is None.
    """
    pictures = np.unique(dataset.picture)
    if len(pictures) < fewest:
        return dataset, None
    aside = np.random.default_rng(0).permutation(pictures)[:min(most, max(2, round(share * len(pictures))))]
    held_out = np.isin(dataset.picture, aside)
    return dataset.take(~held_out), dataset.take(held_out)


def batches(dataset, size, tokens=None, seed=0):
    """Yield the rows of one batch after the other, without end; each epoch is a new shuffle of the Dataset.

    A batch has `size` records, fewer where their tokens, with padding, would be more than `tokens`. Records of like
    length come together: each shuffled stretch of `window` batches is halved by its longer side, question or answer,
    until the parts are batches, and these come in random order. All depends on the arguments alone.
    """
    for epoch in itertools.count():
        yield from plan_epoch(dataset, size, tokens, seed, epoch)


def plan_epoch(dataset, size, tokens, seed, epoch, window=500):
    """The rows of all batches of one epoch, a list of arrays: see `batches`."""
    lengths, rng = np.array([(len(q), len(a)) for q, a in dataset.tokens]), np.random.default_rng((seed, epoch))

    def cut(rows):
        if len(rows) <= size and (not tokens or len(rows) == 1 or len(rows) * lengths[rows].max(0).sum() <= tokens):
            return [rows]
        axis = np.ptp(lengths[rows], 0).argmax()
        rows = rows[lengths[rows, axis].argsort(kind="stable")]
        whole = max(size, len(rows) // 2 // size * size)  # halves of whole batches, as long as there are any
        half = whole if whole < len(rows) else len(rows) // 2
        return cut(rows[:half]) + cut(rows[half:])

    order = rng.permutation(len(lengths))
    plan = [batch for i in range(0, len(order), window * size) for batch in cut(order[i:i + window * size])]
    return [plan[i] for i in rng.permutation(len(plan))]


# ---- The miniature's world -----------------------------------------------------------------------------------
#
# A scene is one to four objects of a kind: "two small red circles at the left on a blue background". One scene in
# ten, by a hash of its words, is held out: neither CLIP nor the language model nor LMEye ever trains on it.

SIDE = 64  # pixels
WORDS = 16  # of CLIP's longest text
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
WEIGHTS = {"number": 2, "size": 1, "color": 1.5, "shape": 3, "place": 2, "background": 0.5}  # in captions for CLIP


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
IN_TEN = {s: zlib.crc32(" ".join(s).encode()) % 10 for s in SCENES}
HELD_OUT = [s for s in SCENES if IN_TEN[s] == 0]
TRAINING = [s for s in SCENES if IN_TEN[s] != 0]


def attributes(scene):
    """What a caption of this scene can name: here the same for all."""
    return Scene._fields


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
    records = []
    for scene in HELD_OUT if held_out_scenes else rng.choices(TRAINING, k=pictures):
        picture = draw(scene, rng)
        if stage == 1:
            records.append(Record(picture, (), describe(scene)))
            continue
        for kind in KINDS if held_out_scenes else rng.choices(KINDS, OFTEN, k=questions):
            before = ask(scene, rng.choice(KINDS), rng) if not held_out_scenes and rng.random() < .25 else ()
            question, answer = ask(scene, kind, rng)
            records.append(Record(picture, (*before, question), answer, kind))
    return records


def build_tokenizer(ends, texts=None):
    """A tokenizer of the world's own words: lower case, no punctuation, <end> the highest id (CLIP pools there).

    With `ends`, texts are framed as CLIP's tokenizer does, [start … end]; without, as OPT's, [start …].
    """
    rng = random.Random(0)
    texts = texts or [describe(s) for s in SCENES] + [ask(s, kind, rng)[0] for s in SCENES for kind in KINDS]
    texts = [IMAGE, QUESTION + "thing things", ANSWER + " yes no", *texts]
    word = r"\n?\w+:|[\w/-]+"
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
