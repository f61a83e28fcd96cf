"""What the experiments rest on: their models, their probes, their intervals, and the world of boards."""

import copy
import inspect
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import board
import conftest
import evidence
import miniature
import rivals
import shapes
import numpy as np
import pytest
import torch
from conftest import fails_in_one_line, run, tiny_model

import data
import lmeye
from lmeye import LMEye, UserError

QUESTIONS, ANSWERS = ["what color is it?", "is the background red?"], ["red", "yes it is"]


def built(kind, base):
    """A model of a class of rivals.py's, from the parts of a tiny one."""
    torch.manual_seed(1)
    return kind(base.settings, base.llm, base.tokenizer, base.clip, base.preprocess, base.clip_tokenizer)


def asked(model, n, width=24):
    """n pictures, each asked one of the two questions."""
    features = np.random.default_rng(0).normal(size=(n, width)).astype(np.float16)
    records = [data.Record(f"{i}.jpg", (QUESTIONS[i % 2],), "red") for i in range(n)]
    tokens = list(zip(*model.token_ids([record.question for record in records], ["red"] * n)))
    return data.Dataset(records, tokens, features, np.arange(n))


# ---- Tables --------------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    assert evidence.mean_and_interval([0.5, 0.6, 0.7]) == "60.0 ± 24.8"  # 4.303 · 0.1 / √3
    assert evidence.mean_and_interval([0.5]) == "50.0"


def test_a_column_that_a_row_lacks_is_left_open():
    table = evidence.markdown({"a": [{"x": 1.0}], "b": [{"y": 0.5}]}).splitlines()
    assert table == ["| | x | y |", "|---|---|---|", "| a | 100.0 | – |", "| b | – | 50.0 |"]


def test_without_a_word_the_experiments_are_listed_with_their_minutes(tmp_path):
    result = run("evidence.py", cwd=tmp_path)
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    lines = result.stdout.splitlines()[1:]
    assert [line.split()[2] for line in lines] == list(evidence.EXPERIMENTS)
    assert all(int(line.split()[0]) > 0 and len(line) > 50 for line in lines)


def test_without_phase_1_an_experiment_says_which_command_is_missing(tmp_path):
    evidence.prepare.cache_clear()
    result = run("evidence.py", "ablation", cwd=tmp_path)
    assert fails_in_one_line(result) and "train.py --stage 1 --preset mini" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_the_published_model_its_experiment_says_which_command_makes_it(tmp_path, monkeypatch):
    evidence.prepare.cache_clear()
    monkeypatch.setattr(evidence, "is_complete", lambda folder: True)
    monkeypatch.setattr(evidence, "OUT", tmp_path / "mini")
    with pytest.raises(UserError, match=f"tests/lab/smollm2.py --out {tmp_path}$"):
        evidence.prepare("smollm2", None)


# ---- Probes --------------------------------------------------------------------------------------------------


