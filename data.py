"""Records from a data file, their pictures as CLIP features, and batches.

One shape of record is read, LLaVA's, from a JSON list or from JSON Lines (one record a line):

    {"image": "a.jpg", "caption": "A red cup."}                                            stage 1
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "What is this?"},      stage 2
                                         {"from": "gpt", "value": "a cup"}, …]}
    {"image": "a.jpg", "question": "What is this?", "answer": "a cup"}                     the same, shorter

Optional are "category" (accuracy is told for each), "id", and "choices" (a list of texts for each answer).
Several pairs are a dialogue: each answer becomes a record, with the earlier turns in its prompt. A folder of
a.jpg beside a.txt is read as well; tests/lab/published.py turns other formats into such a file.

Each picture of a file goes through CLIP once (`encode_images`), and batches are planned by length
(`plan_epoch`). What can't be used is counted with its reason. Where it can't be known what a file means, it
is not guessed.
"""

import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import shlex
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from lmeye import ANSWER, QUESTION, UserError, collate, printable, write_atomically

MAX_TURNS = 41  # in a prompt without choices: twenty earlier questions with their answers, and the question
MAX_BYTES = 100_000_000  # of a picture in a zip, unpacked
MAX_PIXELS = 100_000_000  # of a picture, in the place of Pillow's own limits
FEATURE_BATCH = 128  # pictures that go through CLIP together
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
           ".jp2", ".tga", ".ico", ".pbm", ".pgm", ".ppm", ".pnm")  # of pictures
PLACEHOLDER = r"(?i)<\|?(image|img|video)[^<>=]{0,15}>"  # as other programs write it, <|image_1|> and so on
ROLES = {"user": "human", "assistant": "gpt"}  # other names of LLaVA's speakers
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")  # about faults that it works around


class Record(NamedTuple):
    """One picture, one prompt, one answer. A caption is a record without a prompt."""
    image: str  # the name that the data file gives the picture
    turns: tuple  # (question, answer, …, question); () for a caption
    answer: str  # "" where it is not known
    category: str = "all"
    id: str | int | None = None
    choices: tuple = ()  # texts; the answer is one of them

    @property
    def question(self):
        return dialogue(self.turns)


def dialogue(turns):
    """(question, answer, …, question) → one text, which takes the place of the question in the template."""
    text = turns[0] if turns else ""
    for i in range(1, len(turns)):
        text += (QUESTION if i % 2 == 0 else ANSWER + " ") + turns[i]
    return text


class Dataset(NamedTuple):
    """R records, with the CLIP features of their P pictures and with their token ids."""
    records: list
    tokens: list  # (ids of the question, ids of the answer with eos) of each record
    features: np.ndarray  # (P, C) float16, mapped from a file
    picture: np.ndarray  # (R,): which row of `features` belongs to a record

    def f(self, rows):
        """Rows of B records → the features of their pictures (B, C), on the CPU."""
        return torch.from_numpy(self.features[self.picture[rows]]).float()

    def batch(self, rows):
        """Rows of B records → (f (B, C), Tokens), on the CPU."""
        questions = [self.tokens[i][0] for i in rows] if self.records[rows[0]].turns else None
        return self.f(rows), collate(questions, [self.tokens[i][1] for i in rows])

    def take(self, rows):
        """The records of these rows, with the same features."""
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


# ---- Features: each picture goes through CLIP once ---------------------------------------------------------


