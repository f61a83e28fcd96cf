"""Records, pictures, features and batches: what is skipped is counted, what is kept belongs together."""

import json
import os
import time
import warnings

import numpy as np
import pytest
import torch
from benchmark import llava_like_lengths
from conftest import tiny_model
from PIL import Image, ImageOps

import data
from data import Record, Skip, read_records
from data import dialogue
from lmeye import UserError


def save_picture(path, color="red", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def llava(tmp_path, items):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(items))
    return path


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_a_folder_of_captions(tmp_path):
    save_picture(tmp_path / "a.jpg")
    save_picture(tmp_path / "deeper" / "b.PNG")
    save_picture(tmp_path / "c.jpg")
    (tmp_path / "a.txt").write_text("a red\n picture \n")
    (tmp_path / "deeper" / "b.txt").write_text("another")
    records, skips = read_records([tmp_path], None, 1)
    assert records == [Record(str(tmp_path / "a.jpg"), (), "a red picture"),
                       Record(str(tmp_path / "deeper" / "b.PNG"), (), "another")]
    assert len(skips) == 1 and "caption" in skips[0].reason


def test_llava_pretraining_takes_the_caption_alone(tmp_path):
    path = llava(tmp_path, [
        {"id": "1", "image": "a.jpg", "conversations": turns("Describe it.\n<image>", "a cat")},
        {"id": "2", "image": "b/c.jpg", "conversations": turns("<image>\nWhat is this?", "a dog ")}])
    records, skips = read_records([path], [tmp_path], 1)
    assert records == [Record(f"{tmp_path}/a.jpg", (), "a cat"), Record(f"{tmp_path}/b/c.jpg", (), "a dog")]
    assert not skips


def test_llava_instructions_become_a_record_a_turn(tmp_path):
    path = llava(tmp_path, [{"image": "a.jpg", "conversations": turns("<image>\nWhat?", "a cat", "Where?", "here")}])
    records, _ = read_records([path], [tmp_path], 2)
    assert records == [Record(f"{tmp_path}/a.jpg", ("What?",), "a cat"),
                       Record(f"{tmp_path}/a.jpg", ("What?", "a cat", "Where?"), "here")]
    assert records[1].question == "What?\nAnswer: a cat\nQuestion: Where?" == dialogue(records[1].turns)


@pytest.mark.parametrize("item, reason", [
    ({"conversations": turns("What?", "a cat")}, "no picture"),
    ({"image": 7, "conversations": turns("What?", "a cat")}, "no text"),
    ({"image": "../a.jpg", "conversations": turns("What?", "a cat")}, "not inside --images"),
    ({"image": "/etc/a.jpg", "conversations": turns("What?", "a cat")}, "not inside --images"),
    ({"image": "a.jpg"}, "no known kind, with the fields image"),
    ({"image": "a.jpg", "caption": 7}, "lacks a field"),
    (["a.jpg"], "lacks a field"),
    (7, "lacks a field"),
    ({"image": "a.jpg", "conversations": turns("What?")}, "alternate"),
    ({"image": "a.jpg", "conversations": turns("What?", " ")}, "alternate"),
    ({"image": "a.jpg", "conversations": turns("What?", 5)}, "lacks a field"),
    ({"image": "a.jpg", "conversations": turns("What?", "a cat")[::-1]}, "alternate"),
])
def test_an_odd_record_is_skipped_and_counted(tmp_path, item, reason):
    good = {"image": "a.jpg", "conversations": turns("What?", "a cat")}
    records, skips = read_records([llava(tmp_path, [item, good])], [tmp_path], 2)
    assert len(records) == 1 and len(skips) == 1 and reason in skips[0].reason


def test_of_a_chat_the_answered_turns_are_kept_and_the_rest_is_counted(tmp_path):
    good = turns("What?", "a cat", "Where?", "here")
    out_of_turn = good + [{"from": "gpt", "value": "And a dog."}, {"from": "human", "value": "Why?"}]
    for chat in (good + turns("Why?"), good + turns("Why?", " "), good + turns("<image>", "so"), out_of_turn):
        records, skips = read_records([llava(tmp_path, [{"image": "a.jpg", "conversations": chat}])], [tmp_path], 2)
        assert [(r.turns, r.answer) for r in records] == [(("What?",), "a cat"), (("What?", "a cat", "Where?"), "here")]
        assert len(skips) == 1 and "rest of a chat" in skips[0].reason