def test_probes_find_what_is_there_and_nothing_where_labels_are_shuffled():
    torch.manual_seed(0)
    x, picture = torch.randn(2000, 20), torch.arange(2000)
    plain = (x[:, :4] @ torch.randn(4, 4)).argmax(1).numpy()  # a linear function of four of the twenty numbers
    mixed, chance = np.random.default_rng(0).permutation(plain), np.bincount(plain).max() / len(plain)
    assert evidence.linear(x, plain, picture) > 0.85 and evidence.linear(x, mixed, picture) < chance + 0.05
    many, coin = torch.randn(600, 250), np.random.default_rng(1).integers(2, size=600)
    assert evidence.linear(many, coin, torch.arange(600)) < 0.6  # of its own pictures it could learn these by heart
    assert evidence.nearest(x, (x[:, 0] > 0).numpy(), picture) > 0.6
    assert evidence.nearest(x[:1000].repeat_interleave(2, 0), np.arange(2000) // 2, picture) == 1


def test_requests_and_v_are_those_that_the_method_computes():
    model = tiny_model()
    dataset = asked(model, 300)
    request, v = evidence.requests_and_v(model, dataset)
    assert request.shape == (300, 36) and v.shape == (300, 24)
    for i in (0, 1, 299):  # each alone, up to <img-d>, in one pass without a cache
        f = dataset.f([i])
        words = torch.tensor([dataset.tokens[i][0]])
        x = [model.embed(model.image_words)[None], model.see(f), model.embed(words), model.img_d[None, None]]
        h = model.llm.base_model(inputs_embeds=torch.cat(x, 1)).last_hidden_state[:, -1]
        torch.testing.assert_close(request[i:i + 1], model.request(h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(v[i:i + 1], model.interact(f, model.request(h)), rtol=1e-4, atol=1e-4)


# ---- Models --------------------------------------------------------------------------------------------------


def test_one_picture_token_of_several_is_static_itself():
    base = tiny_model(variant="static")
    one = built(rivals.picture_tokens(1), base)
    one.load_state_dict(base.state_dict())
    f = torch.randn(2, 24)
    assert one.loss(f, QUESTIONS, ANSWERS).item() == base.loss(f, QUESTIONS, ANSWERS).item()


def test_two_picture_tokens_stand_side_by_side_and_both_are_read():
    base = tiny_model(variant="static")
    two, f = built(rivals.picture_tokens(2), base), torch.randn(2, 24)
    assert two.see(f).shape == (2, 2, 64) and two.max_text_tokens == base.max_text_tokens - 1
    D, before = 64, two.loss(f, QUESTIONS, ANSWERS).item()
    for half in (slice(0, D), slice(D, 2 * D)):
        other = copy.deepcopy(two)
        with torch.no_grad():
            other.align.weight[half] += torch.randn(D, 24)
        assert other.loss(f, QUESTIONS, ANSWERS).item() != before
    trained = two.set_trained(2)
    assert set(trained) == {"align.weight", "align.bias", "img"}


@pytest.mark.parametrize("name", evidence.VARIANTS)
def test_each_model_of_the_lab_trains_what_it_uses_and_says_the_same_with_and_without_gradients(name, monkeypatch):
    monkeypatch.setitem(conftest.CLIP_CONFIG, "embed_dim", 36)  # as wide as CLIP's text transformer
    variant = evidence.VARIANTS[name]
    monkeypatch.setattr(rivals, "channels", lambda model: 14 if name == "full, a word of each patch" else 7)
    base = tiny_model(interaction=variant.interaction, n_features=min(variant.n_features, 8), n_slots=variant.n_slots)
    base.tokenizer.chat_template = "{% for message in messages %}red {{ message.content }} blue {% endfor %}"
    model, f = built(variant.kind, base).train(), torch.randn(2, 36)
    if variant.tell in (rivals.tell_question, rivals.tell_answer, evidence.tell_question_and_scene):
        tell = rivals.tell_answer if variant.tell == rivals.tell_answer else rivals.tell_question
        f = tell(model, asked(model, 2, width=36)).f([0, 1])
    elif variant.tell == rivals.tell_patches:
        f = torch.randn(2, 36 + 16 * 7)
    assert not model.llm.training
    parameters = model.set_trained(2)
    loss = model.loss(f, QUESTIONS, ANSWERS)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    with torch.no_grad():
        assert model.loss(f, QUESTIONS, ANSWERS).item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(model.eval().generate(f, QUESTIONS, max_tokens=3)) == 2
    assert model.loss(f, None, ANSWERS).isfinite()  # captions, of phase 1


def test_the_second_round_asks_from_what_came_back():
    """Against two rounds in whole passes, without a cache, for one record."""
    base = tiny_model()
    model, f = built(rivals.TwoRounds, base), torch.randn(1, 24)
    words = torch.tensor([model.ids("\nQuestion: " + QUESTIONS[0])])
    before = torch.cat([model.embed(model.image_words)[None], model.see(f), model.embed(words)], 1)
    slot = model.img_d[None, None]
    for _ in range(2):
        h = model.llm.base_model(inputs_embeds=torch.cat([before, slot], 1)).last_hidden_state[:, -1]
        slot = model.tell(model.interact(f, model.ask(h)))
    x = torch.cat([before, slot, model.embed(model.answer_words)[None]], 1)
    expected = model.llm(inputs_embeds=x).logits[0, -1].log_softmax(-1)
    token = model.ids(" red")[0]
    assert model.score(f, QUESTIONS[:1], [["red"]]).item() == pytest.approx(expected[token].item(), abs=1e-4)
    once = built(LMEye, base)
    assert once.score(f, QUESTIONS[:1], [["red"]]).item() != pytest.approx(expected[token].item(), abs=1e-4)


def test_the_earlier_request_is_read_after_the_first_layer():
    model, f = built(rivals.EarlierRequest, tiny_model()), torch.randn(1, 24)
    asked = []
    model.request.register_forward_pre_hook(lambda layer, inputs: asked.append(inputs[0]))
    with torch.no_grad():
        model.generate(f, QUESTIONS[:1], max_tokens=2)
        words = torch.tensor([model.ids("\nQuestion: " + QUESTIONS[0])])
        x = [model.embed(model.image_words)[None], model.see(f), model.embed(words), model.img_d[None, None]]
        states = model.llm(inputs_embeds=torch.cat(x, 1), output_hidden_states=True).hidden_states
    torch.testing.assert_close(asked[0], states[1][:, -1], rtol=1e-4, atol=1e-4)


# ---- Data ----------------------------------------------------------------------------------------------------


def test_a_folder_is_there_when_it_is_complete_and_is_made_once(tmp_path):
    def broken(part):
        (part / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        evidence.make_folder(tmp_path / "a", broken)
    assert not (tmp_path / "a").exists()
    evidence.make_folder(tmp_path / "a", lambda part: (part / "whole").write_text("whole"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]
    evidence.make_folder(tmp_path / "a", broken)  # is there: nothing is called
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_is_complete_only_when_its_state_is_gone(tmp_path):
    assert not evidence.is_complete(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    assert evidence.is_complete(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"")  # its adapter is that of the last validation
    assert not evidence.is_complete(tmp_path)


def test_a_kept_model_of_another_recipe_is_refused_and_one_of_this_is_taken(tmp_path):
    model, recipe = tiny_model(), evidence.RECIPES["mini"][2]
    made = {"steps": recipe["steps"], "batch size": recipe["batch_size"], "learning rate": recipe["lr"], "seed": 1}
    model.save(tmp_path / "adapter.safetensors", 2)
    kept = model.img_d.detach().clone()
    for what, other in (("steps", 7), ("batch size", 7), ("learning rate", 0.7), ("seed", 7)):
        (tmp_path / "run.json").write_text(json.dumps(made | {what: other}))
        with pytest.raises(UserError, match=f"was trained with {what} {other}, and is to have {made[what]}"):
            evidence.train_phase(2, model, "mini", "full", tmp_path, 1)
    (tmp_path / "run.json").write_text(json.dumps(made))
    model.img_d.data += 1
    evidence.train_phase(2, model, "mini", "full", tmp_path, 1)
    assert torch.equal(model.img_d, kept)


@pytest.mark.parametrize("name, trains_align", (("full", False), ("full, align trained", True)))
def test_phase_2_trains_align_where_it_says_so(name, trains_align, tmp_path, monkeypatch):
    model, seen = tiny_model(), {}
    monkeypatch.setattr(evidence, "datasets", lambda *args: (asked(model, 8), asked(model, 8)))
    monkeypatch.setattr(evidence, "RECIPES", {"mini": {1: dict(steps=2, batch_size=4, lr=0.01), 2: dict(steps=2, batch_size=4, lr=0.01)}})
    for stage in (1, 2):
        before = model.align.weight.detach().clone()
        evidence.train_phase(stage, model, "mini", name, tmp_path / str(stage), 0)
        seen[stage] = not torch.equal(model.align.weight, before)
    assert seen == {1: True, 2: trains_align}


def test_a_caption_of_the_miniature_gives_its_scene_back():
    assert all(evidence.scene_of(shapes.describe(scene)) == scene for scene in shapes.SCENES)


def test_captions_in_phrases_say_what_whole_ones_say():
    world, rng, in_two = evidence.world_in_phrases(), random.Random(0), 0
    for _ in range(2000):
        scene, n = rng.choice(shapes.SCENES), rng.randint(1, 6)
        named = rng.sample(shapes.Scene._fields, n)
        caption = world.describe(scene, named)
        if caption != shapes.describe(scene, named):
            in_two += 1
            parts = [(named[:-k], named[-k:]) for k in (1, 2)]
            assert caption in [f"{shapes.describe(scene, a)} {shapes.describe(scene, b)}" for a, b in parts] and n > 2
    assert 0.35 < in_two / (2000 * 4 / 6) < 0.45


def test_the_language_models_of_scaling_are_trained_as_long_as_the_miniatures_own():
    assert evidence.LLM_STEPS == inspect.signature(miniature.make).parameters["llm_steps"].default


@pytest.mark.parametrize("how", ("random", "popular", "adversarial", "the trap"))
def test_what_is_absent_is_chosen_as_it_says(how, monkeypatch):
    scenes = random.Random(0).choices(shapes.TRAINING, k=300)

    def of(color, shape):
        return [s for s in shapes.TRAINING if (s.color, s.shape) == (color, shape)]

    scenes += of("green", "ring") * 20 + of("red", "circle") * 30
    captions = [SimpleNamespace(answer=shapes.describe(scene)) for scene in scenes]
    monkeypatch.setattr(evidence, "datasets", lambda world, stage, pictures: (SimpleNamespace(records=captions), None))
    records, pairs = evidence.absent_records(how), []
    per_scene = 2 if how == "the trap" else 4
    assert len(records) == per_scene * len(shapes.HELD_OUT)
    for i, scene in enumerate(shapes.HELD_OUT):
        for record in records[per_scene * i:per_scene * (i + 1)]:
            assert record.image.name == f"val/{i:06d}.png"
            value = record.question.rstrip("?").split()[-1]
            is_there = value in (scene.color, scene.noun)
            assert is_there == (record.answer == "yes"), (record.question, scene)
            if not is_there:
                pairs.append((scene, value))
    if how == "the trap":
        assert all(value == scene.background for scene, value in pairs)
    if how == "popular":
        assert all(v == "red" for s, v in pairs if s.color != "red" and v in shapes.COLORS)
        assert all(v.startswith("circle") for s, v in pairs if s.shape != "circle" and v not in shapes.COLORS)
    if how == "adversarial":  # red and circles are more frequent, but green comes with rings
        assert all(v == "green" for s, v in pairs if s.shape == "ring" and s.color != "green" and v in shapes.COLORS)
        assert all(v.startswith("ring") for s, v in pairs if s.color == "green" and s.shape != "ring" and v not in shapes.COLORS)
    if how == "random":
        assert len({value for _, value in pairs if value in shapes.COLORS}) == len(shapes.COLORS)


# ---- Boards --------------------------------------------------------------------------------------------------


def test_boards_that_are_held_out_never_occur_in_training():
    assert not set(board.TRAINING) & set(board.HELD_OUT)
    assert {board.number_of_objects(s) for s in board.HELD_OUT} == set(board.NUMBERS)


@pytest.mark.parametrize("number", board.NUMBERS)
def test_a_board_shows_its_scene_and_answers_about_it(number):
    rng = random.Random(number)
    scene = board.random_scene(rng, number)
    picture = board.draw(scene, rng)
    for i, cell in enumerate(board.CELLS):
        color = getattr(scene, f"{cell}_color")
        x, y = 21 * (i % 3) + 5, 21 * (i // 3) + 5
        spot = picture.crop((x, y, x + 11, y + 11))
        seen = {name for name, value in shapes.COLORS.items() if value in [c for _, c in spot.getcolors()]}
        assert seen - {"black"} == ({color} if color else set())
    caption = board.describe(scene).split()
    for name in board.attributes(scene):
        question, answer = board.ask(scene, name, rng)
        place = caption.index(board.word_for(name.rpartition("_")[0]))
        assert question.split()[4] == caption[place] and answer in caption[place + 1:place + 3]
    for _ in range(50):
        question, answer = board.ask(scene, "yes/no", rng)
        place, value = caption.index(question.split()[2]), question.rstrip("?").split()[-1]
        assert (value in caption[place + 1:place + 3]) == (answer == "yes")
    assert set(board.build_tokenizer(False)(board.describe(scene)).input_ids).isdisjoint({1})  # no word is unknown


def test_a_caption_of_a_board_names_what_it_is_told_to():
    scene = board.random_scene(random.Random(0), 9)
    scene = scene._replace(left_color="red", left_shape="ring", top_right_shape="cross")
    assert board.describe(scene, ["left_color"]) == "left red thing"
    assert board.describe(scene, ["top_right_shape", "left_color", "left_shape"]) == "top-right cross left red ring"


def test_the_boards_files_are_read_as_any_others(tmp_path):
    board.write_data(tmp_path, pictures=20)
    archive = tmp_path / "pictures.zip"
    for prefix, pictures, per_picture in (("", 20, 6), ("val_", len(board.HELD_OUT), 3)):
        captions, skips = data.read_records([tmp_path / f"{prefix}captions.json"], [archive], 1)
        questions, more_skips = data.read_records([tmp_path / f"{prefix}questions.json"], [archive], 2)
        assert len(captions) == pictures and len(questions) == pictures * per_picture and not skips + more_skips
        described = {record.image: record.answer.split() for record in captions}
        assert data.load_image(captions[0].image).size == (board.SIDE, board.SIDE)
        for record in questions:
            number, _, kind = record.category.partition(" ")
            words = described[record.image]
            assert len(words) == 3 * int(number)
            if kind != "yes/no":
                cell = words.index(record.question.split()[4])
                assert record.answer == words[cell + (1 if kind == "color" else 2)]
    held_out = [record.answer for record in captions]
    assert held_out == [board.describe(scene) for scene in board.HELD_OUT]
    assert json.loads((tmp_path / "val_questions.json").read_text())[0]["category"] == "1 color"


def test_the_boards_are_a_world_that_the_miniatures_models_can_be_trained_on(tmp_path, capsys):
    miniature.train_clip(tmp_path / "clip", 0, board.WORLD, steps=1, batch_size=4, width=4)
    miniature.train_llm(tmp_path / "llm", 0, board.WORLD, steps=1, batch_size=4, width=64, layers=1)
    longest = max(len(board.describe(scene).split()) for scene in board.HELD_OUT)
    assert longest + 2 <= board.WORLD.caption_tokens
    assert (tmp_path / "clip" / "open_clip_config.json").is_file() and (tmp_path / "llm" / "config.json").is_file()


def test_each_set_of_frozen_models_has_the_seed_of_its_miniature(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(evidence, "OUT", tmp_path)
    monkeypatch.setattr(miniature, "train_clip", lambda part, seed, *args, **kwargs: made.update(clip=seed))
    monkeypatch.setattr(miniature, "train_llm", lambda part, seed, *args, **kwargs: made.update(llm=seed))
    monkeypatch.setattr(board, "write_data", lambda part, n, seed: made.update(data=seed))
    monkeypatch.setattr(miniature, "write_data", lambda part, seed, n: made.update(more=seed))
    monkeypatch.setattr(evidence, "is_complete", lambda folder: True)
    monkeypatch.setattr(evidence, "datasets", lambda *args: None)
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "run.json").write_text('{"seed": 3}')
    evidence.prepare.cache_clear()
    evidence.prepare("board", None)
    evidence.data_folder("board")
    evidence.data_folder("mini", 20)
    assert made == {"clip": 3, "llm": 3, "data": 3, "more": 3}


@pytest.mark.parametrize("world, layers", evidence.BOARDS.items())
def test_worlds_of_boards_differ_in_the_depth_of_clips_text_transformer_alone(world, layers, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "OUT", tmp_path)
    monkeypatch.setattr(evidence, "is_complete", lambda folder: True)
    monkeypatch.setattr(evidence, "datasets", lambda *args: None)
    monkeypatch.setattr(evidence, "seed_of_set", lambda: 0)
    monkeypatch.setattr(evidence, "make_board_llm", lambda folder: None)
    monkeypatch.setattr(miniature.train_clip, "__defaults__", (miniature.WORLD, 550, 4, 4, 2))  # batches of four

    def train_clip(folder, seed, world, real=miniature.train_clip, **kwargs):
        real(folder, seed, world, **(kwargs | {"steps": 1}))

    monkeypatch.setattr(miniature, "train_clip", train_clip)
    evidence.prepare.cache_clear()
    evidence.prepare(world, None)
    llm, clip = evidence.frozen_models(world)
    assert llm == tmp_path / "evidence" / "board" / "llm" and clip == tmp_path / "evidence" / world / "clip"
    assert json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["layers"] == layers
    assert evidence.data_folder(world) == tmp_path / "evidence" / "board" / "data"
    assert evidence.RECIPES[world] == evidence.RECIPES["board"]


def test_a_budget_counts_the_tokens_that_stand_for_a_picture():
    base = tiny_model()
    for name, tokens in evidence.BUDGET.items():
        variant = evidence.VARIANTS[name]
        model = built(variant.kind, tiny_model(interaction=variant.interaction, n_slots=variant.n_slots))
        slots = 0 if variant.interaction == "static" else model.settings.n_slots
        assert model.see(torch.randn(1, base.align.in_features)).shape[1] + slots == tokens


def test_times_to_the_first_token_are_multiples_of_the_first_ones(monkeypatch):
    class Slow(LMEye):
        def see(self, f):
            time.sleep(0.2)
            return super().see(f)

    base = tiny_model()
    dataset = asked(base, 6)
    monkeypatch.setattr(evidence, "held_out", lambda world: dataset)
    monkeypatch.setattr(evidence, "new_model", lambda world, name, seed: built(Slow if name == "full" else LMEye, base))
    times = evidence.first_token_times("mini", ("static", "norequest", "full"), batch_size=4, rounds=3)
    assert times["static"] == 1 and times["full"] > 1.5 * times["norequest"]


# ---- Oracles ---------------------------------------------------------------------------------------------------


def test_a_told_question_is_all_that_the_request_is_made_of(monkeypatch):
    model, shown = built(rivals.RequestTold, tiny_model()), []
    told = rivals.tell_question(model, asked(model, 4))  # questions in turn
    assert told.features.shape == (4, 24 + 64) and np.array_equal(told.picture, range(4))
    assert np.array_equal(told.features[0, 24:], told.features[2, 24:])
    assert not np.array_equal(told.features[0, 24:], told.features[1, 24:])

    def see(self, f, real=LMEye.see):
        shown.append(f)
        return real(self, f)

    monkeypatch.setattr(LMEye, "see", see)
    model.read_prompt(told.f([0, 1]), *model.tokenize(QUESTIONS, ["", ""])[:2])
    assert torch.equal(shown[0], asked(model, 4).f([0, 1]))  # the feature is as it was
    code = torch.from_numpy(told.features[:2, 24:]).float()
    assert torch.equal(model.ask(torch.randn(2, 64)), model.request(code))


def test_a_told_answer_is_all_that_stands_in_the_slot():
    model = built(rivals.AnswerTold, tiny_model(variant="norequest"))
    told = rivals.tell_answer(model, asked(model, 2))
    model.read_prompt(told.f([0, 1]), *model.tokenize(QUESTIONS, ["", ""])[:2])
    code = torch.from_numpy(told.features[:, 24:]).float()
    assert torch.equal(code[0], code[1])  # both are answered "red"
    assert torch.equal(model.interact(torch.randn(2, 24), torch.randn(2, 36)), code)
    assert set(model.set_trained(2)) == {"transmit.weight", "transmit.bias", "img_d"}


def test_a_told_scene_is_all_of_the_scene(monkeypatch):
    """Each cell's color and shape can be read from the code; without a code, the cell is empty."""
    scenes = board.HELD_OUT[::40]
    captions = [data.Record(f"{i}.png", (), board.describe(scene)) for i, scene in enumerate(scenes)]
    dataset = data.Dataset(captions, [], None, np.arange(len(scenes)))
    monkeypatch.setattr(evidence, "datasets", lambda world, stage, pictures: (dataset, dataset))
    told = evidence.tell_scene(SimpleNamespace(align=torch.nn.Linear(96, 1)), dataset)
    assert set(told.features.flatten()) == {0, 8} and not told.features[:, 90:].any()
    for scene, code in zip(scenes, told.features):
        for i, cell in enumerate(board.CELLS):
            values = np.array(board.COLORS + board.SHAPES)[code[10 * i:10 * i + 10] > 0]
            assert list(values) == [v for v in (getattr(scene, f"{cell}_color"), getattr(scene, f"{cell}_shape")) if v]


def test_a_thawed_text_transformer_is_trained_saved_and_loaded(tmp_path):
    thawed, other = built(rivals.TextTransformerThawed, tiny_model()), built(rivals.TextTransformerThawed, tiny_model())
    names = set(thawed.set_trained(2))
    assert "clip.transformer.resblocks.0.mlp.c_fc.weight" in names and "clip.text_projection" in names
    assert not any(name.startswith(("llm.", "clip.visual")) for name in names)
    with torch.no_grad():
        thawed.clip.text_projection += 1
    thawed.save(tmp_path / "a", 2)
    other.load(tmp_path / "a")
    assert torch.equal(other.clip.text_projection, thawed.clip.text_projection)
    assert not any(name.startswith("clip.") for name in thawed.set_trained(1))  # phase 1 is as ever


# ---- Other connectors ------------------------------------------------------------------------------------------


def test_a_request_without_a_bias_is_made_of_the_state_alone():
    model, base = built(rivals.RequestWithoutBias, tiny_model()), tiny_model()
    h = torch.randn(1, base.request.in_features)
    assert base.ask(0 * h).abs().max() > 0
    assert torch.equal(model.ask(0 * h), torch.zeros(1, base.request.out_features))
    torch.testing.assert_close(model.ask(3 * h), 3 * model.ask(h))


def test_patches_stand_behind_the_feature_place_by_place(tmp_path):
    """Those of a picture whose upper left corner is painted over differ there, and are told by their own picture."""
    miniature.train_clip(tmp_path, 0, board.WORLD, steps=1, batch_size=4, width=4)
    clip, preprocess, _ = lmeye.load_clip(f"local-dir:{tmp_path}", torch.device("cpu"), torch.float32)
    model = tiny_model()
    model.clip, model.clip_text, model.preprocess = clip, clip, preprocess
    picture = board.draw(board.HELD_OUT[-1], random.Random(0))
    picture.save(tmp_path / "0.png")
    picture.paste("white", (0, 0, 12, 12))
    picture.save(tmp_path / "1.png")
    records = [data.Record(str(tmp_path / name), ("q",), "a") for name in ("1.png", "0.png", "1.png")]
    features = np.zeros((5, 32), np.float16)
    told = rivals.tell_patches(model, data.Dataset(records, [], features, np.array([4, 2, 4])))
    E = rivals.channels(model)
    assert told.features.shape == (2, 32 + 16 * E) and list(told.picture) == [1, 0, 1] and E == 64
    changed = np.abs(told.features[0, 32:] - told.features[1, 32:]).reshape(16, E).mean(1).reshape(4, 4)
    assert changed[0, 0] == changed.max() > 10 * changed[3, 3]


def test_patch_tokens_are_means_of_neighbors(monkeypatch):
    monkeypatch.setattr(rivals, "channels", lambda model: 7)
    two, all_16 = (built(rivals.patch_tokens(n), tiny_model(variant="static")) for n in (2, 16))
    all_16.load_state_dict(two.state_dict())
    patches = torch.randn(1, 16, 7)
    for model in (two, all_16):
        model.read_prompt(torch.cat([torch.randn(1, 24), patches.flatten(1)], 1), *model.tokenize(["q"], [""])[:2])
    upper, lower = patches[:, :8].mean(1), patches[:, 8:].mean(1)
    torch.testing.assert_close(two.see(None), torch.stack([upper, lower], 1) @ two.align.weight.T + two.align.bias + two.img)
    torch.testing.assert_close(all_16.see(None), two.align(patches) + two.img)


@pytest.mark.parametrize("reads", (False, True))
def test_a_q_former_sees_the_question_only_if_it_is_to(reads, monkeypatch):
    monkeypatch.setattr(rivals, "channels", lambda model: 7)
    model = built(rivals.q_former(reads), tiny_model(variant="static"))
    f, seen = torch.randn(1, 24 + 16 * 7), []
    for question in ("what color is it?", "where is it?"):
        model.read_prompt(f, *model.tokenize([question], [""])[:2])
        seen.append(model.see(f))
    assert torch.allclose(*seen) != reads
    padded, alone = model.tokenize(["what color is it?", "is the background red?"], ["", ""]), seen[0]
    model.read_prompt(f.expand(2, -1), *padded[:2])
    torch.testing.assert_close(model.see(f)[:1], alone)  # padding is not read


def test_the_trap_of_boards_names_what_another_thing_of_the_board_has(monkeypatch):
    monkeypatch.setattr(evidence, "data_folder", lambda world: Path("data"))
    records = evidence.trap_of_boards("board")
    assert 1000 < len(records) == 2 * len({(r.image, " a " in r.question) for r in records})
    for right, lure in zip(records[::2], records[1::2]):
        scene = board.HELD_OUT[int(right.image.name[4:10])]
        assert int(right.image.name[4:10]) % 4 > 0 and right.image == lure.image
        cell, value = right.question.removeprefix("is the ").rstrip("?").replace("thing a ", "thing ").split(" thing ")
        other = lure.question.rstrip("?").split()[-1]
        what = "color" if value in board.COLORS else "shape"
        own = getattr(scene, f"{cell.replace('-', '_')}_{what}")
        assert (right.answer, lure.answer, value) == ("yes", "no", own) and other != own
        assert other in scene and lure.question == right.question.replace(value, other)


# ---- Swapped requests ------------------------------------------------------------------------------------------


def test_its_own_request_and_its_own_v_change_nothing():
    model = tiny_model()
    dataset = asked(model, 6)
    own = model.generate(dataset.f(np.arange(6)), [record.question for record in dataset.records], max_tokens=8)
    request, v = evidence.requests_and_v(model, dataset)
    assert evidence.answers_given(model, dataset, request=request) == own
    assert evidence.answers_given(model, dataset, v=v) == own
    assert model.generate(dataset.f([0]), QUESTIONS[:1], max_tokens=8) == own[:1]  # and nothing stays replaced


def test_a_swapped_request_brings_nothing_of_the_other_question_but_the_slot(monkeypatch):
    """All that the model reads before the slot is its own record's; the slot is what the other record's request asks
    of this record's picture."""
    model = tiny_model()
    dataset, read = asked(model, 6), []
    request, _ = evidence.requests_and_v(model, dataset)
    order, prefill = np.array([1, 0, 3, 2, 5, 4]), model.read_prompt
    own_x, _, own_cache = read_prompt(*model.to_device(dataset.f(np.arange(6)), *dataset.batch(np.arange(6))[1][:2]))
    monkeypatch.setattr(model, "prefill", lambda *parts: read.append(read_prompt(*parts)) or read[-1])
    own = evidence.answers_given(model, dataset, request=request)
    other = evidence.answers_given(model, dataset, request=request[order])
    assert own != other
    x, mask, cache = read[1]
    length = own_cache.get_seq_length()
    for mine, theirs in zip(own_cache.layers, cache.layers):  # before anything is generated both hold the same
        assert torch.equal(mine.keys[:, :, :length], theirs.keys[:, :, :length])
    assert torch.equal(x[:, 1:], own_x[:, 1:]) and not torch.allclose(x[:, 0], own_x[:, 0])
    slot = model.tell(model.interact(dataset.f(np.arange(6)), request[order]))
    assert torch.allclose(x[:, :1], slot, atol=1e-5)


def test_whose_truth_an_answer_tells():
    records = [data.Record("a", ("q",), answer) for answer in ("red", "blue", "one", "ring")]
    dataset = data.Dataset(records, [], None, np.arange(4))
    shares = evidence.whose_truth(dataset, ["red", "red", "two", "blue"], np.array([1, 0, 0, 1]), np.full(4, True))
    assert shares == {"its own": 0.25, "the other's": 0.5, "neither's": 0.25}
    shares = evidence.whose_truth(dataset, ["red", "red", "two", "blue"], np.array([1, 0, 0, 1]), np.arange(4) == 0)
    assert shares == {"its own": 1.0, "the other's": 0.0, "neither's": 0.0}


@pytest.mark.parametrize("name, sees", [("full", True), ("norequest", False), ("static", False),
                                        ("static, 2 tokens", False), ("a slot without a request", False)])
def test_only_full_shows_the_question_to_its_layers(name, sees):
    """What stands for the picture, in <img> and in the slot, with one question and with another."""
    variant = evidence.VARIANTS[name]
    model = built(variant.kind, tiny_model(interaction=variant.interaction))
    f, seen = torch.randn(1, 24), []
    for question in ("what color is it?", "where is it?"):  # of the same length
        x, _, _ = model.read_prompt(f, *model.tokenize([question], [""])[:2])
        seen.append(x[:, :-len(model.answer_words)] if variant.interaction != "static" else model.see(f))
    assert torch.allclose(*seen) != sees


def test_what_is_tuned_with_is_not_in_the_tables(monkeypatch):
    dataset = asked(tiny_model(), 40)
    monkeypatch.setattr(evidence, "datasets", lambda world, stage, pictures: (None, dataset))
    tuning, table = evidence.held_out("mini", True), evidence.held_out("mini")
    assert len(tuning.records) == 10 and len(table.records) == 30
    assert set(tuning.picture).isdisjoint(table.picture)
