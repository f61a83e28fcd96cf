"""The programs as a user meets them: real runs, and mistakes that end in one line with status 2."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, fails_in_one_line, opt_tokenizer, run, save_clip, save_llm, tiny_model
from PIL import Image
from test_data import broken_pictures, save_picture

import data
import sample
import lmeye
from lmeye import CHECKPOINT, LMEye, Settings, UserError, read_adapter

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny frozen models and a run of both stages on six pictures: (cwd, flags for the models)."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--llm", save_llm(folder / "llm"), "--clip", save_clip(folder / "clip")]
    items = []
    for color in ("red", "green", "blue", "yellow", "white", "black"):
        save_picture(folder / f"pictures/{color}.jpg", color)
        (folder / f"pictures/{color}.txt").write_text(f"a {color} background")
        items.append({"image": f"{color}.jpg", "conversations": [
            {"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": color},
            {"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "yes" if color == "red" else "no"}]})
    (folder / "chat.json").write_text(json.dumps(items))
    brief = ["--steps", 3, "--batch-size", 4]
    one = run("train.py", "--stage", 1, *flags, *brief, "--data", "pictures", cwd=folder)
    assert one.returncode == 0, one.stderr
    two = run("train.py", "--stage", 2, *flags, *brief, "--data", "chat.json", "--images", "pictures", cwd=folder)
    assert two.returncode == 0, two.stderr
    return folder, flags


def test_a_run_leaves_checkpoint_log_and_settings(trained):
    folder, _ = trained
    for stage in ("stage1", "stage2"):
        assert {p.name for p in (folder / "out" / "llm+clip" / stage).iterdir()} == {
            CHECKPOINT, "log.csv", "run.json"}


def test_phase_2_begins_with_phase_1s_adapter_and_leaves_it_as_it_is(trained):
    one, two = [read_adapter(trained[0] / f"out/llm+clip/stage{n}" / CHECKPOINT)[3] for n in (1, 2)]
    assert one.keys() == {"align.weight", "align.bias", "img"} < two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_flags_reach_the_run_and_the_default_rates_are_five_to_one(trained, tmp_path):
    folder, flags = trained
    given = {"steps": 2, "batch size": 3, "lr": 0.002, "max batch tokens": 99, "accumulate": 2, "seed": 7, "n features": 4,
             "n slots": 2, "dropout": 0.25}
    more = [text for name, value in given.items() for text in (f"--{name.replace(' ', '-')}", value)]
    one = folder / "out/llm+clip/stage1"
    result = run("train.py", "--stage", 2, *flags, "--data", "chat.json", "--images", "pictures", *more, "--train-align",
                 "--checkpoint", one / CHECKPOINT, "--out", tmp_path, cwd=folder)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "llm+clip/stage2/run.json").read_text())
    names = {"lr": "learning rate", "n features": "N", "n slots": "Q"}
    assert {name: found[names.get(name, name)] for name in given} == given and found["align trained"]
    moved = read_adapter(tmp_path / "llm+clip/stage2" / CHECKPOINT)[3]
    assert not torch.equal(moved["align.weight"], read_adapter(one / CHECKPOINT)[3]["align.weight"])
    first, second = [json.loads((folder / f"out/llm+clip/stage{n}/run.json").read_text())["learning rate"] for n in (1, 2)]
    assert first / second == pytest.approx(5, rel=0.12)  # reach 40 and 8, of the same pictures, each in two digits


def test_defaults_are_those_of_the_help():
    assert (Settings().n_features, Settings().n_slots, Settings().dropout) == (5, 1, 0.5)
    found = {name: (row.n_features, row.n_slots, row.dropout) for name, row in lmeye.PRESETS.items()}
    assert found == {"mini": (5, 1, 0.0), "opt-1.3b": (5, 1, 0.5), "bloomz-7b1": (5, 5, 0.5)}


def test_the_seed_decides_with_which_layers_a_run_begins(trained, tmp_path):
    folder, flags = trained
    found = []
    for seed in (0, 1):
        brief = ["--steps", 1, "--lr", 1e-12, "--seed", seed, "--out", tmp_path / str(seed)]
        assert run("train.py", "--stage", 1, *flags, "--data", "pictures", *brief, cwd=folder).returncode == 0
        found.append(read_adapter(tmp_path / str(seed) / "llm+clip/stage1" / CHECKPOINT)[3]["align.weight"])
    assert not torch.allclose(*found, atol=1e-3)


@pytest.fixture
def evaluations(monkeypatch):
    """The records, what was left out of them, and the bound of memory, of each evaluation from here on."""
    noted = []

    def evaluate(model, dataset, folder, skips=(), max_batch_tokens=4096):
        noted.append((dataset.records, skips, max_batch_tokens))

    monkeypatch.setattr(sample, "evaluate", evaluate)
    return noted


def test_training_ends_with_an_evaluation_of_what_was_named_for_it(trained, tmp_path, evaluations):
    """Records, their pictures, and what was left out of them: VQA's count as wrong."""
    folder, flags = trained
    save_picture(tmp_path / "val/new.jpg", "red")
    (tmp_path / "val.json").write_text(json.dumps([{"image": f"{name}.jpg", "caption": "a red background"}
                                                   for name in ("new", "none")]))
    result = run("train.py", "--stage", 1, *flags, "--steps", 1, "--data", "pictures", "--images", "pictures",
                 "--val", tmp_path / "val.json", "--val-images", tmp_path / "val", "--max-batch-tokens", 555,
                 "--out", tmp_path, cwd=folder)
    assert result.returncode == 0, result.stderr
    (records, skips, max_batch_tokens), = evaluations
    assert [record.image for record in records] == [str(tmp_path / "val/new.jpg")] and max_batch_tokens == 555
    assert len(skips) == 1 and "none.jpg" in skips[0].reason
    told = json.loads((tmp_path / "llm+clip/stage1/run.json").read_text())
    assert (told["records"], told["val records"]) == (6, 1)


