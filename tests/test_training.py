"""Training moves exactly the tensors of its phase, learns, and repeats itself from a seed."""

import csv
import hashlib
import json
import signal

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_two_passes import gradients, plain_loss

import data
import train
from lmeye import CHECKPOINT, read_adapter


def dataset(model, stage, n=4):
    """n records with features of their own and different answers."""
    answers = ["red", "two small", "yes", "at the left", "blue", "no", "three", "ring"][:n]
    turns, question = (), []
    if stage == 2:
        turns = ("what color is it?",)
        question = model.question_ids(turns)[0]
    records = [data.Record(f"{i}.jpg", turns, answer) for i, answer in enumerate(answers)]
    tokens = [(question, ids) for ids in model.answer_ids(answers)]
    features = np.random.default_rng(2).normal(size=(n, model.clip.visual.output_dim))
    return data.Dataset(records, tokens, features.astype(np.float16), np.arange(n))


def texts(some):
    """The questions and the answers of a Dataset."""
    return [record.question for record in some.records], [record.answer for record in some.records]


def hashes(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def train_briefly(model, stage, folder, steps=3, **options):
    settings = dict(steps=steps, batch_size=4, lr=1e-2) | options
    train.train_adapter(model, stage, dataset(model, stage), None, folder, **settings)
    (folder / train.STATE).unlink()
    return {name: p.detach().clone() for name, p in model.adapter(stage).items()}


def log_of(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stage, variant, train_align, parts", [
    (1, "lmeye", False, {"align", "img"}),
    (2, "lmeye", False, {"request", "decompose", "transmit", "img_d"}),
    (2, "lmeye", True, {"align", "img", "request", "decompose", "transmit", "img_d"}),
    (2, "norequest", False, {"decompose", "transmit", "img_d"}),
    (2, "static", False, {"align", "img"}),
])
def test_exactly_the_tensors_of_the_phase_change(tmp_path, stage, variant, train_align, parts):
    model = tiny_model(variant=variant, dropout=0.5)
    before = hashes(model)
    train_briefly(model, stage, tmp_path / "run", train_align=train_align)
    after = hashes(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name, _ in model.named_parameters() if name.split(".")[0] in parts}
    assert all(p.dtype == torch.float32 for p in model.adapter(2).values())


def test_the_frozen_parts_stay_in_eval():
    """Else their dropout wakes up, as in the authors' release."""
    model = tiny_model().train()
    assert model.training and model.dropout.training
    assert not any(m.training for part in (model.llm, model.clip) for m in part.modules())


@pytest.mark.parametrize("stage", (1, 2))
def test_four_examples_are_learned_by_heart(tmp_path, stage):
    model = tiny_model(n_slots=4, seed=1)
    train_briefly(model, stage, tmp_path / "run", steps=1200, lr=3e-2)
    some = dataset(model, stage)
    questions, answers = texts(some)
    assert model.generate(some.f(range(4)), questions if stage == 2 else None, max_tokens=8) == answers
    rows = log_of(tmp_path / "run")
    assert float(rows[-1]["loss"]) < 0.2 * float(rows[0]["loss"])


def test_a_seed_repeats_a_run_and_another_has_another_order_and_another_dropout(tmp_path):
    """Each step, too, has a dropout of its own."""
    runs, orders, dropped = [], [], []

    def note_order(layer, inputs):
        orders.append(inputs[0].numpy().tobytes())

    def note_dropout(layer, inputs, output):
        dropped.append((output == 0).numpy().tobytes())

    for i, seed in enumerate((0, 0, 1)):
        model = tiny_model(dropout=0.5)
        model.decompose.register_forward_pre_hook(note_order)
        model.dropout.register_forward_hook(note_dropout)
        runs.append(train_briefly(model, 2, tmp_path / str(i), batch_size=1, seed=seed))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert orders[:3] != orders[6:]
    assert len(set(dropped)) == 2 * 3


def test_nothing_draws_weights_to_zero_but_their_gradient(tmp_path, monkeypatch):
    model = tiny_model()
    before, real = model.decompose.weight.detach().clone(), model.forward
    monkeypatch.setattr(model, "forward", lambda f, tokens: model.img_d.sum() + 0 * real(f, tokens))
    train_briefly(model, 2, tmp_path / "run")
    assert torch.equal(model.decompose.weight, before)


def test_loss_and_norm_in_the_log_are_those_of_two_whole_passes(tmp_path):
    model = tiny_model()
    model.set_trained(2)
    some = dataset(model, 2)
    plain = plain_loss(model, some.f(range(4)), *texts(some))
    norm = torch.cat([g.flatten() for g in gradients(model, plain).values()]).norm().item()
    train_briefly(tiny_model(), 2, tmp_path / "run", steps=1, batch_size=2, accumulate=2)
    row, = log_of(tmp_path / "run")
    assert float(row["loss"]) == pytest.approx(plain.item(), abs=1e-4)
    assert float(row["grad_norm"]) == pytest.approx(norm, rel=0.01)


