"""train.py, and both programs together, as a user meets them: flags, folders, mistakes in one line. (What
sample.py does alone is in test_sample.py, what happens at a terminal in test_terminal.py.)"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, fails_in_one_line, opt_tokenizer, run, save_clip, save_llm
from test_data import save_picture
from test_resume import stop_at

import data
import lmeye
import sample
import train
from lmeye import CHECKPOINT, LMEye, read_adapter

SHARED = ROOT.parent / "shared"
COLORS = ("red", "green", "blue", "yellow", "white", "black")
MODELS = ["--llm", "llm", "--clip", "clip"]
ONE = ["--stage", 1, *MODELS, "--data", "pictures", "--batch-size", 4]
TWO = ["--stage", 2, *MODELS, "--data", "chat.json", "--images", "pictures", "--batch-size", 4]
RED, QUESTION = "pictures/red.jpg", "what color is it?"
EVALUATE = ["--data", "chat.json", "--images", "pictures"]


def trains(*flags, cwd, program="train.py"):
    """Run a program that has to succeed → Result."""
    result = run(program, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def asks(*flags, cwd):
    return trains(*flags, cwd=cwd, program="sample.py")


def made(out, name):
    """The folder of a run of the tiny models below `out`."""
    return Path(out, "llm+clip", name)


def about(out, name):
    return json.loads((made(out, name) / "run.json").read_text())


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def told_last(result, text):
    """Whether a refusal says so in its last line: above may stand the usage, which names all flags."""
    return result.returncode == 2 and text in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny frozen models, six pictures, and a run of both stages below out/llm+clip."""
    folder = tmp_path_factory.mktemp("trained")
    save_llm(folder / "llm")
    save_clip(folder / "clip")
    items = []
    for color in COLORS:
        save_picture(folder / f"pictures/{color}.jpg", color)
        (folder / f"pictures/{color}.txt").write_text(f"a {color} background")
        texts = ["<image>\n" + QUESTION, color, "is it red?", "yes" if color == "red" else "no"]
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        items.append({"image": f"{color}.jpg", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(items))
    for flags in (ONE, TWO):
        trains(*flags, "--steps", 3, cwd=folder)
    return folder


def test_both_stages_leave_an_adapter_a_log_and_settings_and_the_second_begins_with_the_first(trained):
    for stage in ("stage1", "stage2"):
        assert names(made(trained / "out", stage)) == {CHECKPOINT, "log.csv", "run.json"}
    one, two = [read_adapter(made(trained / "out", f"stage{n}") / CHECKPOINT)[3] for n in (1, 2)]
    assert one.keys() == {"align.weight", "align.bias", "img"} < two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_flags_reach_the_run(trained, tmp_path):
    given = {"steps": 2, "batch size": 3, "lr": 0.002, "max batch tokens": 99, "accumulate": 2, "seed": 7,
             "n features": 4, "n slots": 2, "dropout": 0.25, "variant": "norequest", "precision": "bf16"}
    pairs = [(f"--{name.replace(' ', '-')}", value) for name, value in given.items()]
    one = made(trained / "out", "stage1") / CHECKPOINT
    trains(*TWO, *sum(pairs, ()), "--train-align", "--init", one, "--out", tmp_path, cwd=trained)
    found = about(tmp_path, "stage2-norequest-align")
    columns = {"lr": "learning rate", "n features": "N", "n slots": "Q", "precision": "frozen weights"}
    expected = given | {"precision": "torch.bfloat16"}
    assert {name: found[columns.get(name, name)] for name in given} == expected
    assert found["align trained"] and found["started from"] == str(one)
    moved = read_adapter(made(tmp_path, "stage2-norequest-align") / CHECKPOINT)[3]
    assert not torch.equal(moved["align.weight"], read_adapter(one)[3]["align.weight"])


def test_defaults_are_those_of_the_help(trained):
    found = {name: (row.n_features, row.n_slots, row.dropout) for name, row in lmeye.PRESETS.items()}
    small, large = (5, 1, 0), (5, 1, 0.5)
    assert found == {"mini": small, "smollm2": small, "emoji": small, "opt-1.3b": large,
                     "bloomz-7b1": (5, 5, 0.5)}
    assert (lmeye.Settings().n_image_tokens, lmeye.Settings().variant) == (1, "lmeye")
    first, second = [about(trained / "out", f"stage{n}")["learning rate"] for n in (1, 2)]
    assert first / second == pytest.approx(5, rel=0.12)  # reach 40 and 8, of the same pictures, in two digits


def test_the_seed_decides_with_which_layers_a_run_begins(trained, tmp_path):
    found = []
    for seed in ("0", "1"):
        brief = ["--steps", 1, "--lr", 1e-12, "--seed", seed, "--out", tmp_path / seed]
        trains(*ONE, *brief, cwd=trained)
        found.append(read_adapter(made(tmp_path / seed, "stage1") / CHECKPOINT)[3]["align.weight"])
    assert not torch.allclose(*found, atol=1e-3)


def test_what_trains_something_else_has_a_folder_of_its_own(trained, tmp_path):
    for flags in (ONE, [*TWO, "--variant", "static"]):
        assert told_last(run("train.py", *flags, "--train-align", cwd=trained), "--train-align would do")
    shutil.copytree(made(trained / "out", "stage1"), made(tmp_path, "stage1"))
    for flags in (["--train-align"], ["--variant", "static"]):
        trains(*TWO, "--steps", 1, *flags, "--out", tmp_path, cwd=trained)
    assert names(made(tmp_path, "")) >= {"stage1", "stage2-align", "stage2-static"}
    assert not made(tmp_path, "stage2").exists()


def test_a_picture_may_be_two_words_and_sample_needs_no_flag_for_it(trained, tmp_path):
    for flags in (ONE, TWO):
        trains(*flags, "--steps", 1, "--n-image-tokens", 2, "--out", tmp_path, cwd=trained)
    tensors = read_adapter(made(tmp_path, "stage2") / CHECKPOINT)[3]
    assert tensors["align.weight"].shape[0] == 2 * tensors["img"].shape[0]
    assert asks(RED, QUESTION, "--out", tmp_path, cwd=trained).stdout.strip()


def test_training_ends_with_an_evaluation_of_what_was_named_for_it(trained, tmp_path, monkeypatch):
    noted = []
    monkeypatch.setattr(sample, "evaluate", lambda *given: noted.append(given))
    save_picture(tmp_path / "val/new.jpg", "red")
    rows = [{"image": f"{name}.jpg", "caption": "a red background"} for name in ("new", "none")]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    val = ["--val", tmp_path / "val.json", "--val-images", tmp_path / "val", "--max-batch-tokens", 555]
    result = trains(*ONE, "--images", "pictures", "--steps", 1, *val, "--out", tmp_path, cwd=trained)
    (model, dataset, folder, max_batch_tokens), = noted
    assert [record.image for record in dataset.records] == ["new.jpg"] and max_batch_tokens == 555
    assert isinstance(model, LMEye) and folder == made(tmp_path, "stage1") / "evaluation"
    found = about(tmp_path, "stage1")
    assert (found["records"], found["val records"], sum(found["skipped"].values())) == (6, 1, 1)
    assert "skipped 1: no such picture" in result.stdout


def test_small_data_of_ones_own_works_by_itself(trained, tmp_path, monkeypatch):
    """60 pictures and captions, then 180 questions, no other flag: the loop is left after its first step."""
    rows = {"captions": [], "questions": []}
    for i in range(60):
        save_picture(tmp_path / f"pictures/{i}.png", (4 * i, 200, 7 * i % 256))
        rows["captions"].append({"image": f"{i}.png", "caption": "a blue background"})
        for color in COLORS[:3]:
            rows["questions"].append({"image": f"{i}.png", "question": f"is it {color}?", "answer": "no"})
    for kind, items in rows.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(items))
    asked, real = [], train.train_adapter

    def first_step_only(model, stage, train, val, folder, steps, *given):
        batch_size, _, max_batch_tokens = given[:3]
        batches = len(data.plan_epoch(train, batch_size, max_batch_tokens, 0, 0))
        assert steps % batches == 0  # whole epochs of the batches that there are
        asked.append((steps, len(train.records), len(set(val.picture))))
        real(model, stage, train, val, folder, 1, *given)

    monkeypatch.setattr(train, "train_adapter", first_step_only)
    models = ["--llm", trained / "llm", "--clip", trained / "clip", "--images", "pictures"]
    for stage, kind, row, n in ((1, "captions", "CLIPScore", 6), (2, "questions", "all", 18)):
        told = trains("--stage", stage, *models, "--data", f"{kind}.json", cwd=tmp_path).stdout
        steps, records, pictures = asked[-1]
        assert 500 <= steps < 520 and pictures == 6 and records == 9 * n
        found = about(tmp_path / "out", f"stage{stage}")
        assert f"in {steps:,} steps ({found['epochs']:g} epochs)" in told
        assert f"{records} records to train on, {n} to validate on\n" in told  # nothing is shared
        scores = made(tmp_path / "out", f"stage{stage}") / "evaluation/scores.json"
        assert found["scores"][row]["n"] == n
        assert found["scores"] == json.loads(scores.read_text())
    few = ["--max-batch-tokens", 30, "--out", "few"]
    trains("--stage", 1, *models, "--data", "captions.json", *few, cwd=tmp_path)
    assert asked[-1][0] > 500  # of more, smaller batches
    few = ["--max-batch-tokens", 30, "--out", "few"]
    trains("--stage", 1, *models, "--data", "captions.json", *few, cwd=tmp_path)
    assert asked[-1][0] > 500  # of more, smaller batches


