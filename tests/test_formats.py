"""What is read, and what is left out with which reason: data files, folders, zip archives and pictures."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import data
from data import Pictures, Record, read_records
from lmeye import UserError

CHAT = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}]


def turns(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def jpeg(color="red"):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(stream, "JPEG")
    return stream.getvalue()


def png(bits, color, values, transparent):
    """A PNG of one row, as written by hand: color 0 is gray, 2 is RGB (three values a pixel)."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width = len(values) // (3 if color == 2 else 1)
    row = "".join(format(value, f"0{bits}b") for value in values)
    row = bytes(int(row[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(row), 8))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
            + chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def write_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, jpeg())
    return path


def read(tmp_path, items, stage=2, answered=True):
    """Items in a data file beside the pictures a.jpg and b/c.jpg → (records, skipped)."""
    (tmp_path / "b").mkdir(exist_ok=True)
    for name in ("a.jpg", "b/c.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    path = write(tmp_path / "data.json", items)
    return read_records(path, data.open_pictures(path), stage, answered)


def one_reason(skipped, *words, n=1):
    return list(skipped.values()) == [n] and all(word in next(iter(skipped)) for word in words)


def test_llava_pretraining_takes_the_caption_alone(tmp_path):
    items = [{"id": "1", "image": "a.jpg", "conversations": turns("Describe it.\n<image>", "a cat")},
             {"id": 2, "image": "b/c.jpg", "conversations": turns("<image>\nWhat is this?", "a dog ")}]
    records, skipped = read(tmp_path, items, 1)
    assert records == [Record("a.jpg", (), "a cat", id="1"), Record("b/c.jpg", (), "a dog", id=2)] and not skipped


def test_llava_instructions_become_a_record_a_turn(tmp_path):
    item = {"image": "a.jpg", "conversations": turns("<image>\nWhat?", "a cat", "Where?", "here")}
    records, skipped = read(tmp_path, [item])
    assert records == [Record("a.jpg", ("What?",), "a cat"), Record("a.jpg", ("What?", "a cat", "Where?"), "here")]
    assert records[1].question == "What?\nAnswer: a cat\nQuestion: Where?" == data.dialogue(records[1].turns)
    item["conversations"] = turns("<image>\nWhat?", "a cat", "Where?", "here", roles=("user", "assistant"))
    assert read(tmp_path, [item]) == (records, skipped) and not skipped


def test_a_question_with_its_answer_is_the_same_in_short(tmp_path):
    short = {"image": "a.jpg", "question": "What? ", "answer": "A cat.", "category": "pet", "id": 7}
    long = {"image": "a.jpg", "conversations": CHAT, "category": "pet", "id": 7}
    assert read(tmp_path, [short])[0] == read(tmp_path, [long])[0] == [Record("a.jpg", ("What?",), "A cat.", "pet", 7)]
    assert read(tmp_path, [long], 1)[0] == [Record("a.jpg", (), "A cat.", "pet", 7)]  # it may describe the picture
    with pytest.raises(UserError, match="questions, for --stage 2"):  # "red" is no caption
        read(tmp_path, [short], 1)


def test_a_file_of_one_record_may_be_written_over_several_lines(tmp_path):
    path = write(tmp_path / "one.json", json.dumps({"image": "a.jpg", "caption": "A cat."}, indent=2))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    records, skipped = read_records(path, data.open_pictures(path), 1)
    assert [r.answer for r in records] == ["A cat."] and not skipped


def test_a_record_with_a_caption_and_a_conversation_serves_both_stages(tmp_path):
    item = {"image": "a.jpg", "caption": " A cat\non a mat. ", "conversations": turns("What?", "A cat.", "Why?", "So.")}
    assert [r.answer for r in read(tmp_path, [item], 1)[0]] == ["A cat on a mat."]
    assert [r.answer for r in read(tmp_path, [item], 2)[0]] == ["A cat.", "So."]


def test_image_is_a_placeholder_only_at_one_end_of_the_first_question(tmp_path):
    """Where else it stands, it is about another picture: as text the model would learn to read and write it."""
    for text in ("<image>\nWhat?", "What?\n<image>", " <image>What? "):
        records, skipped = read(tmp_path, [{"image": "a.jpg", "conversations": turns(text, "a cat")}])
        assert records[0].turns == ("What?",) and not skipped
    odd = [turns("<image>\nWhat does <image> show?", "a cat"), turns("<image><image>\nWhat?", "a cat"),
           turns("<image>\nAnd this?\n<image>", "a cat"), turns("Of <image>, what?", "a cat"),
           turns("<image>\nWhat?", "a cat", "<image>\nAnd this?", "a dog"), turns("What?", "as in <image>")]
    odd += [turns(f"{mark} What?", "a cat") for mark in ("<image 1>", "<ImageHere>", "<|image_1|>", "<video>",
                                                         "<img>a.jpg</img>", "<image_placeholder>")]
    for stage in (1, 2):
        items = [{"image": "a.jpg", "conversations": talk} for talk in [*odd, turns("<image>\nWhat?", "a cat")]]
        records, skipped = read(tmp_path, items, stage)
        assert len(records) == 1 and one_reason(skipped, '"<image>"', "several pictures", n=12)
    text = "Is 1 <imagine> <b> or <img src='a.jpg'>?"
    assert not read(tmp_path, [{"image": "a.jpg", "conversations": turns(text, "no")}])[1]
    assert read(tmp_path, [{"image": "a.jpg", "caption": "<image> is a tag"}], 1)[0][0].answer == "<image> is a tag"


def test_a_category_is_any_value_but_none(tmp_path):
    values = ["color", 0, False, "", None, 1.5, "a\x1b[2J\nb"]
    items = [{"image": "a.jpg", "caption": "x", "category": value} for value in values]
    records, _ = read(tmp_path, items + [{"image": "a.jpg", "caption": "x"}], 1)
    assert [r.category for r in records] == ["color", "0", "False", "all", "all", "1.5", "a[2J b", "all"]


def test_a_question_without_an_answer_is_left_out_of_training_and_kept_for_an_evaluation(tmp_path):
    open_ones = [{"image": "a.jpg", "question": "What?"}, {"image": "a.jpg", "question": "What?", "answer": None},
                 {"image": "a.jpg", "question": "What?", "answer": " "},
                 {"image": "a.jpg", "conversations": turns("What?")}]
    dialogue = {"image": "a.jpg", "conversations": turns("What?", "a cat", "Why?")}
    records, skipped = read(tmp_path, [*open_ones, dialogue])
    assert records == [Record("a.jpg", ("What?",), "a cat")] and skipped == {"a question without an answer": 5}
    records, skipped = read(tmp_path, [*open_ones, dialogue], answered=False)
    assert records[:4] == [Record("a.jpg", ("What?",), "")] * 4 and not skipped
    assert records[4:] == [Record("a.jpg", ("What?",), "a cat"), Record("a.jpg", ("What?", "a cat", "Why?"), "")]
    with pytest.raises(UserError, match="not one of 4 records can be used for stage 2: a question without an answer"):
        read(tmp_path, open_ones)


def test_choices_are_a_list_of_texts_for_each_answer(tmp_path):
    def item(choices, answer="b"):
        return {"image": "a.jpg", "conversations": turns("What?", answer, "Why?", "d"), "choices": choices}

    records, _ = read(tmp_path, [item([["a", "b"], ["c", "d", "e"]])])
    assert [r.choices for r in records] == [("a", "b"), ("c", "d", "e")]
    unknown = {"image": "a.jpg", "question": "What?", "choices": [["a", "b"]]}
    assert read(tmp_path, [unknown], answered=False)[0] == [Record("a.jpg", ("What?",), "", choices=("a", "b"))]
    good = {"image": "a.jpg", "conversations": CHAT}
    for choices in (["a", "b"], [["a", "b"]], [["a", "b"], ["d"], []], [["a", "b"], "cd"], [["a", "b"], ["c", 4]], 7, {"a": 1, "b": 2},
                    [["a", "b"], ["d", ""]], [["a", "c"], ["d", "e"]], [["a", "b", "b"], ["d", "e"]]):
        records, skipped = read(tmp_path, [item(choices), good])
        assert len(records) == 1 and sum(skipped.values()) == 1 and "choice" in next(iter(skipped)), choices


@pytest.mark.parametrize("item, reason", [
    ({"conversations": CHAT}, "no picture"),
    ({"image": 7, "conversations": CHAT}, "no text"),
    ({"image": ["a.jpg"], "conversations": CHAT}, "no text"),
    ({"image": "\ud800.jpg", "conversations": CHAT}, "no text"),
    ({"image": "a.jpg\0", "conversations": CHAT}, "no text"),
    ({"image": "z.jpg", "conversations": CHAT}, "no such picture in .*--images.*z.jpg"),
    ({"image": "b", "conversations": CHAT}, "no such picture"),
    ({"image": "../a.jpg", "conversations": CHAT}, "not inside --images"),
    ({"image": "..\\a.jpg", "conversations": CHAT}, "not inside --images"),
    ({"image": "a.jpg", "caption": "a cat"}, "captions, for --stage 1"),
    ({"image": "a.jpg", "conversations": turns("<image>", "a cat")}, "captions, for --stage 1"),
    ({"image": "a.jpg"}, 'no known kind: it needs "image" with .* and has image'),
    ({"images": [], "annotations": []}, "has images, annotations .*published.py"),
    (["a.jpg"], "no object"), ("a.jpg", "no object"), (7, "no object"), (None, "no object"),
    ({"image": "a.jpg", "conversations": turns("What?", 5)}, "another type"),
    ({"image": "a.jpg", "conversations": "What?"}, "another type"),
    ({"image": "a.jpg", "conversations": [{"value": "What?"}]}, "lacks a field"),
    ({"image": "a.jpg", "question": ["What?"], "answer": "a cat"}, "another type"),
    ({"image": "a.jpg", "question": "How many?", "answer": 0}, "another type"),
    ({"image": "a.jpg", "conversations": CHAT, "question": "What?", "answer": "a cat"}, "has both"),
    ({"image": "a.jpg", "conversations": turns("A cat.", "What?", roles=("gpt", "human"))}, "alternate"),
    ({"image": "a.jpg", "conversations": turns("What?", "a cat", "", "here")}, "are empty"),
    ({"image": "a.jpg", "conversations": turns("What?", "", "Where?", "here")}, "are empty"),
    ({"image": "a.jpg", "conversations": turns("What?", "a \ud800 cat")}, "are empty"),
    ({"image": "a.jpg", "conversations": CHAT + turns("And a dog.", "Why?", roles=("gpt", "human"))}, "alternate"),
    ({"image": "a.jpg", "conversations": CHAT + turns("Why?", "Be kind.", roles=("human", "system"))}, "alternate"),
])
def test_an_odd_record_is_left_out_and_counted(tmp_path, item, reason):
    records, skipped = read(tmp_path, [item, {"image": "a.jpg", "conversations": CHAT}, item])
    assert len(records) == 1 and list(skipped.values()) == [2]
    with pytest.raises(UserError, match=f"data.json: not one of 1 records can be used for stage 2: .*{reason}"):
        read(tmp_path, [item])


@pytest.mark.parametrize("item, reason", [
    ({"image": "a.jpg", "caption": 7}, "another type"), ({"image": "a.jpg", "caption": " "}, "empty"),
    ({"image": "a.jpg", "caption": None}, "empty"), ({"image": "a.jpg", "caption": "\0"}, "empty or unreadable"),
    ({"image": "a.jpg", "conversations": turns("What?", "a cat", "Where?", "here")}, "questions, for --stage 2"),
    ({"image": "a.jpg", "conversations": turns("Describe it.", " ")}, "empty"),
    ({"image": "a.jpg", "conversations": turns("a cat", "Describe it.", roles=("gpt", "human"))}, "--stage 2")])
def test_an_odd_caption_is_left_out_and_counted(tmp_path, item, reason):
    records, skipped = read(tmp_path, [item, {"image": "a.jpg", "caption": "a cat"}], 1)
    assert records == [Record("a.jpg", (), "a cat")] and one_reason(skipped, reason)


def test_fields_that_are_not_read_are_noted_by_their_names(tmp_path):
    good = {"id": 1, "image": "a.jpg", "question": "What?", "answer": "a cat", "category": "pet"}
    path = write(tmp_path / "data.json", [good, good | {"choice": 3}, good | {"Category": 1, "choice": 2, "w": 0, "z": 0}])
    (tmp_path / "a.jpg").write_bytes(jpeg())
    noted = Counter()
    assert len(read_records(path, Pictures(tmp_path), 2, noted=noted)[0]) == 3
    assert noted == {"fields that are not read: choice (2), Category (1), w (1)": 4}


def test_a_key_that_is_there_twice_leaves_its_record_out(tmp_path):
    good = json.dumps({"image": "a.jpg", "conversations": CHAT})
    twice = '{"image": "a.jpg", "image": "b/c.jpg", "question": "What?", "answer": "a cat"}'
    nested = good.replace('"value": "A cat."', '"value": "A cat.", "value": "A dog."')
    for text in (f"[{twice}, {good}, {nested}]", f"{twice}\n{good}\n{nested}"):
        records, skipped = read(tmp_path, text)
        assert len(records) == 1 and one_reason(skipped, "has one twice", n=2)


def test_the_error_of_data_whose_pictures_are_elsewhere_names_one_and_images(tmp_path):
    items = [{"image": f"train/{i}.png", "conversations": CHAT} for i in range(60)]
    with pytest.raises(UserError) as error:
        read(tmp_path, items)
    for words in ("not one of 60 records can be used", "no such picture in", "--images", "train/0.png", "(60)"):
        assert words in str(error.value)


@pytest.mark.parametrize("text, reason", [
    ("", "it holds none"), ("[]", "it holds none"), ("{}", "no known kind"), ("3", "no object"), ("{", "not JSON"),
    ("\0", "not JSON"), ('[{"image": "a.jpg"', "broken JSON, or cut off"), ("[" * 100_000, "broken JSON"),
    ("a cat\nand a dog", "not JSON")])
def test_a_file_with_nothing_to_read_is_named_in_one_line(tmp_path, text, reason):
    with pytest.raises(UserError, match=f"data.json: .*{reason}"):
        read(tmp_path, text)


@pytest.mark.parametrize("broken", (lambda text: text[:-1], lambda text: text.replace('"image"', "image", 1),
                                    lambda text: text[:-1] + ",]"))
def test_a_list_that_is_cut_off_or_has_a_slip_is_not_read_as_json_lines(tmp_path, broken):
    """One record a line: the last has no comma behind it, and would be all that is read."""
    text = "[\n" + ",\n".join([json.dumps({"image": "a.jpg", "caption": "A cat."})] * 5) + "\n]"
    assert len(read(tmp_path, text, 1)[0]) == 5
    with pytest.raises(UserError, match=r"data.json: is broken JSON, or cut off \(.*line \d"):
        read(tmp_path, broken(text), 1)


def test_json_lines_end_at_line_feeds_alone_and_a_broken_one_is_counted(tmp_path):
    lines = [json.dumps({"image": "a.jpg", "caption": f"a{c}cat"}, ensure_ascii=False) for c in "\u2028\x85\u2029"]
    records, skipped = read(tmp_path, "\ufeff" + "\r\n".join(lines) + "\n\n" + lines[0][:-3], 1)
    assert len(records) == 3 and skipped == {"a line that is not JSON": 1}
    assert len(read(tmp_path, json.dumps({"image": "a.jpg", "conversations": CHAT}))[0]) == 1  # one line alone
    item = {"image": "a.jpg", "conversations": turns("What is\u2028it?", "A\u2028cat.")}
    assert read(tmp_path, json.dumps(item, ensure_ascii=False))[0][0].answer == "A\u2028cat."


def test_text_in_another_encoding_and_what_is_no_file_is_told_in_one_line(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "data.json").write_bytes('[{"caption": "für"}]'.encode(encoding))
        with pytest.raises(UserError, match="data.json: is not UTF-8 text at byte .*save it as UTF-8"):
            read_records(tmp_path / "data.json", Pictures(tmp_path), 1)
    with pytest.raises(UserError, match=f"^{tmp_path}/no/such.json: no such file"):
        read_records(tmp_path / "no" / "such.json", Pictures(tmp_path), 1)
    (tmp_path / "data.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="data.json: is a git-lfs pointer, not the file: run  git lfs pull"):
        read_records(tmp_path / "data.json", Pictures(tmp_path), 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    with pytest.raises(UserError, match="pipe: no such file"):  # not waited for
        read_records(tmp_path / "pipe", Pictures(tmp_path), 1)
    with pytest.raises(UserError, match="pipe: no such folder or zip archive"):
        Pictures(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe.jpg: no such picture"):
        data.load_image(tmp_path / "b" / "pipe.jpg")
    with pytest.raises(UserError, match="b: a folder, not a picture"):
        data.load_image(tmp_path / "b")
    records, skipped = read(tmp_path, [{"image": name, "conversations": CHAT} for name in ("b/pipe.jpg", "a.jpg")])
    assert len(records) == 1 and one_reason(skipped, "no such picture")


def test_a_folder_of_captions_passes_over_nothing(tmp_path):
    folder, away = tmp_path / "data", tmp_path / "away"
    for place in (folder / "deeper", away):
        place.mkdir(parents=True)
    for name in ("a.avif", "b.jfif", "deeper/c.PNG", "lone.jpg", "photo.2020.tif", "two.jpg", "pair.jpg",
                 "pair.png", "lines.jpg"):
        Image.new("RGB", (40, 30)).save(folder / name, {".jfif": "JPEG"}.get(name[-5:]))
    for name in ("a.txt", "b.TXT", "deeper/c.txt", "alone.txt", "photo.2020.txt", "two.txt", "two.TXT",
                 "pair.txt"):
        write(folder / name, f"\ufeff\n{name} here\r\n")
    write(folder / "lines.txt", "a cat\nthere is a cat\na black cat")
    write(folder / "chat.json", [])
    (folder / "linked").symlink_to(away)
    records, skipped = read_records(folder, data.open_pictures(folder), 1)
    assert [(r.image, r.answer) for r in records] == [
        ("a.avif", "a.txt here"), ("b.jfif", "b.TXT here"), ("deeper/c.PNG", "deeper/c.txt here"),
        ("photo.2020.tif", "photo.2020.txt here")]
    assert skipped["a .txt without a picture beside it"] == skipped["a picture without a .txt beside it"] == 1
    assert skipped["a.jpg, a.png and a.txt, or two texts: which belongs to which?"] == 3
    assert skipped["a .txt of several lines: is it one caption, or several?"] == 1
    assert sum(skipped.values()) == 8  # and a file and a link
    with pytest.raises(UserError, match="captions, for --stage 1"):
        read_records(folder, data.open_pictures(folder), 2)
    (folder / "a.txt").write_bytes(b"f\xfcr")
    records, skipped = read_records(folder, data.open_pictures(folder), 1)
    assert len(records) == 3 and skipped["a .txt that is no UTF-8 text"] == 1


def test_pictures_in_a_zip_are_read_in_place_also_below_one_folder(tmp_path):
    for name in ("1.jpg", "train2017/1.jpg"):
        pictures = Pictures(write_zip(tmp_path / "images.zip", [name, "__MACOSX/._1.jpg"]))
        assert pictures.find("1.jpg") == pictures.find(name) == name
        assert data.decode_image(pictures.open("1.jpg")).size == (40, 30)
        with pytest.raises(UserError, match="no such picture"):
            pictures.find("9.jpg")
    pictures = Pictures(write_zip(tmp_path / "two.zip", ["a/1.jpg", "b/1.jpg"]))
    with pytest.raises(UserError, match="no such picture"):  # of which?
        pictures.find("1.jpg")
    pictures = Pictures(write_zip(tmp_path / "a.zip", ["a/1.jpg", "a/a/1.jpg"]))
    assert pictures.find("a/1.jpg") == "a/1.jpg"


def test_other_spellings_of_a_name_are_found_in_a_zip_as_in_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(jpeg())
    for spelled in ("b/1.jpg", "./b/1.jpg", "b\\1.jpg", "b//1.jpg"):
        archive = Pictures(write_zip(tmp_path / "images.zip", ["c/2.jpg", spelled]))
        for name in ("b/1.jpg", "./b/1.jpg", "b//1.jpg", "b\\1.jpg", ".\\b/./1.jpg"):
            assert Pictures(tmp_path).find(name) == "b/1.jpg" and archive.find(name) == spelled
            assert archive.open(name).read() == Pictures(tmp_path).open(name).read() == jpeg()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_twice_in_a_zip_is_refused(tmp_path):
    for names in (["1.jpg", "2.jpg", "1.jpg"], ["1.jpg", "2.jpg", "./1.jpg"]):
        pictures = Pictures(write_zip(tmp_path / "images.zip", names))
        path = write(tmp_path / "data.json", [{"image": f"{i}.jpg", "conversations": CHAT} for i in (1, 2)])
        records, skipped = read_records(path, pictures, 2)
        assert [r.image for r in records] == ["2.jpg"] and one_reason(skipped, "twice", "1.jpg")


@pytest.mark.parametrize("name", ["../1.jpg", "a/../../1.jpg", "/1.jpg", "..\\1.jpg", "\\\\host\\1.jpg"])
def test_a_picture_name_cannot_leave_its_place(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "1.jpg").write_bytes(jpeg())
    for images in (tmp_path / "in", write_zip(tmp_path / "images.zip", [name])):
        with pytest.raises(UserError, match="not inside --images"):
            Pictures(images).open(name)


def test_a_broken_zip_and_broken_members_are_told(tmp_path, monkeypatch):
    content = write_zip(tmp_path / "a.zip", ["1.jpg", "2.jpg"]).read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    with pytest.raises(UserError, match="cut.zip: is neither a folder nor a whole zip archive"):
        Pictures(tmp_path / "cut.zip")
    (tmp_path / "b.zip").write_bytes(content.replace(jpeg(), jpeg()[:-1] + b"x", 1))
    with pytest.raises(UserError, match="can't be opened .*CRC"):
        Pictures(tmp_path / "b.zip").open("1.jpg")
    assert Pictures(tmp_path / "b.zip").open("2.jpg").read() == jpeg()
    monkeypatch.setattr(data, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        Pictures(tmp_path / "a.zip").open("1.jpg")


def test_a_zip_tells_a_changed_picture_by_its_checksum(tmp_path):
    pictures = Pictures(write_zip(tmp_path / "a.zip", ["1.jpg"]))
    before = pictures.state("1.jpg")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", jpeg()[:-1] + b"x")  # of the same size
    assert Pictures(tmp_path / "a.zip").state("1.jpg") != before != pictures.state("2.jpg")


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"))
def test_pictures_of_any_mode_become_rgb_from_a_path_or_a_file(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    assert data.load_image(path).mode == data.load_image(str(path)).mode == "RGB"
    assert data.decode_image(io.BytesIO(path.read_bytes())).tobytes() == data.load_image(path).tobytes()


def test_gray_of_16_bits_in_a_png_keeps_its_shades_and_other_gray_of_many_bits_is_left_out(tmp_path):
    """Whether 4,095, 65,535 or 1.0 is white, and whether white is high at all, Pillow does not tell."""
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(data.load_image(tmp_path / "a.png"))[:, :, 1].flatten(), np.arange(256))
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    for kind in ("uint16", "int32", "float32"):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / f"{kind}.tif")
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "signed.tif", tiffinfo={339: 2})
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / "colors.tif")
    colors = (tmp_path / "colors.tif").read_bytes()  # the same bytes as half as many pixels of twice the bits
    for tag, before, after in (("<HHII", (256, 4, 1, 16), (256, 4, 1, 8)), ("<3H", (8, 8, 8), (16, 16, 16))):
        assert colors.count(struct.pack(tag, *before)) == 1
        colors = colors.replace(struct.pack(tag, *before), struct.pack(tag, *after))
    (tmp_path / "colors.tif").write_bytes(colors)
    for name in ("a.pgm", "uint16.tif", "int32.tif", "float32.tif", "signed.tif", "colors.tif"):
        with pytest.raises(UserError, match=f"{name}: more than 8 bits"):
            data.load_image(tmp_path / name)


@pytest.mark.parametrize("mode", ("RGBA", "LA", "P"))
def test_what_is_transparent_becomes_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    picture.paste((9, 9, 9, 0), (4, 0, 8, 4))
    if mode == "P":
        picture = Image.new("P", (8, 4), 0)
        picture.putpalette([0, 0, 0, 9, 9, 9])
        picture.paste(1, (4, 0, 8, 4))
        picture.save(tmp_path / "a.png", transparency=1)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    assert sorted(data.load_image(tmp_path / "a.png").getcolors()) == [(16, (0, 0, 0)), (16, (255, 255, 255))]


@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_a_gray_that_a_png_calls_transparent_becomes_white_whatever_its_bits(bits):
    """Pillow names it in the file's bits: of 2 and 4 bits it found none, or black alone, and of 16 none."""
    most = 2 ** bits - 1
    values = sorted({0, 1, most // 3, most // 2, most})  # of 16 bits two are equal in 8
    for transparent in values:
        picture = np.asarray(data.decode_image(io.BytesIO(png(bits, 0, values, [transparent]))))
        expected = [255 if value == transparent else value * 255 // most for value in values]
        assert picture[0].tolist() == [[shade] * 3 for shade in expected], transparent


def test_a_color_that_a_png_calls_transparent_becomes_white_in_8_bits_and_is_refused_in_16():
    """Of 16 bits Pillow keeps 8: which pixels had that very color can't be known any more."""
    colors = [0, 0, 0, 1, 2, 3, 255, 9, 9]
    shown = data.decode_image(io.BytesIO(png(8, 2, colors, [1, 2, 3])))
    assert np.asarray(shown).tolist() == [[[0, 0, 0], [255, 255, 255], [255, 9, 9]]]
    with pytest.raises(UserError, match="a transparent color of 16 bits"):
        data.decode_image(io.BytesIO(png(16, 2, colors, [1, 2, 3])))


@pytest.mark.parametrize("ending", ("gif", "webp", "png", "tif"))
def test_of_several_frames_none_is_guessed_and_one_alone_is_read(tmp_path, ending):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"one.{ending}")
    frames[0].save(tmp_path / f"three.{ending}", save_all=True, append_images=frames[1:])
    assert data.load_image(tmp_path / f"one.{ending}").getpixel((0, 0))[0] > 250
    with pytest.raises(UserError, match=f"three.{ending}: several frames or pages: save the one that is meant"):
        data.load_image(tmp_path / f"three.{ending}")


def test_the_second_picture_in_a_phones_jpeg_is_a_preview_of_the_first(tmp_path):
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 15), "red")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert data.load_image(tmp_path / "a.jpg").size == (40, 30)


def test_where_alpha_is_0_everywhere_the_colors_are_shown(tmp_path):
    Image.new("RGBA", (8, 4), (200, 10, 30, 0)).save(tmp_path / "a.png")
    assert data.load_image(tmp_path / "a.png").getcolors() == [(32, (200, 10, 30))]


@pytest.mark.filterwarnings("ignore:::PIL")
def test_every_orientation_is_undone_as_pillow_does_and_odd_exif_costs_no_picture(tmp_path):
    """Pillow raises at tags of the wrong type when it writes EXIF back, and at broken EXIF when it reads it."""
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        source.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(np.asarray(data.load_image(tmp_path / "a.png")), np.asarray(expected))
    exif[0x0112], exif[0x010E] = 6, "a picture"
    blob, sizes = exif.tobytes(), set()
    for at in range(6, len(blob)):
        for value in (0, 1, 7, 255):
            odd = blob[:at] + bytes([value]) + blob[at + 1:]
            Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=odd)
            sizes.add(data.load_image(tmp_path / "a.jpg").size)
    assert sizes == {(30, 40), (40, 30)}


def test_what_is_no_picture_too_large_or_too_narrow_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(UserError, match="a.heic: no picture that can be read .convert HEIC"):
        data.load_image(tmp_path / "a.heic")
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:-200])
    with pytest.raises(UserError, match="cut.jpg: a picture that can't be read"):
        data.load_image(tmp_path / "cut.jpg")
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    Image.new("1", (40, 30)).save(tmp_path / "wide.png")
    Image.new("1", (900, 1)).save(tmp_path / "narrow.png")  # resized to a side of 224, it would be 201,600 wide
    for name in ("wide.png", "narrow.png"):
        with pytest.raises(UserError, match=f"{name}: a picture with too many pixels, or too narrow"):
            data.load_image(tmp_path / name)


