"""Which language models and CLIPs the method works with: each family, tiny and at random, beside two whole passes.

`find_fault` and `check_clip` of lmeye.py look at a model once, when it is loaded. A family that they let through must
give the numbers of the reference in test_two_passes.py, which knows no cache, no mask and no padding; a family whose
numbers would be others has to be refused, in one line.
"""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import CLIP_CONFIG, save_clip, save_llm, tiny_model, with_random_weights
from test_two_passes import QUESTIONS, assert_equals_two_whole_passes

import shapes
import lmeye
from lmeye import LMEye, Settings, UserError

ALL = pytest.mark.skipif("LMEYE_ALL" not in os.environ, reason="all kinds and large sizes, 5 minutes: set LMEYE_ALL=1")

# ---- Language models -----------------------------------------------------------------------------------------

SMALL = {  # what configurations call their sizes → small ones
    64: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_key_value_heads", "num_experts_per_tok"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts"),
    16: ("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim"),
    8: ("qk_rope_head_dim", "qk_nope_head_dim"),
    1: ("n_group", "topk_group"),
    96: ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "ffn_hidden_size",
         "moe_intermediate_size", "dff"),
    128: ("max_position_embeddings", "n_positions", "max_seq_len"),
}
WINDOW = dict(sliding_window=4)  # shorter than any prompt, and than what is looked at when a model is loaded
LONGER = dict(sliding_window=12)  # longer than what is looked at then
LOCAL = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
ROPE = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
HEADS = dict(num_key_value_heads=4, head_dim=8)
EMBEDDED = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=57, num_kv_shared_layers=0)
# name → what is set beside the sizes; the name's first word is the family, as transformers names it
RIGHT = dict.fromkeys((
    "opt", "bloom", "llama", "gpt2", "gpt_neox", "gpt_bigcode", "falcon", "mpt", "mistral", "qwen2", "qwen3",
    "qwen3_moe", "phi", "gemma", "stablelm", "olmo", "olmo2", "glm", "xglm",
    "granite",  # as long as nothing scales its logits
), {}) | {
    "llama, rope scaled": dict(rope_parameters=ROPE),
    "gptj": dict(rotary_dim=8),
    "codegen": dict(rotary_dim=8),
    "falcon, new": dict(new_decoder_architecture=True, num_kv_heads=2),
    "falcon, alibi": dict(alibi=True, parallel_attn=False),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4),
    "mistral, window": WINDOW,
    "mistral, longer window": LONGER,
    "mixtral, window": WINDOW,
    "qwen3, window": dict(WINDOW, use_sliding_window=True, max_window_layers=1, layer_types=None),
    "phi3, window": WINDOW,
    "gemma3_text, window": LOCAL,
    "gpt_oss, window": LOCAL,
    "gpt_oss, longer window": LOCAL | LONGER,
    "deepseek_v3": dict(HEADS, first_k_dense_replace=1),
    "olmo3, window": LOCAL,
    "smollm3": dict(no_rope_layers=[0, 1]),
}

HEAD, NUMBERS = "its head alone", "padding, its cache or later words change"  # what is said of them
FAILS = "can't be run on vectors with a cache"
WRONG = dict.fromkeys(("rwkv", "bart"), ({}, NUMBERS)) | dict.fromkeys((
    "gemma2", "cohere", "cohere2", "nanochat", "bert", "roberta", "modernbert-decoder", "ctrl",
), ({}, HEAD)) | dict.fromkeys((
    "openai-gpt", "llama4_text", "recurrent_gemma", "mamba", "bamba", "jamba", "nemotron_h", "qwen3_5_text",
    "qwen3_next", "minimax",
), ({}, FAILS)) | {
    "granite": (dict(logits_scaling=8.0), HEAD),
    "gemma3n_text": (dict(EMBEDDED, **LOCAL, laurel_rank=8, intermediate_size=[96, 96],
                          activation_sparsity_pattern=[0.0, 0.0]), HEAD),
    "bert, plain": (dict(is_decoder=False), HEAD),
    "doge": (dict(keep_window_size=4), NUMBERS),
    "gemma4_text": (EMBEDDED | LOCAL, FAILS),  # looks its words up in the embeddings
    "falcon_h1": (dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128), FAILS),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), FAILS),
}


