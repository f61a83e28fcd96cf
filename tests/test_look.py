"""What look.py draws is what it says, and it never writes over a picture."""

import copy
import json
import tarfile
import zipfile

import pytest
import torch
from conftest import fails_in_one_line, run, save_clip, save_llm, tiny_model
from PIL import Image
from test_data import save_picture
from torch import nn

import data
import lmeye
import look
from lmeye import CHECKPOINT, LMEye, Settings

QUESTION, ANSWER = "what color is it?", "red"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a picture and, below out/, untrained checkpoints of all three interactions and of stage 1."""
    folder = tmp_path_factory.mktemp("look")
    save_picture(folder / "red.jpg", "red")
    settings = Settings("llm+clip", save_llm(folder / "llm"), save_clip(folder / "clip"))
    for name, stage in (("stage1", 1), ("stage2-norequest", 2), ("stage2-static", 2), ("stage2", 2)):
        settings.variant = name.partition("-")[2] or "full"
        LMEye.from_settings(settings).save(folder / "out" / "llm+clip" / name / CHECKPOINT, stage)
    return folder


def flags(folder):
    return ["--llm", folder / "llm", "--clip", f"local-dir:{folder / 'clip'}"]


def write_log(path, lines):
    """A log.csv with (step, loss, val_loss) in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},{loss},{val},{val},0.001,0.5,0,1000,1.0" for step, loss, val in lines]
    header = "step,loss,val_loss,val_loss_shuffled,lr,grad_norm,skipped,tokens_per_second,seconds"
    path.write_text("\n".join([header, *rows]))
    return path


def write_answers(path, rows):
    """An answers.jsonl with (image, answer, truth, category) in each line."""
    lines = []
    for image, answer, truth, category in rows:
        lines.append(json.dumps({"image": str(image), "question": "what is it?", "answer": answer, "truth": truth,
                                 "category": category}))
    path.write_text("\n".join(lines) + "\n")
    return path


def colors(page):
    return {color for _, color in page.getcolors(page.width * page.height)}


def rgb(name):
    return Image.new("RGB", (1, 1), name).getpixel((0, 0))


# ---- Looking into an answer ----------------------------------------------------------------------------------


class PlainViT(nn.Module):
    """An image tower like CLIP's ViT with 2 × 4 places; its feature depends on each place as much as `weights` say."""
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
    """An image tower like CLIP's ResNet: maps of 16, 8, 7 and 3 pixels; the feature depends on a place of the third."""

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


