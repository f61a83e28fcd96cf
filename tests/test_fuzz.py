"""Whatever is fed to the programs, they end in records with a count of what was skipped, or in one line of error.

1,000 cases from fixed seeds; more with `LMEYE_FUZZ=100000 python -m pytest tests/test_fuzz.py`. Never a traceback of
another kind, never a hang, and never a file changed that was there before.
"""

import collections
import hashlib
import io
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import run, save_clip, save_llm, tiny_model
from PIL import Image
from test_formats import CHAT, VQA_ANNOTATIONS, VQA_QUESTIONS, jpeg, vcr

import data
from lmeye import UserError

CASES = int(os.environ.get("LMEYE_FUZZ", 1000))

JUNK = (None, True, -1, 0, 1e308, 10 ** 30, "", "\0", "\u202e", "../../etc/passwd", "/etc/passwd", "\x1b[2J", "\ud800", [], {},
        [[]], {"a": 1}, "x" * 5000, ["<image>"], float("nan"))

DOCUMENTS = {
    "llava": [{"id": "1", "image": "1.jpg", "conversations": CHAT}, {"id": "2", "image": "2.jpg", "conversations": CHAT * 2}],
    "coco": {"images": [{"id": 9, "file_name": "1.jpg"}], "annotations": [{"image_id": 9, "id": 1, "caption": "A cat."}]},
    "vqa": {**VQA_QUESTIONS, **VQA_ANNOTATIONS, "data_subtype": "val2014"},
    "vcr": [vcr(), vcr()],
    "release": [{"image_id": "1.jpg", "caption": "A cat.", "questions": ["Question: What?", "Answer: A cat."]},
                {"image_id": "2", "questions": ["a mat.", "Question 1: What?", "Answer 1: A cat.",
                                                     "2. Question: Who?"]}],
    "caption": [{"image": "1.jpg", "caption": "A cat.", "category": "cat"}, {"image": "2", "caption": "A dog."}],
}


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
        path = rng.choice(list(places(document)))
        if not path:
            return junk(rng)
        *way, last = path
        parent = document
        for key in way:
            parent = parent[key]
        action = rng.randrange(4)
        if action == 0 and isinstance(parent, dict):
            del parent[last]
        elif action == 1 and isinstance(parent, list):
            parent.insert(last, parent[last])
        elif action == 2:
            parent[last] = rng.choice([parent[k] for k in (range(len(parent)) if isinstance(parent, list) else parent)])
        else:
            parent[last] = junk(rng)
    return document


def junk(rng):
    return json.loads(json.dumps(rng.choice(JUNK)))