def test_a_human_who_says_no_more_than_image_asks_for_a_caption(tmp_path):
    path = llava(tmp_path, [{"image": "a.jpg", "conversations": turns("<image>\n", "a cat")}])
    assert read_records([path], [tmp_path], 1) == ([Record(f"{tmp_path}/a.jpg", (), "a cat")], [])
    with pytest.raises(UserError, match="a caption, for --stage 1"):
        read_records([path], [tmp_path], 2)


def test_of_a_long_chat_the_newest_turns_that_fit_stand_in_the_prompt(tmp_path):
    """In a time that grows with the chat, not with its square; the shortened prompts are counted."""
    model = tiny_model()
    save_picture(tmp_path / "a.jpg")
    chat = turns(*[f"what color is the red thing {'at the left ' * (i % 3)}" for i in range(800)])
    records, skips = read_records([llava(tmp_path, [{"image": "a.jpg", "conversations": chat}])], [tmp_path], 2)
    start = time.perf_counter()
    some = data.encode(model, records, skips)
    assert time.perf_counter() - start < 15
    assert len(some.records) == 400 and len(skips) > 390 and all(skip.key == "" for skip in skips)
    assert sum("oldest turns" in skip.reason for skip in skips) == len(skips)
    for before, record, (question, answer) in zip(records, some.records, some.tokens):
        assert record.answer == before.answer and before.turns[-len(record.turns):] == record.turns
        assert len(record.turns) % 2 == 1 and len(question) + len(answer) <= model.max_text_tokens
        if len(record.turns) < len(before.turns):  # one more question and answer would not have fitted
            more = before._replace(turns=before.turns[-len(record.turns) - 2:])
            question, answer = model.token_ids([more.question], [more.answer])
            assert len(question[0]) + len(answer[0]) > model.max_text_tokens
    short = [r for r in records if len(r.turns) == 1]
    assert some.records[0] == short[0]


def test_too_long_records_are_left_out_and_counted_with_their_keys(tmp_path):
    model = tiny_model()
    save_picture(tmp_path / "a.jpg")
    picture, long = str(tmp_path / "a.jpg"), "red " * model.max_text_tokens
    records = [Record(picture, ("what color?",), "red", key=1), Record(picture, (long,), "red", key=2),
               Record(picture, ("what color?",), long, key=3),
               Record(picture, ("what color?",), "red", key=4, choices=("red", "blue", long, "green")),
               Record(picture, ("what?", long, "what color?"), "red", key=5)]
    skips = []
    some = data.encode(model, records, skips)
    assert [(r.key, r.turns[-1]) for r in some.records] == [(1, "what color?"), (5, "what color?")]
    too_long = [skip.key for skip in skips if "longer" in skip.reason]
    assert too_long == [2, 3, ""] and len(skips) == 4  # choices are not of VQA
    with pytest.raises(UserError, match="not one of 3 records can be used: longer"):
        data.encode(model, records[1:4], [])


def test_of_a_prompt_with_choices_no_turn_is_left_out(tmp_path):
    """A rationale is one of a question and its answer: without these it would be chosen for nothing."""
    model, skips = tiny_model(), []
    save_picture(tmp_path / "a.jpg")
    four, long = ("red", "blue", "green", "white"), "red " * (model.max_text_tokens - 5)
    whole = Record(str(tmp_path / "a.jpg"), ("what color?",), "red", key="0", choices=four)
    records = [whole, whole._replace(turns=("what color?", long, "Why?"))]
    assert data.encode(model, records, skips).records == records[:1]
    assert [skip.reason for skip in skips] == ["longer than the language model's context"]