def test_an_evaluation_takes_as_many_tokens_at_once_as_told(trained, evaluations):
    folder, flags = trained
    command = ["--data", "chat.json", "--images", "pictures", "--max-batch-tokens", 777]
    result = run("sample.py", *command, *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    (records, _, max_batch_tokens), = evaluations
    assert len(records) == 12 and max_batch_tokens == 777


def test_a_clip_that_is_not_read_at_eos_is_refused_before_training(trained, tmp_path):
    folder, flags = trained
    clip, path = save_clip(tmp_path / "clip"), tmp_path / "clip/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["pool_type"] = "first"
    path.write_text(json.dumps(config))
    result = run("train.py", "--stage", 1, *flags[:2], "--clip", clip, "--data", "pictures", "--steps", 1, "--out", tmp_path,
                 cwd=folder)
    assert fails_in_one_line(result) and "not read at the end" in result.stderr


def test_both_programs_report_what_is_left_out(trained, tmp_path):
    folder, flags = trained
    rows = json.loads((folder / "chat.json").read_text())
    (tmp_path / "chat.json").write_text(json.dumps([*rows, rows[0] | {"image": "none.jpg"}, {"image": "red.jpg"}]))
    given = ["--data", tmp_path / "chat.json", "--images", folder / "pictures", *flags, "--out", tmp_path]
    start = folder / "out/llm+clip/stage1" / CHECKPOINT
    for command in (["train.py", "--stage", 2, "--steps", 1, "--checkpoint", start], ["sample.py"]):
        result = run(*command, *given, cwd=tmp_path)
        assert result.returncode == 0 and "skipped 1: a record of no known kind" in result.stdout, result.stderr
        assert "skipped 2: " in result.stdout and "none.jpg: no such picture" in result.stdout
    assert json.loads((tmp_path / "llm+clip/stage2/run.json").read_text())["left out or shortened"] == 3


def test_validation_pictures_that_are_trained_on_are_told(trained, tmp_path):
    folder, flags = trained
    flags = [*flags, "--stage", 1, "--steps", 1, "--data", "pictures"]
    save_picture(tmp_path / "new" / "red.jpg", "red")
    (tmp_path / "new" / "red.txt").write_text("a red picture")
    for val, told in (("pictures", "6 to validate on; 6 of their pictures are trained on as well\n"),
                      (tmp_path / "new", "1 to validate on\n")):
        result = run("train.py", *flags, "--val", val, "--out", tmp_path, cwd=folder)
        assert result.returncode == 0 and told in result.stdout, result


def test_epochs_count_passes_over_the_data(trained, tmp_path):
    folder, flags = trained
    result = run("train.py", "--stage", 1, *flags, "--data", "pictures", "--epochs", 2, "--batch-size", 4, "--out", tmp_path,
                 cwd=folder)
    assert result.returncode == 0 and "stage 1: 4 steps" in result.stdout, result.stderr  # six records, 4 + 2 each time


def test_a_new_run_beside_a_complete_one_is_what_resume_goes_on_with(trained, tmp_path):
    folder, flags = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    again = ["--stage", 1, *flags, "--data", "pictures", "--steps", 2, "--resume", "--out", tmp_path / "out"]
    assert "nothing to resume" in run("train.py", *again, cwd=folder).stdout
    (tmp_path / "out" / "llm+clip" / "stage1" / CHECKPOINT).unlink()  # killed before it saved anything
    result = run("train.py", *again, cwd=folder).stdout
    assert "note: there is nothing to resume in" in result and "a new run begins" in result and "is complete" not in result
    assert {p.name for p in (tmp_path / "out" / "llm+clip").iterdir()} >= {"stage1", "stage1.1"}


def test_stage_2_does_not_start_from_a_stage_1_that_is_not_complete(trained, tmp_path):
    folder, flags = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    place = tmp_path / "out" / "llm+clip" / "stage1"
    (place / "state.pt").write_bytes(b"")
    command = ["--stage", 2, *flags, "--data", "chat.json", "--images", "pictures", "--steps", 1, "--out", tmp_path / "out"]
    result = run("train.py", *command, cwd=folder)
    assert fails_in_one_line(result) and "stage1 is not complete" in result.stderr
    assert run("train.py", *command, "--checkpoint", place / CHECKPOINT, cwd=folder).returncode == 0


def test_one_picture_one_question_one_answer(trained):
    folder, flags = trained
    result = run("sample.py", "pictures/red.jpg", "what color is it?", *flags, cwd=folder)
    model = LMEye.from_settings(sample.settings_from({"llm": flags[1], "clip": flags[3]}, folder / "out"))
    model.load(folder / "out/llm+clip/stage2" / CHECKPOINT)
    f = model.encode_image(model.preprocess(Image.open(folder / "pictures/red.jpg"))[None])
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout == model.generate(f, ["what color is it?"])[0] + "\n"


def test_a_batch_gives_the_answers_that_each_gets_alone(trained, tmp_path):
    folder, flags = trained
    torch.manual_seed(0)
    model = LMEye.from_settings(sample.settings_from({"llm": flags[1], "clip": flags[3]}, folder / "out"))
    model.save(tmp_path / CHECKPOINT, 2)  # after three steps all pictures would have the same answers
    flags = [*flags, "--checkpoint", tmp_path / CHECKPOINT]
    pictures = [f"pictures/{color}.jpg" for color in ("red", "green", "blue")]
    (folder / "questions.txt").write_text("what color is it?\nhow big are the things on the red background?\n")
    batch = run("sample.py", *pictures, "--questions", "questions.txt", *flags, cwd=folder)
    lines = [json.loads(line) for line in batch.stdout.splitlines()]
    assert [line["image"] for line in lines] == [p for p in pictures for _ in range(2)]
    assert len({line["answer"] for line in lines}) == 6
    for line in (lines[0], lines[3]):
        alone = run("sample.py", line["image"], line["question"], *flags, cwd=folder)
        assert alone.stdout.strip() == line["answer"].strip()


def test_in_a_batch_each_answer_is_of_its_own_picture_and_question_in_parts_of_few_tokens(tmp_path, capsys, monkeypatch):
    model, sizes, pictures = tiny_model(), [], []
    for color in ("red", "green", "blue"):
        save_picture(tmp_path / f"{color}.jpg", color)
        pictures.append(str(tmp_path / f"{color}.jpg"))

    def generate(f, questions, **_):
        sizes.append(len(f) * (max(len(model.ids(question)) for question in questions) + 4))
        return [f"{question} {row[0]:.4f}" for question, row in zip(questions, f.tolist())]

    monkeypatch.setattr(model, "generate", generate)
    sample.batch(model, pictures, ["what color?", "is it red?"], dict(max_tokens=4), 20)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6 and len(sizes) > 1 and max(sizes) <= 20
    for line in lines:
        f = model.encode_image(model.preprocess(Image.open(line["image"]))[None])
        assert line["answer"] == f"{line['question']} {f[0, 0].item():.4f}"


def test_a_picture_that_is_named_twice_is_answered_twice(trained):
    folder, flags = trained
    lines = run("sample.py", *["pictures/red.jpg"] * 2, "what color is it?", *flags, cwd=folder).stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]


