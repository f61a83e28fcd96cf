"""What is measured is what the names say: each metric against an independent computation, and on published shapes."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run, save_clip, save_opt, tiny_model
from PIL import Image
from test_training import dataset
from test_two_passes import plain_logits

import data
import sample
from data import Record


def test_exact_match_counts_by_kind_and_whole_answers_only(monkeypatch):
    model = tiny_model()
    some = dataset(model, 2)
    some = some._replace(records=[r._replace(category=k) for r, k in zip(some.records, "aabb")])
    monkeypatch.setattr(model, "generate", lambda f, questions, **_: ["red", "two", "YES", "at the left side"])
    scores, said = sample.predict_and_score(model, some)
    assert scores["all"].tolist() == [1, 0, 1, 0] and said[1] == "two"
    np.testing.assert_array_equal(scores["b"], [np.nan, np.nan, 1, 0])


def test_space_around_the_truth_does_not_make_an_answer_wrong():
    assert sample.score_text(Record("a.jpg", ("how many?",), "2 ", "number"), "2") == {"number": True, "all": True}


@pytest.mark.parametrize("said, answers, expected", [
    ("cat", ["cat"] * 10, 1.0),
    ("cat", ["dog"] * 10, 0.0),
    ("cat", ["cat"] + ["dog"] * 9, 0.3),  # the one who said it has no match among the others; nine have one: 9 · 1/3
    ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),  # 2 · 1/3 + 8 · 2/3
    ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),  # 3 · 2/3 + 7 · 1
    ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
    ("The Cat.", ["cat"] * 4 + ["dog"] * 6, 1.0),
    ("The Cat.", ["cat"] * 10, 0.0),  # the official scorer normalises only where the annotators differ
])
def test_vqa_accuracy_compares_with_the_nine_others(said, answers, expected):
    assert sample.vqa_accuracy(said, answers) == pytest.approx(expected)


@pytest.mark.parametrize("text, expected", [
    ("The Cat.", "cat"), ("two", "2"), ("none", "0"), ("an apple a day", "apple day"), ("dont", "don't"),
    ("Its red", "its red"), ("theyre well", "they're well"), ("yes!", "yes"), ("red-blue", "red blue"),
    ("red - blue", "red blue"), ("x-y)-z", "x y z"), ("1,000", "1000"), ("3.5 m.", "3.5 m"), ("wont, cant", "won't can't"), ("shell", "shell"), ("four oclock", "4 o'clock"),
    ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
    ("hed, whod", "he'd who'd"), ("ive couldnt", "i've couldn't"), ("im, youre", "i'm you're"),
    ("whats somebodys", "what's somebody's"),
    ("youll, maam", "you'll ma'am"),
])
def test_texts_are_normalised_as_the_official_scorer_does(text, expected):
    assert sample.normalize_vqa(text) == expected


def test_bootstrap_equals_the_normal_interval_of_many_coins_and_knows_that_records_of_a_picture_go_together():
    n, coins = 2000, (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    half = 1.96 * math.sqrt(coins.mean() * (1 - coins.mean()) / n)
    low, high = sample.bootstrap_interval(coins, np.arange(n))
    assert (coins.mean() - low, high - coins.mean()) == pytest.approx((half, half), rel=0.1)
    assert sample.bootstrap_interval(np.repeat(coins, 5), np.repeat(np.arange(n), 5)) == pytest.approx((low, high))


def test_choices_are_ranked_by_the_likelihood_that_single_passes_give():
    model = tiny_model()
    choices = (("three", "white", "yes it is on a red background", "two small"),
               ("red", "one", "three three", "a ring at the top"))
    turns = (("what color is it?",), ("what color is it?", "red", "how big is it?"))
    records = [Record(f"{i}.jpg", t, c[i], key=str(i), choices=c) for i in range(4) for t, c in zip(turns, choices)]
    some = dataset(model, 2)
    tokens = list(zip(*model.token_ids([r.question for r in records], [r.answer for r in records])))
    some = some._replace(records=records, tokens=tokens, picture=np.repeat(np.arange(4), 2))
    right, likeliest, per_token = {}, [], []
    for i, record in enumerate(records):
        sums, means = [], []
        for choice in record.choices:
            ids = model.ids(" " + choice)
            logp = plain_logits(model, some.f([i]), record.question, ids).log_softmax(-1)
            sums.append(sum(logp[t, token].item() for t, token in enumerate(ids)))
            means.append(sums[-1] / len(ids))
        likeliest.append(record.choices[np.argmax(sums)])
        per_token.append(record.choices[np.argmax(means)])
        for how, values in (("", sums), (", per token", means)):
            right[i, how] = record.choices[np.argmax(values)] == record.answer
    scores, said = sample.predict_and_score(model, some)
    for how in ("", ", per token"):
        answers, whys = ([right[i, how] for i in range(start, 8, 2)] for start in (0, 1))
        assert scores["Q→A" + how][::2].tolist() == answers and scores["QA→R" + how][1::2].tolist() == whys
        assert scores["Q→AR" + how][1::2].tolist() == [a and b for a, b in zip(answers, whys)]
        assert np.isnan(scores["Q→AR" + how][::2]).all()
    assert len({right[i, ""] for i in range(8)}) == 2 and said == likeliest != per_token
    assert len(set(likeliest)) == 4  # so that their order shows


def test_the_mean_of_a_choice_s_tokens_is_without_its_end(monkeypatch):
    model, record = tiny_model(), Record("a.jpg", ("what?",), "red", choices=("red", "two small"))
    monkeypatch.setattr(model, "score", lambda *_: torch.tensor([[-1.0, -1.8]]))  # of one token, and of two
    _, marks = sample.rank_choices(model, [record], torch.zeros(1, 24))
    assert marks == [{"Q→A": True, "Q→A, per token": False}]  # -1 and -0.9; with eos -0.5 and -0.6


def test_two_questions_about_one_picture_are_told_apart():
    first, second = Record("a.jpg", ("why?",), "x", key="1"), Record("a.jpg", ("who?",), "y", key="2")
    reasons = [first._replace(turns=("why?", "x", "Why?")), second._replace(turns=("who?", "y", "Why?"))]
    explained = np.array([np.nan, np.nan, 1, 1])
    for answered in ([1, 0], [0, 1]):
        both = sample.both_right([first, second, *reasons], np.array([*answered, np.nan, np.nan]), explained)
        assert both[2:].tolist() == answered


def test_a_rationale_whose_question_was_left_out_counts_as_wrong():
    records = [Record("a.jpg", ("why?", "so", "explain"), "x", key="1"), Record("b.jpg", ("what?",), "y", key="2")]
    both = sample.both_right(records, np.array([np.nan, 1.0]), np.array([1.0, np.nan]))
    assert both[0] == 0 and np.isnan(both[1])


def test_clipscore_is_its_formula():
    model, captions = tiny_model(), ["a red ring", "two small things at the left"]
    f = torch.randn(2, model.clip.visual.output_dim)
    for i, caption in enumerate(captions):
        v = model.clip.encode_text(model.clip_tokenizer([caption]))[0].detach().numpy()
        cosine = (f[i].numpy() * v).sum() / math.sqrt((f[i].numpy() ** 2).sum() * (v ** 2).sum())
        assert sample.clip_score(model, f, captions)[i].item() == pytest.approx(2.5 * max(cosine, 0), abs=1e-5)
        itself = torch.tensor(v)[None]
        assert sample.clip_score(model, itself, [caption]).item() == pytest.approx(2.5)
        assert sample.clip_score(model, -itself, [caption]).item() == 0


def test_blind_is_told_about_another_picture_and_judged_on_its_own(monkeypatch):
    model, shown = tiny_model(), []
    some = dataset(model, 1)
    monkeypatch.setattr(model, "generate", lambda f, *_, **__: shown.append(f) or ["red"] * len(f))
    judged = []
    monkeypatch.setattr(sample, "clip_score", lambda model, f, texts: judged.append(f) or torch.zeros(len(f)))
    sample.predict_and_score(model, some, blind=True)
    assert torch.equal(judged[0], some.f(range(4))) and not (shown[0] == judged[0]).all(1).any()
    assert sorted(map(tuple, shown[0].tolist())) == sorted(map(tuple, judged[0].tolist()))


def vcr(i):
    return {"objects": ["person", "person"], "img_fn": f"{i}.jpg", "question": ["What", "is", [0, 1], "doing", "?"],
            "answer_choices": [["He", "runs", "."], [[0], "sits", "."], ["No", "."], ["Yes", "."]], "answer_label": 1,
            "rationale_choices": [["A", "."], ["B", "."], ["C", "."], ["D", "."]], "rationale_label": i % 4,
            "annot_id": f"val-{i}"}


def test_vcr_vqa_and_coco_are_evaluated_from_the_command_line_on_all_records_of_the_files(tmp_path):
    for i in range(60):
        Image.new("RGB", (40, 30), (4 * i, 0, 0)).save(tmp_path / f"{i}.jpg")
        Image.new("RGB", (40, 30), (0, 4 * i, 0)).save(tmp_path / f"COCO_val2014_{i:012d}.jpg")
    (tmp_path / "vcr.jsonl").write_text("\n".join(json.dumps(vcr(i)) for i in range(60)))
    (tmp_path / "q.json").write_text(json.dumps({"questions": [
        {"question_id": 10 * i, "image_id": i, "question": "What color?"} for i in range(60)]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [
        {"question_id": 10 * i, "image_id": i, "multiple_choice_answer": "green", "answer_type": ("other", "number")[i % 2],
         "answers": [{"answer": "green", "answer_id": k} for k in range(10)]} for i in range(60)]}))
    (tmp_path / "coco.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(60)],
        "annotations": [{"id": 5 * i + k, "image_id": i, "caption": f"A green {k}"} for i in range(60) for k in range(5)]}))
    flags = ["--llm", save_opt(tmp_path / "opt"), "--clip", save_clip(tmp_path / "clip"), "--images", tmp_path]

    def program(*command):
        result = run(*command, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    program("train.py", "--stage", 1, "--data", tmp_path / "coco.json", "--steps", 2)
    out = program("sample.py", "--data", tmp_path / "coco.json")
    assert "300 records to evaluate" in out and "CLIPScore" in out
    captions = json.loads((tmp_path / "out/opt+clip/stage1/evaluation/captions.json").read_text())
    assert sorted(c["image_id"] for c in captions) == list(range(60)) and all(isinstance(c["caption"], str) for c in captions)

    data_files = [f for name in ("vcr.jsonl", "q.json", "a.json") for f in ("--data", tmp_path / name)]
    program("train.py", "--stage", 2, *data_files, "--steps", 2)
    out = program("sample.py", *data_files)
    for column in ("VQA", "VQA, number", "VQA, other", "Q→A", "QA→R", "Q→AR", "Q→AR, per token"):
        assert any(line.startswith(f"{column} ") for line in out.splitlines()), column
    folder = tmp_path / "out/opt+clip/stage2/evaluation"
    answers = json.loads((folder / "vqa.json").read_text())
    assert sorted(a["question_id"] for a in answers) == [10 * i for i in range(60)]
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 180 and {line["truth"] for line in lines} >= {"green", "person 1 sits."}
    assert folder.with_name("evaluation.1").is_dir()  # that of the end of training is kept

    # A test split: questions without annotations, one of them about a picture that is not there.
    (tmp_path / "test.json").write_text(json.dumps({"questions": [
        {"question_id": 10 * i, "image_id": i, "question": "What color?"} for i in (0, 1, 99)]}))
    out = program("sample.py", "--data", tmp_path / "test.json")
    answers = {a["question_id"]: a["answer"] for a in json.loads((folder / "vqa.json").read_text())}
    assert set(answers) == {0, 10, 990} and answers[990] == "" and "VQA" not in out


def test_the_table_has_the_model_before_blind_and_the_files_hold_what_was_said_with_the_picture(monkeypatch, tmp_path, capsys):
    model = tiny_model()
    some = dataset(model, 2)
    some = some._replace(records=[r._replace(key=i, answers=(r.answer,) * 10) for i, r in enumerate(some.records)])
    truth = {tuple(some.f([i])[0].tolist()): r.answer for i, r in enumerate(some.records)}
    monkeypatch.setattr(model, "generate", lambda f, questions, **_: [truth[tuple(row)] for row in f.tolist()])
    sample.evaluate(model, some, tmp_path / "e")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["all"] == ["100.0", "(100.0–100.0)", "0.0", "(0.0–0.0)"]
    said = [json.loads(line)["answer"] for line in (tmp_path / "e/answers.jsonl").read_text("utf-8").splitlines()]
    assert said == [r.answer for r in some.records]
    assert json.loads((tmp_path / "e/vqa.json").read_text()) == [{"question_id": i, "answer": a} for i, a in enumerate(said)]


@pytest.mark.parametrize("most", (100, 4096))
def test_each_answer_stands_beside_its_own_record_whatever_the_batches(monkeypatch, tmp_path, most):
    """Questions of many lengths: an evaluation takes them in another order than the file has."""
    model = tiny_model()
    some = dataset(model, 2, 8)
    records = [record._replace(turns=("two " * (3 * i % 8 + 1),), key=i, answers=("a", "b"))
               for i, record in enumerate(some.records)]
    tokens = list(zip(*model.token_ids([record.question for record in records], ["red"] * 8)))
    some = some._replace(records=records, tokens=tokens)
    monkeypatch.setattr(model, "generate", lambda f, questions, **_: [f"{row[0]:.3f}" for row in f.tolist()])
    own = [f"{some.f([i])[0, 0]:.3f}" for i in range(8)]
    assert len(set(own)) == 8
    sample.evaluate(model, some, tmp_path / "e", max_batch_tokens=most)
    lines = [json.loads(line) for line in (tmp_path / "e/answers.jsonl").read_text("utf-8").splitlines()]
    assert [line["answer"] for line in lines] == own
    assert json.loads((tmp_path / "e/vqa.json").read_text()) == [
        {"question_id": i, "answer": text} for i, text in enumerate(own)]


def test_vqa_questions_that_could_not_be_asked_count_as_wrong(monkeypatch, tmp_path, capsys):
    model = tiny_model()
    some = dataset(model, 2)
    some = some._replace(records=[r._replace(key=i, answers=(r.answer,) * 10) for i, r in enumerate(some.records)])
    monkeypatch.setattr(model, "generate", lambda f, questions, **_: ["red"] * len(questions))
    sample.evaluate(model, some, tmp_path / "evaluation", [data.Skip("no picture", 77)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("VQA  ")).split()
    assert row[1] == row[3] == "20.0"  # one of four that were asked, of five in all; also blind
    answers = json.loads((tmp_path / "evaluation/vqa.json").read_text())
    assert {"question_id": 77, "answer": ""} in answers and len(answers) == 5


def test_no_batch_of_an_evaluation_holds_more_tokens_than_told_and_each_record_comes_once():
    model = tiny_model()
    records = [Record(f"{i}.jpg", ("two " * (i % 20),), "red", choices=("red", "two small", "no", "yes") if i % 3 == 0 else ())
               for i in range(100)] + [Record("c.jpg", (), "a caption")] * 5
    tokens = list(zip(*model.token_ids([r.question for r in records], [r.answer for r in records])))
    tokens[-5:] = [([], answer) for _, answer in tokens[-5:]]
    some = dataset(model, 2)._replace(records=records, tokens=tokens)
    for most in (1, 500, 4096):
        batches = sample.batches_by_length(model, some, most)
        assert sorted(i for batch in batches for i in batch) == list(range(105))
        for batch in batches:
            assert len({(len(records[i].choices), bool(records[i].turns)) for i in batch}) == 1
            longest = max(len(tokens[i][0]) for i in batch)
            answer = 3 if records[batch[0]].choices else sample.MAX_TOKENS
            assert len(batch) == 1 or len(batch) * max(1, len(records[batch[0]].choices)) * (longest + answer) <= most


def test_the_largest_batch_of_an_evaluation_comes_first():
    """Memory that does not suffice is found out early."""
    model = tiny_model()
    records = [Record(f"{i}.jpg", ("two " * i,), "red") for i in range(1, 20)]
    tokens = list(zip(*model.token_ids([record.question for record in records], ["red"] * 19)))
    some = dataset(model, 2)._replace(records=records, tokens=tokens)
    longest = [max(len(tokens[i][0]) for i in batch) for batch in sample.batches_by_length(model, some, 200)]
    assert longest == sorted(longest, reverse=True) and len(longest) > 3


def test_ids_of_captions_and_of_choices_are_not_taken_for_questions_of_vqa():
    """What is left out of VQA counts as wrong there; a caption that was skipped beside it does not."""
    turns, choices = ("what?", "a cat"), (("a", "b", "c", "d"),)
    assert data.vqa_key(data.Sample("a.jpg", turns=turns, key=7)) == 7
    assert data.vqa_key(data.Sample("a.jpg", caption="a cat", key=7)) == ""
    assert data.vqa_key(data.Sample("a.jpg", turns=turns, choices=choices, key="val-7")) == ""
