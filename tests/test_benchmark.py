"""The first run on a GPU is not lost to a typo: what benchmark.py keeps for one runs on a pretended one."""

import sys

import pretend
import pytest
import torch

import benchmark
import on_gpu
import train


@pytest.mark.slow
def test_everything_that_is_kept_for_a_gpu_runs_on_a_pretended_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu", "--dry"])
    monkeypatch.setattr(on_gpu, "KINDS", ((1, "lmeye"), (2, "lmeye")))  # some of it, to save time
    monkeypatch.delitem(on_gpu.BOUNDS, torch.bfloat16)
    with pretend.gpu():
        benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" not in "\n".join(lines) and all(line.startswith("dry gpu") for line in lines[1:])
    for row in ("share", "train", "first"):
        assert any(f"s  {row}: " in line for line in lines), row
    assert lines[-1].endswith("16 of 16 held")


def test_without_a_gpu_the_benchmark_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "no CUDA GPU" in lines[1]


def test_a_check_that_does_not_hold_is_told_and_the_rest_goes_on(monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: something")

    for part in ("equals_cpu", "resumes", "full_size", "memory"):
        monkeypatch.setattr(on_gpu, part, broken)
    monkeypatch.setattr(broken, "__name__", "broken")
    def row(scale):
        yield "a line"

    out = "\n".join(on_gpu.session([row], benchmark.DRY))
    assert out.count("FAILED") == 4 and "a line" in out and "0 of 4 held" in out


def test_a_run_that_does_not_resume_exactly_is_told(monkeypatch):
    monkeypatch.setattr(on_gpu, "BOUNDS", {torch.float32: (0, 0)})
    resume = train.Run.resume

    def one_step_off(self):
        return resume(self) - 1

    monkeypatch.setattr(train.Run, "resume", one_step_off)
    line, = on_gpu.resumes(benchmark.DRY)
    assert line.startswith("FAILED")


def test_padding_is_what_the_batches_compute_over_what_is_real():
    lines = list(benchmark.padding(benchmark.DRY))
    by_records, by_tokens, by_both = [float(line.split(": ")[1].split()[0]) for line in lines]
    assert 1 < by_tokens < by_both < 1.05 < by_records < 1.2
