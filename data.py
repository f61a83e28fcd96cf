"""Records from a data file, their pictures as CLIP features, and batches.

One shape of record is read, from a JSON list or from JSON Lines (one record a line). It is LLaVA's:

    {"image": "a.jpg", "caption": "A red cup on a table."}                                # for stage 1
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "What is this?"},     # for stage 2
                                         {"from": "gpt", "value": "a cup"}, …]}
    {"image": "a.jpg", "question": "What color is it?", "answer": "red"}                  # the same, shorter

More fields are optional: "category" (accuracy is told for each), "id", and "choices", a list of texts for each answer.
Several pairs of a conversation are a dialogue: each answer becomes a record, with the turns before it in its prompt.
A folder of pictures, a.jpg beside its caption a.txt, is read as well. For other formats tests/lab/published.py writes
such a file first. `--images` names the folder of the pictures, or a zip archive, which is read in place.

Two ideas are worth reading first. CLIP is frozen, so each picture goes through it once and its feature is kept in a
file (`encode_images`). Records differ in length, so batches are planned (`plan_epoch`). What can't be used is left out
and counted with its reason, never passed over; where a file's meaning can't be known, it is not guessed.
"""

import hashlib
import io
import json
import os
import re
import shlex
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from lmeye import ANSWER, QUESTION, Tokens, UserError, collate, printable

MAX_TURNS = 41  # in a prompt: twenty earlier questions with their answers, and the question itself
MAX_BYTES = 100_000_000  # of a picture in a zip, unpacked
MAX_PIXELS = 100_000_000  # of a picture. This takes the place of Pillow's two limits, which warn and raise
FEATURE_BATCH = 128  # pictures that go through CLIP together
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
           ".tga", ".ico", ".pbm", ".pgm", ".ppm", ".pnm")  # of pictures in a folder of pairs
MALFORMED = "a record that is no object, lacks a field, has one twice, or has one of another type"
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")  # about faults that it works around


class Record(NamedTuple):
    """One picture, one prompt, one answer. A caption is a record without a prompt."""
    image: str  # name of the picture, as the data file gives it
    turns: tuple  # (question, answer, …, question); () for a caption
    answer: str  # "" where it is not known
    category: str = "all"
    id: str | int | None = None
    choices: tuple = ()  # texts, one of which is the answer

    @property
    def question(self):
        return dialogue(self.turns)


def dialogue(turns):
    """Turns (question, answer, …, question) → one text for the place of the question in the template."""
    text = turns[0] if turns else ""
    for i in range(1, len(turns)):
        text += (QUESTION if i % 2 == 0 else ANSWER + " ") + turns[i]
    return text


class Dataset(NamedTuple):
    """R records, with the CLIP features of their P pictures and with their token ids."""
    records: list
    tokens: list  # (ids of the question, ids of the answer) of each record; a caption's question has none
    features: np.ndarray  # (P, C) float16, mapped from a file
    picture: np.ndarray  # (R,) the row of `features` of each record

    def f(self, rows):
        """Rows of records → their pictures' features (B, C), on the CPU."""
        return torch.from_numpy(self.features[self.picture[rows]]).float()

    def batch(self, rows):
        """Rows of records → (f (B, C), Tokens), on the CPU."""
        questions = [self.tokens[i][0] for i in rows]
        answers = [self.tokens[i][1] for i in rows]
        return self.f(rows), collate(questions if self.records[rows[0]].turns else None, answers)

    def take(self, rows):
        """The records of these rows, in this order, with the same features."""
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


# ---- Features: each picture goes through CLIP once -------------------------------------------------------------


