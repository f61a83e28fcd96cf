"""Features, datasets and batches: what is left out is counted, what is kept belongs together."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, opt_tokenizer, tiny_model
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from benchmark import llava_like_lengths
from data import Pictures, Record
from lmeye import UserError


def save_picture(path, color="red", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


NAMES = ["red.png", "green.png", "blue.png"]


@pytest.fixture
def folder(tmp_path):
    """A folder with three pictures."""
    for name in NAMES:
        save_picture(tmp_path / name, name.removesuffix(".png"))
    return tmp_path


def asked(answer="red", question="what?", **more):
    return Record("red.png", (question,), answer, **more)


def encode(model, records, folder):
    """→ (Dataset, what was skipped, what was noted), of pictures in a folder."""
    skipped, noted = Counter(), Counter()
    return data.encode(model, records, skipped, Pictures(folder), folder / "features", noted), skipped, noted


def save_noise(folder, n):
    """n pictures that differ in each pixel → their names."""
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(n)]


def plain_dataset(lengths, pictures=100):
    """Records with the answers 0, 1, …, token ids of given (question, answer) lengths, random features."""
    records = [Record(f"{i % pictures}.jpg", ("?",), str(i)) for i in range(len(lengths))]
    tokens = [(np.zeros(q, np.int32), np.zeros(a, np.int32)) for q, a in lengths]
    features = np.random.default_rng(0).normal(size=(pictures, 24)).astype(np.float16)
    return data.Dataset(records, tokens, features, np.arange(len(lengths)) % pictures)


def test_features_belong_to_their_records_and_each_picture_is_encoded_once(folder):
    model = tiny_model()
    some, _, _ = encode(model, [Record(NAMES[i], (), "a") for i in (0, 1, 2, 1)], folder)
    assert some.picture.tolist() == [0, 1, 2, 1] and some.features.shape == (3, 24)
    for i, record in enumerate(some.records):
        alone = model.encode_image(model.preprocess(data.load_image(folder / record.image))[None])
        assert torch.allclose(some.f([i]), alone, rtol=2e-3, atol=2e-3)  # features are kept in half precision


def test_pictures_that_cannot_be_read_are_left_out_and_counted_with_the_name_of_one(folder):
    """Not replaced by others, not passed over in silence."""
    names = ["red.png", "text.jpg", "empty.jpg", "missing.jpg", "red.png"]
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "empty.jpg").write_bytes(b"")
    some, skipped, _ = encode(tiny_model(), [Record(name, ("what?",), "red") for name in names], folder)
    assert [record.image for record in some.records] == ["red.png"] * 2 and some.picture.tolist() == [0, 0]
    told = [(reason.split()[-1], n) for reason, n in skipped.items()]
    assert told == [("text.jpg)", 2), ("missing.jpg)", 1)]
    with pytest.raises(UserError, match="not one of 2 records can be used: .*text.jpg"):
        encode(tiny_model(), [Record("text.jpg", ("what?",), "red")] * 2, folder)


def test_a_picture_that_comes_back_is_used_again_and_the_others_are_not_encoded_anew(folder, monkeypatch):
    """A file on a network may have been away: its size and time of change are as before."""
    opened, away, real = [], ["green.png"], data.decode_image

    def decode_image(file):
        opened.append(os.path.basename(file.name))
        if opened[-1] in away:
            raise UserError("away")
        return real(file)

    monkeypatch.setattr(data, "decode_image", decode_image)
    given = tiny_model(), Pictures(folder), NAMES, folder / "features"
    assert data.encode_images(*given)[1] == {1: "away"}
    away.clear()
    opened.clear()
    for _ in range(2):  # the second time from the file
        features, unreadable = data.encode_images(*given)
        assert opened == ["green.png"] and not unreadable and np.isfinite(features).all()


KILLED = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import os, signal
from conftest import tiny_model
import data
data.FEATURE_BATCH = 32
model, batches = tiny_model(), [0]
real = model.encode_image
def encode_image(pixels):
    batches[0] += 1
    if batches[0] > {batches}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(pixels)
model.encode_image = encode_image
data.encode_images(model, data.Pictures({folder!r}), [f"{{i}}.png" for i in range(150)], {out!r})
"""


