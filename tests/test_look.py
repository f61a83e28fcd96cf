"""What look.py draws is what it says, and it never writes over a picture."""

import copy
import json
import math
import random

import pytest
import torch
from conftest import fails_in_one_line, run, save_clip, save_llm, tiny_model
from PIL import Image, ImageDraw
from torch import nn

import lmeye
import look
from lmeye import CHECKPOINT, LMEye, Settings

QUESTION, ANSWER = "what color is it?", "red"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a picture and, below out/, untrained checkpoints of all variants and of stage 1."""
    folder = tmp_path_factory.mktemp("look")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    settings = Settings("llm+clip", save_llm(folder / "llm"), save_clip(folder / "clip"))
    for name, stage in (("stage1", 1), ("stage2-norequest", 2), ("stage2-static", 2), ("stage2", 2)):
        settings.variant = name.partition("-")[2] or "lmeye"
        LMEye.from_settings(settings).save(folder / "out" / "llm+clip" / name / CHECKPOINT, stage)
    return folder


@pytest.fixture
def said(monkeypatch):
    """The texts that are drawn from here on."""
    found, text = [], ImageDraw.ImageDraw.text

    def note(self, place, written, *rest):
        found.append(written)
        text(self, place, written, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return found


def write_log(path, lines):
    """A log.csv with (step, loss, val_loss) in each line; the shuffled loss is one more."""
    rows = [f"{step},{loss},{val},{val},0.001,0.5,0,1000,1.0" for step, loss, val in lines]
    header = "step,loss,val_loss,val_loss_shuffled,lr,grad_norm,skipped,tokens_per_second,seconds"
    path.write_text("\n".join([header, *rows]))
    return path


def write_answers(path, rows):
    """An answers.jsonl as sample.py writes it, with (turns, answer, truth) about red.png in each line."""
    lines = []
    for turns, answer, truth in rows:
        right = None if truth is None else answer == truth
        lines.append(json.dumps({"image": "red.png", "turns": turns, "answer": answer, "truth": truth,
                                 "category": "all", "right": right, "blind_right": False}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# ---- Looking into an answer --------------------------------------------------------------------------------


class PlainViT(nn.Module):
    """An image tower like CLIP's ViT with 2 × 4 places; each counts as much as `weights` say."""
    grid_size = (2, 4)

    def __init__(self, weights):
        super().__init__()
        self.ln_pre = nn.Identity()
        self.weights, self.proj = nn.Parameter(torch.tensor(weights)), nn.Parameter(torch.randn(3, 24))

    def forward(self, pixels):
        patches = nn.functional.avg_pool2d(pixels, (16, 8)).flatten(2).transpose(1, 2)  # (B, 8, 3)
        x = self.ln_pre(torch.cat([patches.new_ones(len(pixels), 1, 3), patches], 1))
        return (self.weights[:, None] * x[:, 1:].tanh()).sum(1) @ self.proj


class OnePlaceResNet(nn.Module):
    """An image tower like CLIP's ResNet: it looks at a place of the third of its maps, of 7 pixels."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.layer1, self.layer2 = nn.AdaptiveAvgPool2d(16), nn.AdaptiveAvgPool2d(8)
        self.layer3, self.layer4 = nn.AdaptiveAvgPool2d(7), nn.AdaptiveAvgPool2d(3)
        self.proj = nn.Parameter(torch.randn(3, 24))

    def forward(self, pixels):
        x = self.layer3(self.layer2(self.layer1(pixels + 3)))
        only = torch.zeros(1, 1, 7, 7)
        only[0, 0, self.place[0], self.place[1]] = 1
        return self.layer4(x * only).sum((2, 3)) @ self.proj


def test_saliency_finds_the_one_place_that_a_resnet_looks_at_and_other_towers_are_refused():
    model, picture, expected = tiny_model(), Image.new("RGB", (32, 32), "red"), torch.zeros(7, 7)
    model.clip.visual, expected[5, 2] = OnePlaceResNet((5, 2)), 1
    assert torch.equal(look.saliency(model, picture, QUESTION, ANSWER), expected)
    model.clip.visual = nn.Flatten()
    with pytest.raises(lmeye.UserError, match="ViT and ResNet"):
        look.saliency(model, picture, QUESTION, ANSWER)


@pytest.fixture
def four_colors():
    """A model with a PlainViT, and a picture of four colors."""
    model, picture = tiny_model(), Image.new("RGB", (32, 32), "red")
    picture.paste("blue", (16, 0, 32, 16))
    picture.paste("white", (0, 16, 16, 32))
    model.clip.visual = PlainViT([0.0, 0.2, 1.0, -0.7, 0.4, -0.1, 0.5, 0.3])
    return model, picture


def test_saliency_is_what_a_small_change_of_each_place_does_to_log_p(four_colors):
    """Against finite differences: input × gradient is the slope along a place's own values."""
    (model, picture), slopes = four_colors, []
    pixels = model.preprocess(picture)[None]
    for place in range(8):
        ends = []
        for share in (0.99, 1.01):
            scale = torch.ones(9, 1)
            scale[1 + place] = share
            hook = model.clip.visual.ln_pre.register_forward_hook(lambda layer, inputs, x: x * scale)
            ends.append(look.log_p(model, model.encode_image(pixels), QUESTION, ANSWER))
            hook.remove()
        slopes.append(abs(ends[1] - ends[0]))
    expected = torch.tensor(slopes).view(2, 4) / max(slopes)
    assert expected.min() < 0.01 and 0.1 < expected.median() < 0.9
    found = look.saliency(model, picture, QUESTION, ANSWER)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_small_gradients_do_not_vanish_in_fp16(four_colors):
    model, picture = four_colors
    with torch.no_grad():
        for layer in (model.align, model.decompose):
            layer.weight *= 1e-6
    expected = look.saliency(model, picture, QUESTION, ANSWER)
    model.llm.half(), model.clip.half()
    torch.testing.assert_close(look.saliency(model, picture, QUESTION, ANSWER), expected, rtol=0.1, atol=0.05)


