"""What is measured is what the names say: each number against an independent computation."""

import json
import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import tiny_model

import data
import lmeye
import sample
from data import Record
from lmeye import UserError

QUESTIONS = ("what color is it?", "is it red?", "how many things are there?", "how big is it?")


def dataset(model, records, seed=2):
    """A Dataset of records, with a feature of its own for each picture."""
    images = list(dict.fromkeys(record.image for record in records))
    question_ids = [model.question_ids([r.question])[0] if r.turns else [] for r in records]
    tokens = list(zip(question_ids, model.answer_ids([r.answer for r in records])))
    features = np.random.default_rng(seed).normal(size=(len(images), 24)).astype(np.float16)
    return data.Dataset(records, tokens, features, np.array([images.index(r.image) for r in records]))


def evaluate(model, some, folder, capsys, answer=None, **options):
    """(scores, lines of answers.jsonl, printed rows {name: words}). `answer` is what the model says, given a
    question or None, and the feature of the picture that is shown."""
    def answer_all(model, f, questions):
        pairs = zip(questions or [None] * len(f), f.tolist())
        return [answer(question, row) for question, row in pairs], [True] * len(f)

    with pytest.MonkeyPatch.context() as patch:
        if answer:
            patch.setattr(sample, "answer_all", answer_all)
        scores = sample.evaluate(model, some, folder, **options)
    assert json.loads((folder / "scores.json").read_text()) == scores
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    printed = capsys.readouterr().out.splitlines()
    return scores, lines, {line[:20].strip(): line[20:].split() for line in printed}


def test_exact_match_counts_by_category_whole_answers_but_for_case_and_space(tmp_path, capsys):
    model, truths, kinds = tiny_model(), ["red", " Two ", "yes", "left"], ["color", "0", "color", "0"]
    said = dict(zip(QUESTIONS, ["RED", "two", "yes it is", "at the left"]))
    records = [Record(f"{q}.jpg", (q,), a, k) for q, a, k in zip(QUESTIONS, truths, kinds)]
    some = dataset(model, records)
    scores, lines, rows = evaluate(model, some, tmp_path / "e", capsys, lambda question, _: said[question])
    assert [line["right"] for line in lines] == [True, True, False, False]
    assert {name: (row["n"], row["percent"]) for name, row in scores.items()} == {
        "0": (2, 50.0), "color": (2, 50.0), "all": (4, 50.0)}
    assert list(rows)[-2] == "all" and rows["0"][:2] == ["50.0%", "(–)"]  # four pictures: no interval


def test_unicode_may_write_letters_in_two_ways_and_a_tokenizer_may_change_the_truth(monkeypatch):
    model = tiny_model()
    model.tokenizer.unk_token = model.tokenizer.eos_token  # as in OPT: each answer ends with the unknown word
    assert sample.is_right(model, Record("a.jpg", ("q",), "cafe\u0301"), "caf\u00e9")
    assert sample.is_right(model, Record("a.jpg", ("q",), "STRASSE"), "straße")
    assert sample.is_right(model, Record("a.jpg", ("q",), " pizza"), "pizza ")
    monkeypatch.setattr(model, "decode", lambda ids: "no , it is" if len(ids) > 2 else "n")
    assert sample.is_right(model, Record("a.jpg", ("q",), "No, it is"), "no , it is")
    assert not sample.is_right(model, Record("a.jpg", ("q",), "no"), "n")  # a letter was lost


def test_a_truth_of_unknown_words_is_not_what_remains_without_them():
    model = tiny_model()
    assert model.decode(model.answer_ids(["red pizza"])[0]) == "red"  # the word is lost
    assert sample.is_right(model, Record("a.jpg", ("q",), "red pizza"), "red") is False
    assert sample.is_right(model, Record("a.jpg", ("q",), "pizza"), "") is False


def test_of_captions_and_of_questions_without_an_answer_nothing_is_right_or_wrong(tmp_path, capsys):
    model = tiny_model()
    records = [Record("a.jpg", ("what?",), ""), Record("b.jpg", ("what?",), "red")]
    some = dataset(model, records + [Record(f"{i}.jpg", (), "red") for i in range(12)])
    said = lambda question, row: "red" if question or row[0] > 0 else ""
    scores, lines, rows = evaluate(model, some, tmp_path / "e", capsys, said)
    assert [(line["question"], line["truth"], line["right"], line["blind_right"]) for line in lines[:3]] == [
        ("what?", None, None, None), ("what?", "red", True, True), (None, "red", None, None)]
    assert scores.keys() == {"all", "CLIPScore"} and (scores["all"]["n"], scores["CLIPScore"]["n"]) == (1, 12)
    assert float(rows["CLIPScore"][0]) == pytest.approx(scores["CLIPScore"]["score"], abs=5e-4)
    assert "%" in rows["all"][0] and not any("%" in word for word in rows["CLIPScore"])


