"""What the measurements share: random models of published sizes, batches for them, one step, seconds.

Random weights serve: they take the same time and memory as trained ones. Nothing here knows a row of
benchmark.py.
"""

import functools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch
import transformers
from torch.utils.flop_counter import (FlopCounterMode, register_flop_formula, sdpa_backward_flop_count,
                                      sdpa_flop_count)

import lmeye
import shapes
from lmeye import LMEye, Settings


class Size(NamedTuple):
    """Of a language model, as its configuration on the hub gives it."""
    width: int
    layers: int
    heads: int
    inner: int = 0  # width of the feed-forward layer; BLOOM's is four times the model's
    vocabulary: int = 50272
    kind: str = "opt"
    activation: str = "relu"  # of OPT


SIZES = {
    "opt-125m": Size(768, 12, 12, 3072), "opt-1.3b": Size(2048, 24, 32, 8192),
    "opt-6.7b": Size(4096, 32, 32, 16384), "bloomz-7b1": Size(4096, 30, 32, vocabulary=250880, kind="bloom"),
    "tiny": Size(64, 2, 4, 128, vocabulary=1000, activation="gelu"),  # ReLU has a kink: rounding would decide
    "tiny-bloom": Size(64, 2, 4, vocabulary=1000, kind="bloom"),
}
SLOTS = {"bloomz-7b1": 5, "tiny-bloom": 5}  # Q; 1 for the others
CLIP = "ViT-L-14-quickgelu"
TINY_CLIP = {  # arguments of open_clip.CLIP
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 40, "layers": 1, "head_width": 20},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 36, "heads": 4, "layers": 2},
}
clip_tokenizer = functools.lru_cache(open_clip.get_tokenizer)  # half a second each time
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def here():
    """The device that is measured: a CUDA GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_llm(size, dtype, device):
    """A causal language model with new weights."""
    shape = SIZES[size]
    common = dict(vocab_size=shape.vocabulary, hidden_size=shape.width, pad_token_id=0, bos_token_id=1,
                  eos_token_id=2)
    if shape.kind == "bloom":
        config = transformers.BloomConfig(n_layer=shape.layers, n_head=shape.heads, **common)
    else:
        config = transformers.OPTConfig(
            word_embed_proj_dim=shape.width, ffn_dim=shape.inner, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, activation_function=shape.activation, **common)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_clip(size, dtype, device):
    """(CLIP, its preprocessing): ViT-L/14, or a tiny one beside tiny language models."""
    if not size.startswith("tiny"):
        clip, _, preprocess = open_clip.create_model_and_transforms(
            CLIP, precision=PRECISIONS[dtype], device=device)
        return clip, preprocess
    with torch.device(device):
        clip = open_clip.CLIP(**TINY_CLIP, cast_dtype=dtype)
    if dtype != torch.float32:
        open_clip.model.convert_weights_to_lp(clip, dtype)
    return clip, open_clip.image_transform(32, is_train=False)


def random_model(size, dtype, device=None, llm=None, **settings):
    """LMEye between random models of published sizes. The miniature's tokenizer stands in for the real
    one."""
    device = device or here()
    clip, preprocess = random_clip(size, dtype, device)
    settings = Settings(**{"n_slots": SLOTS.get(size, 1), "precision": PRECISIONS[dtype], **settings})
    llm = llm or random_llm(size, dtype, device)
    return LMEye(settings, llm, shapes.build_tokenizer(ends=False), clip, preprocess, clip_tokenizer(CLIP))


def random_batch(model, B, question, answer):
    """(f, Tokens) of B records on the CPU, all questions and all answers of one length; question 0:
    captions."""
    def ids(n):
        return torch.randint(10, 50, (B, n)), torch.ones(B, n, dtype=torch.long)

    asked = ids(question) if question else (None, None)
    return torch.randn(B, model.align.in_features), lmeye.Tokens(*asked, *ids(answer))


# ---- A step --------------------------------------------------------------------------------------------


def optimizer_of(model, stage):
    return torch.optim.AdamW(model.set_trained(stage).values(), 1e-4, fused=True)


def step(model, batch, optimizer):
    f, tokens = batch
    (model(f, tokens) / tokens.answer_mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


aten = torch.ops.aten


@register_flop_formula([aten._scaled_dot_product_flash_attention_for_cpu])  # which PyTorch lacks
def count_cpu_attention(q, k, v, *args, **kwargs):
    return sdpa_flop_count(q, k, v)


@register_flop_formula([aten._scaled_dot_product_flash_attention_for_cpu_backward])
def count_cpu_attention_backward(gradient, q, k, v, *args, **kwargs):
    return sdpa_backward_flop_count(gradient, q, k, v)


def operations(function):
    """The number of floating-point operations in what a function runs, by PyTorch's own counter."""
    counter = FlopCounterMode(display=False)
    # It would also follow modules, which fails where a gradient is taken inside a forward pass.
    counter.mod_tracker = mock.MagicMock(parents={"Global"})
    with counter:
        function()
    return counter.get_total_flops()


# ---- Seconds -------------------------------------------------------------------------------------------


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(*functions, repeat=5):
    """Median time of each function; they take turns, so that a machine that slows down slows all of them.

    Each is run once before; on a GPU all of them until half a second has passed, which its clock takes to
    rise.
    """
    start = time.perf_counter()
    warm = False
    while not warm:
        for function in functions:
            function()
        wait()
        warm = not torch.cuda.is_available() or time.perf_counter() - start > 0.5
    times = [[] for _ in functions]
    for _ in range(repeat):
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            wait()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def matmul_rate(dtype, n):
    """Operations per second of one n × n product: what this machine reaches at best, where n is large."""
    a, b = torch.randn(2, n, n, device=here()).to(dtype)
    taken, = seconds(lambda: a @ b)
    return 2 * n ** 3 / taken
