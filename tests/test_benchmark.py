"""The first run on a GPU is not lost to a typo: what benchmark.py keeps for one runs on a pretended one."""

import sys

import pretend
import pytest
import torch

import benchmark
import measure
import on_gpu


@pytest.mark.slow
def test_everything_that_is_kept_for_a_gpu_runs_on_a_pretended_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu", "--dry"])
    monkeypatch.setattr(on_gpu, "KINDS", ((1, "full"), (2, "full")))  # some of it, to save time
    monkeypatch.setattr(on_gpu, "BOUNDS", {dtype: on_gpu.BOUNDS[dtype] for dtype in (torch.float32, torch.float16)})
    with pretend.gpu():
        benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" not in "\n".join(lines) and all(line.startswith("dry gpu") for line in lines[1:])
    for row in ("train", "share", "first", "generate", "features", "epoch"):
        assert any(f"s  {row}: " in line for line in lines), row
    assert lines[-1].endswith("16 of 16 held")


def test_without_a_gpu_the_benchmark_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "no CUDA GPU" in lines[1]


def test_a_check_that_does_not_hold_is_told_and_the_rest_goes_on(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("CUDA error: something")

    for part in ("equals_cpu", "resumes", "full_size", "memory"):
        monkeypatch.setattr(on_gpu, part, broken)
    monkeypatch.setattr(broken, "__name__", "broken")
    on_gpu.session([lambda scale: ["a line"]], benchmark.DRY, dry=True)
    out = capsys.readouterr().out
    assert out.count("FAILED") == 4 and "a line" in out and "0 of 4 held" in out


def test_the_default_dtype_is_given_back_when_the_memory_does_not_suffice(monkeypatch):
    def full(config):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        measure.random_llm("tiny", torch.bfloat16, "cpu")
    assert torch.get_default_dtype() == torch.float32
