"""What the experiments rest on: their readers, their intervals, and the world of boards."""

import random

import board
import evidence
import numpy as np
import pytest
import torch


def test_the_interval_is_students():
    assert evidence.mean_and_interval([0.5, 0.6, 0.7]) == "60.0 ± 24.8"  # 4.303 · 0.1 / √3
    assert evidence.mean_and_interval([0.5]) == "50.0"


def test_a_column_that_a_row_lacks_is_left_open():
    assert evidence.markdown({"a": [{"x": 1.0}], "b": [{"y": 0.5}]}).splitlines()[2:] == ["| a | 100.0 | – |", "| b | – | 50.0 |"]


def test_readers_find_what_is_there_and_nothing_where_labels_are_shuffled():
    torch.manual_seed(0)
    x, picture = torch.randn(2000, 20), torch.arange(2000)
    plain = (x[:, :4] @ torch.randn(4, 4)).argmax(1).numpy()  # a linear function of four of the twenty numbers
    mixed, chance = np.random.default_rng(0).permutation(plain), np.bincount(plain).max() / len(plain)
    assert evidence.linear(x, plain, picture) > 0.85 and evidence.linear(x, mixed, picture) < chance + 0.05
    assert evidence.nearest(x, (x[:, 0] > 0).numpy(), picture) > 0.6
    assert evidence.nearest(x[:1000].repeat_interleave(2, 0), np.arange(2000) // 2, picture) == 1


def test_boards_that_are_held_out_never_occur_in_training():
    assert not set(board.TRAINING) & set(board.HELD_OUT)
    assert {len(board.attributes(s)) // 2 for s in board.HELD_OUT} == set(board.NUMBERS)


@pytest.mark.parametrize("number", board.NUMBERS)
def test_a_board_shows_its_scene_and_answers_about_it(number):
    rng = random.Random(number)
    scene = board.some_scene(rng, number)
    picture = board.draw(scene, rng)
    for i, cell in enumerate(board.CELLS):
        color = getattr(scene, f"{cell}_color")
        x, y = 21 * (i % 3) + 5, 21 * (i // 3) + 5
        spot = picture.crop((x, y, x + 11, y + 11))
        seen = {c for _, c in spot.getcolors()} - {board.data.COLORS["black"]}
        assert seen == ({board.data.COLORS[color]} if color else set())
    caption = board.describe(scene).split()
    for name in board.attributes(scene):
        question, answer = board.ask(scene, name, rng)
        place = caption.index(board.place(name.rpartition("_")[0]))
        assert question.split()[4] == caption[place] and answer in caption[place + 1:place + 3]
    for _ in range(50):
        question, answer = board.ask(scene, "yes/no", rng)
        place, value = caption.index(question.split()[2]), question.rstrip("?").split()[-1]
        assert (value in caption[place + 1:place + 3]) == (answer == "yes")
    assert set(board.build_tokenizer(False)(board.describe(scene)).input_ids).isdisjoint({1})  # no word is unknown