def test_reasons_are_reported_by_how_often_they_occur(capsys):
    data.report_skips([Skip("rare\x1b[2J")] + [Skip("often", i) for i in range(1200)])
    assert capsys.readouterr().out == "  skipped 1,200: often\n  skipped 1: rare[2J\n"
    data.report_skips([Skip(f"reason {i}") for i in range(12)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 11 and out[-1] == "  skipped 2: other reasons"


@pytest.mark.parametrize("text", ["", "{", "{}", "3", "[]", '[{"image": "../a.jpg"}]', "\x00"])
def test_a_file_with_nothing_to_read_is_named_in_one_line(tmp_path, text):
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(UserError, match="chat.json"):
        read_records([tmp_path / "chat.json"], [tmp_path], 1)


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"))
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    assert data.load_image(path).mode == "RGB"


def test_gray_of_16_bits_keeps_its_shades(tmp_path):
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "a.png")
    assert np.ptp(np.asarray(data.load_image(tmp_path / "a.png"))) == 255
    assert abs(np.asarray(data.load_image(tmp_path / "a.png")).mean() - 127.5) < 1


def shades(path):
    return np.asarray(data.load_image(path))[:, :, 0].flatten()


def test_gray_of_more_than_8_bits_is_neither_white_nor_black(tmp_path):
    """Against the values by hand; Pillow's own conversion cuts all of these off at 0 or 255."""
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + (ramp * 65535).astype(">u2").tobytes())
    for kind, scale in (("int32", 1e9), ("int32", 40_000), ("int32", 255), ("float32", 1), ("float32", 255),
                        ("float32", 1e6)):
        Image.fromarray((ramp * scale).astype(kind)).save(tmp_path / f"{kind}{scale}.tif")
    Image.fromarray((ramp - 0.5).astype("float32")).save(tmp_path / "signed.tif")
    for path in tmp_path.iterdir():
        expected = ramp.flatten() * (40_000 / 256 if "40000" in path.name else 255)
        assert np.abs(shades(path).astype(int) - expected).max() <= 2, path
    odd = ramp.astype("float32")
    odd[0] = (np.nan, np.inf, -np.inf) * 5 + (0.5,)
    Image.fromarray(odd).save(tmp_path / "odd.tif")
    assert shades(tmp_path / "odd.tif")[:3].tolist() == [0, 0, 0] and shades(tmp_path / "odd.tif")[-1] == 255
    Image.new("F", (8, 8), 300.0).save(tmp_path / "flat.tif")
    assert len(set(shades(tmp_path / "flat.tif"))) == 1


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


def test_odd_exif_costs_no_picture(tmp_path):
    """Pillow raises at tags of the wrong type when it writes EXIF back, and at broken EXIF when it reads it."""
    whole = Image.Exif()
    whole[0x0112], whole[0x010E] = 6, "a picture"
    blob = whole.tobytes()
    save_picture(tmp_path / "plain.jpg")
    sizes = set()
    for at in range(6, len(blob)):
        for value in (0, 1, 7, 255):
            odd = blob[:at] + bytes([value]) + blob[at + 1:]
            Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=odd)
            sizes.add(data.load_image(tmp_path / "a.jpg").size)
    assert sizes == {(30, 40), (40, 30)}


def test_every_orientation_is_undone_as_pillow_does(tmp_path):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        source.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(np.asarray(data.load_image(tmp_path / "a.png")), np.asarray(expected))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_a_picture_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="no file"):
        data.load_image(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b.txt")
    save_picture(tmp_path / "b.jpg")
    with pytest.raises(UserError, match="b.txt"):
        read_records([tmp_path], None, 1)


def broken_pictures(folder):
    save_picture(folder / "whole.jpg", size=(300, 300))
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "empty.jpg").write_bytes(b"")
    return ["truncated.jpg", "text.jpg", "empty.jpg", "missing.jpg"]