@pytest.mark.parametrize("stage, folder, files, words", [
    (1, "llava-cc3m-595k", ("chat.json", "images.zip"), [
        "hf download liuhaotian/LLaVA-CC3M-Pretrain-595K chat.json", "595,375 pictures", "several GB"]),
    (2, "llava-instruct-150k", ("llava_instruct_150k.json", "train2017.zip"), [
        "hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json", "curl -L -C -", "19 GB",
        "http://images.cocodataset.org/zips/train2017.zip"])])
def test_published_data_is_found_or_the_commands_that_fetch_it_are_told(tmp_path, stage, folder, files, words):
    home = tmp_path / "my out" / "data" / folder
    home.mkdir(parents=True)
    for present in ((), files[:1], files[1:]):
        for name in files:
            (home / name).unlink(missing_ok=True)
        for name in present:
            (home / name).touch()
        with pytest.raises(UserError) as error:
            data.published_data(stage, tmp_path / "my out")
    for word in [*words, "--data", "--repo-type dataset", f"--local-dir '{home}'", *files]:
        assert word in str(error.value)
    for name in files:
        (home / name).touch()
    assert data.published_data(stage, tmp_path / "my out") == tuple(Path(home, name) for name in files)


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "AVIF"))
def test_a_picture_whose_end_is_zeros_is_told(kind):
    """A disk or a download that stopped may leave the whole length, and Pillow takes the zeros for data."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    for picture in (noise, Image.new("RGB", (120, 90)), Image.new("RGB", (1, 1), "white")):
        stream = io.BytesIO()
        picture.save(stream, kind)
        data.decode_image(stream)
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(stream, kind) if kind == "PNG" else noise.save(stream, kind)
    whole = stream.getvalue()
    half = whole[:len(whole) // 2]
    with pytest.raises(UserError, match="zeros at its end"):
        data.decode_image(io.BytesIO(half + bytes(len(whole) - len(half))))


def test_a_turned_tiff_is_the_same_by_its_path_and_from_a_file(tmp_path):
    """Pillow maps an uncompressed TIFF into memory by its path, and after turning reads it by the wrong width."""
    picture = Image.effect_noise((40, 24), 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "a.tif", exif=exif)
    with open(tmp_path / "a.tif", "rb") as file:
        turned = data.decode_image(file)
    assert turned.size == (24, 40)
    assert data.load_image(tmp_path / "a.tif").tobytes() == turned.tobytes()
    assert turned.tobytes() == picture.transpose(Image.Transpose.ROTATE_270).convert("RGB").tobytes()


@pytest.mark.parametrize("choices", [["red", "Red"], ["red", "red "]])
def test_choices_that_are_one_answer_are_refused(tmp_path, choices):
    item = {"image": "a.jpg", "question": "What?", "answer": "red", "choices": [choices]}
    with pytest.raises(UserError, match="a choice that is there twice"):
        read(tmp_path, [item])
