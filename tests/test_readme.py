"""What README.md shows runs as it stands there."""

import random
import re

import shapes
import torch
from conftest import ROOT, save_clip, save_llm

import lmeye

README = (ROOT / "README.md").read_text("utf-8")


def test_the_python_of_the_readme_runs_and_does_the_steps_of_plain_loss(tmp_path, monkeypatch, capsys):
    """On tiny random models in the miniature's place: its request, its reply and its first word are those of
    the model."""
    monkeypatch.chdir(tmp_path)
    save_llm("out/mini/llm")
    save_clip("out/mini/clip")
    torch.manual_seed(1)
    model = lmeye.LMEye.from_settings(lmeye.PRESETS["mini"])
    model.save("out/mini/stage2/adapter.safetensors", 2)
    (tmp_path / "out/mini/examples").mkdir()
    shapes.draw(shapes.SCENES[0], random.Random(0)).save("out/mini/examples/3.png")
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(block.splitlines()) <= 22
    seen, logits_of = [], lmeye.LMEye.logits

    def logits_seen(model, h):
        seen.append(logits_of(model, h))
        return seen[-1]

    monkeypatch.setattr(lmeye.LMEye, "logits", logits_seen)
    names = {}
    exec(block, names)
    first_word = seen[-1]  # those before are of `generate`

    question, f = "what shape are they?", names["f"]
    _, logits, h = lmeye.plain_loss(model, f, question, "circle")
    assert torch.allclose(names["h"], h, atol=1e-5)
    x, _, cache = model.read_prompt(f, *model.tokenize([question], [""])[:2])
    assert torch.allclose(names["told"], x[:, :1], atol=1e-5)
    assert cache.get_seq_length() == names["prompt"].shape[1]
    assert torch.allclose(first_word, logits[:1], atol=1e-4)
    assert names["word"].item() == logits[0].argmax().item()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(model.generate(f, [question]))
    assert [line.split()[0] for line in printed[1:7]] == ["f", "seen", "h", "r", "v", "told"]


def test_the_readme_is_short_and_its_lines_are():
    lines = README.splitlines()
    code = "".join(re.findall(r"```sh\n.*?```", README, re.DOTALL))
    assert len(lines) <= 160
    for line in lines:
        assert len(line) <= 100 or line.startswith("|") or line in code, line


def test_the_files_that_the_readme_names_are_there():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"python (\S+\.py)", README):
        assert (ROOT / name).exists(), name


def test_the_flags_of_the_readme_exist():
    known = '"--no-deps"'  # of pip
    for program in ("train", "sample"):
        known += (ROOT / f"{program}.py").read_text("utf-8")
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert f'"{flag}"' in known, flag


def test_the_readme_names_every_preset_and_every_control():
    for name in lmeye.PRESETS:
        assert f"--preset {name}" in README or f"`{name}`" in README, name
    for name in lmeye.VARIANTS[1:]:
        assert f"`--variant {name} " in README, name
