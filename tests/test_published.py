"""Published formats are converted as they are, and answers scored as the official programs do: small files of
exactly the published shape, with their traps; scores against values worked out by hand."""

import io
import json
import os
import tarfile
import unicodedata

import pytest
from conftest import fails_in_one_line, run
from PIL import Image

import published


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def write_lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def converted(command, *flags, cwd="."):
    """A command that ends well → (its records, {reason: how often})."""
    result = run("published.py", command, *flags, cwd=cwd)
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


def test_coco_captions_are_joined_with_their_pictures(tmp_path):
    path = write(tmp_path / "captions.json", {
        "info": {}, "images": [{"id": 9, "file_name": "000000000009.jpg", "height": 3},
                               {"id": 8, "file_name": "a.jpg"},
                               {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 9, "id": 1, "caption": "A cat\non a mat.\n"},
                        {"image_id": 9, "id": 2, "caption": "A pet."},
                        {"image_id": 7, "id": 3, "caption": "Lost."},
                        {"image_id": 8, "id": 4, "caption": "Of which?"},
                        {"image_id": 9, "caption": " "}, {"image_id": 9}]})
    records, skips = converted("coco", path)
    assert records == [{"image": "000000000009.jpg", "caption": text, "id": 9}
                       for text in ("A cat\non a mat.\n", "A pet.")]
    assert skips == {"a caption without its picture": 2, "id is given twice": 1,
                     "an empty or unreadable text": 1,
                     published.MALFORMED: 1}
    karpathy = {"dataset": "coco", "images": [{"filename": "1.jpg", "sentences": [{"raw": "A cat."}]}]}
    assert refused('no list "annotations"', "coco", write(tmp_path / "dataset_coco.json", karpathy))


@pytest.mark.parametrize("name, reason", [
    (None, "no picture"), ("", "no picture"), (1.5, "no text"), (7, "no text"), (["1.jpg"], "no text"),
    ("\ud800", "no text")])
def test_a_picture_name_of_another_kind_has_its_reason(tmp_path, name, reason):
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": name}],
            "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}]}
    records, skips = converted("coco", write(tmp_path / "coco.json", coco))
    assert len(records) == 1 and len(skips) == 1 and reason in list(skips)[0]


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


def test_vqa_questions_are_joined_with_what_most_annotators_said(tmp_path):
    files = write(tmp_path / "q.json", ASKED), write(tmp_path / "a.json",
                                                     annotations(CAT, annotation(1, 2, ["x"] * 10)))
    records, skips = converted("vqa", *files)
    assert records == [{"image": "COCO_train2014_000000000042.jpg", "question": "What is it?",
                        "answer": "cat",
                        "category": "other", "id": 42000},
                       {"image": "COCO_train2014_000000000043.jpg", "question": "Why?", "id": 43000}]
    assert skips == {"an answer without its question": 1}


def test_vqas_test_split_has_questions_without_answers(tmp_path):
    rows = questions((42000, 42, "What?"), (44000, 44, " "), (45000, "x", "Who?"), split="test-dev2015")
    records, skips = converted("vqa", write(tmp_path / "q.json", rows))
    assert records == [{"image": "COCO_test2015_000000000042.jpg", "question": "What?", "id": 42000}]
    assert skips == {"an empty or unreadable text": 1, published.MALFORMED: 1}


def test_an_answer_is_never_joined_to_a_question_whose_id_is_given_twice(tmp_path):
    answers = write(tmp_path / "a.json", annotations(CAT))
    for pair in ((42, 7), (7, 42)):
        rows = questions(*((42000, image, "?") for image in pair), (43000, 43, "Why?"))
        records, skips = converted("vqa", write(tmp_path / "q.json", rows), answers)
        assert [record["id"] for record in records] == [43000]
        assert skips == {"question_id is given twice": 1, "an answer without its question": 1}
    asked = write(tmp_path / "q.json", ASKED)
    records, skips = converted("vqa", asked,
                               write(tmp_path / "a.json", annotations(CAT, annotation(42000, 42, ["x"]))))
    assert not any("answer" in record for record in records) and skips == {"question_id is given twice": 1}
    records, skips = converted("vqa", asked, write(tmp_path / "a.json", annotations({**CAT, "image_id": 43})))
    assert [r["id"] for r in records] == [43000] and "different pictures" in list(skips)[0]


