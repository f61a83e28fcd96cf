"""Ready for a GPU without having one: everything keeps to the device, and a step does not wait.

The programs run on a pretended GPU (pretend.py), which refuses what a real one refuses and counts what it
waits for.
"""

import functools
from pathlib import Path

import numpy as np
import pretend
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import run

import on_gpu
import rivals
import sample
import train
from lmeye import CHECKPOINT, LMEye, Settings

# ---- The pretended GPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [
    lambda x: x + torch.ones(3, 4), lambda x: torch.cat([x, torch.ones(3, 4)]),
    lambda x: x @ torch.ones(4, 2),
    lambda x: torch.zeros(()).add_(x.sum()), lambda x: x.numpy(), lambda x: np.asarray(x),
    lambda x: x.cpu() / x.max(),
    lambda x: F.embedding(torch.tensor([1]), x), lambda x: torch.stack([x.sum(), torch.zeros(())]),
    lambda x: x.pin_memory(),
    lambda x: torch.multinomial(x + 1, 1, generator=torch.Generator().manual_seed(0)),
    lambda x: setattr(x, "data", torch.ones(3, 4)),
])
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(bad):
    with pretend.gpu(), pytest.raises((RuntimeError, TypeError), match="device|cuda"):
        bad(torch.zeros(3, 4, device="cuda"))


@pytest.mark.parametrize("waiting, n", [
    (lambda x: x.sum().item(), 1), (lambda x: bool((x > 0).all()), 1), (lambda x: x.tolist(), 1),
    (lambda x: x.cpu(), 1), (lambda x: x[x > 0], 1), (lambda x: x.nonzero(), 1),
    (lambda x: torch.ones(3).to(x.device), 1), (lambda x: torch.ones(3).to(x.device, non_blocking=True), 1),
    (lambda x: torch.ones(3).pin_memory().to(x.device), 1),
    (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), 0),
    (lambda x: x[torch.tensor([0])], 0), (lambda x: (x * 2).softmax(1).half(), 0),
])
def test_the_pretended_gpu_counts_what_waits(waiting, n):
    with pretend.gpu() as waits:
        x = torch.zeros(3, 4, device="cuda")
        waits.clear()
        waiting(x)
    assert sum(waits.values()) == n, waits
    assert all("test_device.py" in place for place in waits)


# ---- The programs keep to the device -------------------------------------------------------------------


MODELS = ["--llm", "llm", "--clip", "local-dir:clip"]


def stage(n, *flags):
    file = ("captions.jsonl", "chats.jsonl")[n - 1]
    return ["train.py", "--stage", n, "--data", file, "--batch-size", 16, *flags]


def done(home, *command):
    """Run a program to its end, without an error → its Result."""
    result = run(*command, *MODELS, cwd=home)
    assert result.returncode == 0, result.stderr
    return result


def adapter(home, out, name):
    path, = Path(home, out).glob(f"*/{name}/{CHECKPOINT}")
    return safetensors.torch.load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", (True, False))
def test_the_programs_keep_to_the_gpu(home, bf16, monkeypatch):
    """Without bf16 a GPU takes fp16, with a scaled loss."""
    monkeypatch.setattr(sample, "MAX_TOKENS", 4)
    out = ["--out", f"out-{bf16}"]
    with pretend.gpu(bf16):
        started = done(home, *stage(1, "--steps", 2, *out))
        assert "on cuda, frozen weights in " + ("bfloat16" if bf16 else "float16") in started.stdout
        for variant in ("norequest", "static", "lmeye"):
            done(home, *stage(2, "--steps", 2, "--variant", variant, "--accumulate", 2, *out))
        done(home, "sample.py", "--data", "choices.jsonl", *out)
        ask = ["sample.py", "0.png", "what color is it?", "--max-tokens", 5, *out]
        likeliest = done(home, *ask).stdout
        drawn = [done(home, *ask, "--temperature", 1, "--seed", seed).stdout for seed in (3, 3, 4)]
        assert drawn[0] == drawn[1] and len({likeliest, drawn[0], drawn[2]}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("fp32", "fp16"))