def test_a_checkpoint_is_used_from_its_own_folder_and_features_stay_with_its_models(trained, tmp_path):
    folder, flags = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    here = tmp_path / "out" / "llm+clip" / "stage2"
    shutil.rmtree(here.parent / "features")
    result = run("sample.py", "--checkpoint", CHECKPOINT, "--data", folder / "chat.json", "--images", folder / "pictures", *flags,
                 cwd=here)
    assert result.returncode == 0, result.stderr
    assert (here.parent / "features").is_dir() and not (here / "features").exists()


def test_the_models_of_a_preset_are_looked_for_where_out_says_also_with_a_checkpoint(trained, tmp_path):
    save_llm(tmp_path / "out" / "mini" / "llm")
    save_clip(tmp_path / "out" / "mini" / "clip")
    settings = sample.settings_from({"preset": "mini"}, tmp_path / "out")
    elsewhere = tmp_path / "a" / "b" / "c" / CHECKPOINT
    LMEye.from_settings(settings).save(elsewhere, 2)
    ask = [trained[0] / "pictures" / "red.jpg", "what?", "--checkpoint", elsewhere]
    assert run("sample.py", *ask, "--out", tmp_path / "out", cwd=tmp_path).returncode == 0
    assert fails_in_one_line(run("sample.py", *ask, cwd=tmp_path))  # looked for in a/, where the checkpoint's run was