def vcr(**changes):
    return {"movie": "m", "objects": ["person", "person", "chair"], "img_fn": "lsmdc/a.jpg",
            "metadata_fn": "lsmdc/a.json",
            "question": ["Why", "is", [0], "pointing", "at", [1, 2], "?"],
            "answer_choices": [["No", "."], [[0], "is", "telling", [1], "that", "it", "'", "s", "late", "."],
                               ["A"], ["B"]],
            "answer_label": 1, "rationale_choices": [["C"], ["D"], [[1], "does", "n't", "know", "."], ["E"]],
            "rationale_label": 2, "annot_id": "val-0", "answer_orig": "1 is telling 2"} | changes


def test_vcr_counts_objects_from_zero_and_asks_for_answer_and_rationale(tmp_path):
    lines = [vcr(), {k: v for k, v in vcr().items() if "label" not in k},
             vcr(question=["Who", "is", [7], "?"]), [1]]
    path = write(tmp_path / "val.jsonl", "\n".join(map(json.dumps, lines)) + "\nnot json\n")
    records, skips = converted("vcr", path)
    question = "Why is person 1 pointing at person 2 and chair 3?"
    answer = "person 1 is telling person 2 that it's late."
    turns = [("human", question), ("gpt", answer), ("human", "Why?"), ("gpt", "person 2 does n't know.")]
    assert records == [{
        "image": "lsmdc/a.jpg", "id": "val-0",
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "choices": [["No.", answer, "A", "B"], ["C", "D", "person 2 does n't know.", "E"]]}]
    assert skips == {"no label": 1, "a text that names an object which is not in the picture": 1,
                     "a line that is not JSON (as with not json)": 1, published.MALFORMED: 1}


@pytest.mark.parametrize("change, reason", [
    ({"answer_label": -1}, "a label"), ({"rationale_label": 4}, "a label"),
    ({"answer_label": "1"}, "a label"),
    ({"question": ["Who", "is", [-1], "?"]}, "names an object"),
    ({"question": "Why?"}, "not a list of words"),
    ({"answer_choices": [["A"], "telling", ["B"], ["C"]]}, "not a list of words"),
    ({"question": [["x"]]}, "names an object"), ({"img_fn": None}, "no picture"),
    ({"img_fn": 1.5}, "name that is no text"),
    ({"question": []}, "empty"), ({"objects": 7}, "lacks a field")])
def test_vcr_takes_no_label_object_or_text_for_another(tmp_path, change, reason):
    records, skips = converted("vcr", write_lines(tmp_path / "val.jsonl", [vcr(**change), vcr()]))
    assert len(records) == 1 and len(skips) == 1 and reason in list(skips)[0]


# ---- LMEye's own data --------------------------------------------------------------------------------------


def pairs(record):
    values = [turn["value"] for turn in record.get("conversations", ())]
    return list(zip(values[::2], values[1::2]))


