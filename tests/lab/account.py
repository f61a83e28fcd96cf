"""The memory that a step needs at full size, computed on any machine, on meta tensors.

    python tests/lab/benchmark.py account

A meta tensor has a shape and no values, so OPT-1.3b or Bloomz-7b1 "runs" here in seconds. Each operation of
PyTorch passes through `Account`, which adds up the tensors that are alive. Attention is taken as CUDA takes
it: flash attention where there is no mask, the memory-efficient kernel where there is one; BLOOM's is
written out in transformers. Not in the sums: CUDA's own context (about half a GB), what its allocator
leaves unused, workspace.
"""

import contextlib
import math
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import measure

aten = torch.ops.aten
META = torch.device("meta")
BLOCK = 512  # bytes: CUDA's allocator hands out multiples


class Account(TorchDispatchMode):
    """Adds up the bytes of the meta tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()  # addresses of the storages that are counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_meta = any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, kwargs)))
        if on_meta and function is aten._local_scalar_dense.default:
            return False  # as if rows were padded: then transformers makes a mask
        if on_meta and function is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # read back
        out = function(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        address = storage._cdata
        if address in self.known:
            return
        size = (storage.nbytes() + BLOCK - 1) // BLOCK * BLOCK
        self.known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, address, size)

    def drop(self, address, size):
        self.known.discard(address)
        self.live -= size

    def peak_of(self, function):
        """Run a function → the most bytes that were alive at once, with those from before."""
        self.peak = self.live
        function()
        return self.peak


def cuda_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention with the kernel that CUDA takes."""
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # the kernel adds its mask
            minus_infinity = torch.full((), float("-inf"), dtype=q.dtype, device=q.device)
            attn_mask = torch.where(attn_mask, 0.0, minus_infinity).to(q.dtype)
        columns = attn_mask.shape[-1]
        if columns % 8:  # each row has to begin at a multiple of eight
            attn_mask = F.pad(attn_mask, (0, 8 - columns % 8))[..., :columns]
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def accounting():
    """→ an Account, for all meta tensors that are made inside."""
    with mock.patch.object(F, "scaled_dot_product_attention", cuda_attention), Account() as account:
        yield account


# ---- What is accounted for -----------------------------------------------------------------------------


def train_step(account, model, stage, B, question, answer):
    """The peak of a training step with gradients and the optimiser's state, in bytes."""
    model.train()
    trained = model.set_trained(stage)
    state = [torch.zeros_like(p) for p in trained.values() for _ in range(2)]
    f, tokens = measure.random_batch(model, B, question, answer)

    def forward_and_backward():
        (model(f, tokens) / (B * answer)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)

    peak = account.peak_of(forward_and_backward)
    model.zero_grad()
    del state
    return peak


# ---- The tables ----------------------------------------------------------------------------------------

STAGES = ((1, 0, 64), (2, 64, 64))  # tokens of question and answer that a record is taken to have
BUDGETS = (2048, 4096, 8192)  # --max-batch-tokens
MODELS = ("opt-125m", "opt-1.3b", "opt-6.7b", "bloomz-7b1")
CARDS = (8, 16, 24, 80)  # GB


def steps_of(size, budgets=BUDGETS):
    """Yield (stage, budget, bytes of the weights, peak of a step), in bf16, without CLIP's image tower."""
    with accounting() as account:
        model = measure.random_model(size, torch.bfloat16, META)
        model.clip.visual = None
        weights = account.live
        for stage, question, answer in STAGES:
            for budget in budgets:
                B = budget // (question + answer)
                yield stage, budget, weights, train_step(account, model, stage, B, question, answer)


def rows(models=MODELS, budgets=BUDGETS):
    """Yield the lines of two tables: does it fit my card, and the flags for a card."""
    yield "computed, not measured; frozen weights in bf16; GB, without CUDA's context"
    yield f"records of {STAGES[0][2]} tokens in phase 1, of {STAGES[1][1]} + {STAGES[1][2]} in phase 2"
    yield f"{'':22} tokens a step  weights   a step"
    peaks = {}
    for size in models:
        for stage, budget, weights, peak in steps_of(size, budgets):
            peaks.setdefault((size, stage), {})[budget] = peak
            yield f"{size:<13}phase {stage}  {budget:>14,}{weights / 1e9:>9.1f}{peak / 1e9:>9.2f}"
    yield "flags for a card, computed, with 1 GB and a twentieth of it to spare:"
    for card in CARDS:
        for size in models:
            flags = [f"phase {stage}: {flags_for(card, peaks[size, stage])}" for stage in (1, 2)]
            yield f"{card:>3} GB  {size:<13}{'   '.join(flags)}"


def flags_for(card, peaks):
    """The flags of train.py for a card of so many GB, from {budget: peak in bytes}, which lie on a line."""
    low, high = min(peaks), max(peaks)
    a_token = (peaks[high] - peaks[low]) / (high - low)
    room = 0.95 * card * 1e9 - 1e9
    tokens = int(low + (room - peaks[low]) / a_token) // 256 * 256
    if tokens < 512:
        return "does not fit"
    tokens = min(tokens, 8192)
    accumulate = f" --accumulate {math.ceil(4096 / tokens)}" if tokens < 4096 else ""
    return f"--max-batch-tokens {tokens}{accumulate}"