def test_a_pass_that_was_killed_goes_on_after_its_last_batch_and_ends_the_same(tmp_path, monkeypatch):
    model, names = tiny_model(), save_noise(tmp_path, 150)
    monkeypatch.setattr(data, "FEATURE_BATCH", 32)
    (tmp_path / "40.png").write_bytes(b"broken")
    pictures, seen, real = Pictures(tmp_path), [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: (seen.append(pixels), real(pixels))[1])
    whole, unreadable = data.encode_images(model, pictures, names, tmp_path / "whole")
    assert list(unreadable) == [40]
    assert np.flatnonzero(np.isnan(whole).any(1)).tolist() == [40]

    program = KILLED.format(root=str(ROOT), batches=3, folder=str(tmp_path), out=str(tmp_path / "killed"))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    again, _ = data.encode_images(model, pictures, names, tmp_path / "killed")
    assert again.tobytes() == whole.tobytes()
    assert [len(pixels) for pixels in seen] == [32] * 7  # of the last 22 pictures, too
    assert all(map(torch.equal, seen[3:5], seen[5:]))  # the first three batches were kept


NAN = b"\xff\xff"  # as a float16


@pytest.mark.parametrize("damage", (
    lambda rows: rows[:48] + NAN * 5 + rows[58:],  # the beginning of the second row; each has 24 numbers
    lambda rows: rows[:58] + NAN * 19 + rows[96:],  # its end
    lambda rows: rows[:100],  # lengthened by zeros it would hold features of no picture
))
def test_features_of_which_only_a_part_was_written_are_encoded_again(folder, damage):
    """Where the computer itself stopped, any part of the file may be missing."""
    given = tiny_model(), Pictures(folder), NAMES, folder / "features"
    expected = data.encode_images(*given)[0].tobytes()
    file, = (folder / "features").glob("*.f16")
    file.write_bytes(damage(expected))
    again, unreadable = data.encode_images(*given)
    assert again.tobytes() == expected and not unreadable


def test_whatever_stands_beside_a_picture_its_copies_have_equal_features(tmp_path):
    """Libraries compute few rows in another order than many, and round differently."""
    model, names, found = tiny_model(), save_noise(tmp_path, 40), set()
    for i in (0, 1, 24, 33, 37, 38, 39):
        features, _ = data.encode_images(model, Pictures(tmp_path), names[i:], tmp_path / "features")
        found.add(features[-1].tobytes())
    assert len(found) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", (float("nan"), float("inf"), 1e6))
def test_features_that_are_not_finite_are_left_out_and_told(folder, monkeypatch, wrong):
    """As those of a CLIP in fp16 that overflows; 1e6 is beyond float16, in which features are kept."""
    model = tiny_model()
    real = model.encode_image

    def encode_image(pixels):
        f = real(pixels)
        f[1, 5] = wrong  # one number alone
        return f

    monkeypatch.setattr(model, "encode_image", encode_image)
    some, skipped, _ = encode(model, [Record(name, (), "red") for name in NAMES], folder)
    assert [record.image for record in some.records] == ["red.png", "blue.png"]
    assert list(skipped.values()) == [1] and "not finite" in next(iter(skipped))


def test_features_kept_in_a_file_are_those_of_this_clip_and_its_preprocessing(folder):
    models = [tiny_model() for _ in range(6)]
    towers = [model.clip.visual for model in models]
    towers[2].transformer.resblocks[-1].mlp.c_fc.bias.data += 1  # any weight
    towers[3].register_buffer("running_mean", torch.ones(3))
    towers[4].transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
    models[5].preprocess.transforms[-1].mean = (0.5, 0.5, 0.5)
    keys = [data.features_key(model, Pictures(folder), NAMES) for model in models]
    assert keys[0] == keys[1] and len(set(keys)) == 5


def test_features_kept_in_a_file_are_those_of_these_pictures(folder):
    """By their names, sizes and times of change."""
    model, content, keys = tiny_model(), (folder / NAMES[0]).read_bytes(), []
    for names, more, seconds in ((NAMES, b"", 1), (NAMES[::-1], b"", 1),
                                 (NAMES, b" ", 1), (NAMES, b"", 2)):
        for name in NAMES:
            (folder / name).write_bytes(content + more)
            os.utime(folder / name, (seconds, seconds))
        keys.append(data.features_key(model, Pictures(folder), names))
    assert len(set(keys)) == 4


