"""What the measurements share: random models of published sizes, batches for them, one step, seconds.

Random weights serve: they take the same time and memory as trained ones. Nothing here knows a row of
benchmark.py.
"""

import functools
import statistics
import time
from unittest import mock

import open_clip
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import lmeye
import shapes
from lmeye import LMEye, Settings


SIZES = {  # width, layers, heads, vocabulary of a language model, as its configuration on the hub has them
    "opt-125m": (768, 12, 12, 50272), "opt-1.3b": (2048, 24, 32, 50272), "opt-6.7b": (4096, 32, 32, 50272),
    "bloomz-7b1": (4096, 30, 32, 250880), "tiny": (64, 2, 4, 1000), "tiny-bloom": (64, 2, 4, 1000),
}
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
    width, layers, heads, vocabulary = SIZES[size]
    common = dict(vocab_size=vocabulary, hidden_size=width, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if "bloom" in size:
        config = transformers.BloomConfig(n_layer=layers, n_head=heads, **common)
    else:
        activation = "gelu" if size == "tiny" else "relu"  # ReLU has a kink: there, rounding would decide
        config = transformers.OPTConfig(
            word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, activation_function=activation, **common)
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
    """LMEye between random models of published sizes, with the miniature's tokenizer."""
    device = device or here()
    clip, preprocess = random_clip(size, dtype, device)
    llm = llm or random_llm(size, dtype, device)
    n_slots = 5 if "bloom" in size else 1
    settings = Settings(n_slots=n_slots, precision=PRECISIONS[dtype], **settings)
    return LMEye(settings, llm, shapes.build_tokenizer(ends=False), clip, preprocess, clip_tokenizer(CLIP))


def random_batch(model, B, question, answer):
    """(f, Tokens) of B records with questions and answers of these lengths, on the CPU; 0: captions."""
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


def operations(function):
    """The number of floating-point operations in what a function runs, by PyTorch's own counter."""
    counter = FlopCounterMode(display=False)
    # It would also follow modules, which fails where a gradient is taken inside a forward pass.
    counter.mod_tracker = mock.MagicMock(parents={"Global"})
    with counter:
        function()
    return counter.get_total_flops()


# ---- Seconds -------------------------------------------------------------------------------------------


def seconds_of(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds(*functions, repeat=5):
    """Median time of each function; they take turns, so that a machine that slows down slows all of them.

    They are run before, once; on a GPU for half a second, which its clock takes to rise.
    """
    warm_up = sum(map(seconds_of, functions))
    while torch.cuda.is_available() and warm_up < 0.5:
        warm_up += sum(map(seconds_of, functions))
    rounds = [[*map(seconds_of, functions)] for _ in range(repeat)]
    return [statistics.median(times) for times in zip(*rounds)]


def matmul_rate(dtype, n):
    """Operations per second of one n × n product: what this machine reaches at best, where n is large."""
    a, b = torch.randn(2, n, n, device=here()).to(dtype)
    taken, = seconds(lambda: a @ b)
    return 2 * n ** 3 / taken