def test_lmeyes_own_data_as_its_authors_published_it(tmp_path):
    """Pictures are named without their endings, questions are numbered in two ways, some lists begin in
    mid-caption."""
    path = write(tmp_path / "release.json", [
        {"image_id": "2", "caption": "A cat.", "questions": ["Question 1: What?", "Answer 1: A cat.",
                                                             "1. Question: Where?",
                                                             "1. Answer: Here: there."]},
        {"image_id": "sub/3", "questions": ["sits on a mat.", "Question: Who?", "Answer: A cat",
                                            "Question: Why?"]},
        {"image_id": "4", "questions": ["Question: Lost?", "Question: Found?", "Answer: Yes", "Answer: No"]},
        {"image_id": "5", "questions": ["Question: What?", "Answer: That"]},
        {"image_id": "6", "questions": ["Question: What?", "This is an answer", "Answer: To another"]},
        {"image_id": 7, "caption": "A dog.", "questions": [], "category": "pets"},
        {"image_id": "8.PNG", "questions": ["Question: What?", "Answer: That"]}, {"image_id": "9"}])
    records, skips = converted("release", path)
    assert [(r["image"], pairs(r)) for r in records] == [
        ("2.jpg", [("What?", "A cat."), ("Where?", "Here: there.")]), ("sub/3.jpg", [("Who?", "A cat")]),
        ("4.jpg", [("Found?", "Yes")]), ("5.jpg", [("What?", "That")]), ("000000000007.jpg", []),
        ("8.PNG", [("What?", "That")])]
    assert skips == {"a text that is not a question with its answer": 4,
                     "no question with its answer": 1, published.MALFORMED: 1}
    assert [r.get("caption") for r in records] == ["A cat.", None, None, None, "A dog.", None]
    assert [r.get("category") for r in records] == [None, None, None, None, "pets", None]
    assert refused("broken JSON, or cut off", "release", write(tmp_path / "cut.json", path.read_text()[:-9]))


# ---- WebDataset --------------------------------------------------------------------------------------------


