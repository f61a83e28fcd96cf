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


def dataset(model, records, seed=2):
    """A Dataset of records, with a feature of its own for each picture."""
    images = list(dict.fromkeys(record.image for record in records))
    question_ids = [model.question_ids([r.question])[0] if r.turns else [] for r in records]
    tokens = list(zip(question_ids, model.answer_ids([r.answer for r in records])))
    features = np.random.default_rng(seed).normal(size=(len(images), 24)).astype(np.float16)
    return data.Dataset(records, tokens, features, np.array([images.index(r.image) for r in records]))


@pytest.fixture
def evaluate(tmp_path, capsys):
    """→ (scores, lines of answers.jsonl, printed rows {name: words}). `answer` is what the model says,
    given a question or None, and the feature of the picture that is shown."""
    def run(model, some, answer=None, **options):
        def answer_all(model, f, questions):
            pairs = zip(questions or [None] * len(f), f.tolist())
            return [answer(question, row) for question, row in pairs], [True] * len(f)

        folder = tmp_path / "e"
        with pytest.MonkeyPatch.context() as patch:
            if answer:
                patch.setattr(sample, "answer_all", answer_all)
            scores = sample.evaluate(model, some, folder, **options)
        assert json.loads((folder / "scores.json").read_text()) == scores
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
        printed = capsys.readouterr().out.splitlines()
        return scores, lines, {line[:20].strip(): line[20:].split() for line in printed}

    return run


def asked(n, **more):
    """n records with one question each, about pictures of their own."""
    return [Record(f"{i}.jpg", ("what?",), "red", **more) for i in range(n)]


def test_exact_match_counts_by_category_whole_answers_but_for_case_and_space(evaluate):
    """What the model says here is the question."""
    model, records = tiny_model(), []
    for kind, truth, said in (("color", "red", "RED"), ("0", " Two ", "two"), ("color", "yes", "yes it is"),
                              ("0", "left", "at the left")):
        records.append(Record(f"{said}.jpg", (said,), truth, kind))
    scores, lines, printed = evaluate(model, dataset(model, records), lambda question, _: question)
    assert [line["right"] for line in lines] == [True, True, False, False]
    found = {name: (row["n"], row["percent"]) for name, row in scores.items()}
    assert found == {"0": (2, 50.0), "color": (2, 50.0), "all": (4, 50.0)}
    assert list(printed)[-2] == "all" and printed["0"][:2] == ["50.0%", "(–)"]  # four pictures: no interval


def is_right(model, truth, said):
    return sample.is_right(model, Record("a.jpg", ("q",), truth), said)


@pytest.mark.parametrize("truth, said", [
    ("cafe\u0301", "caf\u00e9"),
    ("STRASSE", "straße"),
    (" pizza", "pizza "),
])
def test_letters_may_be_written_in_two_ways(truth, said):
    model = tiny_model()
    model.tokenizer.unk_token = model.tokenizer.eos_token  # as in OPT: each answer ends with the unknown word
    assert is_right(model, truth, said)


def test_a_truth_as_the_tokenizer_gives_it_back_is_right_unless_letters_or_words_were_lost(monkeypatch):
    model = tiny_model()
    assert model.decode(model.answer_ids(["red pizza"])[0]) == "red"
    assert not is_right(model, "red pizza", "red") and not is_right(model, "pizza", "")
    monkeypatch.setattr(model, "decode", lambda ids: "no , it is" if len(ids) > 2 else "n")
    assert is_right(model, "No, it is", "no , it is") and not is_right(model, "no", "n")


def test_of_captions_and_of_questions_without_an_answer_nothing_is_right_or_wrong(evaluate):
    model = tiny_model()
    records = [Record("a.jpg", ("what?",), ""), Record("b.jpg", ("what?",), "red")]
    some = dataset(model, records + [Record(f"{i}.jpg", (), "red") for i in range(12)])
    said = lambda question, row: "red" if question or row[0] > 0 else ""
    scores, lines, printed = evaluate(model, some, said)
    assert [line["truth"] for line in lines[:3]] == [None, "red", "red"]
    assert [line["right"] for line in lines[:3]] == [None, True, None]
    assert [line["blind_right"] for line in lines[:3]] == [None, True, None]
    assert {name: row["n"] for name, row in scores.items()} == {"all": 1, "CLIPScore": 12}
    assert float(printed["CLIPScore"][0]) == pytest.approx(scores["CLIPScore"]["score"], abs=5e-4)


def test_a_line_of_answers_has_exactly_the_fields_that_others_read(evaluate):
    model = tiny_model()
    records = [Record("a.jpg", ("what?", "red", "why?"), "blue", category="k", id="7"),
               Record("b.jpg", ("what?",), "red", choices=("red", "two small"))]
    _, (one, two), _ = evaluate(model, dataset(model, records), lambda question, _: "語 \ud800")
    assert one == {"id": "7", "image": "a.jpg", "question": "why?", "turns": ["what?", "red", "why?"],
                   "answer": "語 \ud800", "blind": "語 \ud800", "truth": "blue", "category": "k",
                   "right": False, "blind_right": False}
    assert two.keys() == one.keys() | {"choices"}
    assert [choice.keys() for choice in two["choices"]] == [{"text", "logp", "tokens", "blind_logp"}] * 2


