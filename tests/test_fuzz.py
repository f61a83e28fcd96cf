"""Whatever is fed to data.py, it ends in records with a count of what was left out, or in one line of error.
More cases with `LMEYE_FUZZ=100000 python -m pytest tests/test_fuzz.py`."""

import collections
import json
import os
import random

import pytest
from conftest import tiny_model
from test_formats import CHAT, jpeg, turns, write_zip

import data
from lmeye import UserError

CASES = int(os.environ.get("LMEYE_FUZZ", 1000))
JUNK = (None, True, -1, 0, 1e308, "", "\0", "../../etc/passwd", "\x1b[2J", "\ud800", [], {}, [[]], {"a": 1}, "x" * 5000)
RECORDS = [{"id": "1", "image": "1.jpg", "conversations": CHAT + turns("Why?", "So."), "category": "cat"},
           {"image": "2.jpg", "question": "What?", "answer": "red", "choices": [["red", "blue"]]},
           {"image": "1.jpg", "caption": "red", "conversations": CHAT}, {"image": "2.jpg", "caption": "A dog."}]


def places(value, path=()):
    """The paths to all values inside a document."""
    yield path
    if isinstance(value, (list, dict)):
        for key in range(len(value)) if isinstance(value, list) else value:
            yield from places(value[key], (*path, key))


def mutate(document, rng):
    """A copy with a few values replaced, removed, doubled or swapped for others of the document."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice(list(places(document))[1:] or [("none",)])
        parent = document
        for key in way:
            parent = parent[key]
        action = rng.randrange(4)
        if action == 0 and isinstance(parent, dict):
            parent.pop(last, None)
        elif action == 1 and isinstance(parent, list):
            parent[:0] = parent[-1:]
        elif action == 2 and parent:
            parent[last] = rng.choice(list(parent.values()) if isinstance(parent, dict) else parent)
        elif parent:
            parent[last] = json.loads(json.dumps(rng.choice(JUNK)))
    return document


def damage(content, rng):
    """Bytes with some changed, cut out, doubled or cut off."""
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(content) + 1), rng.choice((1, 10, 1000))
        middle = rng.choice((bytes([rng.randrange(256)]), b"", content[at:at + n] * 2))
        content = content[:at] + middle + (content[at + n:] if rng.random() < 0.8 else b"")
    return content


@pytest.mark.parametrize("kind", ("documents", "archives", "pictures"))
def test_any_input_is_read_or_left_out_and_counted_or_told_in_one_line(tmp_path, kind):
    model, seen = tiny_model(), collections.Counter()
    archive = write_zip(tmp_path / "whole.zip", ["1.jpg", "2.jpg"]).read_bytes()
    (tmp_path / "2.jpg").write_bytes(jpeg())
    for seed in range(CASES // 4 if kind != "documents" else CASES // 2):
        rng = random.Random(seed)
        items = mutate(RECORDS, rng) if kind == "documents" else RECORDS
        content = (json.dumps(items) if seed % 2 else "\n".join(map(json.dumps, items))).encode()
        if kind == "documents" and rng.random() < 0.3:
            content = damage(content, rng)
        (tmp_path / "data.json").write_bytes(content)
        (tmp_path / "case.zip").write_bytes(damage(archive, rng) if kind == "archives" else archive)
        (tmp_path / "1.jpg").write_bytes(damage(jpeg(), rng) if kind == "pictures" else jpeg())
        stage, answered = rng.choice((1, 2)), rng.random() < 0.7
        try:
            pictures = data.open_pictures(tmp_path / "data.json", tmp_path / "case.zip" if kind == "archives" else None)
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