def jpeg(color="red"):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path, files, **options):
    """A tar of (name, content) pairs."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpacked(tmp_path, *shards):
    """Shards → (records, {reason: how often}, the picture of each record)."""
    folder = tmp_path / f"unpacked{len(list(tmp_path.glob('unpacked*')))}"
    records, skips = converted("webdataset", *shards, "--out", folder)
    assert {path.name for path in folder.iterdir()} == {r["image"] for r in records}
    return records, skips, [(folder / r["image"]).read_bytes() for r in records]


def test_shards_are_unpacked_each_text_with_its_own_picture(tmp_path):
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    one = write_tar(tmp_path / "1.tar", [("1.jpg", jpeg("red")), ("1.json", b'{"caption": "no"}'),
                                         ("1.txt", b"a red\none\n"), ("2.jpg", jpeg()), ("3.txt", b"x")])
    two = write_tar(tmp_path / "2.tar", [
        ("x/1.png", b"blue"), ("x/1.json", json.dumps({"caption": "blue", "category": "color"}).encode()),
        ("y/1.jpg", b"green"), ("y/1.json",
                                json.dumps({"image": "../../z.jpg", "conversations": chat}).encode()),
        ("../../up.2020.jpg", b"up"), ("../../up.2020.txt", "\ufeffup".encode()), ("5.jpg", b"x"),
        ("5.json", b"[]"),
        ("6.jpg", b"x"), ("6.txt", "für".encode("latin-1")), ("7.jpg", b"x"), ("7.txt", b" "),
        ("8.cls", b"1")])
    records, skips, pictures = unpacked(tmp_path, one, two)
    assert [r.get("caption") for r in records] == ["a red\none\n", "blue", None, "up"]
    assert pictures == [jpeg("red"), b"blue", b"green", b"up"]
    assert [r["id"] for r in records] == ["1.jpg", "x/1.png", "y/1.jpg", "../../up.2020.jpg"]
    assert records[2]["conversations"] == chat and records[1]["category"] == "color"
    assert skips == {"a picture without its text, or a text without its picture, in a tar shard": 2,
                     published.MALFORMED: 1, "a text that is not UTF-8": 1, "an empty or unreadable text": 1,
                     "another file in a tar shard, where pictures, .txt and .json are read": 1}
    assert refused("exists already", "webdataset", one, "--out", tmp_path / "unpacked0")


def test_keys_of_a_shard_keep_their_case_whatever_the_order(tmp_path):
    files = [("a.jpg", b"red"), ("A.JPG", b"blue"), ("A.txt", b"blue"), ("a.TXT", b"red")]
    for rows in (files, files[::-1]):
        records, skips, pictures = unpacked(tmp_path, write_tar(tmp_path / "a.tar", rows))
        assert sorted(pictures) == [b"blue", b"red"] and not skips
        assert [r["caption"].encode() for r in records] == pictures


def test_a_name_that_is_twice_a_link_and_a_large_file_are_counted_and_others_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "MAX_BYTES", 1000)
    shard = write_tar(tmp_path / "a.tar", [("1.jpg", b"1"), ("1.txt", b"one"), ("2.jpg", b"2"),
                                           ("1.txt", b"two"), ("2.txt", b"x"),
                                           ("sub/1.jpg", b"3"), ("sub/1.txt", b"y"), ("4.jpg", bytes(1001))])
    with tarfile.open(shard, "a") as tar:
        for name, kind in (("5.jpg", tarfile.SYMTYPE), ("6.jpg", tarfile.LNKTYPE), ("7", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    records, skips, pictures = unpacked(tmp_path, shard)
    assert [r["caption"] for r in records] == ["x", "y"] and pictures == [b"2", b"3"]
    assert skips == {"a name that is twice in a tar shard": 1,
                     "a link or an oversized file in a tar shard": 3}


def test_a_broken_cut_joined_or_compressed_shard_is_refused_before_anything_is_written(tmp_path):
    """Each damage but the last two ends tarfile's reading without a word, before the last pair."""
    files = [("1.jpg", jpeg()), ("1.txt", b"one"), ("2.jpg", jpeg()), ("2.txt", b"two")]
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        headers = [info.offset for info in tar]
    damaged = [whole[:cut] for cut in (*headers[1:], headers[1] + 100, headers[3] + 512, headers[3] + 514,
                                       headers[3] + 1024, 0)]
    for at in headers:
        for place in (at, at + 124, at + 150):  # name, size, checksum
            damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    damaged += [whole + b"more" * 128, whole + whole, b"\x1f\x8b" + bytes(50), b"version https://git-lfs\n"]
    for content in damaged:
        (tmp_path / "b.tar").write_bytes(content)
        assert refused("b.tar: is ", "webdataset", tmp_path / "a.tar", tmp_path / "b.tar", "--out",
                       tmp_path / "out")
        assert not (tmp_path / "out").exists()
    # All is there; GNU tar calls this complete, too.
    (tmp_path / "b.tar").write_bytes(whole[:headers[3] + 1024 + 512])
    assert len(unpacked(tmp_path, tmp_path / "b.tar")[0]) == 2


def test_a_shard_with_a_header_for_all_files_is_whole(tmp_path):
    """As git archive writes it."""
    shard = write_tar(tmp_path / "a.tar", [("é" * 80 + ".jpg", b"1"), ("é" * 80 + ".txt", b"one")],
                      format=tarfile.PAX_FORMAT, pax_headers={"comment": "c" * 40})
    assert [r["caption"] for r in unpacked(tmp_path, shard)[0]] == ["one"]


# ---- Files -------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_told_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # not waited for
    contents = {"cut.json": json.dumps(ASKED)[:-1].encode(), "latin.json": b'{"questions": "f\xfcr"}',
                "list.json": b"[1]",
                "pointer.json": b"version https://git-lfs.github.com/spec/v1\n", "deep.json": b"[" * 100_000,
                "odd.json": b'{"questions": {"1": "what?"}}'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, message in (("cut.json", "cut off"), ("latin.json", "not UTF-8 text at byte 16"),
                          ("list.json", "no list"),
                          ("pointer.json", "git-lfs pointer"), ("deep.json", "cut off"),
                          ("odd.json", 'no list "questions"'),
                          ("pipe", "no such file"), ("none.json", "no such file")):
        assert refused(message, "vqa", tmp_path / name)
    assert refused("no record remains", "vqa", write(tmp_path / "q.json", questions()))
    marked = (tmp_path / "q.json")
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(ASKED).encode())  # with a byte order mark
    assert len(converted("vqa", marked)[0]) == 2