def encode_images(model, pictures, names, folder=None):
    """CLIP features of the named pictures → (features (P, C) float16, {row: reason} of those that can't be read).

    They are kept in a file in `folder`, or in a temporary one. A new file holds NaN everywhere, and NaN in a row
    means "not done yet". So one rule serves three cases: whoever opens the file encodes the rows that hold NaN. A pass
    that was killed goes on after its last batch, a picture that could not be read is tried again, and a whole file is
    used as it is.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return encode_images(model, pictures, names, folder)
    path = Path(folder, features_key(model, pictures, names) + ".f16")
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(names), model.align.in_features)
    unreadable, examples = {}, {}

    def read(row):
        return load_pixels(model, pictures, names[row])

    with FileLock(f"{path}.lock"):  # two programs may want the same features
        if not path.is_file() or path.stat().st_size != 2 * shape[0] * shape[1]:
            create_features(path, shape)
        features = np.memmap(path, np.float16, "r+", shape=shape)
        todo = np.flatnonzero(np.isnan(features.sum(1, dtype=np.float32)))  # a sum with NaN is NaN
        # Batches are cut at the same rows whatever is done already: then each is computed as in an unbroken pass.
        parts = np.split(todo, np.flatnonzero(np.diff(todo // FEATURE_BATCH)) + 1)
        with tqdm(total=len(todo), desc="CLIP features", disable=None if len(todo) else True) as bar:
            for rows, loaded in read_ahead(read, parts):
                pixels = {row: x for row, (x, _) in zip(rows, loaded) if x is not None}
                if pixels:
                    features[list(pixels)] = encode_pixels(model, list(pixels.values()))
                for row, (_, reason) in zip(rows, loaded):
                    if not reason and np.isnan(features[row, 0]):
                        reason = "CLIP features that are not finite, or beyond 65,504: try --precision fp32"
                    if reason:
                        unreadable[row] = examples.setdefault(reason, f"{reason}, as {names[row]}")
                bar.update(len(rows))
    features.flags.writeable = False  # what is written there stands in the file
    return features, unreadable


def create_features(path, shape):
    """A file of NaN for features (P, C), which appears all at once. (Written, not mapped: a full disk then is an error.)
    """
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        for start in range(0, shape[0], 4096):
            file.write(np.full((min(4096, shape[0] - start), shape[1]), np.nan, np.float16).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def encode_pixels(model, pixels):
    """A list of B tensors (3, side, side) → features (B, C) float16; a row that is not finite becomes NaN."""
    f = model.encode_image(torch.stack(pixels)).half()
    f[~f.isfinite().all(1)] = torch.nan
    return f.cpu().numpy()


def load_pixels(model, pictures, name):
    """A picture → (pixels (3, side, side), ""), or (None, the reason why it can't be read)."""
    try:
        with pictures.open(name) as file:
            return model.preprocess(load_image(file)), ""
    except UserError as reason:
        return None, str(reason)


def read_ahead(read, parts, ahead=3):
    """Yield (part, [read(item) for each of its items]) for each part, in order. Threads read `ahead` parts before they
    are wanted, so that a GPU need not wait. (Pillow decodes and resizes without Python's lock.)"""
    queue = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in parts:
            queue.append((part, [pool.submit(read, item) for item in part]))
            if len(queue) > ahead:
                first, futures = queue.popleft()
                yield first, [future.result() for future in futures]
        for part, futures in queue:
            yield part, [future.result() for future in futures]


def features_key(model, pictures, names):
    """A hash of what decides the features: CLIP's layers and some values of each weight, the preprocessing, and the
    state of each picture (`Pictures.state`). A picture in a folder that is replaced by another one of the same size and
    time of change is not noticed."""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr((model.preprocess, model.clip.visual)))  # addresses change
    key = hashlib.sha256((model.settings.clip + layers).encode())
    for name, weight in model.clip.visual.state_dict().items():
        key.update(f"{name} {weight.dtype} {weight.flatten()[:4].tolist()}".encode())
    for name in names:
        key.update(repr((name, pictures.state(name))).encode())
    return key.hexdigest()[:16]


# ---- Datasets: records with features and tokens ----------------------------------------------------------------


