"""Other people's formats in, their scores out.

The core reads one shape of record, LLaVA's. These commands write a file of it, a record a line. (Before each
stands `python tests/lab/`.)

    published.py coco captions_train2014.json > coco.jsonl
    published.py vqa questions.json annotations.json > vqa.jsonl     (a test split: without annotations)
    published.py vcr train.jsonl > vcr.jsonl
    published.py release data.json > release.jsonl                   (LMEye's own data)
    published.py webdataset 00000.tar 00001.tar --out folder > webdataset.jsonl      (its pictures)

An evaluation leaves answers.jsonl. These commands score it as the data sets' own programs do, beside the
blind answers, or write the file that those programs take:

    published.py score-vqa answers.jsonl annotations.json
    published.py score-vcr answers.jsonl
    published.py results-vqa answers.jsonl questions.json > vqa.json
    published.py results-coco answers.jsonl captions.json > captions.json

What is left out is counted by reason on the standard error.
"""

import argparse
import json
import os
import re
import sys
import tarfile
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import ENDINGS, MALFORMED, MAX_BYTES, is_text, read_json, read_object, read_text
from lmeye import UserError, printable, run_main
from look import read_answers
from sample import table_lines, table_row

# What reading a malformed record raises:
MISSHAPEN = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError)


# ---- Reading files: `skips` is a Counter, {why something was left out: how often} --------------------------


def parse(text):
    """JSON → its value; None if it is none, and in the place of an object that holds a key twice."""
    try:
        return json.loads(text, object_pairs_hook=read_object)
    except (ValueError, RecursionError):
        return None


def read_tables(path, *names):
    """A JSON object that holds lists under `names`, as COCO's and VQA's files do. UserError if it is none."""
    content = parse(read_text(path))
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f'{path}: is cut off, or has no list "{name}": take the file as it was published')
    return content


def index(rows, key, skips):
    """Rows → {id as text: row}. Of an id given twice none is kept: a wrong row could be joined to it."""
    table, twice = {}, set()
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(key), (int, str)):
            skips[MALFORMED] += 1
        elif str(row[key]) in table:
            twice.add(str(row[key]))
        else:
            table[str(row[key])] = row
    for name in twice:
        del table[name]  # its first row
        skips[f"{key} is given twice"] += 1
    return table


# ---- Formats → records -------------------------------------------------------------------------------------


def convert(rows, to_record, skips):
    """Published rows → the core's records, each by `to_record(row)`; what can't be used is counted. (The core
    looks through conversations, and finds out whether a picture is there.)"""
    records = []
    for row in rows:
        try:
            record = to_record(row)
            if not is_text(record["image"]):
                raise UserError("no picture, or a name that is no text")
            if not all(is_text(record.get(field, "none")) for field in ("caption", "question", "answer")):
                raise UserError("an empty or unreadable text")
            records.append(record)
        except UserError as reason:
            skips[str(reason)] += 1
        except UnicodeDecodeError:
            skips["a text that is not UTF-8"] += 1
        except MISSHAPEN:
            skips[MALFORMED] += 1
    return records


def conversation(turns):
    """[question, answer, …] → the same as LLaVA writes it."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def convert_coco(captions, skips):
    """COCO's captions → a record each, whose id is the image_id: https://cocodataset.org/#format-data"""
    content = read_tables(captions, "images", "annotations")
    images = index(content["images"], "id", skips)

    def to_record(row):
        image = images.get(str(row["image_id"]))
        if image is None:
            raise UserError("a caption without its picture")
        return {"image": image["file_name"], "caption": row["caption"], "id": row["image_id"]}

    return convert(content["annotations"], to_record, skips)


def convert_vqa(questions, annotations, skips):
    """VQAv2's questions, joined with their annotations by question_id → a record each, with the answer that
    most annotators gave. Questions without annotations, as in the test split, have no answer in their record.
    Format: https://visualqa.org/download.html. The picture's name is made of the split and the image_id.
    """
    content = read_tables(questions, "questions")
    split = str(content["data_subtype"]).replace("-dev", "")  # test-dev2015 has the pictures of test2015
    asked, annotated = index(content["questions"], "question_id", skips), {}
    if annotations:
        rows = read_tables(annotations, "annotations")["annotations"]
        annotated = index(rows, "question_id", skips)
    skips["an answer without its question"] += len(annotated.keys() - asked.keys())

    def to_record(row):
        # COCO's own name of the picture, which no field tells.
        record = {"image": f"COCO_{split}_{row['image_id']:012d}.jpg", "question": row["question"]}
        annotation = annotated.get(str(row["question_id"]))
        if annotation:
            if annotation.get("image_id", row["image_id"]) != row["image_id"]:
                raise UserError("a question and an answer of different pictures have the same question_id")
            record["answer"] = annotation["multiple_choice_answer"]
            record["category"] = printable(str(annotation["answer_type"]))
        return record | {"id": row["question_id"]}

    return convert(asked.values(), to_record, skips)


