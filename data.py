"""Records and where they come from; their pictures' features; datasets, and the order in which training takes them.

Everything that is trained on or asked about is a Record: a picture, the turns of the prompt, the answer. Published
files are read as they are: paths → samples → records. Each picture goes through CLIP once; a Dataset holds its feature
beside the token ids of its records. What can't be used becomes a Skip, which says why: counted, never passed over.
"""

import codecs
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from lmeye import ANSWER, QUESTION, UserError, collate, printable

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".tga",
           ".ico", ".pbm", ".pgm", ".ppm", ".pnm")  # of pictures
MAX_BYTES = 100_000_000  # of one file inside an archive, unpacked
MAX_PIXELS = 100_000_000  # of one picture; this takes the place of Pillow's own two limits, which warn and raise
MAX_TURNS = 41  # in a prompt: twenty earlier questions with their answers, and the question itself
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")  # about faults that it works around


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
    image: str | Member
    turns: tuple
    answer: str  # "" where it is not known: VQA's test split
    category: str = "all"  # of the question: accuracy is reported for each
    key: str | int = ""  # the published id: COCO's image_id, VQA's question_id, VCR's annot_id
    answers: tuple = ()  # VQA: what the ten annotators said; `answer` is what most of them said
    choices: tuple = ()  # VCR: the four texts to choose from; `answer` is the right one

    @property
    def question(self):
        return dialogue(self.turns)


def dialogue(turns):
    """Turns (question, answer, …, question) → one string for the place of a question, whose first turn has no QUESTION."""
    text = turns[0] if turns else ""
    for i in range(1, len(turns)):
        text += (QUESTION if i % 2 == 0 else ANSWER + " ") + turns[i]
    return text


class Skip(NamedTuple):
    """Something left out, and why; `key` is VQA's question_id, if it was one: its score counts what is left out."""
    reason: str
    key: str | int = ""


class Sample(NamedTuple):
    """What a file says of one picture, before it becomes the records of a stage."""
    name: str = ""  # of the picture, to be looked for under --images
    picture: str | Member = ""  # or the picture itself, where it lies with the text
    caption: str = ""
    turns: tuple = ()  # (question, answer, …); a question at the end has no known answer
    category: str = "all"
    key: str | int = ""
    answers: tuple = ()
    choices: tuple = ()  # VCR: the four texts of each question


# ---- Reading: paths → samples → records ----------------------------------------------------------------------
#
# A reader yields samples, and appends to `skips` what it leaves out. Where one record can't be used, a UserError says
# why, which becomes a Skip; where a whole file can't, it ends the program.


def read_records(paths, images, stage, answered=True):
    """Records of files and folders, told apart by content → (list of Record, list of Skip).
    The names of pictures are joined to the folders or zip archives `images`; without any, to the data file's folder.
    Stage 1 takes captions, stage 2 makes a record of each turn of a conversation, the earlier turns in its prompt.
    With answered=False, for an evaluation, VQA's questions without annotations become records with the answer "".
    UserError if a path is not there or can't be read, or if nothing remains.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise UserError(f"{path}: no such file or folder")
    given = [open_place(Path(image)) for image in images or []]
    tables = {"questions": [], "annotations": []}  # VQA's two files are joined when both have been read
    found, skips, records, all_places = [], [], [], []
    for path in paths:
        places = given or [open_place(path if path.is_dir() else path.parent)]
        all_places += [place for place in places if place not in all_places]
        found += [(sample, places) for sample in read_path(path, tables, skips)]
    found += [(sample, all_places) for sample in join_vqa(tables, answered, skips)]
    for sample, places in found:
        try:
            records += make_records(sample, places, stage)
        except UserError as reason:
            skips.append(Skip(str(reason), vqa_key(sample)))
    if not records:
        reasons = Counter(skip.reason for skip in skips).most_common(5)
        why = ", ".join(f"{reason} ({n:,})" for reason, n in reasons) or "it holds none"
        raise UserError(f"{' '.join(map(str, paths))}: no records for stage {stage}: {why}")
    return records, skips


def vqa_key(item):
    """The key of a Sample or Record of VQA, "" of another."""
    return item.key if item.turns and not item.choices else ""


def make_records(sample, places, stage):
    """A sample → the list of its records for a stage."""
    if stage == 1 and sample.turns and not sample.caption:
        raise UserError("questions, not a caption")
    if stage == 2 and not sample.turns:
        raise UserError("a caption, for --stage 1")
    texts = [sample.caption] if stage == 1 else list(sample.turns)
    for choices in sample.choices:
        texts += choices
    if not all(is_text(text) for text in texts):
        raise UserError("an empty or unreadable text")
    picture = sample.picture or find_picture(places, sample.name)
    if stage == 1:
        return [Record(picture, (), sample.caption, sample.category, sample.key)]
    records = []
    for n in range(0, len(sample.turns), 2):
        answer = sample.turns[n + 1] if n + 1 < len(sample.turns) else ""
        choices = sample.choices[n // 2] if sample.choices else ()  # of each question, at every second turn
        turns = sample.turns[:n + 1]
        records.append(Record(picture, turns, answer, sample.category, sample.key, sample.answers, choices))
    return records


def is_text(value):
    """Whether a value is text that says something and can be written down (JSON can hold halves of characters)."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode("utf-8", "ignore").decode()


