"""train.py, and both programs together, as a user meets them: flags, folders, terminals, and mistakes that end
in one line with status 2. (What sample.py does alone is in test_sample.py.)"""

import io
import json
import os
import pty
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, fails_in_one_line, opt_tokenizer, run, save_clip, save_llm
from PIL import Image
from test_data import save_picture
from test_resume import FORKS, stop_at
from tqdm import tqdm

import lmeye
import sample
import train
from lmeye import CHECKPOINT, LMEye, Settings, read_adapter

SHARED = ROOT.parent / "shared"
COLORS = ("red", "green", "blue", "yellow", "white", "black")
MODELS = ["--llm", "llm", "--clip", "clip"]
ONE = ["--stage", 1, *MODELS, "--data", "pictures", "--batch-size", 4]
TWO = ["--stage", 2, *MODELS, "--data", "chat.json", "--images", "pictures", "--batch-size", 4]
RED, QUESTION = "pictures/red.jpg", "what color is it?"


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
        items.append({"image": f"{color}.jpg", "conversations": [
            {"from": "human", "value": "<image>\n" + QUESTION}, {"from": "gpt", "value": color},
            {"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "yes" if color == "red" else "no"}]})
    (folder / "chat.json").write_text(json.dumps(items))
    for flags in (ONE, TWO):
        done(*flags, "--steps", 3, cwd=folder)
    return folder


def done(*flags, cwd, program="train.py"):
    """Run a program that has to succeed → Result."""
    result = run(program, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def made(out, name):
    """The folder of a run of the tiny models below `out`."""
    return Path(out, "llm+clip", name)


def about(out, name):
    return json.loads((made(out, name) / "run.json").read_text())


def told_last(result, text):
    """Whether a refusal says so: the last line of it, for above may stand the usage, which names all flags."""
    return result.returncode == 2 and text in result.stderr.splitlines()[-1]


# ---- What a run leaves, and what decides it


def test_a_run_leaves_checkpoint_log_and_settings(trained):
    for stage in ("stage1", "stage2"):
        assert {path.name for path in made(trained / "out", stage).iterdir()} == {CHECKPOINT, "log.csv", "run.json"}


def test_phase_2_begins_with_phase_1s_adapter_and_leaves_it_as_it_is(trained):
    one, two = [read_adapter(made(trained / "out", f"stage{n}") / CHECKPOINT)[3] for n in (1, 2)]
    assert one.keys() == {"align.weight", "align.bias", "img"} < two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_flags_reach_the_run(trained, tmp_path):
    given = {"steps": 2, "batch size": 3, "lr": 0.002, "max batch tokens": 99, "accumulate": 2, "seed": 7,
             "n features": 4, "n slots": 2, "dropout": 0.25, "variant": "norequest", "precision": "bf16"}
    more = [text for name, value in given.items() for text in (f"--{name.replace(' ', '-')}", value)]
    one = made(trained / "out", "stage1") / CHECKPOINT
    done(*TWO, *more, "--train-align", "--init", one, "--out", tmp_path, cwd=trained)
    found = about(tmp_path, "stage2-norequest-align")
    names = {"lr": "learning rate", "n features": "N", "n slots": "Q", "precision": "frozen weights"}
    expected = given | {"precision": "torch.bfloat16"}
    assert {name: found[names.get(name, name)] for name in given} == expected and found["align trained"]
    assert found["started from"] == str(one)
    moved = read_adapter(made(tmp_path, "stage2-norequest-align") / CHECKPOINT)[3]
    assert not torch.equal(moved["align.weight"], read_adapter(one)[3]["align.weight"])


def test_default_rates_are_five_to_one(trained):
    first, second = [about(trained / "out", f"stage{n}")["learning rate"] for n in (1, 2)]
    assert first / second == pytest.approx(5, rel=0.12)  # reach 40 and 8, of the same pictures, each in two digits


def test_defaults_are_those_of_the_help():
    assert (Settings().n_features, Settings().n_slots, Settings().n_image_tokens, Settings().dropout) == (5, 1, 1, 0.5)
    assert Settings().variant == "lmeye" == lmeye.VARIANTS[0]
    found = {name: (row.n_features, row.n_slots, row.dropout) for name, row in lmeye.PRESETS.items()}
    assert found == {"mini": (5, 1, 0.0), "smollm2": (5, 1, 0.0), "opt-1.3b": (5, 1, 0.5), "bloomz-7b1": (5, 5, 0.5)}


def test_the_seed_decides_with_which_layers_a_run_begins(trained, tmp_path):
    found = []
    for seed in (0, 1):
        done(*ONE, "--steps", 1, "--lr", 1e-12, "--seed", seed, "--out", tmp_path / str(seed), cwd=trained)
        found.append(read_adapter(made(tmp_path / str(seed), "stage1") / CHECKPOINT)[3]["align.weight"])
    assert not torch.allclose(*found, atol=1e-3)


def test_what_trains_something_else_has_a_folder_of_its_own(trained, tmp_path):
    assert told_last(run("train.py", *ONE, "--train-align", cwd=trained), "--train-align is for --stage 2")
    shutil.copytree(made(trained / "out", "stage1"), made(tmp_path, "stage1"))
    for flags in (["--train-align"], ["--variant", "static"]):
        done(*TWO, "--steps", 1, *flags, "--out", tmp_path, cwd=trained)
    found = {path.name for path in made(tmp_path, "").glob("stage*")}
    assert found == {"stage1", "stage2-align", "stage2-static"}
    assert train.run_name(2, "norequest", True) == "stage2-norequest-align" and train.run_name(2, "lmeye", False) == "stage2"
    assert train.run_name(1, "static", False) == "stage1"  # where nothing is asked, both are the same


def test_a_picture_may_be_two_words_and_sample_needs_no_flag_for_it(trained, tmp_path):
    for flags in (ONE, TWO):
        done(*flags, "--steps", 1, "--n-image-tokens", 2, "--out", tmp_path, cwd=trained)
    _, settings, _, tensors = read_adapter(made(tmp_path, "stage2") / CHECKPOINT)
    assert settings.n_image_tokens == 2 and tensors["align.weight"].shape[0] == 2 * tensors["img"].shape[0]
    done(RED, QUESTION, "--out", tmp_path, cwd=trained, program="sample.py")


# ---- Data of one's own


@pytest.fixture
def evaluations(monkeypatch):
    """(model, Dataset, folder, bound of a batch) of each evaluation from here on."""
    noted = []
    monkeypatch.setattr(sample, "evaluate", lambda *given: noted.append(given))
    return noted


def test_training_ends_with_an_evaluation_of_what_was_named_for_it(trained, tmp_path, evaluations):
    save_picture(tmp_path / "val/new.jpg", "red")
    (tmp_path / "val.json").write_text(json.dumps([{"image": f"{name}.jpg", "caption": "a red background"}
                                                   for name in ("new", "none")]))
    result = done(*ONE, "--images", "pictures", "--steps", 1, "--val", tmp_path / "val.json", "--val-images", tmp_path / "val",
                  "--max-batch-tokens", 555, "--out", tmp_path, cwd=trained)
    (model, dataset, folder, max_batch_tokens), = evaluations
    assert [record.image for record in dataset.records] == ["new.jpg"] and max_batch_tokens == 555
    assert isinstance(model, LMEye) and folder == made(tmp_path, "stage1") / "evaluation"
    found = about(tmp_path, "stage1")
    assert (found["records"], found["val records"], sum(found["skipped"].values())) == (6, 1, 1)
    assert "skipped 1: no such picture" in result.stdout


def test_small_data_of_ones_own_works_by_itself(trained, tmp_path, monkeypatch):
    """60 pictures and captions, then 180 questions, and no other flags: the loop is cut off after its first step."""
    random.seed(0)
    captions, questions = [], []
    for i in range(60):
        color = tuple(random.choices(range(256), k=3))
        save_picture(tmp_path / f"pictures/{i}.png", color)
        captions.append({"image": f"{i}.png", "caption": random.choice(COLORS) + " background"})
        questions += [{"image": f"{i}.png", "question": f"is it {name}?", "answer": "no"} for name in COLORS[:3]]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    asked, real = [], train.train_adapter

    def first_step_only(model, stage, train, val, folder, steps, *given):
        asked.append((steps, len(train.records), len(set(val.picture))))
        real(model, stage, train, val, folder, 1, *given)

    monkeypatch.setattr(train, "train_adapter", first_step_only)
    models = ["--llm", trained / "llm", "--clip", trained / "clip"]
    for stage, (kind, row, n) in enumerate((("captions", "CLIPScore", 6), ("questions", "all", 18)), 1):
        result = done("--stage", stage, *models, "--data", f"{kind}.json", "--images", "pictures", cwd=tmp_path)
        steps, records, pictures = asked.pop()
        assert 500 <= steps < 520 and pictures == 6 and records == 9 * n
        found = about(tmp_path / "out", f"stage{stage}")
        assert f"in {steps:,} steps ({found['epochs']:g} epochs)" in result.stdout
        assert found["epochs"] == pytest.approx(round(found["epochs"]))  # whole ones
        assert found["scores"][row]["n"] == n and found["val records"] == n
        scores = made(tmp_path / "out", f"stage{stage}") / "evaluation/scores.json"
        assert found["scores"] == json.loads(scores.read_text())
        assert f"{records} records to train on, {n} to validate on" in result.stdout


@pytest.mark.parametrize("batches, accumulate, steps", [(1, 1, 500), (3, 1, 501), (3, 2, 501), (499, 1, 998), (700, 1, 700),
                                                        (10_000, 4, 2500)])
def test_by_default_whole_epochs_make_500_steps_at_least(batches, accumulate, steps):
    assert train.default_steps(batches, accumulate) == steps


def test_validation_pictures_that_are_trained_on_are_told(trained, tmp_path):
    save_picture(tmp_path / "new" / "pink.jpg", "pink")
    (tmp_path / "new" / "pink.txt").write_text("a red picture")
    save_picture(tmp_path / "copy" / "other.jpg", "red")  # by another name, and yet the same
    (tmp_path / "copy" / "other.txt").write_text("a red picture")
    for val, told in (("pictures", "6 to validate on; 6 of their pictures are trained on as well\n"),
                      (tmp_path / "copy", "1 to validate on; 1 of their pictures"), (tmp_path / "new", "1 to validate on\n")):
        result = done(*ONE, "--steps", 1, "--val", val, "--val-images", val, "--out", tmp_path / "out", cwd=trained)
        assert told in result.stdout, val


def test_both_programs_report_what_is_left_out(trained, tmp_path):
    rows = json.loads((trained / "chat.json").read_text())
    (tmp_path / "chat.json").write_text(json.dumps([*rows, rows[0] | {"image": "none.jpg"}, {"image": "red.jpg"}]))
    given = ["--data", tmp_path / "chat.json", "--images", trained / "pictures", "--out"]
    start = made(trained / "out", "stage1") / CHECKPOINT
    one = done("--stage", 2, *MODELS, "--steps", 1, "--init", start, *given, tmp_path, cwd=trained)
    shutil.copytree(trained / "out", tmp_path / "out")
    two = done(*given, tmp_path / "out", cwd=trained, program="sample.py")
    for text in (one.stdout, two.stderr):
        assert "skipped 1: a record of no known kind" in text
        assert "skipped 1: no such picture" in text and "none.jpg" in text
    assert sum(about(tmp_path, "stage2")["skipped"].values()) == 2


def test_data_is_asked_for_with_the_commands_that_fetch_it(trained, tmp_path, monkeypatch):
    """On a GPU, without --data. (Models are loaded later: there is no network here.)"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    one = run("train.py", "--stage", 1, "--out", "big", cwd=tmp_path)
    assert fails_in_one_line(one) and "hf download liuhaotian/LLaVA-CC3M-Pretrain-595K" in one.stderr
    assert "preset opt-1.3b, on cuda, frozen weights in bfloat16" in one.stdout
    assert "--local-dir big/data/llava-cc3m-595k" in one.stderr and "big/data/llava-cc3m-595k/chat.json" in one.stderr
    start = made(trained / "out", "stage1") / CHECKPOINT
    two = run("train.py", "--stage", 2, "--init", start, "--out", "big", cwd=tmp_path)
    assert fails_in_one_line(two) and "hf download liuhaotian/LLaVA-Instruct-150K" in two.stderr
    assert "curl -L -C - -o big/data/llava-instruct-150k/train2017.zip http" in two.stderr and "GB" in two.stderr


# ---- Nothing is lost at the terminal


def test_a_reader_that_leaves_early_ends_no_run_and_costs_no_file(trained, tmp_path):
    flags = " ".join(map(str, [*ONE, "--val", "pictures", "--steps", 20, "--out", tmp_path]))
    for command, n in ((f"train.py {flags}", 3), (f"sample.py --data chat.json --images pictures --out {tmp_path}", 1)):
        if n == 1:
            shutil.copytree(made(trained / "out", "stage2"), made(tmp_path, "stage2"))
        shell = f"{sys.executable} {ROOT}/{command} 2>&1 | (head -{n} > /dev/null; exec sleep 0); exit ${{PIPESTATUS[0]}}"
        process = subprocess.run(["bash", "-c", shell], cwd=trained, capture_output=True, text=True)
        assert process.returncode == 0 or n == 1, process.stderr
        assert process.stderr == "" and process.stdout == ""
    names = {path.name for path in made(tmp_path, "stage1").iterdir()}
    assert names == {CHECKPOINT, "best.safetensors", "log.csv", "run.json", "evaluation"}
    for folder in ("stage1/evaluation", "stage2/evaluation-chat"):
        assert {path.name for path in made(tmp_path, folder).iterdir()} == {"answers.jsonl", "scores.json"}


def child(cwd, flags, output):
    """train.py in a process and session of its own, with standard output and error in a file, pipe or terminal."""
    os.chdir(cwd)
    os.setsid()
    terminal = str(output).startswith("/dev/")
    os.dup2(os.open(output, os.O_RDWR if terminal else os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.argv = ["train.py", *map(str, flags)]
    lmeye.run_main(train.main)


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    done(*ONE, "--steps", 100, "--accumulate", 4, "--out", out, cwd=trained)
    return made(out, "stage1") / CHECKPOINT


@pytest.mark.parametrize("what", ("Ctrl-C, of which tee died first", "SIGHUP", "a terminal that is closed"))
def test_a_stop_saves_first_whoever_reads_what_it_says(trained, unbroken, tmp_path, what):
    flags, output = [*ONE, "--steps", 100, "--accumulate", 4, "--out", tmp_path], tmp_path / "output"
    ends = []
    if what == "a terminal that is closed":
        ends = pty.openpty()
        output = os.ttyname(ends[1])
    elif what != "SIGHUP":
        os.mkfifo(output)
        ends = [os.open(output, os.O_RDONLY | os.O_NONBLOCK)]
    process = FORKS.Process(target=child, args=(str(trained), flags, str(output)))
    process.start()
    folder, deadline = made(tmp_path, "stage1"), time.monotonic() + 100
    while not (folder / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for end in ends:  # closing a terminal sends SIGHUP
        os.close(end)
    if what != "a terminal that is closed":
        os.kill(process.pid, signal.SIGHUP if what == "SIGHUP" else signal.SIGINT)
    process.join(100)
    reached = int((folder / "log.csv").read_text().splitlines()[-1].split(",")[0])
    assert process.exitcode == 130 and 1 <= reached < 100
    assert torch.load(folder / train.STATE)["step"] == reached
    if what == "SIGHUP":
        lines = Path(output).read_text().splitlines()
        assert lines[-1].startswith(f"stopped after step {reached} of 100; to go on:") and lines[-1].endswith(" --resume")
        assert lines[-2].startswith(f"step {reached}/100")  # it is the only one
    done(*flags, "--resume", cwd=trained)
    assert (folder / CHECKPOINT).read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize("program", ("train.py", "sample.py"))
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, program):
    stop = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(stop)  # what is imported in the place of torch
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run([sys.executable, ROOT / program], capture_output=True, text=True, env=environment)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_after_the_imports_of_train_is_what_it_was(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name in ("stdout", "stderr"):  # train.py puts others in their place
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert signal.signal(signal.SIGINT, before) is before


def test_a_program_without_a_standard_output_trains(trained, tmp_path, monkeypatch):
    """As of `>&-`, or of a service: Python has None in its place."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, ONE), "--steps", "1", "--out", str(tmp_path)])
    monkeypatch.chdir(trained)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    lmeye.run_main(train.main)
    assert (made(tmp_path, "stage1") / CHECKPOINT).is_file()


def test_a_line_is_written_as_soon_as_it_is_printed_and_with_what_a_terminal_lacks(monkeypatch):
    """As of a run with `> log`, and of a terminal that has ASCII only."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    lmeye.run_main(lambda: (tqdm.write("→ step 1"), written.write(b"then this")))
    assert written.getvalue() == b"\\u2192 step 1\nthen this"


def test_the_users_commands_write_nothing_but_their_notes_to_the_standard_error(trained, tmp_path):
    """Neither a warning of ours nor one of a library's, deprecations included."""
    brief = ["--steps", "3", "--out", str(tmp_path)]
    commands = [["train.py", *ONE, *brief], ["train.py", *TWO, *brief], ["sample.py", RED, QUESTION, *brief[2:]],
                ["sample.py", "--data", "chat.json", "--images", "pictures", *brief[2:]]]
    script = "import runpy, sys\nfor sys.argv in {}:\n    runpy.run_path({!r} + sys.argv[0], run_name='__main__')"
    script = script.format([list(map(str, command)) for command in commands], f"{ROOT}/")
    strict = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning", "-c", script]
    process = subprocess.run(strict, cwd=trained, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    answers = f"answers: {made(tmp_path, 'stage2') / CHECKPOINT}\n"
    assert process.returncode == 0 and process.stderr == answers * 2 + "data: 12 records to evaluate\n"


# ---- Going on


def test_a_new_run_beside_a_complete_one_is_what_resume_goes_on_with(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    again = [*ONE, "--steps", 2, "--resume", "--out", tmp_path / "out"]
    assert "nothing to resume" in done(*again, cwd=trained).stdout
    (made(tmp_path / "out", "stage1") / CHECKPOINT).unlink()  # killed before it saved anything
    result = done(*again, cwd=trained)
    assert "note: there is nothing to resume in" in result.stdout and "a new run begins" in result.stdout
    assert "is complete" not in result.stdout and "stage1.1" in result.stderr
    assert {path.name for path in made(tmp_path / "out", "").iterdir()} >= {"stage1", "stage1.1"}


def test_stage_2_does_not_start_from_a_stage_1_that_is_not_complete(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    place = made(tmp_path / "out", "stage1")
    (place / train.STATE).write_bytes(b"")
    command = [*TWO, "--steps", 1, "--out", tmp_path / "out"]
    result = run("train.py", *command, cwd=trained)
    assert fails_in_one_line(result) and "stage1 is not complete" in result.stderr
    done(*command, "--init", place / CHECKPOINT, cwd=trained)


def test_what_a_run_was_started_from_belongs_to_what_resume_compares(trained, tmp_path, monkeypatch):
    done(*ONE, "--steps", 1, "--seed", 1, "--out", tmp_path / "other", cwd=trained)
    one, other = [made(out, "stage1") / CHECKPOINT for out in (trained / "out", tmp_path / "other")]
    shutil.copy(one, tmp_path / "copy.safetensors")  # the same, by another name
    command = [*TWO, "--steps", 4, "--out", tmp_path, "--init"]
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert run("train.py", *command, one, cwd=trained).returncode == 130
    refused = run("train.py", *command, other, "--resume", cwd=trained)
    assert fails_in_one_line(refused) and "weights at the start" in refused.stderr
    done(*command, tmp_path / "copy.safetensors", "--resume", cwd=trained)


# ---- Which models, which folders


def test_an_adapter_names_its_models_and_only_the_newest_of_stage_2_answers_by_itself(trained, tmp_path):
    """Also from another current folder, and after copies of runs made others newer."""
    shutil.copytree(trained, tmp_path / "home")
    home, ask = tmp_path / "home", [RED, QUESTION]
    for later, name in enumerate(("stage1", "stage2.1", "stage2.10")):
        if name != "stage1":
            shutil.copytree(made(home / "out", "stage2"), made(home / "out", name))
        times = [time.time() + 100 + later] * 2
        os.utime(made(home / "out", name) / CHECKPOINT, times)
    here = done(*ask, cwd=home, program="sample.py")
    assert here.stderr == f"answers: out/llm+clip/stage2/{CHECKPOINT}\n" and here.stdout.strip()
    elsewhere = done(home / RED, QUESTION, "--out", home / "out", cwd=tmp_path, program="sample.py")
    assert elsewhere.stdout == here.stdout
    own = done(home / RED, QUESTION, "--checkpoint", CHECKPOINT, cwd=made(home / "out", "stage2"), program="sample.py")
    assert own.stdout == here.stdout and own.stderr == f"answers: {CHECKPOINT}\n"


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path, trained):
    """No hub is asked for a name that begins with a folder: its retries take most of a minute."""
    for name, out in (("out/smollm2", "out"), ("pictures/opt", tmp_path), ("nowhere", tmp_path), ("a/b/c", tmp_path)):
        result = run("train.py", *ONE, "--llm", name, "--out", out, cwd=trained)
        assert fails_in_one_line(result) and f"--llm {name}: no such folder" in result.stderr
    result = run("train.py", "--stage", 1, "--preset", "smollm2", "--out", "a b", cwd=tmp_path)
    assert fails_in_one_line(result) and "run  python tests/lab/smollm2.py --out 'a b'" in result.stderr
    assert not (tmp_path / "a b/mini").exists()


def test_out_names_a_folder_also_in_the_home(trained, tmp_path, monkeypatch):
    assert told_last(run("train.py", *ONE, "--out", "", cwd=trained), "--out has to name a folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    done(*ONE, "--steps", 1, "--out=~/runs", cwd=trained)
    assert (made(tmp_path / "runs", "stage1") / CHECKPOINT).is_file() and not (trained / "~").exists()


def test_temperatures_next_to_zero_take_the_likeliest_token(trained):
    answers = {done(RED, QUESTION, "--temperature", t, cwd=trained, program="sample.py").stdout
               for t in (0, 1e-45, 1e-38, 0.005)}
    hot = done(RED, QUESTION, "--temperature", 100, cwd=trained, program="sample.py")
    assert len(answers) == 1 and hot.stdout not in answers


# ---- Mistakes


def test_mistakes_in_training_end_in_one_line(trained, tmp_path):
    clip = json.loads((trained / "clip/open_clip_config.json").read_text())
    clip["model_cfg"]["text_cfg"]["pool_type"] = "first"
    shutil.copytree(trained / "clip", tmp_path / "clip")
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(clip))
    for told, mistake in (
        ("--stage 1 first", [*TWO, "--out", "elsewhere"]),
        ("nowhere: no such file", [*ONE, "--data", "nowhere"]),
        ("nowhere is missing", [*TWO, "--init", "nowhere"]),
        ("is not a checkpoint", [*TWO, "--init", RED]),
        ("not one of 1 records can be used", [*ONE, "--data", "llm/config.json"]),
        ("nowhere", [*ONE, "--data", "chat.json", "--images", "nowhere"]),
        ("captions, for --stage 2", [*ONE, "--data", "chat.json"]),
        ("--clip nowhere", [*ONE, "--clip", "nowhere"]),
        ("--n-features", [*ONE, "--n-features", 100]),
        ("not read at the end", [*ONE, "--clip", tmp_path / "clip"]),
    ):
        result = run("train.py", "--steps", 1, "--out", tmp_path, *mistake, cwd=trained)
        assert fails_in_one_line(result) and told in result.stderr, (mistake, result.stderr)
    for flag in (["--steps", 0], ["--lr", -1], ["--stage", 3], ["--precision", "int8"], ["--lr", "nan"], ["--variant", "full"],
                 ["--seed", 10 ** 30], ["--images", "pictures"], ["--val", "pictures"], ["--accumulate", 0]):
        result = run("train.py", "--stage", 1, *flag, cwd=trained)
        assert told_last(result, flag[0]), flag


def test_stage_2_without_a_stage_1_says_so_before_it_does_anything(tmp_path):
    result = run("train.py", "--stage", 2, "--preset", "mini", cwd=tmp_path)
    assert fails_in_one_line(result) and "--stage 1 first" in result.stderr and not (tmp_path / "out/mini/llm").exists()
    result = run("train.py", "--stage", 2, "--preset", "mini", "--init", "nowhere", cwd=tmp_path)
    assert fails_in_one_line(result) and "nowhere is missing" in result.stderr and "--stage 1" not in result.stderr


def test_a_full_disk_is_told_with_the_file(trained, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("train.py", *ONE, "--steps", 1, "--out", tmp_path, cwd=trained)
    assert fails_in_one_line(result) and "No space left on device" in result.stderr and f"{tmp_path}/llm+clip/" in result.stderr


@pytest.mark.parametrize("full", (lambda: [0] * 10 ** 15, lambda: torch.empty(10 ** 15)))
def test_memory_that_is_full_is_told_in_one_line(trained, tmp_path, monkeypatch, full):
    monkeypatch.setattr(train, "mean_loss", lambda *_: full())
    result = run("train.py", *ONE, "--val", "pictures", "--steps", 1, "--out", tmp_path, cwd=trained)
    assert fails_in_one_line(result) and "out of memory; lower --max-batch-tokens" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "opt-tokenizer").is_dir() or not (SHARED / "photos").is_dir(),
                    reason="needs OPT's tokenizer and the photographs in ../shared")
def test_photographs_are_learned_by_heart_with_opts_own_tokenizer(tmp_path):
    """Both phases from the command line, to a falling loss and the right answers: `facebook/opt-…` in small."""
    llm = tmp_path / "opt-small"
    opt_tokenizer(llm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    photos = SHARED / "photos"
    items = json.loads((photos / "instruct.json").read_text())
    talks = [[turn["value"].replace("<image>", "").strip() for turn in item["conversations"]] for item in items]
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
        done("--stage", 1, *flags, "--data", path, "--steps", 100, cwd=tmp_path)
        assert losses(1)[-1] < losses(1)[0] - 0.5
    done("--stage", 2, *flags, "--data", photos / "instruct.json", "--steps", 600, cwd=tmp_path)
    assert losses(2)[-1] < 0.2 * losses(2)[0]
    right = 0
    for item, (question, answer, *_) in zip(items, talks):
        right += done(photos / item["image"], question, cwd=tmp_path, program="sample.py").stdout.strip() == answer
    assert right >= len(items) - 1
