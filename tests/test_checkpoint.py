"""An adapter file holds the trained tensors and no more, and is refused where it does not belong."""

import copy
import json

import open_clip
import pytest
import safetensors.torch
import tokenizers
import torch
from conftest import tiny_model
from safetensors import safe_open

import lmeye
from lmeye import LMEye, UserError


def same_but(model, **parts):
    """LMEye between the same frozen models, but for some parts."""
    names = ("llm", "tokenizer", "clip", "preprocess", "clip_tokenizer")
    known = {name: getattr(model, name) for name in names}
    return LMEye(model.settings, **(known | parts))


@pytest.mark.parametrize("stage, variant", [(1, "lmeye"), (2, "lmeye"), (2, "norequest"), (2, "static")])
def test_what_is_saved_is_loaded(tmp_path, stage, variant):
    model, other = tiny_model(variant=variant), tiny_model(variant=variant)
    for p in model.adapter(2).values():
        torch.nn.init.normal_(p)
    model.save(tmp_path / "a.safetensors", stage)
    assert other.load(tmp_path / "a.safetensors") == stage
    assert all(torch.equal(p, model.adapter(stage)[name]) for name, p in other.adapter(stage).items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.adapter(stage))


@pytest.mark.parametrize("saved, here, reason", [
    ({}, dict(seed=1), "the weights of .* are others"),  # of the same shapes
    ({}, dict(family="opt-350m"), "the weights of .* are others"),
    ({}, dict(n_features=4), "decompose"),
    ({}, dict(n_slots=2), "transmit"),
    ({}, dict(variant="norequest"), "request"),
    (dict(variant="norequest"), {}, "request.weight of shape None"),  # would keep its random numbers
])
def test_a_file_of_another_model_is_refused_in_one_line_and_nothing_is_loaded(tmp_path, saved, here, reason):
    tiny_model(**saved).save(tmp_path / "a.safetensors", 2)
    model = tiny_model(**here)
    before = {name: p.clone() for name, p in model.adapter(2).items()}
    with pytest.raises(UserError, match=f"a.safetensors: .*{reason}") as error:
        model.load(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.adapter(2).items())


def with_weights(model, change):
    """The same model, but each number of its frozen parts is another."""
    llm, clip = copy.deepcopy(model.llm), copy.deepcopy(model.clip)
    for p in (*llm.parameters(), *clip.parameters()):
        p.data = change(p.data)
    return same_but(model, llm=llm, clip=clip)


def test_rounded_weights_are_taken_for_the_same_and_those_of_a_finetuned_model_are_not(tmp_path):
    """What was trained in bf16 on a GPU answers in fp32 on a laptop."""
    model = tiny_model()
    model.save(tmp_path / "a.safetensors", 2)
    assert with_weights(model, lambda weight: weight.bfloat16().float()).load(tmp_path / "a.safetensors") == 2
    with pytest.raises(UserError, match="are others"):
        with_weights(model, lambda weight: weight * 1.02).load(tmp_path / "a.safetensors")


def test_a_folder_or_a_missing_file_is_told_as_such(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"^{path}: no such file: name an adapter.safetensors"):
            lmeye.read_adapter(path)


def test_a_dropout_that_was_given_as_a_whole_number_is_read(tmp_path):
    tiny_model(dropout=0).save(tmp_path / "a.safetensors", 2)
    assert tiny_model().load(tmp_path / "a.safetensors") == 2


def file(number=0.0, **changes):
    """A checkpoint of one number, with changes in its header."""
    header = {"stage": 2, "settings": {}, "identity": {"weights": [0.0] * 16}} | changes
    return safetensors.torch.save({"a": torch.tensor(number)}, {"lmeye": json.dumps(header)})


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", safetensors.torch.save({"a": torch.zeros(1)}), file(stage=3),
    file(settings={"n_features": "5"}), file(settings={"folder": "/"}), file(settings={"variant": "half"}),
    file(identity={"weights": ["x"]}), file(float("nan")), file(float("inf"))])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="be used as a checkpoint"):
        lmeye.read_adapter(tmp_path / "a")


def test_a_file_is_refused_where_a_part_is_another_or_the_same_weights_compute_something_else(tmp_path):
    """A setting is changed in a model's folder, or read otherwise by another version of a library."""
    model = tiny_model("llama")
    model.save(tmp_path / "a.safetensors", 2)
    assert same_but(model).load(tmp_path / "a.safetensors") == 2

    def refused(what, **parts):
        with pytest.raises(UserError, match=f"the {what} of .* are others"):
            same_but(model, **parts).load(tmp_path / "a.safetensors")

    other = tiny_model("llama", seed=1)
    refused("weights", llm=other.llm)
    refused("weights", clip=other.clip)
    llm = copy.deepcopy(model.llm)
    llm.model.rotary_emb.inv_freq *= 2
    refused("weights", llm=llm)
    llm = copy.deepcopy(model.llm)
    for layer in llm.model.layers:
        layer.input_layernorm.variance_epsilon = 10.0
    refused("states", llm=llm)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.eos_token = "<pad>"  # where an answer ends
    refused("tokens", tokenizer=tokenizer)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("red", "blue")
    refused("tokens", tokenizer=tokenizer)
    clip = copy.deepcopy(model.clip)
    for block in clip.visual.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    refused("activation functions", clip=clip)
    clip = copy.deepcopy(model.clip)
    for block in clip.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = 1, block.attn.embed_dim
    refused("text features", clip=clip)
    clip = copy.deepcopy(model.clip)
    for block in clip.visual.transformer.resblocks:
        block.ln_1.eps = 10.0
    refused("picture features", clip=clip)
    refused("pixels", preprocess=open_clip.image_transform(32, is_train=False, mean=(0.1, 0.1, 0.1)))
    refused("pixels", preprocess=open_clip.image_transform(32, is_train=False, resize_mode="squash"))


def test_a_file_with_another_list_of_numbers_is_of_an_earlier_version(tmp_path):
    model = tiny_model()
    model.identity = {"weights": model.identity["weights"]}
    model.save(tmp_path / "a.safetensors", 2)
    with pytest.raises(UserError, match="an earlier version of this program wrote it: train it again"):
        tiny_model().load(tmp_path / "a.safetensors")


def test_a_file_of_an_earlier_version_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "a").write_bytes(file(settings={"interaction": "full"}))
    with pytest.raises(UserError, match="an earlier version wrote it, with other names: train it again"):
        lmeye.read_adapter(tmp_path / "a")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    lmeye.write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lmeye.os, "fsync", full)
    with pytest.raises(UserError, match=f"{path}: can't be written .No space left"):
        lmeye.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