def test_a_record_with_a_key_twice_is_left_out_and_counted(tmp_path):
    path = write(tmp_path / "q.json",
                 json.dumps(ASKED).replace('"image_id": 42', '"image_id": 41, "image_id": 42'))
    records, skips = converted("vqa", path)
    assert [record["id"] for record in records] == [43000] and skips == {published.MALFORMED: 1}


def test_reasons_come_most_frequent_first(tmp_path):
    rows = [vcr(answer_label=9), vcr(img_fn=None), vcr(img_fn=None), vcr(img_fn="für\u2028.jpg")]
    result = run("published.py", "vcr", write_lines(tmp_path / "val.jsonl", rows))
    assert result.stderr == (
        "2 × no picture, or a name that is no text\n1 × a label that is none of the choices\n")
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == ["für\u2028.jpg"]


# ---- VQA's score -------------------------------------------------------------------------------------------


def spoken(key, question, answer, blind="", image="a.jpg"):
    """A line of answers.jsonl."""
    turns = [question] if question else []
    return {"id": key, "image": image, "question": question, "turns": turns, "answer": answer, "blind": blind,
            "truth": None, "category": "all", "right": None, "blind_right": None}


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
    ("no\nparking ", ["no parking"] * 10, 1.0),
    ("Cat", ["cat"] * 9 + ["cat\t"], 0.0),  # which do not differ
    (unicodedata.normalize("NFD", "café"), ["café"] * 10, 1.0),
    ("café", [unicodedata.normalize("NFD", "café")] * 5 + ["café"] * 5, 1.0),
    ("Café", [unicodedata.normalize("NFD", "café")] * 5 + ["café"] * 5, 0.0),  # these do not differ
])
def test_vqa_accuracy_compares_with_the_nine_others(said, answers, expected):
    assert published.vqa_accuracy(said, answers) == pytest.approx(expected)


@pytest.mark.parametrize("text, expected", [
    ("The Cat.", "cat"), ("none zero one two three four five six seven eight nine ten",
                          "0 0 1 2 3 4 5 6 7 8 9 10"),
    ("an apple a day", "apple day"), ("Its red", "its red"), ("yes!", "yes"), ("red-blue", "red blue"),
    ("red - blue", "red blue"), ("x-y)-z", "x y z"), ("1,000", "1000"), ("3.5 m.", "3.5 m"),
    ("shell", "shell"),
    ("four oclock", "4 o'clock"), ("hed itd dont ive mustve theyre im whats youll maam somebodys somethings",
                                   "he'd it'd don't ive must've they're im what's you'll ma'am somebody's somethings")])
def test_texts_are_normalised_as_the_official_scorer_does(text, expected):
    assert published.normalize_vqa(text) == expected


def test_every_question_of_vqas_file_counts_for_the_answer_and_for_blind(tmp_path):
    """Five questions: one is right, one right blind, one is half a match, two were not asked."""
    rows = [annotation(i, i, ["red"] * 10, kind="other" if i < 4 else "number") for i in range(1, 6)]
    rows[2]["answers"][:] = [{"answer": text} for text in ["red"] * 2 + ["blue"] * 8]
    said = [spoken(1, "What 1?", "red", "no"), spoken(2, "What 2?", "no", "red"),
            spoken(3, "What 3?", "red", "red"),
            spoken(99, "Another data set?", "red")]
    files = (write_lines(tmp_path / "answers.jsonl", said), write(tmp_path / "a.json", annotations(*rows)))
    table, notes = scored("score-vqa", *files)
    assert table == {"VQA": (5, 32.0, 32.0), "VQA, number": (2, 0, 0), "VQA, other": (3, 53.3, 53.3)}
    assert notes == {"a question that was not answered: it counts as wrong": 2,
                     "an answer to no question that counts": 1}
    said[1]["blind"] = "no"
    table, _ = scored("score-vqa", write_lines(tmp_path / "answers.jsonl", said), files[1])
    assert table["VQA"] == (5, 32.0, 12.0)


