"""Memory is bounded by tokens: the loss is taken in chunks, and a step needs what is computed.

What a step needs at full size is computed on meta tensors (lab/account.py). Here that is checked against what
PyTorch's own allocator hands out for a small model.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

import account
import lmeye
import measure
from lmeye import chunked_cross_entropy

# ---- The loss in chunks --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("opt", "opt-350m", "bloom", "llama"))
@pytest.mark.parametrize("n", (1, 256, 600))
def test_the_loss_in_chunks_is_the_loss(family, n, monkeypatch):
    """Chunks of 256 tokens. Losses and gradients, whatever the weights, equal those of all logits at once."""
    model = tiny_model(family)
    head = model.llm.get_output_embeddings()
    vocabulary, width = head.weight.shape
    monkeypatch.setattr(lmeye, "LOGITS_AT_ONCE", 256 * vocabulary + 7)
    torch.manual_seed(1)
    h, weight = torch.randn(n, width, requires_grad=True), torch.rand(n)
    targets, largest = torch.randint(0, vocabulary, (n,)), []
    with head.register_forward_hook(lambda module, inputs, logits: largest.append(len(logits))):
        mine = chunked_cross_entropy(h, targets, head)
    assert max(largest) == min(n, 256) and sum(largest) == n
    right = F.cross_entropy(model.logits(h), targets, reduction="none")
    assert torch.allclose(mine, right, rtol=1e-6, atol=1e-6)
    gradient, = torch.autograd.grad((mine * weight).sum(), h)
    right_gradient, = torch.autograd.grad((right * weight).sum(), h)
    assert (gradient - right_gradient).norm() <= 1e-6 * right_gradient.norm()
    frozen = chunked_cross_entropy(h.detach(), targets, head)  # nothing asks for a gradient
    assert torch.equal(frozen, mine.detach()) and not frozen.requires_grad


def test_logits_and_losses_are_fp32_whatever_the_weights():
    """Rounded to fp16, a large vocabulary's probabilities would be off in the third digit."""
    model = tiny_model()
    model.llm.half()
    head, h, targets = model.llm.get_output_embeddings(), torch.randn(5, 64).half(), torch.arange(5)
    logits, losses = model.logits(h), chunked_cross_entropy(h, targets, head)
    assert logits.dtype == losses.dtype == torch.float32
    assert torch.equal(losses, F.cross_entropy(head(h).float(), targets, reduction="none"))


# ---- The account ---------------------------------------------------------------------------------------


def allocated(function):
    """The most bytes that PyTorch's own allocator had handed out at once for what a function made."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("size", ("small", "small-bloom"))
@pytest.mark.parametrize("stage_, question, answer", account.STAGES)
def test_the_account_agrees_with_what_the_allocator_hands_out(size, stage_, question, answer, monkeypatch):
    """To 2% beside the weights. With attention written out, for CUDA's kernels are not those of a CPU."""
    monkeypatch.setitem(measure.SIZES, size, (256, 4, 4, 5000))
    random_clip = measure.random_clip
    monkeypatch.setattr(measure, "random_clip", lambda size, *where: random_clip("tiny", *where))
    with account.accounting() as counted:
        model = measure.random_model(size, torch.float32, account.META)
        model.llm.set_attn_implementation("eager")
        weights = counted.live
        peak = account.train_step(counted, model, stage_, 16, question, answer)
        assert counted.live == weights  # all that a step made is gone
    real = measure.random_model(size, torch.float32, "cpu")
    real.llm.set_attn_implementation("eager")
    real.train()
    trained = real.set_trained(stage_)
    f, tokens = measure.random_batch(real, 16, question, answer)

    def forward_and_backward():
        (real(f, tokens) / tokens.answer_mask.sum()).backward()

    assert weights == pytest.approx(sum(t.nbytes for t in [*real.parameters(), *real.buffers()]), rel=0.02)
    state = sum(2 * p.nbytes for p in trained.values())
    assert peak - weights - state == pytest.approx(allocated(forward_and_backward), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("size, most", [
    ("opt-1.3b", {1: 7.6e9, 2: 6.5e9}), ("bloomz-7b1", {1: 27e9, 2: 27e9})])
def test_what_a_step_of_4096_tokens_needs_at_full_size(size, most):
    for stage_, _, weights, peak in account.steps_of(size, budgets=(4096,)):
        assert weights < peak <= most[stage_]


def test_flags_for_a_card():
    peaks = {2048: 5.0e9, 8192: 11.0e9}  # about 1 GB a thousand tokens, and 3 GB whatever there is
    assert account.flags_for(8, peaks) == "--max-batch-tokens 3584 --accumulate 2"
    assert account.flags_for(80, peaks) == "--max-batch-tokens 8192"
    assert account.flags_for(4, peaks) == "does not fit"