def read_path(path, tables, skips):
    """Samples of one file or folder. Rows of VQA's files are added to `tables` instead."""
    if path.is_dir():
        yield from read_folder(path, skips)
    elif path.suffix.lower() == ".tar" or is_tar(path):
        yield from read_shard(path, skips)
    else:
        yield from read_json(path, tables, skips)


def is_tar(path):
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, OSError, ValueError):  # of a file that begins as if it were compressed, and is not, or is cut off
        return False


def read_text(path):
    """The text of a file: UTF-8, or UTF-16 where a byte order mark says so. UserError if it is neither or not there."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path}: no such file")
    return decode_text(Path(path).read_bytes(), path)


def decode_text(content, where):
    """The same from bytes; errors name them by `where`."""
    refuse_pointer(content, where)
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text at byte {error.start:,}: save it as UTF-8 (pictures, and zips "
                        "of them, belong to --images)") from error
    if "\0" in text:
        raise UserError(f"{where}: holds zero bytes, as UTF-16 without a byte order mark does: save it as UTF-8")
    return text


def refuse_pointer(content, where):
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{where}: is a git-lfs pointer in place of the file: run  git lfs pull  in its folder")


def read_folder(folder, skips):
    """`a.jpg` (or with another of ENDINGS) beside `a.txt`, and tar shards, in any depth. Linked folders are followed,
    none is read twice."""
    def fail(error):
        raise error

    seen, files = set(), []
    for place, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        subfolders.sort()
        if os.path.realpath(place) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(place))
        files += [Path(place, name) for name in names]
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    paired = set()
    for path in sorted(files):
        ending, stem = path.suffix.lower(), path.with_suffix("")
        if ending == ".tar":
            yield from read_shard(path, skips)
        elif ending in ENDINGS and stem in texts:
            paired.add(stem)
            try:
                yield Sample(picture=str(path), caption=" ".join(read_text(texts[stem]).split()))
            except UserError as reason:
                skips.append(Skip(str(reason)))
        elif ending in ENDINGS:
            skips.append(Skip("a picture without a caption in a .txt beside it"))
        elif ending != ".txt":
            skips.append(Skip("another file in a folder, where pictures, .txt and .tar are read (name a .json itself)"))
    skips += [Skip("a .txt without its picture beside it")] * (len(texts) - len(paired))


def read_shard(path, skips):
    """A WebDataset shard: `key.jpg` with `key.txt` (a caption) or `key.json` (a caption or a conversation). Archives
    joined by `cat` are read one after the other. UserError, with the place, if one is broken or cut off."""
    with open(path, "rb") as file:
        refuse_pointer(file.read(100), path)
        start = 0
        while start == 0 or start < os.path.getsize(path):
            groups, start = read_archive(path, file, start, skips)
            for group in groups.values():
                yield from read_group(group, skips)
            file.seek(start)
            while file.read(512) == bytes(512):  # the zeros that close an archive
                start += 512


def read_archive(path, file, start, skips):
    """One tar archive in a file → ({(folder, key): {ending: its files}}, where its members end). Pictures become
    Members, the contents of texts are read."""
    groups = {}
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # not compressed: its pictures are read in place
            for info in tar:
                folder, name = os.path.split(info.name)
                key, _, ending = name.rpartition(".")
                group = groups.setdefault((folder, key), {"picture": [], "txt": [], "json": []})
                if info.isdir():
                    continue
                if not info.isfile() or info.size > MAX_BYTES:
                    skips.append(Skip("a link or an oversized file in a tar shard"))
                elif "." + ending.lower() in ENDINGS:
                    group["picture"].append(Member(str(path), info.name, info.offset_data, info.size))
                elif ending.lower() in ("txt", "json"):
                    group[ending.lower()].append(tar.extractfile(info).read())
                else:
                    skips.append(Skip("another file in a tar shard, where pictures, .txt and .json are read"))
            end = tar.offset
    except Exception as error:  # tarfile raises what it likes at broken bytes
        raise UserError(f"{path}: no whole tar without compression from byte {start:,} on ({error})") from error
    file.seek(end)
    if file.read(512) != bytes(512):  # for tarfile, too, the archive ends here, but without a word
        raise UserError(f"{path}: is broken or cut off: neither a file nor the archive's end at byte {end:,}")
    return groups, end


def read_group(group, skips):
    """The files of one key in a shard → its sample. A .txt comes before a .json, which may describe the same."""
    largest, texts = max(len(files) for files in group.values()), group["txt"] or group["json"]
    try:
        if largest > 1:
            raise UserError("a name that is twice in a tar shard")
        if group["picture"] and texts:
            picture = group["picture"][0]
            text = decode_text(texts[0], f"the text of {picture}")
            item = {"caption": text} if group["txt"] else json.loads(text)
            for sample in read_item(item, skips):
                yield sample._replace(picture=picture)
        elif largest == 1:
            raise UserError("a picture without its text, or a text without its picture, in a tar shard")
    except UserError as reason:
        skips.append(Skip(str(reason)))
    except (ValueError, RecursionError):
        skips.append(Skip("a .json in a tar shard that is not JSON"))


def read_json(path, tables, skips):
    """A JSON file, or JSON Lines: one record, many, or a table of COCO's or VQA's."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):  # a list, of which single lines may look whole
            raise UserError(f"{path}: is broken JSON, or cut off ({error})") from error
        content = []
        for line in text.split("\n"):
            try:
                if line.strip():
                    content.append(json.loads(line))
            except (ValueError, RecursionError):
                skips.append(Skip("a line is not JSON"))
        if not any(isinstance(item, dict) for item in content):
            raise UserError(f"{path}: is neither JSON nor JSON Lines ({error}): write it as the README shows") from error
    if not isinstance(content, list):
        content = [content]
    table = content[0] if len(content) == 1 and isinstance(content[0], dict) else {}
    if any(name in table for name in ("image", "image_id", "conversations")):
        table = {}  # one record
    if isinstance(table.get("images"), list):
        yield from read_coco(path, table, skips)
    elif "questions" in table or "annotations" in table:
        split = str(table.get("data_subtype", "val2014")).replace("-dev", "")  # test-dev2015's pictures are test2015's
        for name in tables:
            rows = table.get(name)
            if isinstance(rows, list):
                tables[name] += [(split, row) for row in rows]
            elif name in table:
                skips.append(Skip(f'"{name}" that are no list'))
    else:
        for item in content:
            yield from read_item(item, skips)


