"""Features, datasets and batches: what is left out is counted, what is kept belongs together."""

import math
import os
import signal
import subprocess
import sys
import time
import warnings
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


def encode(model, records, folder, features=None):
    """→ (Dataset, what was skipped, what was noted), of pictures in a folder."""
    skipped, noted = Counter(), Counter()
    features = features or folder / "features"
    return data.encode(model, records, skipped, Pictures(folder), features, noted), skipped, noted


def plain_dataset(lengths, pictures=100):
    """Records with the numbers 0, 1, … as answers, token ids of given (question, answer) lengths, random features."""
    records = [Record(f"{i % pictures}.jpg", ("?",), str(i)) for i in range(len(lengths))]
    tokens = [(np.zeros(q, np.int32), np.zeros(a, np.int32)) for q, a in lengths]
    features = np.random.default_rng(0).normal(size=(pictures, 24)).astype(np.float16)
    return data.Dataset(records, tokens, features, np.arange(len(lengths)) % pictures)


def test_features_belong_to_their_records_and_each_picture_is_encoded_once(tmp_path):
    model = tiny_model()
    for i, color in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / f"{i}.jpg", color)
    some, _, _ = encode(model, [Record(f"{i}.jpg", (), "a") for i in (0, 1, 2, 1)], tmp_path)
    assert some.picture.tolist() == [0, 1, 2, 1] and some.features.shape == (3, 24)
    for i, record in enumerate(some.records):
        alone = model.encode_image(model.preprocess(data.load_image(tmp_path / record.image))[None])
        assert torch.allclose(some.f([i]), alone, rtol=2e-3, atol=2e-3)  # features are kept in half precision


def test_pictures_that_cannot_be_read_are_left_out_and_counted_with_the_name_of_one(tmp_path):
    """Not replaced by others, not passed over in silence."""
    save_picture(tmp_path / "whole.jpg", size=(300, 300))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    names = ["whole.jpg", "cut.jpg", "text.jpg", "empty.jpg", "missing.jpg", "whole.jpg"]
    some, skipped, _ = encode(tiny_model(), [Record(name, ("what?",), "red", id=i) for i, name in enumerate(names)],
                              tmp_path)
    assert [r.id for r in some.records] == [0, 5] and some.picture.tolist() == [0, 0]
    assert sorted(skipped.values()) == [1, 1, 2] and sum("text.jpg" in reason for reason in skipped) == 1
    assert any("no such picture" in reason and "missing.jpg" in reason for reason in skipped)
    with pytest.raises(UserError, match="not one of 2 records can be used: .*text.jpg"):
        encode(tiny_model(), [Record("text.jpg", ("what?",), "red")] * 2, tmp_path)


def test_a_picture_that_comes_back_is_used_again_and_the_others_are_not_encoded_anew(tmp_path, monkeypatch):
    """A file on a network may have been away: its size and time of change are as before."""
    model, calls, real = tiny_model(), [], data.decode_image
    for color in ("red", "green", "blue"):
        save_picture(tmp_path / f"{color}.jpg", color)
    records = [Record(f"{color}.jpg", (), "red") for color in ("red", "green", "blue")]

    def away(file):
        if file.name.endswith("green.jpg"):
            raise UserError("away")
        return real(file)

    def counted(file):
        calls.append(file.name)
        return real(file)

    monkeypatch.setattr(data, "decode_image", away)
    first, skipped, _ = encode(model, records, tmp_path, tmp_path / "features")
    assert [r.image for r in first.records] == ["red.jpg", "blue.jpg"] and skipped == {"away, as green.jpg": 1}
    before = np.array(first.features)
    monkeypatch.setattr(data, "decode_image", counted)
    for times in (1, 1):  # the second time from the file
        whole, skipped, _ = encode(model, records, tmp_path, tmp_path / "features")
        assert len(whole.records) == 3 and np.isfinite(whole.features).all() and not skipped
        assert len(calls) == times and calls[0].endswith("green.jpg")
    assert np.array_equal(whole.features[[0, 2]], before[[0, 2]])
    alone = model.encode_image(model.preprocess(data.load_image(tmp_path / "green.jpg"))[None])
    torch.testing.assert_close(whole.f([1]), alone, rtol=2e-3, atol=2e-3)


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


