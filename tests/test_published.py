"""Published formats are converted as they are, and answers scored as the official programs do: small files of
exactly the published shape, with their traps; scores against values worked out by hand."""

import io
import json
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from conftest import fails_in_one_line, run

import published


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, content):
    """A file of a text, of a JSON value or of bytes → its path."""
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def converted(command, *flags):
    """A command that ends well → (its records, {reason: how often})."""
    result = run("published.py", command, *flags)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], counted(result)


def counted(result):
    """What a command printed about what it left out → {reason: how often}."""
    pairs = [line.split(" × ", 1) for line in result.stderr.splitlines()]
    return {reason: int(n.replace(",", "")) for n, reason in pairs}


def refused(message, command, *flags):
    result = run("published.py", command, *flags)
    assert fails_in_one_line(result) and message in result.stderr, result.stderr
    return True


# ---- COCO, VQA, VCR ----------------------------------------------------------------------------------------


def test_coco_captions_are_joined_with_their_pictures():
    images = [(9, "000000000009.jpg"), (8, "a.jpg"), (8, "b.jpg"), (6, None)]
    captions = [(9, "A cat\non a mat.\n"), (9, "A pet."), (7, "Lost."), (8, "Of which?"), (9, " "), (9, None),
                (6, "Without a name.")]
    path = write("captions.json", {
        "info": {}, "images": [{"id": key, "file_name": name, "height": 3} for key, name in images],
        "annotations": [{"image_id": key, "id": 1, "caption": text} for key, text in captions]})
    records, skips = converted("coco", path)
    texts = ("A cat on a mat.", "A pet.")
    assert records == [{"image": "000000000009.jpg", "caption": text, "id": 9} for text in texts]
    assert skips == {"a caption without its picture": 2, "id is given twice": 1, published.MALFORMED: 1,
                     "an empty or unreadable text": 1, "no picture, or a name that is no text": 1}
    karpathy = {"dataset": "coco", "images": [{"filename": "1.jpg", "sentences": [{"raw": "A cat."}]}]}
    assert refused("Karpathy", "coco", write("dataset_coco.json", karpathy))


def questions(*rows, split="train2014"):
    return {"data_subtype": split, "questions": [
        {"question_id": key, "image_id": image, "question": text} for key, image, text in rows]}


def annotation(key, image, answers, kind="other"):
    """Most people say the first of `answers` here, but the first in the list says the last."""
    return {"question_id": key, "image_id": image, "question_type": "what is", "answer_type": kind,
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i}
                        for i, answer in enumerate(answers[::-1])]}


def annotations(*rows, split="train2014"):
    return {"data_subtype": split, "annotations": list(rows)}


CAT = annotation(42000, 42, ["cat"] * 9 + ["dog"])
ASKED = questions((42000, 42, "What is it?"), (43000, 43, "Why?"))


def test_vqa_questions_are_joined_with_what_most_annotators_said():
    answers = annotations(CAT, annotation(1, 2, ["x"] * 10))
    records, skips = converted("vqa", write("q.json", ASKED), write("a.json", answers))
    assert records == [
        {"image": "COCO_train2014_000000000042.jpg", "question": "What is it?", "answer": "cat",
         "category": "other", "id": 42000},
        {"image": "COCO_train2014_000000000043.jpg", "question": "Why?", "id": 43000}]
    assert skips == {"an answer without its question": 1}


def test_questions_and_annotations_of_two_splits_are_refused():
    """The same id in another split is another question."""
    asked, answers = write("q.json", ASKED), write("a.json", annotations(CAT, split="val2014"))
    said = write_lines("answers.jsonl", [spoken(42000, "What is it?", "cat")])
    assert refused("of train2014", "vqa", asked, answers)
    assert refused("of train2014", "score-vqa", said, answers, asked)


def test_vqas_test_split_has_questions_without_answers():
    rows = questions((42000, 42, "What?"), (44000, 44, " "), (45000, "x", "Who?"), split="test-dev2015")
    records, skips = converted("vqa", write("q.json", rows))
    assert records == [{"image": "COCO_test2015_000000000042.jpg", "question": "What?", "id": 42000}]
    assert skips == {"an empty or unreadable text": 1, published.MALFORMED: 1}


