"""The miniature: its world, its tokenizers, and the files that its script leaves."""

import io
import itertools
import json
import random
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
import transformers
from conftest import ROOT, run
from PIL import Image

import data
import miniature
import shapes
import train
from lmeye import PRESETS

SCRIPT = ROOT / "tests" / "lab" / "miniature.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    miniature.make(out, clip_steps=2, pictures=40, steps=2, width=32, layers=1)
    return out / "mini"


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


# ---- The world


def test_one_scene_in_ten_is_held_out_and_has_every_value():
    assert len(shapes.SCENES) == 6000 and 500 < len(shapes.HELD_OUT) < 700
    assert set(shapes.TRAINING).isdisjoint(shapes.HELD_OUT)
    assert set(shapes.TRAINING) | set(shapes.HELD_OUT) == set(shapes.SCENES)
    for name, values in shapes.VALUES.items():
        for scenes in (shapes.TRAINING, shapes.HELD_OUT):
            assert {getattr(scene, name) for scene in scenes} == set(values)


def test_questions_have_the_scenes_own_answers():
    rng = random.Random(0)
    scene = shapes.Scene("two", "small", "red", "circle", "left", "blue")
    assert shapes.describe(scene) == "two small red circles at the left on a blue background"
    for kind in shapes.KINDS[:-1]:
        assert shapes.ask(scene, kind, rng)[1] == getattr(scene, kind)
    asked = {shapes.ask(scene, "yes/no", rng) for _ in range(500)}
    assert ("are there two?", "yes") in asked and ("are there three?", "no") in asked
    assert ("is the background red?", "no") in asked and ("is the background blue?", "yes") in asked
    assert len({question for question, _ in asked}) == len(asked)  # no question has both answers


def test_a_drawing_shows_its_scene():
    sides = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
    for scene in random.Random(0).sample(shapes.SCENES, 300):
        picture = shapes.draw(scene, random.Random(1))
        color, ground = shapes.COLORS[scene.color], shapes.COLORS[scene.background]
        assert {c for _, c in picture.getcolors()} == {color, ground, shapes.OUTLINE}
        y, x = (np.asarray(picture) != ground).any(2).nonzero()
        for places, side in zip((x, y), sides[scene.place]):
            offset = places.mean() - shapes.SIDE / 2
            assert abs(offset) < 9 if side == 0 else offset * side > 3, scene
        if scene.number == "one":
            assert abs(np.ptp(y) - shapes.SIZES[scene.size]) <= 2, scene


def test_a_drawing_has_as_many_objects_as_told_and_they_stand_apart(monkeypatch):
    drawn = []
    monkeypatch.setattr(shapes, "draw_shape", lambda canvas, scene, x, y, r: drawn.append(np.array((x, y))))
    for scene in random.Random(0).sample(shapes.SCENES, 300):
        drawn.clear()
        shapes.draw(scene, random.Random(1))
        assert len(drawn) == shapes.NUMBERS.index(scene.number) + 1
        for one, other in itertools.combinations(drawn, 2):
            assert abs(one - other).max() >= shapes.SIZES[scene.size], scene


def test_the_tokenizer_knows_every_word_and_frames_as_clips_and_opts_do():
    clip, llm = shapes.build_tokenizer(ends=True), shapes.build_tokenizer(ends=False)
    rng = random.Random(1)
    texts = [shapes.describe(scene) for scene in shapes.SCENES[::7]]
    for scene in shapes.SCENES[::7]:
        for kind in shapes.KINDS:
            texts.append(" ".join(shapes.ask(scene, kind, rng)))
    for ids in llm(texts).input_ids:
        assert llm.unk_token_id not in ids
    ids = clip("two red things").input_ids
    assert ids[0] == clip.bos_token_id and ids[-1] == clip.eos_token_id == max(clip.get_vocab().values())
    assert llm("two").input_ids == [llm.bos_token_id, llm.get_vocab()["two"]]
    assert llm.decode(llm("Two red things?", add_special_tokens=False).input_ids) == "two red things"