def encode_images(model, pictures, names, folder):
    """CLIP features of P pictures → (features (P, C) float16, {row: why it can't be read}).

    They are kept in a file in `folder`. At first each row is NaN. This means "not done yet": rows of NaN are
    encoded whenever the file is used. So a pass that was killed goes on after its last batch, and what could
    not be read is tried again. The file belongs to these very pictures: where one is added or replaced, all
    are encoded again, into another file.
    """
    path = Path(folder, features_key(model, pictures, names) + ".f16")
    shape = (len(names), model.align.in_features)
    path.parent.mkdir(parents=True, exist_ok=True)
    unreadable = {}

    def read(row):
        try:
            with pictures.open(names[row]) as file:
                return model.preprocess(decode_image(file)), ""
        except UserError as reason:
            return None, str(reason)

    with FileLock(f"{path}.lock"):  # two programs may want the same features
        if not path.is_file() or path.stat().st_size != 2 * shape[0] * shape[1]:  # or it was cut off
            write_atomically(path, np.full(shape, np.nan, np.float16))
        features = np.memmap(path, np.float16, "r+", shape=shape)
        todo = np.flatnonzero(np.isnan(features.sum(1, dtype=np.float32)))
        # Batches end at fixed rows, whatever is done already: then each is computed as in an unbroken pass.
        parts = np.split(todo, np.flatnonzero(np.diff(todo // FEATURE_BATCH)) + 1)
        # Bars are for terminals only (None), and for what takes more than a second.
        with tqdm(total=len(todo), desc="CLIP features", disable=None, delay=1) as bar:
            for rows, loaded in zip(parts, read_ahead(read, parts)):
                good = [i for i, (pixels, _) in enumerate(loaded) if pixels is not None]
                if good:
                    features[rows[good]] = encode_pixels(model, [loaded[i][0] for i in good])
                for row, (_, reason) in zip(rows, loaded):
                    if not reason and np.isnan(features[row, 0]):
                        reason = "CLIP features that are not finite, or beyond 65,504: try --precision fp32"
                    if reason:
                        unreadable[row] = reason
                bar.update(len(rows))
    features.flags.writeable = False  # what is written there stands in the file
    return features, unreadable


def encode_pixels(model, pixels):
    """B tensors (3, side, side) → features (B, C) float16. A row that is not finite becomes NaN."""
    # Libraries compute few pictures by other routines, which round differently. In multiples of 16, copies of
    # a picture have equal features wherever they stand.
    filled = pixels + pixels[:1] * (-len(pixels) % 16)
    f = model.encode_image(torch.stack(filled))[:len(pixels)].half().cpu()
    f[~f.isfinite().all(1)] = torch.nan
    return f.numpy()


def read_ahead(read, parts, ahead=3):
    """Yield [read(item) for each item] of each part. Threads work some parts ahead, so that a GPU need not
    wait: Pillow decodes and resizes without Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        queue = deque()
        for part in [*parts, *[[]] * ahead]:
            queue.append([pool.submit(read, item) for item in part])
            if len(queue) > ahead:
                yield [future.result() for future in queue.popleft()]


def features_key(model, pictures, names):
    """A hash of what decides the features: CLIP's layers, some values of each weight, the preprocessing, and
    each picture's name and state. (A picture in a folder that is replaced by one of the same size and time of
    change is not noticed.)"""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr((model.preprocess, model.clip.visual)))  # addresses change
    key = hashlib.sha256(f"{model.settings.clip} {layers} {pictures.path.resolve()}".encode())
    for name, weight in model.clip.visual.state_dict().items():
        key.update(f"{name} {weight.dtype} {weight.flatten()[:4].tolist()}".encode())
    for name in names:
        key.update(repr((name, pictures.state(name))).encode())
    return key.hexdigest()[:16]


# ---- Batches: planned by length ----------------------------------------------------------------------------


def plan_epoch(dataset, size, max_batch_tokens, seed, epoch, window=500):
    """The rows of all batches of one epoch, a list of arrays, which depends on the arguments alone.

    A batch has at most `size` records and, padding included, `max_batch_tokens` tokens (unless one record has
    more). Padding is wasted work, so records of like length come together. Sorting by total length would not
    do: a long question with a short answer would meet a short one with a long answer. So each stretch of
    `window` batches of shuffled records is cut in two, by the side whose lengths differ most, until the parts
    are batches. With lengths like LLaVA's this computes 1.03 × the real tokens; sorting by total length,
    1.66 ×.
    """
    lengths = np.array([(len(question), len(answer)) for question, answer in dataset.tokens])
    rng = np.random.default_rng((seed, epoch))
    order, plan = rng.permutation(len(lengths)), []
    # Records stay within their stretch, so that batches are mixed well although they are sorted by length.
    for start in range(0, len(order), window * size):
        parts = [order[start:start + window * size]]
        while parts:
            rows = parts.pop()
            longest = lengths[rows].max(0).sum()  # the longest question and the longest answer
            fit = max(1, min(size, max_batch_tokens // longest))  # records of that length in a batch
            if len(rows) <= fit:
                plan.append(rows)
                continue
            side = np.ptp(lengths[rows], 0).argmax()  # 0: questions differ most, 1: answers do
            rows = rows[lengths[rows, side].argsort(kind="stable")]
            middle = max(fit, len(rows) // 2 // fit * fit)  # the left part is whole batches
            parts += [rows[:middle], rows[middle:]]
    return [plan[i] for i in rng.permutation(len(plan))]


def batches(dataset, size, max_batch_tokens, seed):
    """Yield the rows of one batch after the other, epoch after epoch, without end."""
    for epoch in itertools.count():
        yield from plan_epoch(dataset, size, max_batch_tokens, seed, epoch)


# ---- Datasets: records with their features and tokens ------------------------------------------------------


def encode(model, records, skipped, pictures, folder, noted=None):
    """Records → Dataset. The features are kept in a file in `folder`.

    Records that can't be used are added to the Counter `skipped`, by reason. Those that are used, but not as
    they stand, are added to the Counter `noted`, if one is given. UserError if no record remains.
    """
    noted = Counter() if noted is None else noted
    # A picture with several records has one row of features.
    names = list(dict.fromkeys(record.image for record in records))
    row = {name: i for i, name in enumerate(names)}
    features, unreadable = encode_images(model, pictures, names, folder)
    kept, tokens, picture = [], [], []
    for start in tqdm(range(0, len(records), 1000), desc="tokens", disable=None, delay=1):
        whole = records[start:start + 1000]
        part = [record if record.choices else record._replace(turns=record.turns[-MAX_TURNS:])
                for record in whole]
        answers = model.answer_ids([record.answer for record in part])
        questions = [[]] * len(part)
        if part[0].turns:
            questions = model.question_ids([record.question for record in part])
        for before, record, question, answer in zip(whole, part, questions, answers):
            # What is too long loses its oldest turns first; a record with choices is skipped, for its choices
            # would be compared by another prompt than others'.
            choices = model.answer_ids(record.choices) if record.choices else []
            room = model.max_text_tokens - max(map(len, [answer, *choices]))
            while len(question) > room and len(record.turns) > 1 and not choices:
                record = record._replace(turns=record.turns[2:])
                question = model.question_ids([record.question])[0]

            reason = unreadable.get(row[record.image])
            reason = reason or unfit(model, record, question, [answer, *choices], room)
            if reason:
                count(skipped, reason, record.image)
                continue
            if len(record.turns) < len(before.turns):
                count(noted, "prompts without the oldest turns of a long dialogue", record.image)
            loss = lost(model, answer[:-1], record.answer)  # the last is eos
            if loss:
                count(noted, f"answers {loss}", record.answer)
            loss = lost(model, question, QUESTION + record.question) if record.turns else ""
            if loss:
                count(noted, f"questions {loss}", record.turns[-1])
            kept.append(record)
            tokens.append((np.array(question, np.int32), np.array(answer, np.int32)))
            picture.append(row[record.image])
    if not kept:
        raise UserError(f"not one of {len(records):,} records can be used: {most_frequent(skipped)}")
    return Dataset(kept, tokens, features, np.array(picture))


def unfit(model, record, question, answers, room):
    """Why the language model can't take a record, or "". `answers`: ids of the answer and of each choice."""
    eos = model.tokenizer.eos_token_id
    if eos in question or any(eos in ids[:-1] for ids in answers):  # some tokenizers read "</s>" so
        return "a text in which the tokenizer reads the end of a text"
    known = answers if record.answer else answers[1:]
    if not all(model.decode(ids) for ids in known):  # eos alone, or a space
        return "an answer or choice that the language model has no token for"
    if len(set(map(tuple, answers[1:]))) < len(record.choices):
        return "choices that the tokenizer does not tell apart"
    return "longer than the language model's context" if len(question) > room else ""


def lost(model, ids, text):
    """What the tokenizer loses of a text, in words, or ""."""
    if model.tokenizer.unk_token_id in ids:
        return "with words that the language model has no token for"
    if letters(model.decode(ids)) != letters(text):
        return "of which the tokenizer loses or changes letters"
    return ""


def letters(text):
    """Letters with their marks and digits of a text, without case, however accents are composed. A tokenizer
    may change the rest: the miniature's drops every question mark."""
    text = unicodedata.normalize("NFC", text).casefold()
    return "".join(c for c in text if c.isalnum() or unicodedata.category(c).startswith("M"))


def hold_out(dataset, most=500):
    """Set a tenth of the pictures aside with their records → (training, validation Dataset).

    Of the same pictures they are always the same, in whatever order: those whose names have the lowest
    hashes. So what phase 2 sets aside was not trained on in phase 1. Copies of a picture, which are known by
    their equal features, stay together. (One that was saved anew, as a JPEG or in another size, has other
    features and passes for another picture.) Two pictures are set aside at least, for one could not be
    shuffled. Of fewer than ten none is, and the second Dataset is None.
    """
    copies, names = first_copies(dataset), {}
    for i, record in zip(copies, dataset.records):
        names[i] = min(record.image, names.get(i, record.image))  # of copies the first by the alphabet
    if len(names) < 10:
        return dataset, None
    order = sorted(names, key=lambda i: hashlib.sha256(names[i].encode()).digest())
    n = min(most, max(2, len(order) // 10))
    aside = np.isin(copies, order[:n])
    return dataset.take(np.flatnonzero(~aside)), dataset.take(np.flatnonzero(aside))


def shuffled(dataset):
    """The same records, each with another picture, no copy of its own if there is one. A model that does not
    look loses nothing by it."""
    copies = first_copies(dataset)
    pictures = np.random.default_rng(0).permutation(np.unique(copies))
    other = dict(zip(pictures, np.roll(pictures, 1)))
    return dataset._replace(picture=np.array([other[i] for i in copies]))


def count_shared(train, val):
    """How many pictures of `val` are trained on, under whatever name."""
    trained = {hash(train.features[i].tobytes()) for i in np.unique(train.picture)}
    return sum(hash(val.features[i].tobytes()) in trained for i in np.unique(first_copies(val)))


def first_copies(dataset):
    """For each record (R,) the first row with the features of its picture: copies have the same one."""
    rows, index = np.unique(dataset.picture, return_inverse=True)
    first = {}  # hash of features → row
    return np.array([first.setdefault(hash(dataset.features[i].tobytes()), i) for i in rows])[index]


# ---- Records: reading a data file --------------------------------------------------------------------------


MALFORMED = "a record that is no object, lacks a field, has one twice, or one of another type"
FIELDS = {"id", "image", "caption", "conversations", "question", "answer", "category", "choices"}


def read_records(path, pictures, stage, answered=True, noted=None):
    """A data file, or a folder of a.jpg beside a.txt → (list of Record, Counter of why items are left out).

    Stage 1 takes captions, and of a conversation with one answer this answer. Stage 2 takes questions. Those
    without an answer are taken with answered=False only, for an evaluation. UserError if no record remains.
    Fields that nothing reads (is one misspelled?) are added to the Counter `noted`, if one is given.
    """
    path, records, skipped, unread = Path(path), [], Counter(), Counter()
    items = read_folder(path, skipped) if path.is_dir() else read_json(path, skipped)
    for item in tqdm(items, desc="records", disable=None, delay=1):
        try:
            found = read_item(item, stage, answered, skipped)
            pictures.find(item.get("image"))
            records += found
            unread.update(name for name in item if name not in FIELDS)
            for turn in item.get("conversations") or []:
                unread.update(name for name in turn if name not in ("from", "value"))
        except (UserError, AttributeError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, UserError) else MALFORMED
            count(skipped, reason, item.get("image") if isinstance(item, dict) else item)
    if not records:
        why = most_frequent(skipped) or "it holds none"
        raise UserError(f"{path}: not one of {len(items):,} records can be used for stage {stage}: {why}")
    if unread and noted is not None:
        names = ", ".join(f"{name[:30]} ({n:,})" for name, n in unread.most_common(3))
        noted[f"fields that are not read: {names}"] += len(unread)
    return records, skipped


def read_json(path, skipped):
    """The items of a JSON list, of JSON Lines, or of a single record. UserError if a list is broken."""
    text, items = read_text(path), []
    try:
        content = json.loads(text, object_pairs_hook=read_object)
        return content if isinstance(content, list) else [content]
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path}: is broken JSON, or cut off ({error})") from error
    for line in text.split("\n"):  # at nothing else: U+2028 may stand in a text
        try:
            items += [json.loads(line, object_pairs_hook=read_object)] if line.strip() else []
        except (ValueError, RecursionError):
            count(skipped, "a line that is not JSON", line)
    return items


def read_object(pairs):
    """A JSON object → dictionary, or None if a key is there twice: which one is meant can't be known."""
    item = dict(pairs)
    return item if len(item) == len(pairs) else None


def read_text(path):
    """The text of a UTF-8 file. UserError if it is not there, or is none (but a git-lfs pointer, for one)."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path}: no such file")
    content = Path(path).read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a git-lfs pointer, not the file: run  git lfs pull  in its folder")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text at byte {error.start:,}: save it as UTF-8 (pictures, and "
                        "zips of them, belong to --images)") from error


def read_folder(folder, skipped):
    """A folder of pictures, at any depth, with a .txt beside each → items as of `read_json`."""
    groups = defaultdict(list)  # of files whose names differ in their endings alone
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            os.listdir(path)  # an error if it may not be read, which rglob passes over
        else:
            groups[path.with_suffix("")].append(path)
    items = []
    for group in groups.values():
        pictures = [path for path in group if path.suffix.lower() in ENDINGS]
        texts = [path for path in group if path.suffix.lower() == ".txt"]
        reason, caption = "", ""
        if len(texts) == len(pictures) == 1:
            try:
                caption = read_text(texts[0]).strip()
            except UserError:
                reason = "a .txt that is no UTF-8 text"
            if len(caption.splitlines()) > 1:
                reason = "a .txt of several lines: is it one caption, or several?"
        elif not pictures:
            reason = "a .txt without a picture beside it"
        elif not texts:
            reason = "a picture without a .txt beside it"
        else:
            reason = "a.jpg, a.png and a.txt, or two texts: which belongs to which?"
        for path in group:
            if path not in pictures + texts:
                count(skipped, "a file or link in a folder that is neither picture nor .txt (name a .json "
                      "itself)", path.name)
        if reason:
            for path in pictures or texts:
                count(skipped, reason, path.name)
        else:
            items.append({"image": pictures[0].relative_to(folder).as_posix(), "caption": caption})
    return items


def read_item(item, stage, answered, skipped):
    """An item of a data file → the list of its Records. UserError if it can't be used."""
    # A question with an answer is a short conversation.
    conversation = item.get("conversations") or []
    if conversation and "question" in item:
        raise UserError('a record that has both "conversations" and "question"')
    if "question" in item:
        answer = "" if item.get("answer") is None else item["answer"]
        conversation = [{"from": "human", "value": item["question"]},
                        {"from": "gpt", "value": answer}]
    if not conversation and "caption" not in item:
        raise UserError('a record of no known kind: it needs "image" with "caption", "conversations" or '
                        f'"question", and has {", ".join(item)[:100]} (tests/lab/published.py reads others)')
    speakers = [ROLES.get(turn["from"], turn["from"]) for turn in conversation]
    texts = [turn["value"].strip() for turn in conversation]
    if texts:  # LLaVA marks the picture's place, before the first question or after it
        texts[0] = re.sub("^<image>|<image>$", "", texts[0], count=1).strip()
    if re.search(PLACEHOLDER, " ".join(texts)):  # the model would read and write it as text
        raise UserError('"<image>" or the like inside a text, or again: a record about several pictures?')
    category = "" if item.get("category") is None else printable(str(item["category"]))
    record = Record(item.get("image"), (), "", category or "all", item.get("id"))

    # Stage 1 wants a caption. LLaVA writes one as the answer to "describe the picture".
    described = speakers == ["human", "gpt"] and "question" not in item
    if stage == 1:
        caption = " ".join((item.get("caption") or "").split())
        if not caption and described:
            caption = texts[1]
        if "caption" not in item and not described:
            raise UserError("questions, for --stage 2")
        if not is_text(caption):
            raise UserError("an empty or unreadable text")
        return [record._replace(answer=caption)]

    # Stage 2 wants questions, each with its answer. An evaluation takes a last one without.
    if not texts or (described and not texts[0]):
        raise UserError("captions, for --stage 1")
    if len(texts) % 2 == 0 and not texts[-1]:  # an empty answer is one that is not known
        texts.pop()
    if not all(map(is_text, texts)) or set(speakers[::2]) - {"human"} or set(speakers[1::2]) - {"gpt"}:
        raise UserError("turns that are empty, or do not alternate between human and gpt")
    n_questions = (len(texts) + 1) // 2
    choices = item.get("choices") or [[]] * n_questions
    if not isinstance(choices, list) or len(choices) != n_questions:
        raise UserError('"choices" that are not one list of texts for each answer')
    if len(texts) % 2 == 1 and answered:
        texts.pop()
        count(skipped, "a question without an answer", record.image)

    # A record for each answer. The turns before it are its prompt.
    records = []
    for i in range(0, len(texts), 2):
        answer = texts[i + 1] if i + 1 < len(texts) else ""  # the last question may have none
        check_choices(choices[i // 2], answer)
        turns = tuple(texts[:i + 1])
        records.append(record._replace(turns=turns, answer=answer, choices=tuple(choices[i // 2])))
    return records


def check_choices(choices, answer):
    """UserError unless the choices are texts, each once, with the answer among them. [] stands for none."""
    if not isinstance(choices, list) or not all(map(is_text, choices)):
        raise UserError('"choices" that are not one list of texts for each answer')
    distinct = {choice.casefold().strip() for choice in choices}
    if len(distinct) < len(choices) or (choices and answer and answer not in choices):
        raise UserError("an answer that is not one of its choices, or a choice that is there twice")


def is_text(value):
    """Whether a value is text that says something and can be written (JSON can hold halves of characters)."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return bool(value.strip()) and value == value.encode("utf-8", "ignore").decode()


def count(reasons, reason, example):
    """Count why something is left out, or noted: equal reasons together, with the first one's example."""
    known = [key for key in reasons if key.startswith(f"{reason} (as with ")]
    name = known[0] if known else f"{reason} (as with {printable(str(example))[:100]})"
    reasons[name] += 1


def most_frequent(reasons):
    """The five most frequent ones of a Counter, as one text."""
    return "; ".join(f"{reason} ({n:,})" for reason, n in reasons.most_common(5))


def report(skipped, noted=Counter()):
    """Print how often which reason occurred, for the ten most frequent of each Counter."""
    for word, reasons in (("skipped", skipped.most_common()), ("noted", noted.most_common())):
        for reason, n in reasons[:10]:
            print(f"  {word} {n:,}: {printable(reason)}")
        if reasons[10:]:
            print(f"  {word} {sum(n for _, n in reasons[10:]):,}: other reasons")


# ---- Pictures ----------------------------------------------------------------------------------------------


def open_pictures(data, images=None):
    """The Pictures of a data file or folder: `images`, or else the folder itself."""
    return Pictures(images or (data if os.path.isdir(data) else Path(data).parent))


class Pictures:
    """The pictures that records name: a folder, or a zip archive, read in place. UserError if it is neither.

    If all of an archive lies in one folder, as in COCO's train2017.zip, its name may be left out. (Where both
    would fit, a name is taken as it stands.)
    """

    def __init__(self, path):
        self.path, self.zip = Path(path), None
        # Of an archive: {a name as `tidy` gives it: the name there}, those that are twice, its one folder.
        self.names, self.twice, self.top = {}, set(), ""
        if self.path.is_dir():
            return
        if not self.path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: no such folder or zip archive")
        try:
            self.zip = zipfile.ZipFile(self.path)
        except Exception as error:  # zipfile raises half a dozen kinds at broken archives
            raise UserError(f"{path}: is neither a folder nor a whole zip archive ({error})") from error
        for name in self.zip.namelist():
            plain = tidy(name)
            if plain in self.names:
                self.twice.add(plain)
            if not name.endswith("/"):
                self.names[plain] = name
        tops = {name.partition("/")[0] for name in self.names} - {"__MACOSX"}
        if len(tops) == 1:
            self.top = tops.pop() + "/"

    def find(self, name):
        """A picture's name in a record → the name under which it is there. UserError if it is not."""
        if not is_text(name):
            raise UserError("no picture, or a name that is no text")
        outside = posixpath.isabs(tidy(name)) or os.path.splitdrive(name)[0]
        if outside or ".." in name.replace("\\", "/").split("/"):
            raise UserError("a picture that is not inside --images")
        name = tidy(name)
        if self.zip is None and os.path.isfile(self.path / name):
            return name
        for candidate in (name, self.top + name):
            if candidate in self.twice:
                raise UserError(f"a picture whose name is twice in {self.path}")
            if candidate in self.names:
                return self.names[candidate]
        raise UserError(f"no such picture in {self.path}: --images names their folder or zip")

    def open(self, name):
        """A picture's name → a binary file. UserError if it is not there, or can't be opened or unpacked."""
        name = self.find(name)
        try:
            if self.zip is None:
                return open(self.path / name, "rb")
            if self.zip.getinfo(name).file_size > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
            return io.BytesIO(self.zip.read(name))
        except Exception as error:  # without rights, or broken, encrypted or too large in an archive
            why = re.sub("'.*'", "…", str(getattr(error, "strerror", None) or error))  # names it by itself
            raise UserError(f"a picture that can't be opened ({why})") from error

    def state(self, name):
        """What changes when a picture does: its checksum in an archive, in a folder its size and time."""
        try:
            name = self.find(name)
        except UserError:
            return None
        if self.zip is None:
            stat = os.stat(self.path / name)
            return stat.st_size, stat.st_mtime_ns
        return self.zip.getinfo(name).CRC, self.zip.getinfo(name).file_size


def tidy(name):
    """A path in one spelling: a/b for ./a//b and a\\b."""
    return posixpath.normpath(name.replace("\\", "/"))


def load_image(path):
    """A picture's path → RGB picture, see `decode_image`. UserError, which begins with the path, if there is
    none that can be used."""
    if not os.path.isfile(path):  # a pipe would be waited for
        what = "a folder, not a picture" if os.path.isdir(path) else "no such picture"
        raise UserError(f"{path}: {what}")
    try:
        with open(path, "rb") as file:  # Pillow maps a path into memory, and then turns it wrongly
            return decode_image(file)
    except UserError as reason:
        raise UserError(f"{path}: {reason}") from reason


def decode_image(file):
    """A binary file → RGB picture as a person sees it: turned as EXIF says, on white where it is transparent.
    (Color profiles are not applied, and most CLIPs see the middle square only.) UserError if it can't be
    read, or is several pictures, as an animation and the pages of a TIFF are."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > 100 * min(image.size):
                raise UserError("a picture with too many pixels, or too narrow")
            # Which of several is meant? In a phone's JPEG (MPO) and in a PSD it is the first: others are made
            # from it, or are its layers.
            if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
                raise UserError("several frames or pages: save the one that is meant as a picture")
            image.load()
            if image.format in ("JPEG", "MPO", "PNG", "WEBP", "AVIF"):  # Pillow would take zeros for data
                file.seek(-16, os.SEEK_END)
                if not any(file.read()):
                    file.seek(0)
                    content = file.read().rstrip(b"\0")
                    # Some cameras write zeros behind the mark that ends a JPEG.
                    if not content.endswith((b"\xff\xd9", b"IEND\xaeB`\x82")):
                        raise UserError("zeros at its end: is it there in part only, as a stopped "
                                        "download is?")
            file.seek(24)  # where a PNG tells its bits
            return to_rgb(image, bits=int.from_bytes(file.read(1), "big"))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError("no picture that can be read (convert HEIC, for one, or odd TIFFs)") from error
    except Exception as error:  # Pillow's decoders raise what they like at broken bytes
        fault = re.sub(r"\d+", "…", str(error))  # so that faults of one kind are counted together
        raise UserError(f"a picture that can't be read ({type(error).__name__}: {fault})") from error


def to_rgb(image, bits):
    """A picture of any mode, as Pillow opened it → RGB. `bits`, of each value, are known of a PNG only."""
    many_bits = image.mode.startswith(("I", "F"))
    tags = image.tag_v2 if image.format == "TIFF" else {}
    deep = max(tags.get(258, (8,))) > 8  # in colors, too
    signed = max(tags.get(339, (1,))) > 1  # or of no known kind
    if (many_bits and image.format != "PNG") or deep or signed:
        raise UserError("more than 8 bits, or signed, of a range that Pillow does not tell: save it as PNG")
    # One color of a PNG may be transparent. Pillow tells it in the file's bits, but makes 8 of the pixels'.
    color = image.info.get("transparency")
    if image.format == "PNG" and color:
        if image.mode == "L":
            image.info["transparency"] = color * 255 // (2 ** bits - 1)
        if image.mode == "RGB" and bits == 16:  # where several colors have become one
            raise UserError("a transparent color of 16 bits, which Pillow does not keep: save it with alpha")
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # at EXIF that it can't read, or can't write back when the picture is turned
        pass
    if many_bits:  # in PNG 65,535 is white; Pillow alone would cut off at 255
        values = np.asarray(image, np.int64)
        image = Image.fromarray((values // 256).astype(np.uint8))
        image.putalpha(Image.fromarray(values != color).convert("L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] > 0:  # else nothing would be seen: some programs save so
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- Published data, for training without --data -----------------------------------------------------------

PUBLISHED = {  # (folder below OUT/data, data file, pictures, the commands that fetch them)
    1: ("llava-cc3m-595k", "chat.json", "images.zip",
        "hf download liuhaotian/LLaVA-CC3M-Pretrain-595K chat.json images.zip "
        "--repo-type dataset --local-dir {0}  (595,375 pictures, several GB)"),
    2: ("llava-instruct-150k", "llava_instruct_150k.json", "train2017.zip",
        "hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json "
        "--repo-type dataset --local-dir {0}  and COCO's pictures, 19 GB:  "
        "curl -L -C - -o {0}/train2017.zip http://images.cocodataset.org/zips/train2017.zip"),
}


def published_data(stage, out):
    """(data file, zip of pictures) below `out`. UserError, with how to fetch them, if one is missing."""
    name, data, images, commands = PUBLISHED[stage]
    folder = Path(out, "data", name)
    if not ((folder / data).is_file() and (folder / images).is_file()):
        raise UserError(f"name data of your own with --data, or fetch {data} and {images} into {folder}:  "
                        + commands.format(shlex.quote(str(folder))))
    return folder / data, folder / images