def test_models_that_are_named_find_their_own_newest_checkpoint(trained, tmp_path):
    folder, flags = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    later = tmp_path / "out" / "other" / "stage2" / CHECKPOINT
    later.parent.mkdir(parents=True)
    later.write_bytes(b"of another model")
    result = run("sample.py", "pictures/red.jpg", "what color is it?", *flags, "--out", tmp_path / "out", cwd=folder)
    assert result.returncode == 0, result.stderr


def test_the_newest_checkpoint_is_the_one_written_last_whatever_its_name(tmp_path):
    """Also where a shell would expand the name of its models."""
    found = []
    for i, name in enumerate(("stage2", "stage1")):
        path = tmp_path / "llm[1]+clip" / name / CHECKPOINT
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (i, i))
        found.append(path)
    for names in ({"llm": None, "clip": None}, {"llm": "a/llm[1]", "clip": "local-dir:b/clip"}):
        assert sample.newest(SimpleNamespace(out=str(tmp_path), **names)) == found[-1]


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked from here on."""
    questions, stream = [], LMEye.stream

    def noting(self, f, texts, **options):
        questions.extend(texts)
        return stream(self, f, texts, **options)

    monkeypatch.setattr(LMEye, "stream", noting)
    return questions


def test_a_chat_asks_with_its_earlier_turns_until_an_empty_line(trained, asked):
    folder, flags = trained
    chat = run("sample.py", "pictures/red.jpg", *flags, "--max-tokens", 3, cwd=folder, stdin="what?\nis it red?\n\nno\n")
    first, _ = chat.stdout.splitlines()
    assert chat.returncode == 0 and asked == ["what?", f"what?\nAnswer: {first}\nQuestion: is it red?"]


def test_a_chat_longer_than_the_context_forgets_its_beginning(trained, asked):
    folder, flags = trained
    questions = ["what color is it is it is it is it is it?"] * 6 + ["is it red?"]
    stdin = "\n".join([*questions[:6], "red " * 100, questions[6]]) + "\n"  # one of them can't be asked
    chat = run("sample.py", "pictures/red.jpg", *flags, "--max-tokens", 8, cwd=folder, stdin=stdin)
    assert chat.returncode == 0 and "without the earliest turn" in chat.stderr and "shorten" in chat.stderr
    said, turns = chat.stdout.splitlines(), []
    assert len(asked) == len(said) == 7 and asked[-1] != questions[-1]  # forgets no more than it must
    for prompt, question, text in zip(asked, questions, said):
        assert prompt in [data.dialogue([*turns[2 * k:], question]) for k in range(len(turns) // 2 + 1)]
        turns += [question, text]


def test_a_word_that_the_language_model_does_not_know_is_told_and_the_question_is_asked(trained):
    folder, flags = trained
    result = run("sample.py", "pictures/red.jpg", "what color is the pizza?", *flags, cwd=folder)
    assert result.returncode == 0 and result.stdout.strip()
    assert result.stderr == "note: the language model does not know: pizza?\n"


def test_flags_of_drawing_reach_the_model(trained, monkeypatch):
    folder, flags = trained
    options, stream = {}, LMEye.stream

    def noting(self, f, texts=None, **given):
        options.update(given)
        return stream(self, f, texts, **given)

    monkeypatch.setattr(LMEye, "stream", noting)
    more = ["--temperature", 0.7, "--top-k", 3, "--max-tokens", 2, "--seed", 5]
    result = run("sample.py", "pictures/red.jpg", "what color is it?", *flags, *more, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (options["temperature"], options["top_k"], options["max_tokens"]) == (0.7, 3, 2)
    assert options["generator"].initial_seed() == 5


def test_a_stage_1_checkpoint_writes_captions_and_says_so(trained):
    folder, flags = trained
    checkpoint = ["--checkpoint", folder / "out" / "llm+clip" / "stage1" / CHECKPOINT]
    caption = run("sample.py", "pictures/red.jpg", *flags, *checkpoint, cwd=folder)
    asked = run("sample.py", "pictures/red.jpg", "what color is it?", *flags, *checkpoint, cwd=folder)
    assert caption.returncode == asked.returncode == 0 and caption.stdout == asked.stdout
    assert caption.stderr == "" and "stage 1" in asked.stderr
    several = run("sample.py", "pictures/red.jpg", "pictures/blue.jpg", *flags, *checkpoint, cwd=folder)
    assert [json.loads(line).keys() for line in several.stdout.splitlines()] == [{"image", "answer"}] * 2


@pytest.mark.parametrize("flag", (["--max-tokens", 5], ["--temperature", 1], ["--top-k", 3], ["--top-p", 0.5],
                                  ["--questions", "q.txt"]))
def test_an_evaluation_takes_no_flags_of_drawing(tmp_path, flag):
    result = run("sample.py", "--data", "chat.json", *flag, cwd=tmp_path)
    assert result.returncode == 2 and "no flags of drawing" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("question_tokens, fit", ((0, True), (1, False)))
def test_a_question_fits_where_it_can_be_asked_and_no_longer(question_tokens, fit):
    model = tiny_model()
    room = model.max_text_tokens - sum(len(ids[0]) for ids in model.token_ids(["red"], [""]))
    question = "red" + " red" * (room + question_tokens)
    assert sample.fits(model, question) == fit
    if fit:
        model.tokenize([question], [""])
    else:
        with pytest.raises(UserError, match="context has room for"):
            model.tokenize([question], [""])


def test_in_a_batch_a_bad_picture_or_question_has_an_error_and_the_others_their_answers(trained, tmp_path):
    folder, flags = trained
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "q.txt").write_text("what color is it?\n" + "red " * 5000 + "\n")
    result = run("sample.py", "pictures/red.jpg", tmp_path / "broken.jpg", "pictures/blue.jpg", "--questions", tmp_path / "q.txt",
                 *flags, cwd=folder)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 2 and "3 could not be answered" in result.stderr
    assert sum("error" in line for line in lines) == 3 and "no picture" in lines[0]["error"]
    assert [line["image"] for line in lines if "answer" in line] == ["pictures/red.jpg", "pictures/blue.jpg"]


def test_answers_in_json_keep_joiners_and_line_breaks_and_escape_what_a_terminal_obeys():
    row = {"answer": "a\nb \u200d क्\u200cष \x1b[2J \x9b \u202e \udcff 語"}
    line = sample.json_line(row)
    assert json.loads(line) == row and "\n" not in line and "語" in line and "क्\u200cष" in line
    assert not any(c in line for c in "\x1b\x9b\u202e\udcff")


@pytest.mark.parametrize("pieces", [["it", "it '", "it's", "it's red"], ["dog", "dog .", "dog."], ["h", "h\ufffd", "hé é"]])
def test_words_that_a_tokenizer_joins_later_are_written_once_and_right(pieces, capsys):
    class Model:
        def stream(self, f, questions, **options):
            return (torch.tensor([i]) for i in range(len(pieces)))

        def decode(self, ids):
            return pieces[ids[-1]]

    assert sample.answer(Model(), None, "?", {}) == pieces[-1]
    assert capsys.readouterr().out == pieces[-1] + "\n"


def test_without_a_standard_input_a_chat_is_told_in_one_line(trained):
    folder, flags = trained
    process = subprocess.run([sys.executable, str(ROOT / "sample.py"), "pictures/red.jpg", *flags], cwd=folder, text=True,
                             capture_output=True, preexec_fn=lambda: os.close(0))
    assert fails_in_one_line(process), process.stderr


def test_a_terminal_that_lacks_a_letter_gets_an_escape(trained):
    folder, flags = trained
    shutil.copy(folder / "pictures/red.jpg", folder / "pictures/→.jpg")
    process = subprocess.run([sys.executable, str(ROOT / "sample.py"), "pictures/→.jpg", "pictures/red.jpg", "what?", *flags],
                             cwd=folder, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and b"\\u2192" in process.stdout, process.stderr


def test_each_line_is_in_a_log_file_as_soon_as_it_is_printed(tmp_path):
    """As a run's lines in `nohup python train.py … > log`. (`os._exit` writes nothing that a buffer still holds.)"""
    program = "import os, lmeye, tqdm; lmeye.run_main(lambda: (tqdm.tqdm.write('step 1'), os._exit(0)))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.stdout == "step 1\n"