def test_a_line_of_the_log_has_the_averages_since_the_last_one(tmp_path):
    run = train.Run(tmp_path, 1, 10, None, None, None, {})
    run.log.update({"losses": [1.0, 3.0], "norms": [2.0, 4.0], "tokens": 90, "skipped": 1, "seconds": 7.0,
                    "seconds in steps": 3.0})
    assert "0:28 left" in run.note_line(2, 0.5, {})  # eight more at 3.5 s
    run.log["losses"].append(5.0)
    run.log["norms"].append(1.0)
    run.log.update({"tokens": 10, "seconds": 9.0, "seconds in steps": 2.0})
    run.note_line(3, 0.25, {"val_loss": 1.5, "val_loss_shuffled": 2.5})
    first = dict(step=2, loss=2.0, lr=0.5, grad_norm=3.0, skipped=1, tokens_per_second=30, seconds=7.0)
    second = dict(step=3, loss=5.0, lr=0.25, grad_norm=1.0, skipped=1, tokens_per_second=5, seconds=9.0)
    unknown, known = dict(val_loss="", val_loss_shuffled=""), dict(val_loss=1.5, val_loss_shuffled=2.5)
    assert run.log["lines"] == [first | unknown, second | known]
    assert [row["loss"] for row in log_of(tmp_path)] == ["2.0", "5.0"]


def test_no_batch_of_training_or_validation_holds_more_tokens_than_told(tmp_path, monkeypatch):
    """With padding."""
    model, sizes = tiny_model(), []
    real, some = model.forward, dataset(model, 2, n=8)

    def forward(f, tokens):
        sizes.append(tokens.question.numel() + tokens.answer.numel())
        return real(f, tokens)

    monkeypatch.setattr(model, "forward", forward)
    train.train_adapter(model, 2, some, some, tmp_path / "run", 6, 8, 1e-2, max_batch_tokens=20)
    assert len(sizes) > 6
    assert max(sizes) <= 20


def test_the_adapter_is_that_of_the_last_step_whatever_their_number(tmp_path):
    last = train_briefly(tiny_model(), 1, tmp_path / "run", steps=25)
    saved = read_adapter(tmp_path / "run" / CHECKPOINT)[3]
    assert saved.keys() == last.keys() and all(torch.equal(saved[name], last[name]) for name in last)


def test_fp16_weights_train_with_a_scaled_loss_and_the_trained_weights_stay_fp32(tmp_path):
    model = tiny_model()
    model.llm.half()
    run = train_briefly(model, 2, tmp_path / "run", steps=150, lr=3e-2)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in run.values())
    rows = log_of(tmp_path / "run")
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    train_briefly(tiny_model(), 2, tmp_path / "fp32", steps=1)
    exact = float(log_of(tmp_path / "fp32")[0]["grad_norm"])
    norms = [float(row["grad_norm"]) for row in rows if row["grad_norm"] != "nan"]
    assert norms[0] == pytest.approx(exact, rel=0.1)  # that of the loss, not of the scaled one


def test_what_is_due_ten_times_is_done_so_often_the_last_time_at_the_end():
    for steps in (1, 7, 19, 25, 95, 2400):
        due = [done for done in range(1, steps + 1) if train.is_due(done, steps, parts=10)]
        assert len(due) == min(10, steps) and due[-1] == steps


def test_learning_rate_rises_then_falls_along_a_cosine():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(2 / 5) and rates[4] == pytest.approx(2.0, rel=0.01)  # 5% of warm-up
    assert rates[50] == pytest.approx(1.0) and rates[99] == pytest.approx(0.0, abs=1e-3)
    longer = [train.learning_rate(step, 1000, 2.0) for step in range(1000)]  # 5% of these as well
    assert longer[24] == pytest.approx(1.0) and np.argmax(longer) == 49


def test_the_default_rate_follows_the_spread_of_words_and_the_size_of_features():
    model, some = tiny_model(), dataset(tiny_model(), 1)
    sums = abs(some.features.astype(float)).sum(1)
    words = model.llm.get_input_embeddings().weight
    for reach in (20, 40):
        expected = reach * words.std().item() / sums.mean()
        assert train.suggested_lr(reach, model, some) == pytest.approx(expected, rel=0.1)


