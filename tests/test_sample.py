"""sample.py as a user meets it: answers, a chat, an evaluation, and mistakes in one line with status 2."""

import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import fails_in_one_line, run, save_clip, save_llm, tiny_model
from PIL import Image

import data
import sample
from lmeye import CHECKPOINT, LMEye, UserError

COLORS = ("red", "green", "blue", "yellow", "white", "black")
PICTURE, QUESTION = "pictures/red.jpg", "what color is it?"
STAGE_2 = f"out/llm+clip/stage2/{CHECKPOINT}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with tiny frozen models, untrained adapters of both stages, questions and captions."""
    home = tmp_path_factory.mktemp("home")
    (home / "pictures").mkdir()
    rows = []
    for color in COLORS:
        Image.new("RGB", (40, 30), color).save(home / f"pictures/{color}.jpg")
        (home / f"pictures/{color}.txt").write_text(f"a {color} background")
        rows.append({"image": f"{color}.jpg", "question": QUESTION, "answer": color, "category": "color"})
        rows.append({"image": f"{color}.jpg", "question": "is it red?"})
    (home / "chat.json").write_text(json.dumps(rows))
    save_llm(home / "other", seed=5)
    given = {"llm": os.path.relpath(save_llm(home / "llm"), home), "clip": "local-dir:clip"}
    save_clip(home / "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        model = LMEye.from_settings(sample.settings_from(given, "out"))
    for stage in (1, 2):
        model.save(home / f"out/llm+clip/stage{stage}" / CHECKPOINT, stage)
    return home


@pytest.fixture
def copied(home, tmp_path):
    """A copy of `home` that a test may change."""
    shutil.copytree(home, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def streams(monkeypatch):
    """What the model is asked from here on: (model, texts, options) of each stream."""
    seen, stream = [], LMEye.stream

    def noting(self, f, texts=None, **options):
        seen.append(SimpleNamespace(model=self, f=f, texts=texts, options=options))
        return stream(self, f, texts, **options)

    monkeypatch.setattr(LMEye, "stream", noting)
    return seen


# ---- One picture


def test_one_picture_one_question_one_answer_and_which_checkpoint_gave_it(home, streams):
    result = run("sample.py", PICTURE, QUESTION, cwd=home)
    model = streams[0].model
    f = model.encode_image(model.preprocess(Image.open(home / PICTURE))[None])
    assert result.returncode == 0 and result.stdout == model.generate(f, [QUESTION])[0] + "\n"
    first, cut_off = result.stderr.splitlines()  # this model never ends by itself
    assert first == f"answers: out/llm+clip/stage2/{CHECKPOINT}" and "cut off" in cut_off
    assert streams[0].options["temperature"] == 0 and streams[0].options["max_tokens"] == 64


def test_flags_reach_the_model(home, streams):
    flags = ["--temperature", 0.7, "--top-k", 3, "--seed", 5, "--max-tokens", 2, "--precision", "bf16"]
    assert run("sample.py", PICTURE, QUESTION, *flags, cwd=home).returncode == 0
    options = streams[0].options
    assert (options["temperature"], options["top_k"], options["max_tokens"]) == (0.7, 3, 2)
    assert options["generator"].initial_seed() == 5 and streams[0].model.llm.dtype == torch.bfloat16


def test_the_last_of_two_arguments_is_the_question_whatever_it_says(home, streams):
    for question in ("is it as red as in green.jpg", "what"):
        assert run("sample.py", PICTURE, question, cwd=home).returncode == 0
        assert streams.pop().texts == [question]


def test_words_that_the_tokenizer_does_not_have_are_told(home):
    assert "does not know: pizza" in run("sample.py", PICTURE, "what color is the pizza?", cwd=home).stderr
    assert "does not know" not in run("sample.py", PICTURE, QUESTION, cwd=home).stderr


def written(pieces, ends=True):
    """Let write_answer write a text that becomes one after the other of these pieces."""
    model = SimpleNamespace(
        stream=lambda f, questions, **options: (torch.tensor([i]) for i in range(len(pieces))),
        decode=lambda ids: pieces[ids[-1]],
        tokenizer=SimpleNamespace(eos_token_id=len(pieces) - 1 if ends else None))
    return sample.write_answer(model, None, "?", {})


@pytest.mark.parametrize("pieces", [
    ["it", "it '", "it's", "it's red"],
    ["dog", "dog .", "dog."],
    ["h", "h\ufffd", "hé é"],
])
def test_words_that_a_tokenizer_joins_later_are_written_once_and_right(pieces, capsys):
    assert written(pieces) == pieces[-1]
    assert capsys.readouterr().out == pieces[-1] + "\n"


def test_an_answer_is_one_line_without_what_a_terminal_would_obey(capsys):
    """Joiners stay, which belong to the letters of some languages."""
    assert written(["a \x1b[2Jred\x9b\ncup\u202e क्\u200cष"]) == "a [2Jred cup क्\u200cष"
    sample.note("\x1b]0;title\x07one\ntwo")
    printed = capsys.readouterr()
    assert printed.out == "a [2Jred cup क्\u200cष\n" and printed.err == "note: ]0;titleone two\n"


def test_an_answer_that_was_cut_off_is_told_and_one_that_ended_is_not(capsys):
    written(["a", "a b", "a b c"], ends=False)
    assert capsys.readouterr().err == "note: the answer was cut off after 3 tokens\n"
    written(["a", "a b", "a b c"])
    assert capsys.readouterr().err == ""


def test_a_stage_1_checkpoint_writes_captions_and_says_so(home, streams):
    checkpoint = ["--checkpoint", f"out/llm+clip/stage1/{CHECKPOINT}"]
    caption = run("sample.py", PICTURE, *checkpoint, cwd=home)
    asked = run("sample.py", PICTURE, QUESTION, *checkpoint, cwd=home)
    assert caption.returncode == asked.returncode == 0 and caption.stdout == asked.stdout
    assert "stage 1" in asked.stderr and "stage 1" in caption.stderr
    assert [s.texts for s in streams] == [None, None]


@pytest.mark.parametrize("words", ([PICTURE, "--max-tokens", 2, "  what?\r\n"], ["--max-tokens", 2, PICTURE, "what?"]))
def test_flags_and_spaces_around_a_question_change_nothing(home, streams, words):
    assert run("sample.py", *words, cwd=home).returncode == 0
    assert [s.texts for s in streams] == [["what?"]]


# ---- A chat


def test_in_a_pipe_each_line_is_a_question_and_an_empty_one_is_skipped_and_told(home, streams):
    chat = run("sample.py", PICTURE, "--max-tokens", 3, cwd=home, stdin="what?\n\nis it red?\n  \nno")
    one, two, _ = chat.stdout.splitlines()
    assert [s.texts[0] for s in streams] == [
        "what?", f"what?\nAnswer: {one}\nQuestion: is it red?",
        f"what?\nAnswer: {one}\nQuestion: is it red?\nAnswer: {two}\nQuestion: no"]
    assert chat.returncode == 0 and chat.stderr.count("empty or unreadable line was skipped") == 2


def test_on_a_terminal_an_empty_line_ends_the_chat_and_the_prompt_says_so(monkeypatch, streams):
    model, prompts = tiny_model(), []
    lines = iter(["what?", "", "no"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(lines))
    sample.chat(model, torch.zeros(1, 24), {"max_tokens": 2})
    assert [s.texts for s in streams] == [["what?"]] and next(lines) == "no"
    assert "empty line ends" in prompts[0]


def test_a_chat_longer_than_the_context_forgets_its_beginning_and_no_more(home, streams):
    questions = ["what color is it is it is it is it is it?"] * 6 + ["is it red?"]
    stdin = "\n".join([*questions[:6], "red " * 100, questions[6]])  # one of them can't be asked
    chat = run("sample.py", PICTURE, "--max-tokens", 8, cwd=home, stdin=stdin)
    said, turns = chat.stdout.splitlines(), []
    assert "without the earliest turn" in chat.stderr and chat.stderr.count("shorten it") == 1
    assert len(streams) == len(said) == 7
    for asked, question, text in zip(streams, questions, said):
        all_turns = [data.dialogue([*turns[2 * k:], question]) for k in range(len(turns) // 2 + 1)]
        assert asked.texts[0] == next(text for text in all_turns if sample.fits(asked.model, text))
        turns += [question, text]
    assert streams[-1].texts[0] not in (all_turns[0], all_turns[-1])


def test_a_question_fits_where_it_can_be_asked_and_no_longer():
    model = tiny_model()
    room = model.max_text_tokens - model.tokenize(["red"], [""]).lengths().item()
    longest = "red" + " red" * room
    assert sample.fits(model, longest) and not sample.fits(model, longest + " red")
    model.tokenize([longest], [""])
    with pytest.raises(UserError, match="context has room for"):
        model.tokenize([longest + " red"], [""])


# ---- An evaluation


def test_a_data_file_is_evaluated_and_its_results_stand_beside_the_checkpoint(copied, monkeypatch):
    bounds, evaluate = [], sample.evaluate
    monkeypatch.setattr(sample, "evaluate", lambda *given: bounds.append(given[-1]) or evaluate(*given))
    command = ["sample.py", "--data", "chat.json", "--images", "pictures", "--max-batch-tokens", 777]
    result = run(*command, cwd=copied)
    assert result.returncode == 0 and bounds == [777], result.stderr
    folder = copied / "out/llm+clip/stage2/evaluation-chat"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines[::2]] == [f"{color}.jpg" for color in COLORS]
    assert [line["truth"] for line in lines[::2]] == list(COLORS)
    assert {line["truth"] for line in lines[1::2]} == {None}
    assert json.loads((folder / "scores.json").read_text())["color"]["n"] == 6
    assert "12 records to evaluate" in result.stderr and result.stdout.split()[:2] == ["lmeye", "blind"]
    assert (copied / "out/llm+clip/features").is_dir()  # where train.py looks for them, too
    again = run(*command, cwd=copied)
    assert "evaluation-chat.1" in again.stderr and folder.with_name("evaluation-chat.1").is_dir()


def test_captions_are_evaluated_with_stage_1_and_refused_with_stage_2(copied):
    one = ["--checkpoint", f"out/llm+clip/stage1/{CHECKPOINT}"]
    result = run("sample.py", "--data", "pictures", *one, cwd=copied)
    assert result.returncode == 0 and "CLIPScore" in result.stdout, result.stderr
    refused = run("sample.py", "--data", "pictures", cwd=copied)
    assert refused.returncode == 2 and "caption" in refused.stderr.splitlines()[-1]


# ---- Which checkpoint, which models


@pytest.mark.parametrize("names, chosen", [
    (["m/stage2", "m/stage2-static", "m/stage1"], "m/stage2-static"),
    (["m/stage2", "m/stage2.1", "m/stage2.10"], "m/stage2"),  # what was put aside never answers
    (["b/stage2", "a/stage2", "c/stage1"], "a/stage2"),  # another model is still in its phase 1
    (["b/stage1", "a/stage1"], "a/stage1"),
    (["opt-1.3b+clip/stage2"], "opt-1.3b+clip/stage2"),
])
def test_the_newest_answers_but_stage_2_goes_before_stage_1(tmp_path, names, chosen):
    for time, name in enumerate(names):
        path = tmp_path / name / CHECKPOINT
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (time, time))
    assert sample.newest(tmp_path) == tmp_path / chosen / CHECKPOINT


def test_a_checkpoint_tells_its_layers_and_what_it_was_trained_as(home, tmp_path, streams):
    given = {"llm": str(home / "llm"), "clip": f"local-dir:{home / 'clip'}", "n_slots": 3, "n_features": 4,
             "n_image_tokens": 2, "variant": "norequest", "precision": "fp16"}
    model = LMEye.from_settings(sample.settings_from(given, "out"))
    model.save(tmp_path / "out/m/stage2" / CHECKPOINT, 2)
    assert run("sample.py", home / PICTURE, QUESTION, cwd=tmp_path).returncode == 0
    loaded = streams[0].model
    assert vars(loaded.settings).items() >= given.items() and loaded.llm.dtype == torch.float16
    for name, p in loaded.adapter(2).items():
        assert torch.equal(p, model.adapter(2)[name]), name


@pytest.mark.parametrize("here, flags", [
    (".", ["--out", "copy/out"]),
    (".", ["--checkpoint", f"copy/out/llm+clip/stage2/{CHECKPOINT}"]),
    ("copy/out/llm+clip/stage2", ["--checkpoint", CHECKPOINT]),
])
def test_models_that_are_not_found_from_here_are_looked_for_where_training_was_started(
        copied, tmp_path, here, flags):
    expected = run("sample.py", PICTURE, QUESTION, cwd=copied).stdout
    result = run("sample.py", copied / PICTURE, QUESTION, *flags, cwd=tmp_path / here)
    assert result.returncode == 0 and result.stdout == expected, result.stderr


def settings_changed(copied, path, **changes):
    """Save the adapter of stage 2 in `path` as if it had been trained with other settings."""
    model, _ = sample.load_trained(copied / STAGE_2)
    model.settings = replace(model.settings, **changes)
    model.save(copied / path, 2)


def test_models_that_are_found_nowhere_are_told_with_where_they_were_looked_for(copied, tmp_path):
    """"models/llm" may be a folder or a name on the hub, so that alone the loader's error says neither."""
    settings_changed(copied, STAGE_2, llm="models/llm", clip="local-dir:models/clip")
    ask = ["sample.py", copied / PICTURE, QUESTION, "--checkpoint", copied / STAGE_2]
    found = ["--llm", copied / "llm", "--clip", f"local-dir:{copied}/clip"]
    for given, name in (([], "--llm models/llm"), (found[:2], "--clip local-dir:models/clip")):
        result = run(*ask, *given, cwd=tmp_path)
        assert fails_in_answering(result, f"{name}: can't be loaded")
        assert f"others here and in {copied}; elsewhere they are named by" in result.stderr
    assert run(*ask, *found, cwd=tmp_path).returncode == 0


def test_models_of_a_preset_are_below_the_checkpoints_own_out_or_where_they_are_said_to_be(copied):
    expected = run("sample.py", PICTURE, QUESTION, cwd=copied).stdout
    gone = {"preset": "mini", "llm": "gone", "clip": "local-dir:gone"}
    settings_changed(copied, f"moved/mini/stage2/{CHECKPOINT}", **gone)
    ask = ["sample.py", PICTURE, QUESTION, "--out", "moved"]
    assert fails_in_answering(run(*ask, cwd=copied), "moved/mini/llm: no such folder")
    assert run(*ask, "--llm", "llm", "--clip", "local-dir:clip", cwd=copied).stdout == expected
    for name in ("llm", "clip"):
        (copied / name).rename(copied / "moved/mini" / name)
    assert run(*ask, cwd=copied).stdout == expected


def test_a_file_of_weights_keeps_the_name_of_its_architecture(copied, monkeypatch):
    settings_changed(copied, STAGE_2, clip="ViT-B-32:clip/open_clip_config.json")
    loaded = []
    monkeypatch.setattr(LMEye, "from_settings", lambda settings: loaded.append(settings) or tiny_model())
    monkeypatch.setattr(LMEye, "load", lambda model, checkpoint: 2)
    sample.load_trained(copied / STAGE_2)
    assert loaded[0].clip == f"ViT-B-32:{copied / 'clip/open_clip_config.json'}"


def test_names_of_own_models_name_their_runs_and_presets_keep_theirs():
    own = sample.settings_from({"llm": "org/name", "clip": "hf-hub:a/b", "n_slots": 2, "dropout": None}, "o")
    assert (own.preset, own.n_slots, own.dropout) == ("name+b", 2, 0.5)
    published = sample.settings_from({"clip": "ViT-B-32:laion2b"}, "o")
    assert published.preset == "opt-1.3b+ViT-B-32-laion2b"
    mini = sample.settings_from({"preset": "mini"}, "o")
    assert (mini.preset, mini.llm, mini.clip) == ("mini", "o/mini/llm", "local-dir:o/mini/clip")
    assert sample.settings_from({"preset": "bloomz-7b1"}, "o") == sample.PRESETS["bloomz-7b1"]


def test_what_is_set_aside_is_told_and_keeps_every_earlier_one(tmp_path, capsys):
    for n in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / str(n)).write_text("")
        assert sample.set_aside(tmp_path / "run") == tmp_path / f"run.{n}"
        assert f"run.{n}" in capsys.readouterr().err and (tmp_path / f"run.{n}" / str(n)).is_file()
    assert sample.set_aside(tmp_path / "run") is None and capsys.readouterr().err == ""


# ---- Mistakes


def fails_in_answering(result, told):
    """As fails_in_one_line, below the line that says which checkpoint answers."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("answers: ", "note: "))]
    return fails_in_one_line(result._replace(stderr="\n".join(lines))) and told in lines[0]


@pytest.mark.parametrize("told, mistake", [
    ("quote the question", [PICTURE, "what", "is", "it?"]),
    ("is a file, not a question", [PICTURE, "pictures/blue.jpg"]),
    ("empty", [PICTURE, " "]),
    ("unreadable", [PICTURE, "what\udcff?"]),  # a byte that is no text
    ("nowhere.jpg", ["nowhere.jpg", QUESTION]),
    ("chat.json: no picture", ["chat.json", QUESTION]),
    ("context has room for", [PICTURE, "red " * 5000]),
    ("are others", [PICTURE, QUESTION, "--llm", "other"]),  # an adapter of other weights
    ("--llm no/such/folder", [PICTURE, QUESTION, "--llm", "no/such/folder"]),
    ("--clip local-dir:nowhere", [PICTURE, QUESTION, "--clip", "local-dir:nowhere"]),
    ("be used as a checkpoint", [PICTURE, QUESTION, "--checkpoint", PICTURE]),
    ("train.py --stage 1", [PICTURE, QUESTION, "--out", "pictures"]),
    ("nowhere", ["--data", "nowhere.json"]),
])
def test_mistakes_end_in_one_line(home, told, mistake):
    assert fails_in_answering(run("sample.py", *mistake, cwd=home), told)


@pytest.mark.parametrize("flags", [
    ["a.jpg", "--temperature", "nan"],
    ["a.jpg", "--max-tokens", 0],
    ["a.jpg", "--temperature", 1, "--top-k", -1],
    ["a.jpg", "--temperature", 1, "--seed", 10 ** 30],
    ["a.jpg", "--top-k", 5],
    ["a.jpg", "--seed", 5],
    ["a.jpg", "--images", "."],
    ["a.jpg", "--max-batch-tokens", 9],
    ["--data", "a.json", "--max-tokens", 5],
    ["--data", "a.json", "--temperature", 1],
    ["a.jpg", "--data", "a"],
    ["a.jpg", "--data", ""],
    ["a.jpg", "--checkpoint", ""],
    ["a.jpg", "--out", ""],
    [],
])
def test_flags_out_of_range_or_without_effect_are_named(flags):
    result = run("sample.py", *flags)
    named = ["--data"] + [flag for flag in flags if str(flag).startswith("--")]
    assert result.returncode == 2 and named[-1] in result.stderr.splitlines()[-1]


def test_without_a_standard_input_a_chat_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="no standard input"):
        sample.chat(tiny_model(), torch.zeros(1, 24), {})