def test_a_record_that_is_no_utf8_in_questions_is_told(trained):
    folder, flags = trained
    (folder / "latin.txt").write_bytes("what côlor?".encode("latin-1"))
    assert fails_in_one_line(run("sample.py", "pictures/red.jpg", "--questions", "latin.txt", *flags, cwd=folder))


def test_mistakes_in_sampling_end_in_one_line(trained, tmp_path):
    folder, flags = trained
    broken = broken_pictures(tmp_path)
    for name in broken:
        assert fails_in_one_line(run("sample.py", tmp_path / name, "what?", *flags, cwd=folder)), name
    picture = "pictures/red.jpg"
    save_llm(tmp_path / "llm", seed=5)
    other = ["--llm", tmp_path / "llm", *flags[2:]]
    checkpoint = ["--checkpoint", folder / "out/llm+clip/stage2" / CHECKPOINT]
    (folder / "empty.txt").write_text("\ufeff\n \n", "utf-8")
    for told, mistake in (
        ("empty", [picture, "", *flags]),
        ("question is empty", [picture, "--questions", "empty.txt", *flags]),
        ("behind them a question", [picture, "pictures", *flags]),  # a folder is none
        ("context has room for", [picture, "red " * 5000, *flags]),
        ("are others", [picture, "what?", *other]),  # the checkpoint belongs to other weights
        ("belongs to models of your own", [picture, "what?"]),
        ("--llm no/such/folder", [picture, "what?", "--llm", "no/such/folder", *flags[2:], *checkpoint]),
        ("--clip local-dir:nowhere", [picture, "what?", *flags[:2], "--clip", "local-dir:nowhere", *checkpoint]),
        ("no checkpoint below", [picture, "what?", *flags[:2], "--clip", "local-dir:nowhere"]),
        ("is not a checkpoint", [picture, "what?", *flags, "--checkpoint", picture]),
        ("nowhere", [picture, "what?", *flags, "--checkpoint", "nowhere"]),
        ("behind them a question", [picture, picture, *flags]),
        ("no such file", [picture, "--questions", "nowhere", *flags]),
        ("unreadable", [picture, "what\udcff?", *flags]),  # a byte that is no text
        ("no such file", ["--data", "nowhere", *flags]),
    ):
        result = run("sample.py", *mistake, cwd=folder)
        assert fails_in_one_line(result) and told in result.stderr, (mistake, result.stderr)
    nothing = run("sample.py", folder / picture, "what?", cwd=tmp_path)
    assert fails_in_one_line(nothing) and "train.py --stage 1" in nothing.stderr