def small_config(name, more):
    """A configuration of a family (the first word of `name`), in small, for the miniature's tokenizer."""
    kind = name.split(",")[0]
    usual = transformers.CONFIG_MAPPING[kind]()
    tokenizer = shapes.build_tokenizer(ends=False)
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=tokenizer.bos_token_id,
                 eos_token_id=tokenizer.eos_token_id)
    for size, names in SMALL.items():
        for named in names:
            if isinstance(vars(usual).get(named), int):
                sizes[named] = size
    if hasattr(usual, "is_decoder"):
        sizes["is_decoder"] = True
    layers = vars(usual).get("layer_types")
    if layers:
        sizes["layer_types"] = [layers[0], layers[-1]]
    return transformers.AutoConfig.for_model(kind, **{**sizes, **more})


def random_llm(name, seed=0, std=0.2, **more):
    """A small random causal LM of a family, with `more` in its configuration."""
    torch.manual_seed(seed)
    return with_random_weights(small_config(name, more), std)


def model_with(llm, **settings):
    base = tiny_model()
    return LMEye(Settings(llm="a/b", dropout=0.0, **settings), llm, base.tokenizer, base.clip, base.preprocess,
                 base.clip_tokenizer)


PADDED = [QUESTIONS[0], " ".join(QUESTIONS), QUESTIONS[2]]  # on all sides, and longer than windows


@pytest.mark.parametrize("name", RIGHT)
def test_a_family_that_can_be_used_gives_the_numbers_of_two_whole_passes(name):
    model = model_with(random_llm(name, **RIGHT[name]))
    lmeye.check_llm(model)
    assert_equals_two_whole_passes(model, PADDED)


@ALL
def test_whatever_transformers_knows_is_refused_or_gives_the_numbers_of_two_whole_passes():
    """Some kinds refuse these sizes, with an error of their own, some stay large."""
    kinds, outcomes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {}
    for kind in kinds:
        outcomes[kind] = "can't be made small"
        with contextlib.suppress(Exception):
            usual = transformers.CONFIG_MAPPING[kind]().get_text_config()
            config = small_config(usual.model_type, {})
            with torch.device("meta"):
                shell = transformers.AutoModelForCausalLM.from_config(config)
            if sum(p.numel() for p in shell.parameters()) < 50e6:
                outcomes[kind] = with_random_weights(config, std=0.15)
        if isinstance(outcomes[kind], str):
            continue
        try:
            model = model_with(outcomes[kind])
            lmeye.check_llm(model)
        except UserError as error:
            outcomes[kind] = f"refused: {error}"
            continue
        assert_equals_two_whole_passes(model, PADDED)
        outcomes[kind] = "right"
    for kind, outcome in outcomes.items():
        print(f"{kind}: {outcome}")
    assert sum(outcome == "right" for outcome in outcomes.values()) >= 60


# Beyond its original length a model with longrope rotates all keys otherwise, those of the cache as well.
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
TURNS_AT_40 = dict(rope_parameters=LONGROPE | {"original_max_position_embeddings": 40})


@pytest.mark.parametrize("name, more, context", [
    ("llama, rope scaled", RIGHT["llama, rope scaled"], 128), ("mpt", dict(max_seq_len=64), 64),
    ("phi3", dict(max_position_embeddings=64), 64),  # whose class has an original length of 4,096
    ("phi3", dict(original_max_position_embeddings=40, rope_parameters=LONGROPE), 40),
    ("llama", TURNS_AT_40, 40), ("mistral", TURNS_AT_40, 40), ("qwen3", TURNS_AT_40, 40)])
def test_the_context_is_the_shortest_length_that_the_configuration_names_anywhere(name, more, context):
    model = model_with(random_llm(name, **more))
    assert model.context == context
    lmeye.check_llm(model)


@pytest.mark.filterwarnings("error::FutureWarning")  # of an argument's old name, which a user would see above that line
@pytest.mark.parametrize("name", WRONG)
def test_a_family_that_cannot_be_used_is_refused_in_one_line(name):
    more, reason = WRONG[name]
    model = model_with(random_llm(name, **more))
    with pytest.raises(UserError, match=reason) as error:
        lmeye.check_llm(model)
    assert str(error.value).startswith("--llm a/b: this kind of language model can't be used: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_text_part_of_a_multimodal_model_is_used_with_its_own_context():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    text = small_config("gemma3_text", LOCAL).to_dict()
    llm = with_random_weights(transformers.AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4))
    model = model_with(llm)
    assert type(llm).__name__ == "Gemma3ForConditionalGeneration" and model.context == 128
    lmeye.check_llm(model)
    assert_equals_two_whole_passes(model, PADDED)