def test_broken_pictures_are_left_out_and_counted(tmp_path):
    """Not replaced by others, not passed over in silence."""
    names = ["whole.jpg", *broken_pictures(tmp_path), "whole.jpg"]
    skips = []
    some = data.encode(tiny_model(), [Record(str(tmp_path / n), ("what?",), "red", key=i) for i, n in enumerate(names)], skips)
    assert [r.key for r in some.records] == [0, 5]
    assert len(some.features) == 5 and some.picture.tolist() == [0, 0]  # each picture is encoded once
    assert [skip.key for skip in skips] == [1, 2, 3, 4]
    assert skips[3].reason == f"{tmp_path / 'missing.jpg'}: no such picture"
    for name in names[1:-1]:
        with pytest.raises(UserError, match=name):
            data.load_image(tmp_path / name)


def test_a_picture_that_can_be_read_again_is_used_again(tmp_path, monkeypatch):
    """A file on a network may have been away: size and time of change are as before."""
    model, paths, real = tiny_model(), [], data.load_image
    for color in ("red", "green", "blue"):
        save_picture(tmp_path / f"{color}.jpg", color)
        paths.append(str(tmp_path / f"{color}.jpg"))

    def away(path):
        if path == paths[1]:
            raise UserError("away")
        return real(path)

    records, first, later = [Record(path, (), "red") for path in paths], [], []
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", away)
        assert len(data.encode(model, records, first, tmp_path / "features").records) == 2
    for _ in range(2):  # the second time from the file
        whole = data.encode(model, records, later, tmp_path / "features")
        assert len(whole.records) == 3 and np.isfinite(whole.features).all()
        monkeypatch.setattr(data, "load_image", away)
    assert [skip.reason for skip in first] == ["away"] and later == []
    torch.testing.assert_close(whole.f([1]), model.encode_image(model.preprocess(real(paths[1]))[None]), rtol=2e-3, atol=2e-3)


def test_words_that_the_tokenizer_has_no_token_for_are_counted(tmp_path):
    save_picture(tmp_path / "a.jpg", "red")
    answers, skips = ["red", "a pizza", "red circle", "pizza"], []
    records = [Record(str(tmp_path / "a.jpg"), ("what?",), answer) for answer in answers]
    assert len(data.encode(tiny_model(), records, skips).records) == 4
    assert [skip.reason for skip in skips] == ["words in an answer that the language model has no token for"] * 2


def test_an_end_of_text_that_stands_for_unknown_words_as_well_is_not_counted_as_one(tmp_path):
    """As OPT's and GPT-2's: every answer ends in it."""
    save_picture(tmp_path / "a.jpg", "red")
    model, skips = tiny_model(), []
    model.tokenizer.unk_token = model.tokenizer.eos_token
    data.encode(model, [Record(str(tmp_path / "a.jpg"), ("what?",), "red")], skips)
    assert not skips