MALFORMED = "a record that lacks a field, or has one of another type"
MISSHAPEN = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError)  # what reading one raises


def read_item(item, skips):
    """One record of a list, of JSON Lines or of a shard: of LLaVA's kind, VCR's, LMEye's own, or a caption alone."""
    try:
        if "answer_choices" in item:
            sample = read_vcr(item)
        elif "questions" in item:
            sample = read_release(item, skips)
        elif "conversations" in item:
            sample = read_chat(item, skips)
        elif "caption" in item:
            sample = Sample(item.get("image"), caption=" ".join(item["caption"].split()))
        else:
            raise UserError(f"a record of no known kind, with the fields {', '.join(item.keys())[:100]}")
        yield sample._replace(category=printable(str(item.get("category") or "all")))
    except UserError as reason:
        skips.append(Skip(str(reason)))
    except MISSHAPEN:
        skips.append(Skip(MALFORMED))


def read_chat(item, skips):
    """LLaVA: human and gpt in turn, with an optional caption. Of a conversation the answered turns are kept up to one
    that is empty or not the speaker's. A single answer is a caption as well; where the human says just <image>, only that."""
    conversation, turns = item["conversations"], []
    for turn in conversation:
        if turn["from"] != ("human" if len(turns) % 2 == 0 else "gpt"):
            break
        turns.append(turn["value"].replace("<image>", "").strip())
    single = len(turns) == len(conversation) == 2
    caption = item.get("caption") or (turns[1] if single else "")
    good = 0
    while good + 1 < len(turns) and turns[good] and turns[good + 1]:
        good += 2
    if not good and not caption:
        raise UserError("turns do not alternate between human and gpt, or are empty")
    if good < len(conversation) and not single:
        skips.append(Skip("the rest of a chat, from a turn that is empty, unanswered or not the speaker's"))
    return Sample(item.get("image"), caption=caption, turns=tuple(turns[:good]))