def test_a_line_of_answers_has_exactly_the_fields_that_others_read(tmp_path, capsys):
    model = tiny_model()
    some = dataset(model, [Record("a.jpg", ("what?", "red", "why?"), "blue", category="k", id="7"),
                           Record("b.jpg", ("what?",), "red", choices=("red", "two small"))])
    _, (one, two), _ = evaluate(model, some, tmp_path / "e", capsys, lambda question, _: "語 \ud800")
    assert one == {"id": "7", "image": "a.jpg", "question": "why?", "turns": ["what?", "red", "why?"],
                   "answer": "語 \ud800", "blind": "語 \ud800", "truth": "blue", "category": "k",
                   "right": False, "blind_right": False}
    assert two.keys() == one.keys() | {"choices"}
    assert [choice.keys() for choice in two["choices"]] == [{"text", "logp", "tokens", "blind_logp"}] * 2
    assert "語" in (tmp_path / "e/answers.jsonl").read_text("utf-8")


def test_choices_are_ranked_by_the_likelihood_that_single_passes_give(tmp_path, capsys):
    model = tiny_model()
    sets = (("three", "two small", "yes it is on a red background", "three three"),
            ("left", "a ring at the top", "blue", "three"))
    turns = (("what color is it?",), ("what color is it?", "red", "how big is it?"))
    records = [Record(f"{i}.jpg", turns[i % 2], sets[i % 2][i // 2], choices=sets[i % 2]) for i in range(8)]
    some = dataset(model, records)
    scores, lines, _ = evaluate(model, some, tmp_path / "e", capsys, max_batch_tokens=100)
    right, right_per_token = [], []
    for i, (record, line) in enumerate(zip(records, lines)):
        for shown, key in ((some, "logp"), (data.shuffled(some), "blind_logp")):
            sums, means = [], []
            for choice, found in zip(record.choices, line["choices"]):
                ids = model.ids_of([" " + choice])[0]
                log_p = lmeye.plain_loss(model, shown.f([i]), record.question, choice)[1].log_softmax(-1)
                sums.append(sum(log_p[t, token].item() for t, token in enumerate(ids)))
                means.append(sums[-1] / len(ids))
                assert found[key] == pytest.approx(sums[-1], abs=1e-4) and found["tokens"] == len(ids)
            best = record.choices[np.argmax(sums)]
            assert line["answer" if key == "logp" else "blind"] == best
            if key == "logp":
                right.append(best == record.answer)
                right_per_token.append(record.choices[np.argmax(means)] == record.answer)
    assert [line["right"] for line in lines] == right and 0 < sum(right) < 8
    assert scores["all"]["percent"] == 100 * sum(right) / 8
    assert scores["all, per token"]["percent"] == 100 * sum(right_per_token) / 8 and right != right_per_token


def test_a_ranking_per_token_does_not_count_eos(tmp_path, capsys):
    model = tiny_model()
    model.score = lambda f, *_: torch.tensor([[-1.0, -1.8]])  # a token -1.0 and -0.9, with eos -0.5 and -0.6
    some = dataset(model, [Record("a.jpg", ("what?",), "red", choices=("red", "two small"))])
    scores, _, _ = evaluate(model, some, tmp_path / "e", capsys)
    assert (scores["all"]["percent"], scores["all, per token"]["percent"]) == (100, 0)


def test_likelihoods_that_are_not_finite_are_no_ranking(monkeypatch, tmp_path):
    model = tiny_model()
    monkeypatch.setattr(model, "score", lambda f, questions, choices: torch.full((1, 2), math.nan))
    some = dataset(model, [Record("a.jpg", ("what?",), "red", choices=("red", "blue"))])
    with pytest.raises(UserError, match="not finite"):
        sample.evaluate(model, some, tmp_path)


def test_clipscore_is_its_formula_and_that_of_no_caption_is_zero():
    model, captions = tiny_model(), ["a red ring", "two small things at the left"]
    f = torch.randn(2, 24)
    for i, caption in enumerate(captions):
        v = model.clip.encode_text(model.clip_tokenizer([caption]))[0].detach().numpy()
        cosine = (f[i].numpy() * v).sum() / math.sqrt((f[i].numpy() ** 2).sum() * (v ** 2).sum())
        assert sample.clip_scores(model, f, captions)[i] == pytest.approx(2.5 * max(cosine, 0), abs=1e-5)
        itself = torch.tensor(v)[None]
        assert sample.clip_scores(model, itself, [caption]) == [pytest.approx(2.5)]
        assert sample.clip_scores(model, -itself, [caption]) == [0]
    empty = model.clip.encode_text(model.clip_tokenizer([" "])).detach()
    assert sample.clip_scores(model, empty, [" "]) == [0]


def test_what_was_seen_stands_before_what_is_right_when_blind_with_their_intervals(tmp_path, capsys):
    model = tiny_model()
    some = dataset(model, [Record(f"{i}.jpg", ("what?",), str(i)) for i in range(10)])
    truth = {row[0]: str(i) for i, row in enumerate(some.f(range(10)).tolist())}
    model.train()  # as it is after training, with dropout
    scores, _, rows = evaluate(model, some, tmp_path / "e", capsys, lambda question, row: truth[row[0]])
    assert (scores["all"]["percent"], scores["all"]["blind"], model.training) == (100, 0, False)
    assert scores["all"]["interval"] == pytest.approx([72.25, 100], abs=0.01)
    assert scores["all"]["blind_interval"] == pytest.approx([0, 27.75], abs=0.01)
    assert rows["all"] == ["100.0%", "(72.2–100.0)", "0.0%", "(0.0–27.8)", "10"]


def test_blind_is_shown_another_picture_and_judged_on_its_own(monkeypatch, tmp_path):
    model, shown, judged = tiny_model(), [], []
    some = dataset(model, [Record(f"{i}.jpg", (), "x") for i in range(6)])
    monkeypatch.setattr(sample, "answer_all",
                        lambda model, f, _: shown.append(f) or (["red"] * len(f), [True] * len(f)))
    monkeypatch.setattr(sample, "clip_scores", lambda model, f, texts: judged.append(f) or [0.5] * len(f))
    sample.evaluate(model, some, tmp_path / "e")
    assert torch.equal(shown[0], judged[0]) and torch.equal(judged[0], judged[1])
    assert not (shown[1] == judged[1]).all(1).any()
    assert sorted(map(tuple, shown[1].tolist())) == sorted(map(tuple, shown[0].tolist()))


def test_each_answer_stands_at_its_own_record_whatever_the_batches(tmp_path, capsys):
    """Questions of many lengths: an evaluation takes them in another order than the file has."""
    model = tiny_model()
    records = [Record(f"{i // 2}.jpg", ("two " * (3 * i % 8 + 1),), "red", id=i) for i in range(8)]
    some, said = dataset(model, records), lambda question, row: f"{question}{row[0]:.3f}"
    for most in (100, 4096):
        _, lines, _ = evaluate(model, some, tmp_path / "e", capsys, said, max_batch_tokens=most)
        for key, shown in (("answer", some), ("blind", data.shuffled(some))):
            for i, line in enumerate(lines):
                assert line[key] == said(records[i].question, shown.f([i])[0])
        assert [line["id"] for line in lines] == list(range(8))
    assert (tmp_path / "e.1").is_dir()  # the results of the first


def test_a_category_named_like_a_row_of_the_program_has_a_row_of_its_own(tmp_path, capsys):
    model, names = tiny_model(), ["CLIPScore", "all, per token", '"CLIPScore"', "all"]
    records = [Record(f"{name}.jpg", ("what?",), "red", category=name) for name in names]
    records += [Record("c.jpg", (), "a caption"), Record("d.jpg", ("what?",), "red", choices=("red", "blue"))]
    scores, _, _ = evaluate(model, dataset(model, records), tmp_path / "e", capsys, lambda question, _: "red")
    assert {name: row["n"] for name, row in scores.items()} == {
        '"CLIPScore"': 1, '"all, per token"': 1, '""CLIPScore""': 1,
        "all": 5, "all, per token": 1, "CLIPScore": 1}


@pytest.mark.parametrize("right, n, ends", [  # as R's prop.test(right, n, correct = FALSE) has them
    (10, 10, (0.7225, 1.0)), (0, 10, (0.0, 0.2775)),
    (50, 100, (0.4038, 0.5962)), (97, 100, (0.9155, 0.9897))])
def test_intervals_of_shares_are_wilsons_and_never_of_no_width(right, n, ends):
    found = sample.interval(np.arange(n) < right, np.arange(n), True)
    assert found == pytest.approx(ends, abs=1e-4)


def test_an_interval_counts_pictures_and_few_have_none():
    coins = np.random.default_rng(1).random(200) < 0.3
    alone = sample.interval(coins, np.arange(200), True)
    assert sample.interval(np.repeat(coins, 5), np.repeat(np.arange(200), 5), True) == pytest.approx(alone)
    assert sample.interval(coins[:9], np.arange(9), True) is None
    assert sample.interval(coins, np.arange(200) % 9, True) is None
    uneven = np.array([0] * 100 + list(range(1, 101)))  # one picture has half of all: 200² / 10,100 = 4
    assert sample.interval(coins, uneven, True) is None


def test_intervals_of_ten_pictures_hold_in_nineteen_of_twenty_draws():
    """The worst case: all records of a picture agree. (1.96 standard errors hold in 92% for other scores.)"""
    rng, picture, shares, means = np.random.default_rng(0), np.repeat(np.arange(10), 3), 0, 0
    for p in rng.random(4000):
        low, high = sample.interval(np.repeat(rng.random(10) < p, 3), picture, True)
        shares += low <= p <= high
        low, high = sample.interval(rng.normal(p, 0.1, 10), np.arange(10), False)
        means += low <= p <= high
    assert 0.94 < shares / 4000 < 0.97 and 0.94 < means / 4000 < 0.96


def test_no_batch_holds_more_tokens_than_told_each_record_comes_once_and_the_longest_first():
    model = tiny_model()
    four = ("red", "two small", "no", "yes")
    records = [Record("c.jpg", (), "a caption")] * 5
    for i in range(100):
        records.append(Record("a.jpg", ("two " * (i % 20),), "red", choices=four if i % 3 == 0 else ()))
    some = dataset(model, records)
    for most in (1, 500, 4096):
        batches = sample.batches_by_length(model, some, most)
        assert sorted(i for batch in batches for i in batch) == list(range(105))
        firsts = {}
        for batch in batches:
            kind, = {(len(records[i].choices), bool(records[i].turns)) for i in batch}
            longest = max(len(some.tokens[i][0]) for i in batch)
            answer = 3 if kind[0] else sample.MAX_TOKENS  # "two small" with its eos
            assert len(batch) == 1 or len(batch) * max(1, kind[0]) * (longest + answer) <= most
            firsts.setdefault(kind, []).append(longest)
        assert len(firsts) == 3
        assert all(lengths == sorted(lengths, reverse=True) for lengths in firsts.values())
    assert len(batches) < 12  # they are filled


def test_files_are_there_when_the_table_can_no_longer_be_printed(monkeypatch, tmp_path):
    model = tiny_model()
    some = dataset(model, [Record(f"{i}.jpg", ("what?",), "red") for i in range(3)])
    with pytest.raises(BrokenPipeError), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=Mock(side_effect=BrokenPipeError)))
        sample.evaluate(model, some, tmp_path / "e")
    assert len((tmp_path / "e/answers.jsonl").read_text().splitlines()) == 3
    assert "all" in json.loads((tmp_path / "e/scores.json").read_text())


def test_answers_that_say_nothing_or_were_cut_off_are_counted_below_the_table(tmp_path, capsys, monkeypatch):
    """Of the picture's own answers: what is right among them may be a matter of length."""
    model, eos = tiny_model(), tiny_model().tokenizer.eos_token_id
    some = dataset(model, [Record(f"{i}.jpg", ("what?",), "red") for i in range(5)])
    for lengths, told, empty in (([3, 64, 70, 63, 9], 2, 0), ([0, 4, 5, 63, 0], 0, 2)):  # tokens before eos
        def stream(f, questions, max_tokens):
            for t in range(max_tokens):
                yield torch.tensor([5 if t < length else eos for length in lengths])

        monkeypatch.setattr(model, "stream", stream)
        sample.evaluate(model, some, tmp_path / "e")
        out = capsys.readouterr().out
        assert (f"  {told} answers were cut off, at 64 tokens" in out) == ("cut off" in out) == (told > 0)
        assert (f"  {empty} answers are empty" in out) == ("empty" in out) == (empty > 0)


def test_of_one_picture_blind_is_no_control_and_that_is_told(tmp_path, capsys):
    model = tiny_model()
    sample.evaluate(model, dataset(model, [Record("a.jpg", ("what?",), "red")]), tmp_path / "e")
    assert "no other can be shown" in capsys.readouterr().err


def test_copies_are_one_picture_to_intervals_and_to_blind(tmp_path, capsys):
    """Twelve names of one picture are no evidence of twelve."""
    model = tiny_model()
    records = [Record(f"{i}.jpg", ("what color is it?",), "red") for i in range(12)]
    tokens = list(zip(model.question_ids([r.question for r in records]), model.answer_ids(["red"] * 12)))
    features = np.ones((12, model.align.in_features), np.float16)
    scores = sample.evaluate(model, data.Dataset(records, tokens, features, np.arange(12)), tmp_path / "evaluation")
    assert scores["all"]["n"] == 12 and scores["all"]["interval"] is None
    assert "no other can be shown" in capsys.readouterr().err
