"""Which language models and CLIPs the method works with: each family, tiny and at random, beside two whole passes.

`find_fault` and `check_clip` of lmeye.py look at a model once, when it is loaded. A family that they let through must
give the numbers of the reference in test_two_passes.py, which knows no cache, no mask and no padding; a family whose
numbers would be others has to be refused, in one line.
"""

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import CLIP_CONFIG, save_clip, save_llm, tiny_model
from test_two_passes import ANSWERS, QUESTIONS, features, gradients, plain_answers, plain_loss

import shapes
import lmeye
from lmeye import LMEye, Settings, UserError

ALL = pytest.mark.skipif("LMEYE_ALL" not in os.environ, reason="all kinds and large sizes, 5 minutes: set LMEYE_ALL=1")

# ---- Language models -----------------------------------------------------------------------------------------

SIZE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=128)
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)
FALCON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=96)
BERT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128)
BART = dict(d_model=64, decoder_layers=2, decoder_ffn_dim=96, decoder_attention_heads=4, encoder_layers=2,
            encoder_ffn_dim=96, encoder_attention_heads=4, max_position_embeddings=128)
LATENT = dict(q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
              n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=48,
              first_k_dense_replace=1)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
              layer_types=["linear_attention", "full_attention"])
WINDOW = dict(sliding_window=4)  # shorter than any prompt, and than what is looked at when a model is loaded
LOCAL = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])

# name → sizes; the name's first word is the family, as transformers names it
RIGHT = {
    "opt": dict(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=128),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    "llama": SIZE,
    "llama, rope scaled": {**SIZE, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                       "original_max_position_embeddings": 32}},
    "gpt2": GPT,
    "gpt_neox": SIZE,
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "rotary_dim": 8},
    "gpt_bigcode": GPT,
    "falcon": FALCON,
    "falcon, new": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, alibi": {**FALCON, "alibi": True, "parallel_attn": False},
    "mpt": dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    "gpt_neo": dict(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                    window_size=4, max_position_embeddings=128),
    "mistral": SIZE,
    "mistral, window": {**SIZE, **WINDOW},
    "mistral, longer window": {**SIZE, "sliding_window": 12},  # longer than what is looked at when a model is loaded
    "mixtral, window": {**SIZE, **WINDOW, "num_local_experts": 4},
    "qwen2": SIZE,
    "qwen3": SIZE,
    "qwen3, window": {**SIZE, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {**SIZE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "phi": SIZE,
    "phi3, window": {**SIZE, **WINDOW},
    "gemma": SIZE,
    "gemma3_text, window": {**SIZE, **LOCAL},
    "gpt_oss, window": {**SIZE, **LOCAL, "num_local_experts": 4},
    "gpt_oss, longer window": {**SIZE, **LOCAL, "num_local_experts": 4, "sliding_window": 12},
    "deepseek_v3": {**SIZE, **LATENT, "num_key_value_heads": 4, "head_dim": 8},
    "stablelm": SIZE,
    "olmo": SIZE,
    "olmo2": SIZE,
    "olmo3, window": {**SIZE, **LOCAL},
    "glm": SIZE,
    "smollm3": {**SIZE, "no_rope_layers": [0, 1]},
    "xglm": dict(d_model=64, num_layers=2, attention_heads=4, ffn_dim=96, max_position_embeddings=128),
    "granite": SIZE,  # as long as nothing scales its logits
}

HEAD, NUMBERS = "its head alone", "padding, its cache or later words change"  # what is said of them
FAILS = "can't be run on vectors with a cache"
WRONG = {
    "gemma2": (SIZE, HEAD),
    "cohere": (SIZE, HEAD),
    "cohere2": ({**SIZE, **LOCAL}, HEAD),
    "granite": ({**SIZE, "logits_scaling": 8.0}, HEAD),
    "nanochat": (SIZE, HEAD),
    "gemma3n_text": ({**SIZE, **LOCAL, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
                      "vocab_size_per_layer_input": 57, "intermediate_size": [96, 96],
                      "activation_sparsity_pattern": [0.0, 0.0]}, HEAD),
    "bert": ({**BERT, "is_decoder": True}, HEAD),
    "roberta": ({**BERT, "is_decoder": True}, HEAD),
    "modernbert-decoder": (BERT, HEAD),
    "bert, plain": (BERT, HEAD),
    "rwkv": (dict(hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, context_length=128), NUMBERS),
    "ctrl": (dict(n_embd=64, n_layer=2, n_head=4, dff=96, n_positions=128), HEAD),
    "doge": ({**SIZE, "keep_window_size": 4}, NUMBERS),
    "gemma4_text": (dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=57,
                         num_kv_shared_layers=0, **LOCAL), FAILS),  # looks its words up in the embeddings
    "bart": (BART, NUMBERS),
    "openai-gpt": (GPT, FAILS),
    "llama4_text": ({**SIZE, "intermediate_size_mlp": 96, "num_local_experts": 4}, FAILS),
    "recurrent_gemma": ({**SIZE, "lru_width": 64, "block_types": ("recurrent", "attention")}, HEAD),
    "mamba": (dict(hidden_size=64, num_hidden_layers=2, state_size=8), FAILS),
    "falcon_h1": ({**SIZE, **MAMBA, "mamba_d_ssm": 128}, FAILS),
    "bamba": ({**SIZE, **MAMBA, "attn_layer_indices": [1]}, FAILS),
    "jamba": ({**SIZE, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1}, FAILS),
    "nemotron_h": ({**SIZE, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16,
                    "ssm_state_size": 16, "n_groups": 1}, FAILS),
    "qwen3_5_text": ({**SIZE, **LINEAR}, FAILS),
    "qwen3_next": ({**SIZE, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                    "shared_expert_intermediate_size": 48}, FAILS),
    "lfm2": ({**SIZE, "layer_types": ["conv", "full_attention"]}, FAILS),
    "minimax": ({**SIZE, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]}, FAILS),
}