@pytest.mark.parametrize("name", ("llama", "opt"))
def test_rounding_is_not_taken_for_a_fault(name):
    """A GPU rounds differently for each shape of a batch: here each part of a model does so at random, by bf16's unit."""
    def round_at_random(module, inputs, output):
        return output * (1 + 2 ** -9 * torch.randn_like(output))

    for seed in range(2):
        llm = random_llm(name, seed, std=0.1, num_hidden_layers=24)
        for module in llm.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(round_at_random)
        lmeye.check_llm(model_with(llm.to(torch.bfloat16)))


@pytest.mark.parametrize("name", ("gemma2", "granite", "bert", "bert, plain", "doge"))
def test_a_fault_is_not_taken_for_rounding(name):
    more, reason = WRONG[name]
    model = model_with(random_llm(name, **more).to(torch.bfloat16))
    with pytest.raises(UserError, match=reason):
        lmeye.check_llm(model)


def wrong_at_its_end(run_llm, x, mask, cache):
    """Wrong are the states of the answer's last two tokens only, and those of one record."""
    h, after = run_llm(x, mask, cache)
    if cache is not None and x.shape[1] > 1:  # not <img-d> alone
        h = h.clone()
        h[1, -2:] += 1
    return h, after


def wrong_request(run_llm, x, mask, cache):
    h, after = run_llm(x, mask, cache)
    at_img_d = cache is not None and x.shape[1] == 1
    return (h.roll(1, -1) if at_img_d else h), after


def without_gradients(run_llm, x, mask, cache):
    """Every number is right, and with --train-align the request would not teach `align` anything."""
    h, after = run_llm(x, mask, cache)
    for layer in after.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return h, after


@pytest.mark.parametrize("wrong, told", [
    (wrong_at_its_end, NUMBERS), (wrong_request, NUMBERS), (without_gradients, FAILS)])
def test_a_model_that_goes_on_wrongly_from_a_cache_is_refused(monkeypatch, wrong, told):
    model = tiny_model()
    model.transmit.weight.data.mul_(1e-6)  # however little the answer depends on the request
    real = model.run_llm
    monkeypatch.setattr(model, "run_llm", lambda x, mask, cache=None: wrong(real, x, mask, cache))
    with pytest.raises(UserError, match=told):
        lmeye.check_llm(model)


@pytest.mark.parametrize("dtype, weight, told", [
    (torch.float16, 30_000, "fp16 ends at 65,504, so use --precision fp32"),
    (torch.float32, float("nan"), "its states are not finite$")])
def test_numbers_that_are_not_finite_are_named_as_such(dtype, weight, told):
    llm = random_llm("llama")
    llm.model.layers[0].mlp.down_proj.weight.data.fill_(weight)
    with pytest.raises(UserError, match=told):
        lmeye.check_llm(model_with(llm.to(dtype)))


