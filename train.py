"""Train LMEye.

    python train.py --stage 1                     phase 1: `align` and `img` on captions
    python train.py --stage 2                     phase 2: the other layers on instructions

Without a CUDA GPU, and without further flags, this trains the miniature: a tiny CLIP and a tiny language model, which
a script makes where they are missing, and LMEye between them, in minutes. With models and data of your own:

    python train.py --stage 1 --llm facebook/opt-125m --clip ViT-B-32:openai --data captions/
    python train.py --stage 2 --llm facebook/opt-125m --clip ViT-B-32:openai --data llava.json --images coco/

A run works in OUT/MODEL/stage1 or OUT/MODEL/stage2 (stage2-static, stage2-norequest for these): run.json says how it
was started, log.csv how it goes. adapter.safetensors, written anew at each validation, can be sampled from at any time;
best.safetensors is that of the lowest validation loss; evaluation/ comes at the end. While state.pt is there, the run
is not complete, and --resume goes on with it. An earlier run is never overwritten: its folder gets another name.
("Phase" is the paper's word, --stage the flag.)
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import open_clip
import torch
import transformers
from tqdm import tqdm

import data
import lmeye
import sample
from lmeye import CHECKPOINT, VARIANTS, PRESETS, LMEye, Settings, UserError

# What a run takes unless told otherwise, by preset and stage. Those of "mini" were tuned on it.
DEFAULTS = {
    ("mini", 1): dict(steps=400, batch_size=64, lr=1e-2, data="out/mini/captions.json", images="out/mini/pictures.zip",
                      val="out/mini/val_captions.json", made_by="tests/lab/miniature.py"),
    ("mini", 2): dict(steps=2400, batch_size=64, lr=1e-2, data="out/mini/questions.json", images="out/mini/pictures.zip",
                      val="out/mini/val_questions.json", made_by="tests/lab/miniature.py"),
    ("others", 1): dict(epochs=1, batch_size=128, reach=40),  # see suggested_lr
    ("others", 2): dict(epochs=1, batch_size=64, reach=8),
}
WARMUP = 0.05  # share of the steps in which the learning rate rises; it then falls along a cosine
MAX_NORM = 1.0  # gradients are clipped to this norm
MAX_BAD_STEPS = 20  # in a row whose loss or gradient is not finite, before the run gives up
STATE = "state.pt"  # of a run that is not complete: what --resume takes up


# ---- The loop ------------------------------------------------------------------------------------------------


def train_adapter(model, stage, train, val, folder, steps, batch_size, lr, max_batch_tokens=4096, accumulate=1, seed=0,
                  train_align=False, resume=False, save_every=200, about=None):
    """Train the layers of one phase on a Dataset `train`; leave adapter, log and run.json in `folder`.

    `val` is a Dataset or None, `about` a dict that run.json says of the run. A step takes `accumulate` batches; its loss is
    averaged over all their answers' tokens. Trained weights, gradients and loss are fp32. All randomness is a function of
    seed and step: so what `save_state` writes is all that it takes to go on as if nothing had happened, where all that
    `run` holds is the same. The caller removes STATE when nothing is left to do.
    """
    folder, trained = Path(folder), model.set_trained(stage, train_align)
    optimizer = torch.optim.AdamW(trained.values(), lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.llm.dtype == torch.float16)
    run = {"steps": steps, "batch size": batch_size, "learning rate": lr, "max batch tokens": max_batch_tokens,
           "accumulate": accumulate, "seed": seed, "frozen weights": str(model.llm.dtype),
           "align trained": "align.weight" in trained, "variant": model.settings.variant,
           "N": model.settings.n_features, "Q": model.settings.n_slots, "dropout": model.settings.dropout,
           "models": sum(model.identity["weights"]), "hash of the data": train.fingerprint(),
           "hash of the val data": val.fingerprint() if val else None}
    log = {"lines": [], "losses": [], "norms": [], "tokens": 0, "skipped": 0, "bad steps in a row": 0, "best": math.inf,
           "seconds": 0.0, "seconds in steps": 0.0}
    state, adapter = folder / STATE, model.adapter(stage)
    if resume and state.exists():
        start = load_state(state, run, adapter, optimizer, scaler, log)
    else:
        start, earlier = 0, sample.set_aside(folder)
        if earlier:
            print(f"note: {folder} held an earlier run, which is now {earlier}")
        lmeye.write_atomically(folder / "run.json", json.dumps((about or {}) | run, indent=1).encode())
        save_state(state, 0, run, adapter, optimizer, scaler, log)

    clock = time.perf_counter()
    plan = itertools.islice(data.batches(train, batch_size, max_batch_tokens, seed), start * accumulate, None)  # those to come
    with stop_signals() as stop, tqdm(total=steps, initial=start, desc=f"stage {stage}", disable=None) as bar:
        for step in range(start, steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            torch.manual_seed(seed * 1_000_003 + step)  # dropout, too, is a function of seed and step
            model.train()
            batches = [train.batch(next(plan)) for _ in range(accumulate)]
            answer_tokens = sum(tokens.answer_mask.sum().item() for _, tokens in batches)
            loss_sum = torch.zeros((), device=model.device)
            for f, tokens in batches:
                loss = model(f, tokens) / answer_tokens
                scaler.scale(loss).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM)
            loss, norm = torch.stack([loss_sum, norm]).tolist()  # the one place where a step waits for a GPU
            if math.isfinite(loss) and math.isfinite(norm):
                scaler.step(optimizer)
                log["losses"].append(loss)
                log["norms"].append(norm)
                log["bad steps in a row"] = 0
            else:  # in fp16 some are to be expected: the scaler then lowers its factor
                log["skipped"] += 1
                log["bad steps in a row"] += 1
            scaler.update()
            optimizer.zero_grad()

            done, now = step + 1, time.perf_counter()
            log["seconds"] += now - clock
            log["seconds in steps"] += now - began
            clock = now
            log["tokens"] += sum(tokens.lengths().sum().item() for _, tokens in batches)
            limit = MAX_BAD_STEPS if done < steps else min(2, steps)  # the last steps tell whether anything is left
            if log["bad steps in a row"] >= limit:
                raise UserError(f"loss or gradient was not finite in {log['bad steps in a row']} steps in a row: start anew "
                                "with a lower --lr, or with --precision fp32; the adapter of the last validation, if any, "
                                f"is in {folder}")
            validated = {}
            if done == steps or done % max(1, steps // 10) == 0:
                model.save(folder / CHECKPOINT, stage)
                if val:
                    validated = {"val_loss": mean_loss(model, val, max_batch_tokens),
                                 "val_loss_shuffled": mean_loss(model, data.shuffled(val), max_batch_tokens)}
                    if validated["val_loss"] < log["best"]:
                        log["best"] = validated["val_loss"]
                        model.save(folder / "best.safetensors", stage)
            if done == steps or done % max(1, steps // 100) == 0 or validated:
                tqdm.write(add_line(log, done, steps, learning_rate(step, steps, lr), validated))
                write_log(folder / "log.csv", log["lines"])
            if validated:
                tqdm.write(own_words(model, val))
            stopping = stop.is_set()
            if done == steps or done % save_every == 0 or stopping:
                save_state(state, done, run, adapter, optimizer, scaler, log)
            if stopping:
                command = "python " + shlex.join([word for word in sys.argv if word != "--resume"] + ["--resume"])
                raise KeyboardInterrupt(f"stopped after step {done:,} of {steps:,}; to go on:  {command}")
            bar.update()
    print(f"stage {stage}: {steps:,} steps in {log['seconds']:.0f} s: {folder / CHECKPOINT}")


def learning_rate(step, steps, peak):
    """Of a step, counted from 0: up to `peak` along a line, then down to 0 along a cosine."""
    warm_up = (step + 1) / (WARMUP * steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * min(warm_up, cosine)


def suggested_lr(reach, model, dataset):
    """The learning rate at which one step can move a picture's token by `reach` times the spread of words.

    Adam moves each weight by about the rate, and so each number of `align(f)` by the rate times the sum of |f|; for
    phase 2 the same measure is taken. Models whose embeddings or features are larger or smaller by a factor are so
    treated alike. The two values of `reach` were measured with SmolLM2-135M on the miniature's data: nothing else is
    known of them.
    """
    size = dataset.f(np.arange(min(1000, len(dataset.records)))).abs().sum(1).mean().item()
    return float(f"{reach * model.word_std / size:.2g}")  # two digits


@torch.no_grad()
def mean_loss(model, dataset, max_batch_tokens, max_records=256):
    """Loss per token of the answers of a Dataset, over at most `max_records` drawn from it, always the same. While it
    is the same with the pictures shuffled, the model does not look."""
    model.eval()
    drawn = np.random.default_rng(0).permutation(len(dataset.records))[:max_records]
    part = dataset.take(np.isin(np.arange(len(dataset.records)), drawn))
    total = count = 0
    for rows in data.plan_epoch(part, 64, max_batch_tokens, 0, 0):
        f, tokens = part.batch(rows)
        total += model(f, tokens).item()
        count += tokens.answer_mask.sum().item()
    return total / count


def own_words(model, val):
    """What the model says of the first picture: a caption, or its answers to the first two questions about it."""
    rows = np.flatnonzero(val.picture == val.picture[0])[:2]
    questions = [val.records[i].question for i in rows]
    if not val.records[0].turns:  # captions: one will do
        rows, questions = rows[:1], None
    lines = []
    for i, text in zip(rows, model.generate(val.f(rows), questions, max_tokens=32)):
        record = val.records[i]
        lines.append("    " + lmeye.printable(f"{record.question or 'caption:'} → {text} (right: {record.answer})"))
    return "\n".join(lines)


def add_line(log, step, steps, lr, validated):
    """Add a line to a run's log, with averages since the last one → the same as text. `skipped` counts the steps whose
    loss or gradient was not finite."""
    minutes, seconds = divmod(round((steps - step) * log["seconds"] / step), 60)
    loss, norm = np.mean(log["losses"] or [math.nan]), np.mean(log["norms"] or [math.nan])  # NaN: all were skipped
    line = {"step": step, "loss": round(float(loss), 4), "lr": float(f"{lr:.3g}"), "grad_norm": float(f"{norm:.3g}"),
            "skipped": log["skipped"], "tokens_per_second": round(log["tokens"] / log["seconds in steps"]),
            "seconds": round(log["seconds"], 1)} | {name: round(value, 4) for name, value in validated.items()}
    log["lines"].append(line)
    log.update({"losses": [], "norms": [], "tokens": 0, "seconds in steps": 0.0})
    text = (f"step {step:,}/{steps:,}  loss {line['loss']:.3f}  lr {lr:.1e}  norm {line['grad_norm']:.2f}  "
            f"{line['tokens_per_second']:,} tokens/s  {minutes}:{seconds:02} left")
    if validated:
        text += f"\n    val loss {line['val_loss']:.3f}, with the pictures shuffled {line['val_loss_shuffled']:.3f}"
    return text


def write_log(path, lines):
    text = io.StringIO()
    writer = csv.DictWriter(text, ("step", "loss", "val_loss", "val_loss_shuffled", "lr", "grad_norm", "skipped",
                                   "tokens_per_second", "seconds"))
    writer.writeheader()
    writer.writerows(lines)
    lmeye.write_atomically(path, text.getvalue().encode())


# ---- Saving, stopping, going on ------------------------------------------------------------------------------


def save_state(path, step, run, adapter, optimizer, scaler, log):
    """Write the state of a run, atomically."""
    tensors = {name: p.detach() for name, p in adapter.items()}
    stream = io.BytesIO()
    torch.save({"step": step, "run": run, "adapter": tensors, "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "log": log}, stream)
    lmeye.write_atomically(path, stream.getvalue())


def load_state(path, run, adapter, optimizer, scaler, log):
    """Take up a state → its step. UserError if it can't be read, or is of another run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # also where the GPU is gone
        saved = state["run"]
    except Exception as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}); without --resume a new run begins, and this one "
                        "is kept under another name") from error
    for name in run:
        if run[name] != saved.get(name):
            raise UserError(f"{path}: is of a run with other settings: {name} {saved.get(name)} there, {run[name]} here")
    with torch.no_grad():
        for name, p in adapter.items():
            p.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    log.update(state["log"])
    return state["step"]