def encode(model, records, skipped, pictures, folder=None, noted=None):
    """Records → Dataset: features (kept in `folder`, see `encode_images`) and tokens.

    Left out are records whose picture can't be read, whose texts the language model can't take (`find_unfit`), or that
    exceed its context: they are added to the Counter `skipped`. Counted in `noted`, if one is given, is what is kept
    but not as it was: dialogues that lost their oldest turns, and answers that the tokenizer changes. UserError if
    no record remains.
    """
    noted = Counter() if noted is None else noted
    names = list(dict.fromkeys(record.image for record in records))  # each once, in order
    row = {name: i for i, name in enumerate(names)}
    features, unreadable = encode_images(model, pictures, names, folder)

    kept, tokens, picture = [], [], []
    for start in tqdm(range(0, len(records), 1000), desc="tokens", disable=None if len(records) > 20_000 else True):
        whole = records[start:start + 1000]
        part = [record._replace(turns=record.turns[-MAX_TURNS:]) for record in whole]
        questions = model.question_ids([record.question for record in part]) if part[0].turns else [[]] * len(part)
        answers = model.answer_ids([record.answer for record in part])
        for before, record, question, answer in zip(whole, part, questions, answers):
            choices = model.answer_ids(record.choices) if record.choices else []
            room = model.max_text_tokens - max(map(len, [answer, *choices]))
            while len(question) > room and len(record.turns) > 1 and not record.choices:
                record = record._replace(turns=record.turns[2:])
                question = model.question_ids([record.question])[0]

            reason = unreadable.get(row[record.image]) or find_unfit(model, record, question, [answer, *choices])
            if not reason and len(question) > room:
                reason = "longer than the language model's context"
            if reason:
                skipped[reason] += 1
                continue
            if len(record.turns) < len(before.turns):
                noted["prompts without the oldest turns of a long dialogue"] += 1
            if model.tokenizer.unk_token_id in answer[:-1]:
                noted["words in an answer that the language model has no token for"] += 1
            elif letters(model.decode(answer)) != letters(record.answer):
                noted["answers of which the tokenizer loses or changes letters"] += 1
            kept.append(record)
            tokens.append((np.array(question, np.int32), np.array(answer, np.int32)))
            picture.append(row[record.image])
    if not kept:
        raise UserError(f"not one of {len(records):,} records can be used: {list_reasons(skipped)}")
    return Dataset(kept, tokens, features, np.array(picture))


def find_unfit(model, record, question, answers):
    """Why the language model can't take the texts of a record, or "". Takes their token ids: those of the question,
    and a list of those of the answer and the choices, each with eos."""
    eos = model.tokenizer.eos_token_id
    if eos in question or any(eos in ids[:-1] for ids in answers):  # some tokenizers read "</s>" as eos
        return "a text in which the tokenizer finds the end of the text"
    if record.answer and len(answers[0]) == 1:  # eos alone
        return "an answer that the language model has no token for"
    if any(len(ids) == 1 for ids in answers[1:]):
        return "a choice that the language model has no token for"
    return ""


def letters(text):
    """A text without what a tokenizer may change: case, whitespace, and how accents are written."""
    return "".join(unicodedata.normalize("NFC", text).casefold().split())