@pytest.mark.parametrize("flag, value", [("--temperature", "nan"), ("--temperature", "-1"), ("--seed", 10 ** 30),
                                         ("--top-k", 10 ** 30), ("--top-p", 2), ("--max-tokens", 0), ("--data", "a.json")])
def test_values_out_of_range_are_named(flag, value):
    result = run("sample.py", "a.jpg", "what?", flag, value)
    assert result.returncode == 2 and flag in result.stderr.splitlines()[-1]  # above it, the usage names all flags


@pytest.mark.parametrize("flags", (("--top-k", 5), ("--top-p", 0.5), ("--images", ".")))
def test_flags_that_would_do_nothing_are_refused(flags, tmp_path):
    result = run("sample.py", "a.jpg", "what?", *flags, cwd=tmp_path)
    assert result.returncode == 2 and flags[0] in result.stderr.splitlines()[-1]


def test_temperatures_next_to_zero_take_the_likeliest_token(trained):
    folder, flags = trained
    answers = {run("sample.py", "pictures/red.jpg", "what color is it?", *flags, "--temperature", t, cwd=folder).stdout
               for t in (0, 1e-45, 1e-38, 0.005)}
    assert len(answers) == 1
    hot = run("sample.py", "pictures/red.jpg", "what color is it?", *flags, "--temperature", 100, cwd=folder)
    assert hot.returncode == 0 and hot.stdout not in answers


