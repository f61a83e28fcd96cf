"""Speed and memory, side by side in one run. Random weights serve: they cost the same.

    python tests/lab/benchmark.py                    train, first and padding
    python tests/lab/benchmark.py train first        the rows with these names
    python tests/lab/benchmark.py account            does it fit my card? Computed, on any machine, in minutes
    python tests/lab/benchmark.py gpu                all that only a GPU can show, in minutes

    train       phase-2 samples/s against the authors' schedule (batch 1 × 16, two passes, logits everywhere)
    first       time to the first token of `lmeye` over that of `static`, and of two whole passes over it
    padding     tokens computed over tokens real, on lengths as in LLaVA-Instruct-150K
    account     memory of a step at full size, flags for a card: see account.py
    gpu         see on_gpu.py; with --dry on tiny models, on whatever there is, to see that it would run
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for repeatable products; before CUDA starts

import numpy as np
import torch
import transformers

import account
import data
import lmeye
import measure
import on_gpu


class Scale(NamedTuple):
    """How large the measurements are."""
    size: str  # of the language model
    dtype: torch.dtype
    records: tuple  # in a step: the first, and more in rows that compare some
    prompts: tuple  # lengths
    repeat: int
    product: int  # n, for the machine's rate in n × n products
    sizes: tuple  # of the language models whose memory is computed
    budgets: tuple  # tokens of a step for which it is


ALL = account.MODELS, account.BUDGETS
GPU = Scale("opt-1.3b", torch.bfloat16, (48, 192, 384), (40, 200, 800), 5, 8192, *ALL)
CPU = Scale("opt-125m", torch.float32, (16,), (40, 200, 800), 3, 2048, *ALL)
DRY = Scale("tiny", torch.float32, (4,), (40,), 1, 256, ("tiny", "tiny-bloom"), (256, 512))


# ---- The rows: each yields lines -----------------------------------------------------------------------


def train(scale):
    model, n = measure.random_model(scale.size, scale.dtype), min(16, scale.records[0])
    optimizer = measure.optimizer_of(model, 2)
    f = torch.randn(n, model.align.in_features)
    questions, answers = ["two " * 40] * n, ["two " * 43] * n
    batch = (f, model.tokenize(questions, answers))

    def authors_step():
        """The schedule of the authors' release: one record at a time, two whole passes, logits everywhere."""
        for i in range(n):
            loss, _, _ = lmeye.plain_loss(model, f[i:i + 1].to(model.device), questions[i], answers[i])
            (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()

    ours, theirs = measure.seconds(lambda: measure.step(model, batch, optimizer), authors_step,
                                   repeat=min(3, scale.repeat))
    yield (f"{scale.size}, phase 2, {n} records of {batch[1].lengths()[0]} tokens: {n / ours:.1f} samples/s, "
           f"the authors' schedule {n / theirs:.1f}: {theirs / ours:.2f} ×")


def first(scale):
    asking = measure.random_model(scale.size, scale.dtype)
    static = measure.random_model(scale.size, scale.dtype, llm=asking.llm, variant="static")
    for length in scale.prompts:
        f, tokens = measure.random_batch(asking, 1, length, 1)
        f, question, mask = asking.to_device(f, tokens.question, tokens.question_mask)

        @torch.no_grad()
        def to_first_token(model):
            x, whole_mask, cache = model.read_prompt(f, question, mask)
            h, _ = model.run_llm(x, whole_mask, cache)
            return model.logits(h[:, -1]).argmax(-1)

        def last_state(*parts):
            x = torch.cat(parts, 1)
            h, _ = asking.run_llm(x, torch.ones(x.shape[:2], dtype=torch.long, device=asking.device))
            return h[:, -1]

        @torch.no_grad()
        def two_whole_passes():
            prefix = (asking.embed(asking.image_words)[None], asking.see(f), asking.embed(question))
            h = last_state(*prefix, asking.img_d.expand(1, asking.settings.n_slots, -1))
            slots = asking.tell(asking.interact(f, asking.ask(h)))
            h = last_state(*prefix, slots, asking.embed(asking.answer_words)[None])
            return asking.logits(h).argmax(-1)

        a, b, c = measure.seconds(lambda: to_first_token(asking), lambda: to_first_token(static),
                                  two_whole_passes, repeat=5 * scale.repeat)
        yield (f"{scale.size}, prompt of {length}: lmeye {1000 * a:.1f} ms, static {1000 * b:.1f} ms: "
               f"{a / b:.2f}; two whole passes {c / b:.2f}")


def llava_like_lengths(n):
    """Lengths (prompt, answer) of n records or a few more, about as in LLaVA-Instruct-150K: conversations
    of some turns, whose prompts grow, and single long answers."""
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
    dataset = data.Dataset([], [(range(question), range(answer)) for question, answer in lengths], None, None)
    lengths = np.array(lengths)
    for name, size, tokens in (("64 records", 64, 10 ** 9), ("4,096 tokens", 1000, 4096),
                               ("both, as train.py makes them", 64, 4096)):
        plan = data.plan_epoch(dataset, size, tokens, 0, 0)
        computed = sum(len(rows) * lengths[rows].max(0).sum() for rows in plan)
        yield (f"batches of {name}: {computed / lengths.sum():.3f} tokens for each real one, "
               f"{len(lengths) / len(plan):.1f} records a batch")


def gpu(scale):
    if scale == CPU:
        yield "there is no CUDA GPU here: nothing was run (--dry runs it on tiny models)"
    else:
        yield from on_gpu.session((train, first), scale)


ROWS = {"train": train, "first": first, "padding": padding, "gpu": gpu,
        "account": lambda scale: account.rows(scale.sizes, scale.budgets)}


def main():
    logging.disable(logging.WARNING)  # open_clip's, about weights that are random on purpose
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--dry", action="store_true", help="on tiny models: only to see that a row runs")
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS:
            raise lmeye.UserError(f"no such row: {row}; there are {', '.join(ROWS)}")
    cuda = torch.cuda.is_available()
    scale = DRY if args.dry else GPU if cuda else CPU
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for row in args.rows or ("train", "first", "padding"):
        torch.manual_seed(0)
        for line in ROWS[row](scale):
            print(f"{'dry ' if args.dry else ''}{row:<10} {line}", flush=True)


if __name__ == "__main__":
    lmeye.run_main(main)
