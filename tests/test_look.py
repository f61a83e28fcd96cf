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
    """A folder with two pictures and, below out/, untrained checkpoints of all variants and of stage 1."""
    folder = tmp_path_factory.mktemp("look")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.new("RGB", (40, 30), "blue").save(folder / "blue.png")
    settings = Settings("llm+clip", save_llm(folder / "llm"), save_clip(folder / "clip"))
    for name, stage in (("stage1", 1), ("stage2-norequest", 2), ("stage2-static", 2), ("stage2", 2)):
        settings.variant = name.partition("-")[2] or "lmeye"
        LMEye.from_settings(settings).save(folder / "out" / "llm+clip" / name / CHECKPOINT, stage)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn from here on: ("text", place, text, color) or ("bar", box, color)."""
    found, text, rectangle = [], ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.rectangle

    def note_text(self, place, written, color=None, *rest):
        found.append(("text", place, written, color))
        text(self, place, written, color, *rest)

    def note_bar(self, box, color=None, *rest):
        found.append(("bar", box, color))
        rectangle(self, box, color, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note_text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", note_bar)
    return found


def texts(drawn):
    return [item[2] for item in drawn if item[0] == "text"]


def write_log(path, lines):
    """A log.csv with (step, loss, val_loss) in each line; the shuffled loss is one more."""
    rows = [f"{step},{loss},{val},{val},0.001,0.5,0,1000,1.0" for step, loss, val in lines]
    header = "step,loss,val_loss,val_loss_shuffled,lr,grad_norm,skipped,tokens_per_second,seconds"
    path.write_text("\n".join([header, *rows]))
    return path


def write_answers(path, rows):
    """An answers.jsonl as sample.py writes it, with (image, turns, answer, truth) in each line."""
    lines = []
    for image, turns, answer, truth in rows:
        line = {"id": None, "image": image, "question": turns[-1] if turns else None, "turns": turns,
                "answer": answer, "blind": "", "truth": truth, "category": "all",
                "right": truth and answer == truth, "blind_right": truth and False}
        lines.append(json.dumps(line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


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


def test_a_model_is_compared_with_itself_without_its_request_the_controls_and_blind(folder):
    runs = folder / "out" / "llm+clip"
    model = LMEye.from_settings(lmeye.read_adapter(runs / "stage2" / CHECKPOINT)[1])
    model.load(runs / "stage2" / CHECKPOINT)
    f, gray = torch.randn(1, 24), torch.randn(1, 24)
    found = look.compared_with(model, runs / "stage2" / CHECKPOINT, f, gray)
    assert [name for name, _, _ in found] == ["lmeye", "the same, its request zero", "norequest, as trained",
                                              "static, as trained", "blind: a gray picture"]
    said = [look.log_p(other, seen, QUESTION, ANSWER) for _, other, seen in found]
    tokens = len(model.answer_ids([ANSWER])[0])  # with its end
    plain = [-tokens * lmeye.plain_loss(model, x, QUESTION, ANSWER)[0].item() for x in (f, gray)]
    assert [said[0], said[4]] == pytest.approx(plain, rel=1e-5) and abs(said[0] - said[1]) > 1e-3
    for i, name in ((2, "norequest"), (3, "static")):
        control = LMEye.from_settings(lmeye.read_adapter(runs / f"stage2-{name}" / CHECKPOINT)[1])
        control.load(runs / f"stage2-{name}" / CHECKPOINT)
        assert said[i] == pytest.approx(look.log_p(control, f, QUESTION, ANSWER), abs=1e-5)
    with torch.no_grad():
        model.request.weight.zero_(), model.request.bias.zero_()
    assert said[1] == pytest.approx(look.log_p(model, f, QUESTION, ANSWER), abs=1e-5)


def test_the_page_of_an_answer_has_its_numbers_and_its_bars_have_one_scale(folder, drawn, monkeypatch):
    monkeypatch.setattr(look, "leave_one_out", lambda model, f, question, answer: {
        QUESTION: [0.5, -1.0, 0.0, 0.0, 0.0], look.SECOND: [2.0, 0.0, 0.0, 0.0, -0.25]}[question])
    result = run("look.py", "answer", "red.png", QUESTION, "--png", "page.png", cwd=folder)
    assert result.returncode == 0 and result.stdout == "page.png\n", result.stderr
    page = Image.open(folder / "page.png")
    assert page.format == "PNG" and page.getpixel((148, 158)) == (255, 0, 0)  # the picture
    said = texts(drawn)
    assert said.count("f1: +0.50") == said.count("f2: -1.00") == said.count("f5: -0.25") == 1
    bars = [item[1] for item in drawn if item[0] == "bar" and item[2] == look.BLUE]
    zeros = [look.MIDDLE + 80] * 5 + [look.RIGHT + 80] * 5
    ends = [box[0] + box[2] - zero - zero for box, zero in zip(bars, zeros)]
    assert [end / 37.5 for end in ends] == [0.5, -1, 0, 0, 0, 2, 0, 0, 0, -0.25]
    model, _ = look.sample.load_trained(folder / "out" / "llm+clip" / "stage2" / CHECKPOINT)
    f = model.encode_image(model.preprocess(Image.open(folder / "red.png"))[None])
    answer = model.generate(f, [QUESTION])[0]
    p = math.exp(look.log_p(model, f, QUESTION, answer))
    below = said.index("answers, and p of the first one")
    assert said[below + 1].startswith(f"lmeye: {answer}"[:40]) and said[below + 2] == f"{p:.2f}"


@pytest.mark.parametrize("mistake", [
    ["nowhere.png", QUESTION], ["red.png", QUESTION, "--checkpoint", "nowhere"],
    ["red.png", QUESTION, "--checkpoint", f"out/llm+clip/stage1/{CHECKPOINT}"], ["red.png", "red " * 5000]])
def test_mistakes_in_looking_are_told_and_nothing_is_drawn(folder, mistake):
    result = run("look.py", "answer", *mistake, "--png", "none.png", cwd=folder)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not (folder / "none.png").exists()


# ---- Logs --------------------------------------------------------------------------------------------------


def test_the_losses_of_two_runs_are_drawn_on_the_same_named_axes(tmp_path, drawn):
    mine = write_log(tmp_path / "mine.csv", [(1, 3.0, ""), (2, 2.0, 2.5), (3, "nan", "inf"), (4, 0.0, "")])
    other = write_log(tmp_path / "other.csv", [(1, 8.0, ""), (5, 1.0, 0.5)])
    result = run("look.py", "logs", mine, other, cwd=tmp_path)
    assert result.returncode == 0 and "4 losses that are not finite" in result.stderr
    assert f"{mine}: val_loss 2.5000 at step 2\n" in result.stdout
    assert f"{other}: loss 1.0000 at step 5\n" in result.stdout
    said = texts(drawn)
    assert "step" in said and "loss of a token (logarithmic)" in said
    assert [text for text in said if text.endswith(("loss", "shuffled"))] == [
        f"{path}: {column}" for path in (other, mine) for column in ("loss", "val_loss", "val_loss_shuffled")]
    for mark in ("1", "2", "3", "4", "5", "0.5", "8"):  # the losses' axis: 0.5, 1, 2, 4, 8
        assert mark in said
    assert Image.open(tmp_path / "logs.png").format == "PNG"


# ---- Sheets ------------------------------------------------------------------------------------------------


def test_a_sheet_has_a_chats_last_question_whole_and_the_truth_where_it_differs(folder, tmp_path, drawn):
    long = "what " + "very " * 60 + "last?"
    write_answers(tmp_path / "run" / "evaluation" / "answers.jsonl", [
        ("blue.png", ["earlier?", "before", long], "yes", "no"), ("red.png", ["asked?"], "right", "right"),
        ("red.png", ["unknown?"], "said", None), ("red.png", [], "a caption", None)])
    result = run("look.py", "sheet", tmp_path / "run", "--images", folder, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "sheet.png\n", result.stderr
    said = texts(drawn)
    assert f"earlier? / before / {long}" in " ".join(said) and "(caption)" in said and "right" in said
    assert [text for text in said if text.startswith("truth")] == ["truth: no"]
    page = Image.open(tmp_path / "sheet.png")
    assert all(x + 190 < page.width and y + 14 < page.height for _, (x, y), *_ in drawn)  # nothing is cut off
    drawn.clear()
    result = run("look.py", "sheet", tmp_path / "run", "--wrong", "--images", folder, cwd=tmp_path)
    assert result.stdout == "1 of 4 answers are wrong\nsheet.png\n" and "truth: no" in texts(drawn)
    assert "said" not in texts(drawn) and "right" not in texts(drawn)  # of one nobody knows, one is right


def test_the_key_tells_who_gave_which_answer_and_the_sheet_does_not(folder, tmp_path, drawn):
    for run_name in ("mine", "theirs"):
        answers = [f"{run_name} {i}" for i in range(20)] + ["same"] * 5
        rows = [("red.png", [f"question {i}?"], answer, "x") for i, answer in enumerate(answers)]
        write_answers(tmp_path / run_name / "answers.jsonl", rows)
    result = run("look.py", "compare", "mine", "theirs", "--images", folder, "--number", 16, cwd=tmp_path)
    assert result.returncode == 0 and "the two differ on 20 of 25 questions" in result.stdout, result.stderr
    key = json.loads((tmp_path / "compare.key.json").read_text())
    said = texts(drawn)
    assert len(key) == 16 and len(said) == 48
    for entry, question, a, b in zip(key, said[0::3], said[1::3], said[2::3]):
        number, i = question.split()[0].rstrip("."), question.split()[2].rstrip("?")
        assert entry["number"] == int(number)
        assert (a, b) == (f"A: {entry['A']} {i}", f"B: {entry['B']} {i}")
        assert {entry["A"], entry["B"]} == {"mine", "theirs"}
    answers = [look.read_answers(tmp_path / name) for name in ("mine", "theirs")]
    _, key = look.pair_blindly(*answers, ("mine", "theirs"), 20, random.Random(0))
    assert {entry["A"] for entry in key} == {"mine", "theirs"}
    write_answers(tmp_path / "theirs" / "answers.jsonl", rows[:-1])
    other = run("look.py", "compare", "mine", "theirs", "--images", folder, cwd=tmp_path)
    assert other.returncode == 2 and "not asked the same" in other.stderr


def test_a_picture_or_key_that_is_there_is_renamed_and_not_written_over(folder, tmp_path):
    log = write_log(tmp_path / "log.csv", [(1, 2.0, 2.0), (2, 1.0, "")])
    for name, answer in (("a", "yes"), ("b", "no")):
        write_answers(tmp_path / name / "answers.jsonl", [("red.png", ["q?"], answer, "x")])
    files = {"logs.png": ["logs", log], "sheet.png": ["sheet", "a", "--images", folder],
             "compare.png": ["compare", "a", "b", "--images", folder]}
    for name, command in files.items():
        kept = [tmp_path / name] + [tmp_path / "compare.key.json"] * (name == "compare.png")
        for path in kept:
            path.write_bytes(b"precious")
        for n in (1, 2):
            result = run("look.py", *command, cwd=tmp_path)
            assert result.returncode == 0 and f"{name}.{n}" in result.stderr, result.stderr
        for path in kept:
            assert path.with_name(f"{path.name}.1").read_bytes() == b"precious" != path.read_bytes()


HEAD = "step,loss,val_loss,val_loss_shuffled\n"


@pytest.mark.parametrize("command, content", [
    ("logs", ""), ("logs", "step,loss\n1,2\n"), ("logs", HEAD + "1,two,,\n"), ("logs", HEAD + "1,nan,,\n"),
    ("sheet", ""), ("sheet", "{}"), ("sheet", "[1]"), ("sheet", "no json"), ("sheet", '{"turns": []}')])
def test_what_is_no_log_and_no_file_of_answers_is_told_in_one_line(tmp_path, command, content):
    (tmp_path / "file").write_text(content)
    result = run("look.py", command, "file", "--png", "none.png", cwd=tmp_path)
    assert fails_in_one_line(result) and "file" in result.stderr and not (tmp_path / "none.png").exists()
