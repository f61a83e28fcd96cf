"""Pictures and words go through CLIP as open_clip's own functions send them."""

import random

import open_clip
import pytest
import safetensors.torch
import torch
from conftest import tiny_model

import lmeye
import shapes


def test_text_path_fed_with_token_embeddings_equals_encode_text():
    model = tiny_model()
    tokenizer = shapes.build_tokenizer(ends=True)
    for text in ("red", "two small red circles at the left on a blue background"):
        ids = tokenizer([text], return_tensors="pt").input_ids  # [start … end], not padded
        whole = tokenizer([text], padding="max_length", max_length=16, return_tensors="pt").input_ids
        expected = model.clip.encode_text(whole)
        assert torch.allclose(model.encode_words(model.clip.token_embedding(ids)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ("ViT-B-32", "ViT-B-32-quickgelu"))
def test_text_path_equals_encode_text_in_a_published_architecture(name):
    torch.manual_seed(0)
    clip = open_clip.create_model(name).eval()
    ids = open_clip.get_tokenizer(name)(["two small red circles on a blue background"])
    model = tiny_model()
    model.clip_text = clip
    words = clip.token_embedding(ids[:, :ids.argmax() + 1])
    assert torch.allclose(model.encode_words(words), clip.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_image_path_equals_encode_image():
    model = tiny_model()
    pixels = model.preprocess(shapes.draw(shapes.SCENES[0], random.Random(0)))[None]
    assert torch.equal(model.encode_image(pixels), model.clip.encode_image(pixels))
    assert model.encode_image(pixels).norm() != pytest.approx(1, abs=0.01)  # projected, but not normalised


def test_sos_and_eos_are_those_of_clips_tokenizer():
    tokenizer = shapes.build_tokenizer(ends=True)
    assert tiny_model().sos_eos.tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_openai_weights_are_given_quick_gelu(tmp_path, monkeypatch):
    """OpenAI's tag means QuickGELU, under which the same weights give other features."""
    torch.manual_seed(0)
    reference = open_clip.create_model("ViT-B-32-quickgelu").eval()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(reference.state_dict(), file)
    seen = {}

    def create(model, pretrained=None, **options):
        seen.update(options, model=model, pretrained=pretrained)
        return real(model, pretrained=str(file), **options)

    real = open_clip.create_model_from_pretrained
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        clip, _, _ = lmeye.load_clip("ViT-B-32:openai", torch.device("cpu"), torch.float32)
        assert seen["pretrained"] == "openai"
        assert torch.allclose(clip.encode_image(pixels), reference.encode_image(pixels), atol=1e-4)
        plain, _, _ = lmeye.load_clip("ViT-B-32:laion2b_s34b_b79k", torch.device("cpu"), torch.float32)
        assert not torch.allclose(plain.encode_image(pixels), reference.encode_image(pixels), atol=1e-2)
