"""All that only a GPU can show, most important first: a run may be broken off.

    python tests/lab/benchmark.py gpu            on a CUDA GPU
    python tests/lab/benchmark.py gpu --dry      on tiny models, on whatever there is

First what must hold, each with its bound: CUDA gives what the CPU gives; a run that was interrupted ends as
one that was not, to the bit; a full-size model trains and answers in bf16 and fp16; memory is what
account.py computes. Then what is measured: a step's share of the machine's rate, and rows of benchmark.py.
Each line is printed when it is known, with the seconds since the start; the last line counts what held.
"""

import contextlib
import copy
import csv
import gc
import io
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import account
import data
import lmeye
import measure
import train

KINDS = ((1, "lmeye"), (2, "lmeye"), (2, "static"), (2, "norequest"))  # phase 1 is the same for all
BOUNDS = {  # of the loss, and of each gradient, against fp32 arithmetic on the CPU with the same weights
    torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 0.2), torch.float16: (3e-3, 0.05),
}


def check(holds, text):
    """A line about what must hold, as the parts below yield it."""
    return f"{'held  ' if holds else 'FAILED'}  {text}"


def session(rows, scale):
    """Run everything and `rows` of benchmark.py; yield lines. What raises is told, and the rest goes on."""
    start, checks, held = time.perf_counter(), 0, 0
    for part in (equals_cpu, resumes, full_size, memory, share, *rows):
        for line in lines_of(part, scale):
            checks += line.startswith(("held", "FAILED"))
            held += line.startswith("held")
            yield f"{time.perf_counter() - start:>5.0f} s  {part.__name__}: {line}"
        free_memory()
    yield f"{held} of {checks} held"


def lines_of(part, scale):
    try:
        yield from part(scale)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        yield check(False, f"{type(error).__name__}: {text}")


def free_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- CUDA gives what the CPU gives ---------------------------------------------------------------------


def equals_cpu(scale):
    """Loss and gradients of tiny models, against fp32 on the CPU with the same weights."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for dtype, (loss_bound, gradient_bound) in BOUNDS.items():
        for size in ("tiny", "tiny-bloom"):
            for stage, variant in KINDS:
                loss, gradient = distance(size, dtype, stage, variant)
                name = f"{size} in {measure.PRECISIONS[dtype]}, phase {stage}, {variant}"
                yield check(loss <= loss_bound and gradient <= gradient_bound,
                            f"{name}: loss to {loss:.1e} (bound {loss_bound:g}), "
                            f"gradients to {gradient:.1e} (bound {gradient_bound:g})")


def distance(size, dtype, stage, variant):
    """Relative distances from the CPU's fp32 → (of the loss, the largest of a gradient)."""
    torch.manual_seed(0)
    tested = measure.random_model(size, dtype, "cpu", variant=variant, dropout=0.0)
    for p in tested.llm.parameters():  # as initialised they are so small that mistakes would hide in rounding
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    reference = copy.deepcopy(tested).float()
    tested.to(measure.here())
    f, tokens = measure.random_batch(reference, 5, 7 if stage == 2 else 0, 6)
    tokens.answer_mask[1, 3:] = 0  # a shorter answer
    if stage == 2:
        tokens.question_mask[2, :4] = 0  # a shorter question
    results = []
    for model in (tested, reference):
        trained = model.set_trained(stage)
        loss = model(f, tokens) / tokens.answer_mask.sum()
        loss.backward()
        results.append((loss.item(), {name: p.grad.cpu() for name, p in trained.items()}))
    (loss, gradients), (right_loss, right_gradients) = results
    worst = 0.0
    for name, right in right_gradients.items():
        worst = max(worst, ((gradients[name] - right).norm() / right.norm()).item())
    return abs(loss - right_loss) / abs(right_loss), worst


# ---- A run that was interrupted ends as one that was not -----------------------------------------------


