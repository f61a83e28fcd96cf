"""Speed and memory, side by side in one run. Random weights serve: they cost the same.

    python tests/lab/benchmark.py                    every row that this machine can run, but for the last two
    python tests/lab/benchmark.py train first        the rows with these names
    python tests/lab/benchmark.py account            does it fit my card? Computed, on any machine, in three minutes
    python tests/lab/benchmark.py gpu                all that only a GPU can show, most important first, in four minutes

    train       phase-2 samples/s against the authors' schedule (batch 1 × 16, two whole passes, logits everywhere)
    share       a step's share of the machine's matmul rate, measured beside it; operations are counted as they run
    first       time to the first token of `full` over that of `static`, and of two whole passes over it
    generate    tokens/s against transformers' own `generate` on the same language model without a picture
    features    pictures/s of decoding alone, of CLIP's image tower alone, and of the feature pass
    padding     tokens computed over tokens real, on lengths as in LLaVA-Instruct-150K
    chunks      a step's time with the loss in chunks over the same with all logits at once
    zip         seconds to open a zip archive of a million pictures
    grow        step time as one thing grows: batch, prompt, N, slots, language model
    full-size   OPT-1.3b and ViT-L/14 in bf16: a step of each phase and an answer, with the peak of memory
    mini        seconds of the README's commands for a laptop
    epoch       phase 1 on 595,375 pairs, features included, projected from the rates
    memory      peak memory and time of a step for each size of language model, in bf16 and fp16 (needs CUDA)
    account     memory, operations and kernels of a step at full size, and the flags for a card: see account.py
    gpu         see on_gpu.py; with --dry on tiny models, on whatever there is, to see that it would run
"""

import argparse
import gc
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for repeatable products; has to be there before CUDA is

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import account
import data
import lmeye
import measure
import on_gpu
from measure import random_batch, seconds, step

ROOT = Path(__file__).resolve().parents[2]


class Scale(NamedTuple):
    """How large the measurements are."""
    size: str  # of the language model
    dtype: torch.dtype
    records: tuple  # in a step: the first, and more in rows that compare some
    pictures: int
    prompts: tuple  # lengths
    repeat: int
    product: int  # n, for the machine's rate in n × n products
    sizes: tuple  # of the language models in rows that compare some


GPU = Scale("opt-1.3b", torch.bfloat16, (48, 192, 384), 2048, (40, 200, 800), 5, 8192, account.MODELS)
CPU = Scale("opt-125m", torch.float32, (16,), 32, (40, 200, 800), 3, 2048, ("opt-125m", "opt-350m"))
DRY = Scale("tiny", torch.float32, (4,), 8, (40,), 1, 256, ("tiny", "tiny-bloom"))


def make(scale, **settings):
    return measure.random_model(scale.size, scale.dtype, **settings)


# ---- The rows: each yields lines -------------------------------------------------------------------------------


def train(scale):
    model, n = make(scale), min(16, scale.records[0])
    batch, optimizer = random_batch(model, n, 40, 44), measure.optimizer_of(model, 2)
    ours, theirs = seconds(lambda: step(model, batch, optimizer), lambda: measure.authors_step(model, batch, optimizer),
                           repeat=min(3, scale.repeat))
    yield (f"{scale.size}, phase 2, {n} records of 40 + 44 tokens: {n / ours:.1f} samples/s, the authors' schedule "
           f"{n / theirs:.1f}: {theirs / ours:.2f} ×")


def share(scale):
    model, rate = make(scale), measure.matmul_rate(scale.dtype, scale.product)
    yield f"{rate / 1e12:.2f} T operations/s in a product of {scale.product} × {scale.product} numbers"
    for stage, question, answer in ((1, 0, 44), (2, 40, 44)):
        optimizer = measure.optimizer_of(model, stage)
        for records in scale.records:
            batch = random_batch(model, records, question, answer)
            operations = measure.operations(lambda: step(model, batch, optimizer))
            taken, = seconds(lambda: step(model, batch, optimizer), repeat=scale.repeat)
            text = (f"{scale.size}, phase {stage}, {records} records of {question} + {answer} tokens: "
                    f"{1000 * taken:.0f} ms, {100 * operations / taken / rate:.0f}%")
            if torch.cuda.is_available():
                start = time.perf_counter()
                step(model, batch, optimizer)  # comes back when all kernels are queued
                text += f"; the processor is done with it after {1000 * (time.perf_counter() - start):.0f} ms"
                measure.wait()
            yield text


