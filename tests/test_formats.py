"""Every published format is read as it is: small files of exactly the published shape, with their traps."""

import io
import json
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from conftest import fails_in_one_line, run, save_clip, save_opt, tiny_model
from PIL import Image

import data
from data import Member, Record, Skip, read_records
from lmeye import UserError


def reasons(skips):
    return dict(Counter(skip.reason for skip in skips))


def jpeg(color="red"):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(stream, "JPEG")
    return stream.getvalue()


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, jpeg())
    return path


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_coco_captions_are_joined_with_their_pictures(tmp_path):
    path = write(tmp_path / "captions.json", {
        "info": {}, "licenses": [], "images": [{"id": 9, "file_name": "000000000009.jpg", "height": 3}],
        "annotations": [{"image_id": 9, "id": 1, "caption": "A cat.\n"}, {"image_id": 9, "id": 2, "caption": "A pet."},
                        {"image_id": 7, "id": 3, "caption": "Lost."}]})
    records, skips = read_records([path], [tmp_path], 1)
    assert records == [Record(f"{tmp_path}/000000000009.jpg", (), text, key=9) for text in ("A cat.", "A pet.")]
    assert reasons(skips) == {"a caption without its picture": 1}


@pytest.mark.parametrize("broken", (lambda text: text[:-1], lambda text: text.replace('"image"', "image", 1),
                                    lambda text: text[:-1] + ",]"))
def test_a_list_that_is_cut_off_or_has_a_slip_is_not_read_as_json_lines(tmp_path, broken):
    """One record a line: the last has no comma behind it, and would be all that is read."""
    rows = [json.dumps({"image": f"{i}.jpg", "caption": "A cat."}) for i in range(5)]
    text = "[\n" + ",\n".join(rows) + "\n]"
    assert len(read_records([write(tmp_path / "a.json", text)], [tmp_path], 1)[0]) == 5
    with pytest.raises(UserError, match=r"a.json: is broken JSON, or cut off \(.*line \d"):
        read_records([write(tmp_path / "a.json", broken(text))], [tmp_path], 1)


VQA_QUESTIONS = {"data_subtype": "train2014", "questions": [
    {"image_id": 42, "question": "What is it?", "question_id": 42000},
    {"image_id": 43, "question": "Why?", "question_id": 43000}]}
