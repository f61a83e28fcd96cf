"""Train LMEye.

    python train.py --stage 1                     phase 1: `align` and `img` on captions
    python train.py --stage 2                     phase 2: the other layers on instructions, then the evaluation
    python train.py --stage 2 --eval-only         only the evaluation of what stage 2 left
    python train.py --ablate 3                    full, norequest, static and blind from one phase 1, three seeds

Without a CUDA GPU, and without further flags, this trains the miniature: a tiny CLIP and a tiny language model
(stage 0, run by itself where they are missing) and LMEye between them, in minutes. With your own models and data:

    python train.py --stage 1 --llm facebook/opt-125m --clip ViT-B-32:openai --data captions/
    python train.py --stage 2 --llm facebook/opt-125m --clip ViT-B-32:openai --data llava.json --images coco/

A run leaves its checkpoint, its log and its loss curve in out/MODEL/stage1 and out/MODEL/stage2; an earlier run
there is kept under another name.
"""

import argparse
import csv
import io
import json
import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM

import data
import lmeye
from lmeye import ANSWER, IMAGE, QUESTION, LMEye, Settings, UserError

# What a run takes unless told otherwise. The miniature's values were tuned on it; the others are starting points.
DEFAULTS = {
    ("mini", 1): dict(steps=300, batch_size=64, lr=3e-3),
    ("mini", 2): dict(steps=2000, batch_size=64, lr=3e-3),
    ("real", 1): dict(epochs=1, batch_size=128, lr=1e-3),
    ("real", 2): dict(epochs=1, batch_size=64, lr=2e-4),
}
import os
HINT=float(os.environ.get('HINT','0.4'))
WARMUP = 0.05  # share of the steps in which the learning rate rises; it then falls along a cosine
MAX_NORM = 1.0  # gradients are clipped to this norm


# ---- The loop, for all stages --------------------------------------------------------------------------------