def test_leave_one_out_equals_removing_a_feature_by_hand():
    model, f = tiny_model(), torch.randn(1, 24)
    W = model.request.out_features
    whole, expected = look.log_p(model, f, QUESTION, ANSWER), []
    for i in range(model.settings.n_features):
        poorer = copy.deepcopy(model)
        with torch.no_grad():
            poorer.decompose.weight[i * W:(i + 1) * W] = 0
            poorer.decompose.bias[i * W:(i + 1) * W] = 0
        expected.append(whole - look.log_p(poorer, f, QUESTION, ANSWER))
    assert look.leave_one_out(model, f, QUESTION, ANSWER) == pytest.approx(expected, abs=1e-5)
    assert min(abs(loss) for loss in expected) > 1e-4
    assert look.log_p(model, f, QUESTION, ANSWER) == whole  # nothing of it stays in the model


def loaded(checkpoint):
    """The model of a checkpoint."""
    model = LMEye.from_settings(lmeye.read_adapter(checkpoint)[1])
    model.load(checkpoint)
    return model


def test_a_model_is_compared_with_itself_without_its_request_the_controls_and_blind(folder):
    runs = folder / "out" / "llm+clip"
    model = loaded(runs / "stage2" / CHECKPOINT)
    f, gray = torch.randn(1, 24), torch.randn(1, 24)
    found = {name: look.log_p(other, seen, QUESTION, ANSWER)
             for name, other, seen in look.compared_with(model, runs / "stage2" / CHECKPOINT, f, gray)}
    tokens, expected = len(model.answer_ids([ANSWER])[0]), {}  # with its end
    for name, seen in (("lmeye", f), ("blind: a gray picture", gray)):
        expected[name] = -tokens * lmeye.plain_loss(model, seen, QUESTION, ANSWER)[0].item()
    for name in ("norequest", "static"):
        control = loaded(runs / f"stage2-{name}" / CHECKPOINT)
        expected[f"{name}, as trained"] = look.log_p(control, f, QUESTION, ANSWER)
    with torch.no_grad():
        for p in model.request.parameters():
            p.zero_()
    expected["the same, its request zero"] = look.log_p(model, f, QUESTION, ANSWER)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found.values())) == 5