def test_saliency_finds_the_one_place_that_a_planted_tower_looks_at():
    model, picture = tiny_model(), Image.new("RGB", (32, 32), "red")
    for place in (1, 6):
        model.clip.visual = PlainViT([float(i == place) for i in range(8)])
        found = look.saliency(model, picture, QUESTION, ANSWER)
        expected = torch.zeros(2, 4)
        expected[place // 4, place % 4] = 1
        assert torch.equal(found, expected)
    model.clip.visual = OnePlaceResNet((5, 2))
    found = look.saliency(model, picture, QUESTION, ANSWER)
    expected = torch.zeros(7, 7)
    expected[5, 2] = 1
    assert torch.equal(found, expected)


EIGHT = [0.0, 0.2, 1.0, -0.7, 0.4, -0.1, 0.5, 0.3]  # weights of a PlainViT


def picture_of_four():
    picture = Image.new("RGB", (32, 32), "red")
    picture.paste("blue", (16, 0, 32, 16))
    picture.paste("white", (0, 16, 16, 32))
    return picture


def test_saliency_is_what_a_small_change_of_each_place_does_to_log_p():
    """Against finite differences: input × gradient is the slope along a place's own values."""
    model, picture, slopes = tiny_model(), picture_of_four(), []
    model.clip.visual = PlainViT(EIGHT)
    pixels = model.preprocess(picture)[None]
    for place in range(8):
        ends = []
        for share in (0.99, 1.01):
            scale = torch.ones(9, 1)
            scale[1 + place] = share
            hook = model.clip.visual.ln_pre.register_forward_hook(lambda layer, inputs, output: output * scale)
            ends.append(look.log_p(model, model.encode_image(pixels), QUESTION, ANSWER))
            hook.remove()
        slopes.append(abs(ends[1] - ends[0]))
    expected = torch.tensor(slopes).view(2, 4) / max(slopes)
    assert expected.min() < 0.01 and 0.1 < expected.median() < 0.9
    torch.testing.assert_close(look.saliency(model, picture, QUESTION, ANSWER), expected, rtol=0.05, atol=0.02)


def test_small_gradients_do_not_vanish_in_fp16():
    model, picture = tiny_model(), picture_of_four()
    model.clip.visual = PlainViT(EIGHT)
    with torch.no_grad():
        for layer in (model.align, model.decompose):
            layer.weight *= 1e-6
    expected = look.saliency(model, picture, QUESTION, ANSWER)
    model.llm.half(), model.clip.half()
    torch.testing.assert_close(look.saliency(model, picture, QUESTION, ANSWER), expected, rtol=0.1, atol=0.05)


def test_another_image_tower_is_refused_with_its_reason():
    model = tiny_model()
    model.clip.visual = nn.Flatten()
    with pytest.raises(lmeye.UserError, match="ViT and ResNet"):
        look.saliency(model, Image.new("RGB", (32, 32)), QUESTION, ANSWER)


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


def test_log_p_is_of_the_whole_answer_and_its_end():
    model, f = tiny_model(), torch.randn(1, 24)
    end = model.score(f, [QUESTION], [[ANSWER]]).item()  # without the end
    assert look.log_p(model, f, QUESTION, ANSWER) < end
    n = len(model.token_ids(None, [ANSWER])[1][0])
    per_token = model.loss(f, [QUESTION], [ANSWER]).item()
    assert look.log_p(model, f, QUESTION, ANSWER) == pytest.approx(-n * per_token, rel=1e-5)


def test_baselines_are_the_model_without_its_request_its_rivals_and_blind(folder):
    runs = folder / "out" / "llm+clip"
    _, settings, _, _ = lmeye.read_adapter(runs / "stage2" / CHECKPOINT)
    model = LMEye.from_settings(settings)
    model.load(runs / "stage2" / CHECKPOINT)
    f, gray = torch.randn(1, 24), torch.randn(1, 24)
    found = look.baselines(model, runs / "stage2" / CHECKPOINT, f, gray)
    assert [name for name, _, _ in found] == ["full", "full, its request set to zero", "norequest, as trained",
                                              "static, as trained", "blind: a gray picture"]
    said = [look.log_p(other, seen, QUESTION, ANSWER) for _, other, seen in found]
    assert said[0] == look.log_p(model, f, QUESTION, ANSWER) and said[4] == look.log_p(model, gray, QUESTION, ANSWER)
    for i, name in ((2, "norequest"), (3, "static")):
        rival = LMEye.from_settings(lmeye.read_adapter(runs / f"stage2-{name}" / CHECKPOINT)[1])
        rival.load(runs / f"stage2-{name}" / CHECKPOINT)
        assert said[i] == pytest.approx(look.log_p(rival, f, QUESTION, ANSWER), abs=1e-5)
    assert model.settings.variant == "full"
    with torch.no_grad():
        model.request.weight.zero_(), model.request.bias.zero_()
    assert said[1] == pytest.approx(look.log_p(model, f, QUESTION, ANSWER), abs=1e-5) and said[1] != said[0]


@pytest.mark.parametrize("more", ((), ("where is it?",)))
def test_answer_draws_one_picture(folder, tmp_path, more):
    result = run("look.py", "answer", "red.jpg", QUESTION, *more, *flags(folder), "--out", tmp_path / "look.png",
                 cwd=folder)
    assert result.returncode == 0 and result.stdout == f"{tmp_path / 'look.png'}\n", result.stderr
    page = Image.open(tmp_path / "look.png")
    assert page.format == "PNG" and page.size == (848, 530)
    red = page.getpixel((148, 158))  # the middle of the picture at the left
    assert red[0] > 240 and max(red[1:]) < 15
    assert {rgb(look.GREEN), rgb(look.BLUE)} <= colors(page)


def test_a_checkpoint_that_is_named_answers_and_static_has_no_features_to_leave_out(folder, tmp_path):
    checkpoint = folder / "out" / "llm+clip" / "stage2-static" / CHECKPOINT
    result = run("look.py", "answer", "red.jpg", QUESTION, *flags(folder), "--checkpoint", checkpoint, "--out",
                 tmp_path / "look.png", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert rgb(look.BLUE) not in colors(Image.open(tmp_path / "look.png"))


def test_mistakes_in_looking_end_in_one_line(folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    own, stage1 = flags(folder), folder / "out" / "llm+clip" / "stage1" / CHECKPOINT
    for mistake in (
        ["red.jpg", "red.jpg", *own],  # two pictures
        ["red.jpg", "", *own],
        ["red.jpg", QUESTION, " ", *own],
        ["red.jpg", QUESTION],  # models of one's own, not named
        ["red.jpg", QUESTION, *own, "--checkpoint", stage1],  # captions only
        ["red.jpg", QUESTION, *own, "--checkpoint", "nowhere"],
        ["red.jpg", "red " * 5000, *own],  # longer than the context
        [tmp_path / "broken.jpg", QUESTION, *own],
        ["nowhere.jpg", QUESTION, *own],
    ):
        result = run("look.py", "answer", *mistake, "--out", tmp_path / "look.png", cwd=folder)
        assert fails_in_one_line(result), (mistake, result.stderr)
        assert not (tmp_path / "look.png").exists()
    nothing = run("look.py", "answer", folder / "red.jpg", QUESTION, cwd=tmp_path)
    assert fails_in_one_line(nothing) and "train.py --stage 1" in nothing.stderr


def test_a_picture_that_is_there_is_never_written_over(folder, tmp_path):
    log = write_log(tmp_path / "log.csv", [(1, 2.0, 2.0), (2, 1.0, "")])
    answers = write_answers(tmp_path / "answers.jsonl", [(folder / "red.jpg", "a", "b", "all")])
    names = {"loss.png": ["curve", log], "sheet.png": ["sheet", answers], "failures.png": ["sheet", answers, "--wrong"],
             "mine.png": ["curve", log, "mine.png"], "logs.png": ["logs", log, log],
             "look.png": ["answer", folder / "red.jpg", QUESTION, *flags(folder)]}
    for name, command in names.items():
        (tmp_path / name).write_bytes(b"precious")
        result = run("look.py", *command, cwd=tmp_path)
        assert fails_in_one_line(result) and name in result.stderr and "there already" in result.stderr, result.stderr
        assert (tmp_path / name).read_bytes() == b"precious"
        with pytest.raises(lmeye.UserError, match="there already"):
            look.save(Image.new("RGB", (2, 2)), tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"precious"
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    assert fails_in_one_line(run("look.py", "curve", log, "link.png", cwd=tmp_path))


# ---- Curves --------------------------------------------------------------------------------------------------


def test_a_point_stands_where_its_numbers_say():
    assert look.position(15, 10, 20, log=False) == 0.5 and look.position(10, 1, 100, log=True) == pytest.approx(0.5)
    assert look.marks(0, 8, log=False) == [0, 2, 4, 6, 8]
    assert look.marks(1, 81, log=True) == pytest.approx([1, 3, 9, 27, 81])
    page = look.draw_curves([look.Curve("a", look.BLUE, [(0, 100), (10, 10), (20, 1)])], "step", log_y=True)
    blue = rgb(look.BLUE)
    left, right, top, bottom = 60, 770, 42, 420
    for x, y in ((left, top), ((left + right) // 2, (top + bottom) // 2), (right, bottom)):
        assert page.getpixel((x, y)) == blue
    assert page.getpixel((left, bottom)) != blue and page.getpixel((right, top)) != blue


def test_pages_stand_beside_and_below_each_other():
    pages = [Image.new("RGB", (3, 2), color) for color in ("red", "green", "blue")]
    whole = look.tile(pages)
    assert whole.size == (6, 4)
    colors = [whole.getpixel(place) for place in ((0, 0), (2, 1), (3, 0), (2, 2), (5, 3))]
    assert colors == [(255, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]


def test_the_losses_of_a_run_are_drawn(tmp_path):
    log = write_log(tmp_path / "log.csv", [(1, 3.0, ""), (2, 2.0, 2.5), (3, 1.5, ""), (4, "nan", 2.0), (5, 0.0, "inf")])
    result = run("look.py", "curve", log, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == f"{tmp_path / 'loss.png'}\n"
    assert "4 losses that are not finite" in result.stderr
    page = Image.open(tmp_path / "loss.png")
    assert page.format == "PNG" and page.size == (800, 480)
    assert {rgb(look.BLUE), rgb(look.RED), rgb("#7f7f7f")} <= colors(page)
    assert look.read_log(log)["loss"] == [(1, 3), (2, 2), (3, 1.5)]
    assert look.read_log(log)["val_loss"] == [(2, 2.5), (4, 2)]


def test_a_log_is_laid_over_another(tmp_path):
    mine = write_log(tmp_path / "mine" / "log.csv", [(1, 3.0, ""), (2, 2.0, 2.5)])
    reference = write_log(tmp_path / "reference" / "log.csv", [(1, 3.0, ""), (4, 1.0, 0.5)])
    result = run("look.py", "logs", mine, reference, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{mine}: val_loss 2.5000 at step 2" in result.stdout
    assert f"{reference}: val_loss 0.5000 at step 4" in result.stdout
    page = Image.open(tmp_path / "logs.png")
    found = colors(page)
    assert {rgb(look.BLUE), rgb(look.RED), rgb(look.LIGHT_BLUE), rgb(look.LIGHT_RED)} <= found
    below = [y for y in range(page.height) for x in range(page.width) if page.getpixel((x, y)) == rgb(look.RED)]
    above = [y for y in range(page.height) for x in range(page.width) if page.getpixel((x, y)) == rgb(look.BLUE)]
    assert max(below) > max(above)  # the reference has the lower loss, on the same axes


COLUMNS = b"step,loss,val_loss,val_loss_shuffled\n"


@pytest.mark.parametrize("content", [b"", b"step,loss\n1,2\n", b"a picture", COLUMNS + b"1,two,,\n", COLUMNS + b"1\n",
                                     COLUMNS + b"1,nan,,\n", b"\xff\xfe\x00"])
def test_what_is_no_log_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    result = run("look.py", "curve", path, cwd=tmp_path)
    assert fails_in_one_line(result) and "log.csv" in result.stderr, result.stderr
    assert not (tmp_path / "loss.png").exists()


# ---- Differences with their intervals ------------------------------------------------------------------------


def test_differences_stand_where_their_numbers_say(tmp_path):
    tables = tmp_path / "tables.md"
    tables.write_text("| | color | all |\n|---|---|---|\n| full | 90.0 ± 1.0 | 80.0 ± 1.0 |\n\n"
                      "| | color | all |\n|---|---|---|\n| full − static | 20.0 ± 5.0 | -10.0 ± 4.0 |\n\n"
                      "| | the trap: right | the trap: says yes |\n|---|---|---|\n| full − static | 30.0 ± 10.0 | 1.0 ± 1.0 |\n")
    rows = look.read_differences(tables)
    assert rows == {"full − static": {"color": (20, 5), "all": (-10, 4), "the trap": (30, 10)}}
    page = look.draw_differences(rows)
    zero = next(x for x in range(120, page.width) if page.getpixel((x, page.height - 40)) == (0, 0, 0))
    blue = [(x, y) for x in range(120, page.width) for y in range(58, page.height - 36)
            if page.getpixel((x, y)) == (0x1F, 0x77, 0xB4)]
    third = (page.height - 40 - 58) / 3
    per_point = (page.width - 110 - 20) / 60  # from -20 to 40
    for i, (low, high) in enumerate(((15, 25), (-14, -6), (20, 40))):
        of_group = [x for x, y in blue if third * i <= y - 58 < third * (i + 1)]
        assert abs((min(of_group) - zero) / per_point - low) < 0.3 and abs((max(of_group) - zero) / per_point - high) < 0.3
    png = tmp_path / "out.png"
    assert run("tests/lab/look.py", "differences", tables, png).stdout.split() == [str(png)]
    again = run("tests/lab/look.py", "differences", tables, png)
    assert fails_in_one_line(again) and "already" in again.stderr


@pytest.mark.parametrize("content, told", [("| | all |\n| full | 1.0 |\n", "holds no rows"),
                                           ("| | all |\n|---|---|\n| full − static | 1.0 |\n", "line 3: 1.0 is no mean")])
def test_what_has_no_differences_is_told_in_one_line(tmp_path, content, told):
    (tmp_path / "tables.md").write_text(content)
    result = run("tests/lab/look.py", "differences", tmp_path / "tables.md", tmp_path / "x.png")
    assert fails_in_one_line(result) and told in result.stderr


def test_more_rows_than_colors_are_drawn():
    rows = {f"full − {i}": {"all": look.Interval(i, 1.0)} for i in range(10)}  # as boards have
    assert look.draw_differences(rows).height > look.draw_differences({"full − 0": rows["full − 0"]}).height


# ---- Sheets of answers ---------------------------------------------------------------------------------------


def test_a_sheet_shows_twelve_pictures_with_their_answers(tmp_path):
    save_picture(tmp_path / "a.png", "blue")
    answers = write_answers(tmp_path / "answers.jsonl", [("a.png", "red", "red", "all")] * 15)
    result = run("look.py", "sheet", answers, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == f"{tmp_path / 'sheet.png'}\n", result.stderr
    page = Image.open(tmp_path / "sheet.png")
    assert page.width == 868 and page.height == 10 + 3 * (192 + 20 + 16 * 2)
    for row in range(3):
        for column in range(4):
            assert page.getpixel((116 + 212 * column, 106 + 244 * row)) == (0, 0, 255)
    assert rgb(look.RED) not in colors(page)  # no truth is shown, where all are right


def test_failures_are_drawn_by_category_and_counted(tmp_path):
    save_picture(tmp_path / "a.png", "blue")
    save_picture(tmp_path / "b.png", "yellow")
    rows = [("a.png", "red", "blue", "color")] * 6 + [("b.png", "Yes", "yes", "yes/no")] * 3
    rows += [("b.png", "no", "yes", "yes/no"), ("b.png", "no", "", "not known")]
    answers = write_answers(tmp_path / "answers.jsonl", rows)
    result = run("look.py", "sheet", answers, "--wrong", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"color: 6 failures\nyes/no: 1 failures\n{tmp_path / 'failures.png'}\n"
    page = Image.open(tmp_path / "failures.png")
    drawn = [page.getpixel((116 + 212 * (i % 4), 106 + (page.height - 10) // 2 * (i // 4))) for i in range(6)]
    assert drawn == [(0, 0, 255)] * 4 + [(255, 255, 0), (255, 255, 255)]  # four of color, one of yes/no, no more
    assert rgb(look.RED) in colors(page)
    right = write_answers(tmp_path / "right.jsonl", [("a.png", "red", "red", "color")])
    result = run("look.py", "sheet", right, "none.png", "--wrong", cwd=tmp_path)
    assert result.returncode == 0 and "nothing to draw" in result.stdout and not (tmp_path / "none.png").exists()


def test_pictures_are_read_in_place_as_an_evaluation_names_them(tmp_path):
    for name, color in (("red", "red"), ("blue", "blue"), ("a: b", "white")):
        save_picture(tmp_path / f"{name}.png", color)
    with zipfile.ZipFile(tmp_path / "x: y.zip", "w") as archive:
        archive.write(tmp_path / "red.png", "deep/red: one.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "blue.png", "key.png")
    members = [data.Member(str(tmp_path / "x: y.zip"), "deep/red: one.png"), tmp_path / "a: b.png"]
    with tarfile.open(tmp_path / "shard.tar") as archive:
        info = archive.getmember("key.png")
    members.append(data.Member(str(tmp_path / "shard.tar"), "key.png", info.offset_data, info.size))
    for member, color in zip(members, ("red", "white", "blue")):
        found = look.find_picture(str(member))
        assert str(found) == str(member) and data.load_image(found).getpixel((5, 5)) == rgb(color)


@pytest.mark.parametrize("content", [
    "", "{}", "[1]", "no json", '{"image": 1, "question": "", "answer": "", "truth": "", "category": ""}',
    '{"image": "nowhere.png", "question": "", "answer": "a", "truth": "", "category": ""}'])
def test_what_is_no_file_of_answers_is_told_in_one_line(tmp_path, content):
    (tmp_path / "answers.jsonl").write_text(content)
    result = run("look.py", "sheet", "answers.jsonl", cwd=tmp_path)
    assert fails_in_one_line(result), result.stderr
    assert not (tmp_path / "sheet.png").exists()


def test_no_command_is_told():
    result = run("look.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "answer, curve, logs, differences or sheet" in result.stderr