VQA_ANNOTATIONS = {"data_subtype": "train2014", "annotations": [{
    "question_type": "what", "multiple_choice_answer": "cat", "image_id": 42, "answer_type": "other", "question_id": 42000,
    "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]}]}


def test_vqa_questions_and_annotations_are_joined_in_either_order(tmp_path):
    files = [write(tmp_path / "q.json", VQA_QUESTIONS), write(tmp_path / "a.json", VQA_ANNOTATIONS)]
    for paths in (files, files[::-1]):
        records, skips = read_records(paths, [tmp_path], 2)
        assert records == [Record(f"{tmp_path}/COCO_train2014_000000000042.jpg", ("What is it?",), "cat", "other", 42000,
                                  ("cat",) * 10)]
        assert skips == [Skip("a question without an answer")]  # without its id: no score counts it as missed
    other = write(tmp_path / "other.json", {**VQA_ANNOTATIONS, "data_subtype": "val2014"})  # the same ids
    with pytest.raises(UserError, match="a question without an answer"):
        read_records([files[0], other], [tmp_path], 2)
    with pytest.raises(UserError, match="without an answer"):  # as in the test split
        read_records(files[:1], [tmp_path], 2)


def test_vqas_test_split_has_questions_without_answers_to_evaluate(tmp_path):
    questions = {"data_subtype": "test-dev2015", "questions": VQA_QUESTIONS["questions"] + [
        {"image_id": 44, "question": " ", "question_id": 44000},
        {"image_id": "x", "question": "Who?", "question_id": 45000}]}
    records, skips = read_records([write(tmp_path / "q.json", questions)], [tmp_path], 2, answered=False)
    assert records == [Record(f"{tmp_path}/COCO_test2015_000000000042.jpg", ("What is it?",), "", key=42000),
                       Record(f"{tmp_path}/COCO_test2015_000000000043.jpg", ("Why?",), "", key=43000)]
    assert {skip.key for skip in skips} == {44000, 45000}  # a results file has to hold these, too


def test_an_answer_is_never_joined_to_a_question_whose_id_is_given_twice(tmp_path):
    twice = [{"image_id": i, "question": f"{i}?", "question_id": 42000} for i in (42, 7)]
    for rows in (twice, twice[::-1]):
        questions = {"data_subtype": "train2014", "questions": rows + VQA_QUESTIONS["questions"][1:]}
        files = [write(tmp_path / "q.json", questions), write(tmp_path / "a.json", VQA_ANNOTATIONS)]
        records, skips = read_records(files, [tmp_path], 2, answered=False)
        assert [record.key for record in records] == [43000]
        assert reasons(skips) == {"question_id is given twice": 1, "an answer without its question": 1}
        assert Skip("question_id is given twice", 42000) in skips
    double = {**VQA_ANNOTATIONS, "annotations": VQA_ANNOTATIONS["annotations"] * 2}
    files = [write(tmp_path / "q.json", VQA_QUESTIONS), write(tmp_path / "a.json", double)]
    skips = read_records(files, [tmp_path], 2, answered=False)[1]
    assert skips == [Skip("question_id is given twice")]  # of an annotation: its question is asked
    other = {**VQA_ANNOTATIONS, "annotations": [{**VQA_ANNOTATIONS["annotations"][0], "image_id": 43}]}
    files = [write(tmp_path / "q.json", VQA_QUESTIONS), write(tmp_path / "a.json", other)]
    with pytest.raises(UserError, match="different pictures"):
        read_records(files, [tmp_path], 2)


def vcr(**changes):
    return {"movie": "m", "objects": ["person", "person", "chair"], "img_fn": "lsmdc/a.jpg", "metadata_fn": "lsmdc/a.json",
            "question": ["Why", "is", [0], "pointing", "at", [1, 2], "?"],
            "answer_choices": [["No", "."], [[0], "is", "telling", [1], "that", "it", "'", "s", "late", "."], ["A"], ["B"]],
            "answer_label": 1, "rationale_choices": [["C"], ["D"], [[1], "does", "n't", "know", "."], ["E"]],
            "rationale_label": 2, "annot_id": "val-0", "answer_orig": "1 is telling 2"} | changes


def test_vcr_counts_objects_from_zero_and_asks_for_answer_and_rationale(tmp_path):
    lines = [vcr(), {k: v for k, v in vcr().items() if "label" not in k}, vcr(question=["Who", "is", [7], "?"])]
    path = write(tmp_path / "val.jsonl", "\n".join(map(json.dumps, lines)) + "\nnot json\n")
    records, skips = read_records([path], [tmp_path], 2)
    question, answer = "Why is person 1 pointing at person 2 and chair 3?", "person 1 is telling person 2 that it's late."
    answers, whys = ("No.", answer, "A", "B"), ("C", "D", "person 2 does n't know.", "E")
    assert records == [
        Record(f"{tmp_path}/lsmdc/a.jpg", (question,), answer, key="val-0", choices=answers),
        Record(f"{tmp_path}/lsmdc/a.jpg", (question, answer, "Why?"), whys[2], key="val-0", choices=whys)]
    assert reasons(skips) == {"no label": 1, "a text that names an object which is not in the picture": 1,
                              "a line is not JSON": 1}


@pytest.mark.parametrize("change, reason", [
    ({"answer_label": -1}, "a label"), ({"rationale_label": 4}, "a label"), ({"answer_label": "1"}, "a label"),
    ({"question": ["Who", "is", [-1], "?"]}, "names an object"), ({"question": "Why?"}, "not a list of words"),
    ({"answer_choices": [["A"], "telling", ["B"], ["C"]]}, "not a list of words"),
    ({"question": [["x"]]}, "names an object"), ({"img_fn": None}, "no picture"), ({"img_fn": 1.5}, "name that is no text"),
    ({"img_fn": ["a.jpg"]}, "list in place")])
def test_vcr_takes_no_label_object_or_text_for_another(tmp_path, change, reason):
    lines = "\n".join(json.dumps(item) for item in (vcr(**change), vcr()))
    records, skips = read_records([write(tmp_path / "val.jsonl", lines)], [tmp_path], 2)
    assert len(records) == 2 and len(skips) == 1 and reason in skips[0].reason


def test_one_line_of_vcr_is_read_as_one_record(tmp_path):
    assert len(read_records([write(tmp_path / "val.jsonl", vcr())], [tmp_path], 2)[0]) == 2


def test_lmeyes_own_release(tmp_path):
    path = write(tmp_path / "release.json", [
        {"image_id": "a.jpg", "caption": "A cat.", "questions": ["Question: What is it?", "Answer: A cat.",
                                                                 "2. Question: Where?", "2. Answer: Here."]},
        {"image_id": 7, "caption": "A dog.", "questions": ["Question: What?", "Answer: A dog."]},
        {"image_id": "b.jpg", "caption": "", "questions": ["Question: What?", "Question: Where?"]},
        {"image_id": "c.jpg", "caption": "", "questions": ["What?", "That"]}, {"image_id": "d.jpg", "questions": []}])
    records, skips = read_records([path], [tmp_path], 2)
    assert [(r.image, r.turns, r.answer) for r in records] == [
        (f"{tmp_path}/a.jpg", ("What is it?",), "A cat."),
        (f"{tmp_path}/a.jpg", ("What is it?", "A cat.", "Where?"), "Here."),
        (f"{tmp_path}/000000000007.jpg", ("What?",), "A dog.")]
    assert len(skips) == 3
    assert [r.answer for r in read_records([path], [tmp_path], 1)[0]] == ["A cat.", "A dog."]


def test_lmeyes_own_release_as_its_authors_published_it(tmp_path):
    """Pictures are named without their endings, questions are numbered in two ways, some lists begin in mid-caption."""
    path = write(tmp_path / "release.json", [
        {"image_id": "2", "caption": "A cat.", "questions": ["Question 1: What?", "Answer 1: A cat.",
                                                             "1. Question: Where?", "1. Answer: Here: there."]},
        {"image_id": "sub/3", "questions": ["sits on a mat.", "Question: Who?", "Answer: A cat", "Question: Why?"]},
        {"image_id": "4", "questions": ["Question: Lost?", "Question: Found?", "Answer: Yes", "Answer: No"]},
        {"image_id": "5", "questions": ["Question: What?", "Answer: That"]}])
    names = ("2.jpg", "sub/3.png", "4.jpeg")
    for name in names:
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(jpeg())
    archive = write_zip(tmp_path / "pictures.zip", [f"pictures/{name}" for name in names])
    for place in (tmp_path / "pictures", archive):
        records, skips = read_records([path], [place], 2)
        two, three, four = (str(tmp_path / "pictures" / name) for name in names)
        if place == archive:
            two, three, four = (Member(str(archive), f"pictures/{name}") for name in names)
        assert [(r.image, r.turns[-1], r.answer) for r in records] == [
            (two, "What?", "A cat."), (two, "Where?", "Here: there."), (three, "Who?", "A cat"),
            (four, "Found?", "Yes")]
        assert reasons(skips) == {"a text that is not a question with its answer": 4,
                                  "no such picture in --images": 1}


def test_llava_mixture_with_prefixes_and_rows_without_pictures(tmp_path):
    chat = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}]
    path = write(tmp_path / "mix.json", [{"id": 1, "image": "coco/train2017/1.jpg", "conversations": chat},
                                         {"id": 2, "conversations": chat}])
    records, skips = read_records([path], [tmp_path], 2)
    assert records == [Record(f"{tmp_path}/coco/train2017/1.jpg", ("What?",), "A cat.")]
    assert reasons(skips) == {"no picture": 1}


def test_webdataset_shards(tmp_path):
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "00000.tar", {"0001.jpg": jpeg("red"), "0001.txt": b"red\n", "0002.jpg": jpeg(), "3.txt": b"x"})
    write_tar(folder / "00001.tar", {"x/0001.png": jpeg("blue"), "x/0001.json": json.dumps({"caption": "blue"}).encode(),
                                     "y/0001.jpg": jpeg("green"),
                                     "y/0001.json": json.dumps({"conversations": chat}).encode()})
    records, skips = read_records([folder], None, 1)
    assert [r.answer for r in records] == ["red", "blue", "A dog."] and len(skips) == 2
    for record, color in zip(records, ((254, 0, 0), (0, 0, 254), (0, 128, 0))):
        seen = data.load_image(record.image).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(seen, color)) < 4
    assert [r.turns for r in read_records([folder / "00001.tar"], None, 2)[0]] == [("What?",)]