def test_by_default_whole_epochs_make_500_steps_at_least():
    found = [train.default_steps(*given) for given in ((1, 1), (3, 1), (3, 2), (499, 1), (700, 1), (9999, 4))]
    assert found == [500, 501, 501, 998, 700, 2500]


def test_validation_pictures_that_are_trained_on_are_told(trained, tmp_path):
    save_picture(tmp_path / "val/a.jpg", "pink")
    save_picture(tmp_path / "val/b.jpg", "red")  # by another name, and yet the same
    for name in ("a", "b"):
        (tmp_path / f"val/{name}.txt").write_text("a picture")
    flags = ["--steps", 1, "--val", tmp_path / "val", "--val-images", tmp_path / "val", "--out", tmp_path]
    told = "2 to validate on; 1 of their pictures are trained on as well\n"
    assert told in trains(*ONE, *flags, cwd=trained).stdout


def test_both_programs_report_what_is_left_out(trained, tmp_path):
    rows = json.loads((trained / "chat.json").read_text())
    rows += [rows[0] | {"image": "none.jpg"}, {"image": "red.jpg"}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    given = ["--data", tmp_path / "chat.json", "--images", "pictures", "--out", tmp_path]
    start = made(trained / "out", "stage1") / CHECKPOINT
    told = [trains(*TWO, "--steps", 1, *given, "--init", start, cwd=trained).stdout,
            asks(*given, cwd=trained).stderr]
    for text in told:
        assert "skipped 1: a record of no known kind" in text
        assert "skipped 1: no such picture" in text and "none.jpg" in text
    assert sum(about(tmp_path, "stage2")["skipped"].values()) == 2


def test_without_data_a_gpu_names_the_commands_that_fetch_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    start = made(trained / "out", "stage1") / CHECKPOINT
    for flags, folder in ((["--stage", 1], "llava-cc3m-595k"),
                          (["--stage", 2, "--init", start], "llava-instruct-150k")):
        result = run("train.py", *flags, "--out", "big", cwd=tmp_path)
        assert "models: opt-1.3b, on cuda, frozen weights in bfloat16" in result.stdout
        assert fails_in_one_line(result)
        assert f"into big/data/{folder}: hf download liuhaotian" in result.stderr


def test_the_users_commands_write_nothing_but_their_notes_to_the_standard_error(trained, tmp_path):
    """Neither a warning of ours nor one of a library's. (And after the imports Ctrl-C is what it was.)"""
    out = ["--out", tmp_path]
    commands = [["train.py", *ONE, "--steps", 3, *out], ["train.py", *TWO, "--steps", 3, *out],
                ["sample.py", RED, QUESTION, *out], ["sample.py", *EVALUATE, *out]]
    script = "import runpy, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    for command in commands:
        script += f"sys.argv = {list(map(str, command))}\n"
        script += f"runpy.run_path('{ROOT / command[0]}', run_name='__main__')\n"
        script += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    strict = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning", "-c", script]
    process = subprocess.run([sys.executable, *strict], cwd=trained, text=True, capture_output=True,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    answers = f"answers: {made(tmp_path, 'stage2') / CHECKPOINT}\n"
    notes = [line for line in process.stderr.splitlines(True) if not line.startswith("note: the answer was")]
    assert "".join(notes) == answers * 2 + "data: 12 records to evaluate\n" and process.returncode == 0


def test_a_new_run_beside_a_complete_one_is_what_resume_goes_on_with(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    again = [*ONE, "--steps", 2, "--resume", "--out", tmp_path / "out"]
    assert "nothing to resume" in trains(*again, cwd=trained).stdout
    (made(tmp_path / "out", "stage1") / CHECKPOINT).unlink()  # killed before it saved anything
    result = trains(*again, cwd=trained)
    assert "note: there is nothing to resume in" in result.stdout and "a new run begins" in result.stdout
    assert "is complete" not in result.stdout and "stage1.1" in result.stderr
    assert names(made(tmp_path / "out", "")) >= {"stage1", "stage1.1"}


def test_stage_2_does_not_start_from_a_stage_1_that_is_not_complete(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    place = made(tmp_path / "out", "stage1")
    (place / train.STATE).write_bytes(b"")
    command = [*TWO, "--steps", 1, "--out", tmp_path / "out"]
    result = run("train.py", *command, cwd=trained)
    assert fails_in_one_line(result) and "stage1 is not complete" in result.stderr
    trains(*command, "--init", place / CHECKPOINT, cwd=trained)
    (place / CHECKPOINT).unlink()  # stopped before it saved one
    assert "stage1 is not complete" in run("train.py", *command, cwd=trained).stderr


def test_what_a_run_was_started_from_belongs_to_what_resume_compares(trained, tmp_path, monkeypatch):
    trains(*ONE, "--steps", 1, "--seed", 1, "--out", tmp_path / "other", cwd=trained)
    one, other = [made(out, "stage1") / CHECKPOINT for out in (trained / "out", tmp_path / "other")]
    shutil.copy(one, tmp_path / "copy.safetensors")  # the same, by another name
    command = [*TWO, "--steps", 4, "--out", tmp_path, "--init"]
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert run("train.py", *command, one, cwd=trained).returncode == 130
    refused = run("train.py", *command, other, "--resume", cwd=trained)
    assert fails_in_one_line(refused) and f"from other weights ({one}, at that time)" in refused.stderr
    trains(*command, tmp_path / "copy.safetensors", "--resume", cwd=trained)


def test_a_folder_that_is_not_there_is_told_at_once(trained, tmp_path, monkeypatch):
    """No hub is asked for a name that begins with a folder: its retries take most of a minute."""
    for name in ("out/smollm2", "pictures/opt", "nowhere", "a/b/c"):
        result = run("train.py", *ONE, "--llm", name, cwd=trained)
        assert fails_in_one_line(result) and f"--llm {name}: no such folder" in result.stderr
    monkeypatch.setattr(subprocess, "Popen", None)  # the miniature is not made before that is told
    result = run("train.py", "--stage", 1, "--preset", "smollm2", "--out", "a b", cwd=tmp_path)
    assert fails_in_one_line(result) and "run python tests/lab/smollm2.py --out 'a b'" in result.stderr


def test_out_names_a_folder_also_in_the_home(trained, tmp_path, monkeypatch):
    assert told_last(run("train.py", *ONE, "--out", "", cwd=trained), "--out has to name something")
    monkeypatch.setenv("HOME", str(tmp_path))
    trains(*ONE, "--steps", 1, "--out=~/runs", cwd=trained)
    assert (made(tmp_path / "runs", "stage1") / CHECKPOINT).is_file() and not (trained / "~").exists()


@pytest.mark.parametrize("temperature", (0, 1e-45, 1e-38, 0.005))
def test_temperatures_next_to_zero_take_the_likeliest_token(temperature):
    generator = torch.Generator().manual_seed(0)
    assert lmeye.choose_token(torch.tensor([[4.0, 4.1, -9]]), temperature, 0, generator).tolist() == [1]


@pytest.mark.parametrize("told, mistake", [
    ("nowhere: no such file", [*ONE, "--data", "nowhere"]),
    ("be used as a checkpoint", [*TWO, "--init", RED]),
    ("not one of 1 records can be used", [*ONE, "--data", "llm/config.json"]),
    ("nowhere", [*ONE, "--data", "chat.json", "--images", "nowhere"]),
    ("questions, for --stage 2", [*ONE, "--data", "chat.json"]),
    ("captions, for --stage 1", [*TWO, "--data", "captions.json"]),
    ("--clip nowhere: no such folder", [*ONE, "--clip", "nowhere"]),
    ("is in the folder of this run", [*TWO, "--init", f"out/llm+clip/stage2/{CHECKPOINT}"]),
    ("--n-features", [*ONE, "--n-features", 100]),
    ("not read at the end", [*ONE, "--clip", "first"]),
])
def test_mistakes_in_training_end_in_one_line(trained, tmp_path, told, mistake):
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy/captions.json").write_text('[{"image": "red.jpg", "caption": "red"}]')
    shutil.copytree(trained / "clip", tmp_path / "copy/first")
    path = tmp_path / "copy/first/open_clip_config.json"
    clip = json.loads(path.read_text())
    clip["model_cfg"]["text_cfg"]["pool_type"] = "first"
    path.write_text(json.dumps(clip))
    result = run("train.py", "--steps", 1, *mistake, cwd=tmp_path / "copy")
    assert fails_in_one_line(result) and told in result.stderr


@pytest.mark.parametrize("flag", [
    ["--steps", 0], ["--lr", -1], ["--lr", "nan"], ["--accumulate", 0], ["--stage", 3],
    ["--precision", "int8"], ["--variant", "full"], ["--seed", 10 ** 30],
    ["--images", "pictures"], ["--val", "pictures"],
])
def test_flags_out_of_range_or_without_effect_are_named(flag):
    assert told_last(run("train.py", "--stage", 1, *flag), flag[0])


@pytest.mark.parametrize("flags, told", [
    ([], "--stage 1 first"),
    (["--init", "nowhere"], "nowhere is missing"),
])
def test_stage_2_without_a_stage_1_says_so_before_it_does_anything(tmp_path, flags, told):
    result = run("train.py", "--stage", 2, "--preset", "mini", *flags, cwd=tmp_path)
    assert fails_in_one_line(result) and told in result.stderr
    assert not (tmp_path / "out/mini/llm").exists()


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where, fill, told", [
    ("os.fsync", full_disk, "/llm+clip/stage1/run.json: can't be written (No space left on device)"),
    ("train.mean_loss", lambda *_: [0] * 10 ** 15, "out of memory; lower --max-batch-tokens"),
    ("train.mean_loss", lambda *_: torch.empty(10 ** 15), "out of memory; lower --max-batch-tokens"),
])
def test_a_full_disk_and_full_memory_are_told_in_one_line(trained, tmp_path, monkeypatch, where, fill, told):
    out = ["--out", tmp_path]
    trains(*ONE, "--steps", 1, *out, cwd=trained)  # so that the CLIP features are there
    monkeypatch.setattr(where, fill)
    result = run("train.py", *ONE, "--val", "pictures", "--steps", 1, *out, cwd=trained)
    assert fails_in_one_line(result._replace(stderr=result.stderr.split("now stage1.1\n")[-1]))
    assert told in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "opt-tokenizer").is_dir(), reason="needs ../shared")