def test_a_pass_that_was_killed_goes_on_after_its_last_batch_and_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    model, names = tiny_model(), [f"{i}.png" for i in range(150)]
    monkeypatch.setattr(data, "FEATURE_BATCH", 32)
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "40.png").write_bytes(b"broken")
    pictures, seen, real = Pictures(tmp_path), [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: (seen.append(pixels), real(pixels))[1])
    whole, unreadable = data.encode_images(model, pictures, names, tmp_path / "whole")
    assert list(unreadable) == [40] and np.isnan(whole[40]).all()
    assert np.isfinite(np.delete(np.array(whole), 40, 0)).all()

    program = KILLED.format(root=str(ROOT), batches=3, folder=str(tmp_path), out=str(tmp_path / "killed"))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    again, _ = data.encode_images(model, pictures, names, tmp_path / "killed")
    assert again.tobytes() == whole.tobytes()
    assert [len(pixels) for pixels in seen] == [32] * 7  # of the last 22 pictures, too
    assert all(map(torch.equal, seen[3:5], seen[5:]))  # the first three batches were kept, the others are the same


@pytest.mark.parametrize("lost", (slice(0, 5), slice(5, None)))
def test_a_row_of_which_only_a_part_was_written_is_encoded_again(tmp_path, lost):
    """Where the computer itself stopped, any part of the file may be missing."""
    model, names = tiny_model(), ["red.png", "green.png", "blue.png"]
    for name in names:
        save_picture(tmp_path / name, name.removesuffix(".png"))
    whole, _ = data.encode_images(model, Pictures(tmp_path), names, tmp_path / "features")
    file, = (tmp_path / "features").glob("*.f16")
    written = np.memmap(file, np.float16, "r+", shape=whole.shape)
    expected = np.array(whole)
    written[1, lost] = np.nan
    written.flush()
    again, unreadable = data.encode_images(model, Pictures(tmp_path), names, tmp_path / "features")
    assert again.tobytes() == expected.tobytes() and not unreadable


