"""Readers take published files as they are, and count what they skip; the miniature's world is what it says."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from benchmark import llava_like_lengths
from conftest import tiny_model
from PIL import Image

import data
import train
from data import Record, read_records
from lmeye import UserError, dialogue


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
    records, skipped = read_records([tmp_path], None, 1)
    assert records == [Record(str(tmp_path / "a.jpg"), (), "a red picture"),
                       Record(str(tmp_path / "deeper" / "b.PNG"), (), "another")]
    assert sum(skipped.values()) == 1 and "caption" in next(iter(skipped))


def test_llava_pretraining_takes_the_caption_alone(tmp_path):
    path = llava(tmp_path, [
        {"id": "1", "image": "a.jpg", "conversations": turns("Describe it.\n<image>", "a cat")},
        {"id": "2", "image": "b/c.jpg", "conversations": turns("<image>\nWhat is this?", "a dog ")}])
    records, skipped = read_records([path], [tmp_path], 1)
    assert records == [Record(f"{tmp_path}/a.jpg", (), "a cat"), Record(f"{tmp_path}/b/c.jpg", (), "a dog")]
    assert not skipped


def test_llava_instructions_become_a_record_a_turn(tmp_path):
    path = llava(tmp_path, [{"image": "a.jpg", "conversations": turns("<image>\nWhat?", "a cat", "Where?", "here")}])
    records, _ = read_records([path], [tmp_path], 2)
    assert records == [Record(f"{tmp_path}/a.jpg", ("What?",), "a cat"),
                       Record(f"{tmp_path}/a.jpg", ("What?", "a cat", "Where?"), "here")]
    assert records[1].question == "What?\nAnswer: a cat\nQuestion: Where?" == dialogue(records[1].turns)


@pytest.mark.parametrize("item, reason", [
    ({"conversations": turns("What?", "a cat")}, "no picture"),
    ({"image": 7, "conversations": turns("What?", "a cat")}, "no picture"),
    ({"image": "../a.jpg", "conversations": turns("What?", "a cat")}, "not inside --images"),
    ({"image": "/etc/a.jpg", "conversations": turns("What?", "a cat")}, "not inside --images"),
    ({"image": "a.jpg"}, "lacks a field"),
    (["a.jpg"], "lacks a field"),
    (7, "lacks a field"),
    ({"image": "a.jpg", "conversations": turns("What?")}, "alternate"),
    ({"image": "a.jpg", "conversations": turns("What?", " ")}, "alternate"),
    ({"image": "a.jpg", "conversations": turns("What?", 5)}, "lacks a field"),
    ({"image": "a.jpg", "conversations": turns("What?", "a cat")[::-1]}, "alternate"),
])
def test_an_odd_record_is_skipped_and_counted(tmp_path, item, reason):
    good = {"image": "a.jpg", "conversations": turns("What?", "a cat")}
    records, skipped = read_records([llava(tmp_path, [item, good])], [tmp_path], 2)
    assert len(records) == 1 and list(skipped.values()) == [1] and reason in next(iter(skipped))


@pytest.mark.parametrize("text", ["", "{", "{}", "3", "[]", '[{"image": "../a.jpg"}]', "\x00"])
def test_a_file_with_nothing_to_read_is_named_in_one_line(tmp_path, text):
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(UserError, match="chat.json"):
        read_records([tmp_path / "chat.json"], [tmp_path], 1)


def test_captions_are_refused_for_stage_2(tmp_path):
    save_picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a red picture")
    with pytest.raises(UserError, match="--stage 1"):
        read_records([tmp_path], None, 2)


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(tmp_path / "a.jpg").size == (30, 40)


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"))
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    assert data.load_image(path).mode == "RGB"


def test_gray_of_16_bits_keeps_its_shades(tmp_path):
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "a.png")
    assert np.ptp(np.asarray(data.load_image(tmp_path / "a.png"))) == 255
    assert abs(np.asarray(data.load_image(tmp_path / "a.png")).mean() - 127.5) < 1


def broken_pictures(folder):
    save_picture(folder / "whole.jpg", size=(300, 300))
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "empty.jpg").write_bytes(b"")
    return ["truncated.jpg", "text.jpg", "empty.jpg", "missing.jpg"]


def test_broken_pictures_are_left_out_and_counted(tmp_path):
    """Not replaced by others, not passed over in silence."""
    names = ["whole.jpg", *broken_pictures(tmp_path), "whole.jpg"]
    skipped = Counter()
    some = data.encode(tiny_model(), [Record(str(tmp_path / n), (), str(i)) for i, n in enumerate(names)], skipped)
    assert [r.answer for r in some.records] == ["0", "5"]
    assert len(some.features) == 5 and some.picture.tolist() == [0, 0]  # each picture is encoded once
    assert sum(skipped.values()) == 4 and skipped[f"{tmp_path / 'missing.jpg'}: no such picture"] == 1
    for name in names[1:-1]:
        with pytest.raises(UserError, match=name):
            data.load_image(tmp_path / name)


def test_features_belong_to_their_records(tmp_path):
    model = tiny_model()
    for i, color in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / f"{i}.jpg", color)
    some = data.encode(model, [Record(str(tmp_path / f"{i}.jpg"), (), "a") for i in (0, 1, 2, 1)], Counter())
    for i, record in enumerate(some.records):
        alone = model.encode_image(model.preprocess(data.load_image(record.image))[None])
        assert torch.allclose(some.f([i]), alone, rtol=2e-3, atol=2e-3)  # features are kept in half precision


def plain_dataset(lengths, pictures=100):
    """Records with the numbers 0, 1, … as answers, token ids of given (question, answer) lengths, random features."""
    records = [Record(f"{i % pictures}.jpg", (), str(i)) for i in range(len(lengths))]
    tokens = [(np.zeros(q, np.int32), np.zeros(a, np.int32)) for q, a in lengths]
    return data.Dataset(records, tokens, np.random.randn(pictures, 24).astype(np.float16),
                        np.arange(len(lengths)) % pictures)


def test_held_out_pictures_are_not_trained_on():
    rest, test = data.split(plain_dataset([(1, 1)] * 300))
    assert {r.image for r in rest.records}.isdisjoint(r.image for r in test.records)
    assert len(rest.records) + len(test.records) == 300 and len(test.records) == 6
    for some in (rest, test):
        assert all(int(p) == int(r.image[:-4]) for r, p in zip(some.records, some.picture))
    assert data.split(plain_dataset([(1, 1)] * 300, pictures=49))[1] is None
    few = data.split(plain_dataset([(1, 1)] * 300, pictures=50))[1]
    assert (train.shuffled(few).picture != few.picture).all()  # two at least: one can't be shuffled


@pytest.mark.parametrize("size, tokens", [(16, None), (64, None), (64, 4096), (1000, 4096)])
def test_an_epoch_has_every_record_once_in_batches_with_little_padding(size, tokens):
    some = plain_dataset(llava_like_lengths(60_000))
    plan = data.plan_epoch(some, size, tokens, 0, 0)
    assert sorted(np.concatenate(plan)) == list(range(len(some.records)))
    lengths = np.array([(len(q), len(a)) for q, a in some.tokens])
    padded = [len(rows) * lengths[rows].max(0).sum() for rows in plan]
    assert max(map(len, plan)) <= size and (not tokens or max(padded) <= tokens)
    assert sum(padded) / lengths.sum() <= 1.1


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    some = plain_dataset([(i % 7, 3) for i in range(100)])
    first, again, other = (data.batches(some, 10, seed=seed) for seed in (0, 0, 1))
    first, again, other = ([next(plan).tolist() for _ in range(20)] for plan in (first, again, other))
    assert first == again != other and first[:10] != first[10:]
    assert sorted(sum(first[:10], [])) == sorted(sum(first[10:], [])) == list(range(100))


# ---- The miniature's world


def test_held_out_scenes_never_occur_in_training():
    for stage in (1, 2):
        seen = {r.image.tobytes() for r in data.miniature(stage, pictures=300)}
        held = data.miniature(stage, held_out_scenes=True)
        assert seen.isdisjoint(r.image.tobytes() for r in held)
    scenes = data.HELD_OUT
    assert len(data.SCENES) == 6000 and 500 < len(scenes) < 700
    assert Counter(r.kind for r in held) == {kind: len(scenes) for kind in data.KINDS}
    for name, values in data.VALUES.items():  # every value of every attribute occurs on both sides
        assert {getattr(s, name) for s in scenes} == set(values)


def test_questions_have_the_scenes_own_answers():
    rng = random.Random(0)
    scene = data.Scene("two", "small", "red", "circle", "left", "blue")
    assert data.describe(scene) == "two small red circles at the left on a blue background"
    for kind in data.KINDS[:-1]:
        assert data.ask(scene, kind, rng)[1] == getattr(scene, kind)
    said = {data.ask(scene, "yes/no", rng) for _ in range(500)}
    assert ("are there two?", "yes") in said and ("are there three?", "no") in said
    assert ("is the background red?", "no") in said and ("is the background blue?", "yes") in said
    assert len({question for question, _ in said}) == len(said)  # no question has both answers


def test_a_drawing_shows_its_scene():
    for scene in random.Random(0).sample(data.SCENES, 300):
        picture = data.draw(scene, random.Random(1))
        colors = {color: n for n, color in picture.getcolors()}
        assert set(colors) == {data.COLORS[scene.color], data.COLORS[scene.background]}
        mask = picture.convert("RGB").point(lambda v: v)
        pixels = [(x, y) for x in range(data.SIDE) for y in range(data.SIDE)
                  if mask.getpixel((x, y)) == data.COLORS[scene.color]]
        center = [sum(p[axis] for p in pixels) / len(pixels) for axis in (0, 1)]
        for axis, side in enumerate(data.PLACES[scene.place]):
            offset = center[axis] - data.SIDE / 2
            assert abs(offset) < 9 if side == 0 else offset * side > 3, scene
        assert min(min(p) for p in pixels) >= 0


def test_the_tokenizer_knows_every_word_and_frames_as_clips_and_opts_do():
    clip, llm = data.build_tokenizer(ends=True), data.build_tokenizer(ends=False)
    for records in (data.miniature(1, True), data.miniature(2, True)):
        for r in records:
            text = r.question + " " + r.answer
            assert llm.unk_token_id not in llm(text).input_ids
    ids = clip("two red things").input_ids
    assert ids[0] == clip.bos_token_id and ids[-1] == clip.eos_token_id == max(clip.get_vocab().values())
    assert llm("two").input_ids[0] == llm.bos_token_id and len(llm("two").input_ids) == 2
    assert llm.decode(llm("Two red things?", add_special_tokens=False).input_ids) == "two red things"