@contextlib.contextmanager
def stop_signals():
    """Note Ctrl-C and SIGTERM instead of dying of them: the loop ends its step, saves, and stops."""
    stop = threading.Event()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
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
        raise UserError(f"{folder}: another run works here; wait, or name another folder with --out") from None


# ---- The command line ----------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), required=True, help="1: captions. 2: instructions")
    add("--preset", choices=PRESETS, help="which frozen models (default: opt-1.3b with a CUDA GPU, --llm or --clip, else mini)")
    add("--llm", help="causal language model: a hub name or a local folder")
    add("--clip", help="CLIP as open_clip names it: NAME:TAG, NAME:FILE, hf-hub:ORG/NAME or local-dir:FOLDER "
        "(NAME ends in -quickgelu where a FILE needs it, as OpenAI's do)")
    add("--data", action="append", metavar="PATH", help="a folder of a.jpg beside a.txt, tar shards, or a file as LLaVA, "
        "COCO, VQA, VCR or LMEye publish it, or of image and caption; given more than once: mixed")
    add("--images", action="append", metavar="PATH", help="folder or zip archive where picture names in --data start "
        "(default: the folder of --data); may be given more than once")
    add("--val", action="append", metavar="PATH", help="records to validate on, as --data (default: those of some of its "
        "pictures, which are then not trained on)")
    add("--val-images", action="append", metavar="PATH", help="their pictures (default: --images)")
    add("--download", action="store_true", help="without --data: agree to download the published data")
    add("--out", default="out", help="everything is written below this folder (default: out)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument("--epochs", type=float, help="passes over the data, instead of --steps")
    add("--batch-size", type=int, help="records that are computed at once, at most")
    add("--max-batch-tokens", type=int, default=4096, help="text tokens, with padding, that are computed at once, at most: "
        "this bounds the memory (default: 4096)")
    add("--accumulate", type=int, default=1, help="batches to an optimiser step (default: 1)")
    add("--lr", type=float, help="peak learning rate (default: of mini as tuned, of other models by suggested_lr)")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="of the frozen weights (default: auto: bf16 on a GPU "
        "that has it, else fp16; fp32 on a CPU)")
    add("--variant", choices=VARIANTS, help="lmeye (default). static: no <img-d>, the picture token must do. "
        "norequest: as lmeye, but the request is zero")
    add("--n-features", type=int, help="N, into how many words of CLIP's the picture is decomposed (default: 5)")
    add("--n-slots", type=int, help="Q, how many <img-d> slots there are (default: 1; 5 with --preset bloomz-7b1)")
    add("--n-image-tokens", type=int, help="P, how many <img> tokens there are (default: 1)")
    add("--dropout", type=float, help="dropout on the decomposed features (default: 0.5; 0 for mini)")
    add("--train-align", action="store_true", help="stage 2: go on training align and img as well")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--resume", action="store_true", help="go on with a run that was interrupted, exactly")
    add("--save-every", type=int, default=200, metavar="STEPS", help="how often the state is saved (default: 200)")
    add("--checkpoint", metavar="FILE", help="the adapter to start from (default: for stage 2 that of stage1, below --out)")
    args = parser.parse_args()
    for name in ("steps", "epochs", "batch_size", "max_batch_tokens", "accumulate", "lr", "save_every"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} has to be above zero")
    if not 0 <= args.seed <= 10 ** 9:
        parser.error("--seed has to be from 0 to 1000000000")
    for name, needed in (("images", "data"), ("val", "data"), ("val_images", "val")):
        if getattr(args, name) and not getattr(args, needed):
            parser.error(f"--{name.replace('_', '-')} goes with --{needed}, which is missing")
    return args


