"""Train LMEye.

    python train.py --stage 1        phase 1 of the paper: `align` and `img`, on captions
    python train.py --stage 2        phase 2: the other layers, on questions with answers

Without a CUDA GPU, and without other flags, this trains the miniature: a tiny CLIP and a tiny language
model, which are made at first use, and LMEye between them, in minutes. With a GPU it is OPT-1.3b, on the data
that the authors used, once you have fetched it. With models and data of your own:

    python train.py --stage 1 --llm facebook/opt-125m --clip ViT-B-32:openai --data captions.json
    python train.py --stage 2 --llm facebook/opt-125m --clip ViT-B-32:openai --data questions.json

A run works in OUT/MODEL/stage1 or OUT/MODEL/stage2 (stage2-static, stage2-norequest, …-align with these
flags). There, run.json says how it was started and how it scored, log.csv how it went. adapter.safetensors is
written ten times in a run and can be asked at any time; best.safetensors is that of the lowest validation
loss. While state.pt is there the run is not complete, and --resume goes on with it. No run is ever
overwritten: a folder that is in the way gets another name.
"""

import os
import signal
import sys

if __name__ == "__main__":  # the imports take seconds; Ctrl-C meanwhile shall be one line, no traceback
    def leave(*_):
        os.write(2, b"interrupted\n")
        os._exit(130)

    usual_interrupt = signal.signal(signal.SIGINT, leave)

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import shlex
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import filelock
import numpy as np
import open_clip
import torch
import transformers
from torch import nn
from tqdm import tqdm

import data
import lmeye
import sample
from lmeye import CHECKPOINT, PRESETS, VARIANTS, LMEye, Settings, UserError

# What a run takes unless told otherwise, by preset and stage.
DEFAULTS = {
    ("mini", 1): dict(steps=400, batch_size=64, lr=1e-2),
    ("mini", 2): dict(steps=2400, batch_size=64, lr=1e-2),
    ("smollm2", 1): dict(steps=150, batch_size=16, lr=0.11),
    ("smollm2", 2): dict(steps=3000, batch_size=32, lr=0.021),
    ("emoji", 1): dict(steps=400, batch_size=32, lr=0.07),
    ("emoji", 2): dict(steps=700, batch_size=32, lr=0.04),
    ("others", 1): dict(batch_size=128, reach=40),  # reach: see suggested_lr; steps: see default_steps
    ("others", 2): dict(batch_size=64, reach=8),
}
WARMUP = 0.05  # share of the steps in which the learning rate rises; then it falls along a cosine
MAX_NORM = 1.0  # of a step's gradient
MAX_BAD_STEPS = 20  # in a row whose loss or gradient is not finite, before the run gives up
SAVE_EVERY = 200  # steps; the state is saved at each validation as well
STATE = "state.pt"  # in the folder of a run that is not complete
START = "hash of the weights at the start"  # in its recipe


# ---- The loop -----------------------------------------------------------------------------------