def test_only_captions_and_answers_are_learned_and_hints_can_be_left_out():
    scene, rng = shapes.HELD_OUT[0], random.Random(0)
    for share in (0.0, 1.0):
        pieces = miniature.write_example(scene, 3, share, rng)
        assert [weight > 0 for _, weight in pieces] == [False, True] * 4
        for text, _ in pieces[2::2]:
            assert text.startswith(miniature.QUESTION) and text.endswith(miniature.ANSWER)
            hint = text.removesuffix(miniature.ANSWER).rpartition("?")[2]
            assert bool(hint) == (share == 1.0)


# ---- The files


def test_every_file_is_there_and_every_picture_in_the_archive(made):
    assert {path.name for path in made.iterdir()} == set(miniature.FILES)
    assert len(list((made / "examples").glob("*.png"))) == 6
    with zipfile.ZipFile(made / "pictures.zip") as archive:
        names = archive.namelist()
        assert Image.open(io.BytesIO(archive.read(names[0]))).size == (shapes.SIDE, shapes.SIDE)
    for part, prefix, pictures in (("train", "", 40), ("val", "val_", len(shapes.HELD_OUT))):
        captions, questions = read(made, f"{prefix}captions.json"), read(made, f"{prefix}questions.json")
        assert len(captions) == pictures
        for record in captions + questions:
            assert record["image"] in names
            assert record["image"].startswith(part)
            assert "".join(turn["value"] for turn in record["conversations"]).count("<image>") == 1