def test_whatever_stands_beside_a_picture_its_copies_have_equal_features(tmp_path):
    """Libraries compute few rows in another order than many, and round differently."""
    model, names = tiny_model(), [f"{i}.png" for i in range(40)]
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    found = set()
    for i in (0, 1, 24, 33, 37, 38, 39):
        features, _ = data.encode_images(model, Pictures(tmp_path), names[i:], tmp_path / "features")
        found.add(features[-1].tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("wrong", (float("nan"), float("inf"), 1e6))
def test_features_that_are_not_finite_are_left_out_and_told(wrong, tmp_path, monkeypatch):
    """As those of a CLIP in fp16 that overflows; 1e6 is beyond float16, in which features are kept."""
    model = tiny_model()
    for i, color in enumerate(("red", "blue", "green")):
        save_picture(tmp_path / f"{i}.png", color)
    broken, real = model.preprocess(data.load_image(tmp_path / "1.png")), model.encode_image

    def encode_image(pixels):
        f = real(pixels)
        for row, picture in zip(f, pixels):
            if torch.equal(picture, broken):
                row[5] = wrong  # one number alone
        return f

    monkeypatch.setattr(model, "encode_image", encode_image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some, skipped, _ = encode(model, [Record(f"{i}.png", (), "red") for i in range(3)], tmp_path)
    assert [record.image for record in some.records] == ["0.png", "2.png"]
    assert len(skipped) == 1 and "not finite" in next(iter(skipped))


def test_features_kept_in_a_file_are_those_of_this_clip_its_preprocessing_and_these_pictures(tmp_path):
    model, names, pictures = tiny_model(), [f"{i}.jpg" for i in range(3)], Pictures(tmp_path)
    for name, color in zip(names, ("red", "green", "blue")):
        save_picture(tmp_path / name, color)
    key = data.features_key(model, pictures, names)
    assert data.features_key(model, pictures, names) == key == data.features_key(tiny_model(), pictures, names)
    assert data.features_key(model, pictures, names[::-1]) != key
    for change in ("weight", "buffer", "preprocess", "activation"):
        other = tiny_model()
        visual = other.clip.visual
        if change == "weight":  # any of them
            visual.transformer.resblocks[-1].mlp.c_fc.bias.data += 1
        elif change == "buffer":
            visual.register_buffer("running_mean", torch.ones(3))
        elif change == "preprocess":
            other.preprocess.transforms[-1].mean = (0.5, 0.5, 0.5)
        else:
            visual.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
        assert data.features_key(other, pictures, names) != key, change
    for change in ("time", "size"):
        before, stat = data.features_key(model, pictures, names), os.stat(tmp_path / names[1])
        if change == "size":
            with open(tmp_path / names[1], "ab") as file:
                file.write(b" ")
        later = stat.st_mtime_ns + (10 ** 9 if change == "time" else 0)
        os.utime(tmp_path / names[1], ns=(stat.st_atime_ns, later))
        assert data.features_key(model, pictures, names) != before, change


def test_of_a_long_chat_the_newest_turns_that_fit_stand_in_the_prompt(tmp_path):
    """In a time that grows with the chat, not with its square; the shortened prompts are told."""
    model = tiny_model()
    save_picture(tmp_path / "a.jpg")
    texts = [f"what color is the red thing {'at the left ' * (i % 3)}" for i in range(800)]
    records = [Record("a.jpg", tuple(texts[:i + 1]), texts[i + 1]) for i in range(0, 800, 2)]
    start = time.perf_counter()
    some, skipped, noted = encode(model, records, tmp_path)
    assert time.perf_counter() - start < 15
    assert len(some.records) == 400 and not skipped
    reason, n = next(iter(noted.items()))
    shortened = sum(len(r.turns) < len(b.turns) for r, b in zip(some.records, records))
    assert "oldest turns" in reason and n == shortened > 390
    for before, record, (question, answer) in zip(records, some.records, some.tokens):
        assert record.answer == before.answer and before.turns[-len(record.turns):] == record.turns
        assert len(record.turns) % 2 == 1 and len(question) + len(answer) <= model.max_text_tokens
        if len(record.turns) < len(before.turns):  # one more question and answer would not have fitted
            more = before._replace(turns=before.turns[-len(record.turns) - 2:])
            ids = model.question_ids([more.question])[0] + model.answer_ids([more.answer])[0]
            assert len(ids) > model.max_text_tokens
    assert some.records[0] == records[0]


def test_too_long_records_are_left_out_and_counted(tmp_path):
    model = tiny_model()
    save_picture(tmp_path / "a.jpg")
    long, four = "red " * model.max_text_tokens, ("red", "blue", "green", "white")
    nearly = "red " * (model.max_text_tokens - 5)
    records = [Record("a.jpg", ("what color?",), "red", id=1), Record("a.jpg", (long,), "red", id=2),
               Record("a.jpg", ("what color?",), long, id=3),
               Record("a.jpg", ("what color?",), "red", id=4, choices=("red", "blue", long, "green")),
               Record("a.jpg", ("what?", long, "what color?"), "red", id=5),
               Record("a.jpg", ("what color?", nearly, "what?"), "red", id=6, choices=four)]  # not shortened
    some, skipped, noted = encode(model, records, tmp_path)
    assert [(r.id, r.turns[-1]) for r in some.records] == [(1, "what color?"), (5, "what color?")]
    assert skipped == {"longer than the language model's context": 4} and list(noted.values()) == [1]
    with pytest.raises(UserError, match="not one of 3 records can be used: longer"):
        encode(model, records[1:4], tmp_path)


def test_of_more_than_a_thousand_records_each_is_judged_by_itself(tmp_path):
    save_picture(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    records = [Record("broken.jpg" if i == 1500 else "a.jpg", ("what?",), "red", id=i) for i in range(2000)]
    records[1700] = records[1700]._replace(turns=("what?", "red") * 25 + ("what?",))
    some, skipped, noted = encode(tiny_model(), records, tmp_path)
    assert sum(skipped.values()) == 1 and {r.id for r in some.records} == set(range(2000)) - {1500}
    assert list(noted.values()) == [1] and len(some.records[1699].turns) < 51


def test_words_that_the_tokenizer_has_no_token_for_are_noted_but_trained(tmp_path):
    save_picture(tmp_path / "a.jpg")
    records = [Record("a.jpg", ("what?",), answer) for answer in ("red", "a pizza", "Red circle", "pizza")]
    model = tiny_model()
    some, skipped, noted = encode(model, records, tmp_path)
    assert len(some.records) == 3 and skipped == {"an answer or choice that the language model has no token for": 1}
    assert noted == {"answers with words that the language model has no token for": 1}
    _, _, noted = encode(model, [Record("a.jpg", ("what pizza?",), "red")], tmp_path)
    assert noted == {"questions with words that the language model has no token for": 1}
    model.tokenizer.unk_token = model.tokenizer.eos_token  # one token for both, as OPT has it
    assert not encode(model, records[:1], tmp_path)[2]


def test_letters_that_a_tokenizer_without_an_unknown_token_loses_are_noted_and_empty_answers_left_out(tmp_path):
    """A BPE of ASCII letters: "café" becomes "caf" and "猫" nothing, both without a word."""
    letters = [chr(i) for i in range(32, 127)] + ["Ċ"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    save_picture(tmp_path / "a.jpg")
    answers = ("cafe", "caf\u00e9", "a cat", "A , b", "a 猫")
    records = [Record("a.jpg", ("what?",), answer) for answer in answers]
    model = tiny_model()
    model.tokenizer = tokenizer
    some, skipped, noted = encode(model, records, tmp_path)
    assert len(some.records) == 5 and not skipped
    assert noted == {"answers of which the tokenizer loses or changes letters": 2}
    model.answer_ids = lambda texts: [[2] if text == "猫" else [5, 2] for text in texts]  # not even its space
    _, skipped, _ = encode(model, [*records, Record("a.jpg", ("what?",), "猫")], tmp_path)
    assert skipped == {"an answer or choice that the language model has no token for": 1}


def test_what_only_spaces_case_or_composition_make_different_is_not_noted(tmp_path):
    if not opt_tokenizer(tmp_path / "opt"):
        pytest.skip("OPT's tokenizer is not at hand")
    model = tiny_model()
    model.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "opt")
    save_picture(tmp_path / "a.jpg")
    for clean in (False, True):
        model.tokenizer.clean_up_tokenization_spaces = clean
        answers = ("it 's here , is n't it ?", "two  spaces\nand lines", "cafe\u0301", "猫", "ﬁne")
        _, skipped, noted = encode(model, [Record("a.jpg", ("what?",), answer) for answer in answers], tmp_path)
        assert not skipped and not noted
    assert data.letters("Cafe\u0301 !") == data.letters("caf\u00e9!") != data.letters("cafe!")
    assert data.letters("x²") != data.letters("x2")
    assert data.letters("किताब") != data.letters("कतब")  # without its vowels, as tokenizers without accents leave it


def test_a_text_that_the_tokenizer_takes_for_the_end_of_the_text_is_left_out(tmp_path):
    """Unigram tokenizers read "</s>" as eos also where special tokens are to be split."""
    save_picture(tmp_path / "a.jpg")
    model = tiny_model()
    real, eos = model.ids_of, model.tokenizer.eos_token_id
    model.ids_of = lambda texts: [ids + [eos] * ("</s>" in text) for text, ids in zip(texts, real(texts))]
    records = [Record("a.jpg", ("what?",), "red"), Record("a.jpg", ("what </s>",), "red"),
               Record("a.jpg", ("what?",), "red </s>"),
               Record("a.jpg", ("what?",), "red", choices=("red", "blue </s>"))]
    some, skipped, noted = encode(model, records, tmp_path)
    assert some.records == records[:1] and not noted
    assert skipped == {"a text in which the tokenizer reads the end of a text": 3}


def test_an_answer_that_is_not_known_is_kept_and_a_choice_without_a_token_is_not(tmp_path):
    save_picture(tmp_path / "a.jpg")
    records = [Record("a.jpg", ("what?",), "", choices=choices) for choices in ((), ("red", "blue"), ("red", ","))]
    some, skipped, _ = encode(tiny_model(), records, tmp_path)
    assert some.records == records[:2]
    assert skipped == {"an answer or choice that the language model has no token for": 1}


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
    assert tokens.question.tolist() == [[0, 0, 5, 6], [0, 1, 2, 3]] and tokens.answer.tolist() == [[7, 8, 9], [3, 4, 0]]
    assert tokens.question_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]] and tokens.answer_mask.tolist()[1] == [1, 1, 0]
    assert not f.requires_grad and f.device.type == tokens.answer.device.type == "cpu"
    captions = some._replace(records=[record._replace(turns=()) for record in some.records])
    assert captions.batch([0, 1])[1].question is None
    part = some.take(np.array([2, 0]))
    assert part.records == [some.records[2], some.records[0]] and part.picture.tolist() == [2, 0]
    assert part.tokens == [some.tokens[2], some.tokens[0]]


def test_a_fingerprint_tells_datasets_of_one_shape_apart(tmp_path):
    model = tiny_model()
    for i, color in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / f"{i}.jpg", color)

    def fingerprint(pictures=(0, 1, 2), answer="red", question="what color?"):
        return encode(model, [Record(f"{i}.jpg", (question,), answer) for i in pictures], tmp_path)[0].fingerprint()

    first = fingerprint()
    others = {fingerprint(answer="blue"), fingerprint(question="what size?"), fingerprint((0, 2, 1)),
              fingerprint((0, 1, 1)), fingerprint((0, 1, 0))}
    assert first == fingerprint() and len({first, *others}) == 6
    save_picture(tmp_path / "0.jpg", "yellow")
    assert fingerprint() != first