def first(scale):
    full = make(scale)
    static = make(scale, llm=full.llm, variant="static")
    for length in scale.prompts:
        f, tokens = random_batch(full, 1, length, 1)
        f, question, mask = full.to_device(f, tokens.question, tokens.question_mask)

        @torch.no_grad()
        def to_first_token(model):
            x, whole_mask, cache = model.read_prompt(f, question, mask)
            h, _ = model.run_llm(x, whole_mask, cache)
            return model.logits(h[:, -1]).argmax(-1)

        def last_state(x):
            h, _ = full.run_llm(x, torch.ones(x.shape[:2], dtype=torch.long, device=full.device))
            return h[:, -1]

        @torch.no_grad()
        def two_whole_passes():
            prefix = torch.cat([full.embed(full.image_words)[None], full.see(f), full.embed(question)], 1)
            h = last_state(torch.cat([prefix, full.img_d.expand(1, full.settings.n_slots, -1)], 1))
            slots = full.tell(full.interact(f, full.ask(h)))
            h = last_state(torch.cat([prefix, slots, full.embed(full.answer_ids)[None]], 1))
            return full.logits(h).argmax(-1)

        a, b, c = seconds(lambda: to_first_token(full), lambda: to_first_token(static), two_whole_passes,
                          repeat=5 * scale.repeat)
        yield (f"{scale.size}, prompt of {length}: full {1000 * a:.1f} ms, static {1000 * b:.1f} ms: {a / b:.2f}; two "
               f"whole passes {c / b:.2f}")


def generate(scale):
    model = make(scale)
    few, many = (2, 4) if scale == DRY else (8, 48)
    model.tokenizer.eos_token = "<unk>"  # which random weights write as seldom as any word: they rarely end early
    for B in (1, 32):
        f = torch.randn(B, model.align.in_features)
        ids = torch.randint(10, 50, (B, 45), device=model.device)

        def ours(n):
            return list(model.stream(f, ["two " * 40] * B, max_tokens=n))

        def theirs(n):
            return model.llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                      do_sample=False)

        a, b, c, d = seconds(lambda: ours(few), lambda: ours(many), lambda: theirs(few), lambda: theirs(many), repeat=2)
        mine, other = B * (many - few) / (b - a), B * (many - few) / (d - c)  # without the prompt's time
        yield f"{scale.size}, batch {B}: {mine:.0f} tokens/s, transformers' generate {other:.0f}: {mine / other:.2f} ×"


def photographs(folder, n):
    """Paths of n pictures as large as COCO's, of which 64 are there."""
    rng = np.random.default_rng(0)
    for i in range(64):
        small = rng.integers(0, 255, (15, 20, 3), np.uint8)
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=90)
    return [f"{folder}/{i % 64}.jpg" for i in range(n)]