def test_a_gpu_without_memory_is_not_taken_for_a_kind_of_model(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    model = tiny_model()
    monkeypatch.setattr(model, "run_llm", full)
    with pytest.raises(torch.OutOfMemoryError):
        lmeye.check_llm(model)


# ---- CLIPs ---------------------------------------------------------------------------------------------------

FOUR = ("ViT-B-32", "PE-Core-T-16-384", "ViTamin-S", "convnext_tiny")  # OpenAI's architecture, and timm's
OTHERS = ("ViT-S-32-alt", "vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224", "PE-Core-S-16-384",
          "PE-Core-B-16", "convnext_small", "convnext_base", "convnext_base_w", "convnext_base_w_320", "ViTamin-B",
          "ViTamin-S-LTT", "ViTamin-B-LTT", "swin_base_patch4_window7_224", "EVA02-B-16", "EVA02-L-14", "MobileCLIP-B",
          "MobileCLIP2-B", "convnext_large", "RN50")
NOT_CAUSAL = ("MobileCLIP-S1", "MobileCLIP2-S0")


def model_with_clip(clip, tokenizer):
    base = tiny_model()
    return LMEye(Settings(clip="some:clip"), base.llm, base.tokenizer, clip, base.preprocess, tokenizer)


@pytest.mark.parametrize("name", [*FOUR, *(pytest.param(name, marks=ALL) for name in OTHERS)])
def test_architectures_of_open_clip_can_be_used(name):
    torch.manual_seed(0)
    clip = open_clip.create_model(name).eval()
    model = model_with_clip(clip, open_clip.get_tokenizer(name))
    lmeye.check_clip(model)
    side = clip.visual.image_size[0] if isinstance(clip.visual.image_size, tuple) else clip.visual.image_size
    f = model.encode_image(torch.randn(1, 3, side, side))
    assert f.shape == (1, model.align.in_features) == (1, open_clip.get_model_config(name)["embed_dim"])
    ids = model.clip_tokenizer(["two small red circles"])
    words = model.clip_text.token_embedding(ids[:, :ids.argmax() + 1])
    with torch.no_grad():
        assert torch.allclose(model.encode_words(words), clip.encode_text(ids), rtol=1e-3, atol=1e-4)


@ALL
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_architectures_whose_text_tower_is_not_causal_are_refused(name):
    with pytest.raises(UserError, match="not causal"):
        model_with_clip(open_clip.create_model(name), open_clip.get_tokenizer(name))


@pytest.mark.parametrize("text", (dict(proj_type="none", width=24), dict(proj_bias=True)))
def test_a_text_tower_without_a_projection_or_with_a_biased_one_can_be_used(text):
    base = tiny_model()
    config = {**CLIP_CONFIG, "text_cfg": {**CLIP_CONFIG["text_cfg"], "vocab_size": 60, **text}}
    clip = open_clip.CustomTextCLIP(**config).eval()
    if clip.text.text_projection is not None:
        torch.nn.init.normal_(clip.text.text_projection.bias)  # made as zeros, which would hide that it is left out
    model = model_with_clip(clip, base.clip_tokenizer)
    lmeye.check_clip(model)
    assert model.align.in_features == 24


OTHER_TEXT = {
    "not causal": (open_clip.CLIP, dict(no_causal_mask=True)),
    "not causal, a tower of its own": (open_clip.CustomTextCLIP, dict(no_causal_mask=True)),
    "read at its last place": (open_clip.CLIP, dict(pool_type="last")),
}


@pytest.mark.parametrize("what", OTHER_TEXT)
def test_a_clip_whose_text_transformer_is_not_causal_or_read_elsewhere_than_at_eos_is_refused(what):
    make, text = OTHER_TEXT[what]
    tokenizer = tiny_model().clip_tokenizer
    config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | text | {"vocab_size": 60}}
    told = "not causal$" if what.startswith("not causal") else "not read at the end of a text$"
    with pytest.raises(UserError, match=f"--clip some:clip.*{told}"):
        lmeye.check_clip(model_with_clip(make(**config).eval(), tokenizer))


def test_a_text_tower_of_another_library_is_refused(tmp_path):
    base = tiny_model()
    small_config("roberta", dict(is_decoder=False)).save_pretrained(tmp_path)
    text = dict(hf_model_name=str(tmp_path), hf_model_pretrained=False, hf_proj_type="mlp",
                hf_pooler_type="mean_pooler")
    clip = open_clip.CustomTextCLIP(**{**CLIP_CONFIG, "text_cfg": text})
    with pytest.raises(UserError, match="--clip some:clip.*can't be used"):
        model_with_clip(clip, base.clip_tokenizer)