def test_a_compressed_shard_is_refused_for_its_pictures_are_read_in_place(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(UserError, match="without compression"):
        read_records([tmp_path / "a.tar"], None, 1)


def test_keys_of_a_shard_keep_their_case_whatever_the_order(tmp_path):
    files = {"a.jpg": jpeg("red"), "A.JPG": jpeg("blue"), "A.txt": b"blue", "a.TXT": b"red"}
    for i, names in enumerate((list(files), list(files)[::-1])):
        shard = write_tar(tmp_path / f"{i}.tar", {name: files[name] for name in names})
        records, skips = read_records([shard], None, 1)
        assert len(records) == 2 and not skips
        for record in records:
            assert (data.load_image(record.image).getpixel((0, 0))[0] > 200) == (record.answer == "red")


def test_a_name_that_is_twice_in_a_shard_is_counted_and_others_are_kept(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.jpg", jpeg()), ("1.txt", b"one"), ("2.jpg", jpeg()), ("1.txt", b"two"),
                              ("2.txt", b"x"), ("3.cls", b"7"), ("sub/1.jpg", jpeg()), ("sub/1.txt", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    records, skips = read_records([tmp_path / "a.tar"], None, 1)
    assert [r.answer for r in records] == ["x", "y"] and sorted(n for n in reasons(skips).values()) == [1, 1]
    assert "a name that is twice in a tar shard" in reasons(skips)


def test_joined_shards_are_read_to_their_end_each_with_its_own_keys(tmp_path):
    one = write_tar(tmp_path / "one.tar", {"1.jpg": jpeg("red"), "1.txt": b"red"})
    two = write_tar(tmp_path / "two.tar", {"1.jpg": jpeg("blue"), "1.txt": b"blue"})
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    records, skips = read_records([tmp_path / "both.tar"], None, 1)
    assert [r.answer for r in records] == ["red", "blue"] and not skips
    assert [data.load_image(r.image).getpixel((0, 0))[0] > 200 for r in records] == [True, False]


def test_a_broken_or_cut_shard_says_where_and_loses_nothing_unsaid(tmp_path):
    """Each damage once ended the reading without a word, before the last pair."""
    files = {"1.jpg": jpeg(), "1.txt": b"one", "2.jpg": jpeg(), "2.txt": b"two"}
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        headers = [info.offset for info in tar]
    for at in headers:
        for place in (at, at + 124, at + 150):  # name, size, checksum
            broken = bytearray(whole)
            broken[place] ^= 1
            (tmp_path / "b.tar").write_bytes(broken)
            with pytest.raises(UserError, match=f"byte {at:,}" if at else "byte 0"):
                read_records([tmp_path / "b.tar"], None, 1)
    for cut in (*headers[1:], headers[1] + 100, headers[3] + 512, headers[3] + 514, headers[3] + 1024, 0):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="b.tar"):
            read_records([tmp_path / "b.tar"], None, 1)
    (tmp_path / "b.tar").write_bytes(whole + b"more" * 128)
    with pytest.raises(UserError, match="broken or cut off"):
        read_records([tmp_path / "b.tar"], None, 1)
    (tmp_path / "b.tar").write_bytes(whole[:headers[3] + 1024 + 512])  # all is there; GNU tar calls this complete, too
    assert len(read_records([tmp_path / "b.tar"], None, 1)[0]) == 2


def test_a_shard_written_by_git_archive_with_a_header_for_all_files_is_whole(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c" * 40}) as tar:
        for name, content in (("é" * 80 + ".jpg", jpeg()), ("é" * 80 + ".txt", b"one")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    records, skips = read_records([tmp_path / "a.tar"], None, 1)
    assert [r.answer for r in records] == ["one"] and not skips and data.load_image(records[0].image)


def test_nothing_in_a_folder_is_passed_over(tmp_path):
    folder, away = tmp_path / "data", tmp_path / "away"
    for place in (folder / "deeper", away):
        place.mkdir(parents=True)
    for name in ("a.avif", "b.jfif", "deeper/c.jpeg", "lone.jpg", "../away/d.jpg", "photo.2020.tif"):
        Image.new("RGB", (40, 30)).save(folder / name, {".jfif": "JPEG"}.get(name[-5:]))
    for name in ("a.txt", "b.TXT", "deeper/c.txt", "alone.txt", "../away/d.txt", "photo.2020.txt"):
        write(folder / name, name)
    write(folder / "chat.json", [])
    write_tar(folder / "0.tar", {"1.jpg": jpeg(), "1.txt": b"first shard"})
    write_tar(folder / "deeper" / "1.tar", {"1.jpg": jpeg(), "1.txt": b"deeper shard"})
    (folder / "linked").symlink_to(away)
    (folder / "linked too").symlink_to(away)
    (folder / "deeper" / "loop").symlink_to(folder)
    records, skips = read_records([folder], None, 1)
    assert sorted(r.answer for r in records) == sorted(["first shard", "deeper shard", "a.txt", "b.TXT", "deeper/c.txt",
                                                        "../away/d.txt", "photo.2020.txt"])
    assert sorted(reasons(skips).values()) == [1, 1, 1] and any(".json" in reason for reason in reasons(skips))
    for record in records:
        data.load_image(record.image)


def test_karpathys_split_file_is_refused_with_its_reason(tmp_path):
    image = {"filepath": "val2014", "filename": "1.jpg", "split": "test", "cocoid": 1, "sentences": [{"raw": "A cat."}]}
    path = write(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": [image]})
    with pytest.raises(UserError, match="Karpathy"):
        read_records([path], [tmp_path], 1)


@pytest.mark.parametrize("name, reason", [
    (None, "no picture"), ("", "no picture"), (1.5, "no text"), (7, "no text"), (["1.jpg"], "list"), ([], "list"),
    ({}, "no text"), (True, "no text"), ("\ud800.jpg", "no text")])
def test_a_picture_name_of_another_kind_has_its_reason(tmp_path, name, reason):
    good = {"image": "1.jpg", "conversations": CHAT}
    llava = write(tmp_path / "llava.json", [good, {"image": name, "conversations": CHAT}])
    release = write(tmp_path / "release.json", [good, {"image_id": name, "questions": ["Question: a?", "Answer: b"]}])
    coco = write(tmp_path / "coco.json", {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": name}],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}]})
    for path in [llava, coco] + [release] * (name not in (7, True)):  # a number is COCO's picture there
        records, skips = read_records([path], [tmp_path], 1 if path == coco else 2)
        assert len(records) == 1 and len(skips) == 1 and reason in skips[0].reason, path


def test_text_that_is_not_utf_8_is_read_by_its_mark_or_told(tmp_path):
    for name in ("1", "2", "3", "4", "5", "6"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    contents = {"1": "für".encode("utf-16"), "2": "für".encode("utf-8-sig"), "3": "für".encode("latin-1"),
                "4": "fur".encode("utf-16-le"), "5": "für".encode("utf-32"), "6": "für".encode("utf-16")[:-1]}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    records, skips = read_records([tmp_path], None, 1)
    assert [r.answer for r in records] == ["für"] * 2 and len(skips) == 4
    for skip, name in zip(skips, "3456"):
        assert f"{name}.txt" in skip.reason and "UTF-8" in skip.reason
    assert "byte 1" in skips[0].reason
    chat = json.dumps([{"image": "1.jpg", "caption": "für"}], ensure_ascii=False)
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "chat.json").write_bytes(chat.encode(encoding))
        assert read_records([tmp_path / "chat.json"], [tmp_path], 1)[0][0].answer == "für"
    (tmp_path / "chat.json").write_bytes(chat.encode("latin-1"))
    with pytest.raises(UserError, match="chat.json: is not UTF-8"):
        read_records([tmp_path / "chat.json"], [tmp_path], 1)
    shard = write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(), "1.txt": contents["3"], "2.jpg": jpeg(),
                                           "2.txt": contents["1"]})
    records, skips = read_records([shard], None, 1)
    assert [r.answer for r in records] == ["für"] and "1.jpg" in skips[0].reason
    assert data.read_text(tmp_path / "1.txt") == "für"
    with pytest.raises(UserError, match="no such file"):
        data.read_text(tmp_path / "none.txt")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_a_git_lfs_pointer_in_place_of_data_is_called_so(tmp_path):
    for name in ("a.json", "a.tar", "a.zip", "a.jpg", "b.txt"):
        (tmp_path / name).write_bytes(POINTER)
    (tmp_path / "b.jpg").write_bytes(jpeg())
    good = write(tmp_path / "good.json", [{"image": "1.jpg", "conversations": CHAT}])
    for paths, images in ((["a.json"], None), (["a.tar"], None), ([good], [tmp_path / "a.zip"])):
        with pytest.raises(UserError, match="git-lfs pointer"):
            read_records([tmp_path / path for path in paths], images, 1)
    with pytest.raises(UserError, match="git-lfs pointer"):
        data.load_image(tmp_path / "a.jpg")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match="git-lfs pointer"):  # the caption
        read_records([tmp_path], None, 1)


def test_category_is_kept_from_any_record_of_json(tmp_path):
    items = [{"image": "1.jpg", "caption": "x", "conversations": CHAT, "category": "color"},
             {"image": "1.jpg", "caption": "y", "category": "place"},
             {"image": "1.jpg", "caption": "z", "category": None},
             {"image_id": "1.jpg", "caption": "r", "questions": ["Question: a?", "Answer: b"], "category": "size"}]
    path = write(tmp_path / "a.json", items)
    assert [r.category for r in read_records([path], [tmp_path], 1)[0]] == ["color", "place", "all", "size"]
    assert [r.category for r in read_records([path], [tmp_path], 2)[0]] == ["color", "size"]


def test_one_line_of_json_lines_is_a_record_and_odd_items_share_one_reason(tmp_path):
    line = write(tmp_path / "line.jsonl", json.dumps({"image": "1.jpg", "conversations": CHAT}) + "\n")
    assert len(read_records([line], [tmp_path], 2)[0]) == 1
    odd = write(tmp_path / "odd.json", ["a.jpg", "b.jpg", 3, {"image": "1.jpg", "conversations": CHAT}])
    assert list(reasons(read_records([odd], [tmp_path], 2)[1]).values()) == [3]


def test_each_file_has_its_own_pictures_beside_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg())
        write(tmp_path / name / "chat.json", [{"image": "1.jpg", "conversations": CHAT}])
    records, _ = read_records([tmp_path / "a" / "chat.json", tmp_path / "b" / "chat.json"], None, 2)
    assert [r.image for r in records] == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/1.jpg"]


def test_ids_of_two_coco_files_are_told_apart(tmp_path):
    files = [write(tmp_path / f"{name}.json", {"images": [{"id": 1, "file_name": f"{name}.jpg"}],
                                               "annotations": [{"image_id": 1, "caption": f"of {name}"}]}) for name in "ab"]
    records, skips = read_records(files, [tmp_path], 1)
    assert [(r.image, r.answer) for r in records] == [(f"{tmp_path}/{name}.jpg", f"of {name}") for name in "ab"]
    split = [write(tmp_path / f"{name}.json", {**json.loads(files[i].read_text()), "data_subtype": "train2014"})
             for i, name in enumerate("ab")]
    assert read_records(split, [tmp_path], 1)[0] == records and not skips
    twice = write(tmp_path / "c.json", {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}],
                                        "annotations": [{"image_id": 1, "caption": "of which?"}]})
    with pytest.raises(UserError, match="given twice"):
        read_records([twice], [tmp_path], 1)


def test_a_record_with_a_caption_and_a_conversation_serves_both_stages(tmp_path):
    path = write(tmp_path / "a.json", [{"image": "1.jpg", "caption": "A cat on a mat.", "conversations": CHAT}])
    assert [read_records([path], [tmp_path], stage)[0][0].answer for stage in (1, 2)] == ["A cat on a mat.", "A cat."]


def test_names_with_dots_marks_of_byte_order_and_odd_separators(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", {"photo.2020.jpg": jpeg(), "photo.2020.txt": "\ufeffa cat".encode(), "12:30.jpg": jpeg(),
                                 "12:30.txt": b"a dog"})
    assert [r.answer for r in read_records([folder], None, 1)[0]] == ["a cat", "a dog"]
    lines = [{"image": "12:30.jpg", "caption": f"a cat\u2028number {i}"} for i in range(2)]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    records, skips = read_records([path], [tmp_path], 1)
    assert [r.answer for r in records] == ["a cat number 0", "a cat number 1"] and not skips


