"""A run that was killed, whenever it was, goes on and ends with the same weights and the same log, bit for bit."""

import multiprocessing
import os
import pkgutil
import random
import signal
import sys
from pathlib import Path

import filelock
import pytest
import torch
from conftest import fails_in_one_line, run, tiny_model
from test_training import dataset, log_of

import lmeye
import train
from lmeye import CHECKPOINT, UserError

# A server that imports torch once and forks a clean process for each run: it never computes anything itself.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])

KILLS = {  # where SIGKILL strikes: at the n-th call of a function
    "in a step": "torch.optim.AdamW.step",
    "while a file is written": "os.fsync",
    "between a file and its name": "os.replace",
    "in a validation": "train.mean_loss",
    "between validation and save": "train.Run.save_state",
    "while the adapter is written": "safetensors.torch.save",
    "in the evaluation": "sample.summarize",
    "before the state is removed": "pathlib.Path.unlink",
}


def child(cwd, flags, where, n):
    """A short run in `cwd`; it is killed at the n-th call of the function `where`."""
    os.chdir(cwd)
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    if where:
        owner, _, name = where.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        real, calls = getattr(owner, name), []

        def kill(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, kill)
    train.SAVE_EVERY = 2
    sys.argv = ["train.py", *flags]
    lmeye.run_main(train.main)


def fork(cwd, flags, where=None, n=0):
    process = FORKS.Process(target=child, args=(str(cwd), flags, where, n))
    process.start()
    process.join(300)
    return process.exitcode


def stage(home, n, *more):
    kind = ("captions", "chats")[n - 1]
    return ["--stage", str(n), "--llm", f"{home}/llm", "--clip", f"local-dir:{home}/clip",
            "--data", f"{home}/{kind}.jsonl", "--val", f"{home}/val_{kind}.jsonl",
            "--steps", "9", "--batch-size", "4", "--dropout", "0.5", *more]


def results(folder):
    """What a run leaves: the bytes of adapters and answers, the log without the columns that a clock decides."""
    folder, found = Path(folder, "out/llm+clip"), {}
    for path in [*folder.glob("stage*/*.safetensors"), *folder.glob("stage*/evaluation/answers.jsonl")]:
        found[str(path.relative_to(folder))] = path.read_bytes()
    for path in folder.glob("stage*/log.csv"):
        rows = log_of(path.parent)
        for row in rows:
            del row["seconds"], row["tokens_per_second"]
        found[path.parent.name] = rows
    return found