def test_pictures_go_through_clip_as_open_clip_sends_them_and_words_stand_between_its_ends():
    model, tokenizer = tiny_model(), shapes.build_tokenizer(ends=True)
    pixels = model.preprocess(shapes.draw(shapes.SCENES[0], random.Random(0)))[None]
    assert torch.equal(model.encode_image(pixels), model.clip.encode_image(pixels))
    assert model.encode_image(pixels).norm() != pytest.approx(1, abs=0.01)  # projected, but not normalised
    assert model.sos_eos.tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_openai_weights_are_given_quick_gelu(tmp_path, monkeypatch):
    """OpenAI's tag means QuickGELU, under which the same weights give other features."""
    torch.manual_seed(0)
    reference = open_clip.create_model("ViT-B-32-quickgelu").eval()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(reference.state_dict(), file)
    tags, real = [], open_clip.create_model_from_pretrained

    def create(model, pretrained, **options):
        tags.append(pretrained)
        return real(model, pretrained=str(file), **options)

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        openai, _, _ = lmeye.load_clip("ViT-B-32:openai", torch.device("cpu"), torch.float32)
        slash, _, _ = lmeye.load_clip("ViT-B/32:openai", torch.device("cpu"), torch.float32)
        laion, _, _ = lmeye.load_clip("ViT-B-32:laion2b_s34b_b79k", torch.device("cpu"), torch.float32)
        expected = reference.encode_image(pixels)
        assert torch.allclose(openai.encode_image(pixels), expected, atol=1e-4)
        assert torch.allclose(slash.encode_image(pixels), expected, atol=1e-4)
        assert not torch.allclose(laion.encode_image(pixels), expected, atol=1e-2)
    assert tags == ["openai", "openai", "laion2b_s34b_b79k"]


# ---- What is refused when it is loaded -----------------------------------------------------------------------


def load(llm, clip):
    return LMEye.from_settings(Settings(llm=str(llm), clip=str(clip), precision="fp32"))


@pytest.fixture
def llm(tmp_path):
    """A folder of a random Llama whose head is its own, and the miniature's tokenizer."""
    shapes.build_tokenizer(ends=False).save_pretrained(tmp_path / "llm")
    random_llm("llama").save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def clip(tmp_path):
    return save_clip(tmp_path / "clip")


def test_a_model_is_checked_when_it_is_loaded_also_for_the_controls(tmp_path, llm, clip):
    """Both checks compare numbers, so nothing else would tell: a wrong model trains and answers, only worse."""
    for variant in lmeye.VARIANTS:
        LMEye.from_settings(Settings(llm=str(llm), clip=clip, precision="fp32", variant=variant))
    config_file = tmp_path / "clip" / "open_clip_config.json"
    change_json(config_file, lambda config: config["model_cfg"]["text_cfg"].update(pool_type="first"))
    with pytest.raises(UserError, match="--clip .*not read at the end of a text"):
        load(llm, clip)
    random_llm("granite", **WRONG["granite"][0]).save_pretrained(llm)
    save_clip(tmp_path / "clip")
    for variant in lmeye.VARIANTS:
        with pytest.raises(UserError, match=f"--llm .*{HEAD}"):
            LMEye.from_settings(Settings(llm=str(llm), clip=clip, precision="fp32", variant=variant))


def change_json(path, change):
    """Rewrite a JSON file: `change` alters what it holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(folder, change):
    """Rewrite a folder's weights as `change({name: tensor})` gives them."""
    path = Path(folder, "model.safetensors")
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, {"format": "pt"})


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def narrower(weights):
    return {name: tensor[:-1].clone() if "up_proj" in name else tensor for name, tensor in weights.items()}


def with_biases(weights):
    """Biases of a model whose config.json does not name them. Scales of compressed weights, and LoRA's matrices,
    stand in files in the same way."""
    for name, tensor in list(weights.items()):
        if "proj" in name:
            weights[name.replace(".weight", ".bias")] = tensor[:, 0].clone()
    return weights


def without_prefix(weights):
    return {name.removeprefix("model."): tensor for name, tensor in with_biases(weights).items()}


def with_a_further_norm(weights):
    """As of a Qwen 3 file under a Llama's configuration."""
    return weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}


@pytest.mark.parametrize("change, said", [
    (without_head, "lm_head.weight"), (narrower, "up_proj|mismatch"), (with_biases, "14 weights are .*proj.bias"),
    (without_prefix, "14 weights are .*proj.bias"), (with_a_further_norm, "ignored by their layer.*q_norm")])
def test_weights_that_are_missing_of_another_shape_or_ignored_are_refused(llm, clip, change, said):
    """transformers makes missing ones up, and warns of the others and leaves them out: all numbers are others."""
    change_weights(llm, change)
    with pytest.raises(UserError, match=said) as error:
        load(llm, clip)
    assert str(error.value).startswith(f"--llm {llm}: ")


def test_a_model_that_computes_with_fewer_bits_is_refused(llm, clip):
    fp8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
    change_json(llm / "config.json", lambda config: config.update(quantization_config=fp8))
    with pytest.raises(UserError, match="compressed: quantization_config"):
        load(llm, clip)