def test_six_questions_about_a_picture_one_in_four_behind_another(made):
    turns = Counter(len(record["conversations"]) // 2 for record in read(made, "questions.json"))
    assert set(turns) == {1, 2}
    assert turns[1] + 2 * turns[2] == 6 * 40
    assert 0.16 < turns[2] / (6 * 40) < 0.34
    categories = Counter(record["category"] for record in read(made, "val_questions.json"))
    assert categories == dict.fromkeys(shapes.KINDS, len(shapes.HELD_OUT))


def test_held_out_scenes_never_occur_in_training(made):
    held_out = {shapes.describe(scene) for scene in shapes.HELD_OUT}
    trained = {record["conversations"][1]["value"] for record in read(made, "captions.json")}
    shown = {record["conversations"][1]["value"] for record in read(made, "val_captions.json")}
    assert shown == held_out
    assert trained.isdisjoint(held_out)


@pytest.mark.parametrize("stage, kind", ((1, "captions"), (2, "questions")))
def test_train_takes_these_files_and_validates_on_what_was_held_out(made, stage, kind):
    args = SimpleNamespace(data=None, stage=stage, out=made.parent)
    path, images, val, val_images = train.data_of(args, "mini")
    for file, zipped, part in ((path, images, "train"), (val, val_images, "val")):
        records, skipped = data.read_records(file, data.open_pictures(file, zipped), stage)
        assert kind in file.name and not skipped
        assert {Path(record.image).parts[0] for record in records} == {part}
    assert (made.parent / PRESETS["mini"].llm.removeprefix("out/")).is_dir()


def test_at_first_use_train_makes_a_miniature_with_its_own_seed_and_folder(tmp_path, monkeypatch):
    popen = mock.MagicMock()
    popen.return_value.__enter__.return_value.wait.return_value = 0
    monkeypatch.setattr(train.subprocess, "Popen", popen)
    args, settings = SimpleNamespace(out=str(tmp_path), seed=7), PRESETS["mini"]
    train.make_miniature(args, settings)
    popen.assert_called_once_with([sys.executable, SCRIPT, "--out", str(tmp_path), "--seed", "7"])
    Path(tmp_path, "mini", "llm").mkdir(parents=True)
    train.make_miniature(args, settings)  # it is there
    popen.assert_called_once()


def test_flags_reach_the_language_models_recipe(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(miniature, "make", lambda *args, **options: seen.append((args, options)))
    monkeypatch.setattr(miniature.signal, "signal", lambda *_: None)
    flags = ("--seed", 3, "--hint-share", 0, "--width", 64, "--layers", 3)
    assert run("miniature.py", "--out", tmp_path, *flags).returncode == 0
    assert seen == [((str(tmp_path), 3), dict(hint_share=0.0, width=64, layers=3))]


@pytest.mark.parametrize("flags", [("--hint-share", "2"), ("--width", "30"), ("--layers", "0")])
def test_flags_out_of_range_are_refused(flags, tmp_path):
    assert run("miniature.py", "--out", tmp_path, *flags).returncode == 2 and not list(tmp_path.iterdir())


# ---- What is absent


def test_questions_about_what_is_absent_are_records_of_held_out_pictures(made):
    file = made / "absent.json"
    records, skipped = data.read_records(file, data.open_pictures(file, made / "pictures.zip"), 2)
    assert not skipped and {record.image[:4] for record in records} == {"val/"}
    n = len(shapes.HELD_OUT)
    assert Counter((r.category, r.answer) for r in records) == {
        (category, answer): n if category == "trap" else 2 * n
        for category in ("random", "popular", "adversarial", "trap") for answer in ("yes", "no")}


def test_what_is_absent_is_chosen_as_its_category_says():
    training = random.Random(0).choices(shapes.TRAINING, k=300)
    training += [scene for scene in shapes.TRAINING if scene.color == "white"]  # white is the most frequent color
    training += [scene for scene in shapes.TRAINING if (scene.color, scene.shape) == ("green", "ring")] * 5
    lures = {}  # category → [(scene, a color that it is asked about and does not have)]
    for record in miniature.absent_records(training):
        scene = shapes.HELD_OUT[int(record["image"][4:10])]
        value = record["question"].rstrip("?").split()[-1]
        assert (value in (scene.color, scene.noun)) == (record["answer"] == "yes")
        assert record["question"].startswith("is it " if scene.number == "one" else "are they ")
        if record["answer"] == "no" and value in shapes.COLORS:
            lures.setdefault(record["category"], []).append((scene, value))
    assert {color for scene, color in lures["random"]} == set(shapes.COLORS)
    assert all(color == "white" for scene, color in lures["popular"] if scene.color != "white")
    assert all(color == "green" for scene, color in lures["adversarial"]
               if scene.shape == "ring" and scene.color != "green")
    assert all(color == scene.background for scene, color in lures["trap"])


# ---- What is left


def test_the_models_are_ordinary_folders(made):
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{made / 'clip'}")
    picture = Image.open(made / "examples" / "1.png").convert("RGB")
    mine, theirs = miniature.pixels([picture])[0], preprocess(picture)
    assert torch.allclose(mine, theirs, atol=1e-5) and clip.encode_image(theirs[None]).isfinite().all()
    llm = transformers.AutoModelForCausalLM.from_pretrained(made / "llm")
    assert (llm.config.hidden_size, llm.config.num_hidden_layers) == (32, 1)  # by the recipe
    assert len(transformers.AutoTokenizer.from_pretrained(made / "llm")) == llm.config.vocab_size


def test_a_second_run_refuses(made):
    before = (made / "llm" / "model.safetensors").read_bytes()
    result = subprocess.run([sys.executable, SCRIPT, "--out", made.parent], capture_output=True, text=True)
    assert result.returncode == 2 and "--out" in result.stderr and len(result.stderr.splitlines()) == 1
    assert (made / "llm" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("words", ([SCRIPT], [ROOT / "train.py", "--stage", "1", "--preset", "mini"]))
def test_a_run_that_is_stopped_leaves_nothing(words, tmp_path):
    """Neither files nor, where train.py started it, processes: the pipes end when all that hold them have."""
    process = subprocess.Popen([sys.executable, *words, "--out", tmp_path], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("mini/part-*/pictures.zip")) and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert [path.name for path in (tmp_path / "mini").iterdir() if path.name != "lock"] == []