NUMBERED = r"\s*(?:\d+\s*[.)]\s*)?(Question|Answer)\s*\d*\s*:\s*(.*\S)\s*"  # also "1. Question: …", "Question 1: …"


def read_release(item, skips):
    """LMEye's own data: "questions" lists "Question: …", "Answer: …" in turn; some lists begin in mid-caption.
    What is not a question with its answer is counted, text by text."""
    turns, question = [], ""
    for text in item["questions"]:
        match = re.fullmatch(NUMBERED, text, re.DOTALL)
        if match and match[1] == "Question":
            question = match[2]
        elif match and question:
            turns += [question, match[2]]
            question = ""
    caption, name = (item.get("caption") or "").strip(), item["image_id"]
    if not turns and not caption:
        raise UserError("no question with its answer")
    skips += [Skip("a text that is not a question with its answer")] * (len(item["questions"]) - len(turns))
    if isinstance(name, int):
        name = f"{name:012d}.jpg"  # as COCO names its pictures
    return Sample(name, caption=caption, turns=tuple(turns))


def read_vcr(item):
    """VCR: the answer, then its rationale. Text is a list of words; [0, 1] in it names two of `objects`, from 0."""
    def render(words):
        if not isinstance(words, list):
            raise UserError("a text that is not a list of words")
        parts = []
        for word in words:
            if isinstance(word, list):
                if not all(number in range(len(item["objects"])) for number in word):
                    raise UserError("a text that names an object which is not in the picture")
                word = " and ".join(f"{item['objects'][number]} {number + 1}" for number in word)
            parts.append(word)
        text = re.sub(r" (?=[?.!,;:])", "", " ".join(parts))  # no space before a punctuation mark
        return re.sub(r" (['’]) ?(?=(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)  # it ' s → it's

    if "answer_label" not in item or "rationale_label" not in item:
        raise UserError("no label")  # the test split
    turns, all_choices = [], []
    for question, kind in ((render(item["question"]), "answer"), ("Why?", "rationale")):
        choices = tuple(render(words) for words in item[f"{kind}_choices"])
        if item[f"{kind}_label"] not in range(len(choices)):
            raise UserError("a label that is none of the choices")
        turns += [question, choices[item[f"{kind}_label"]]]
        all_choices.append(choices)
    return Sample(item["img_fn"], turns=tuple(turns), key=str(item.get("annot_id", "")), choices=tuple(all_choices))


def read_coco(path, table, skips):
    """COCO's captions, joined with the pictures of the same file."""
    if not isinstance(table.get("annotations"), list):
        raise UserError(f"{path}: has pictures without annotations (Karpathy's split file, in which training "
                        "and test pictures are mixed, is not read: take COCO's captions_….json)")
    images = index([("", row) for row in table["images"]], "id", skips)
    for row in table["annotations"]:
        try:
            image = images.get(("", str(row["image_id"])))
            if image is None:
                skips.append(Skip("a caption without its picture"))
            else:
                yield Sample(image["file_name"], caption=" ".join(row["caption"].split()), key=row["image_id"])
        except MISSHAPEN:
            skips.append(Skip(MALFORMED))


def join_vqa(tables, answered, skips):
    """VQA's questions, joined with their annotations by split and question_id."""
    questions = index(tables["questions"], "question_id", skips)
    annotations = index(tables["annotations"], "question_id", skips)
    skips += [Skip("an answer without its question")] * len(annotations.keys() - questions.keys())
    for (split, name), question in questions.items():
        annotation = annotations.get((split, name), {})
        try:
            sample = Sample(f"COCO_{split}_{question['image_id']:012d}.jpg", turns=(question["question"],),
                            key=question["question_id"])
            if annotation:
                if annotation.get("image_id", question["image_id"]) != question["image_id"]:
                    raise UserError("a question and an answer of different pictures have the same question_id")
                answers = tuple(str(answer["answer"]) for answer in annotation.get("answers", ()))
                turns = (question["question"], annotation["multiple_choice_answer"])
                category = printable(str(annotation["answer_type"]))
                sample = sample._replace(turns=turns, answers=answers, category=category)
            elif answered:
                skips.append(Skip("a question without an answer"))  # no key: no score is to count it as missed
                continue
            yield sample
        except UserError as reason:
            skips.append(Skip(str(reason), question["question_id"]))
        except MISSHAPEN:
            skips.append(Skip(MALFORMED, question["question_id"]))


def index(rows, key, skips):
    """(split, row) pairs → {(split, id): row}. Of an id given twice none is kept: a wrong row could be joined to it."""
    table, twice = {}, set()
    for split, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(key), (int, str)):
            skips.append(Skip(MALFORMED))
        elif (split, str(row[key])) in table:
            twice.add((split, str(row[key])))
        else:
            table[split, str(row[key])] = row
    for name in sorted(twice):
        row = table.pop(name)
        skips.append(Skip(f"{key} is given twice", row[key] if "question" in row else ""))  # not of an annotation
    return table