def damage(content, rng):
    """Bytes with some flipped, cut out, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content)) if content else 0
        action = rng.randrange(4)
        if action == 0 and content:
            content[at] = rng.randrange(256)
        elif action == 1:
            del content[at:at + rng.choice((1, 10, 1000))]
        elif action == 2:
            content[at:at] = content[at:at + rng.choice((1, 10, 1000))]
        else:
            del content[at:]
    return bytes(content)


def archives():
    """A zip with pictures and a tar shard with pictures and texts, as bytes."""
    z, t = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(z, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in (1, 2):
            archive.writestr(f"{i}.jpg", jpeg())
    with tarfile.open(fileobj=t, mode="w") as tar:
        for name, content in (("1.jpg", jpeg()), ("1.txt", b"a cat"), ("2.jpg", jpeg()), ("2.json", b'{"caption": "x"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return z.getvalue(), t.getvalue()


def snapshot(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def read_all(paths, images, stage, answered=True, model=tiny_model()):
    """Read records and encode them → what became of it."""
    try:
        records, skips = data.read_records(paths, images, stage, answered)
        assert records and all(isinstance(r.answer, str) and (r.answer or not answered) for r in records)
        assert all(isinstance(t, str) and t for r in records for t in r.turns)
        dataset = data.encode(model, records, skips)
        assert 0 < len(dataset.records) <= len(records)
        f, tokens = dataset.batch(range(len(dataset.records)))
        assert torch.isfinite(f).all() and len(f) == len(tokens.answer) and tokens.answer_mask.any(1).all()
        assert len(dataset.fingerprint()) == 16
        data.report_skips(skips)
    except UserError as error:
        assert str(error).strip()
        return "one line"
    assert all(isinstance(skip, data.Skip) and skip.reason for skip in skips)
    json.dumps([skip.key for skip in skips] + [record.key for record in records])  # as the results files hold them
    return "skipped and counted" if skips else "read"


def fuzz_documents(folder, rng):
    document = mutate(rng.choice(list(DOCUMENTS.values())), rng)
    lines = rng.random() < 0.3 and isinstance(document, list)
    text = "\n".join(map(json.dumps, document)) if lines else json.dumps(document)
    content = text.encode("utf-8", "surrogatepass")
    (folder / "case.json").write_bytes(damage(content, rng) if rng.random() < 0.3 else content)
    return read_all([folder / "case.json"], [folder / "pictures"], rng.choice((1, 2)), rng.random() < 0.7)


def fuzz_archives(folder, rng):
    z, t = archives()
    data.open_zip.cache_clear()
    if rng.random() < 0.5:
        (folder / "case.zip").write_bytes(damage(z, rng))
        (folder / "case.json").write_text(json.dumps(DOCUMENTS["llava"]))
        return read_all([folder / "case.json"], [folder / "case.zip"], 2)
    (folder / "case.tar").write_bytes(damage(t, rng))
    return read_all([folder / "case.tar"], None, 1)


def fuzz_pictures(folder, rng):
    stream = io.BytesIO()
    Image.new(rng.choice(("RGB", "L", "P", "RGBA")), (20, 20)).save(stream, rng.choice(("PNG", "GIF", "WEBP", "TIFF", "BMP")))
    (folder / "case.jpg").write_bytes(damage(rng.choice((jpeg(), stream.getvalue())), rng))
    try:
        assert data.load_image(str(folder / "case.jpg")).mode == "RGB"
        return "read"
    except UserError:
        return "one line"


def fuzz_checkpoints(folder, rng, model=tiny_model()):
    model.save(folder / "case.safetensors", 2)
    content = (folder / "case.safetensors").read_bytes()
    if rng.random() < 0.5:
        header = {"stage": 2, "settings": {"llm": "x"}, "fingerprint": model.fingerprint.tolist()}
        tensors = {name: p.detach() for name, p in model.adapter(2).items()}
        content = safetensors.torch.save(tensors, {"lmeye": json.dumps(mutate(header, rng))})
    else:
        content = damage(content, rng)
    (folder / "case.safetensors").write_bytes(content)
    try:
        model.load(folder / "case.safetensors")
        return "read"
    except UserError:
        return "one line"


@pytest.mark.parametrize("fuzz, share", [(fuzz_documents, 0.5), (fuzz_archives, 0.15), (fuzz_pictures, 0.2),
                                         (fuzz_checkpoints, 0.1)])
def test_any_input_is_read_or_skipped_and_counted_or_told_in_one_line(tmp_path, capsys, fuzz, share):
    (tmp_path / "pictures").mkdir()
    for name in ("1", "2", "COCO_val2014_000000000042", "lsmdc/a"):
        (tmp_path / f"pictures/{name}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / f"pictures/{name}.jpg").write_bytes(jpeg())
    before, seen = snapshot(tmp_path), collections.Counter()
    for seed in range(int(CASES * share)):
        try:
            seen[fuzz(tmp_path, random.Random(seed))] += 1
        except Exception as error:
            raise AssertionError(f"{fuzz.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
    assert {p: h for p, h in snapshot(tmp_path).items() if p in before} == before
    assert len(seen) > 1, seen  # not all refused, not all taken
    with capsys.disabled():
        print(f"\n{fuzz.__name__}: {sum(seen.values())} cases: {dict(seen)}")


def test_any_command_line_ends_in_an_answer_or_one_line(tmp_path, capsys):
    """Flags with values that make no sense, in both programs."""
    llm, clip = save_llm(tmp_path / "llm"), save_clip(tmp_path / "clip")
    (tmp_path / "1.jpg").write_bytes(jpeg())
    (tmp_path / "1.txt").write_text("a red background")
    good = ["--llm", llm, "--clip", clip]
    assert run("train.py", "--stage", 1, *good, "--data", ".", "--steps", 1, cwd=tmp_path).returncode == 0
    before, seen = snapshot(tmp_path / "out"), collections.Counter()
    shared = ["--precision", "--llm", "--clip"]
    programs = {
        "train.py": (["--stage", "1", *good, "--data", ".", "--steps", "1", "--out", "new"], shared + [
            "--steps", "--epochs", "--batch-size", "--max-batch-tokens", "--accumulate", "--lr", "--seed", "--n-slots",
            "--dropout", "--interaction", "--n-features", "--data", "--images", "--preset", "--resume", "--save-every"]),
        "sample.py": (["1.jpg", "what color is it?", *good, "--max-tokens", "2"], shared + [
            "--max-tokens", "--top-p", "--top-k", "--temperature", "--checkpoint", "--questions", "--seed",
            "--out", "--data", "--images"]),
    }
    values = ["-1", "0", "1", "2", "0.5", "1e999", "nan", "x", "", "\u202e", "\x1b[2J", "../..", "/dev/null",
              "1.jpg", "/", "7", "fp32", "bf16", "llm", "a:b:c", "."]
    for seed in range(int(CASES * 0.05)):
        rng = random.Random(seed)
        program = rng.choice(list(programs))
        start, flags = programs[program]
        extra = [text for _ in range(rng.randint(1, 2)) for text in (rng.choice(flags), rng.choice(values))]
        try:
            result = run(program, *start, *extra, cwd=tmp_path)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {program} {extra}: {type(error).__name__}: {error}") from error
        assert result.returncode in (0, 2) and "Traceback" not in result.stderr, (seed, extra, result)
        assert not any(c in result.stderr + result.stdout for c in "\x1b\u202e"), (seed, extra, result)
        seen["an answer" if result.returncode == 0 else "one line"] += 1
    assert {p: h for p, h in snapshot(tmp_path / "out").items() if p in before} == before
    assert len(seen) > 1, seen  # not all refused, not all taken
    with capsys.disabled():
        print(f"\ncommand lines: {sum(seen.values())} cases: {dict(seen)}")