def test_of_a_long_chat_the_newest_turns_that_fit_stand_in_the_prompt(folder):
    """In a time that grows with the chat, not with its square; the shortened prompts are told."""
    model = tiny_model()
    texts = ["what color is " + "red " * (i * i % 7) for i in range(800)]
    records = [Record("red.png", tuple(texts[:i + 1]), texts[i + 1]) for i in range(0, 800, 2)]
    start = time.perf_counter()
    some, skipped, noted = encode(model, records, folder)
    assert time.perf_counter() - start < 15
    assert len(some.records) == 400 and some.records[0] == records[0] and not skipped
    n_shortened = 0
    for before, record, (question, answer) in zip(records, some.records, some.tokens):
        n = len(record.turns)
        assert record == before._replace(turns=before.turns[-n:]) and n % 2 == 1
        assert len(question) + len(answer) <= model.max_text_tokens
        if n < len(before.turns):  # one more question and answer would not have fitted
            longer = data.dialogue(before.turns[-n - 2:])
            assert len(model.question_ids([longer])[0]) + len(answer) > model.max_text_tokens
            n_shortened += 1
    assert list(noted.values()) == [n_shortened] and n_shortened > 390
    assert "prompts without the oldest turns of a long dialogue" in next(iter(noted))


def test_too_long_records_are_left_out_and_counted(folder):
    model = tiny_model()
    long, nearly = "red " * model.max_text_tokens, "red " * (model.max_text_tokens - 5)
    too_long = [asked(question=long), asked(long), asked(choices=("red", "blue", long)),
                asked()._replace(turns=("what?", nearly, "what?"), choices=("red", "blue"))]  # not shortened
    shortened = asked()._replace(turns=("what?", long, "what?"))
    some, skipped, noted = encode(model, [*too_long, shortened, asked()], folder)
    assert some.records == [asked(), asked()] and list(noted.values()) == [1]
    assert skipped == {"longer than the language model's context (as with red.png)": 4}


def test_of_more_than_a_thousand_records_each_is_judged_by_itself(folder):
    records = [asked(id=i) for i in range(2000)]
    records[1500] = records[1500]._replace(image="missing.png")
    records[1700] = records[1700]._replace(turns=("what?", "red") * 25 + ("what?",))
    some, skipped, noted = encode(tiny_model(), records, folder)
    assert [r.id for r in some.records] == [i for i in range(2000) if i != 1500]
    assert sum(skipped.values()) == sum(noted.values()) == 1 and len(some.records[1699].turns) < 51


def test_words_that_the_tokenizer_has_no_token_for_are_noted_but_trained(folder):
    model = tiny_model()
    some, skipped, noted = encode(model, [asked(), asked("a pizza"), asked("red", "what pizza?")], folder)
    assert len(some.records) == 3 and not skipped
    assert noted == {"answers with words that the language model has no token for (as with a pizza)": 1,
                     "questions with words that the language model has no token for (as with what pizza?)": 1}
    model.tokenizer.unk_token = model.tokenizer.eos_token  # one token for both, as OPT has it
    assert not encode(model, [asked()], folder)[2]