CHAT = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize("item", ({"image": "a.jpg", "annotations": [], "conversations": CHAT},
                                  {"image": "a.jpg", "images": ["b.jpg"], "conversations": CHAT}))
def test_one_record_alone_is_read_as_it_is_in_a_list(tmp_path, item):
    alone, listed = write(tmp_path / "a.json", json.dumps(item)), write(tmp_path / "b.json", json.dumps([item, item]))
    assert read_records([alone], [tmp_path], 2)[0] * 2 == read_records([listed], [tmp_path], 2)[0]


def test_a_table_that_is_no_list_is_counted(tmp_path):
    good = write(tmp_path / "good.json", json.dumps([{"image": "a.jpg", "conversations": CHAT}]))
    odd = write(tmp_path / "odd.json", json.dumps({"questions": {"1": "what?"}}))
    records, skips = read_records([good, odd], [tmp_path], 2)
    assert len(records) == 1 and [skip.reason for skip in skips] == ['"questions" that are no list']


@pytest.mark.parametrize("content", (b"\x1f\x8b\x08\x00", b"\x1f\x8b" + bytes(50), b"BZh9 broken", b"\xfd7zXZ\x00 broken"))
def test_what_begins_as_if_it_were_compressed_is_told_in_one_line(tmp_path, content):
    (tmp_path / "a.json.gz").write_bytes(content)
    with pytest.raises(UserError, match="a.json.gz: "):
        read_records([tmp_path / "a.json.gz"], None, 1)