def test_photographs_are_learned_by_heart_with_opts_own_tokenizer(tmp_path):
    """Both phases, to a falling loss and the right answers: `facebook/opt-…` in small."""
    llm = tmp_path / "opt-small"
    opt_tokenizer(llm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    photos = SHARED / "photos"
    items = json.loads((photos / "instruct.json").read_text())
    talks = []
    for item in items:
        talks.append([turn["value"].replace("<image>", "").strip() for turn in item["conversations"]])
    torch.manual_seed(0)
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=50272, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, init_std=0.1, dropout=0.0))
    questions, answers = ([text for talk in talks for text in talk[turn::2]] for turn in (0, 1))
    texts = [f"Image: {a}\nQuestion: {q}\nAnswer: {a}</s>" for q in questions for a in answers]
    texts += [f"Image: {path.read_text().strip()}</s>" for path in photos.glob("COCO*.txt")] * 10
    optimizer = torch.optim.AdamW(opt.parameters(), 3e-3)
    for _ in range(150):  # a language model that reads and speaks these words, as a published one does
        batch = tokenizer(random.sample(texts, 32), return_tensors="pt", padding=True)
        loss = opt(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    opt.save_pretrained(llm)
    save_clip(tmp_path / "clip")
    flags = ["--llm", "opt-small", "--clip", "clip", "--dropout", 0, "--batch-size", 8, "--lr", 0.03]

    def losses(stage):
        lines = Path(tmp_path, f"out/opt-small+clip/stage{stage}/log.csv").read_text().splitlines()
        return [float(line.split(",")[1]) for line in lines[1:]]

    for path in (photos, photos / "chat.json"):
        trains("--stage", 1, *flags, "--data", path, "--steps", 100, cwd=tmp_path)
        assert losses(1)[-1] < losses(1)[0] - 0.5
    trains("--stage", 2, *flags, "--data", photos / "instruct.json", "--steps", 600, cwd=tmp_path)
    assert losses(2)[-1] < 0.2 * losses(2)[0]
    asks("--data", photos / "instruct.json", cwd=tmp_path)
    text = (tmp_path / "out/opt-small+clip/stage2/evaluation-instruct/answers.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    right = [line["right"] for line in lines if len(line["turns"]) == 1]  # the first questions
    assert sum(right) >= len(right) - 1 and len(right) == len(items)
