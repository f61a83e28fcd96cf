"""The lab's recipes: tables of several runs, swapped requests, probes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fails_in_one_line, run, save_clip, save_llm, tiny_model

import data
import miniature
import probe
import shapes
import swap
from lmeye import CHECKPOINT, LMEye, Settings

# ---- Tables ------------------------------------------------------------------------------------------------


def write_run(folder, right, blind=0, asked="what?"):
    """A run with 10 answers of category color, `right` of them right, and a caption that nobody judged."""
    rows = [{"image": f"{i}.png", "turns": [asked], "answer": "a", "truth": "b", "category": "color",
             "right": i < right, "blind_right": i < blind} for i in range(10)]
    rows.append(rows[0] | {"turns": [], "category": "all", "right": None, "blind_right": None})
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_seeds_are_averaged_before_intervals_over_sets_and_differences_are_paired(tmp_path):
    for of_set, shares in (("s0", (9, 7)), ("s1", (6, 6)), ("s2", (10, 8))):
        for seed, right in enumerate(shares):
            write_run(tmp_path / of_set / f"mine-{seed}" / "evaluation", right, blind=2)
        write_run(tmp_path / of_set / "theirs" / "evaluation", right - 1)

    def interval(*shares):
        return f"{np.mean(shares):.1f} ± {4.303 * np.std(shares, ddof=1) / math.sqrt(3):.1f}"

    result = run("table.py", "--blind", "mine=s*/mine-*", "theirs=s*/theirs/evaluation", cwd=tmp_path)
    expected = {"mine": interval(80, 60, 90), "mine, blind": "20.0 ± 0.0", "theirs": interval(60, 50, 70),
                "mine − theirs": interval(20, 10, 20)}
    assert "| color | all |" in result.stdout, result.stderr
    for name, cell in expected.items():
        assert f"| {name} | {cell} | {cell} |" in result.stdout
    assert "mine: 6 runs of 3 sets (s0, s1, s2)" in result.stdout
    one = run("table.py", "mine=s1/mine-0/evaluation/answers.jsonl", cwd=tmp_path)
    assert "| mine | 60.0 | 60.0 |" in one.stdout


def test_what_can_not_be_compared_is_told_in_one_line(tmp_path):
    write_run(tmp_path / "s0" / "a", 3)
    write_run(tmp_path / "s1" / "a", 3)
    write_run(tmp_path / "s0" / "b", 3, asked="something else?")
    for rows in (["a=nowhere*"], ["a=s*/a", "b=s0/b"], ["a=s0*/a", "b=s*/a"], ["a=s*/a", "b=[s]*/b"], ["a=s0/a", "b=s0/b"]):
        result = run("table.py", *rows, cwd=tmp_path)
        assert fails_in_one_line(result), (rows, result.stderr)
    assert run("table.py", "a=s*/a", "a=s*/a", cwd=tmp_path).returncode == 2


# ---- Requests: swapped, and probed -------------------------------------------------------------------------

QUESTIONS = ["what color is it?", "how many things are there?", "is the background red?"]


def asked(model, n):
    """A Dataset of n questions, each about a random picture of its own."""
    records = [data.Record(f"{i}.png", (QUESTIONS[i % 3],), "red", f"kind {i % 2}") for i in range(n)]
    tokens = [(ids, [1]) for ids in model.question_ids([record.question for record in records])]
    features = np.random.default_rng(0).standard_normal((n, 24)).astype(np.float16)
    return data.Dataset(records, tokens, features, np.arange(n))


def test_requests_and_v_are_those_that_the_method_computes():
    model = tiny_model()
    dataset = asked(model, 300)
    request, v = probe.requests_and_v(model, dataset)
    assert request.shape == (300, 36) and v.shape == (300, 24)
    for i in (0, 1, 299):  # each alone, up to <img-d>, in one pass without a cache
        f = dataset.f([i])
        words = torch.tensor([dataset.tokens[i][0]])
        x = [model.embed(model.image_words)[None], model.see(f), model.embed(words), model.img_d[None, None]]
        h = model.llm.base_model(inputs_embeds=torch.cat(x, 1)).last_hidden_state[:, -1]
        torch.testing.assert_close(request[i:i + 1], model.request(h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(v[i:i + 1], model.interact(f, model.request(h)), rtol=1e-4, atol=1e-4)


def test_its_own_request_and_its_own_v_change_nothing_and_another_ones_do():
    model = tiny_model()
    dataset = asked(model, 6)
    own = model.generate(dataset.f(range(6)), [record.question for record in dataset.records], max_tokens=8)
    request, v = probe.requests_and_v(model, dataset)
    assert swap.answers_with(model, dataset, "ask", request[[1, 0, 3, 2, 5, 4]]).tolist() != own
    assert swap.answers_with(model, dataset, "ask", request).tolist() == own  # nothing stayed replaced
    assert swap.answers_with(model, dataset, "interact", v).tolist() == own


def test_a_swapped_request_brings_nothing_of_the_other_question_but_the_slot(monkeypatch):
    """All that the model reads before the slot is its own record's; the slot is what the other record's
    request asks of this record's picture."""
    model = tiny_model()
    dataset, read = asked(model, 6), []
    request, _ = probe.requests_and_v(model, dataset)
    f, tokens = dataset.batch(np.arange(6))
    with torch.no_grad():
        own_x, _, own_cache = model.read_prompt(f, tokens.question, tokens.question_mask)
    read_prompt, order = model.read_prompt, [1, 0, 3, 2, 5, 4]
    monkeypatch.setattr(model, "read_prompt", lambda *parts: read.append(read_prompt(*parts)) or read[-1])
    swap.answers_with(model, dataset, "ask", request[order])
    x, _, cache = read[0]
    length = own_cache.get_seq_length()
    for mine, theirs in zip(own_cache.layers, cache.layers):
        assert torch.equal(mine.keys[:, :, :length], theirs.keys[:, :, :length])
    assert torch.equal(x[:, 1:], own_x[:, 1:]) and not torch.allclose(x[:, 0], own_x[:, 0])
    slot = model.tell(model.interact(f, request[order]))
    assert torch.allclose(x[:, :1], slot, atol=1e-5)