def features(scale):
    model, n = make(scale), scale.pictures
    side = model.preprocess(Image.new("RGB", (640, 480))).shape[-1]
    with tempfile.TemporaryDirectory() as folder:
        images, size = photographs(folder, n), min(128, n)
        pixels = torch.randn(size, 3, side, side)

        def decode():
            for _ in data.decode(model.preprocess, images, 32):
                pass

        def encode():
            for _ in range(n // size):
                model.encode_image(pixels)

        decoding, tower, both = seconds(decode, encode, lambda: data.encode_images(model, images, batch_size=size),
                                        repeat=min(2, scale.repeat))
    yield (f"pictures/s: decoding {n / decoding:.0f}, the image tower {n / tower:.1f}, the feature pass "
           f"{n / both:.1f}, {100 * max(decoding, tower) / both:.0f}% of the slower")


def llava_like_lengths(n):
    """Conversations of some turns, whose prompts grow, and single long answers: about as in LLaVA-Instruct-150K."""
    rng, lengths = np.random.default_rng(0), []
    while len(lengths) < n:
        prompt = 0
        for _ in range(rng.integers(1, 8)):
            question, answer = rng.integers(7, 22), int(rng.lognormal(3.3, 0.7)) + 2
            lengths.append((prompt + question, answer))
            prompt += question + answer
        lengths.append((rng.integers(10, 30), max(20, int(rng.normal(130, 40)))))
    return lengths


def padding(scale):
    lengths = llava_like_lengths(100_000)
    dataset = data.Dataset([], [(range(q), range(a)) for q, a in lengths], None, None)
    lengths = np.array(lengths)
    for name, size, tokens in (("64 records", 64, None), ("4,096 tokens", 1000, 4096)):
        start = time.perf_counter()
        plan = data.plan_epoch(dataset, size, tokens, 0, 0)
        padded = sum(len(rows) * lengths[rows].max(0).sum() for rows in plan)
        yield (f"batches of {name}: {padded / lengths.sum():.3f}, planned in {time.perf_counter() - start:.1f} s for "
               f"{len(lengths):,} records")


def chunks(scale):
    model, B = make(scale), 8 if scale == DRY else 24  # 1,056 labelled tokens: three chunks

    def all_at_once(h, targets, head):
        return F.cross_entropy(head(h).float(), targets, reduction="none")

    for stage, question, answer in ((1, 0, 44), (2, 40, 44)):
        optimizer, batch = measure.optimizer_of(model, stage), random_batch(model, B, question, answer)

        def whole():
            with mock.patch.object(lmeye.TokenLosses, "apply", all_at_once):
                step(model, batch, optimizer)

        ours, other = seconds(lambda: step(model, batch, optimizer), whole, repeat=scale.repeat)
        yield (f"{scale.size}, phase {stage}, {B} records: {B / ours:.2f} samples/s in chunks, {B / other:.2f} with "
               f"all logits at once: {other / ours:.2f} ×")


def zip_(scale):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pictures.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(1_000_000):
                archive.writestr(zipfile.ZipInfo(f"GCC_train_{i:09d}.jpg"), b"")
        start = time.perf_counter()
        data.open_place(path)
        yield f"{time.perf_counter() - start:.1f} s"


def grow(scale):
    model, B = make(scale), 4 if scale == CPU else 16

    def milliseconds(model, records, question):
        optimizer, batch = measure.optimizer_of(model, 2), random_batch(model, records, question, 44)
        taken, = seconds(lambda: step(model, batch, optimizer), repeat=2)
        return f"{1000 * taken:.0f} ms"

    yield "batch: " + ", ".join(f"{n}: {milliseconds(model, n, 40)}" for n in (1, 2, 4, 8, 16))
    yield "prompt: " + ", ".join(f"{n}: {milliseconds(model, B, n)}" for n in (40, 80, 160, 320, 640))
    times = [f"{n}: {milliseconds(make(scale, llm=model.llm, n_features=n), B, 40)}" for n in (1, 5, 20, 70)]
    yield "N: " + ", ".join(times)
    times = [f"{n}: {milliseconds(make(scale, llm=model.llm, n_slots=n), B, 40)}" for n in (1, 5, 20)]
    yield "slots: " + ", ".join(times)
    model = None
    times = [f"{size}: {milliseconds(measure.random_model(size, scale.dtype), B, 40)}" for size in scale.sizes]
    yield "language model: " + ", ".join(times)


def full_size(scale):
    size = "tiny" if scale == DRY else "opt-1.3b"
    reset_peak()
    model = measure.random_model(size, torch.bfloat16)
    for stage, question in ((1, 0), (2, 40)):
        optimizer, batch = measure.optimizer_of(model, stage), random_batch(model, 2, question, 20)
        taken, = seconds(lambda: step(model, batch, optimizer), repeat=1)
        yield f"phase {stage}: a step of 2 records in {taken:.2f} s"
    start = time.perf_counter()
    picture = model.preprocess(Image.new("RGB", (640, 480)))[None]
    model.eval().generate(model.encode_image(picture), ["what color is it?"], max_tokens=8)
    yield f"an answer of 8 tokens, picture included, in {time.perf_counter() - start:.1f} s"
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # of the process, since it began
    yield f"peak memory {peak / 1e9:.1f} GB, the image tower included"


def reset_peak():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(scale):
    for size in scale.sizes:
        for dtype in (torch.bfloat16, torch.float16):
            try:
                model = measure.random_model(size, dtype)
                model.clip.visual = None
                for stage, question, answer in account.STAGES:
                    for budget in account.BUDGETS:
                        optimizer = measure.optimizer_of(model, stage)
                        batch = random_batch(model, budget // (question + answer), question, answer)
                        reset_peak()
                        taken, = seconds(lambda: step(model, batch, optimizer), repeat=3)
                        peak = torch.cuda.max_memory_allocated() / 1e9
                        yield (f"{size}, {measure.PRECISIONS[dtype]}, phase {stage}, {budget:,} tokens: {peak:.2f} GB, "
                               f"{1000 * taken:.0f} ms")
            except torch.OutOfMemoryError:
                yield f"{size}, {measure.PRECISIONS[dtype]}: the rest does not fit into this card"
            model = optimizer = batch = None


def mini(scale):
    rate = measure.matmul_rate(torch.float32, scale.product)
    yield f"this machine multiplies matrices at {rate / 1e9:.0f} G operations/s in fp32"
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        commands = {"the miniature and stage 1": ["train.py", "--stage", "1", "--preset", "mini"],
                    "stage 2": ["train.py", "--stage", "2", "--preset", "mini"],
                    "an answer": ["sample.py", f"{folder}/mini/examples/1.png", "what shape is it?"]}
        for name, (program, *flags) in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / program, *flags, "--out", folder], check=True, capture_output=True)
            total += time.perf_counter() - start
            yield f"{name}: {time.perf_counter() - start:.0f} s, in all {total:.0f} s"