@pytest.mark.parametrize("pair", ((42, 7), (7, 42)))
def test_an_answer_is_never_joined_to_a_question_whose_id_is_given_twice(pair):
    rows = questions((42000, pair[0], "?"), (42000, pair[1], "?"), (43000, 43, "Why?"))
    records, skips = converted("vqa", write("q.json", rows), write("a.json", annotations(CAT)))
    assert [record["id"] for record in records] == [43000]
    assert skips == {"question_id is given twice": 1, "an answer without its question": 1}


def test_an_answer_that_is_given_twice_or_is_of_another_picture_is_not_joined():
    asked = write("q.json", ASKED)
    twice = write("a.json", annotations(CAT, annotation(42000, 42, ["x"])))
    records, skips = converted("vqa", asked, twice)
    assert ["answer" in record for record in records] == [False, False]
    assert skips == {"question_id is given twice": 1}
    records, skips = converted("vqa", asked, write("a.json", annotations({**CAT, "image_id": 43})))
    assert [record["id"] for record in records] == [43000] and "different pictures" in list(skips)[0]


def vcr(**changes):
    return {"movie": "m", "objects": ["person", "person", "chair"], "img_fn": "lsmdc/a.jpg",
            "metadata_fn": "lsmdc/a.json",
            "question": ["Why", "is", [0], "pointing", "at", [1, 2], "?"],
            "answer_choices": [["No", "."], [[0], "is", "telling", [1], "that", "it", "'", "s", "late", "."],
                               ["A"], ["B"]],
            "answer_label": 1, "rationale_choices": [["C"], ["D"], [[1], "does", "n't", "know", "."], ["E"]],
            "rationale_label": 2, "annot_id": "val-0", "answer_orig": "1 is telling 2"} | changes


def test_vcr_counts_objects_from_zero_and_asks_for_answer_and_rationale():
    unlabelled = {key: value for key, value in vcr().items() if "label" not in key}
    path = write("val.jsonl", f"{json.dumps(vcr())}\n{json.dumps(unlabelled)}\n[1]\nnot json\n")
    (record,), skips = converted("vcr", path)
    answer, rationale = "person 1 is telling person 2 that it's late.", "person 2 does n't know."
    assert record["image"] == "lsmdc/a.jpg" and record["id"] == "val-0"
    question = "Why is person 1 pointing at person 2 and chair 3?"
    assert pairs(record) == [(question, answer), ("Why?", rationale)]
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
    assert record["choices"] == [["No.", answer, "A", "B"], ["C", "D", rationale, "E"]]
    assert skips == {"no label": 1, "a line that is not JSON": 1, published.MALFORMED: 1}


@pytest.mark.parametrize("change, reason", [
    ({"answer_label": -1}, "a label"),
    ({"rationale_label": 4}, "a label"),
    ({"question": ["Who", "is", [7], "?"]}, "names an object"),
    ({"question": ["Who", "is", [-1], "?"]}, "names an object"),
    ({"question": "Why?"}, "not a list of words"),
    ({"answer_choices": [["A"], "telling", ["B"], ["C"]]}, "not a list of words"),
    ({"question": []}, "empty"),
    ({"img_fn": 1.5}, "name that is no text"),
    ({"objects": 7}, "lacks a field"),
])
def test_vcr_takes_no_label_object_or_text_for_another(change, reason):
    records, skips = converted("vcr", write_lines("val.jsonl", [vcr(**change), vcr()]))
    assert len(records) == 1 and len(skips) == 1 and reason in list(skips)[0]


# ---- LMEye's own data --------------------------------------------------------------------------------------


def pairs(record):
    values = [turn["value"] for turn in record.get("conversations", ())]
    return list(zip(values[::2], values[1::2]))