def main():
    args = parse_args()
    settings = sample.settings_from({name: getattr(args, name) for name in vars(Settings())}, args.out)
    defaults = DEFAULTS.get((settings.preset, args.stage)) or DEFAULTS["others", args.stage]
    device, dtype = lmeye.device_and_dtype(settings.precision)
    chosen = "" if args.preset or device.type == "cuda" or args.llm or args.clip else " (no CUDA GPU was found)"
    print(f"preset {settings.preset}{chosen}, on {device.type}, frozen weights in {str(dtype).partition('.')[2]}", flush=True)
    home = Path(args.out, settings.preset)
    variant = f"-{settings.variant}" if args.stage == 2 and settings.variant != "lmeye" else ""
    folder = home / f"stage{args.stage}{variant}"
    if args.resume and not (folder / STATE).exists():
        if (folder / CHECKPOINT).is_file():
            print(f"nothing to resume: {folder} is complete")
            return
        print(f"note: there is nothing to resume in {folder}: a new run begins")
    before = args.checkpoint or (home / "stage1" / CHECKPOINT if args.stage == 2 else None)  # the adapter to start from
    if before and not Path(before).is_file():
        raise UserError(f"{before} is missing" + ("" if args.checkpoint else ": run --stage 1 first, for the same models"))
    if args.stage == 2 and not args.checkpoint and Path(home, "stage1", STATE).exists():
        raise UserError(f"{home / 'stage1'} is not complete: go on with it (--stage 1 --resume), or name its adapter as it is "
                        "now with --checkpoint")
    with lock(home):
        if "made_by" in defaults and not Path(settings.llm).is_dir():
            print(f"first use: {defaults['made_by']} makes the models and the data in {home}", flush=True)
            script = Path(__file__).resolve().parent / defaults["made_by"]
            with subprocess.Popen([sys.executable, script, "--out", args.out, "--seed", str(args.seed)]) as process:
                handler = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # Ctrl-C reaches it by itself
                status = process.wait()
                signal.signal(signal.SIGTERM, handler)
            if status:
                sys.exit(status)
        run_stage(args, settings, home, folder, before, defaults)


