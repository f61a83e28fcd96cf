"""What is read, and what is left out with which reason: data files, folders, zip archives and pictures."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

import data
from data import Pictures, Record, read_records
from lmeye import UserError

CHAT = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}]


def turns(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def talk(*texts, **more):
    """An item about a.jpg: a conversation of these texts, with more fields."""
    return {"image": "a.jpg", "conversations": turns(*texts), **more}


def captioned(caption, **more):
    return {"image": "a.jpg", "caption": caption, **more}


GOOD = {"image": "a.jpg", "conversations": CHAT}
SHORT = {"image": "a.jpg", "question": "What? ", "answer": "A cat."}


def jpeg(color="red"):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(stream, "JPEG")
    return stream.getvalue()


def png(bits, color, values, transparent):
    """A PNG of one row, as written by hand: color 0 is gray, 2 is RGB (three values a pixel)."""
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

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


@pytest.mark.parametrize("item, stage, answers", [
    (GOOD, 1, ["A cat."]),  # LLaVA's pretraining: the question is only "describe it"
    (GOOD, 2, ["A cat."]),
    (SHORT, 2, ["A cat."]),
    (talk("What?", "A cat.", "Why?", "So."), 2, ["A cat.", "So."]),
    (talk("What?", "A cat.", "Why?", "So.", caption=" A\non a mat. "), 1, ["A on a mat."]),
    (talk("What?", "A cat.", "Why?", "So.", caption=" A\non a mat. "), 2, ["A cat.", "So."]),
    (talk(conversations=turns("What?", "A cat.", roles=("user", "assistant"))), 2, ["A cat."]),
])
def test_a_caption_is_a_record_and_so_is_each_answer_with_the_turns_before_it(tmp_path, item, stage, answers):
    records, skipped = read(tmp_path, [item | {"id": 7, "category": "pet"}], stage)
    prompts = [(), ()] if stage == 1 else [("What?",), ("What?", "A cat.", "Why?")]
    assert records == [Record("a.jpg", *pair, "pet", 7) for pair in zip(prompts, answers)]
    assert not skipped


def test_earlier_turns_stand_in_the_prompt_as_they_were_trained():
    assert data.dialogue(("What?", "a cat", "Where?")) == "What?\nAnswer: a cat\nQuestion: Where?"


def test_a_file_of_one_record_may_be_written_over_several_lines(tmp_path):
    records, skipped = read(tmp_path, json.dumps(captioned("A cat."), indent=2), 1)
    assert [r.answer for r in records] == ["A cat."] and not skipped


@pytest.mark.parametrize("texts", [
    ("<image>\nWhat?", "a cat"),
    ("What?\n<image>", "a cat"),
    (" <image>What? ", "a cat"),
])
def test_image_is_a_placeholder_at_one_end_of_the_first_question(tmp_path, texts):
    assert read(tmp_path, [talk(*texts)])[0] == [Record("a.jpg", ("What?",), "a cat")]


@pytest.mark.parametrize("texts", [
    ("<image><image>\nWhat?", "a cat"),
    ("<image>\nAnd this?\n<image>", "a cat"),
    ("Of <image>, what?", "a cat"),
    ("<image>\nWhat?", "a cat", "<image>\nAnd this?", "a dog"),
    ("What?", "as in <image>"),
    ("<image 1> What?", "a cat"),  # other programs' marks
    ("<ImageHere> What?", "a cat"),
    ("<|image_1|> What?", "a cat"),
    ("<video> What?", "a cat"),
    ("<img>a.jpg</img> What?", "a cat"),
    ("<image_placeholder> What?", "a cat"),
])
def test_elsewhere_image_is_about_another_picture(tmp_path, texts):
    """As text, the model would learn to read and write it."""
    for stage in (1, 2):
        records, skipped = read(tmp_path, [talk(*texts), GOOD], stage)
        assert len(records) == 1 and one_reason(skipped, '"<image>"')


def test_other_words_in_angle_brackets_are_text(tmp_path):
    talked = talk("Is 1 <imagine> <b> or <img src='a.jpg'>?", "no")
    assert not read(tmp_path, [talked])[1]
    caption = {"image": "a.jpg", "caption": "<image> is a tag"}
    assert read(tmp_path, [caption], 1)[0][0].answer == "<image> is a tag"


def test_a_category_is_any_value_but_none(tmp_path):
    values = ["color", 0, False, "", None, " \x1b", 1.5, "a\x1b[2J\nb"]
    records, _ = read(tmp_path, [captioned("x", category=value) for value in values] + [captioned("x")], 1)
    assert [r.category for r in records] == ["color", "0", "False", *["all"] * 3, "1.5", "a[2J b", "all"]


@pytest.mark.parametrize("item", [
    {"image": "a.jpg", "question": "What?"},
    SHORT | {"answer": None},
    SHORT | {"answer": " "},
    talk("What?"),
])
def test_a_question_without_an_answer_is_left_out_of_training_and_kept_for_an_evaluation(tmp_path, item):
    records, skipped = read(tmp_path, [item, GOOD])
    assert len(records) == 1 and one_reason(skipped, "a question without an answer (as with a.jpg)")
    records, skipped = read(tmp_path, [item, GOOD], answered=False)
    assert records[0] == Record("a.jpg", ("What?",), "") and not skipped


def test_a_dialogue_may_end_with_a_question_without_an_answer(tmp_path):
    dialogue = talk("What?", "a cat", "Why?")
    answered, open_one = Record("a.jpg", ("What?",), "a cat"), Record("a.jpg", ("What?", "a cat", "Why?"), "")
    assert read(tmp_path, [dialogue])[0] == [answered]
    assert read(tmp_path, [dialogue], answered=False)[0] == [answered, open_one]


def test_choices_are_a_list_of_texts_for_each_answer(tmp_path):
    records, _ = read(tmp_path, [talk("What?", "b", "Why?", "d", choices=[["a", "b"], ["c", "d", "e"]])])
    assert [r.choices for r in records] == [("a", "b"), ("c", "d", "e")]
    records, _ = read(tmp_path, [talk("What?", choices=[["a", "b"]])], answered=False)
    assert records == [Record("a.jpg", ("What?",), "", choices=("a", "b"))]


@pytest.mark.parametrize("choices", [
    7, ["b", "d"], [["a", "b"]],
    [["a", "b"], ["d"], []],
    [["a", "b"], "cd"],
    [["a", "b"], ["d", 4]],
    [["a", "b"], ["d", ""]],
    [["a", "c"], ["d", "e"]],  # without the answer, which is b
    [["a", "b", "B "], ["d", "e"]],
])
def test_odd_choices_leave_their_record_out(tmp_path, choices):
    records, skipped = read(tmp_path, [talk("What?", "b", "Why?", "d", choices=choices), GOOD])
    assert len(records) == 1 and one_reason(skipped, "choice")


@pytest.mark.parametrize("item, reason", [
    ({"conversations": CHAT}, "no picture"),
    (GOOD | {"image": 7}, "no text"),
    (GOOD | {"image": "\ud800.jpg"}, "no text"),
    (GOOD | {"image": "a.jpg\0"}, "no text"),
    (GOOD | {"image": "z.jpg"}, "no such picture in .*--images.*z.jpg"),
    (GOOD | {"image": "b"}, "no such picture"),
    (captioned("a cat"), "captions, for --stage 1"),
    (talk("<image>", "a cat"), "captions, for --stage 1"),
    ({"image": "a.jpg"}, 'no known kind: it needs "image" with .* and has image'),
    ({"images": [], "annotations": []}, "has images, annotations .*published.py"),
    ("a.jpg", "no object"),
    (None, "no object"),
    (talk("What?", 5), "another type"),
    (talk(conversations="What?"), "another type"),
    (talk(conversations=[{"value": "What?"}]), "lacks a field"),
    (SHORT | {"answer": 0}, "another type"),
    (SHORT | {"conversations": CHAT}, "has both"),
    (talk("What?", "a cat", "", "here"), "are empty"),
    (talk("What?", "", "Where?", "here"), "are empty"),
    (talk("What?", "a \ud800 cat"), "are empty"),
    (talk(conversations=turns("What?", "A cat.", roles=("system", "gpt"))), "alternate"),
    (talk(conversations=CHAT + turns("And a dog.", "Why?", roles=("gpt", "human"))), "alternate"),
    (talk(conversations=CHAT + turns("Why?", "Be kind.", roles=("human", "system"))), "alternate"),
])
def test_an_odd_record_is_left_out_and_counted(tmp_path, item, reason):
    records, skipped = read(tmp_path, [item, GOOD, item])
    assert len(records) == 1 and list(skipped.values()) == [2]
    with pytest.raises(UserError, match=f"data.json: not one of 1 records can be used .*: .*{reason}"):
        read(tmp_path, [item])


@pytest.mark.parametrize("item, reason", [
    (captioned(7), "another type"),
    (captioned(None), "empty"),
    (captioned("\0"), "empty or unreadable"),
    (SHORT, "questions, for --stage 2"),  # "red" is no caption
    (talk("What?", "a cat", "Where?", "here"), "questions, for --stage 2"),
    (talk("Describe it.", " "), "empty"),
    (talk(conversations=turns("a cat", "Describe it.", roles=("gpt", "human"))), "--stage 2"),
])
def test_an_odd_caption_is_left_out_and_counted(tmp_path, item, reason):
    records, skipped = read(tmp_path, [item, captioned("<image> is a tag")], 1)
    assert records == [Record("a.jpg", (), "<image> is a tag")] and one_reason(skipped, reason)


def test_fields_that_are_not_read_are_noted_by_their_names(tmp_path):
    items = [SHORT | {"id": 1, "category": "pet"}, SHORT | {"choice": 3},
             SHORT | {"Category": 1, "choice": 2, "w": 0, "z": 0}, talk("What?", "A cat.")]
    items[-1]["conversations"][1]["w"] = 0  # LLaVA's trainer leaves out the loss of such a turn
    noted = Counter()
    read(tmp_path, items)
    read_records(tmp_path / "data.json", Pictures(tmp_path), 2, noted=noted)
    assert noted == {"fields that are not read: choice (2), w (2), Category (1)": 4}


def test_a_key_that_is_there_twice_leaves_its_record_out(tmp_path):
    good = json.dumps(GOOD)
    twice = good.replace('"image"', '"image": "b/c.jpg", "image"')
    nested = good.replace('"value": "A cat."', '"value": "A cat.", "value": "A dog."')
    for text in (f"[{twice}, {good}, {nested}]", f"{twice}\n{good}\n{nested}"):
        records, skipped = read(tmp_path, text)
        assert len(records) == 1 and one_reason(skipped, "has one twice", n=2)


@pytest.mark.parametrize("text, reason", [
    ("", "it holds none"),
    ("{}", "no known kind"),
    ("3", "no object"),
    ("a cat\nand a dog", "not JSON"),
    ('[{"image": "a.jpg"', "broken JSON, or cut off"),
    ("[" * 100_000, "broken JSON"),
])
def test_a_file_with_nothing_to_read_is_named_in_one_line(tmp_path, text, reason):
    with pytest.raises(UserError, match=f"data.json: .*{reason}"):
        read(tmp_path, text)


@pytest.mark.parametrize("end", ("\n", "\n,]"))
def test_a_list_that_is_cut_off_or_has_a_slip_is_not_read_as_json_lines(tmp_path, end):
    """One record a line: the last has no comma behind it, and would be all that is read."""
    text = "[\n" + ",\n".join([json.dumps(captioned("A cat."))] * 5)
    assert len(read(tmp_path, text + "\n]", 1)[0]) == 5
    with pytest.raises(UserError, match=r"data.json: is broken JSON, or cut off \(.*line \d"):
        read(tmp_path, text + end, 1)


def test_json_lines_end_at_line_feeds_alone_and_a_broken_one_is_counted(tmp_path):
    line = json.dumps(talk("What is\u2028it?", "A\x85cat."), ensure_ascii=False)
    records, skipped = read(tmp_path, f"\ufeff{line}\r\n\n{line}\n{line[:-3]}")
    assert [r.answer for r in records] == ["A\x85cat."] * 2
    assert one_reason(skipped, "a line that is not JSON (as with {")
    assert len(read(tmp_path, line)[0]) == 1  # one line alone


@pytest.mark.parametrize("content, reason", [
    ('[{"caption": "für"}]'.encode("latin-1"), "data.json: is not UTF-8 text at byte 15: save it as UTF-8"),
    ("[]".encode("utf-16"), "data.json: is not UTF-8 text at byte 0"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, .*: run  git lfs pull"),
])
def test_a_data_file_that_is_no_utf_8_text_is_told(tmp_path, content, reason):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_records(tmp_path / "data.json", Pictures(tmp_path), 1)


def test_what_is_no_file_is_told_and_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("pipe.jpg", "no/such.json"):
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}: no such file"):
            read_records(tmp_path / name, Pictures(tmp_path), 1)
    with pytest.raises(UserError, match="pipe.jpg: no such folder or zip archive"):
        Pictures(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match="pipe.jpg: no such picture"):
        data.load_image(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match="a folder, not a picture"):
        data.load_image(tmp_path)
    records, skipped = read(tmp_path, [GOOD | {"image": "pipe.jpg"}, GOOD])
    assert len(records) == 1 and one_reason(skipped, "no such picture")


def test_a_folder_of_captions_passes_over_nothing(tmp_path):
    folder = tmp_path / "data"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.avif", "b.jpg", "deeper/c.PNG", "e.2020.tif", "one.jpg", "two.jpg", "p.jpg", "p.png",
                 "lines.jpg"):
        Image.new("RGB", (40, 30)).save(folder / name)
    for name in ("a.txt", "b.TXT", "deeper/c.txt", "e.2020.txt", "f.txt", "two.txt", "two.TXT", "p.txt"):
        write(folder / name, f"\ufeff\n{name} here\r\n")
    write(folder / "lines.txt", "a cat\u2028there is a cat\ra black cat")
    write(folder / "chat.json", [])
    (folder / "linked").symlink_to(tmp_path)
    (folder / "latin.txt").write_bytes(b"f\xfcr")
    (folder / "latin.jpg").write_bytes(jpeg())
    records, skipped = read_records(folder, data.open_pictures(folder), 1)
    assert [(r.image, r.answer) for r in records] == [
        ("a.avif", "a.txt here"), ("b.jpg", "b.TXT here"), ("deeper/c.PNG", "deeper/c.txt here"),
        ("e.2020.tif", "e.2020.txt here")]
    assert skipped == {
        "a .txt without a picture beside it (as with f.txt)": 1,
        "a picture without a .txt beside it (as with one.jpg)": 1,
        "a.jpg, a.png and a.txt, or two texts: which belongs to which? (as with p.jpg)": 3,
        "a .txt that is no UTF-8 text (as with latin.jpg)": 1,
        "a .txt of several lines: is it one caption, or several? (as with lines.jpg)": 1,
        "a file or link in a folder that is neither picture nor .txt (name a .json itself) "
        "(as with chat.json)": 2}
    with pytest.raises(UserError, match="captions, for --stage 1"):
        read_records(folder, data.open_pictures(folder), 2)


def test_pictures_in_a_zip_are_read_in_place_also_below_one_folder(tmp_path):
    for name in ("1.jpg", "train2017/1.jpg"):
        pictures = Pictures(write_zip(tmp_path / "images.zip", [name, "__MACOSX/._1.jpg"]))
        assert pictures.find("1.jpg") == pictures.find(name) == name
        assert data.decode_image(pictures.open("1.jpg")).size == (40, 30)
        with pytest.raises(UserError, match="no such picture"):
            pictures.find("9.jpg")


def test_a_zips_one_folder_is_left_out_only_where_that_tells_which_picture_is_meant(tmp_path):
    pictures = Pictures(write_zip(tmp_path / "two.zip", ["a/1.jpg", "b/1.jpg"]))
    with pytest.raises(UserError, match="no such picture"):  # of which?
        pictures.find("1.jpg")
    pictures = Pictures(write_zip(tmp_path / "a.zip", ["a/1.jpg", "a/a/1.jpg"]))
    assert pictures.find("a/1.jpg") == "a/1.jpg"


def test_other_spellings_of_a_name_are_found_in_a_zip_as_in_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.jpg").write_bytes(jpeg())
    names = ("b/1.jpg", "./b/1.jpg", "b//1.jpg", "b\\1.jpg", ".\\b/./1.jpg")
    for name in names:
        assert Pictures(tmp_path).open(name).read() == jpeg()
    for spelled in names[:4]:
        archive = Pictures(write_zip(tmp_path / "images.zip", ["c/2.jpg", spelled]))
        assert [archive.find(name) for name in names] == [spelled] * 5


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("again", ("1.jpg", "./1.jpg"))
def test_a_name_that_is_twice_in_a_zip_is_refused(tmp_path, again):
    pictures = Pictures(write_zip(tmp_path / "images.zip", ["1.jpg", "2.jpg", again]))
    assert pictures.find("2.jpg") == "2.jpg"
    with pytest.raises(UserError, match="twice"):
        pictures.find("1.jpg")


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
    with pytest.raises(UserError, match="can't be opened .*CRC-32 for file …"):  # the same of all pictures
        Pictures(tmp_path / "b.zip").open("1.jpg")
    assert Pictures(tmp_path / "b.zip").open("2.jpg").read() == jpeg()
    monkeypatch.setattr(data, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        Pictures(tmp_path / "a.zip").open("1.jpg")


def test_a_zip_tells_a_changed_picture_by_its_checksum(tmp_path):
    before = Pictures(write_zip(tmp_path / "a.zip", ["1.jpg"])).state("1.jpg")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", jpeg()[:-1] + b"x")  # of the same size
    assert Pictures(tmp_path / "a.zip").state("1.jpg") != before


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
    with pytest.raises(UserError, match=f"three.{ending}: several frames or pages"):
        data.load_image(tmp_path / f"three.{ending}")


def test_the_second_picture_in_a_phones_jpeg_is_a_preview_of_the_first(tmp_path):
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 15), "red")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert data.load_image(tmp_path / "a.jpg").size == (40, 30)


def test_where_alpha_is_0_everywhere_the_colors_are_shown(tmp_path):
    Image.new("RGBA", (8, 4), (200, 10, 30, 0)).save(tmp_path / "a.png")
    assert data.load_image(tmp_path / "a.png").getcolors() == [(32, (200, 10, 30))]


def turned(orientation):
    """EXIF of a picture that has to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_every_orientation_is_undone_as_pillow_does(tmp_path):
    source = Image.effect_noise((8, 6), 90)
    for orientation in range(1, 9):
        source.save(tmp_path / "a.png", exif=turned(orientation))
        with Image.open(tmp_path / "a.png") as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert data.load_image(tmp_path / "a.png").tobytes() == expected.tobytes()