def config_of(name, sizes):
    """The configuration of a family (the first word of `name`), for the miniature's tokenizer."""
    tokenizer = shapes.build_tokenizer(ends=False)
    words = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=tokenizer.bos_token_id,
                 eos_token_id=tokenizer.eos_token_id)
    if "text_config" in sizes:  # a model that has other parts, too
        sizes = {**sizes, "text_config": {**sizes["text_config"], **words}}
    else:
        sizes = {**sizes, **words}
    return transformers.AutoConfig.for_model(name.split(",")[0], **sizes)


def random_llm(name, sizes, seed=0, std=0.2):
    """A random causal LM of a family."""
    torch.manual_seed(seed)
    llm = transformers.AutoModelForCausalLM.from_config(config_of(name, sizes))
    for p in llm.parameters():  # the published initialisations are so small that mistakes would hide in rounding
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std)
    return llm


def model_with(llm, **settings):
    base = tiny_model()
    return LMEye(Settings(llm="a/b", dropout=0.0, **settings), llm, base.tokenizer, base.clip, base.preprocess,
                 base.clip_tokenizer)


def assert_equals_two_whole_passes(model):
    """Loss, gradients and greedy answers, of a batch that is padded on all sides."""
    questions = [QUESTIONS[0], " ".join(QUESTIONS), QUESTIONS[2]]
    model.set_trained(2, train_align=True)
    f = features(model)
    loss, plain = model.loss(f, questions, ANSWERS), plain_loss(model, f, questions, ANSWERS)
    assert abs(loss - plain) < 1e-5 * plain
    mine, theirs = gradients(model, loss), gradients(model, plain)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (mine[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name
    model.set_trained(1)
    caption, plain = model.loss(f, None, ANSWERS), plain_loss(model, f, [None] * 3, ANSWERS)
    assert abs(caption - plain) < 1e-5 * plain
    with torch.no_grad():
        expected = plain_answers(model, f, questions, 4)
    assert model.generate(f, questions, max_tokens=4) == expected


@pytest.mark.parametrize("name", RIGHT)
def test_a_family_that_can_be_used_gives_the_numbers_of_two_whole_passes(name):
    model = model_with(random_llm(name, RIGHT[name]))
    lmeye.check_llm(model)
    assert_equals_two_whole_passes(model)


OFTEN_NAMED = {  # what configurations call their sizes → small ones
    64: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_key_value_heads", "num_experts_per_tok"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_experts",
        "num_local_experts", "n_routed_experts"),
    16: ("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim"),
    8: ("qk_rope_head_dim", "qk_nope_head_dim"),
    1: ("n_group", "topk_group"),
    96: ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
    256: ("max_position_embeddings", "n_positions"),
}


def small_llm(kind):
    """A small random model of any kind that transformers knows. Some refuse these sizes, with an error of their own, some
    stay large."""
    usual, sizes = transformers.CONFIG_MAPPING[kind]().get_text_config(), {}
    for size, names in OFTEN_NAMED.items():
        for name in names:
            if isinstance(getattr(usual, name, None), int):
                sizes[name] = size
    if hasattr(usual, "is_decoder"):
        sizes["is_decoder"] = True
    if getattr(usual, "layer_types", None):
        sizes["layer_types"] = [usual.layer_types[0], usual.layer_types[-1]]
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(config_of(usual.model_type, sizes))
    if sum(p.numel() for p in shell.parameters()) > 50e6:
        raise ValueError("large")
    return random_llm(usual.model_type, sizes, std=0.15)


@ALL
def test_whatever_transformers_knows_is_refused_or_gives_the_numbers_of_two_whole_passes():
    kinds, outcomes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {}
    for kind in kinds:
        try:
            llm = small_llm(kind)
        except Exception:
            outcomes[kind] = "can't be made small"
            continue
        try:
            model = model_with(llm)
            lmeye.check_llm(model)
        except UserError as error:
            outcomes[kind] = f"refused: {error}"
            continue
        assert_equals_two_whole_passes(model)
        outcomes[kind] = "right"
    for kind, outcome in outcomes.items():
        print(f"{kind}: {outcome}")
    assert sum(outcome == "right" for outcome in outcomes.values()) >= 60


def test_a_model_that_turns_its_states_anew_beyond_a_length_is_used_up_to_it():
    """Phi-3's longrope: beyond its original limit the keys of the cache, too, would have to be other ones."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = {**SIZE, "original_max_position_embeddings": 40, "rope_parameters": rope}
    model = model_with(random_llm("phi3", sizes))
    lmeye.check_llm(model)
    assert model.context == 40 and model_with(random_llm("llama, rope scaled", RIGHT["llama, rope scaled"])).context == 128
    model.set_trained(2)
    f, question = features(model)[:1], " ".join(["red"] * 25)

    def difference(answer):
        plain = plain_loss(model, f, [question], [answer])
        return abs(model.loss(f, [question], [answer]) - plain).item()

    room = model.max_text_tokens - len(model.question_ids([question])[0])
    fits, too_long = " ".join(["red"] * (room - 1)), " ".join(["red"] * (room + 20))  # with the end of the text
    assert difference(fits) < 1e-5
    with pytest.raises(UserError, match="context has room for"):
        difference(too_long)
    model.max_text_tokens = 100
    assert difference(too_long) > 1e-2  # why it is refused


@pytest.mark.parametrize("family", ("llama", "mistral", "qwen3"))
def test_rotations_that_change_beyond_a_length_are_found_wherever_the_file_names_it(family):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 40}
    model = model_with(random_llm(family, {**SIZE, "head_dim": 16, "rope_parameters": rope}))
    assert model.context == 40
    lmeye.check_llm(model)


@pytest.mark.filterwarnings("error::FutureWarning")  # of an argument's old name, which a user would see above that line
@pytest.mark.parametrize("name", WRONG)
def test_a_family_that_cannot_be_used_is_refused_in_one_line(name):
    sizes, reason = WRONG[name]
    model = model_with(random_llm(name, sizes))
    with pytest.raises(UserError, match=reason) as error:
        lmeye.check_llm(model)
    assert str(error.value).startswith("--llm a/b: this kind of language model can't be used: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_text_part_of_a_multimodal_model_is_used_with_its_own_context():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    llm = random_llm("gemma3", dict(text_config={**SIZE, **LOCAL}, vision_config=vision, mm_tokens_per_image=4))
    model = model_with(llm)
    assert type(llm).__name__ == "Gemma3ForConditionalGeneration" and model.context == 128
    lmeye.check_llm(model)
    assert_equals_two_whole_passes(model)


@pytest.mark.parametrize("name", ("llama", "opt"))
def test_rounding_is_not_taken_for_a_fault(name):
    """A GPU rounds differently for each shape of a batch: here each part of a model does so at random, by bf16's unit."""
    def round_at_random(module, inputs, output):
        return output * (1 + 2 ** -9 * torch.randn_like(output))

    for seed in range(2):
        llm = random_llm(name, {**RIGHT[name], "num_hidden_layers": 24}, seed, std=0.1)
        for module in llm.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(round_at_random)
        lmeye.check_llm(model_with(llm.to(torch.bfloat16)))


@pytest.mark.parametrize("name", ("gemma2", "granite", "bert", "bert, plain", "doge"))
def test_a_fault_is_not_taken_for_rounding(name):
    model = model_with(random_llm(name, WRONG[name][0]).to(torch.bfloat16))
    with pytest.raises(UserError, match=WRONG[name][1]):
        lmeye.check_llm(model)


def test_a_cache_that_cannot_be_shortened_is_refused(monkeypatch):
    """Its request is right, and the answer goes on from a wrong beginning: only the logits can tell."""
    def crop(cache, n):  # forgets the first -n tokens in place of the last
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., -n:, :], layer.values[..., -n:, :]

    monkeypatch.setattr(transformers.DynamicCache, "crop", crop)
    with pytest.raises(UserError, match=NUMBERS):
        lmeye.check_llm(tiny_model())