def test_the_page_of_an_answer_has_its_numbers(folder, said, monkeypatch):
    lost = {QUESTION: [0.5, -1.0, 0.0, 0.0, 0.0], look.SECOND: [2.0, 0.0, 0.0, 0.0, -0.25]}
    monkeypatch.setattr(look, "leave_one_out", lambda model, f, question, answer: lost[question])
    result = run("look.py", "answer", "red.png", QUESTION, "--png", "page.png", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert Image.open(folder / "page.png").format == "PNG"
    assert {"f1: +0.50", "f2: -1.00", "f1: +2.00", "f5: -0.25"} < set(said)
    model = loaded(folder / "out" / "llm+clip" / "stage2" / CHECKPOINT)
    f = model.encode_image(model.preprocess(Image.open(folder / "red.png"))[None])
    answer = model.generate(f, [QUESTION])[0]
    below = said.index("answers, and p of the first one")
    assert said[below + 1].startswith(f"lmeye: {answer}"[:40])
    assert said[below + 2] == f"{math.exp(look.log_p(model, f, QUESTION, answer)):.2f}"


@pytest.mark.parametrize("mistake", [
    ["nowhere.png", QUESTION], ["red.png", QUESTION, "--checkpoint", "nowhere"],
    ["red.png", QUESTION, "--checkpoint", f"out/llm+clip/stage1/{CHECKPOINT}"], ["red.png", "red " * 5000]])
def test_mistakes_in_looking_are_told_and_nothing_is_drawn(folder, mistake):
    result = run("look.py", "answer", *mistake, "--png", "none.png", cwd=folder)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not (folder / "none.png").exists()


# ---- Logs --------------------------------------------------------------------------------------------------


def test_the_losses_of_two_runs_are_drawn_on_the_same_named_axes(tmp_path, said):
    mine = write_log(tmp_path / "mine.csv", [(1, 3.0, ""), (2, 2.0, 2.5), (3, "nan", "inf"), (4, 0.0, "")])
    other = write_log(tmp_path / "other.csv", [(1, 8.0, ""), (5, 1.0, 0.5)])
    result = run("look.py", "logs", mine, other, cwd=tmp_path)
    assert "4 losses that are not finite" in result.stderr
    assert f"{mine}: val_loss 2.5000 at step 2\n" in result.stdout
    assert f"{other}: loss 1.0000 at step 5\n" in result.stdout
    steps, losses = ("1", "2", "3", "4", "5"), ("0.5", "1", "2", "4", "8")
    named = ("step", "loss of a token (logarithmic)", f"{mine}: loss", f"{other}: val_loss")
    assert {*named, *steps, *losses} < set(said)
    assert Image.open(tmp_path / "logs.png").format == "PNG"


# ---- Sheets ------------------------------------------------------------------------------------------------


def test_a_sheet_has_a_chats_last_question_whole_and_the_truth_where_it_differs(folder, tmp_path, said):
    long = "what " + "very " * 60 + "last?"
    write_answers(tmp_path / "run" / "evaluation" / "answers.jsonl", [
        (["earlier?", "before", long], "yes", "no"), (["asked?"], "right", "right"),
        (["unknown?"], "said", None), ([], "a caption", None)])
    result = run("look.py", "sheet", tmp_path / "run", "--images", folder, cwd=tmp_path)
    assert result.stdout == "sheet.png\n", result.stderr
    assert f"earlier? / before / {long}" in " ".join(said)
    assert {"(caption)", "right", "said"} < set(said)
    assert [text for text in said if text.startswith("truth")] == ["truth: no"]
    said.clear()
    result = run("look.py", "sheet", tmp_path / "run", "--wrong", "--images", folder, cwd=tmp_path)
    assert result.stdout == "1 of 4 answers are wrong\nsheet.png\n"
    assert "truth: no" in said
    assert {"right", "said"}.isdisjoint(said)  # one is right, of one nobody knows


def test_the_key_tells_who_gave_which_answer_and_the_sheet_does_not(folder, tmp_path, said):
    for name in ("mine", "theirs"):
        rows = [([f"question {i}?"], f"{name} {i}", "x") for i in range(20)]
        rows += [([f"question {i}?"], "same", "x") for i in range(20, 25)]
        write_answers(tmp_path / name / "answers.jsonl", rows)
    command = ("look.py", "compare", "mine", "theirs", "--images", folder)
    result = run(*command, "--number", 16, cwd=tmp_path)
    assert "the two differ on 20 of 25 questions" in result.stdout, result.stderr
    key = json.loads((tmp_path / "compare.key.json").read_text())
    assert len(key) == 16
    for entry, question, a, b in zip(key, said[0::3], said[1::3], said[2::3]):
        number, _, i = question.rstrip("?").split()
        assert number == f"{entry['number']}."
        assert [a, b] == [f"A: {entry['A']} {i}", f"B: {entry['B']} {i}"]
    answers = [look.read_answers(tmp_path / name) for name in ("mine", "theirs")]
    _, key = look.pair_blindly(*answers, ("mine", "theirs"), 20, random.Random(0))
    assert {entry["A"] for entry in key} == {"mine", "theirs"}
    write_answers(tmp_path / "theirs" / "answers.jsonl", rows[:-1])
    other = run(*command, cwd=tmp_path)
    assert other.returncode == 2 and "not asked the same" in other.stderr


def test_a_picture_or_key_that_is_there_is_renamed_and_not_written_over(folder, tmp_path):
    log = write_log(tmp_path / "log.csv", [(1, 2.0, 2.0), (2, 1.0, "")])
    for name, answer in (("a", "yes"), ("b", "no")):
        write_answers(tmp_path / name / "answers.jsonl", [(["q?"], answer, "x")])
    names = ("logs.png", "compare.png", "compare.key.json")
    for name in names:
        (tmp_path / name).write_bytes(b"precious")
    for command in (["logs", log], ["compare", "a", "b", "--images", folder]):
        result = run("look.py", *command, cwd=tmp_path)
        assert f"{command[0]}.png.1" in result.stderr
    for name in names:
        assert (tmp_path / f"{name}.1").read_bytes() == b"precious" != (tmp_path / name).read_bytes()


HEAD = "step,loss,val_loss,val_loss_shuffled\n"


@pytest.mark.parametrize("command, content", [
    ("logs", ""), ("logs", "step,loss\n1,2\n"), ("logs", HEAD + "1,two,,\n"), ("logs", HEAD + "1,nan,,\n"),
    ("sheet", ""), ("sheet", "{}"), ("sheet", "[1]"), ("sheet", "no json"), ("sheet", '{"turns": []}')])
def test_what_is_no_log_and_no_file_of_answers_is_told_in_one_line(tmp_path, command, content):
    (tmp_path / "file").write_text(content)
    result = run("look.py", command, "file", "--png", "none.png", cwd=tmp_path)
    assert fails_in_one_line(result) and "file" in result.stderr and not (tmp_path / "none.png").exists()