def test_of_more_than_a_thousand_records_each_has_its_own_reason(tmp_path):
    """They are read in parts of a thousand."""
    save_picture(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    records, skips = [], []
    for i in range(2000):
        name = "broken.jpg" if i == 1500 else "a.jpg"
        records.append(Record(str(tmp_path / name), ("what?",), "red", key=i))
    some = data.encode(tiny_model(), records, skips)
    assert [skip.key for skip in skips] == [1500]
    assert [record.key for record in some.records] == [i for i in range(2000) if i != 1500]


@pytest.mark.parametrize("wrong", (float("nan"), float("inf"), 1e6))
def test_features_that_are_not_finite_are_left_out_and_told(wrong, tmp_path, monkeypatch):
    """As those of a CLIP in fp16 that overflows; 1e6 is beyond float16, in which features are kept."""
    model, paths = tiny_model(), []
    for i, color in enumerate(("red", "blue", "green")):
        save_picture(tmp_path / f"{i}.png", color)
        paths.append(str(tmp_path / f"{i}.png"))
    broken, real = model.preprocess(data.load_image(paths[1])), model.encode_image

    def encode_image(pixels):
        f = real(pixels)
        for row, picture in zip(f, pixels):
            if torch.equal(picture, broken):
                row[5] = wrong  # one number alone
        return f

    monkeypatch.setattr(model, "encode_image", encode_image)
    skips, records = [], [Record(path, (), "red") for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.encode(model, records, skips)
    assert [record.image for record in dataset.records] == [paths[0], paths[2]]
    assert len(skips) == 1 and "not finite" in skips[0].reason


def test_choices_without_a_token_are_left_out(tmp_path):
    save_picture(tmp_path / "a.jpg", "red")
    records, skips = [], []
    for choices in (("red", "blue"), ("red", " ")):
        records.append(Record(str(tmp_path / "a.jpg"), ("what?",), "red", choices=choices))
    assert data.encode(tiny_model(), records, skips).records == records[:1]
    assert [skip.reason for skip in skips] == ["a choice that the language model has no token for"]


def test_features_belong_to_their_records(tmp_path):
    model = tiny_model()
    for i, color in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / f"{i}.jpg", color)
    some = data.encode(model, [Record(str(tmp_path / f"{i}.jpg"), (), "a") for i in (0, 1, 2, 1)], [])
    for i, record in enumerate(some.records):
        alone = model.encode_image(model.preprocess(data.load_image(record.image))[None])
        assert torch.allclose(some.f([i]), alone, rtol=2e-3, atol=2e-3)  # features are kept in half precision


def test_features_kept_in_a_file_are_those_of_this_clip_its_preprocessing_and_these_pictures(tmp_path):
    model, paths = tiny_model(), []
    for i, color in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / f"{i}.jpg", color)
        paths.append(str(tmp_path / f"{i}.jpg"))
    key = data.features_key(model, paths)
    assert data.features_key(model, paths) == key == data.features_key(tiny_model(), paths)
    assert data.features_key(model, paths[::-1]) != key
    for change in ("weight", "buffer", "preprocess", "activation"):
        other = tiny_model()
        visual = other.clip.visual
        if change == "weight":  # any of them
            visual.transformer.resblocks[-1].mlp.c_fc.bias.data += 1
        elif change == "buffer":
            visual.register_buffer("running_mean", torch.ones(3))
        elif change == "preprocess":
            other.preprocess.transforms[-1].mean = (0.5, 0.5, 0.5)
        else:
            visual.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
        assert data.features_key(other, paths) != key, change
    save_picture(tmp_path / "0.jpg", "white", (41, 30))
    assert data.features_key(model, paths) != key
    for change in ("time", "size"):
        before, stat = data.features_key(model, paths), os.stat(paths[1])
        if change == "size":
            with open(paths[1], "ab") as file:
                file.write(b" ")
        os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + (10 ** 9 if change == "time" else 0)))
        assert data.features_key(model, paths) != before, change
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"one")
    member = [data.Member(str(archive), "1.jpg")]
    before = data.features_key(model, member)
    archive.write_bytes(b"another")
    assert data.features_key(model, member) != before


def test_a_fingerprint_tells_datasets_of_one_shape_apart(tmp_path):
    model = tiny_model()
    for i, color in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / f"{i}.jpg", color)

    def fingerprint(pictures=(0, 1, 2), answer="red", question="what color?"):
        records = [Record(str(tmp_path / f"{i}.jpg"), (question,), answer) for i in pictures]
        return data.encode(model, records, []).fingerprint()

    first = fingerprint()
    assert first == fingerprint() and len({first, fingerprint(answer="blue"), fingerprint(question="what size?"),
                                           fingerprint((0, 2, 1)), fingerprint((0, 1, 1)), fingerprint((0, 1, 0))}) == 6
    save_picture(tmp_path / "0.jpg", "yellow")
    assert fingerprint() != first


def test_shuffled_records_have_some_other_picture_and_records_of_one_picture_the_same():
    some = plain_dataset([(1, 1)] * 300, pictures=60)
    other = data.shuffled(some)
    assert (other.picture != some.picture).all() and set(other.picture) == set(some.picture)
    assert len(set(zip(some.picture, other.picture))) == 60 and other.records == some.records
    assert np.array_equal(data.shuffled(some).picture, other.picture)  # always the same: losses are compared