def convert_vcr(file, skips):
    """VCR → a conversation each: the question with its answer, "Why?" with the rationale, and the choices of
    both. Its id is the annot_id. The test split has no labels.
    Format: https://visualcommonsense.com/download/
    """
    def to_record(row):
        if "answer_choices" in row and not ("answer_label" in row and "rationale_label" in row):
            raise UserError("no label")
        turns, all_choices = [], []
        for question, kind in ((row["question"], "answer"), (["Why?"], "rationale")):
            choices = [render(words, row["objects"]) for words in row[f"{kind}_choices"]]
            label = row[f"{kind}_label"]
            if label not in range(len(choices)):
                raise UserError("a label that is none of the choices")
            turns += [render(question, row["objects"]), choices[label]]
            all_choices.append(choices)
        record = {"image": row["img_fn"], "conversations": conversation(turns), "choices": all_choices}
        return record | {"id": str(row.get("annot_id", ""))}

    return convert(read_json(file, skips), to_record, skips)


def render(words, objects):
    """VCR's list of words → text. [0, 1] in it names two of `objects`: "person 1 and chair 2"."""
    if not isinstance(words, list):
        raise UserError("a text that is not a list of words")
    parts = []
    for word in words:
        if isinstance(word, list):
            if not all(number in range(len(objects)) for number in word):
                raise UserError("a text that names an object which is not in the picture")
            word = " and ".join(f"{objects[number]} {number + 1}" for number in word)
        parts.append(word)
    text = re.sub(r" (?=[?.!,;:])", "", " ".join(parts))  # no space before a punctuation mark
    text = re.sub(r" (['’]) ?(?=(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)  # it ' s → it's
    if not is_text(text):
        raise UserError("an empty or unreadable text")
    return text


# "Question: …", and also "1. Question: …" and "Question 1: …"
NUMBERED = r"\s*(?:\d+\s*[.)]\s*)?(Question|Answer)\s*\d*\s*:\s*(.*\S)\s*"


def convert_release(file, skips):
    """LMEye's own data → a record each, with its caption, its conversation or both. "questions" lists
    "Question: …" and "Answer: …" in turn, but some lists begin in mid-caption. Pictures are named without
    their ending, which is .jpg. (Format: as seen in the published file.)
    """
    def to_record(item):
        turns, question = [], ""
        for text in item["questions"]:
            match = re.fullmatch(NUMBERED, text, re.DOTALL)
            if match and match[1] == "Answer" and question:
                turns += [question, match[2]]
            # An answer belongs to the question right before it, or to none.
            question = match[2] if match and match[1] == "Question" else ""
        caption = (item.get("caption") or "").strip()
        if not turns and not caption:
            raise UserError("no question with its answer")
        skips["a text that is not a question with its answer"] += len(item["questions"]) - len(turns)
        name = item["image_id"]
        if isinstance(name, int):
            name = f"{name:012d}.jpg"  # as COCO names its pictures
        elif is_text(name) and not name.lower().endswith(ENDINGS):
            name += ".jpg"
        record = {"caption": caption, "conversations": conversation(turns), "category": item.get("category")}
        return {"image": name} | {field: value for field, value in record.items() if value}

    return convert(read_json(file, skips), to_record, skips)


def unpack_webdataset(shards, out, skips):
    """Tar shards with a.jpg beside a.txt (a caption) or a.json (or a conversation) → a record each. The
    pictures are written into the new folder `out`, numbered: their names in a shard, which become the ids,
    may be anything. UserError if `out` exists or a shard is broken, before anything is written.
    Format: https://github.com/webdataset/webdataset
    """
    if os.path.exists(out):
        raise UserError(f"{out}: exists already: name a new folder with --out")
    groups, pictures = [], {}
    for shard in shards:
        groups += read_shard(shard, skips)

    def to_record(group):
        texts = group["txt"] or group["json"]  # which may describe the same
        if max(map(len, group.values())) > 1:  # which text belongs to which picture?
            raise UserError("a name that is twice in a tar shard")
        if not (group["picture"] and texts):
            raise UserError("a picture without its text, or a text without its picture, in a tar shard")
        text = bytes_of(*texts[0]).decode("utf-8-sig")
        item = {"caption": text} if group["txt"] else parse(text)
        if not item.keys() & {"caption", "conversations"}:
            raise UserError("a .json in a tar shard that has neither a caption nor a conversation")
        shard, info = group["picture"][0]
        image = f"{len(pictures):08d}{Path(info.name).suffix.lower()}"
        pictures[image] = shard, info
        return item | {"image": image, "id": info.name}

    records = convert(groups, to_record, skips)
    if records:
        Path(out).mkdir(parents=True)
    for record in records:
        Path(out, record["image"]).write_bytes(bytes_of(*pictures[record["image"]]))
    return records


def read_shard(path, skips):
    """A shard → the groups of its files that have one key, which is the name up to its last dot, as
    [{"picture": [(shard, info), …], "txt": …, "json": …}, …]. UserError if it is not whole."""
    groups = defaultdict(lambda: {"picture": [], "txt": [], "json": []})
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: a file of it is found at once
            for info in tar:
                key, _, ending = info.name.rpartition(".")
                kind = "picture" if "." + ending.lower() in ENDINGS else ending.lower()
                if info.isdir():
                    continue
                if not info.isfile() or info.size > MAX_BYTES:
                    skips["a link or an oversized file in a tar shard"] += 1
                elif kind in ("picture", "txt", "json"):
                    groups[key][kind].append((path, info))
                else:
                    skips["another file in a tar shard, where pictures, .txt and .json are read"] += 1
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(1_000_000)
    except Exception as error:  # tarfile raises what it likes at broken bytes
        raise UserError(f"{path}: is no whole tar without compression ({error}): fetch it again") from error
    if len(rest) < 512 or rest.strip(b"\0"):  # for tarfile, too, the archive ends here, but without a word
        raise UserError(f"{path}: is broken, cut off or joined to another: fetch it again")
    return list(groups.values())


def bytes_of(shard, info):
    with tarfile.open(shard, "r:") as tar:
        return tar.extractfile(info).read()


# ---- Answers → scores --------------------------------------------------------------------------------------


def read_vqa_answers(path):
    """answers.jsonl → {question_id as text: its answer}. UserError if one was answered twice."""
    said = {}
    for row in read_answers(path):
        if str(row["id"]) in said:
            raise UserError(f"{path}: {row['id']} was answered twice: evaluate VQA's questions alone")
        said[str(row["id"])] = row
    return said


def score_vqa(answers, annotations, skips):
    """VQA's soft accuracy → lines of a table. Every question that several people answered counts, as 0 if it
    has no answer: an evaluation may have left some out."""
    said, rows = read_vqa_answers(answers), read_tables(annotations, "annotations")["annotations"]
    annotated = index(rows, "question_id", skips)  # one that is there twice is not to be scored
    columns = defaultdict(list)
    for key, row in annotated.items():
        people = [str(answer["answer"]) for answer in row.get("answers", ())]
        if len(people) < 2:
            skips["a question without the answers of several people"] += 1
            continue
        scores = (0.0, 0.0)  # with the picture, and blind
        if key in said:
            scores = vqa_accuracy(said[key]["answer"], people), vqa_accuracy(said[key]["blind"], people)
        else:
            skips["a question that was not answered: it counts as wrong"] += 1
        for name in ("VQA", f"VQA, {printable(str(row['answer_type']))}"):
            columns[name].append((row["image_id"], *scores))
    skips["an answer to no question that counts"] += len(said.keys() - annotated.keys())
    return table(columns)


def vqa_accuracy(said, answers):
    """For each annotator min(1, matches among the others / 3), averaged (Antol et al., 2015). As in the
    official scorer, https://github.com/GT-Vision-Lab/VQA, texts are normalised only where annotators differ.
    Before, a letter with an accent is made one character (NFC): language models may write it as two.
    """
    texts = [re.sub(r"[\n\t]", " ", text).strip() for text in (said, *answers)]
    said, *answers = [unicodedata.normalize("NFC", text) for text in texts]
    normalize = normalize_vqa if len(set(answers)) > 1 else str
    match = [normalize(answer) == normalize(said) for answer in answers]
    return sum(min(1, (sum(match) - m) / 3) for m in match) / len(match)


def normalize_vqa(text):
    """A text as the official scorer compares it, whatever its case, punctuation, articles, apostrophes (but
    for double contractions, as couldn't've)."""
    before = text = text.lower()
    comma = re.search(r"\d,\d", text)
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        removed = comma or f"{mark} " in before or f" {mark}" in before  # at the edge of a word
        text = text.replace(mark, "" if removed else " ")
    text = re.sub(r"\.(?!\d)", "", text)  # 3.5 keeps its point
    words = [NUMBER_WORDS.get(word, word) for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
                "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = {"oclock": "o'clock", "maam": "ma'am", "yall": "y'all", "twas": "'twas"}
for ending, stems in {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you", "'re": "there they what why you",
    "'s": "he how that there what when where who why someone somebody",
    "'d": "he how it there they where who you someone something",
    "'ll": "how it they what who why you someone somebody something",
}.items():
    for stem in stems.split():
        CONTRACTIONS[stem + ending.replace("'", "")] = stem + ending


def score_vcr(answers, skips):
    """VCR's accuracies → lines of a table: of the answer (Q→A), of the rationale after the right answer
    (QA→R), and of both (Q→AR, over the rationales asked for: an answer that was left out was not right).
    Questions that an evaluation left out don't count. The likeliest choice is taken by the sum of its tokens'
    log p, and by its mean per token.
    """
    columns, answered = defaultdict(list), {}  # answered: whether each question's answer was right
    rows = [row for row in read_answers(answers) if row.get("choices")]
    for row in sorted(rows, key=lambda row: len(row["turns"])):  # answers before rationales
        if row["truth"] not in [choice["text"] for choice in row["choices"]]:
            skips["an answer whose truth is none of its choices"] += 1
            continue
        question = (row["id"], row["image"], row["turns"][0])  # an id may stand at two pictures
        for how in ("", ", per token"):
            right = [likeliest(row["choices"], logp, how) == row["truth"] for logp in ("logp", "blind_logp")]
            if len(row["turns"]) == 1:
                columns["Q→A" + how].append((row["image"], *right))
                answered[question, how] = right
            else:
                columns["QA→R" + how].append((row["image"], *right))
                before = answered.get((question, how), (False, False))
                columns["Q→AR" + how].append((row["image"], *np.logical_and(right, before)))
    return table(columns)


def likeliest(choices, logp, how):
    """The text of the choice with the highest `logp`, a field that holds the sum over its tokens."""
    values = [choice[logp] / (choice["tokens"] if how else 1) for choice in choices]
    return choices[np.argmax(values)]["text"]


def table(columns):
    """{row: [(picture, score, blind score), …]} → lines of a table like an evaluation's own. Its intervals
    are those of shares; VQA's scores, which may be parts of 1, vary rather less."""
    if not columns:
        raise UserError("no answer could be scored: take the answers.jsonl of an evaluation on this data set")
    rows = {name: table_row(columns[name]) for name in sorted(columns)}
    return table_lines(rows, "answers")


def results_vqa(answers, questions, skips):
    """VQA's results file, which has every question of the split: https://visualqa.org/evaluation.html"""
    said, results = read_vqa_answers(answers), {}
    for row in read_tables(questions, "questions")["questions"]:
        key = str(row["question_id"])
        skips["a question that was not answered"] += key not in said
        answer = said[key]["answer"] if key in said else ""
        results[key] = {"question_id": row["question_id"], "answer": answer}
    return [list(results.values())]


def results_coco(answers, captions, skips):
    """COCO's results file, which has every picture of the split: https://cocodataset.org/#format-results"""
    said, results = {row["image"]: row["answer"] for row in read_answers(answers) if not row["turns"]}, {}
    for row in read_tables(captions, "images")["images"]:
        skips["a picture without a caption"] += row["file_name"] not in said
        results[row["id"]] = {"image_id": row["id"], "caption": said.get(row["file_name"], "")}
    return [list(results.values())]


# ---- The command line --------------------------------------------------------------------------------------

COMMANDS = {  # the function of each, and its files: "?" marks one that may be left out, "+" several
    "coco": (convert_coco, "captions"), "vqa": (convert_vqa, "questions annotations?"),
    "vcr": (convert_vcr, "file"), "release": (convert_release, "file"),
    "webdataset": (unpack_webdataset, "shards+"), "score-vqa": (score_vqa, "answers annotations"),
    "score-vcr": (score_vcr, "answers"), "results-vqa": (results_vqa, "answers questions"),
    "results-coco": (results_coco, "answers captions"),
}


def parse_args():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (function, files) in COMMANDS.items():
        command = commands.add_parser(name, description=function.__doc__, formatter_class=as_written)
        for file in files.split():
            command.add_argument(file.rstrip("?+"), nargs=file[-1] if file[-1] in "?+" else None)
        if name == "webdataset":
            command.add_argument("--out", required=True, help="a new folder for the pictures")
    return parser.parse_args()


def main():
    given, skips = vars(parse_args()), Counter()
    command = given.pop("command")
    try:
        rows = COMMANDS[command][0](**given, skips=skips)
    except MISSHAPEN as error:
        raise UserError(f"{command}: a file holds {MALFORMED}, {error!r}: fetch it again") from error
    for reason, n in (+skips).most_common():
        print(f"{n:,} × {reason}", file=sys.stderr)
    if not rows:
        raise UserError(f"{command}: no record remains")
    for row in rows:
        print(row if command.startswith("score") else json.dumps(row))


if __name__ == "__main__":
    run_main(main)