def test_tensors_that_belong_to_no_layer_of_the_model_are_passed_over_and_told(llm, clip, capsys):
    """Old files hold what is computed today, others a tower for pictures or a head that predicts further tokens."""
    more = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias",
            "vision_tower.fc1.weight", "model.layers.2.input_layernorm.weight")
    change_weights(llm, lambda weights: weights | {name: torch.ones(3) for name in more})
    load(llm, clip)
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert len(notes) == 1 and f"note: --llm {llm}: 3 weights of the file are not used: " in notes[0]


def test_what_libraries_say_while_they_load_is_passed_on_in_a_line_each(tmp_path, llm, clip, capsys):
    """A scaling of positions that transformers can't read is ignored; open_clip resizes the positions of weights
    under the name of another size, which see another picture."""
    capsys.readouterr()
    lmeye.run_main(lambda: load(llm, clip))
    assert capsys.readouterr().err == ""
    change_json(llm / "config.json", lambda config: config.update(rope_parameters=None, rope_scaling={"factor": 4.0}))
    change_json(tmp_path / "clip" / "open_clip_config.json",
                lambda config: config["model_cfg"]["vision_cfg"].update(image_size=64))
    lmeye.run_main(lambda: load(llm, clip))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("note: ") and "rope" in line for line in lines)
    assert any(line.startswith("note: Resizing position embedding") for line in lines)


@pytest.mark.parametrize("name", ("opt", "gpt2"))
def test_a_folder_without_its_tokenizers_files_is_refused(tmp_path, clip, name):
    """transformers makes an empty tokenizer up for them."""
    random_llm(name).save_pretrained(tmp_path / "llm")
    with pytest.raises(UserError, match="tokenizer"):
        load(tmp_path / "llm", clip)


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(llm, clip):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["one_more"])
    tokenizer.save_pretrained(llm)
    with pytest.raises(UserError, match="tokenizer.*does not fit"):
        load(llm, clip)


def test_an_end_of_text_that_somebody_typed_is_text():
    model = tiny_model()
    end, eos = model.tokenizer.eos_token, model.tokenizer.eos_token_id
    assert model.tokenizer(end, add_special_tokens=False).input_ids == [eos]  # what would happen without care
    tokens = model.tokenize([f"what {end}?"], [f"red {end} circle"])
    assert eos not in tokens.question
    assert tokens.answer[0].tolist().count(eos) == 1  # only the one that ends the text