def test_odd_exif_costs_no_picture(tmp_path):
    """Pillow raises where it writes EXIF back and a tag has another type: here the width is a text."""
    exif = turned(6)
    exif[0x010E] = "a picture"
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif.tobytes().replace(b"\x01\x0e", b"\x01\x00"))
    assert sorted(data.load_image(tmp_path / "a.jpg").size) == [30, 40]


def test_a_turned_tiff_is_read_by_its_path_as_from_a_file(tmp_path):
    """Pillow maps an uncompressed TIFF into memory by its path, and after turning reads it wrongly."""
    picture = Image.effect_noise((40, 24), 90)
    picture.save(tmp_path / "a.tif", exif=turned(6))  # by 90 degrees
    expected = picture.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    found = data.load_image(tmp_path / "a.tif")
    assert found.size == (24, 40) and found.tobytes() == expected.tobytes()


def test_what_is_no_picture_too_large_or_too_narrow_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(UserError, match="a.heic: no picture that can be read .convert HEIC"):
        data.load_image(tmp_path / "a.heic")
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:-200])
    with pytest.raises(UserError, match="cut.jpg: a picture that can't be read"):
        data.load_image(tmp_path / "cut.jpg")
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    Image.new("1", (40, 30)).save(tmp_path / "wide.png")
    Image.new("1", (900, 1)).save(tmp_path / "narrow.png")  # 201,600 wide with a side of 224
    for name in ("wide.png", "narrow.png"):
        with pytest.raises(UserError, match=f"{name}: a picture with too many pixels, or too narrow"):
            data.load_image(tmp_path / name)