def test_a_cache_that_goes_on_wrongly_at_its_end_is_refused(monkeypatch):
    """As above, but only the states of the answer's last two tokens are wrong, and those of one record."""
    model = tiny_model()
    real = model.run_llm

    def run_llm(x, mask, cache=None):
        h, after = real(x, mask, cache)
        if cache is not None and x.shape[1] > 1:  # not <img-d> alone
            h = h.clone()
            h[1, -2:] += 1
        return h, after

    monkeypatch.setattr(model, "run_llm", run_llm)
    with pytest.raises(UserError, match=NUMBERS):
        lmeye.check_llm(model)


def test_a_request_from_a_wrong_state_is_refused_however_little_the_answer_depends_on_it(monkeypatch):
    model = tiny_model()
    real = model.run_llm
    model.transmit.weight.data.mul_(1e-6)

    def run_llm(x, mask, cache=None):
        h, after = real(x, mask, cache)
        at_img_d = cache is not None and x.shape[1] == 1
        return (h.roll(1, -1) if at_img_d else h), after

    monkeypatch.setattr(model, "run_llm", run_llm)
    with pytest.raises(UserError, match=NUMBERS):
        lmeye.check_llm(model)


def test_a_model_that_does_not_read_the_cache_is_refused(monkeypatch):
    """Base models swallow arguments that they don't know."""
    model = tiny_model()
    real = model.run_llm
    monkeypatch.setattr(model, "run_llm", lambda x, mask, cache=None: real(x, mask[:, -x.shape[1]:]))
    with pytest.raises(UserError, match=NUMBERS):
        lmeye.check_llm(model)