def plain_dataset(lengths, pictures=100):
    """Records with the numbers 0, 1, … as answers, token ids of given (question, answer) lengths, random features."""
    records = [Record(f"{i % pictures}.jpg", (), str(i)) for i in range(len(lengths))]
    tokens = [(np.zeros(q, np.int32), np.zeros(a, np.int32)) for q, a in lengths]
    return data.Dataset(records, tokens, np.random.randn(pictures, 24).astype(np.float16),
                        np.arange(len(lengths)) % pictures)


def test_held_out_pictures_are_not_trained_on():
    rest, test = data.hold_out(plain_dataset([(1, 1)] * 300))
    assert {r.image for r in rest.records}.isdisjoint(r.image for r in test.records)
    assert len(rest.records) + len(test.records) == 300 and len(test.records) == 6
    for some in (rest, test):
        assert all(int(p) == int(r.image[:-4]) for r, p in zip(some.records, some.picture))
    assert data.hold_out(plain_dataset([(1, 1)] * 300, pictures=49))[1] is None
    many, test = data.hold_out(plain_dataset([(1, 1)] * 30_000, pictures=30_000))
    assert len(many.records) == 29_500 and len(test.records) == 500  # no more: they are not trained on
    few = data.hold_out(plain_dataset([(1, 1)] * 300, pictures=50))[1]
    assert (data.shuffled(few).picture != few.picture).all()  # two at least: one can't be shuffled


def test_a_batch_holds_the_records_of_its_rows():
    tokens = [(np.array([5, 6]), np.array([7, 8, 9])), (np.array([], int), np.array([1])),
              (np.arange(4), np.array([3, 4]))]
    some = plain_dataset([(2, 3), (0, 1), (4, 2)])._replace(tokens=tokens)
    f, tokens = some.batch([0, 2])
    assert torch.equal(f, torch.tensor(some.features[[0, 2]]).float())
    assert tokens.question.tolist() == [[0, 0, 5, 6], [0, 1, 2, 3]] and tokens.answer.tolist() == [[7, 8, 9], [3, 4, 0]]
    assert tokens.question_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]] and tokens.answer_mask.tolist()[1] == [1, 1, 0]
    assert not f.requires_grad and f.device.type == tokens.answer.device.type == "cpu"


@pytest.mark.parametrize("size, tokens", [(16, None), (64, None), (64, 4096), (1000, 4096)])
def test_an_epoch_has_every_record_once_in_batches_with_little_padding(size, tokens):
    some = plain_dataset(llava_like_lengths(60_000))
    plan = data.plan_epoch(some, size, tokens, 0, 0)
    assert sorted(np.concatenate(plan)) == list(range(len(some.records)))
    lengths = np.array([(len(q), len(a)) for q, a in some.tokens])
    padded = [len(rows) * lengths[rows].max(0).sum() for rows in plan]
    assert max(map(len, plan)) <= size and (not tokens or max(padded) <= tokens)
    assert sum(padded) / lengths.sum() <= 1.1


@pytest.mark.parametrize("n", (1, 3, 16, 19))
def test_an_epoch_has_the_records_that_fill_no_batch_as_well(n):
    """Even where they are all: an epoch without a batch would be followed by the next, without end."""
    plan = data.plan_epoch(plain_dataset([(i % 3, 2) for i in range(n)]), 16, None, 0, 0)
    assert sorted(np.concatenate(plan)) == list(range(n))


def test_batches_of_short_and_of_long_records_take_turns():
    """Records of like length come together, batches of like length do not."""
    some = plain_dataset([(i % 50, 3) for i in range(5000)])
    longest = [max(len(some.tokens[i][0]) for i in rows) for rows in data.plan_epoch(some, 10, None, 0, 0)]
    assert len(set(longest)) > 20 and abs(np.mean(longest[:250]) - np.mean(longest[250:])) < 5


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    some = plain_dataset([(i % 7, 3) for i in range(100)])
    first, again, other = (data.batches(some, 10, seed=seed) for seed in (0, 0, 1))
    first, again, other = ([next(plan).tolist() for _ in range(20)] for plan in (first, again, other))
    assert first == again != other and first[:10] != first[10:]
    assert sorted(sum(first[:10], [])) == sorted(sum(first[10:], [])) == list(range(100))