@pytest.mark.parametrize("stage, folder, files, words", [
    (1, "llava-cc3m-595k", ("chat.json", "images.zip"),
     ["hf download liuhaotian/LLaVA-CC3M-Pretrain-595K chat.json images.zip", "595,375 pictures"]),
    (2, "llava-instruct-150k", ("llava_instruct_150k.json", "train2017.zip"),
     ["hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json", "19 GB", "curl -L -C -",
      "/train2017.zip http://images.cocodataset.org/zips/train2017.zip"]),
])
def test_published_data_is_found_or_how_to_fetch_it_is_told(tmp_path, stage, folder, files, words):
    home = tmp_path / "my out" / "data" / folder
    home.mkdir(parents=True)
    for name in files:  # while one of them is missing
        with pytest.raises(UserError) as error:
            data.published_data(stage, tmp_path / "my out")
        for word in [*words, "--data", "--repo-type dataset", f"--local-dir '{home}'"]:
            assert word in str(error.value)
        (home / name).touch()
    assert data.published_data(stage, tmp_path / "my out") == tuple(home / name for name in files)


def test_a_picture_may_be_a_file_of_a_few_bytes(tmp_path):
    (tmp_path / "blue.ppm").write_bytes(b"P6 1 1 255\n\0\0\xff")
    assert data.load_image(tmp_path / "blue.ppm").getpixel((0, 0)) == (0, 0, 255)


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
    if kind in ("JPEG", "PNG"):  # some cameras write zeros behind the end
        data.decode_image(io.BytesIO(whole + bytes(3000)))


@pytest.mark.parametrize("choices", [["red", "Red"], ["red", "red "]])
def test_choices_that_are_one_answer_are_refused(tmp_path, choices):
    item = {"image": "a.jpg", "question": "What?", "answer": "red", "choices": [choices]}
    with pytest.raises(UserError, match="a choice that is there twice"):
        read(tmp_path, [item])