def test_a_cache_through_which_no_gradient_passes_is_refused(monkeypatch):
    """Every number is right, and with --train-align the request would not teach `align` anything."""
    model = tiny_model()
    real = model.run_llm

    def run_llm(x, mask, cache=None):
        h, after = real(x, mask, cache)
        for layer in after.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return h, after

    monkeypatch.setattr(model, "run_llm", run_llm)
    with pytest.raises(UserError, match=FAILS):
        lmeye.check_llm(model)


def test_states_that_overflow_are_named_as_such():
    llm = random_llm("llama", SIZE)
    llm.model.layers[0].mlp.down_proj.weight.data.fill_(30_000)
    with pytest.raises(UserError, match="fp16 ends at 65,504, so use --precision fp32"):
        lmeye.check_llm(model_with(llm.to(torch.float16)))


def test_a_weight_that_is_not_a_number_is_named_as_such():
    llm = random_llm("llama", SIZE)
    llm.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="its states are not finite$"):
        lmeye.check_llm(model_with(llm))


def test_a_gpu_without_memory_is_not_taken_for_a_kind_of_model(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    model = tiny_model()
    monkeypatch.setattr(model, "run_llm", full)
    with pytest.raises(torch.OutOfMemoryError):
        lmeye.check_llm(model)


# ---- CLIPs ---------------------------------------------------------------------------------------------------

SMALL = ("PE-Core-T-16-384", "ViTamin-S", "convnext_tiny")
OTHERS = ("ViT-S-32-alt", "vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224", "PE-Core-S-16-384",
          "PE-Core-B-16", "convnext_small", "convnext_base", "convnext_base_w", "convnext_base_w_320", "ViTamin-B",
          "ViTamin-S-LTT", "ViTamin-B-LTT", "swin_base_patch4_window7_224", "EVA02-B-16", "EVA02-L-14", "MobileCLIP-B",
          "MobileCLIP2-B", "convnext_large", "RN50", "ViT-B-32")
NOT_CAUSAL = ("MobileCLIP-S1", "MobileCLIP2-S0")


def model_with_clip(clip, tokenizer):
    base = tiny_model()
    return LMEye(Settings(clip="some:clip"), base.llm, base.tokenizer, clip, base.preprocess, tokenizer)


def assert_clip_works(name):
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


@pytest.mark.parametrize("name", SMALL)
def test_a_clip_whose_picture_tower_is_of_timm_can_be_used(name):
    assert_clip_works(name)


@ALL
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_of_open_clip_can_be_used(name):
    assert_clip_works(name)


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


def test_what_is_no_causal_text_transformer_read_at_eos_is_refused():
    base = tiny_model()
    text = {**CLIP_CONFIG["text_cfg"], "vocab_size": 60}
    bidirectional = open_clip.CustomTextCLIP(**{**CLIP_CONFIG, "text_cfg": {**text, "no_causal_mask": True}})
    with pytest.raises(UserError, match="--clip some:clip.*not causal"):
        model_with_clip(bidirectional, base.clip_tokenizer)
    captioner = open_clip.CoCa(**{**CLIP_CONFIG, "text_cfg": {**text, "embed_cls": True, "output_tokens": True}},
                               multimodal_cfg=dict(width=36, heads=4, layers=1, context_length=16, vocab_size=60))
    with pytest.raises(UserError, match="--clip some:clip.*not read at the end"):
        lmeye.check_clip(model_with_clip(captioner.eval(), base.clip_tokenizer))


def test_a_text_tower_of_another_library_is_refused(tmp_path):
    base = tiny_model()
    transformers.RobertaConfig(**BERT, vocab_size=60).save_pretrained(tmp_path)
    text = dict(hf_model_name=str(tmp_path), hf_model_pretrained=False, hf_proj_type="mlp",
                hf_pooler_type="mean_pooler")
    clip = open_clip.CustomTextCLIP(**{**CLIP_CONFIG, "text_cfg": text})
    with pytest.raises(UserError, match="--clip some:clip.*can't be used"):
        model_with_clip(clip, base.clip_tokenizer)


# ---- What is refused when it is loaded -----------------------------------------------------------------------


def load(llm, clip):
    return LMEye.from_settings(Settings(llm=str(llm), clip=str(clip), precision="fp32"))


def test_a_model_is_checked_when_it_is_loaded_also_for_the_controls(tmp_path):
    """Both checks compare numbers, so nothing else would tell: a wrong model trains and answers, only worse."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    for variant in lmeye.VARIANTS:
        LMEye.from_settings(Settings(llm=str(llm), clip=clip, precision="fp32", variant=variant))
    config_file = tmp_path / "clip" / "open_clip_config.json"
    config = json.loads(config_file.read_text())
    config["model_cfg"]["text_cfg"]["pool_type"] = "first"
    config_file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="--clip .*not read at the end of a text"):
        load(llm, clip)
    random_llm("granite", WRONG["granite"][0]).save_pretrained(llm)
    for variant in lmeye.VARIANTS:
        with pytest.raises(UserError, match=f"--llm .*{HEAD}"):
            LMEye.from_settings(Settings(llm=str(llm), clip=save_clip(tmp_path / variant), precision="fp32", variant=variant))


def llama_folder(folder):
    """A folder of a random Llama whose head is its own, and the miniature's tokenizer."""
    tokenizer = shapes.build_tokenizer(ends=False)
    tokenizer.save_pretrained(folder)
    random_llm("llama", SIZE).save_pretrained(folder)
    return folder


def change_weights(folder, change):
    """Rewrite a folder's weights as `change({name: tensor})` gives them."""
    path = Path(folder, "model.safetensors")
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, {"format": "pt"})


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def renamed(weights):
    return {name.replace("layers.1.", "blocks.1."): tensor for name, tensor in weights.items()}