def fit(name, steps, optimizers, losses, seed, scaler=None, report=None):
    """Train: at each step, the losses that `losses(step)` yields are summed, and the optimisers move once.

    All randomness is a function of seed and step alone. `report(step, loss)`, if given, is called after each step;
    what it returns is shown at the bar.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    weights = [p for group in groups for p in group["params"]]
    with tqdm(total=steps, desc=name, disable=None) as bar:
        for step in range(steps):
            done = step / steps
            for group, peak in zip(groups, peaks):
                group["lr"] = peak * min((step + 1) / (WARMUP * steps), 0.5 + 0.5 * math.cos(math.pi * done))
            torch.manual_seed(seed * 1_000_003 + step)
            loss = 0.0
            for part in losses(step):
                scaler.scale(part).backward()
                loss += part.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            if report:
                bar.set_postfix_str(report(step + 1, loss))
            bar.update()


# ---- Stage 0: the miniature's own frozen models --------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is turned into the nearest orthogonal matrix, by five Newton-Schulz steps (Jordan, 2024).

    It learns the miniature's models in a fraction of AdamW's steps. torch.optim.Muon is not used: it refuses
    convolution kernels (here flattened to matrices) and computes in bf16, which is slow on most CPUs.
    """

    def __init__(self, weights, lr, momentum=0.9):
        super().__init__(weights, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).flatten(1)
                rows, columns = x.shape
                x = x.T if rows > columns else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if rows > columns else x
                p.add_(x.view_as(p), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def optimizers_for(model, muon_lr, adam_lr):
    """Muon for the matrices and convolution kernels, AdamW for embeddings, gains and biases."""
    named = list(model.named_parameters())
    matrix = [p for name, p in named if p.ndim > 1 and "embed" not in name]
    other = [p for name, p in named if p.ndim < 2 or "embed" in name]
    return [Muon(matrix, muon_lr), torch.optim.AdamW(other, adam_lr, betas=(0.9, 0.98))]


def train_clip(folder, seed, steps=500, batch_size=64, captions=128):
    """Train the miniature's CLIP on pictures drawn on the fly; save it as a folder that open_clip loads.

    Captions name a random subset of the attributes, and every picture that fits a caption counts as a positive: with
    whole captions two of a batch almost never differ in one attribute alone, and nothing makes CLIP learn it.
    """
    tokenizer = data.build_tokenizer(ends=True)
    config = {
        "embed_dim": 64,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": data.SIDE},
        "text_cfg": {"context_length": 16, "vocab_size": len(tokenizer), "width": 64, "heads": 4, "layers": 2,
                     "hf_tokenizer_name": "in this folder"},
    }
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config)
    rng = random.Random(seed)
    scenes = [s for s in data.SCENES if not data.held_out(s)]
    attributes, weights = data.Scene._fields, (2, 1, 1.5, 3, 2, 0.5)

    def pixels(scenes):
        pictures = [np.asarray(data.draw(s, rng)) for s in scenes]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, SIDE, SIDE)

    def words(texts):
        return tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids

    def losses(step):
        batch = rng.choices(scenes, k=batch_size)
        told = [batch[i % batch_size] for i in range(captions)]  # the scene that each caption is about
        named = [attributes if rng.random() < 0.2 else set(rng.choices(attributes, weights, k=rng.choice((1, 2))))
                 for _ in told]
        fits = torch.ones(batch_size, captions)
        for name in attributes:
            value = torch.tensor([data.VALUES[name].index(getattr(s, name)) for s in batch])
            said = torch.tensor([data.VALUES[name].index(getattr(s, name)) if name in n else -1
                                 for s, n in zip(told, named)])
            fits *= (value[:, None] == said) | (said == -1)
        f = clip.encode_image(pixels(batch), normalize=True)
        v = clip.encode_text(words([data.describe(s, n) for s, n in zip(told, named)]), normalize=True)
        logits = clip.logit_scale.exp() * f @ v.T  # (B, captions)
        yield -sum((logits.log_softmax(axis) * fits / fits.sum(axis, keepdim=True)).sum(axis).mean() for axis in (0, 1))

    fit("stage 0: CLIP", steps, optimizers_for(clip, 0.02, 5e-3), losses, seed)
    clip.eval()
    with torch.no_grad():
        # Cosines don't feel the length of a feature; four linear layers do: give both towers unit variance.
        test = [s for s in data.SCENES if data.held_out(s)]
        f, v = clip.encode_image(pixels(test)), clip.encode_text(words([data.describe(s) for s in test]))
        clip.visual.attnpool.c_proj.weight /= f.std()
        clip.visual.attnpool.c_proj.bias /= f.std()
        clip.text_projection /= v.std()
        right = {}
        for name in attributes:
            example = {value: next(s for s in data.SCENES if getattr(s, name) == value) for value in data.VALUES[name]}
            v = clip.encode_text(words([data.describe(s, (name,)) for s in example.values()]), normalize=True)
            guess = (f @ v.T).argmax(1)
            right[name] = sum(getattr(s, name) == data.VALUES[name][g] for s, g in zip(test, guess)) / len(test)
    print("  CLIP, zero-shot on held-out scenes: " + percent(right))

    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    safetensors.torch.save_file(clip.state_dict(), part / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (part / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    set_aside(folder)
    part.rename(folder)


def train_llm(folder, seed, steps=650, batch_size=32, turns=6):
    """Train the miniature's language model to read: a caption, then questions about it. Save it as transformers do.

    The caption stands where <img> will stand. Only captions and answers are learned, and each ends with eos, also
    where the text goes on: so the model stops after an answer however many turns came before.
    """
    tokenizer = data.build_tokenizer(ends=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    width, positions = 128, 256
    torch.manual_seed(seed)
    llm = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, dropout=0.0,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=bos, eos_token_id=eos))
    table = llm.get_decoder().embed_positions.weight
    with torch.no_grad():  # a table of sinusoids is learned from sooner than one of noise
        angle = torch.arange(len(table))[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
        table[:, 0::2], table[:, 1::2] = 0.1 * angle.sin(), 0.1 * angle.cos()
    rng = random.Random(seed)

    def batch(scenes, kinds, nameds, hints):
        """(ids, targets, weights of the targets), each (B, T): `kinds` lists the questions about each scene."""
        parts = []  # (text, weight) of each piece, the same number for each scene
        for scene, asked, named, hint in zip(scenes, kinds, nameds, hints):
            parts += [(IMAGE, 0), (" " + data.describe(scene, named), 0.2)]
            for kind, more in zip(asked, hint):
                question, answer = data.ask(scene, kind, rng, more or named)
                parts += [(QUESTION + question + (" " + data.describe(scene, more) if more else "") + ANSWER, 0), (" " + answer, 1)]
        pieces = tokenizer([text for text, _ in parts], add_special_tokens=False).input_ids
        each = len(parts) // len(scenes)
        rows = []
        for start in range(0, len(parts), each):
            ids, targets, weights, before = [bos], [], [], 0
            for piece, (_, weight) in zip(pieces[start:start + each], parts[start:start + each]):
                ids += piece
                targets += piece if weight else [eos] + piece[1:]
                weights += [weight] * len(piece) if weight else [before] + [0] * (len(piece) - 1)
                before = weight
            rows.append((ids, targets + [eos], weights + [before]))
        return [torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in column], batch_first=True)
                for column in zip(*rows)]

    def losses(step):
        nameds = [rng.sample(data.Scene._fields, rng.randint(1, 6)) for _ in range(batch_size)]
        hints = [[rng.sample(data.Scene._fields, rng.randint(1, 2)) if rng.random() < HINT else None for _ in range(turns)] for _ in range(batch_size)]
        kinds = [[rng.choice(h or named) if rng.random() < 0.5 else "yes/no" for h in hint]
                 for named, hint in zip(nameds, hints)]  # yes/no takes comparing, the rest only looking up: it needs more practice
        ids, targets, weights = batch(rng.choices(scenes, k=batch_size), kinds, nameds, hints)
        learned = weights > 0
        h = llm.base_model(input_ids=ids).last_hidden_state[learned]
        loss = F.cross_entropy(llm.get_output_embeddings()(h), targets[learned], reduction="none")
        yield (loss * weights[learned]).sum() / weights.sum()

    scenes = [s for s in data.SCENES if not data.held_out(s)]
    fit("stage 0: language model", steps, optimizers_for(llm, 0.01, 1e-3), losses, seed)

    right, test = {}, [s for s in data.SCENES if data.held_out(s)]
    for kind in data.KINDS:
        ids, targets, weights = batch(test, [[kind]] * len(test), [data.Scene._fields] * len(test), [[None]]*len(test))
        with torch.no_grad():
            guess = llm.eval()(input_ids=ids).logits.argmax(-1)
        right[kind] = ((guess == targets) | (weights < 1)).all(1).float().mean().item()
    print("  language model, questions about held-out captions: " + percent(right))

    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    llm.save_pretrained(part)
    tokenizer.save_pretrained(part)
    set_aside(folder)
    part.rename(folder)


