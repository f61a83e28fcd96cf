"""Whatever is fed to data.py, it ends in records with a count of what was left out, or in one line of error.
More cases with `LMEYE_FUZZ=100000 python -m pytest tests/test_fuzz.py`."""

import collections
import json
import os
import random
import re

import pytest
from conftest import tiny_model
from test_formats import CHAT, SHORT, jpeg, write_zip

import data
from lmeye import UserError

CASES = int(os.environ.get("LMEYE_FUZZ", 1000))
JUNK = (None, True, -1, 0, 1e308, "", "\0", "../../etc/passwd", "\x1b[2J", "\ud800", [], {}, [[]], {"a": 1},
        "x" * 5000)
RECORDS = json.dumps([
    SHORT | {"image": "1.jpg", "id": "1", "category": "cat"},
    SHORT | {"image": "2.jpg", "choices": [["A cat.", "blue"]]},
    {"image": "1.jpg", "caption": "red", "conversations": CHAT},
    {"image": "2.jpg", "caption": "A dog."},
])


def mutate(text, rng):
    """JSON in which some values are others of it, or junk."""
    for _ in range(rng.randint(1, 3)):
        values = list(re.finditer(r'(?<=: )("[^"]*"|\[.*?\])', text))
        place, other = rng.choice(values), rng.choice(values)[0]
        value = rng.choice([other, json.dumps(rng.choice(JUNK))])
        text = text[:place.start()] + value + text[place.end():]
    return text


def damage(content, rng):
    """Bytes with some changed, cut out, doubled or cut off."""
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(content) + 1), rng.choice((1, 10, 1000))
        middle = rng.choice((bytes([rng.randrange(256)]), b"", content[at:at + n] * 2))
        content = content[:at] + middle + (content[at + n:] if rng.random() < 0.8 else b"")
    return content


@pytest.mark.parametrize("kind", ("documents", "texts", "archives", "pictures"))
def test_any_input_is_read_or_left_out_and_counted_or_told_in_one_line(tmp_path, kind):
    model, seen = tiny_model(), collections.Counter()
    archive = write_zip(tmp_path / "images.zip", ["1.jpg", "2.jpg"]).read_bytes()
    (tmp_path / "2.jpg").write_bytes(jpeg())
    for seed in range(CASES // 4):
        rng = random.Random(seed)
        text = (mutate(RECORDS, rng) if kind == "documents" else RECORDS).encode()
        (tmp_path / "data.json").write_bytes(damage(text, rng) if kind == "texts" else text)
        (tmp_path / "images.zip").write_bytes(damage(archive, rng))
        (tmp_path / "1.jpg").write_bytes(damage(jpeg(), rng) if kind == "pictures" else jpeg())
        try:
            pictures = data.Pictures(tmp_path / "images.zip" if kind == "archives" else tmp_path)
            stage, answered = rng.choice((1, 2)), rng.random() < 0.7
            records, skipped = data.read_records(tmp_path / "data.json", pictures, stage, answered)
            assert all(record.answer or not answered for record in records)
            some = data.encode(model, records, skipped, pictures, tmp_path / f"features{seed}")
            f, tokens = some.batch(range(len(some.records)))
            assert f.isfinite().all() and 0 < len(f) == len(tokens.answer) <= len(records)
            json.dumps([(record.id, record.image) for record in some.records] + list(skipped))
            seen[len(some.records)] += 1
        except UserError as error:
            assert str(error).strip()
            seen["one line"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert len(seen) > 1, seen  # not all refused, not all taken