def test_lmeyes_own_data_as_its_authors_published_it():
    """Questions are numbered in two ways, and some lists begin in mid-caption."""
    items = [
        {"image_id": "2.jpg", "caption": "A cat.", "questions": [
            "Question 1: What?", "Answer 1: A cat.", "1. Question: Where?", "1. Answer: Here: there."]},
        {"image_id": "3.PNG", "questions": [
            "sits on a mat.", "Question: Who?", "Answer: A cat", "Question: Why?"]},
        {"image_id": "4.jpg", "questions": [
            "Question: Lost?", "Question: Found?", "Answer: Yes", "Answer: No"]},
        {"image_id": 7, "caption": "A dog.", "questions": [], "category": "pets"},
        {"image_id": "6.jpg", "questions": ["What?"]},
        {"image_id": "9.jpg"}]
    path = write("release.json", items)
    records, skips = converted("release", path)
    assert [(record["image"], pairs(record)) for record in records] == [
        ("2.jpg", [("What?", "A cat."), ("Where?", "Here: there.")]),
        ("3.PNG", [("Who?", "A cat")]),
        ("4.jpg", [("Found?", "Yes")]),
        ("000000000007.jpg", [])]
    assert [record.get("caption") for record in records] == ["A cat.", None, None, "A dog."]
    assert records[3]["category"] == "pets"
    assert skips == {"a text that is not a question with its answer": 4,
                     "no question with its answer": 1, published.MALFORMED: 1}
    assert refused("broken JSON, or cut off", "release", write("cut.json", json.dumps(items)[:-9]))


def test_pictures_that_lmeyes_own_data_names_without_their_endings_are_looked_for():
    names = ("2.jpg", "sub/3.png", "4.JPEG")
    Path("pictures/sub").mkdir(parents=True)
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for name in names:
            archive.write(write(f"pictures/{name}", b"a picture"))
    path = write("release.json", [{"image_id": name, "caption": "A cat.", "questions": []}
                                  for name in ("2", "sub/3", "4", "5")])
    for place in ("pictures", "pictures.zip"):
        records, skips = converted("release", path, "--images", place)
        assert [record["image"] for record in records] == list(names)
        assert skips == {"no such picture in --images": 1}
    without = [record["image"] for record in converted("release", path)[0]]
    assert without == ["2.jpg", "sub/3.jpg", "4.jpg", "5.jpg"]


# ---- WebDataset --------------------------------------------------------------------------------------------