def test_a_tenth_of_the_pictures_is_held_out_and_never_trained_on():
    some = plain_dataset([(1, 1)] * 300)
    rest, test = data.hold_out(some)
    assert {r.image for r in rest.records}.isdisjoint(r.image for r in test.records)
    assert len(rest.records) == 270 and len(test.records) == 30 and len({r.image for r in test.records}) == 10
    for part in (rest, test):
        assert all(int(p) == int(r.image[:-4]) for r, p in zip(part.records, part.picture))
    assert data.hold_out(some)[1].records == test.records
    for pictures, held in ((9, None), (10, 2), (19, 2), (30, 3), (8000, 500)):
        test = data.hold_out(plain_dataset([(1, 1)] * pictures, pictures))[1]
        assert (test and len(test.records)) == held
    few = data.hold_out(plain_dataset([(1, 1)] * 10, 10))[1]
    assert (data.shuffled(few).picture != few.picture).all()  # one alone could not be shuffled


def test_copies_of_a_picture_stay_on_one_side_and_are_no_other_picture():
    """Under any names: four pictures, each there ten times, and twenty single ones."""
    some = plain_dataset([(1, 1)] * 60, 60)
    some.features[:40] = some.features[np.arange(40) % 4]
    rest, test = data.hold_out(some)
    kinds = [set(map(bytes, part.features[part.picture])) for part in (rest, test)]
    assert kinds[0].isdisjoint(kinds[1]) and len(kinds[0]) == 22 and len(kinds[1]) == 2
    assert len(rest.records) + len(test.records) == 60
    for part in (some, rest):
        other = data.shuffled(part)
        assert (other.f(range(len(part.records))) != part.f(range(len(part.records)))).any(1).all()
    alone = some.take(np.arange(0, 40, 4))  # all are copies of one
    assert torch.equal(data.shuffled(alone).f(range(10)), alone.f(range(10)))
    nine = some.take(np.array([*range(40), 41, 42, 43, 44, 45]))
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