def percent(right):
    """{kind: share right} → one line."""
    return ", ".join(f"{kind} {100 * share:.0f}%" for kind, share in right.items())


def set_aside(path):
    """Rename what stands at `path`, if anything, to the first free of path.1, path.2, …: nothing saved is lost."""
    path, n = Path(path), 1
    while path.exists():
        kept = path.with_name(f"{path.name}.{n}")
        if not kept.exists():
            path.rename(kept)
        n += 1


# ---- Evaluation ----------------------------------------------------------------------------------------------


def shuffled(dataset):
    """The same records, each with some other picture: what a model that does not look would lose nothing by."""
    order = torch.randperm(len(dataset.features), generator=torch.Generator().manual_seed(0))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return dataset._replace(picture=other[dataset.picture])


@torch.no_grad()
def mean_loss(model, dataset, batch_size=256):
    """Loss per token of the answers of a Dataset."""
    model.eval()
    total = count = 0
    for start in range(0, len(dataset.records), batch_size):
        f, questions, answers = dataset.batch(range(start, min(start + batch_size, len(dataset.records))))
        tokens = model.tokens(questions, answers)
        total += model.loss_sum(f, tokens).item()
        count += tokens.answer_mask.sum().item()
    return total / count


def accuracy(model, dataset, name, batch_size=256):
    """Share of answers generated exactly as they stand in the data (but for case) → {kind: share}, "mean" last."""
    model.eval()
    right, asked = Counter(), Counter()
    for start in tqdm(range(0, len(dataset.records), batch_size), desc=name, disable=None):
        rows = range(start, min(start + batch_size, len(dataset.records)))
        f, questions, answers = dataset.batch(rows)
        for i, said, answer in zip(rows, model.generate(f, questions, max_tokens=16), answers):
            asked[dataset.records[i].kind] += 1
            right[dataset.records[i].kind] += said.lower() == answer.lower()
    shares = {kind: right[kind] / n for kind, n in asked.items()}
    return shares | ({"mean": sum(shares.values()) / len(shares)} if len(shares) > 1 else {})


def table(rows):
    """{row name: {column: share}} → lines of text, in percent."""
    columns = list(next(iter(rows.values())))
    lines = [" " * 12 + "".join(f"{c:>12}" for c in columns)]
    lines += [f"{name:<12}" + "".join(f"{100 * shares[c]:>12.1f}" for c in columns) for name, shares in rows.items()]
    return "\n".join(lines)