def write_tar(path, files, **options):
    """A tar of (name, content) pairs, of which content may be text."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpacked(*shards):
    """Shards → (records, {reason: how often}, the picture of each record)."""
    folder = Path(f"unpacked{len(list(Path().glob('unpacked*')))}")
    _, skips = converted("webdataset", *shards, "--out", folder)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert {path.name for path in folder.iterdir()} == {r["image"] for r in records} | {"data.jsonl"}
    return records, skips, [(folder / r["image"]).read_bytes() for r in records]


def test_shards_are_unpacked_each_text_with_its_own_picture():
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    one = write_tar("1.tar", [
        ("1.jpg", "red"), ("1.json", '{"caption": "no"}'), ("1.txt", "a red\none\n"),
        ("2.jpg", "x"), ("3.txt", "x")])
    two = write_tar("2.tar", [
        ("x/1.png", "blue"), ("x/1.json", '{"caption": "blue", "category": "color"}'),
        ("y/1.jpg", "green"), ("y/1.json", json.dumps({"image": "../../z.jpg", "conversations": chat})),
        ("../../up.2020.jpg", "up"), ("../../up.2020.txt", "\ufeffup"),
        ("5.jpg", "x"), ("5.json", "[]"),
        ("6.jpg", "x"), ("6.txt", b"f\xfcr"),
        ("7.jpg", "x"), ("7.txt", " "),
        ("8.cls", "1")])
    records, skips, pictures = unpacked(one, two)
    assert [record.get("caption") for record in records] == ["a red one", "blue", None, "up"]
    assert pictures == [b"red", b"blue", b"green", b"up"]
    assert [record["id"] for record in records] == ["1.jpg", "x/1.png", "y/1.jpg", "../../up.2020.jpg"]
    assert records[2]["conversations"] == chat and records[1]["category"] == "color"
    assert skips == {"a picture without its text, or a text without its picture, in a tar shard": 2,
                     "a .json in a tar shard that has neither a caption nor a conversation": 1,
                     "a text in a tar shard that is not UTF-8": 1, "an empty or unreadable text": 1,
                     "another file in a tar shard, where pictures, .txt and .json are read": 1}
    assert refused("exists already", "webdataset", one, "--out", "unpacked0")


def test_keys_of_a_shard_keep_their_case_whatever_the_order():
    files = [("a.jpg", b"red"), ("A.JPG", b"blue"), ("A.txt", b"blue"), ("a.TXT", b"red")]
    for rows in (files, files[::-1]):
        records, skips, pictures = unpacked(write_tar("a.tar", rows))
        assert sorted(pictures) == [b"blue", b"red"] and not skips
        assert [r["caption"].encode() for r in records] == pictures


def test_a_name_that_is_twice_a_link_and_a_large_or_sparse_file_are_counted_and_others_kept(monkeypatch):
    """Of a sparse file only what is not zero lies there, behind a map of it."""
    monkeypatch.setattr(published, "MAX_BYTES", 1000)
    shard = write_tar("a.tar", [
        ("1.jpg", "1"), ("1.txt", "one"), ("2.jpg", "2"), ("1.txt", "two"), ("2.txt", "x"),
        ("sub/1.jpg", "3"), ("sub/1.txt", "y"), ("4.jpg", bytes(1001))])
    with tarfile.open(shard, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    records, skips, pictures = unpacked(shard)
    assert [record["caption"] for record in records] == ["x", "y"] and pictures == [b"2", b"3"]
    assert skips == {"a name that is twice in a tar shard": 1,
                     "a link, a sparse or an oversized file in a tar shard": 4}


def test_a_broken_cut_joined_or_compressed_shard_is_refused_before_anything_is_written():
    """Each damage but the last two ends tarfile's reading without a word, before the last pair."""
    files = [("1.jpg", bytes(700)), ("1.txt", "one"), ("2.jpg", bytes(700)), ("2.txt", "two")]
    whole = Path(write_tar("a.tar", files)).read_bytes()
    with tarfile.open("a.tar") as tar:
        headers = [info.offset for info in tar]
    last = headers[3]
    cuts = [0, *headers[1:], headers[1] + 100, last + 512, last + 514, last + 1024]
    damaged = [whole[:cut] for cut in cuts]
    for at in headers:
        for place in (at, at + 124, at + 150):  # name, size, checksum
            damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    damaged += [whole + b"more" * 128, whole + whole, b"\x1f\x8b" + bytes(50), b"version https://git-lfs\n"]
    for content in damaged:
        write("b.tar", content)
        assert refused("b.tar: is ", "webdataset", "a.tar", "b.tar", "--out", "out")
        assert not os.path.exists("out")
    write("b.tar", whole[:last + 1024 + 512])  # all is there; GNU tar calls this complete, too
    assert len(unpacked("b.tar")[0]) == 2


def test_a_shard_with_a_header_for_all_files_is_whole():
    """As git archive writes it."""
    files, comment = [("é" * 80 + ".jpg", "1"), ("é" * 80 + ".txt", "one")], {"comment": "c" * 40}
    shard = write_tar("a.tar", files, format=tarfile.PAX_FORMAT, pax_headers=comment)
    assert [record["caption"] for record in unpacked(shard)[0]] == ["one"]


# ---- Files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, message", [
    (json.dumps(ASKED)[:-1], "cut off"),
    ("[" * 100_000, "cut off"),
    ([1], 'no list "questions"'),
    ({"questions": {"1": "what?"}}, 'no list "questions"'),
    (b"f\xfcr", "not UTF-8 text"),
    (questions(), "no record remains"),
])
def test_files_that_cannot_be_read_are_told_in_one_line(content, message):
    assert refused(message, "vqa", write("q.json", content))