def test_mistakes_in_training_end_in_one_line(trained, tmp_path):
    folder, flags = trained
    for told, mistake in (
        ("--stage 1 first", ["--stage", 2, *flags, "--data", "chat.json", "--out", "elsewhere"]),
        ("nowhere: no such file", ["--stage", 1, *flags, "--data", "nowhere"]),
        ("nowhere is missing", ["--stage", 1, *flags, "--data", "pictures", "--checkpoint", "nowhere"]),
        ("neither JSON", ["--stage", 1, *flags, "--data", "pictures/red.txt"]),
        ("nowhere", ["--stage", 1, *flags, "--data", "chat.json", "--images", "nowhere"]),
        ("a caption, for --stage 1", ["--stage", 2, *flags, "--data", "pictures"]),
        ("--llm nowhere", ["--stage", 1, "--llm", "nowhere", "--clip", "ViT-B-32", "--data", "pictures"]),
        ("--n-features", ["--stage", 1, *flags, "--data", "pictures", "--n-features", 100]),
    ):
        result = run("train.py", *mistake, cwd=folder)
        assert fails_in_one_line(result) and told in result.stderr, (mistake, result.stderr)
    for flag in (["--steps", 0], ["--lr", -1], ["--epochs", 0], ["--stage", 3], ["--precision", "int8"], ["--lr", "nan"],
                 ["--seed", 10 ** 30], ["--images", "pictures"], ["--val", "pictures"]):
        result = run("train.py", "--stage", 1, *flag, cwd=folder)
        assert result.returncode == 2 and flag[0] in result.stderr.splitlines()[-1]