def test_annotations_given_twice_or_of_one_person_do_not_count(tmp_path):
    rows = [annotation(1, 1, ["red"] * 10), CAT, CAT, annotation(7, 7, ["red"] * 10),
            annotation(8, 8, ["alone"])]
    said = write_lines(tmp_path / "answers.jsonl", [spoken(1, "What?", "red", "red")])
    table, notes = scored("score-vqa", said, write(tmp_path / "a.json", annotations(*rows)))
    assert table["VQA"] == (2, 50, 50)
    assert notes["question_id is given twice"] == 1
    assert notes["a question without the answers of several people"] == 1


def test_answers_given_twice_or_in_another_shape_are_refused(tmp_path):
    annotated = write(tmp_path / "a.json", annotations(CAT))
    for rows, message in (([spoken(42000, "What is it?", "cat")] * 2, "twice"),
                          ([{"image": "a.jpg", "answer": "cat"}], "line 1"), ([3], "line 1"),
                          ([{**spoken(42000, "?", "x"), "blind": None}], "lacks a field")):
        assert refused(message, "score-vqa", write_lines(tmp_path / "answers.jsonl", rows), annotated)
    assert refused("line 2", "score-vqa",
                   write(tmp_path / "answers.jsonl", json.dumps(spoken(1, "?", "x")) + "\n{"), annotated)
    said = write_lines(tmp_path / "answers.jsonl", [spoken(42000, "What is it?", "cat")])
    assert refused("lacks a field", "score-vqa", said,
                   write(tmp_path / "a.json", annotations({"question_id": 42000, "answers": [{}]})))
    assert refused("no answer could be scored", "score-vqa", said, write(tmp_path / "a.json", annotations()))


# ---- VCR's score -------------------------------------------------------------------------------------------


def chosen(key, image, turns, logps, tokens, blind=None, truth="a"):
    """A line of answers.jsonl about the choices a, b, … whose log p are `logps`."""
    choices = [{"text": "abcd"[i], "logp": logp, "tokens": n, "blind_logp": b}
               for i, (logp, n, b) in enumerate(zip(logps, tokens, blind or logps))]
    return spoken(key, turns[-1], "a", "a", image) | {"turns": turns, "truth": truth, "choices": choices}


RIGHT, WRONG = (-1, -2, -3, -4), (-2, -1, -3, -4)


def test_vcr_is_ranked_by_the_sum_and_by_the_mean_of_a_choices_tokens(tmp_path):
    """Of a choice of two tokens with log p -3 and one of one token with -2 the second is likelier by the sum,
    the first by the mean."""
    rows = [chosen("1", "1.jpg", ["?"], (-3, -2, -9, -9), (2, 1, 1, 1), blind=(-2, -3, -9, -9))]
    rows.append(chosen("1", "1.jpg", ["?", "a", "Why?"], RIGHT, (1, 1, 1, 1)))
    table, notes = scored("score-vcr", write_lines(tmp_path / "answers.jsonl", rows))
    for how, right in (("", (1, 0, 100)), (", per token", (1, 100, 100))):
        assert table["Q→A" + how] == table["Q→AR" + how] == right and not notes