def test_letters_that_a_tokenizer_without_an_unknown_token_loses_are_noted(folder):
    """A BPE of ASCII letters: "café" becomes "caf", without a word."""
    letters = [chr(i) for i in range(32, 127)] + ["Ċ"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model = tiny_model()
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    records = [asked(text) for text in ("cafe", "café", "A , b", "a 猫")]
    some, skipped, noted = encode(model, records, folder)
    assert len(some.records) == 4 and not skipped
    assert noted == {"answers of which the tokenizer loses or changes letters (as with café)": 2}


@pytest.mark.parametrize("clean", (False, True))
def test_what_only_spaces_case_or_composition_make_different_is_not_noted(folder, clean):
    if not opt_tokenizer(folder / "opt"):
        pytest.skip("OPT's tokenizer is not at hand")
    model = tiny_model()
    model.tokenizer = AutoTokenizer.from_pretrained(folder / "opt", clean_up_tokenization_spaces=clean)
    answers = ("it 's here , is n't it ?", "two  spaces\nand lines", "cafe\u0301", "猫", "ﬁne")
    _, skipped, noted = encode(model, [asked(answer) for answer in answers], folder)
    assert not skipped and not noted


def test_of_two_texts_letters_and_digits_are_compared_without_case():
    assert data.letters("Cafe\u0301 !") == data.letters("caf\u00e9!") != data.letters("cafe!")
    assert data.letters("x²") != data.letters("x2")
    assert data.letters("किताब") != data.letters("कतब")  # without its vowels, as tokenizers without accents leave it


def test_a_text_that_the_tokenizer_takes_for_the_end_of_the_text_is_left_out(folder):
    """Unigram tokenizers read "</s>" as eos also where special tokens are to be split."""
    model = tiny_model()
    real, eos = model.ids_of, model.tokenizer.eos_token_id
    model.ids_of = lambda texts: [ids + [eos] * ("</s>" in text) for text, ids in zip(texts, real(texts))]
    odd = [asked(question="what </s>"), asked("red </s>"), asked(choices=("red", "blue </s>"))]
    some, skipped, _ = encode(model, [asked(), *odd], folder)
    assert some.records == [asked()]
    assert skipped == {"a text in which the tokenizer reads the end of a text (as with red.png)": 3}


def test_answers_and_choices_of_which_no_token_remains_or_that_become_equal_are_left_out(folder):
    good = [asked(choices=("red", "blue")), asked(""), asked("", choices=("red", "blue"))]  # "" is not known
    odd = [asked(","), asked("", choices=("red", ","))]
    equal = asked("red pizza", choices=("red pizza", "red pasta"))
    some, skipped, _ = encode(tiny_model(), [*good, *odd, equal], folder)
    assert some.records == good
    assert skipped == {"an answer or choice that the language model has no token for (as with red.png)": 2,
                       "choices that the tokenizer does not tell apart (as with red.png)": 1}


def test_reasons_are_reported_by_how_often_they_occur_and_notes_apart(capsys):
    data.report(Counter({"rare\x1b[2J": 1, "often": 1200}), Counter({"told": 3}))
    assert capsys.readouterr().out == "  skipped 1,200: often\n  skipped 1: rare[2J\n  noted 3: told\n"
    data.report(Counter(f"reason {i}" for i in range(12)))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 11 and out[-1] == "  skipped 2: other reasons"


def test_a_batch_holds_the_records_of_its_rows():
    tokens = [([5, 6], [7, 8, 9]), ([], [1]), ([0, 1, 2, 3], [3, 4])]
    some = plain_dataset([(2, 3), (0, 1), (4, 2)])._replace(tokens=tokens)
    f, tokens = some.batch([0, 2])
    assert torch.equal(f, torch.tensor(some.features[[0, 2]]).float())
    assert tokens.question.tolist() == [[0, 0, 5, 6], [0, 1, 2, 3]]
    assert tokens.question_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert tokens.answer.tolist() == [[7, 8, 9], [3, 4, 0]]
    assert tokens.answer_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_batch_of_captions_has_no_questions_and_a_part_keeps_what_belongs_together():
    some = plain_dataset([(2, 3), (0, 1), (4, 2)])
    captions = some._replace(records=[record._replace(turns=()) for record in some.records])
    assert captions.batch([0, 1])[1].question is None
    part = some.take(np.array([2, 0]))
    assert part.records == [some.records[2], some.records[0]]
    assert part.tokens == [some.tokens[2], some.tokens[0]]
    assert part.picture.tolist() == [2, 0]


def test_a_fingerprint_tells_datasets_of_one_shape_apart(folder):
    model, found = tiny_model(), []

    def note(order, **texts):
        records = [asked(**texts)._replace(image=NAMES[i]) for i in order]
        found.append(encode(model, records, folder)[0].fingerprint())

    note((0, 1, 2))
    note((0, 1, 2))
    note((0, 1, 2), answer="blue")
    note((0, 1, 2), question="what size?")
    note((0, 2, 1))
    note((0, 1, 1))
    note((0, 1, 0))
    save_picture(folder / NAMES[0], "yellow")
    note((0, 1, 2))
    assert found[0] == found[1] and len(set(found)) == 7


def test_a_tenth_of_the_pictures_is_held_out_and_never_trained_on():
    some = plain_dataset([(1, 1)] * 300)
    rest, test = data.hold_out(some)
    assert len(rest.records) == 270 and len(test.records) == 30
    assert len({r.image for r in test.records}) == 10
    assert {r.image for r in rest.records}.isdisjoint(r.image for r in test.records)
    for part in (rest, test):
        assert [f"{row}.jpg" for row in part.picture] == [r.image for r in part.records]
    assert data.hold_out(some)[1].records == test.records


def test_the_same_pictures_are_held_out_in_any_order_and_hardly_others_where_some_are_missing():
    """As in phase 2, whose file names the pictures otherwise than the folder of phase 1."""
    some = plain_dataset([(1, 1)] * 200, 200)
    held = {r.image for r in data.hold_out(some)[1].records}
    mixed = np.random.default_rng(1).permutation(200)
    assert {r.image for r in data.hold_out(some.take(mixed))[1].records} == held
    fewer = {r.image for r in data.hold_out(some.take(mixed[:150]))[1].records}
    assert len(fewer) == 15 and len(fewer - held) <= 1


@pytest.mark.parametrize("pictures, held", [(9, None), (10, 2), (19, 2), (30, 3), (8000, 500)])
def test_two_pictures_at_least_and_500_at_most_are_held_out(pictures, held):
    test = data.hold_out(plain_dataset([(1, 1)] * pictures, pictures))[1]
    assert (test and len(test.records)) == held  # one alone could not be shuffled


def test_copies_of_a_picture_stay_on_one_side_and_are_no_other_picture():
    """Twelve pictures, each there five times under other names."""
    some, kind = plain_dataset([(1, 1)] * 60, 60), np.arange(60) % 12
    some.features[:] = some.features[kind]
    rest, test = data.hold_out(some)
    assert len(rest.records) == 50 and len(test.records) == 10
    held_out, trained = [set(map(bytes, part.features[part.picture])) for part in (test, rest)]
    assert len(held_out) == 2 and held_out.isdisjoint(trained)
    for part in (some, rest):
        rows = range(len(part.records))
        assert (data.shuffled(part).f(rows) != part.f(rows)).any(1).all()
    nine = some.take(np.flatnonzero(kind < 9))
    assert data.hold_out(nine)[1] is None


def test_pictures_of_val_that_are_trained_on_are_counted():
    some = plain_dataset([(1, 1)] * 60, 60)
    some.features[50] = some.features[3]
    train, val = some.take(np.arange(40)), some.take(np.arange(38, 60))
    assert data.count_shared(train, val) == 3  # 38, 39 and the copy of 3
    assert data.count_shared(train, some.take(np.arange(40, 50))) == 0


def test_shuffled_records_have_some_other_picture_and_records_of_one_picture_the_same():
    some = plain_dataset([(1, 1)] * 300, pictures=60)
    other = data.shuffled(some)
    assert (other.picture != some.picture).all() and set(other.picture) == set(some.picture)
    assert len(set(zip(some.picture, other.picture))) == 60 and other.records == some.records
    assert np.array_equal(data.shuffled(some).picture, other.picture)


@pytest.mark.parametrize("size, tokens", [(16, 10 ** 9), (64, 4096), (1000, 4096)])
def test_an_epoch_has_every_record_once_in_batches_with_little_padding(size, tokens):
    some = plain_dataset(llava_like_lengths(60_000))
    plan = data.plan_epoch(some, size, tokens, 0, 0)
    assert sorted(np.concatenate(plan)) == list(range(len(some.records)))
    lengths = np.array([(len(question), len(answer)) for question, answer in some.tokens])
    padded = [len(rows) * lengths[rows].max(0).sum() for rows in plan]
    assert max(map(len, plan)) <= size and max(padded) <= tokens
    assert sum(padded) / lengths.sum() <= 1.1


def test_batches_are_filled_where_tokens_bound_them():
    some = plain_dataset([(40, 44)] * 480)
    assert {len(rows) for rows in data.plan_epoch(some, 64, 4096, 0, 0)} == {4096 // 84}


def test_batches_of_an_epoch_do_not_come_in_order_of_length():
    some = plain_dataset([(i % 50, 3) for i in range(5000)])
    plan = data.plan_epoch(some, 10, 10 ** 9, 0, 0)
    lengths = [max(len(some.tokens[i][0]) for i in rows) for rows in plan]
    assert abs(np.mean(lengths[:250]) - np.mean(lengths[250:])) < 5


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    some = plain_dataset([(i % 7, 3) for i in range(100)])
    plans = [data.batches(some, 10, 4096, seed) for seed in (0, 0, 1)]
    first, again, other = [[next(plan).tolist() for _ in range(20)] for plan in plans]
    assert first == again != other and first[:10] != first[10:]
    for epoch in (first[:10], first[10:]):
        assert sorted(sum(epoch, [])) == list(range(100))