def narrower(weights):
    return {name: tensor[:-1].clone() if "up_proj" in name else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("change, said", [
    (without_head, "lm_head.weight"), (renamed, "layers.1."), (narrower, "up_proj|mismatch")])
def test_weights_that_are_missing_or_of_another_shape_are_refused(tmp_path, change, said):
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    load(llm, clip)
    change_weights(llm, change)
    with pytest.raises(UserError, match=said) as error:
        load(llm, clip)
    assert str(error.value).startswith(f"--llm {llm}: ")


def in_8_bits(weights):
    """As NVIDIA's modelopt writes FP8: each matrix divided by its scale, which stands beside it."""
    for name, tensor in list(weights.items()):
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            weights[name], weights[f"{name}_scale"] = (tensor / scale).to(torch.float8_e4m3fn), scale.clone()
    return weights


def without_prefix(weights):
    return {name.removeprefix("model."): tensor for name, tensor in in_8_bits(weights).items()}


@pytest.mark.parametrize("change", (in_8_bits, without_prefix))
@pytest.mark.parametrize("quantization", (None, {"quant_method": "modelopt", "quant_algo": "FP8"}))
def test_weights_compressed_in_an_unknown_way_are_refused(tmp_path, change, quantization):
    """transformers would take each for a whole weight, thousands of times too large, and leave the scales out."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    change_weights(llm, change)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"quantization_config": quantization} if quantization else config))
    with pytest.raises(UserError, match="weights are .*compressed: .*proj.weight_scale"):
        load(llm, clip)


def with_biases(weights):
    """Biases of a model whose config.json does not name them."""
    biases = {name.replace(".weight", ".bias"): tensor[:, 0].clone() for name, tensor in weights.items() if "proj" in name}
    return weights | biases


def with_lora(weights):
    """LoRA's matrices beside the weights that they change, not merged into them."""
    name = "model.layers.0.self_attn.q_proj"
    return weights | {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}


@pytest.mark.parametrize("change, said", [(with_biases, "14 weights are .*proj.bias"), (with_lora, "2 weights are .*lora_A")])
def test_weights_that_a_layer_of_the_model_would_ignore_are_refused(tmp_path, change, said):
    """transformers warns and leaves them out, and all numbers are others."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    change_weights(llm, change)
    with pytest.raises(UserError, match=said):
        load(llm, clip)


def test_tensors_that_belong_to_no_layer_of_the_model_are_passed_over_and_told(tmp_path, capsys):
    """Old files hold what is computed today, others a tower for pictures or a head that predicts further tokens."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "vision_tower.fc1.weight": torch.ones(2, 2),
            "model.layers.0.self_attn.masked_bias": torch.ones(1), "model.layers.2.input_layernorm.weight": torch.ones(3)}
    change_weights(llm, lambda weights: weights | more)
    lmeye.check_llm(load(llm, clip))
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert len(notes) == 1 and f"note: --llm {llm}: 3 weights of the file are not used: " in notes[0]