def random_dataset(model, stage, records, question, answer):
    """A Dataset of random tokens and features, each record with a picture of its own."""
    rng = np.random.default_rng(0)
    turns = ("what is it?",) if stage == 2 else ()
    rows = [data.Record(f"{i}.jpg", turns, "a thing") for i in range(records)]
    tokens = []
    for _ in rows:
        asked = rng.integers(question // 2, question) if stage == 2 else 0
        lengths = (asked, rng.integers(answer // 2, answer))
        tokens.append([rng.integers(10, 50, length).tolist() for length in lengths])
    features = rng.normal(size=(records, model.align.in_features)).astype(np.float16)
    return data.Dataset(rows, tokens, features, np.arange(records))


def quietly_train(*args, **options):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.train_adapter(*args, **options)


def resumes(scale):
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in BOUNDS:
            with tempfile.TemporaryDirectory() as folder:
                whole, resumed = run_twice(Path(folder), dtype)
            same = all(torch.equal(whole[name], resumed[name]) for name in whole)
            ends = "as one that was not, to the bit" if same else "otherwise than one that was not"
            precision = measure.PRECISIONS[dtype]
            yield check(same, f"a run in {precision} that was interrupted and resumed ends {ends}")
    finally:
        torch.use_deterministic_algorithms(False)


def run_twice(folder, dtype):
    """Adapters of two runs on tiny models. The second is interrupted in its fourth step, and resumed."""
    whole = short_run(folder / "whole", dtype)
    interrupted = mock.patch.object(train.Run, "note_line", side_effect=["", "", "", KeyboardInterrupt])
    with contextlib.suppress(KeyboardInterrupt), interrupted:
        short_run(folder / "resumed", dtype)
    if not (folder / "resumed" / train.STATE).is_file():
        raise RuntimeError("the interrupted run left no state")
    return whole, short_run(folder / "resumed", dtype, resume=True)


def short_run(folder, dtype, resume=False):
    """Six steps of two batches, with dropout; the state is saved after each → the adapter {name: tensor}."""
    torch.manual_seed(0)
    model = measure.random_model("tiny", dtype)
    dataset = random_dataset(model, 2, 12, 8, 6)
    quietly_train(model, 2, dataset, None, folder, 6, batch_size=4, lr=1e-2, accumulate=2, resume=resume)
    return lmeye.read_adapter(folder / lmeye.CHECKPOINT)[3]


# ---- Full size -----------------------------------------------------------------------------------------


def full_size(scale):
    """The real loop on a full-size model with random weights, both phases, and an answer."""
    for dtype in (torch.bfloat16, torch.float16):
        name = f"{scale.size} in {measure.PRECISIONS[dtype]}"
        torch.manual_seed(0)
        model = measure.random_model(scale.size, dtype)
        for stage in (1, 2):
            dataset = random_dataset(model, stage, 96, 60, 30)
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder, "run")
                quietly_train(model, stage, dataset, None, run, steps=6, batch_size=16, lr=1e-3)
                with open(run / "log.csv") as file:
                    last = list(csv.DictReader(file))[-1]
            finite = all(p.isfinite().all() for p in model.adapter(2).values()) and float(last["loss"]) < 100
            few_skipped = int(last["skipped"]) <= 2  # fp16's scaler may begin too high
            yield check(finite and few_skipped,
                        f"{name}, phase {stage}: 6 steps of 16 records, the last loss {last['loss']}, "
                        f"steps skipped {last['skipped']}, {last['tokens_per_second']} tokens/s")
        model.eval()
        question = ["what color is it?"]
        f = model.encode_image(model.preprocess(Image.new("RGB", (640, 480), "red"))[None])
        text = model.generate(f, question, max_tokens=8)[0]
        logp = model.score(f, question, [["red", "blue"]])
        yield check(f.isfinite().all() and logp.isfinite().all(),
                    f"{name}: an answer about a picture ({lmeye.printable(text)[:40]!r})")
        model = None


# ---- Memory, and share of the rate ---------------------------------------------------------------------


def memory(scale):
    """The peak of a step beside the computed one. The model that most will take comes first."""
    for size in sorted(scale.sizes, key=lambda name: name != scale.size):
        needs = {(stage, budget): peak for stage, budget, _, peak in account.steps_of(size, scale.budgets)}
        free_memory()
        model = measure.random_model(size, torch.bfloat16)
        model.clip.visual = None
        for stage, question, answer in account.STAGES:
            optimizer = measure.optimizer_of(model, stage)
            for budget in scale.budgets:
                batch = measure.random_batch(model, budget // (question + answer), question, answer)
                batch[1].answer_mask[0, -1] = 0  # so that a mask has to be made, as is computed
                for _ in range(2):  # in the second the optimiser has its state
                    if torch.cuda.is_available():
                        torch.cuda.reset_peak_memory_stats()
                    measure.step(model, batch, optimizer)
                need = needs[stage, budget]
                name = f"{size}, phase {stage}, {budget:,} tokens: computed {need / 1e9:.2f} GB"
                if scale.size == "tiny":
                    yield f"{name}, not measured"
                    continue
                peak = torch.cuda.max_memory_allocated()
                yield check(abs(peak / need - 1) <= 0.1,
                            f"{name}, measured {peak / 1e9:.2f}: {peak / need:.3f} ×")
            model.zero_grad()
        model = optimizer = None


def share(scale):
    """A step's share of the machine's matmul rate, measured beside it; operations are counted as they run."""
    model = measure.random_model(scale.size, scale.dtype)
    rate = measure.matmul_rate(scale.dtype, scale.product)
    yield f"{rate / 1e12:.2f} T operations/s in a product of {scale.product} × {scale.product} numbers"
    for stage, question, answer in ((1, 0, 44), (2, 40, 44)):
        optimizer = measure.optimizer_of(model, stage)
        for records in scale.records:
            batch = measure.random_batch(model, records, question, answer)
            operations = measure.operations(lambda: measure.step(model, batch, optimizer))
            taken, = measure.seconds(lambda: measure.step(model, batch, optimizer), repeat=scale.repeat)
            yield (f"{scale.size}, phase {stage}, {records} records of {question} + {answer} tokens: "
                   f"{1000 * taken:.0f} ms, {100 * operations / taken / rate:.0f}%")