@pytest.mark.slow
def test_killed_at_many_moments_weights_and_log_are_those_of_an_unbroken_run(home, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    two = ("--accumulate", "2")
    for n in (1, 2):
        assert fork(whole, stage(home, n, *two)) == 0, Path(whole, "log").read_text()
    expected, rng = results(whole), random.Random(0)
    assert {f"stage{n}/{file}" for n in (1, 2) for file in (CHECKPOINT, "best.safetensors")} < expected.keys()
    assert [len(expected[f"stage{n}"]) for n in (1, 2)] == [9, 9]
    for trial, name in enumerate([*KILLS, *list(KILLS)[:2]]):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for n in (1, 2):
            calls = 1 if name in ("in the evaluation", "before the state is removed") else rng.randint(1, 5)
            status = fork(folder, stage(home, n, *two), KILLS[name], calls)
            assert status == -signal.SIGKILL, (n, name, Path(folder, "log").read_text())
            status = fork(folder, stage(home, n, *two, "--resume"))
            assert status == 0, (n, name, Path(folder, "log").read_text())
            assert not list(folder.rglob(train.STATE))
        assert results(folder) == expected, name


def test_a_run_goes_on_from_another_folder_where_its_files_have_other_names(home, tmp_path, monkeypatch):
    flags = ["--stage", 1, "--llm", "llm", "--clip", "local-dir:clip", "--data", "captions.jsonl",
             "--steps", 6, "--batch-size", 2, "--out"]
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert run("train.py", *flags, tmp_path / "out", cwd=home).returncode == 130
    elsewhere = [f"{home}/{flag}" if str(flag) in ("llm", "captions.jsonl") else flag for flag in flags]
    elsewhere[5] = f"local-dir:{home}/clip"
    result = run("train.py", *elsewhere, tmp_path / "out", "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run("train.py", *flags, tmp_path / "whole", cwd=home).returncode == 0
    paths = [tmp_path / out / "llm+clip/stage1" / CHECKPOINT for out in ("out", "whole")]
    mine, whole = [lmeye.read_adapter(path)[3] for path in paths]
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in whole)


@pytest.fixture(autouse=True)
def states_are_saved_often(monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def start(model, folder, **options):
    settings = dict(steps=6, batch_size=4, lr=1e-2) | options
    train.train_adapter(model, 2, dataset(model, 2), None, folder, **settings)
    (folder / train.STATE).unlink()


def stop_at(step, monkeypatch):
    """Make the program be told to stop in the middle of a step."""
    real, calls = torch.optim.AdamW.step, []

    def told(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", told)


def interrupt(folder, monkeypatch, step=3, **options):
    told = f"after step {step} of .*--resume"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=told):
        stop_at(step, patch)
        start(tiny_model(), folder, **options)


@pytest.mark.parametrize("step, batches", [
    (1, dict(batch_size=4)), (6, dict(batch_size=4)),  # the first step, and the last
    (3, dict(batch_size=1, accumulate=2))])
def test_a_stop_ends_the_step_and_saves(tmp_path, monkeypatch, step, batches):
    interrupt(tmp_path / "a", monkeypatch, step, **batches)
    start(tiny_model(), tmp_path / "a", resume=True, **batches)
    start(tiny_model(), tmp_path / "b", **batches)
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()


def test_a_stop_while_a_line_is_printed_waits_for_a_step_and_its_state(tmp_path, monkeypatch):
    def write(bar, line):
        if line.startswith("step 3/"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.tqdm, "write", write)
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 100"):
        start(tiny_model(), tmp_path / "a", steps=100)
    assert torch.load(tmp_path / "a" / train.STATE)["step"] == 4


def test_averages_go_on_after_a_stop_between_two_lines_of_the_log(tmp_path, monkeypatch):
    """Of 200 steps the first and every second make a line; the stop is behind the first of a line's two."""
    long = dict(steps=200, batch_size=100)
    interrupt(tmp_path / "a", monkeypatch, 21, **long)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 30 of 200"):
        stop_at(9, patch)
        start(tiny_model(), tmp_path / "a", resume=True, **long)
    interrupt(tmp_path / "b", monkeypatch, 30, **long)
    resumed, whole = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    for row in resumed + whole:
        del row["seconds"], row["tokens_per_second"]
    assert len(whole) == 16 and resumed == whole


def test_best_is_the_adapter_of_the_lowest_validation_loss_also_after_a_stop(tmp_path, monkeypatch):
    """The stop comes in the validation of the second step, whose adapter is the best one."""
    losses = iter([3.0, 9, 2.0, 9, 5.0, 9, 4.0, 9])  # each with that of shuffled pictures
    model = tiny_model()
    some, best = dataset(model, 2), tmp_path / "a" / "best.safetensors"

    def planned(*_):
        value = next(losses)
        if value == 2.0:
            signal.raise_signal(signal.SIGTERM)
        return value

    monkeypatch.setattr(train, "mean_loss", planned)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
        train.train_adapter(model, 2, some, some, tmp_path / "a", 4, 4, 1e-2)
    second = (tmp_path / "a" / CHECKPOINT).read_bytes()
    assert best.read_bytes() == second
    train.train_adapter(tiny_model(), 2, some, some, tmp_path / "a", 4, 4, 1e-2, resume=True)
    assert next(losses, None) is None
    assert best.read_bytes() == second != (tmp_path / "a" / CHECKPOINT).read_bytes()


def test_a_state_is_never_half_written(tmp_path, monkeypatch):
    """The disk is full when the state, of all files, is to be written: the one before stays, unchanged."""
    interrupt(tmp_path / "a", monkeypatch)
    before = (tmp_path / "a" / train.STATE).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(os, "fsync", full)
        patch.setattr(lmeye.LMEye, "save", lambda *_: None)
        patch.setattr(train.Run, "note_line", lambda *_: "")
        start(tiny_model(), tmp_path / "a", resume=True)
    assert (tmp_path / "a" / train.STATE).read_bytes() == before


def test_a_damaged_state_is_told_in_one_line_and_never_executed(tmp_path, monkeypatch):
    interrupt(tmp_path / "a", monkeypatch)
    state = tmp_path / "a" / train.STATE
    whole = state.read_bytes()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"step": Evil()}, tmp_path / "evil.pt")
    for content in (whole[:500], b"", (tmp_path / "evil.pt").read_bytes()):
        state.write_bytes(content)
        with pytest.raises(UserError, match="can't be read.*another name"):
            start(tiny_model(), tmp_path / "a", resume=True)
    assert not (tmp_path / "evil").exists()
    state.write_bytes(whole[:500])
    start(tiny_model(), tmp_path / "a")  # a new run begins, and the interrupted one is kept
    assert (tmp_path / "a" / CHECKPOINT).is_file() and (tmp_path / "a.1" / train.STATE).read_bytes() == whole[:500]