@pytest.mark.parametrize("rope, said", [
    ({"factor": 4.0}, "rope"), ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "attn_factor": 2.0}, "attn_factor")])
def test_what_a_library_warns_of_while_it_loads_is_passed_on_in_a_line(tmp_path, capsys, rope, said):
    """It ignores a scaling of positions that it can't read, and the numbers are others."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    config.pop("rope_parameters", None)
    (llm / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
    capsys.readouterr()
    lmeye.run_main(lambda: load(llm, clip))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("note: ") and said in lines[0]


def test_a_clip_whose_positions_are_resized_is_told(tmp_path, capsys):
    """Weights under the name of another size load, and see another picture."""
    llm, clip = save_llm(tmp_path / "llm"), save_clip(tmp_path / "clip")
    capsys.readouterr()
    lmeye.run_main(lambda: load(llm, clip))
    assert capsys.readouterr().err == ""
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    lmeye.run_main(lambda: load(llm, clip))
    assert "note: Resizing position embedding" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("opt", "gpt2"))
def test_a_folder_without_its_tokenizers_files_is_refused(tmp_path, name):
    """transformers makes an empty tokenizer up for them."""
    random_llm(name, RIGHT[name]).save_pretrained(tmp_path / "llm")
    with pytest.raises(UserError, match="tokenizer"):
        load(tmp_path / "llm", save_clip(tmp_path / "clip"))


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path):
    llm = llama_folder(tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["one_more"])
    tokenizer.save_pretrained(llm)
    with pytest.raises(UserError, match="tokenizer.*does not fit"):
        load(llm, save_clip(tmp_path / "clip"))


def test_an_end_of_text_that_somebody_typed_is_text(tmp_path):
    """With a tokenizer of bytes, as GPT-2's and OPT's are, which can spell "</s>" out."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(letters)])}
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="</s>",
                                                     bos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "llm")
    config = transformers.OPTConfig(**RIGHT["opt"], vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1,
                                    eos_token_id=1)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "llm")
    model = load(tmp_path / "llm", save_clip(tmp_path / "clip"))
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [1]  # what would happen without care
    tokens = model.tokenize(["what </s>?"], ["red </s> circle"])
    assert 1 not in tokens.question
    assert tokens.answer[0].tolist().index(1) == tokens.answer.shape[1] - 1  # only the one that ends the text
    assert model.decode(tokens.answer[0].tolist()) == "red </s> circle"
    assert 1 not in model.tokenize(None, ["a </s>"]).answer[0, :-1]