def run_stage(args, settings, home, folder, before, defaults):
    """Train one stage in `folder`, from the adapter `before` or None, then evaluate it."""
    paths, images, val_paths, val_images = args.data, args.images, args.val, args.val_images or args.images
    if not paths and "data" in defaults:
        paths, val_paths = [sample.below(args.out, defaults["data"])], [sample.below(args.out, defaults["val"])]
        images = val_images = [sample.below(args.out, defaults["images"])]
    elif not paths:
        paths, images = data.published(args.stage, args.out, args.download)
    records, skips = data.read_records(paths, images, args.stage)  # most mistakes are told before models are loaded
    val_records, val_skips = data.read_records(val_paths, val_images, args.stage) if val_paths else ([], [])

    torch.manual_seed(args.seed)
    model = LMEye.from_settings(settings)
    if before:
        model.load(before)
    train = data.encode(model, records, skips, home / "features")
    if val_paths:
        val = data.encode(model, val_records, val_skips, home / "features")
    else:
        train, val = data.hold_out(train)
    frozen = sum(p.numel() for p in (*model.llm.parameters(), *model.clip.parameters()))
    model.clip.visual = None  # its work is done: this frees its memory
    n_train, n_val = len(train.records), (len(val.records) if val else 0)
    note = "" if val else " (too few pictures)"
    if val_paths:
        trained_on = {os.path.abspath(str(record.image)) for record in train.records}
        shared = trained_on & {os.path.abspath(str(record.image)) for record in val.records}
        note = f"; {len(shared):,} of their pictures are trained on as well" if shared else ""
    print(f"data: {n_train:,} records to train on, {n_val:,} to validate on{note}")
    data.report_skips(skips + val_skips)
    batch_size = args.batch_size or defaults["batch_size"]
    lr = args.lr or defaults.get("lr") or suggested_lr(defaults["reach"], model, train)
    steps = args.steps if args.steps or args.epochs else defaults.get("steps")
    epochs = args.epochs or defaults.get("epochs")
    if not steps:
        batches = len(data.plan_epoch(train, batch_size, args.max_batch_tokens, args.seed, 0))
        steps = math.ceil(epochs * batches / args.accumulate)
    trained = sum(p.numel() for p in model.set_trained(args.stage, args.train_align).values())
    print(f"trained: {trained / 1e6:.2f} M parameters, beside {frozen / 1e6:,.1f} M frozen ones, in {steps:,} steps at a "
          f"learning rate of {lr:g}", flush=True)
    about = {"command": shlex.join(["python", *sys.argv]), "settings": vars(settings), "started from": str(before),
             "data": [str(path) for path in paths], "images": [str(path) for path in images or []],
             "val": [str(path) for path in val_paths or []], "records": n_train, "val records": n_val,
             "left out or shortened": len(skips) + len(val_skips), "device": str(model.device),
             "date": time.strftime("%Y-%m-%d %H:%M"),
             "versions": {module.__name__: module.__version__ for module in (torch, transformers, open_clip)}}
    train_adapter(model, args.stage, train, val, folder, steps, batch_size, lr, max_batch_tokens=args.max_batch_tokens,
                  accumulate=args.accumulate, seed=args.seed, train_align=args.train_align, resume=args.resume,
                  save_every=args.save_every, about=about)
    if val:
        sample.evaluate(model, val, folder / "evaluation", val_skips, args.max_batch_tokens)
    (folder / STATE).unlink()


if __name__ == "__main__":
    lmeye.run_main(main)