def report_skips(skips):
    """Print how often which reason occurred, for the ten most frequent."""
    reasons = Counter(skip.reason for skip in skips).most_common()
    for reason, n in reasons[:10]:
        print(f"  skipped {n:,}: {printable(reason)}")
    if reasons[10:]:
        print(f"  skipped {sum(n for _, n in reasons[10:]):,}: other reasons")


# ---- Pictures ------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A folder, or a zip archive with {name that a record may use: name in the archive}."""
    path: str
    names: dict | None = None


open_zip = functools.cache(zipfile.ZipFile)  # an archive is opened once


def open_place(path):
    """A folder or zip archive of --images → Place. UserError if it is neither."""
    if path.is_dir():
        return Place(str(path))
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: no such folder or zip archive")
    try:
        with open(path, "rb") as file:
            refuse_pointer(file.read(100), path)
        names = {name: name for name in open_zip(str(path)).namelist() if not name.endswith("/")}
    except UserError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds at broken archives
        raise UserError(f"{path}: is neither a folder nor a whole zip archive ({error})") from error
    tops = {name.partition("/")[0] for name in names} - {"__MACOSX"}
    if len(tops) == 1:  # everything in one folder, as in COCO's train2017.zip: its name may be left out
        for name in list(names):
            names.setdefault(name.partition("/")[2], name)
    return Place(str(path), names)


def find_picture(places, name):
    """A name → the path or Member in one of the places. A name without an ending is looked for with each of ENDINGS.
    UserError, with the reason, if it is no name, leads out of the places, or is in none of them."""
    if name is None or name == "":
        raise UserError("no picture")
    if isinstance(name, list):
        raise UserError("a list in place of a picture's name")
    if not is_text(name):
        raise UserError("a picture's name that is no text")
    if name.startswith(("/", "\\")) or os.path.splitdrive(name)[0] or ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise UserError("picture is not inside --images")
    candidates = [name]
    if not name.lower().endswith(ENDINGS):
        candidates += [name + ending for ending in ENDINGS]
    only = len(places) == len(candidates) == 1  # then loading it will tell whether it is there
    for place in places:
        for candidate in candidates:
            path = os.path.join(place.path, candidate)
            if place.names is None and (only or os.path.isfile(path)):
                return path
            if place.names is not None and candidate in place.names:
                return Member(place.path, place.names[candidate])
    raise UserError("no such picture in --images")