def test_answer_and_rationale_of_one_question_have_to_be_right_together(tmp_path):
    """Several questions about one picture, two with one id and picture, two with one id and question; of the
    last the answer was left out."""
    ones = (1, 1, 1, 1)
    rows = []
    for key, image, question, answer, rationale in (
            ("1", "one.jpg", "Who?", RIGHT, RIGHT), ("2", "one.jpg", "Where?", WRONG, RIGHT),
            ("3", "one.jpg", "When?", RIGHT, RIGHT), ("3", "one.jpg", "How?", WRONG, RIGHT),
            ("1", "two.jpg", "Who?", WRONG, RIGHT), ("3", "two.jpg", "When?", RIGHT, WRONG),
            ("4", "one.jpg", "Why?", None, RIGHT)):
        rows.append(chosen(key, image, [question, "x", "Why?"], rationale, ones, blind=RIGHT))
        if answer:
            rows.append(chosen(key, image, [question], answer, ones, blind=WRONG))
    rows += [chosen("5", "a.jpg", ["?"], RIGHT, ones, truth="z"), spoken("6", "Without choices?", "a")]
    table, notes = scored("score-vcr", write_lines(tmp_path / "answers.jsonl", rows))
    for how in ("", ", per token"):
        assert table["Q→A" + how] == (6, 50, 0) and table["QA→R" + how] == (7, 85.7, 100)
        assert table["Q→AR" + how] == (7, 28.6, 0)
    assert notes == {"an answer whose truth is none of its choices": 1}
    assert refused("lacks a field", "score-vcr",
                   write_lines(tmp_path / "b.jsonl", [{**rows[0], "choices": [{}]}]))
    assert refused("no answer could be scored", "score-vcr", write_lines(tmp_path / "b.jsonl", rows[-1:]))


# ---- Intervals and results files ---------------------------------------------------------------------------


def test_intervals_are_those_of_an_evaluations_own_table(tmp_path):
    """Wilson's, by pictures: twenty answers about ten, all right and all wrong when blind."""
    rows = [chosen(str(i), f"{i % 10}.jpg", ["?"], RIGHT, (1, 1, 1, 1), blind=WRONG) for i in range(20)]
    out = run("published.py", "score-vcr", write_lines(tmp_path / "answers.jsonl", rows)).stdout
    assert "100.0% (72.2–100.0)" in out and "0.0% (0.0–27.8)" in out


def test_of_fewer_than_ten_pictures_no_interval_is_printed(tmp_path):
    for pictures in (9, 10):
        rows = [chosen(str(i), f"{i % pictures}.jpg", ["?"], (RIGHT, WRONG)[i % 2], (1, 1, 1, 1))
                for i in range(40)]
        result = run("published.py", "score-vcr", write_lines(tmp_path / "answers.jsonl", rows))
        assert ("50.0% (–)" in result.stdout) == (pictures < 10)


def test_vqas_results_file_has_every_question_once(tmp_path):
    asked = write(tmp_path / "q.json", questions((1, 1, "a?"), (2, 2, "b?"), (2, 3, "c?"), (3, 3, "d?")))
    said = write_lines(tmp_path / "answers.jsonl",
                       [spoken(3, "d?", "für", "blind"), spoken(1, "a?", "yes", "blind")])
    (results,), notes = converted("results-vqa", said, asked)
    assert results == [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": ""},
                       {"question_id": 3, "answer": "für"}]
    assert notes == {"a question that was not answered": 2}


def test_cocos_results_file_has_every_picture_and_one_of_two_ids_as_well(tmp_path):
    captions = write(tmp_path / "c.json", {"annotations": [], "images": [
        {"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"},
        {"id": 2, "file_name": "b.jpg"}]})  # the same row again
    rows = [spoken("a.jpg", None, "A cat.", "blind")] * 5 + [spoken("b.jpg", "What?", "an answer",
                                                                    image="b.jpg")]
    (results,), notes = converted("results-coco", write_lines(tmp_path / "answers.jsonl", rows), captions)
    assert results == [{"image_id": 1, "caption": "A cat."}, {"image_id": 2, "caption": ""},
                       {"image_id": 3, "caption": "A cat."}]
    assert notes == {"a picture without a caption": 2}