def train_adapter(model, stage, train, val, folder, steps, batch_size, lr, max_batch_tokens=4096,
                  accumulate=1, seed=0, train_align=False, resume=False, about=None):
    """Train the layers of one phase on a Dataset; leave adapter, log and run.json in `folder`.

    `val` is a Dataset or None; `about` is a dict for run.json. Trained weights, gradients and loss are fp32.
    All randomness is a function of seed and step, so a state (step, weights, optimizer, scaler, log) is all
    that a run needs to go on, on the same machine, as if nothing had happened. The caller removes STATE when
    nothing is left to do.
    """
    folder = Path(folder)
    trained = model.set_trained(stage, train_align)
    optimizer = torch.optim.AdamW(trained.values(), lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.llm.dtype == torch.float16)
    recipe = {"steps": steps, "batch size": batch_size, "learning rate": lr, "accumulate": accumulate,
              "max batch tokens": max_batch_tokens, "seed": seed, "align trained": "align.weight" in trained}
    recipe |= describe(model, stage, train, val)
    run = Run(folder, stage, steps, model, optimizer, scaler, recipe)
    start = run.resume() if resume and (folder / STATE).exists() else run.begin(about)
    plan = data.batches(train, batch_size, max_batch_tokens, seed)
    plan = itertools.islice(plan, start * accumulate, None)  # a resumed run goes on with the next batch

    with stop_signals() as stop, tqdm(total=steps, initial=start, desc=f"stage {stage}", disable=None) as bar:
        for step in range(start, steps):
            began = time.perf_counter()
            rate = learning_rate(step, steps, lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Dropout depends on seed and step alone, so after an interruption it falls where it would have.
            torch.manual_seed(seed * 1_000_003 + step)
            model.train()  # with dropout, which validations have switched off

            # A step may take several batches, which saves memory. Answers differ in length, so the loss is
            # averaged over all answer tokens of the step. A mean of means would favour short answers.
            batches = [train.batch(next(plan)) for _ in range(accumulate)]
            n_tokens = sum(tokens.answer_mask.sum().item() for _, tokens in batches)
            total = torch.zeros((), device=model.device)
            for f, tokens in batches:
                loss = model(f, tokens) / n_tokens
                # fp16 has nothing below 6e-8, and gradients on their way through fp16 weights can be smaller.
                # So the scaler enlarges the loss, and all gradients with it. For other weights it is off.
                scaler.scale(loss).backward()
                total += loss.detach()

            # No single batch may throw the weights far off, so long gradients are shortened. It is the true
            # ones that are measured, not the enlarged ones: unscale first, then clip.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trained.values(), MAX_NORM)
            loss, norm = torch.stack([total, norm]).tolist()  # the one place where a step waits for a GPU
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                scaler.step(optimizer)
            scaler.update()  # in fp16 a step may not be finite: the scaler then lowers its factor
            optimizer.zero_grad()
            n_read = sum(tokens.lengths().sum().item() for _, tokens in batches)
            run.note_step(step + 1, loss, norm, finite, n_read, time.perf_counter() - began)

            # A language model guesses well without looking. So the validation loss is measured with the
            # pictures shuffled, too: while both are the same, nothing was learned from pictures.
            validated, tenth = {}, is_due(step + 1, steps, parts=10)
            if tenth:
                model.save(folder / CHECKPOINT, stage)
                if val:
                    validated = {"val_loss": mean_loss(model, val, max_batch_tokens),
                                 "val_loss_shuffled": mean_loss(model, data.shuffled(val), max_batch_tokens)}
                    run.keep_best(validated["val_loss"])
            # Save first, print then: whatever happens to the terminal, nothing is lost.
            line = ""
            if step == 0 or is_due(step + 1, steps, parts=100):  # the first step's line shows that it runs
                line = run.note_line(step + 1, rate, validated)
            saved = tenth or (step + 1) % SAVE_EVERY == 0 or stop.is_set()
            if saved:
                run.save_state(step + 1)
            if line:
                bar.write(line + (own_words(model, val, 10 * (step + 1) // steps) if validated else ""))
            if saved and stop.is_set():  # a signal of just now has to wait for a step
                words = [word for word in sys.argv if word != "--resume"]
                raise KeyboardInterrupt(f"stopped after step {step + 1:,} of {steps:,}; to go on:  "
                                        + shlex.join(["python", *words, "--resume"]))
            bar.update()
    print(f"stage {stage}: {steps:,} steps in {run.log['seconds']:.0f} s: {folder / CHECKPOINT}")


def is_due(done, steps, parts):
    """Whether what is done `parts` times in a run, the last time at its end, is due after `done` steps."""
    return done * parts // steps > (done - 1) * parts // steps


def learning_rate(step, steps, peak):
    """Of a step, counted from 0: up to `peak` along a line, then down to 0 along a cosine."""
    warm_up = (step + 1) / (WARMUP * steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * min(warm_up, cosine)


def suggested_lr(reach, model, dataset):
    """The rate at which a step can move the picture's token by `reach` standard deviations of word vectors.

    Adam moves each weight by about the rate, and so each number of align(f) by the rate times the sum of |f|.
    For SmolLM2-135M the standard deviation is 0.136, for the miniature's CLIP the sum is 51: a reach of 40 is
    a rate of 40 · 0.136 / 51 = 0.11. There, 40 in phase 1 and 8 in phase 2 were the best of a few that were
    tried. That they fit other models is a guess.
    """
    size = dataset.f(np.arange(min(1000, len(dataset.records)))).abs().sum(1).mean().item()
    return float(f"{reach * model.word_std / size:.2g}")  # two digits


def default_steps(batches, accumulate):
    """The number of steps that whole epochs take: one, or as many as it takes to make 500 steps."""
    epochs = max(1, math.ceil(500 * accumulate / batches))
    return math.ceil(epochs * batches / accumulate)


@torch.no_grad()
def mean_loss(model, dataset, max_batch_tokens):
    """The loss per token of a Dataset's answers, over at most 256 records, always the same. They are drawn at
    random: kinds of records often come in periods, so the first or every n-th would not do."""
    model.eval()
    drawn = np.random.default_rng(0).permutation(len(dataset.records))[:256]
    part = dataset.take(np.sort(drawn))
    total = count = 0
    for rows in data.plan_epoch(part, 64, max_batch_tokens, seed=0, epoch=0):
        f, tokens = part.batch(rows)
        total += model(f, tokens).item()
        count += tokens.answer_mask.sum().item()
    return total / count


def own_words(model, val, turn):
    """What the model says of a picture, another one each turn: a caption, or two answers."""
    pictures = np.unique(val.picture)
    rows = np.flatnonzero(val.picture == pictures[turn % len(pictures)])[:2]
    questions = [val.records[i].question for i in rows]
    if not val.records[0].turns:  # of captions one will do
        rows, questions = rows[:1], None
    said = ""
    for i, text in zip(rows, model.generate(val.f(rows), questions, max_tokens=32)):
        question, truth = val.records[i].question or "caption:", val.records[i].answer
        said += "\n    " + lmeye.printable(f"{question} → {text} (truth: {truth})")
    return said


# ---- Keeping a run: its log, its state, how it stops and goes on --------------------------------


class Run:
    """What a run has been so far: the log, in memory and in log.csv, and the state, in STATE."""

    def __init__(self, folder, stage, steps, model, optimizer, scaler, recipe):
        self.folder, self.stage, self.steps = folder, stage, steps
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.recipe = recipe  # what must be the same for a run to go on exactly
        self.log = {"lines": [], "losses": [], "norms": [], "tokens": 0, "skipped": 0, "bad in a row": 0,
                    "best": math.inf, "seconds": 0.0, "seconds in steps": 0.0}
        self.clock = time.perf_counter()

    def begin(self, about):
        """Start anew in an empty folder → 0, the first step."""
        sample.set_aside(self.folder)
        text = json.dumps((about or {}) | self.recipe, indent=1)
        lmeye.write_atomically(self.folder / "run.json", text.encode())
        self.save_state(0)
        return 0

    def resume(self):
        """Take up the state → the step that comes next. UserError if it is broken, or of another run."""
        path = self.folder / STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code, and needs no GPU
            saved = state["recipe"]
        except Exception as error:
            raise UserError(f"{path}: can't be read ({type(error).__name__}); without --resume a new run "
                            "begins, and this one is kept under another name") from error
        for name, here in self.recipe.items():
            there = saved.get(name)
            if here == there:
                continue
            if name == START:
                before = json.loads((self.folder / "run.json").read_text("utf-8")).get("started from")
                raise UserError(f"{path}: is of a run that started from other weights ({before}, at that "
                                "time): name them by --init; the folder of an earlier run ends in .1, .2, …")
            raise UserError(f"{path}: is of a run with other settings: {name} was {there}, is {here} now")
        self.model.load_state_dict(state["adapter"], strict=False)  # without the frozen models
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.log = state["log"]
        return state["step"]

    def save_state(self, step):
        """Write all that it takes to go on after `step` steps, atomically: there is always a whole one."""
        adapter = {name: p.detach() for name, p in self.model.adapter(self.stage).items()}
        stream = io.BytesIO()
        torch.save({"step": step, "recipe": self.recipe, "adapter": adapter, "log": self.log,
                    "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}, stream)
        lmeye.write_atomically(self.folder / STATE, stream.getvalue())

    def note_step(self, done, loss, norm, finite, tokens, seconds):
        """Note a step. UserError after many in a row that were not finite, or if the last two were not."""
        now, log = time.perf_counter(), self.log
        log["seconds"] += now - self.clock  # with what was done between two steps, as validations
        log["seconds in steps"] += seconds
        log["tokens"] += tokens
        self.clock = now
        if finite:
            log["losses"].append(loss)
            log["norms"].append(norm)
            log["bad in a row"] = 0
            return
        log["skipped"] += 1
        log["bad in a row"] += 1
        most = MAX_BAD_STEPS if done < self.steps else min(2, self.steps)  # no good one follows the last
        if log["bad in a row"] >= most:
            raise UserError(f"loss or gradient was not finite in {log['bad in a row']} steps in a row: start "
                            "anew with a lower --lr, or with --precision fp32; the adapter of the last "
                            f"validation, if any, is in {self.folder}")

    def note_line(self, done, rate, validated):
        """Write a line of log.csv, with averages since the last one → the same as text."""
        log = self.log
        minutes, seconds = divmod(round((self.steps - done) * log["seconds"] / done), 60)
        loss = float(np.mean(log["losses"] or [math.nan]))  # NaN: no step since the last line was finite
        norm = float(np.mean(log["norms"] or [math.nan]))
        speed = round(log["tokens"] / log["seconds in steps"])
        line = {"step": done, "loss": round(loss, 4), "val_loss": "", "val_loss_shuffled": "",
                "lr": float(f"{rate:.3g}"), "grad_norm": float(f"{norm:.3g}"), "skipped": log["skipped"],
                "tokens_per_second": speed, "seconds": round(log["seconds"], 1)}
        line |= {name: round(value, 4) for name, value in validated.items()}
        log["lines"].append(line)
        log.update({"losses": [], "norms": [], "tokens": 0, "seconds in steps": 0.0})
        table = io.StringIO()
        writer = csv.DictWriter(table, line.keys())
        writer.writeheader()
        writer.writerows(log["lines"])
        lmeye.write_atomically(self.folder / "log.csv", table.getvalue().encode())

        text = (f"step {done:,}/{self.steps:,}  loss {loss:.3f}  lr {rate:.1e}  norm {norm:.2f}  "
                f"{speed:,} tokens/s  {minutes}:{seconds:02} left")
        if validated:
            text += (f"\n    val loss {validated['val_loss']:.3f}, with the pictures shuffled "
                     f"{validated['val_loss_shuffled']:.3f}")
        return text

    def keep_best(self, val_loss):
        """Write best.safetensors if this validation loss is the lowest so far."""
        if val_loss < self.log["best"]:
            self.log["best"] = val_loss
            self.model.save(self.folder / "best.safetensors", self.stage)


def describe(model, stage, train, val):
    """What else decides a run's numbers: the models, the weights that it starts from, the data."""
    start = hashlib.blake2b(digest_size=8)
    for p in model.adapter(stage).values():
        start.update(p.detach().cpu().numpy().tobytes())
    settings = model.settings
    return {"frozen weights": str(model.llm.dtype), "variant": settings.variant, "N": settings.n_features,
            "Q": settings.n_slots, "P": settings.n_image_tokens, "dropout": settings.dropout,
            "models": sum(model.identity["weights"]), "hash of the data": train.fingerprint(),
            "hash of the val data": val.fingerprint() if val else None,
            START: start.hexdigest()}


@contextlib.contextmanager
def stop_signals():
    """Note Ctrl-C, SIGTERM, a closed terminal instead of dying of them: the loop ends its step and saves."""
    stop, before = threading.Event(), {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has SIGHUP ignored
            before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lock(folder):
    """Keep other runs out of a folder until the `with` block ends, or the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(folder / "lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another run works here; wait, or name another folder by --out") from None


# ---- The command line ---------------------------------------------------------------------------


def parse_args():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written,
                                     usage="train.py --stage {1,2} [flags]; train.py --help lists them")
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: captions; 2: questions")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="JSON, JSON Lines, or a folder of a.jpg beside a.txt: see data.py")
    add("--images", metavar="PATH", help="folder or zip with the pictures (default: the folder of --data)")
    add("--val", metavar="PATH", help="records to validate on (default: those of a tenth of the pictures, at "
        "most 500, which are then not trained on; of fewer than ten pictures none)")
    add("--val-images", metavar="PATH", help="their pictures (default: --images, or the folder of --val)")
    add = parser.add_argument_group("frozen models").add_argument
    add("--preset", choices=PRESETS, help="a pair of models (default: opt-1.3b with a CUDA GPU or "
        "with --llm or --clip, else mini)")
    add("--llm", help="causal language model: a hub name or a folder")
    add("--clip", help="CLIP as open_clip names it (NAME:TAG, NAME:FILE, hf-hub:ORG/NAME) or a folder; NAME "
        "ends in -quickgelu where a FILE needs it, as OpenAI's do")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="of the frozen weights (default: auto, "
        "that is bf16 on a GPU that has it, else fp16; fp32 on a CPU)")
    add = parser.add_argument_group("method").add_argument
    add("--variant", choices=VARIANTS, help="lmeye (default), or a control. norequest: the request is zero, "
        "and its layer not trained. static: the picture's token alone, nothing is asked")
    add("--n-features", type=int, help="vectors into which the picture is decomposed (default: 5)")
    add("--n-slots", type=int, help="tokens that bring CLIP's reply to a request (default: 1; bloomz-7b1: 5)")
    add("--n-image-tokens", type=int, help="tokens that stand for the picture, in both stages (default: 1)")
    add("--dropout", type=float, help="on the decomposed picture (default: 0.5; mini, smollm2, emoji: 0)")
    add("--train-align", action="store_true", help="in stage 2, go on training align and img. The authors "
        "did not, so it is off; with equal steps it always scored better here (tests/lab/README.md)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="optimiser steps (default: whole epochs, at least 500; of mini, smollm2, "
        "emoji as tuned)")
    add("--batch-size", type=int, help="records computed at once, at most (default: 128 in stage 1, 64 in "
        "stage 2; mini: 64; smollm2: 16, 32; emoji: 32)")
    add("--max-batch-tokens", type=int, default=4096, help="text tokens computed at once, at most, padding "
        "included: this bounds the memory (default: 4096)")
    add("--accumulate", type=int, default=1, help="batches to a step (default: 1)")
    add("--lr", type=float, help="highest learning rate (default: mini, smollm2, emoji: as tuned; else as "
        "the size of the models' numbers suggests)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", help="everything is written below this folder (default: out)")
    add("--init", metavar="FILE", help="the adapter to start from (default: for stage 2 that of stage 1)")
    add("--resume", action="store_true", help="go on with a run that was interrupted, exactly")
    args = parser.parse_args()
    above_zero = ("steps", "batch_size", "max_batch_tokens", "accumulate", "lr")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in above_zero and value is not None and not 0 < value < math.inf:
            parser.error(f"{flag} has to be above zero")
        if value == "":  # as a shell's variable that is not set
            parser.error(f"{flag} has to name something")
    if not 0 <= args.seed <= 10 ** 9:
        parser.error("--seed has to be from 0 to 1000000000")
    for name, needed in (("images", "data"), ("val", "data"), ("val_images", "val")):
        if getattr(args, name) and not getattr(args, needed):
            parser.error(f"--{name.replace('_', '-')} goes with --{needed}, which is missing")
    if args.train_align and (args.stage == 1 or args.variant == "static"):
        parser.error("--train-align would do nothing: stage 1, and stage 2 of static, train align anyway")
    args.out = os.path.expanduser(args.out)  # a shell leaves the ~ of --out=~/runs as it is
    return args


def main():
    args = parse_args()
    settings = sample.settings_from({name: getattr(args, name) for name in vars(Settings())}, args.out)
    device, dtype = lmeye.device_and_dtype(settings.precision)
    where = "cuda" if device.type == "cuda" else "cpu (no CUDA GPU was found)"
    if settings.preset == "mini" and device.type == "cpu":
        torch.set_num_threads(1)  # more gain little with so small a model, and round otherwise
    print(f"models: {settings.preset}, on {where}, frozen weights in {str(dtype).removeprefix('torch.')}",
          flush=True)

    home = Path(args.out, settings.preset)
    folder = home / run_name(args.stage, settings.variant, args.train_align)
    with lock(home):
        if args.resume and not (folder / STATE).exists():
            if (folder / CHECKPOINT).is_file():
                print(f"nothing to resume: {folder} is complete")
                return
            print(f"note: there is nothing to resume in {folder}: a new run begins")
        init = args.init or (home / "stage1" / CHECKPOINT if args.stage == 2 else None)
        if args.stage == 2 and not args.init and (home / "stage1" / STATE).exists():
            raise UserError(f"{home / 'stage1'} is not complete: go on with it (--stage 1 --resume), or "
                            "name its adapter as it is now with --init")
        if args.init and folder.resolve() in Path(init).resolve().parents:
            raise UserError(f"{init} is in the folder of this run, which begins anew: copy it elsewhere")
        if init and not Path(init).is_file():
            advice = "" if args.init else ": run --stage 1 first, for the same models"
            raise UserError(f"{init} is missing{advice}")
        if (settings.preset, args.stage) in DEFAULTS:
            make_miniature(args, settings)
        train_stage(args, settings, home, folder, init)


def run_name(stage, variant, train_align):
    """The folder of a run: two runs that differ in what they train don't share one."""
    name = f"stage{stage}"
    if stage == 2 and variant != "lmeye":
        name += f"-{variant}"
    return name + ("-align" if train_align else "")


def make_miniature(args, settings):
    """Make the miniature's models and data where they are missing. UserError if SmolLM2 or the emoji are."""
    needed = {}  # what this program does not make: {folder: the script that does}
    if settings.preset != "mini":
        needed[settings.llm] = "smollm2.py"
    if settings.preset == "emoji":
        needed[settings.clip.removeprefix("local-dir:")] = "emoji.py"
    for place, script in needed.items():
        if not Path(place).is_dir():
            command = f"python tests/lab/{script} --out {shlex.quote(args.out)}"
            raise UserError(f"{place} is missing: run  {command}")
    if settings.preset == "emoji" or Path(args.out, "mini", "llm").is_dir():  # put in its place last of all
        return
    script = Path(__file__).resolve().parent / "tests" / "lab" / "miniature.py"
    print(f"first use: tests/lab/miniature.py makes models and data in {Path(args.out, 'mini')}, in minutes",
          flush=True)
    with subprocess.Popen([sys.executable, script, "--out", args.out, "--seed", str(args.seed)]) as process:
        # Ctrl-C reaches the script by itself, and it says so. SIGTERM is passed on.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        before_term = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        status = process.wait()
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, before_term)
    if status:
        sys.exit(130 if status < 0 else status)  # below zero: a signal ended it while it was still importing


def data_of(args, preset):
    """(data, images, val, val images): what the flags name, or the miniature's, or the authors' data."""
    if args.data:
        return args.data, args.images, args.val, args.val_images or args.images
    if (preset, args.stage) in DEFAULTS:
        world = Path(args.out, "emoji" if preset == "emoji" else "mini")
        kind, zipped = ("captions", "questions")[args.stage - 1], world / "pictures.zip"
        return world / f"{kind}.json", zipped, world / f"val_{kind}.json", zipped
    return *data.published_data(args.stage, args.out), None, None


def train_stage(args, settings, home, folder, init):
    """Train one stage in `folder`, from the adapter `init` or None, and evaluate it."""
    path, images, val_path, val_images = data_of(args, settings.preset)
    pictures, noted = data.open_pictures(path, images), Counter()
    records, skipped = data.read_records(path, pictures, args.stage, noted=noted)  # most mistakes end here
    if val_path:
        val_pictures = data.open_pictures(val_path, val_images)
        val_records, val_skipped = data.read_records(val_path, val_pictures, args.stage, noted=noted)

    torch.manual_seed(args.seed)
    model = LMEye.from_settings(settings)
    if init:
        model.load(init)
    train = data.encode(model, records, skipped, pictures, home / "features", noted)
    val, note = None, ""
    if val_path:
        val = data.encode(model, val_records, val_skipped, val_pictures, home / "features", noted)
        skipped += val_skipped
        shared = data.count_shared(train, val)
        if shared:
            note = f"; {shared:,} of their pictures are trained on as well"
    else:
        train, val = data.hold_out(train)
        if not val:
            note = " (there are too few pictures)"
    n_train, n_val = len(train.records), len(val.records) if val else 0
    print(f"data: {n_train:,} records to train on, {n_val:,} to validate on{note}")
    data.report(skipped, noted)

    frozen = sum(p.numel() for p in (*model.llm.parameters(), *model.clip.parameters()))
    model.clip.visual = None  # every picture has its feature: this frees memory
    defaults = DEFAULTS.get((settings.preset, args.stage)) or DEFAULTS["others", args.stage]
    batch_size = args.batch_size or defaults["batch_size"]
    lr = args.lr or defaults.get("lr") or suggested_lr(defaults["reach"], model, train)
    batches = len(data.plan_epoch(train, batch_size, args.max_batch_tokens, args.seed, 0))
    steps = args.steps or defaults.get("steps") or default_steps(batches, args.accumulate)
    epochs = round(steps * args.accumulate / batches, 2)
    trained = sum(p.numel() for p in model.set_trained(args.stage, args.train_align).values())
    print(f"trained: {trained / 1e6:.2f} M parameters, beside {frozen / 1e6:,.1f} M frozen ones, in "
          f"{steps:,} steps ({epochs:g} epochs) at a learning rate of {lr:g}", flush=True)

    about = {"command": shlex.join(["python", *sys.argv]), "settings": vars(settings),
             "started from": str(init or "new layers"),
             "data": str(path), "images": str(images), "val": str(val_path),
             "records": n_train, "val records": n_val, "skipped": dict(skipped), "noted": dict(noted),
             "epochs": epochs, "device": str(model.device), "date": time.strftime("%Y-%m-%d %H:%M"),
             "versions": {module.__name__: module.__version__ for module in (torch, transformers, open_clip)}}
    train_adapter(model, args.stage, train, val, folder, steps, batch_size, lr, args.max_batch_tokens,
                  args.accumulate, args.seed, args.train_align, args.resume, about)
    if val:
        scores = sample.evaluate(model, val, folder / "evaluation", args.max_batch_tokens)
        run = json.loads((folder / "run.json").read_text("utf-8"))
        lmeye.write_atomically(folder / "run.json", json.dumps(run | {"scores": scores}, indent=1).encode())
    (folder / STATE).unlink()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, usual_interrupt)
    lmeye.run_main(main)