def test_stage_2_without_a_stage_1_says_so_before_it_does_anything(tmp_path):
    result = run("train.py", "--stage", 2, "--preset", "mini", cwd=tmp_path)
    assert fails_in_one_line(result) and "--stage 1 first" in result.stderr and not (tmp_path / "out/mini/llm").exists()
    result = run("train.py", "--stage", 2, "--preset", "mini", "--checkpoint", "nowhere", cwd=tmp_path)
    assert fails_in_one_line(result) and "nowhere is missing" in result.stderr and "--stage 1" not in result.stderr


def test_the_users_commands_write_nothing_but_progress_to_the_standard_error(trained, tmp_path):
    """Neither a warning of ours nor one of a library's, deprecations included."""
    folder, flags = trained
    strict = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
    for command in (["train.py", "--stage", "1", "--data", "pictures", "--steps", "3"],
                    ["train.py", "--stage", "2", "--data", "chat.json", "--images", "pictures", "--steps", "3"],
                    ["sample.py", "pictures/red.jpg", "what color is it?"],
                    ["sample.py", "--data", "chat.json", "--images", "pictures"]):
        process = subprocess.run([*strict, str(ROOT / command[0]), *command[1:], *flags, "--out", str(tmp_path)], cwd=folder,
                                 text=True, capture_output=True)
        assert process.returncode == 0 and process.stderr == "", (command, process.stderr)


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
    flags = ["--llm", llm, "--clip", save_clip(tmp_path / "clip"), "--dropout", 0, "--batch-size", 8]

    def losses(stage):
        lines = Path(tmp_path, f"out/opt-small+clip/stage{stage}/log.csv").read_text().splitlines()
        return [float(line.split(",")[1]) for line in lines[1:]]

    for path in (photos, photos / "chat.json"):
        result = run("train.py", "--stage", 1, *flags, "--data", path, "--steps", 100, "--lr", 0.03, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert losses(1)[-1] < losses(1)[0] - 0.5
    result = run("train.py", "--stage", 2, *flags, "--data", photos / "instruct.json", "--steps", 600, "--lr", 0.03,
                 cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(2)[-1] < 0.2 * losses(2)[0]
    right = 0
    for item, (question, answer, *_) in zip(items, talks):
        said = run("sample.py", photos / item["image"], question, *flags[:4], cwd=tmp_path).stdout.strip()
        right += said == answer
    assert right >= len(items) - 1