def test_a_record_with_a_key_twice_is_left_out_and_counted():
    twice = json.dumps(ASKED).replace('"image_id": 42', '"image_id": 41, "image_id": 42')
    records, skips = converted("vqa", write("q.json", twice))
    assert [record["id"] for record in records] == [43000] and skips == {published.MALFORMED: 1}


def test_a_result_is_written_where_it_is_told_and_reasons_come_most_frequent_first():
    rows = [vcr(answer_label=9), vcr(img_fn=None), vcr(img_fn=None), vcr(img_fn="für\u2028.jpg")]
    result = run("published.py", "vcr", write_lines("val.jsonl", rows), "--out", "out.jsonl")
    assert not result.stdout
    assert list(counted(result).values()) == [2, 1]
    assert json.loads(Path("out.jsonl").read_text())["image"] == "für\u2028.jpg"


# ---- VQA's score -------------------------------------------------------------------------------------------


def spoken(key, question, answer, blind="", image="a.jpg"):
    """A line of answers.jsonl, as far as it is read here."""
    turns = [question] if question else []
    return {"id": key, "image": image, "turns": turns, "answer": answer, "blind": blind, "truth": None}


def scored(command, *files):
    """A command's table → ({row: (how many questions, score, blind score)}, {reason: how often})."""
    result = run("published.py", command, *files)
    assert result.returncode == 0, result.stderr
    rows = {}
    for line in result.stdout.splitlines()[1:]:
        score, _, blind, _, number = line[20:].replace("%", "").split()
        rows[line[:20].strip()] = (int(number), float(score), float(blind))
    return rows, counted(result)


@pytest.mark.parametrize("said, answers, expected", [
    ("cat", ["cat"] * 10, 1.0),
    ("cat", ["dog"] * 10, 0.0),
    # the one who said it has no match among the others; nine have one: 9 · 1/3
    ("cat", ["cat"] + ["dog"] * 9, 0.3),
    ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),  # 2 · 1/3 + 8 · 2/3
    ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),  # 3 · 2/3 + 7 · 1
    ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
    ("The Cat.", ["cat"] * 4 + ["dog"] * 6, 1.0),
    ("The Cat.", ["cat"] * 10, 0.0),  # the official scorer normalises only where the annotators differ
    (unicodedata.normalize("NFD", "café"), ["café"] * 10, 1.0),
    ("café", [unicodedata.normalize("NFD", "café")] * 5 + ["café"] * 5, 1.0),
    ("Café", [unicodedata.normalize("NFD", "café")] * 5 + ["café"] * 5, 0.0),  # these do not differ
])
def test_vqa_accuracy_compares_with_the_nine_others(said, answers, expected):
    assert published.vqa_accuracy(said, answers) == pytest.approx(expected)


@pytest.mark.parametrize("text, expected", [
    ("The Cat.", "cat"),
    ("none zero one two three four five six seven eight nine ten", "0 0 1 2 3 4 5 6 7 8 9 10"),
    ("an apple a day", "apple day"),
    ("yes!", "yes"),
    ("red-blue", "red blue"),
    ("red - blue", "red blue"),
    ("x-y)-z", "x y z"),
    ("1,000", "1000"),
    ("3.5 m.", "3.5 m"),
    ("Its shell", "its shell"),
    ("four oclock", "4 o'clock"),
    ("hed itd dont ive theyre im whats youll maam", "he'd it'd don't i've they're i'm what's you'll ma'am"),
])
def test_texts_are_normalised_as_the_official_scorer_does(text, expected):
    assert published.normalize_vqa(text) == expected