def test_a_run_on_the_gpu_ends_as_on_the_cpu_also_when_it_is_resumed(home, monkeypatch, precision):
    """In fp16 the loss is scaled, by a factor that here doubles at each step, and that a resumed run goes
    on with."""
    same, cpu, gpu = ["--steps", 5, "--precision", precision], f"cpu-{precision}", f"gpu-{precision}"
    step, update, scales, calls = torch.optim.AdamW.step, torch.amp.GradScaler.update, [], []
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=1))

    def noted(scaler):
        update(scaler)
        scales.append(scaler.get_scale())

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.amp.GradScaler.func, "update", noted)
    done(home, *stage(1, *same, "--out", cpu))
    unbroken, scales[:] = list(scales), []
    assert unbroken == ([2.0 ** n for n in range(17, 22)] if precision == "fp16" else [1.0] * 5)
    with pretend.gpu():
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", killed)
            assert run(*stage(1, *same, "--out", gpu), *MODELS, cwd=home).returncode == 130
        done(home, *stage(1, *same, "--out", gpu, "--resume"))
    assert scales == unbroken  # killed in its fourth step, before its update, it goes on from its third
    cpu, gpu = adapter(home, cpu, "stage1"), adapter(home, gpu, "stage1")
    assert all(torch.equal(cpu[name], gpu[name]) for name in cpu)


@pytest.fixture
def model_on_gpu(home):
    """A function: a class of models → one of them with tiny frozen parts, wherever a GPU is pretended."""
    def make(kind=LMEye, **settings):
        frozen = dict(preset="tiny", llm=str(home / "llm"), clip=str(home / "clip"))
        return kind.from_settings(Settings(**frozen, **settings))
    return make


@pytest.mark.parametrize("name", ["CurvedDecomposition", "TwoRounds", "EarlierRequest", "NoPictureToken"])
def test_the_exercises_keep_to_the_gpu(model_on_gpu, name):
    with pretend.gpu():
        model = model_on_gpu(rivals.RIVALS[name])
        model.set_trained(2)
        model.loss(torch.randn(2, 24), ["what color are they?", "is it red?"], ["red", "no"]).backward()
        assert model.generate(torch.randn(1, 24), ["is it red?"], max_tokens=2)


# ---- A step does not wait ------------------------------------------------------------------------------

OUR_WAITS, THEIR_WAITS = 1, 2  # a step: loss and norm read together; transformers' look at each pass's mask


@pytest.mark.parametrize("variant, stage_", [("lmeye", 1), ("lmeye", 2), ("norequest", 2), ("static", 2)])
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_how_often_a_step_waits_for_the_gpu(model_on_gpu, stage_, variant, precision, tmp_path, monkeypatch):
    """Each wait is a place where the processor stops until the GPU has caught up. What is written at
    validations is not counted, only what every step does."""
    monkeypatch.setattr(LMEye, "save", lambda self, path, stage: None)
    monkeypatch.setattr(train.Run, "save_state", lambda self, step: None)
    counted = []
    with pretend.gpu() as waits:
        model = model_on_gpu(variant=variant, precision=precision)
        assert all(isinstance(p, pretend.Gpu) for p in [*model.parameters(), *model.buffers()])
        for steps in (1, 3):
            folder = tmp_path / str(steps)
            folder.mkdir()
            waits.clear()
            dataset = on_gpu.random_dataset(model, stage_, 8, 2, 5)  # questions of one token
            train.train_adapter(model, stage_, dataset, None, folder, steps, batch_size=4, lr=1e-3)
            counted.append(dict(waits))
    a_step = {place: (n - counted[0].get(place, 0)) / 2 for place, n in counted[1].items()}
    theirs = sum(n for place, n in a_step.items() if "transformers/" in place)
    ours = sum(n for place, n in a_step.items() if "transformers/" not in place)
    assert ours <= OUR_WAITS and theirs <= THEIR_WAITS, a_step


def test_encoding_pictures_and_answering_wait_for_results_only(model_on_gpu):
    with pretend.gpu() as waits:
        model = model_on_gpu()
        waits.clear()
        f = model.encode_image(torch.randn(2, 3, 32, 32))
        assert not waits
        list(model.stream(f, ["is it red?", "what color?"], max_tokens=4))
    ours = sum(n for place, n in waits.items() if "transformers/" not in place)
    assert ours <= 8, waits  # for each token: whether its logits are finite, and whether all have ended