def test_both_programs_print_their_tables_of_a_run_of_the_miniature(tmp_path, monkeypatch):
    """With untrained models, for ten of its held-out pictures."""
    mini, scenes = tmp_path / "mini", shapes.HELD_OUT[::60]
    settings = Settings("mini", save_llm(mini / "llm"), save_clip(mini / "clip"))
    LMEye.from_settings(settings).save(mini / "stage2" / CHECKPOINT, 2)
    monkeypatch.setattr(shapes, "HELD_OUT", scenes)
    miniature.write_data(mini, seed=0, pictures=1)
    result = run("swap.py", "mini/stage2", cwd=tmp_path)
    assert result.returncode == 0 and "| another picture's v |" in result.stdout, result.stderr

    def obey(model, dataset, method, vectors):
        """The answers of a model that always tells what belongs to the request or v that it is given."""
        own = dict(zip(("ask", "interact"), probe.requests_and_v(model, dataset)))[method]
        texts = []
        for vector in vectors:
            distance = (own - vector).abs().amax(1)
            texts.append(dataset.records[distance.argmin()].answer if distance.min() < 1e-3 else "nothing")
        return np.array(texts)

    monkeypatch.setattr(swap, "answers_with", obey)
    lines = run("swap.py", "mini/stage2", cwd=tmp_path).stdout.splitlines()[4:]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "100.0 | 0.0 | 0.0 |", "0.0 | 100.0 | 0.0 |", "0.0 | 100.0 | 0.0 |", "0.0 | 0.0 | 100.0 |",
        "0.0 | 100.0 | 0.0 |"]
    result = run("probe.py", "mini/stage2", "--log", "log.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| request")]
    request, untrained = [line.split(" | ", 1)[1] for line in lines]
    assert request != untrained
    logged = np.load(tmp_path / "log.npz")
    assert logged["request"].shape == (len(scenes) * 6, 36)
    assert logged["v"].shape == (len(scenes) * 6, 24)
    assert [logged[name][6] for name in shapes.Scene._fields] == list(scenes[1])
    LMEye.from_settings(replace(settings, variant="static")).save(mini / "stage2-static" / CHECKPOINT, 2)
    refused = run("swap.py", "mini/stage2-static", cwd=tmp_path)
    assert refused.returncode == 2 and "makes no requests" in refused.stderr


def test_the_other_record_is_of_the_same_group_and_has_another_truth_and_whose_was_told_is_counted():
    groups, truths = np.array([0, 0, 0, 1, 1, 1]), np.array(["red", "one", "red", "one", "red", "ring"])
    for seed in range(20):
        others = swap.draw_others(groups, truths, np.random.default_rng(seed))
        assert (groups[others] == groups).all() and (truths[others] != truths).all()
    of_other = np.array(["one", "red", "one", "red", "one", "red"])
    shares = swap.whose_truth(np.array(["red", "red", "one", "two", "red", "ring"]), truths, of_other)
    assert shares == pytest.approx({"its own": 50, "the other's": 100 / 3, "neither's": 100 / 6})


def test_a_probe_finds_what_is_there_and_nothing_where_labels_are_shuffled():
    torch.manual_seed(0)
    x, picture = torch.randn(2000, 20), torch.arange(2000)
    plain = (x[:, :4] @ torch.randn(4, 4)).argmax(1).numpy()  # a linear function of four numbers
    x = x + 5 * x.sum(1, keepdim=True)  # which all have much in common
    mixed, chance = np.random.default_rng(0).permutation(plain), 100 * np.bincount(plain).max() / len(plain)
    assert probe.linear(x, plain, picture) > 85 and probe.linear(x, mixed, picture) < chance + 5
    many, coin = torch.randn(600, 250), np.random.default_rng(1).integers(2, size=600)
    assert probe.linear(many, coin, torch.arange(600)) < 60  # it could learn these by heart
