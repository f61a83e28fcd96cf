"""What README.md shows runs as it stands there."""

import random
import re

import shapes
import torch
from conftest import ROOT, save_clip, save_llm

import lmeye

README = (ROOT / "README.md").read_text("utf-8")


def test_the_python_of_the_readme_runs_and_its_steps_are_those_of_the_model(tmp_path, monkeypatch, capsys):
    """On tiny random models in the miniature's place: what it puts together by hand must be what `prefill` puts together."""
    monkeypatch.chdir(tmp_path)
    save_llm("out/mini/llm")
    save_clip("out/mini/clip")
    torch.manual_seed(1)
    model = lmeye.LMEye.from_settings(lmeye.PRESETS["mini"])
    model.save("out/mini/stage2/adapter.safetensors", 2)
    (tmp_path / "out/mini/examples").mkdir()
    shapes.draw(shapes.SCENES[0], random.Random(0)).save("out/mini/examples/1.png")
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(block, names)
    x, _, cache = names["model"].read_prompt(names["f"], *names["model"].tokens([names["question"]], [""])[:2])
    assert torch.allclose(x[:, :1], names["img_d"], atol=1e-5) and cache.get_seq_length() == names["before"].shape[1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["f", "img", "h", "r", "v", "img_d"] and len(block.splitlines()) <= 30


def test_the_readme_is_short_and_its_files_are_there():
    assert len(README.splitlines()) <= 220
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"python (tests/\S+\.py)", README):
        assert (ROOT / name).exists(), name


def test_the_flags_of_the_readme_exist():
    known = ""
    for program in ("train", "sample"):
        known += (ROOT / f"{program}.py").read_text("utf-8")
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert f'"{flag}"' in known, flag