def test_the_prompt_begins_with_all_that_the_tokenizer_writes_before_a_text(llm, clip):
    """GLM-4's writes two tokens; others write bos, which may be eos as well, or nothing. What one writes behind
    a text would end the prompt at once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    image = tokenizer("Image:", add_special_tokens=False).input_ids
    for template, before in (("<pad> <start> $A <end>", ["<pad>", "<start>"]), ("$A <start>", [])):
        pieces = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<start>", "<end>")]
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=pieces)
        tokenizer.save_pretrained(llm)
        words = load(llm, clip).image_words.tolist()
        assert words == tokenizer.convert_tokens_to_ids(before) + image


def test_a_tokenizer_that_is_not_as_its_file_says_is_told(llm, clip, capsys, monkeypatch):
    """For some classes transformers builds another one, which does not do all that its file says."""
    load(llm, clip)
    assert "other tokens" not in capsys.readouterr().err
    built = transformers.AutoTokenizer.from_pretrained(llm)
    small, other = tokenizers.normalizers.Lowercase(), tokenizers.normalizers.Replace("cups", "one")
    built.backend_tokenizer.normalizer = tokenizers.normalizers.Sequence([small, other])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: built)
    lmeye.load_llm(str(llm), torch.device("cpu"), torch.float32)
    assert f"note: {llm}/tokenizer.json: transformers cuts texts into other tokens" in capsys.readouterr().err


def put_in_cache(monkeypatch, folder, cache):
    """A model's folder as the hub's cache holds it after a download → its name there."""
    version = "0" * 40
    shutil.copytree(folder, cache / "models--org--name" / "snapshots" / version)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text(version)
    for place in (huggingface_hub.constants, transformers.utils.hub):
        monkeypatch.setattr(place, "HF_HUB_CACHE", str(cache), raising=False)
    return "org/name"


def sentencepiece_tokenizer(folder):
    """A tokenizer.json as Llama 2 and TinyLlama have it: it begins each text with a space, also behind one."""
    words = ["<unk>", "<s>", "</s>", "▁", *(chr(i) for i in range(33, 127)), "\n", "ù", "\u0301", "▁r"]
    bpe = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [("▁", "r")], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}))
    random_llm("llama", vocab_size=len(words)).save_pretrained(folder)


def test_an_answers_first_space_and_a_start_that_transformers_leaves_out_are_told(llm, clip, capsys):
    sentencepiece_tokenizer(llm)
    lmeye.load_llm(str(llm), torch.device("cpu"), torch.float32)
    assert "transformers cuts texts into other tokens" in capsys.readouterr().err
    tokenizer = shapes.build_tokenizer(ends=False)
    start = [("<start>", tokenizer.convert_tokens_to_ids("<start>"))]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A", special_tokens=start)
    tokenizer.save_pretrained(llm)
    random_llm("llama").save_pretrained(llm)
    lmeye.load_llm(str(llm), torch.device("cpu"), torch.float32)
    assert "other tokens" not in capsys.readouterr().err
    other = tokenizers.Tokenizer.from_file(str(llm / "tokenizer.json"))
    other.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    other.save(str(llm / "tokenizer.json"))
    real = transformers.AutoTokenizer.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: tokenizer)
        lmeye.load_llm(str(llm), torch.device("cpu"), torch.float32)
    assert "other tokens" in capsys.readouterr().err


def test_a_model_of_the_hub_is_looked_at_like_a_folder(tmp_path, llm, capsys, monkeypatch):
    sentencepiece_tokenizer(llm)
    name = put_in_cache(monkeypatch, llm, tmp_path / "cache")
    lmeye.load_llm(name, torch.device("cpu"), torch.float32)
    assert "tokenizer.json: transformers cuts texts into other tokens" in capsys.readouterr().err
    snapshot = next((tmp_path / "cache").glob("*/snapshots/*"))
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="--llm org/name: holds an adapter"):
        lmeye.load_llm(name, torch.device("cpu"), torch.float32)


def test_that_a_models_own_code_is_not_run_is_told(llm, clip, capsys):
    load(llm, clip)
    assert "auto_map" not in capsys.readouterr().err
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_json(llm / "config.json", lambda config: config.update(auto_map=code))
    load(llm, clip)
    assert f"note: --llm {llm}: its own code (auto_map) is not run" in capsys.readouterr().err


def test_a_clip_whose_tokenizer_is_another_is_refused(tmp_path, llm, clip):
    """Without a name in its configuration open_clip takes that of OpenAI's CLIP."""
    config_file = tmp_path / "clip" / "open_clip_config.json"
    change_json(config_file, lambda config: config["model_cfg"]["text_cfg"].pop("hf_tokenizer_name"))
    with pytest.raises(UserError, match="--clip .*: its tokenizer does not fit"):
        load(llm, clip)


def test_a_tokenizer_without_a_token_for_a_part_of_the_prompt_is_refused(llm, clip):
    """One of whole words may drop what it does not know, and the answer would have no beginning."""
    words = {token: i for i, token in enumerate(["<pad>", "</s>", *"Image:Quston "])}
    few = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    few.normalizer = tokenizers.normalizers.Replace("Answer:", "")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=few, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(llm)
    with pytest.raises(UserError, match="no token for"):
        load(llm, clip)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2631640000\n"


@pytest.mark.parametrize("part, file", [("llm", "model.safetensors"), ("clip", "open_clip_model.safetensors")])
def test_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path, part, file):
    """In folders whose names a shell would expand, and which are found nevertheless."""
    folder = tmp_path / "models [v1]*"
    llm, clip = save_llm(folder / "llm"), save_clip(folder / "clip")
    load(llm, clip)
    (folder / part / file).write_text(POINTER)
    with pytest.raises(UserError, match=f"--{part} .*{file} is a git-lfs pointer.*git lfs pull"):
        load(llm, clip)


def test_an_adapter_beside_the_weights_is_refused(llm, clip):
    """transformers without peft takes the weights alone, without a word."""
    (llm / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into the weights"):
        load(llm, clip)