@pytest.mark.parametrize("options, other, name", [
    (dict(lr=2e-2), {}, "learning rate"), (dict(seed=1), {}, "seed"), (dict(accumulate=2), {}, "accumulate"),
    (dict(batch_size=2), {}, "batch size"), (dict(max_batch_tokens=64), {}, "max batch tokens"), (dict(steps=7), {}, "steps"),
    (dict(train_align=True), {}, "align trained"), ({}, dict(dropout=0.5), "dropout"), ({}, dict(seed=1), "models")])
def test_a_run_with_other_settings_cannot_be_resumed(tmp_path, monkeypatch, options, other, name):
    interrupt(tmp_path / "a", monkeypatch)
    with pytest.raises(UserError, match=f"other settings: {name} "):
        start(tiny_model(**other), tmp_path / "a", resume=True, **options)


def test_a_run_cannot_be_resumed_on_other_data(tmp_path, monkeypatch):
    """With others to validate on, the log and the choice of the best adapter would mix two measures."""
    some, recipe = dataset(tiny_model(), 2), (tmp_path / "a", 6, 4, 1e-2)
    first = some.records[0]._replace(answer="blue")  # of as many tokens
    other = some._replace(records=[first, *some.records[1:]])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(3, patch)
        train.train_adapter(tiny_model(), 2, some, some, *recipe)
    for given, named in (((other, some), "data"), ((some, other), "val data"), ((some, None), "val data")):
        with pytest.raises(UserError, match=f"other settings: hash of the {named} "):
            train.train_adapter(tiny_model(), 2, *given, *recipe, resume=True)


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert fails_in_one_line(run("train.py", "--stage", 1, "--preset", "mini", "--out", "file", cwd=tmp_path))


@pytest.mark.parametrize("bad, skipped", [  # a single one may be of fp16's scaler, also at the end
    ((2, 3), "012222"), ((6,), "000001"), ((2, 6), "011112"), ((5, 6), None)])
def test_a_loss_that_is_not_finite_is_skipped_and_counted_and_two_at_the_end_are_no_success(
        tmp_path, monkeypatch, bad, skipped):
    model, calls = tiny_model(), []
    real = model.forward

    def sometimes(f, tokens):
        calls.append(1)
        return real(f, tokens) * (float("nan") if len(calls) in bad else 1)

    monkeypatch.setattr(model, "forward", sometimes)
    if skipped is None:
        with pytest.raises(UserError, match="2 steps in a row"):
            start(model, tmp_path / "a")
    else:
        start(model, tmp_path / "a")
        assert "".join(row["skipped"] for row in log_of(tmp_path / "a")) == skipped
    assert all(p.isfinite().all() for p in model.adapter(2).values())


def loss_without_gradient(model):
    """Zero, whose gradient is not finite."""
    return (model.img_d.sum() * 0).sqrt()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("broken", (lambda model: model.img_d.sum() * float("nan"), loss_without_gradient))
def test_after_many_steps_that_are_not_finite_the_run_stops_with_advice(tmp_path, monkeypatch, broken, dtype):
    model = tiny_model()
    model.llm.to(dtype)
    monkeypatch.setattr(model, "forward", lambda f, tokens: broken(model))
    with pytest.raises(UserError, match="20 steps in a row.*--lr"):
        start(model, tmp_path / "a", steps=100)


def test_steps_that_are_not_finite_are_counted_on_after_an_interruption(tmp_path, monkeypatch):
    calls = []

    def broken(f, tokens):
        calls.append(1)
        if len(calls) == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_without_gradient(model)

    for error in (torch.OutOfMemoryError, UserError):  # the state of step 14 is the last one saved
        model = tiny_model()
        monkeypatch.setattr(model, "forward", broken)
        with pytest.raises(error):
            start(model, tmp_path / "a", steps=100, resume=True)
    assert len(calls) == 16 + 6


def test_a_second_run_is_kept_out_by_the_program(home, tmp_path):
    with train.lock(tmp_path / "out/llm+clip"):
        assert fork(tmp_path, stage(home, 1)) == 2
    assert "another run works here" in (tmp_path / "log").read_text() and not (tmp_path / "out/llm+clip/stage1").exists()


def test_what_a_run_itself_waits_for_in_vain_is_not_taken_for_another_run(tmp_path):
    with pytest.raises(filelock.Timeout), train.lock(tmp_path / "out"):
        raise filelock.Timeout("features")