def hold_out(dataset, most=500):
    """Set a tenth of the pictures aside, with their records → (training, validation Dataset). Always the same ones.

    Copies of a picture stay on one side. At least two pictures are taken, for one alone could not be shuffled; of
    fewer than ten none is, and the second Dataset is None.
    """
    hashes = picture_hashes(dataset)
    distinct = list(dict.fromkeys(hashes.values()))
    if len(distinct) < 10:
        return dataset, None
    n = min(most, max(2, len(distinct) // 10))
    chosen = set(np.random.default_rng(0).permutation(distinct)[:n].tolist())
    aside = np.array([hashes[i] in chosen for i in dataset.picture.tolist()])
    return dataset.take(np.flatnonzero(~aside)), dataset.take(np.flatnonzero(aside))


def shuffled(dataset):
    """The same records, each with another picture: a model that does not look loses nothing by it. A copy is not
    another picture. (If all are copies of one, they stay as they are.)"""
    hashes = picture_hashes(dataset)
    first = {}  # of each hash, the first picture
    for i, digest in hashes.items():
        first.setdefault(digest, i)
    order = np.random.default_rng(0).permutation(list(first.values()))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    return dataset._replace(picture=np.array([other[first[hashes[i]]] for i in dataset.picture.tolist()]))


def count_shared(train, val):
    """How many of val's pictures are trained on: those with the same features."""
    trained = set(picture_hashes(train).values())
    return sum(digest in trained for digest in picture_hashes(val).values())


def picture_hashes(dataset):
    """{row of features: their hash} of all pictures that have a record. Copies of a picture have the same hash."""
    rows = np.unique(dataset.picture).tolist()
    return {i: hashlib.blake2b(dataset.features[i].tobytes(), digest_size=16).hexdigest() for i in rows}


# ---- Batches: planned by length --------------------------------------------------------------------------------


def plan_epoch(dataset, size, max_batch_tokens, seed, epoch, window=500):
    """The rows of all batches of one epoch: a list of arrays, which depends on the arguments alone.

    A batch has at most `size` records and, padding included, `max_batch_tokens` tokens (unless one record has more).
    Padding is wasted work, so records of like length should share a batch. To sort them by their total length is not
    enough: a long question with a short answer would meet a short one with a long answer. So each stretch of `window`
    batches of shuffled records is halved, by the side whose lengths differ most, until the parts are batches. On
    lengths like LLaVA's, 1.03 × the real tokens are computed; sorted by total length, it would be 1.66 ×.
    """
    lengths = np.array([(len(question), len(answer)) for question, answer in dataset.tokens])
    rng = np.random.default_rng((seed, epoch))
    order, plan = rng.permutation(len(lengths)), []
    for start in range(0, len(order), window * size):
        parts = [order[start:start + window * size]]
        while parts:
            rows = parts.pop()
            padded = len(rows) * lengths[rows].max(0).sum()  # the longest question and the longest answer
            if len(rows) == 1 or (len(rows) <= size and padded <= max_batch_tokens):
                plan.append(rows)
                continue
            side = np.ptp(lengths[rows], 0).argmax()  # 0: questions differ most, 1: answers do
            rows = rows[lengths[rows, side].argsort(kind="stable")]
            middle = max(size, len(rows) // 2 // size * size)  # whole batches, as long as there are several
            if middle >= len(rows):
                middle = len(rows) // 2
            parts += [rows[:middle], rows[middle:]]
    return [plan[i] for i in rng.permutation(len(plan))]


def batches(dataset, size, max_batch_tokens, seed):
    """Yield the rows of one batch after the other, epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from plan_epoch(dataset, size, max_batch_tokens, seed, epoch)
        epoch += 1


# ---- Reading records -------------------------------------------------------------------------------------------


def read_records(path, pictures, stage, answered=True):
    """A data file, or a folder of a.jpg beside a.txt → (list of Record, Counter of what is left out, by reason).

    Stage 1 takes captions, and of a conversation with a single answer that answer. Stage 2 takes questions. With
    answered=False, for an evaluation, a question without an answer becomes a record with the answer "". UserError if
    the file can't be read, or if no record remains.
    """
    path, records, skipped, examples = Path(path), [], Counter(), {}
    items = read_folder(path, skipped) if path.is_dir() else read_json(path, skipped)
    for item in tqdm(items, desc="records", disable=None if len(items) > 100_000 else True):
        try:
            found = read_captions(item) if stage == 1 else read_turns(item, answered, skipped)
        except UserError as reason:
            skipped[str(reason)] += 1
            continue
        except (AttributeError, KeyError, TypeError):  # from a value of another type, anywhere in the record
            skipped[MALFORMED] += 1
            continue
        name = item["image"]
        try:
            pictures.find(name)
            records += found
        except UserError as reason:
            skipped[examples.setdefault(str(reason), f"{reason}, as {name}")] += 1
    if not records:
        why = list_reasons(skipped) or "it holds none"
        raise UserError(f"{path}: not one of {len(items):,} records can be used for stage {stage}: {why}")
    return records, skipped


def read_json(path, skipped):
    """The records of a JSON list or of JSON Lines, as dictionaries."""
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=read_object)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):  # a list, of which single lines may look whole
            raise UserError(f"{path}: is broken JSON, or cut off ({error})") from error
        content = []
        for line in text.split("\n"):  # at nothing else: U+2028 may stand in a text
            try:
                if line.strip():
                    content.append(json.loads(line, object_pairs_hook=read_object))
            except (ValueError, RecursionError):
                skipped["a line is not JSON"] += 1
        if not any(isinstance(item, dict) for item in content):
            raise UserError(f"{path}: is neither JSON nor JSON Lines ({error}): the README shows its shape") from error
    return content if isinstance(content, list) else [content]


def read_object(pairs):
    """A JSON object → dictionary; None if a key is there twice, for it can't be known which is meant."""
    item = dict(pairs)
    return item if len(item) == len(pairs) else None


def read_text(path):
    """The text of a UTF-8 file. UserError if it is not there or in another encoding."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path}: no such file")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text at byte {error.start:,}: save it as UTF-8 (pictures, and zips of "
                        "them, belong to --images)") from error


def read_folder(folder, skipped):
    """The pictures of a folder, at any depth, with a .txt beside each → records of captions, as read_json gives them.
    Linked folders are followed; none is read twice."""
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

    texts, items, paired = {}, [], set()
    for path in files:
        if path.suffix.lower() == ".txt":
            texts.setdefault(path.with_suffix(""), []).append(path)
    for path in sorted(files):
        stem = path.with_suffix("")
        if path.suffix.lower() not in (".txt", *ENDINGS):
            skipped["another file in a folder, where pictures and .txt are read (name a .json itself)"] += 1
        elif path.suffix.lower() != ".txt" and stem not in texts:
            skipped["a picture without a caption in a .txt beside it"] += 1
        elif path.suffix.lower() != ".txt":
            paired.add(stem)
            try:
                if len(texts[stem]) > 1:
                    raise UserError("a picture with two texts beside it, as a.txt and a.TXT")
                items.append({"image": path.relative_to(folder).as_posix(), "caption": read_text(texts[stem][0])})
            except UserError as reason:
                skipped[str(reason)] += 1
    if len(paired) < len(texts):
        skipped["a .txt without its picture beside it"] += len(texts) - len(paired)
    return items


def read_captions(item):
    """One record of a data file → a list of one Record, for stage 1."""
    check_kind(item)
    conversation = item.get("conversations") or []
    if item.get("caption"):
        caption = " ".join(item["caption"].split())
    elif [speaker(turn) for turn in conversation] == ["human", "gpt"]:  # "describe the picture" and a description
        caption = conversation[1]["value"].strip()
    elif "caption" in item:
        caption = ""
    else:
        raise UserError("questions, for --stage 2")
    if not is_text(caption):
        raise UserError("an empty or unreadable text")
    return [Record(item["image"], (), caption, category_of(item), item.get("id"))]


def read_turns(item, answered, skipped):
    """One record of a data file → a list with a Record for each answer, for stage 2."""
    check_kind(item)
    conversation = item.get("conversations")
    if conversation is None and "question" not in item:
        raise UserError("captions, for --stage 1")
    if conversation is None:
        conversation = [{"from": "human", "value": item["question"]}]
        if item.get("answer") is not None:
            conversation.append({"from": "gpt", "value": item["answer"]})
    if not answered and len(conversation) % 2 == 0 and conversation and not conversation[-1]["value"].strip():
        conversation = conversation[:-1]  # an empty answer is one that is not known

    turns = []  # up to the first one that is empty or not the speaker's
    for turn in conversation:
        text = turn["value"].strip()
        if not turns:  # LLaVA marks the picture's place, before or after the first question
            text = text.removeprefix("<image>").removesuffix("<image>").strip()
        if speaker(turn) != ("human", "gpt")[len(turns) % 2] or not is_text(text):
            break
        turns.append(text)
    if len(turns) % 2 and (answered or len(turns) < len(conversation)):
        turns.pop()  # a question without an answer
    if not turns:
        raise UserError(why_no_turns(conversation))
    if len(turns) < len(conversation):
        skipped["the rest of a chat, from a turn that is empty, unanswered or not the speaker's"] += 1

    all_choices = item.get("choices") or [[]] * len(conversation)
    if item.get("choices") and len(all_choices) != (len(conversation) + 1) // 2:
        raise UserError('"choices" that are not one list for each answer')
    records = []
    for n in range(0, len(turns), 2):
        answer = turns[n + 1] if n + 1 < len(turns) else ""
        choices = read_choices(all_choices[n // 2], answer)
        records.append(Record(item["image"], tuple(turns[:n + 1]), answer, category_of(item), item.get("id"), choices))
    return records


def why_no_turns(conversation):
    """Why a conversation has no turn for stage 2."""
    speakers = [speaker(turn) for turn in conversation]
    if speakers == ["human", "gpt"] and conversation[0]["value"].strip() == "<image>":
        return "captions, for --stage 1"
    if speakers == ["human"] or (speakers == ["human", "gpt"] and not conversation[1]["value"].strip()):
        return "a question without an answer"
    return "turns that do not alternate between human and gpt, or are empty"


def read_choices(choices, answer):
    """A list of texts → tuple. UserError if it can't be known which one is the answer."""
    if not isinstance(choices, list) or not all(is_text(text) for text in choices):
        raise UserError('"choices" that are not one list of texts for each answer')
    choices = tuple(text.strip() for text in choices)
    if choices and (len(set(choices)) < len(choices) or (answer and answer not in choices)):
        raise UserError("an answer that is not one of its choices, or a choice that is there twice")
    return choices


def check_kind(item):
    """UserError if a record has not the fields of one of the three kinds, TypeError if it is no object."""
    if not isinstance(item, dict):
        raise TypeError
    if not any(name in item for name in ("caption", "conversations", "question")):
        raise UserError('a record of no known kind: it needs "image" with "caption", "conversations" or "question", '
                        f"and has {', '.join(item)[:100]} (tests/lab/published.py reads other formats)")
    item.setdefault("image", None)


def speaker(turn):
    return {"user": "human", "assistant": "gpt"}.get(turn["from"], turn["from"])


def category_of(item):
    category = item.get("category")
    if isinstance(category, (dict, list)):
        raise TypeError
    return "all" if category is None or category == "" else printable(str(category))


def is_text(value):
    """Whether a value is text that says something and can be written down (JSON can hold halves of characters)."""
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value \
        and value == value.encode("utf-8", "ignore").decode()


def list_reasons(skipped):
    """The five most frequent reasons, in one line."""
    return "; ".join(f"{reason} ({n:,})" for reason, n in skipped.most_common(5))


def report(skipped, noted=Counter()):
    """Print how often which reason occurred, the ten most frequent ones first."""
    for word, reasons in (("skipped", skipped.most_common()), ("noted", noted.most_common())):
        for reason, n in reasons[:10]:
            print(f"  {word} {n:,}: {printable(reason)}")
        if reasons[10:]:
            print(f"  {word} {sum(n for _, n in reasons[10:]):,}: other reasons")


# ---- Pictures --------------------------------------------------------------------------------------------------


class Pictures:
    """The pictures that records name: a folder, or a zip archive, read in place. UserError if it is neither.

    If everything in an archive lies in one folder, as in COCO's train2017.zip, that folder's name may be left out.
    """

    def __init__(self, path):
        self.path, self.zip = Path(path), None
        if self.path.is_dir():
            return
        if not self.path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: no such folder or zip archive")
        try:
            self.zip = zipfile.ZipFile(self.path)
        except Exception as error:  # zipfile raises half a dozen kinds at broken archives
            raise UserError(f"{path}: is neither a folder nor a whole zip archive ({error})") from error
        self.names, self.twice = {}, set()  # {a name as `find` makes it plain: the name in the archive}
        for name in self.zip.namelist():
            plain = "/".join(split_name(name))
            if plain in self.names:
                self.twice.add(plain)
            if not name.endswith("/"):
                self.names[plain] = name
        tops = {name.partition("/")[0] for name in self.names} - {"__MACOSX"}
        self.top = tops.pop() + "/" if len(tops) == 1 else ""

    def find(self, name):
        """The name of a picture in a record → the one under which it is there. UserError, with the reason, if it is no
        name, leads out of the folder, is there twice or not at all."""
        if name is None or name == "":
            raise UserError("no picture")
        if not is_text(name):
            raise UserError("a picture's name that is no text")
        if name.startswith(("/", "\\")) or os.path.splitdrive(name)[0] or ".." in split_name(name):
            raise UserError("a picture's name that leads out of --images")
        plain = "/".join(split_name(name))
        if self.zip is None:
            if os.path.isfile(self.path / plain):
                return plain
        else:
            for candidate in (plain, self.top + plain):
                if candidate in self.twice:
                    raise UserError(f"a picture's name that is twice in {self.path}")
                if candidate in self.names:
                    return self.names[candidate]
        raise UserError(f"no such picture in {self.path} (--images names their folder or zip)")

    def open(self, name):
        """The name of a picture → a binary file. UserError as from `find`, and if the archive is broken there."""
        found = self.find(name)
        if self.zip is None:
            return open(self.path / found, "rb")
        info = self.zip.getinfo(found)
        if info.file_size > MAX_BYTES:
            raise UserError(f"a picture in a zip that unpacks to more than {MAX_BYTES:,} bytes")
        try:
            return io.BytesIO(self.zip.read(info))
        except Exception as error:  # broken, encrypted or packed in another way
            raise UserError(f"a picture that can't be unpacked ({error})") from error

    def state(self, name):
        """What tells whether a picture has changed: its checksum in an archive, else its path, size and time."""
        try:
            found = self.find(name)
        except UserError:
            return None
        if self.zip is None:
            stat = os.stat(self.path / found)
            return str(self.path.resolve()), stat.st_size, stat.st_mtime_ns
        info = self.zip.getinfo(found)
        return info.CRC, info.file_size


def open_pictures(data, images=None):
    """The Pictures of a data file: `images`, or else its own folder. A folder of pairs holds its pictures itself."""
    if images and os.path.isdir(data):
        raise UserError(f"{data}: is a folder of pictures with a .txt beside each, so --images would not be used")
    return Pictures(images or (data if os.path.isdir(data) else Path(data).parent))


def split_name(name):
    """The parts of a file's name: a/b, ./a//b and a\\b have the same."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def load_image(source):
    """The path of a picture, or a binary file → RGB picture, as a person sees it: turned as its EXIF says, on white where
    it is transparent. UserError, which names the path, if it can't be read."""
    if isinstance(source, (str, Path)):
        if not os.path.isfile(source):  # a pipe would be waited for
            raise UserError(f"{source}: no such picture")
        try:
            with open(source, "rb") as file:
                return load_image(file)
        except UserError as reason:
            raise UserError(f"{source}: {reason}") from reason
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > 100 * min(image.size):
                raise UserError("a picture with too many pixels, or too narrow")
            image.load()
            return to_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        source.seek(0)
        if source.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc"):
            raise UserError("a HEIC picture, which has to be converted to JPEG or PNG") from error
        raise UserError("a file that is no picture") from error
    except Exception as error:  # Pillow's decoders raise what they like at broken bytes
        raise UserError(f"a picture that can't be read ({type(error).__name__}: {error})") from error


def to_rgb(image):
    """A picture of any mode, as Pillow opened it → RGB."""
    many_bits = image.mode.startswith(("I", "F"))
    if many_bits and image.format != "PNG":
        raise UserError("gray of more than 8 bits, whose range the file does not tell: save it as PNG, or in 8 bits")
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # at EXIF that it can't read, or can't write when the picture is turned (Pillow 8965)
        pass
    if many_bits:  # in PNG 65,535 is white. Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image, np.uint32) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] > 0:  # else nothing would be seen: some programs write such files
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- Published data --------------------------------------------------------------------------------------------

PUBLISHED = {  # what a stage takes without --data: a folder, a data set on the Hugging Face hub, its files, pictures
    1: ("llava-cc3m-595k", "liuhaotian/LLaVA-CC3M-Pretrain-595K", ("chat.json", "images.zip"), "images.zip"),
    2: ("llava-instruct-150k", "liuhaotian/LLaVA-Instruct-150K", ("llava_instruct_150k.json",), "train2017.zip"),
}
COCO_PICTURES = "http://images.cocodataset.org/zips/train2017.zip"  # those of stage 2; they are not on the hub


def published_data(stage, out):
    """(data file, zip of pictures) of a stage, as the authors of LLaVA published them, below `out`. UserError, with the
    commands that fetch them, if they are not there."""
    name, _, files, pictures = PUBLISHED[stage]
    folder = Path(out, "data", name)
    if not all((folder / file).is_file() for file in (*files, pictures)):
        raise UserError(how_to_fetch(stage, out))
    return folder / files[0], folder / pictures


def how_to_fetch(stage, out):
    """The commands that fetch the published data of a stage, in one line."""
    name, repository, files, pictures = PUBLISHED[stage]
    folder = Path(out, "data", name)
    where = shlex.quote(str(folder))
    commands = [f"hf download {repository} {' '.join(files)} --repo-type dataset --local-dir {where}"]
    if pictures not in files:
        place = shlex.quote(str(folder / pictures))
        commands.append(f"curl -L -C - --create-dirs -o {place} {COCO_PICTURES}  (COCO's pictures, 19 GB)")
    return (f"name data of your own with --data, or fetch what is looked for in {folder}, {' and '.join(files)}"
            f"{'' if pictures in files else ' and ' + pictures}:  " + "  and  ".join(commands))