def epoch(scale):
    model, pairs, B = make(scale), 595_375, 128 if scale == GPU else 4
    batch, optimizer = random_batch(model, B, 0, 16), measure.optimizer_of(model, 1)
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(folder, scale.pictures)
        encoding, stepping = seconds(lambda: data.encode_images(model, images, batch_size=B),
                                     lambda: step(model, batch, optimizer), repeat=min(2, scale.repeat))
    yield (f"{scale.size}, {pairs:,} pairs: {pairs / len(images) * encoding / 60:.1f} minutes of features, decoding "
           f"included, and {pairs / B * stepping / 60:.1f} of training")


def account_(scale):
    if scale == DRY:
        return account.rows(models=DRY.sizes, budgets=(256, 512))
    return account.rows()


ROWS = {"train": train, "share": share, "first": first, "generate": generate, "features": features, "padding": padding,
        "chunks": chunks, "zip": zip_, "grow": grow, "full-size": full_size, "mini": mini, "epoch": epoch,
        "memory": memory, "account": account_}
CUDA_ONLY = ("epoch", "memory")


def main():
    logging.disable(logging.WARNING)  # open_clip's, about weights that are random on purpose
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help=f"one of {', '.join(ROWS)}, gpu (default: all but the last two)")
    parser.add_argument("--dry", action="store_true", help="on tiny models: only to see that a row runs")
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS and row != "gpu":
            raise lmeye.UserError(f"no such row: {row}; there are {', '.join(ROWS)}, gpu")
    cuda = torch.cuda.is_available()
    scale = DRY if args.dry else GPU if cuda else CPU
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    rows = args.rows or [row for row in ROWS if row != "account"]
    for row in rows:
        torch.manual_seed(0)
        if row == "gpu" and not cuda and not args.dry:
            print("gpu        there is no CUDA GPU here: nothing was run (--dry runs it on tiny models)", flush=True)
        elif row == "gpu":
            on_gpu.session([train, share, first, generate, features, epoch], scale, args.dry)
        elif row in CUDA_ONLY and not cuda:
            print(f"{row:<10} needs a CUDA GPU", flush=True)
        else:
            for line in ROWS[row](scale):
                print(f"{'dry ' if args.dry else ''}{row:<10} {line}", flush=True)


if __name__ == "__main__":
    lmeye.run_main(main)