def test_a_tokenizer_without_a_token_for_a_part_of_the_prompt_is_refused(tmp_path):
    """One of whole words may drop what it does not know, and the answer would have no beginning."""
    llm = llama_folder(tmp_path / "llm")
    words = {token: i for i, token in enumerate(["<pad>", "</s>", *"Image:Quston "])}
    few = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    few.normalizer = tokenizers.normalizers.Replace("Answer:", "")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=few, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(llm)
    with pytest.raises(UserError, match="no token for"):
        load(llm, save_clip(tmp_path / "clip"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2631640000\n"


@pytest.mark.parametrize("parent", ("models", "models [1]"))
def test_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path, parent):
    folder = tmp_path / parent
    llm, clip = save_llm(folder / "llm"), save_clip(folder / "clip")
    weights = folder / "clip" / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_text(POINTER)
    with pytest.raises(UserError, match="--clip .*open_clip_model.safetensors is a git-lfs pointer"):
        load(llm, clip)
    weights.write_bytes(whole)
    Path(llm, "model.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match="--llm .*model.safetensors is a git-lfs pointer.*git lfs pull"):
        load(llm, clip)


def test_a_folder_whose_name_a_shell_would_expand_is_found(tmp_path):
    llm, clip = save_llm(tmp_path / "models [v1]*" / "llm"), save_clip(tmp_path / "models [v1]*" / "clip")
    lmeye.check_llm(load(llm, clip))


def test_weights_in_several_files_are_found_and_a_missing_one_is_named(tmp_path):
    llm = llama_folder(tmp_path / "llm")
    whole = safetensors.torch.load_file(llm / "model.safetensors")
    transformers.LlamaForCausalLM.from_pretrained(llm).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llm / name, tmp_path / "parts")
    clip = save_clip(tmp_path / "clip")
    model = load(tmp_path / "parts", clip)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.llm.state_dict().items())
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    (tmp_path / "parts" / index["weight_map"]["lm_head.weight"]).unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        load(tmp_path / "parts", clip)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    """transformers without peft takes the weights alone, without a word."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    (llm / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into the weights"):
        load(llm, clip)


def test_a_layer_that_a_block_lacks_is_refused(tmp_path):
    """As of a Qwen 3 file under a Llama's configuration."""
    clip, llm = save_clip(tmp_path / "clip"), llama_folder(tmp_path / "llm")
    change_weights(llm, lambda weights: weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(UserError, match="ignored by their layer.*q_norm"):
        load(llm, clip)


def test_the_context_is_the_shortest_length_that_the_configuration_names():
    assert model_with(random_llm("mpt", {**RIGHT["mpt"], "max_seq_len": 64})).context == 64
    phi3 = random_llm("phi3", {**SIZE, "max_position_embeddings": 64})  # whose class has an original length of 4,096
    assert model_with(phi3).context == 64


def test_a_checkpoint_knows_other_rotations_and_another_activation(tmp_path):
    """The same weights compute something else by them."""
    model = model_with(random_llm("llama", SIZE))
    model.save(tmp_path / "a.safetensors", 2)
    other = random_llm("llama", {**SIZE, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    with pytest.raises(UserError, match="the weights of .* are others"):
        model_with(other).load(tmp_path / "a.safetensors")
    for block in model.clip.visual.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    quick = LMEye(model.settings, model.llm, model.tokenizer, model.clip, model.preprocess, model.clip_tokenizer)
    with pytest.raises(UserError, match="the activation functions of .* are others"):
        quick.load(tmp_path / "a.safetensors")