def test_the_rates_of_a_run_are_those(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def note(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    train_briefly(tiny_model(), 2, tmp_path / "run", steps=5, lr=2.0)
    assert rates == [train.learning_rate(step, 5, 2.0) for step in range(5)]


def test_gradients_are_clipped_once_a_step_not_once_a_batch(tmp_path, monkeypatch):
    """Two batches of one direction: clipped apart, their sum would be twice as long as MAX_NORM."""
    model, norms, step = tiny_model(), [], torch.optim.AdamW.step

    def measured(self, *args):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda f, tokens: 1000 * real(f, tokens))
    train_briefly(model, 2, tmp_path / "run", steps=3, batch_size=2, accumulate=2)
    assert norms == pytest.approx([train.MAX_NORM] * 3, rel=1e-4)


def test_a_run_says_how_it_was_trained_and_what_its_numbers_are(tmp_path):
    model = tiny_model()
    some = dataset(model, 2, n=8)
    about = {"command": "x"}
    train.train_adapter(model, 2, some, some, tmp_path / "run", steps=20, batch_size=4, lr=1e-2, about=about)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about.items() < run.items()
    assert {"steps": 20, "seed": 0, "learning rate": 1e-2}.items() < run.items()
    rows = log_of(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert sum(bool(row["val_loss"]) for row in rows) == 10
    for column, val in (("val_loss", some), ("val_loss_shuffled", data.shuffled(some))):
        assert float(rows[-1][column]) == pytest.approx(train.mean_loss(model, val, 4096), abs=1e-4)


@pytest.mark.parametrize("kinds", [
    np.arange(1000) % 2, np.arange(1000) % 4, np.arange(1000) % 7, np.arange(1000) // 250])
def test_the_mean_loss_is_over_records_of_all_kinds(monkeypatch, kinds):
    """Records come in periods: two of VCR's to each question, seven of the miniature's to each picture.
    Or in blocks: first all questions of one kind, then those of another."""
    model, seen = tiny_model(), []

    def forward(f, tokens):
        seen.extend(tokens.question[:, 0].tolist())
        return torch.ones(())

    monkeypatch.setattr(model, "forward", forward)
    records = [data.Record("", ("?",), "")] * 1000
    features = np.zeros((1, 24), np.float16)
    some = data.Dataset(records, [([kind], [1]) for kind in kinds], features, np.zeros(1000, int))
    train.mean_loss(model, some, 4096)
    counts = np.bincount(seen)
    assert len(seen) == 256 and len(counts) == len(set(kinds))
    assert counts.min() > 0.6 * 256 / len(counts)


def test_the_mean_loss_is_over_tokens_in_batches_of_any_size_and_without_dropout():
    model = tiny_model(dropout=0.5)
    some = dataset(model, 2, n=8)
    whole = model.loss(some.f(range(8)), *texts(some)).item()
    for most in (1, 20, 4096):
        assert train.mean_loss(model.train(), some, most) == pytest.approx(whole, rel=1e-4)


def test_question_answer_and_truth_that_a_validation_prints_are_of_one_picture(monkeypatch):
    """The first two questions about each picture in turn, whatever stands between them in the file."""
    model = tiny_model()
    some = dataset(model, 2)
    records = [record._replace(turns=(f"what {i}?",)) for i, record in enumerate(some.records)]
    some = some._replace(picture=np.array([0, 1, 0, 0]), records=records)

    def generate(f, questions, **_):
        return [f"{question} {row[0]:.2f}" for question, row in zip(questions, f.tolist())]

    monkeypatch.setattr(model, "generate", generate)
    for turn, rows in ((0, (0, 2)), (1, (1,)), (2, (0, 2))):
        said = ""
        for i in rows:
            seen = some.features[some.picture[i], 0]
            said += f"\n    what {i}? → what {i}? {seen:.2f} (truth: {records[i].answer})"
        assert train.own_words(model, some, turn) == said


def test_dropout_falls_on_the_decomposed_features_alone_and_only_in_training(monkeypatch):
    model, words = tiny_model(dropout=0.5), []
    monkeypatch.setattr(model, "encode_words", lambda x: words.append(x.detach()))
    f, r, N = torch.randn(50, 24), torch.randn(50, 36), model.settings.n_features
    model.interact(f, r)
    model.train().interact(f, r)
    plain, dropped = words
    whole = model.decompose(f).detach().unflatten(-1, (N, -1))
    kept = dropped[:, 1:N + 1] != 0
    assert torch.equal(plain[:, 1:N + 1], whole) and 0.45 < kept.float().mean() < 0.55
    assert torch.allclose(dropped[:, 1:N + 1][kept], 2 * whole[kept])
    assert torch.equal(dropped[:, [0, N + 1, N + 2]], plain[:, [0, N + 1, N + 2]])


def test_after_a_run_signals_do_what_they_did_before(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_briefly(tiny_model(), 1, tmp_path / "run", steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