def test_choices_are_ranked_by_their_likelihood_of_all_tokens_and_of_one(evaluate):
    """The likelihoods themselves are compared with whole passes in test_two_passes.py."""
    model = tiny_model()
    sets = (("three", "two small", "yes it is on a red background", "three three"),
            ("left", "a ring at the top", "blue", "three"))
    turns = (("what color is it?",), ("what color is it?", "red", "how big is it?"))
    records = [Record(f"{i}.jpg", turns[i % 2], sets[i % 2][i // 2], choices=sets[i % 2]) for i in range(8)]
    some = dataset(model, records)
    scores, lines, _ = evaluate(model, some, max_batch_tokens=100)
    for name, logp, shown in (("blind", "blind_logp", data.shuffled(some)), ("answer", "logp", some)):
        right, right_per_token = [], []
        for i, (record, line) in enumerate(zip(records, lines)):
            alone = model.score(shown.f([i]), [record.question], [list(record.choices)])[0].numpy()
            lengths = [len(model.ids_of([" " + choice])[0]) for choice in record.choices]
            assert [choice[logp] for choice in line["choices"]] == pytest.approx(alone, abs=1e-4)
            assert [choice["tokens"] for choice in line["choices"]] == lengths
            assert line[name] == record.choices[alone.argmax()]
            right.append(line[name] == record.answer)
            right_per_token.append(record.choices[(alone / lengths).argmax()] == record.answer)
    assert [line["right"] for line in lines] == right and 0 < sum(right) < 8
    assert scores["all"]["percent"] == 100 * sum(right) / 8
    assert scores["all, per token"]["percent"] == 100 * sum(right_per_token) / 8 and right != right_per_token


def test_a_ranking_per_token_does_not_count_eos(evaluate):
    model = tiny_model()
    model.score = lambda f, *_: torch.tensor([[-1.0, -1.8]])  # a token -1.0 and -0.9, with eos -0.5 and -0.6
    scores, _, _ = evaluate(model, dataset(model, asked(1, choices=("red", "two small"))))
    assert (scores["all"]["percent"], scores["all, per token"]["percent"]) == (100, 0)


def test_likelihoods_that_are_not_finite_are_no_ranking(evaluate):
    model = tiny_model()
    model.score = lambda *_: torch.full((1, 2), math.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, dataset(model, asked(1, choices=("red", "blue"))))


def test_clipscore_is_its_formula_and_that_of_no_caption_is_zero():
    model, captions = tiny_model(), ["a red ring", "two small things at the left", " "]
    v = model.clip.encode_text(model.clip_tokenizer(captions)).detach()
    f = torch.randn(3, 24)
    dots, norms = (f * v).sum(1), (f ** 2).sum(1).sqrt() * (v ** 2).sum(1).sqrt()
    expected = 2.5 * (dots / norms).clamp(min=0)
    assert sample.clip_scores(model, f, captions)[:2] == pytest.approx(expected[:2].tolist(), abs=1e-5)
    assert sample.clip_scores(model, v, captions) == pytest.approx([2.5, 2.5, 0])
    assert sample.clip_scores(model, -v, captions) == [0, 0, 0]


def test_what_was_seen_stands_before_what_is_right_when_blind_with_their_intervals(evaluate):
    model = tiny_model()
    some = dataset(model, [Record(f"{i}.jpg", ("what?",), str(i)) for i in range(10)])
    truth = {row[0]: str(i) for i, row in enumerate(some.f(range(10)).tolist())}
    model.train()  # as it is after training, with dropout
    scores, _, printed = evaluate(model, some, lambda question, row: truth[row[0]])
    assert not model.training
    assert scores["all"]["interval"] == pytest.approx([72.25, 100], abs=0.01)
    assert scores["all"]["blind_interval"] == pytest.approx([0, 27.75], abs=0.01)
    assert printed["all"] == ["100.0%", "(72.2–100.0)", "0.0%", "(0.0–27.8)", "10"]


def test_a_blind_caption_is_compared_with_its_records_own_picture(evaluate, monkeypatch):
    model, compared = tiny_model(), []
    some = dataset(model, [Record(f"{i}.jpg", (), "x") for i in range(6)])
    monkeypatch.setattr(sample, "clip_scores", lambda model, f, texts: compared.append(f) or [0.5] * 6)
    evaluate(model, some, lambda *_: "red")
    assert len(compared) == 2
    for f in compared:
        assert torch.equal(f, some.f(range(6)))


@pytest.mark.parametrize("most", (100, 4096))
def test_each_answer_stands_at_its_own_record_whatever_the_batches(evaluate, most):
    """Questions of many lengths: an evaluation takes them in another order than the file has."""
    model, said = tiny_model(), lambda question, row: f"{question}{row[0]:.3f}"
    records = [Record(f"{i // 2}.jpg", ("two " * (3 * i % 8 + 1),), "red", id=i) for i in range(8)]
    some = dataset(model, records)
    _, lines, _ = evaluate(model, some, said, max_batch_tokens=most)
    assert [line["id"] for line in lines] == list(range(8))
    for key, shown in (("answer", some), ("blind", data.shuffled(some))):
        for i, line in enumerate(lines):
            assert line[key] == said(records[i].question, shown.f([i])[0])


def test_a_category_named_like_a_row_of_the_program_has_a_row_of_its_own(evaluate):
    model, names = tiny_model(), ["CLIPScore", "all, per token", '"CLIPScore"', "all"]
    records = [Record(f"{name}.jpg", ("what?",), "red", category=name) for name in names]
    records += [Record("c.jpg", (), "a caption"), *asked(1, choices=("red", "blue"))]
    scores, _, _ = evaluate(model, dataset(model, records), lambda question, _: "red")
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
    pictures = np.arange(200)
    alone = sample.interval(coins, pictures, True)
    assert sample.interval(np.repeat(coins, 5), np.repeat(pictures, 5), True) == pytest.approx(alone)
    uneven = np.concatenate([np.zeros(100), pictures[1:101]])  # one has half of all: 200² / 10,100 = 4
    for few in (pictures % 9, uneven):
        assert sample.interval(coins, few, True) is None


def test_intervals_of_the_scores_of_ten_pictures_hold_in_nineteen_of_twenty_draws():
    """1.96 standard errors hold in 92%."""
    rng, picture, held = np.random.default_rng(0), np.arange(10), 0
    for p in rng.random(4000):
        low, high = sample.interval(rng.normal(p, 0.1, 10), picture, False)
        held += low <= p <= high
    assert 0.94 < held / 4000 < 0.96


@pytest.mark.parametrize("most", (1, 500, 4096))
def test_no_batch_holds_more_tokens_than_told_each_record_comes_once_and_the_longest_first(most):
    model, records = tiny_model(), [Record("c.jpg", (), "a caption")] * 5
    for i in range(100):
        four = ("red", "two " * (1 + i % 7), "no", "yes")
        records.append(Record("a.jpg", ("two " * (i % 20),), "red", choices=four if i % 3 == 0 else ()))
    some = dataset(model, records)
    batches = sample.batches_by_length(model, some, most)
    assert sorted(i for batch in batches for i in batch) == list(range(105))
    firsts = {}
    for batch in batches:
        kind, = {(len(records[i].choices), bool(records[i].turns)) for i in batch}
        question = max(len(some.tokens[i][0]) for i in batch)
        answers = [len(model.answer_ids([text])[0]) for i in batch for text in records[i].choices]
        longest = question + max(answers, default=sample.MAX_TOKENS)
        assert len(batch) == 1 or len(batch) * max(1, kind[0]) * longest <= most
        firsts.setdefault(kind, []).append(len(some.tokens[batch[0]][0]) + answers[1] if answers else longest)
    assert len(firsts) == 3
    for lengths in firsts.values():
        assert lengths == sorted(lengths, reverse=True)
    assert len(batches) < 12 or most < 4096  # they are filled


def test_files_are_there_when_the_table_can_no_longer_be_printed(monkeypatch, tmp_path):
    model = tiny_model()
    some = dataset(model, asked(3))
    with pytest.raises(BrokenPipeError), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=Mock(side_effect=BrokenPipeError)))
        sample.evaluate(model, some, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"answers.jsonl", "scores.json"}


@pytest.mark.parametrize("lengths, told, not_told", [  # of answers, without eos
    ([3, 64, 70, 63, 9], "  2 answers were cut off, at 64 tokens", "empty"),
    ([0, 4, 5, 63, 0], "  2 answers are empty", "cut off"),
])
def test_answers_that_say_nothing_or_were_cut_off_are_counted_below_the_table(
        tmp_path, capsys, lengths, told, not_told):
    """Of the picture's own answers: what is right among them may be a matter of length."""
    model = tiny_model()
    model.max_text_tokens = 100
    eos = model.tokenizer.eos_token_id

    def stream(f, questions, max_tokens):
        for t in range(max_tokens):
            yield torch.tensor([5 if t < length else eos for length in lengths])

    model.stream = stream
    sample.evaluate(model, dataset(model, asked(5)), tmp_path / "e")
    out = capsys.readouterr().out
    assert told in out and not_told not in out


def test_answers_that_fill_the_context_are_cut_off_also_beside_others():
    model = tiny_model()
    real, eos = model.logits, model.tokenizer.eos_token_id
    model.logits = lambda h: real(h).index_fill(-1, torch.tensor([eos]), -torch.inf)
    f = torch.randn(2, model.align.in_features)
    assert sample.answer_all(model, f, ["red", "two " * 30])[1] == [False, False]


def test_copies_are_one_picture_to_intervals_and_to_blind(tmp_path, capsys):
    """Twelve names of one picture are no evidence of twelve."""
    model = tiny_model()
    some = dataset(model, asked(12))
    some.features[:] = 1
    scores = sample.evaluate(model, some, tmp_path / "e")
    assert scores["all"]["n"] == 12 and scores["all"]["interval"] is None
    assert "no other can be shown" in capsys.readouterr().err