def test_every_question_of_vqas_file_counts_for_the_answer_and_for_blind():
    """Five questions: one is right, one right blind, one is half a match, two were not asked."""
    asked = questions(*((i, i, f"What {i}?") for i in range(1, 6)))
    rows = [annotation(i, i, ["red"] * 10, kind="other" if i < 4 else "number") for i in range(1, 6)]
    rows[2]["answers"] = [{"answer": text} for text in ["red"] * 2 + ["blue"] * 8]
    said = [spoken(1, "What 1?", "red", "no"), spoken(2, "What 2?", "no", "red"),
            spoken(3, "What 3?", "red", "no"), spoken(99, "Another data set?", "red")]
    files = write_lines("answers.jsonl", said), write("a.json", annotations(*rows))
    for more in ((), (write("q.json", asked),)):
        table, notes = scored("score-vqa", *files, *more)
        assert table == {"VQA": (5, 32.0, 20.0), "VQA, number": (2, 0, 0), "VQA, other": (3, 53.3, 33.3)}
        assert notes == {"a question that was not answered: it counts as wrong": 2,
                         "an answer to no question that counts": 1}


def test_annotations_given_twice_and_questions_without_any_are_none_that_were_missed():
    red = ["red"] * 10
    rows = [annotation(1, 1, red), CAT, CAT, annotation(7, 7, red), annotation(8, 8, ["alone"])]
    files = (write_lines("answers.jsonl", [spoken(1, "What?", "red", "red")]),
             write("a.json", annotations(*rows)))
    asked = questions((1, 1, "What?"), (2, 2, "Not annotated?"), (42000, 42, "?"), (8, 8, "?"))
    table, notes = scored("score-vqa", *files, write("q.json", asked))
    assert table["VQA"] == (1, 100, 100)
    assert notes == {"question_id is given twice": 1, "an answer without its question": 1,
                     "a question without the answers of several people": 1,
                     "a question that was not answered: it counts as wrong": 1}
    assert scored("score-vqa", *files)[0]["VQA"] == (2, 50, 50)  # without the questions 7 counts, too
    asked = questions((1, 1, "What?"), (7, 2, "What?"), (7, 3, "Where?"))  # of which none was asked
    assert scored("score-vqa", *files, write("q.json", asked))[0]["VQA"] == (2, 50, 50)


@pytest.mark.parametrize("rows, message", [
    ([{"turns": ["Who?"]}], "another question"),
    ([{}, {}], "twice"),
    ([{"turns": None}], "line 1"),
    ([{"blind": None}], "line 1"),
    ([{"id": [1]}], "line 1"),
])
def test_answers_to_other_questions_or_in_another_shape_are_refused(rows, message):
    said = [spoken(42000, "What is it?", "cat") | row for row in rows]
    files = write("a.json", annotations(CAT)), write("q.json", ASKED)
    assert refused(message, "score-vqa", write_lines("answers.jsonl", said), *files)


def test_what_cannot_be_scored_is_refused():
    said, answers = write_lines("answers.jsonl", [spoken(1, "?", "x")]), write("a.json", annotations())
    assert refused("no answer could be scored", "score-vqa", said, answers)
    write("a.json", annotations({"question_id": 1, "answers": [{}]}))
    assert refused("lacks a field", "score-vqa", said, answers)
    write(said, json.dumps(spoken(1, "?", "x")) + "\n{")
    assert refused("line 2", "score-vqa", said, answers)


# ---- VCR's score -------------------------------------------------------------------------------------------


def chosen(key, image, turns, logps, tokens=(1, 1, 1, 1), blind=None):
    """A line of answers.jsonl about the choices a, b, … whose log p are `logps`. The truth is a."""
    columns = zip("abcd", logps, tokens, blind or logps)
    choices = [dict(zip(("text", "logp", "tokens", "blind_logp"), column)) for column in columns]
    return spoken(key, "?", "a", "a", image) | {"turns": turns, "truth": "a", "choices": choices}


RIGHT, WRONG = (-1, -2, -3, -4), (-2, -1, -3, -4)


def test_vcr_is_ranked_by_the_sum_and_by_the_mean_of_a_choices_tokens():
    """Of a choice of two tokens with log p -3 and one of one token with -2 the second is likelier by the sum,
    the first by the mean."""
    rows = [chosen("1", "1.jpg", ["?"], (-3, -2, -9, -9), (2, 1, 1, 1), blind=(-2, -3, -9, -9)),
            chosen("1", "1.jpg", ["?", "a", "Why?"], RIGHT)]
    table, notes = scored("score-vcr", write_lines("answers.jsonl", rows))
    for how, right in (("", (1, 0, 100)), (", per token", (1, 100, 100))):
        assert table["Q→A" + how] == table["Q→AR" + how] == right and not notes