@pytest.mark.parametrize("size, tokens", [(16, math.inf), (64, math.inf), (64, 4096), (1000, 4096)])
def test_an_epoch_has_every_record_once_in_batches_with_little_padding(size, tokens):
    some = plain_dataset(llava_like_lengths(60_000))
    plan = data.plan_epoch(some, size, tokens, 0, 0)
    assert sorted(np.concatenate(plan)) == list(range(len(some.records)))
    lengths = np.array([(len(q), len(a)) for q, a in some.tokens])
    padded = [len(rows) * lengths[rows].max(0).sum() for rows in plan]
    assert max(map(len, plan)) <= size and max(padded) <= tokens
    assert sum(padded) / lengths.sum() <= 1.1


def test_batches_of_an_epoch_do_not_come_in_order_of_length():
    some = plain_dataset([(i % 50, 3) for i in range(5000)])
    lengths = [max(len(some.tokens[i][0]) for i in rows) for rows in data.plan_epoch(some, 10, math.inf, 0, 0)]
    assert abs(np.mean(lengths[:250]) - np.mean(lengths[250:])) < 5


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    some = plain_dataset([(i % 7, 3) for i in range(100)])
    first, again, other = (data.batches(some, 10, 4096, seed) for seed in (0, 0, 1))
    first, again, other = ([next(plan).tolist() for _ in range(20)] for plan in (first, again, other))
    assert first == again != other and first[:10] != first[10:]
    assert sorted(sum(first[:10], [])) == sorted(sum(first[10:], [])) == list(range(100))


def test_a_file_of_features_that_was_cut_off_is_begun_anew(tmp_path):
    """Lengthened by zeros it would hold features of no picture."""
    model, names = tiny_model(), [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        save_picture(tmp_path / name, ("red", "green", "blue", "white")[i])
    pictures = data.Pictures(tmp_path)
    whole = np.array(data.encode_images(model, pictures, names, tmp_path / "features")[0])
    path, = (tmp_path / "features").glob("*.f16")
    path.write_bytes(path.read_bytes()[:100])
    again, unreadable = data.encode_images(model, pictures, names, tmp_path / "features")
    assert np.array_equal(again, whole) and not unreadable


def test_choices_that_the_tokenizer_makes_equal_are_left_out(tmp_path):
    save_picture(tmp_path / "a.jpg")
    records = [Record("a.jpg", ("what?",), "red pizza", choices=("red pizza", "red pasta")),
               Record("a.jpg", ("what?",), "red", choices=("red", "blue"))]
    some, skipped, _ = encode(tiny_model(), records, tmp_path)
    assert some.records == records[1:] and skipped == {"choices that the tokenizer does not tell apart": 1}