def test_data_that_is_not_there_is_named_itself(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/no/such.json"):
        read_records([tmp_path / "no" / "such.json"], None, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no such file"):  # not waited for
        read_records([tmp_path / "pipe"], None, 1)
    (tmp_path / "a.json").write_text('{"image": "a.jpg", "caption": "a cat"}')
    with pytest.raises(UserError, match="pipe: no such folder or zip"):
        read_records([tmp_path / "a.json"], [tmp_path / "pipe"], 1)


def test_links_in_a_shard_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(UserError, match="a link"):
        read_records([tmp_path / "a.tar"], None, 1)


def test_pictures_in_a_zip_are_read_in_place_also_below_one_folder(tmp_path):
    path = write(tmp_path / "chat.json", [{"image": "1.jpg", "conversations": CHAT}, {"image": "9.jpg", "conversations": CHAT}])
    for name in ("1.jpg", "train2017/1.jpg"):
        archive = write_zip(tmp_path / "images.zip", [name, "__MACOSX/._1.jpg"])
        data.open_zip.cache_clear()
        records, skips = read_records([path], [archive], 1)
        assert [r.image for r in records] == [Member(str(archive), name)] and reasons(skips) == {"no such picture in --images": 1}
        assert data.load_image(records[0].image).size == (40, 30)


def test_of_several_folders_in_a_zip_none_may_be_left_out_of_a_name(tmp_path):
    """A picture of another folder could be taken for it."""
    items = [{"image": name, "conversations": CHAT} for name in ("1.jpg", "b/1.jpg")]
    path = write(tmp_path / "chat.json", items)
    archive = write_zip(tmp_path / "two.zip", ["a/1.jpg", "b/1.jpg"])
    records, skips = read_records([path], [archive], 1)
    assert [r.image.name for r in records] == ["b/1.jpg"]
    assert reasons(skips) == {"no such picture in --images": 1}


def test_a_name_as_it_stands_in_a_zip_comes_before_one_without_its_folder(tmp_path):
    path = write(tmp_path / "chat.json", [{"image": "a/1.jpg", "conversations": CHAT}])
    archive = write_zip(tmp_path / "a.zip", ["a/1.jpg", "a/a/1.jpg"])
    assert [r.image.name for r in read_records([path], [archive], 1)[0]] == ["a/1.jpg"]


def test_several_files_and_picture_places_are_mixed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jpg").write_bytes(jpeg())
    archive = write_zip(tmp_path / "images.zip", ["2.jpg"])
    one = write(tmp_path / "one.json", [{"image": "1.jpg", "conversations": CHAT}])
    two = write(tmp_path / "two.json", [{"image": "2.jpg", "conversations": CHAT}])
    records, skips = read_records([one, two], [tmp_path / "folder", archive], 2)
    assert [r.image for r in records] == [f"{tmp_path}/folder/1.jpg", Member(str(archive), "2.jpg")] and not skips


@pytest.mark.parametrize("name", ["../1.jpg", "a/../../1.jpg", "/1.jpg", "..\\1.jpg", "\\\\host\\1.jpg", "a\0.jpg"])
def test_a_picture_name_cannot_leave_its_place(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "1.jpg").write_bytes(jpeg())
    archive = write_zip(tmp_path / "images.zip", [name.replace("\0", "")])
    for images in (tmp_path / "in", archive):
        with pytest.raises(UserError, match="not inside --images"):
            read_records([write(tmp_path / "a.json", [{"image": name, "conversations": CHAT}])], [images], 1)


def test_bombs_are_left_unopened(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", b"\0" * 100_000)
    with pytest.raises(UserError, match="unpacks to 100,000"):
        data.load_image(Member(str(tmp_path / "bomb.zip"), "1.jpg"))
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    Image.new("1", (40, 30)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="pixels"):
        data.load_image(str(tmp_path / "wide.png"))
    Image.new("1", (900, 1)).save(tmp_path / "narrow.png")  # resized to a side of 224, it would be 201,600 wide
    with pytest.raises(UserError, match="narrow"):
        data.load_image(str(tmp_path / "narrow.png"))


@pytest.mark.parametrize("form", ("folder", "llava", "llava-zip", "coco", "vqa", "vcr", "release", "shards"))
def test_both_phases_train_on_every_format_and_answer(tmp_path, form):
    """From the command line; formats without captions come after a phase 1 on a folder, those without questions stop."""
    colors = ("red", "green", "blue", "white")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, color in enumerate(colors):
        (pictures / f"{i}.jpg").write_bytes(jpeg(color))
        (pictures / f"COCO_val2014_{i:012d}.jpg").write_bytes(jpeg(color))
        write(pictures / f"{i}.txt", f"a {color} background")
    chats = [[{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": c}] for c in colors]
    llava = [{"image": f"{i}.jpg", "conversations": chat} for i, chat in enumerate(chats)]
    images = ["--images", pictures]
    files = {
        "folder": lambda: [], "llava": lambda: [write(tmp_path / "d.json", llava)],
        "llava-zip": lambda: [write(tmp_path / "d.json", llava)],
        "coco": lambda: [write(tmp_path / "d.json", {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
            "annotations": [{"id": i, "image_id": i, "caption": f"a {c} background"} for i, c in enumerate(colors)]})],
        "vqa": lambda: [write(tmp_path / "q.json", {"questions": [
            {"image_id": i, "question": "what color is it?", "question_id": i} for i in range(4)]}),
            write(tmp_path / "a.json", {"annotations": [
                {"question_id": i, "image_id": i, "multiple_choice_answer": c, "answer_type": "other"}
                for i, c in enumerate(colors)]})],
        "vcr": lambda: [write(tmp_path / "d.jsonl", "\n".join(json.dumps(vcr(img_fn=f"{i}.jpg")) for i in range(4)))],
        "release": lambda: [write(tmp_path / "d.json", [
            {"image_id": f"{i}.jpg", "caption": c, "questions": ["Question: what color is it?", f"Answer: {c}"]}
            for i, c in enumerate(colors)])],
        "shards": lambda: [write_tar(tmp_path / "0.tar", {
            name: content for i, c in enumerate(colors)
            for name, content in ((f"{i}.jpg", jpeg(c)), (f"{i}.json", json.dumps({"conversations": chats[i]}).encode()))})],
    }[form]()
    if form == "llava-zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for i, color in enumerate(colors):
                archive.write(pictures / f"{i}.jpg", f"{i}.jpg")
        images = ["--images", tmp_path / "images.zip"]
    flags = ["--llm", save_opt(tmp_path / "opt-tiny"), "--clip", save_clip(tmp_path / "clip"), "--steps", 2]
    given = [flag for file in files for flag in ("--data", file)] + images
    first = ["--data", pictures] if form in ("folder", "vqa", "vcr") else given
    result = run("train.py", "--stage", 1, *flags, *first, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("train.py", "--stage", 2, *flags, *(given if files else first), cwd=tmp_path)
    if form in ("folder", "coco"):
        assert fails_in_one_line(result) and "--stage 1" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        result = run("sample.py", pictures / "0.jpg", "what color is it?", *flags[:4], cwd=tmp_path)
        assert result.returncode == 0 and not result.stderr


def test_a_feature_file_is_taken_up_where_it_ended_and_equals_an_unbroken_one(tmp_path, monkeypatch):
    model, images = tiny_model(), []
    for i in range(20):
        images.append(str(tmp_path / f"{i}.jpg"))
        (tmp_path / f"{i}.jpg").write_bytes(jpeg((12 * i, 0, 0)) if i != 13 else b"broken")
    whole = np.array(data.encode_images(model, images, tmp_path / "whole", batch_size=2))
    assert np.isnan(whole[13]).all() and np.isfinite(np.delete(whole, 13, 0)).all()
    file = next((tmp_path / "whole").glob("*.f16"))
    for stop in range(1, 10):  # the power fails after some batches, in the middle of a write
        folder = tmp_path / f"broken{stop}"
        with monkeypatch.context() as patch:
            encoded = iter(range(stop))
            real = model.encode_image
            patch.setattr(model, "encode_image", lambda pixels: (next(encoded), real(pixels))[1])
            with pytest.raises((RuntimeError, StopIteration)):
                data.encode_images(model, images, folder, batch_size=2)
        part = next(folder.glob("*.f16"))
        assert part.name == file.name and part.stat().st_size == stop * 2 * 24 * 2  # every whole batch is there
        with open(part, "ab") as half:
            half.write(b"half a batch" * 5)  # a row and a piece
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(model, "encode_image", lambda pixels: (calls.append(1), real(pixels))[1])
            data.encode_images(model, images, folder, batch_size=2)
        assert part.read_bytes() == file.read_bytes() and len(calls) == 10 - stop
    (tmp_path / "0.jpg").write_bytes(jpeg("blue") + b" ")  # a picture that changes has other features
    assert not np.array_equal(data.encode_images(model, images, tmp_path / "whole", 2)[0], whole[0])
