"""A run that was killed, whenever it was, goes on and ends with the same weights, bit for bit."""

import functools
import hashlib
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails_in_one_line, run, save_clip, save_llm, tiny_model
from test_data import save_picture
from test_training import dataset

import data
import lmeye
import train
from lmeye import CHECKPOINT, UserError

# A server that imports torch once and forks a clean process for each run: it never computes anything itself.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])

KILLS = {  # where SIGKILL strikes: at the n-th call of a function
    "in a step": "torch.optim.AdamW.step",
    "while a checkpoint is written": "os.fsync",
    "between a checkpoint and its name": "os.replace",
    "at a stage's end": "pathlib.Path.rename",
    "while the adapter is written": "safetensors.torch.save",
}


def child(cwd, flags, where, n):
    """A short run of the miniature in `cwd`; it is killed at the n-th call of the function `where`."""
    os.chdir(cwd)
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    train.train_clip = functools.partial(train.train_clip, steps=6, batch_size=8, captions=16)
    train.train_llm = functools.partial(train.train_llm, steps=6, batch_size=4, turns=2)
    whole = data.miniature
    data.miniature = lambda stage, held_out_scenes=False: whole(stage, held_out_scenes, 40, 2)[:40]
    if where:
        module, _, name = where.rpartition(".")
        owner = eval(module, {"torch": torch, "os": os, "pathlib": __import__("pathlib"),
                              "safetensors": __import__("safetensors.torch")})
        real, calls = getattr(owner, name), []

        def kill(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, kill)
    sys.argv = ["train.py", *flags]
    lmeye.run(train.main)


def fork(cwd, flags, where=None, n=0):
    process = FORKS.Process(target=child, args=(str(cwd), flags, where, n))
    process.start()
    process.join(300)
    return process.exitcode


def stage(n):
    return ["--preset", "mini", "--stage", str(n), "--save-every", "2", *(["--steps", "7", "--batch-size", "8"] if n else [])]