def load_image(source):
    """A path or Member → RGB picture, on white where it is transparent, turned as its EXIF says (as it is where that is
    broken). Gray of more than 8 bits: see `to_8_bits`. UserError if it can't be read."""
    if not isinstance(source, Member) and not os.path.isfile(source):  # a pipe would be waited for
        raise UserError(f"{source}: " + ("is no file" if os.path.exists(source) else "no such picture"))
    try:
        with read_member(source) if isinstance(source, Member) else open(source, "rb") as file:
            refuse_pointer(file.read(100), source)
            file.seek(0)
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS or max(image.size) > 100 * min(image.size):
                    raise ValueError(f"{image.width} × {image.height} pixels are too many, or too narrow")
                image.load()
                try:
                    ImageOps.exif_transpose(image, in_place=True)
                except Exception:  # at EXIF that it can't read, or can't write when the picture is turned (Pillow 8965)
                    pass
                if image.mode.startswith(("I", "F")):
                    image = to_8_bits(image)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except UserError:
        raise
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
    if info.file_size > MAX_BYTES:
        raise ValueError(f"unpacks to {info.file_size:,} bytes")
    return io.BytesIO(open_zip(member.archive).read(info))


def to_8_bits(image):
    """Gray of 16 bits, or of 32 as whole numbers (I) or floats (F) → 8 bits. 16 bits are divided by 256, floats from 0
    to 1 multiplied by 255, values from 0 to 255 kept; others are stretched, the lowest to black, the highest to white.
    """
    values = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high < 65536):
        values = values / 256
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / max(high - low, 1e-6))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


# ---- Features and datasets: each picture goes through CLIP once ------------------------------------------------