def test_answer_and_rationale_of_one_question_have_to_be_right_together():
    """Several questions about one picture, two with one id and picture, two with one id and question; of the
    last the answer was left out."""
    rows = []
    for key, image, question, answer, rationale in (
        ("1", "one.jpg", "Who?", RIGHT, RIGHT),
        ("2", "one.jpg", "Where?", WRONG, RIGHT),
        ("3", "one.jpg", "When?", RIGHT, RIGHT),
        ("3", "one.jpg", "How?", WRONG, RIGHT),
        ("1", "two.jpg", "Who?", WRONG, RIGHT),
        ("3", "two.jpg", "When?", RIGHT, WRONG),
        ("4", "one.jpg", "Why?", None, RIGHT),
    ):
        rows.append(chosen(key, image, [question, "x", "Why?"], rationale, blind=RIGHT))
        if answer:
            rows.append(chosen(key, image, [question], answer, blind=WRONG))
    rows += [chosen("5", "a.jpg", ["?"], RIGHT) | {"truth": "z"}, spoken("6", "Without choices?", "a")]
    table, notes = scored("score-vcr", write_lines("answers.jsonl", rows))
    for how in ("", ", per token"):
        assert table["Q→A" + how] == (6, 50, 0)
        assert table["QA→R" + how] == (7, 85.7, 100)
        assert table["Q→AR" + how] == (7, 28.6, 0)
    assert notes == {"an answer whose truth is none of its choices": 1}
    odd = [{**rows[0], "choices": [{}]}]
    assert refused("lacks a field", "score-vcr", write_lines("b.jsonl", odd))
    assert refused("no answer could be scored", "score-vcr", write_lines("b.jsonl", rows[-1:]))


# ---- Intervals and results files ---------------------------------------------------------------------------


@pytest.mark.parametrize("pictures, seen, blind", [
    (10, "(72.2–100.0)", "(0.0–27.8)"),
    (9, "(–)", "(–)"),
])
def test_intervals_are_those_of_an_evaluations_own_table(pictures, seen, blind):
    """Wilson's, by pictures, of ten at least."""
    rows = [chosen(str(i), f"{i}.jpg", ["?"], RIGHT, blind=WRONG) for i in range(pictures)] * 2
    out = run("published.py", "score-vcr", write_lines("answers.jsonl", rows)).stdout
    assert f"100.0% {seen}" in out and f"0.0% {blind}" in out


def test_vqas_results_file_has_every_question_once():
    asked = write("q.json", questions((1, 1, "a?"), (2, 2, "b?"), (2, 3, "c?"), (3, 3, "d?")))
    said = write_lines("answers.jsonl", [spoken(3, "d?", "für", "blind"), spoken(1, "a?", "yes", "blind")])
    (results,), notes = converted("results-vqa", said, asked)
    assert [(row["question_id"], row["answer"]) for row in results] == [(1, "yes"), (2, ""), (3, "für")]
    assert notes == {"a question that was not answered": 2}


def test_cocos_results_file_has_every_picture_and_one_of_two_ids_as_well():
    images = [(1, "a.jpg"), (2, "b.jpg"), (3, "a.jpg"), (2, "b.jpg")]
    captions = {"annotations": [], "images": [{"id": key, "file_name": name} for key, name in images]}
    said = [spoken("a.jpg", None, "A cat.", "blind")] * 5 + [spoken("b.jpg", "What?", "no", image="b.jpg")]
    files = write_lines("answers.jsonl", said), write("c.json", captions)
    (results,), notes = converted("results-coco", *files)
    assert [(row["image_id"], row["caption"]) for row in results] == [(1, "A cat."), (2, ""), (3, "A cat.")]
    assert notes == {"a picture without a caption": 2}