def results(folder):
    """Hashes of what a run leaves, but for the log, which has times in it."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder, "out/mini").rglob("*")) if p.is_file() and p.name not in ("log.csv", "loss.png")}


@pytest.mark.slow
def test_killed_at_twenty_moments_the_weights_are_those_of_an_unbroken_run(tmp_path, capsys):
    whole = tmp_path / "whole"
    whole.mkdir()
    for n in (0, 1, 2):
        assert fork(whole, stage(n)) == 0, Path(whole, "log").read_text()
    expected, rng, killed = results(whole), random.Random(0), []
    assert {"out/mini/clip/open_clip_model.safetensors", f"out/mini/stage2/{CHECKPOINT}"} < expected.keys()
    for trial in range(7):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for n in (0, 1, 2):
            kills = list(KILLS) if n else list(KILLS)[:4]
            name = kills[(trial + n) % len(kills)]
            calls = 1 if name in ("at a stage's end", "while the adapter is written") else rng.randint(1, 4)
            assert fork(folder, stage(n), KILLS[name], calls) == -signal.SIGKILL, (n, name, Path(folder, "log").read_text())
            killed.append(f"stage {n}, {name}")
            assert fork(folder, [*stage(n), "--resume"]) == 0, (n, name, Path(folder, "log").read_text())
        assert results(folder) == expected, killed[-3:]
    assert len(killed) >= 20
    with capsys.disabled():
        print(f"\nkilled {len(killed)} times at {len(set(killed))} kinds of moments, weights bit for bit the same: {len(killed)}")


def test_stage_0_anew_is_resumed_and_keeps_the_models_before(tmp_path):
    """Killed in the first step, or after the last one: the same models come out."""
    for where, calls in ((None, 0), ("torch.optim.AdamW.step", 1), ("pathlib.Path.rename", 3)):  # the third: of clip.part
        assert fork(tmp_path, stage(0), where, calls) == (-signal.SIGKILL if where else 0)
        assert where is None or fork(tmp_path, [*stage(0), "--resume"]) == 0
    found = results(tmp_path)
    for name in ("clip/open_clip_model.safetensors", "llm/model.safetensors"):
        assert len({found[f"out/mini/{folder}/{file}"] for folder, file in (
            (name.replace("/", f"{n}/").split("/")) for n in ("", ".1", ".2"))}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_saves_and_names_the_command_that_goes_on(tmp_path, number):
    for color in ("red", "green"):
        save_picture(tmp_path / f"pictures/{color}.jpg", color)
        (tmp_path / f"pictures/{color}.txt").write_text(f"a {color} background")
    flags = ["--stage", "1", "--llm", save_llm(tmp_path / "llm"), "--clip", save_clip(tmp_path / "clip"), "--data",
             "pictures", "--steps", "3000", "--batch-size", "2"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = tmp_path / "out/llm+clip/stage1.part"
    for _ in range(600):
        if (part / "log.csv").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and len(errors.splitlines()) == 1 and (part / "state.pt").exists()
    again = shlex.split(errors.split("to go on:")[1])
    assert again[0] == "python" and again[-1] == "--resume"
    subprocess.run([sys.executable, *again[1:]], cwd=tmp_path, check=True)
    assert run("train.py", *flags, "--out", "whole", cwd=tmp_path).returncode == 0
    assert (tmp_path / f"out/llm+clip/stage1/{CHECKPOINT}").read_bytes() == (
        tmp_path / f"whole/llm+clip/stage1/{CHECKPOINT}").read_bytes()


def start(model, folder, **options):
    settings = dict(steps=6, batch_size=4, lr=1e-2, save_every=2) | options
    train.train_adapter(model, 2, dataset(model, 2), None, folder, **settings)


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
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"after step {step} of 6.*--resume"):
        stop_at(step, patch)
        start(tiny_model(), folder, **options)


@pytest.mark.parametrize("step", (1, 3, 6))
def test_a_stop_ends_the_step_and_saves(tmp_path, monkeypatch, step):
    interrupt(tmp_path / "a", monkeypatch, step)
    start(tiny_model(), tmp_path / "a", resume=True)
    start(tiny_model(), tmp_path / "b")
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()
    assert not list((tmp_path / "a").glob("state*"))


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, monkeypatch, capsys):
    interrupt(tmp_path / "a", monkeypatch, step=5)
    state = tmp_path / "a.part" / "state.pt"
    state.write_bytes(state.read_bytes()[:500])
    start(tiny_model(), tmp_path / "a", resume=True)
    start(tiny_model(), tmp_path / "b")
    assert "can't be read" in capsys.readouterr().out
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()


def test_a_pickle_in_a_state_is_never_executed(tmp_path, monkeypatch):
    interrupt(tmp_path / "a", monkeypatch)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    for name in train.STATES:
        torch.save({"step": Evil()}, tmp_path / "a.part" / name)
    start(tiny_model(), tmp_path / "a", resume=True)
    assert not (tmp_path / "evil").exists()


def test_a_run_with_other_settings_cannot_be_resumed(tmp_path, monkeypatch):
    interrupt(tmp_path / "a", monkeypatch)
    with pytest.raises(UserError, match="other settings"):
        start(tiny_model(), tmp_path / "a", resume=True, lr=2e-2)


def test_a_run_cannot_be_resumed_on_other_data(tmp_path, monkeypatch):
    interrupt(tmp_path / "a", monkeypatch)
    other = dataset(tiny_model(), 2)
    other = other._replace(tokens=[(q, a[1:]) for q, a in other.tokens])
    with pytest.raises(UserError, match="other settings"):
        train.train_adapter(tiny_model(), 2, other, None, tmp_path / "a", 6, 4, 1e-2, save_every=2, resume=True)


def test_an_interrupted_run_is_kept_when_a_new_one_begins(tmp_path, monkeypatch):
    interrupt(tmp_path / "a", monkeypatch)
    saved = (tmp_path / "a.part" / "state.pt").read_bytes()
    start(tiny_model(), tmp_path / "a")
    assert (tmp_path / "a.part.1" / "state.pt").read_bytes() == saved


def test_a_full_disk_ends_the_run_in_one_line_and_the_state_before_still_loads(tmp_path, monkeypatch):
    interrupt(tmp_path / "a", monkeypatch)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full)
        start(tiny_model(), tmp_path / "a", resume=True)
    start(tiny_model(), tmp_path / "a", resume=True)
    start(tiny_model(), tmp_path / "b")
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert fails_in_one_line(run("train.py", "--stage", 1, "--preset", "mini", "--out", "file", cwd=tmp_path))


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    model = tiny_model()
    real, calls = model.loss_sum, []

    def sometimes(f, tokens):
        calls.append(1)
        return real(f, tokens) * (float("nan") if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(model, "loss_sum", sometimes)
    start(model, tmp_path / "a")
    log = (tmp_path / "a" / "log.csv").read_text()
    assert log.count("not finite") == 2 and all(p.isfinite().all() for p in model.adapter(2).values())


def test_after_many_losses_that_are_not_finite_the_run_stops_with_advice(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "loss_sum", lambda f, tokens: model.img_d.sum() * float("nan"))
    with pytest.raises(UserError, match="20 steps in a row.*--lr"):
        start(model, tmp_path / "a", steps=100)


def test_a_gpu_that_is_too_small_is_told_in_one_line_and_the_run_goes_on(tmp_path, monkeypatch):
    model = tiny_model()
    calls, real = [], model.loss_sum

    def too_much(f, tokens):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(f, tokens)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="--batch-size"):
        patch.setattr(model, "loss_sum", too_much)
        start(model, tmp_path / "a")
    start(tiny_model(), tmp_path / "a", resume=True)
    start(tiny_model(), tmp_path / "b")
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()


def test_two_runs_cannot_share_a_folder(tmp_path):
    with train.locked(tmp_path / "out"):
        seen = []

        def second():
            try:
                with train.locked(tmp_path / "out"):
                    seen.append("in")
            except UserError as error:
                seen.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert "another run" in seen[0]
    with train.locked(tmp_path / "out"):
        pass