class Dataset(NamedTuple):
    """R records, with the CLIP features of their P pictures and with their token ids."""
    records: list
    tokens: list  # (ids of the question, ids of the answer) of each record
    features: np.ndarray  # (P, C) float16, mapped from a file
    picture: np.ndarray  # (R,) the row of `features` of each record

    def f(self, rows):
        return torch.from_numpy(self.features[self.picture[rows]]).float()  # (B, C)

    def batch(self, rows):
        """Indices of records → (f (B, C), Tokens), on the CPU."""
        questions = [self.tokens[i][0] for i in rows] if self.records[0].turns else None
        return self.f(rows), collate(questions, [self.tokens[i][1] for i in rows])

    def take(self, keep):
        """The records where `keep` (R,) is true, with the same features."""
        rows = np.flatnonzero(keep)
        records, tokens = [self.records[i] for i in rows], [self.tokens[i] for i in rows]
        return Dataset(records, tokens, self.features, self.picture[rows])

    def fingerprint(self):
        """A short hash of turns, answers and features, in their order: what a run was trained on."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.records:
            digest.update(repr((record.turns, record.answer)).encode())
        digest.update(np.asarray(self.picture, np.int64).tobytes())
        digest.update(np.ascontiguousarray(self.features))
        return digest.hexdigest()


def encode(model, records, skips, folder=None):
    """Features and tokens of records → Dataset. With `folder`, the features are kept in a file there.
    From prompts of more than MAX_TURNS turns, or beyond the language model's context, the oldest turns are left out. Words
    without a token, which small tokenizers have, can't be learned. Records are left out whose picture can't be read, or
    whose question and answer, or longest choice, still exceed the context. All that is appended to `skips`, records with
    their keys. UserError if no record remains.
    """
    images = list(dict.fromkeys(record.image for record in records))  # each once, in order
    row = {image: i for i, image in enumerate(images)}
    picture = np.array([row[record.image] for record in records])
    features = encode_images(model, images, folder)
    unreadable = {}
    for i in np.flatnonzero(~np.isfinite(features).all(1)):
        try:  # once more: the file may have come back since
            features[i] = model.encode_image(model.preprocess(load_image(images[i]))[None]).half().cpu().numpy()
            if not np.isfinite(features[i]).all():
                unreadable[i] = "a picture whose CLIP features are not finite, or beyond 65,504: try --precision fp32"
        except UserError as reason:
            unreadable[i] = str(reason)
    features.flags.writeable = False  # what is written there stands in the file

    fitted, tokens, keep = [], [], []
    for start in tqdm(range(0, len(records), 1000), desc="tokens", disable=None if len(records) > 50_000 else True):
        part = [record._replace(turns=record.turns[-MAX_TURNS:]) for record in records[start:start + 1000]]
        question_ids = model.question_ids([record.question for record in part]) if part[0].turns else [[]] * len(part)
        answer_ids = model.answer_ids([record.answer for record in part])
        for i, (record, question, answer) in enumerate(zip(part, question_ids, answer_ids), start):
            longest, reason = len(answer), unreadable.get(picture[i], "")
            if record.choices:
                lengths = [len(ids) for ids in model.answer_ids(record.choices)]
                longest = max(lengths)
                if min(lengths) < 2:  # eos alone
                    reason = "a choice that the language model has no token for"
            while len(question) + longest > model.max_text_tokens and len(record.turns) > 1 and not record.choices:
                record = record._replace(turns=record.turns[2:])
                question = model.question_ids([record.question])[0]
            if not reason and len(question) + longest > model.max_text_tokens:
                reason = "longer than the language model's context"
            if reason:
                skips.append(Skip(reason, vqa_key(record)))
            elif len(record.turns) < len(records[i].turns):
                skips.append(Skip("the oldest turns of a long chat"))
            elif model.tokenizer.unk_token_id in answer[:-1]:  # all but eos, which some tokenizers take for unknown words, too
                skips.append(Skip("words in an answer that the language model has no token for"))
            fitted.append(record)
            tokens.append((np.array(question, np.int32), np.array(answer, np.int32)))
            keep.append(not reason)
    if not any(keep):
        raise UserError(f"not one of {len(records)} records can be used: {skips[-1].reason}")
    return Dataset(fitted, tokens, features, picture).take(keep)


def encode_images(model, images, folder=None, batch_size=128):
    """CLIP features of pictures (P, C), float16, mapped from a file; the row of one that can't be read is NaN.
    The file is written batch by batch. Its name is a hash of the CLIP and of the pictures, and its length tells how
    far it is, so a pass that was broken off goes on from the last whole batch. Without `folder` it is a temporary one.
    """
    if not folder:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return encode_images(model, images, folder, batch_size)
    path = Path(folder, features_key(model, images) + ".f16")
    path.parent.mkdir(parents=True, exist_ok=True)
    C = model.align.in_features
    with FileLock(f"{path}.lock"), open(path, "a+b") as file:  # two programs may want the same features
        size = file.seek(0, os.SEEK_END) // (2 * C)  # pictures in the file
        done = size if size == len(images) else size - size % batch_size
        file.truncate(done * 2 * C)
        with tqdm(total=len(images), initial=done, desc="CLIP features", disable=None) as bar:
            for pixels in decode(model.preprocess, images[done:], batch_size):
                rows = np.full((len(pixels), C), np.nan, np.float16)
                good = [i for i, picture in enumerate(pixels) if picture is not None]
                if good:
                    rows[good] = model.encode_image(torch.stack([pixels[i] for i in good])).half().cpu().numpy()
                file.write(rows.tobytes())
                bar.update(len(pixels))
        file.flush()
        return np.memmap(file, np.float16, "r+", shape=(len(images), C))


def features_key(model, images):
    """A hash of what decides the features: CLIP's name, its image tower's layers and some values of each weight, the
    preprocessing, and each picture's name, its file's size and time of change."""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr((model.preprocess, model.clip.visual)))  # addresses change
    key = hashlib.sha256((model.settings.clip + layers).encode())
    for name, weight in model.clip.visual.state_dict().items():
        key.update(f"{name} {weight.dtype} {weight.flatten()[:4].tolist()}".encode())
    states = {}  # an archive has many pictures
    for image in images:
        file = image.archive if isinstance(image, Member) else image
        if file not in states:
            stat = os.stat(file) if os.path.exists(file) else None
            states[file] = (stat.st_size, stat.st_mtime_ns) if stat else None
        key.update(repr((image, states[file])).encode())
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


def hold_out(dataset, share=0.02, max_pictures=500, min_pictures=50):
    """Set some pictures with their records aside, always the same → (training, validation Dataset). Of fewer than
    `min_pictures` none is set aside, and the second is None."""
    pictures = np.unique(dataset.picture)
    if len(pictures) < min_pictures:
        return dataset, None
    n = min(max_pictures, max(2, round(share * len(pictures))))
    aside = np.isin(dataset.picture, np.random.default_rng(0).permutation(pictures)[:n])
    return dataset.take(~aside), dataset.take(aside)


def shuffled(dataset):
    """The same records, each with some other picture (if there is one): a model that does not look loses nothing by it."""
    pictures = np.random.default_rng(0).permutation(np.unique(dataset.picture))
    other = dict(zip(pictures, np.roll(pictures, 1)))
    return dataset._replace(picture=np.array([other[i] for i in dataset.picture]))


# ---- Batches -------------------------------------------------------------------------------------------------


def batches(dataset, size, max_batch_tokens=None, seed=0):
    """Yield the rows of one batch after the other, without end; each epoch is planned anew by `plan_epoch`."""
    epoch = 0
    while True:
        yield from plan_epoch(dataset, size, max_batch_tokens, seed, epoch)
        epoch += 1


def plan_epoch(dataset, size, max_batch_tokens, seed, epoch, window=500):
    """The rows of all batches of one epoch, a list of arrays, which depends on the arguments alone.
    A batch has at most `size` records, and, padding included, `max_batch_tokens` tokens (unless one record has more).
    Records of like length come together: each stretch of `window` batches of the shuffled records is halved by the
    side, question or answer, whose lengths differ most, until the parts are batches; these come in random order.
    """
    lengths = np.array([(len(question), len(answer)) for question, answer in dataset.tokens])
    rng = np.random.default_rng((seed, epoch))

    def fits(rows):
        padded = len(rows) * lengths[rows].max(0).sum()  # each as long as the longest question and the longest answer
        return len(rows) == 1 or (len(rows) <= size and (not max_batch_tokens or padded <= max_batch_tokens))

    def halves(rows):
        side = np.ptp(lengths[rows], 0).argmax()  # 0 question, 1 answer
        rows = rows[lengths[rows, side].argsort(kind="stable")]
        middle = max(size, len(rows) // 2 // size * size)  # whole batches, as long as there are several
        if middle >= len(rows):
            middle = len(rows) // 2
        return rows[:middle], rows[middle:]

    order, plan = rng.permutation(len(lengths)), []
    for start in range(0, len(order), window * size):
        parts = [order[start:start + window * size]]
        while parts:
            rows = parts.pop()
            if fits(rows):
                plan.append(rows)
            else:
                parts += halves(rows)
    return [plan[i] for i in rng.permutation(len(plan))]


# ---- Published data ------------------------------------------------------------------------------------------

PUBLISHED = {  # what a stage takes without --data: a folder, a data repository on the Hugging Face hub, its files
    1: ("llava-cc3m-595k", "liuhaotian/LLaVA-CC3M-Pretrain-595K", ["chat.json", "images.zip"]),
    2: ("llava-instruct-150k", "liuhaotian/LLaVA-Instruct-150K", ["llava_instruct_150k.json"]),
}
COCO_PICTURES = "http://images.cocodataset.org/zips/train2017.zip"  # those of stage 2; they are not on the hub


def published(stage, out, agreed):
    """Have the published data of a stage below `out` → ([records], [pictures]) for `read_records`.
    States size and place first, and downloads only if `agreed`. UserError without that, without the hub or room on the
    disk, and where COCO's pictures are missing, with the command that fetches them.
    """
    name, repository, files = PUBLISHED[stage]
    folder = Path(out, "data", name)
    missing = [file for file in files if not (folder / file).is_file()]
    try:
        size = 0
        for file in missing:
            url = huggingface_hub.hf_hub_url(repository, file, repo_type="dataset")
            size += huggingface_hub.get_hf_file_metadata(url).size
        if missing:
            print(f"--stage {stage} without --data takes {name}: {size / 1e9:.2f} GB to download into {folder}/")
            if not agreed:
                raise UserError("nothing was downloaded: add --download to agree, or name data of your own with --data")
            folder.mkdir(parents=True, exist_ok=True)
            if size > shutil.disk_usage(folder).free:
                raise UserError(f"{folder}: there is no room for {size / 1e9:.2f} GB")
        for file in missing:
            huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", local_dir=folder)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises what its network library raises
        raise UserError(f"{repository}: can't be fetched from the hub ({error}): try again, or use data of your own, "
                        "with --data") from error
    pictures = folder / ("images.zip" if stage == 1 else "train2017.zip")
    if not pictures.is_file():
        raise UserError(f"{pictures} is missing: COCO's pictures, 19 GB, are not on the hub. To fetch them:  "
                        f"curl -L -C - --create-dirs -o {pictures} {COCO_PICTURES}")
    return [str(folder / files[0])], [str(pictures)]
