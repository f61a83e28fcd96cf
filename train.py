"""Train LMEye.

    python train.py --stage 1                     phase 1: `align` and `img` on captions
    python train.py --stage 2                     phase 2: the other layers on instructions, then the evaluation
    python train.py --stage 2 --eval-only         only the evaluation of what stage 2 left

Without a CUDA GPU, and without further flags, this trains the miniature: a tiny CLIP and a tiny language model
(stage 0, run by itself where they are missing) and LMEye between them, in minutes. With models and data of your own:

    python train.py --stage 1 --llm facebook/opt-125m --clip ViT-B-32:openai --data captions/
    python train.py --stage 2 --llm facebook/opt-125m --clip ViT-B-32:openai --data llava.json --images coco/

A run leaves its checkpoint, its log and its loss curve in OUT/MODEL/stage1 and OUT/MODEL/stage2 once it is complete
(before that, in a folder ending in .part); an earlier run there is kept under another name.
"""

import argparse
import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict
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
from lmeye import ANSWER, CHECKPOINT, IMAGE, QUESTION, LMEye, UserError

# What a run takes unless told otherwise. The miniature's values were tuned on it; the others are starting points.
DEFAULTS = {
    ("mini", 1): dict(steps=400, batch_size=64, lr=1e-2),
    ("mini", 2): dict(steps=2400, batch_size=64, lr=6e-3),
    ("real", 1): dict(epochs=1, batch_size=128, lr=1e-3),
    ("real", 2): dict(epochs=1, batch_size=64, lr=2e-4),
}
WARMUP = 0.05  # share of the steps in which the learning rate rises; it then falls along a cosine
MAX_NORM = 1.0  # gradients are clipped to this norm
MOST_BAD = 20  # steps in a row whose loss is not finite, before the run gives up
LOG = ("step", "loss", "held_out_loss", "held_out_loss_shuffled", "lr", "seconds")
STATES = ("state.pt", "state.before.pt")  # of a run that is not complete, newest first


# ---- The loop, for all stages --------------------------------------------------------------------------------


def fit(name, folder, steps, tensors, optimizers, losses, seed, log, report=None, scaler=None, resume=False,
        save_every=200, settings=""):
    """Train: at each step, the losses that `losses(step)` yields are summed, and the optimisers move once.

    All randomness is a function of seed and step. So `tensors` ({name: what is trained, and buffers}), the optimisers,
    `log` (rows, a list that `report` and skipped steps fill) and the number of the step are the whole state: it is
    saved in `folder` every `save_every` steps, when the program is told to stop, and at the end. With `resume`, a saved
    state is taken up. `settings` tells a run from others: only with the same ones can it be resumed. `report(step,
    loss)` is called after each step; what it returns, if anything, is shown at the bar: without one, the loss.
    """
    settings = f"{steps} steps, seed {seed}, {settings}"
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    movers = [*optimizers, scaler]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    start = load_state(folder, settings, tensors, movers, log) if resume else 0  # brings groups with other rates
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    weights = [p for group in groups for p in group["params"]]
    bad, stop = 0, []  # steps in a row whose loss was not finite; signals that came
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tqdm(total=steps, initial=start, desc=name, disable=None) as bar:
            for step in range(start, steps):
                done = step / steps
                for group, peak in zip(groups, peaks):
                    group["lr"] = peak * min((step + 1) / (WARMUP * steps), 0.5 + 0.5 * math.cos(math.pi * done))
                torch.manual_seed(seed * 1_000_003 + step)
                loss = torch.zeros((), device=weights[0].device)
                for part in losses(step):
                    scaler.scale(part).backward()
                    loss += part.detach()
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
                bad = 0 if loss.isfinite() and (norm.isfinite() or scaler.is_enabled()) else bad + 1
                for optimizer in optimizers:
                    if not bad:
                        scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
                if bad:
                    log.append({"step": step + 1, "loss": "not finite: skipped"})
                if bad in (MOST_BAD, steps):
                    raise UserError(f"{name}: the loss was not finite in {bad} steps in a row: lower --lr, or use "
                                    f"--precision fp32; what was saved before, if anything, is in {folder}")
                if not bad and (shown := report(step + 1, loss) if report else f"loss {loss:.3f}"):
                    bar.set_postfix_str(shown)
                bar.update()
                if not bad and ((step + 1) % save_every == 0 or step + 1 == steps) or stop:
                    save_state(folder, step + 1, settings, tensors, movers, log)
                if stop:
                    raise KeyboardInterrupt(f"{name}: stopped after step {step + 1:,} of {steps:,}; to go on:  "
                                            f"{resume_command()}")
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory does not suffice: lower --tokens or --batch-size (and raise --accumulate); "
                        f"with the same settings, once there is more memory, go on by:  {resume_command()}") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def resume_command():
    return "python " + shlex.join(sys.argv + ["--resume"] * ("--resume" not in sys.argv))


def save_state(folder, step, settings, tensors, movers, log):
    """Write the state of a run, atomically, and keep the one before it."""
    stream = io.BytesIO()
    torch.save({"step": step, "settings": settings, "tensors": {name: t.detach() for name, t in tensors.items()},
                "movers": [m.state_dict() for m in movers], "log": log}, stream)
    new, old = Path(folder, STATES[0]), Path(folder, STATES[1])
    if new.exists():
        os.replace(new, old)
    lmeye.write_atomically(new, stream.getvalue())


def load_state(folder, settings, tensors, movers, log):
    """Take up the newest state that can be read → its step, 0 if there is none. UserError if it is of another run."""
    for path in filter(Path.exists, [Path(folder, name) for name in STATES]):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)  # also where the GPU is gone
        except Exception:  # a file that is damaged: the one before it serves
            print(f"note: {path} can't be read")
            continue
        if state["settings"] != settings:
            raise UserError(f"{path}: is of a run with other settings, resume with the same ones: it had "
                            f"{state['settings']}, this has {settings}")
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(state["tensors"][name])
        for mover, saved in zip(movers, state["movers"]):
            mover.load_state_dict(saved)
        log[:] = state["log"]
        return state["step"]
    return 0


@contextlib.contextmanager
def workplace(folder, resume):
    """FOLDER.part, in which a run works; when it is complete it becomes FOLDER. What an interrupted run left in it is
    kept aside, unless it is to be resumed, and so is an earlier FOLDER."""
    part = Path(f"{folder}.part")
    if not resume:
        set_aside(part)
    part.mkdir(parents=True, exist_ok=True)
    yield part
    set_aside(folder)
    part.rename(folder)
    for name in STATES:  # last: until the name is there, the run can be resumed
        Path(folder, name).unlink(missing_ok=True)


def set_aside(path):
    """Rename what stands at `path`, if anything, to the first free of path.1, path.2, …: nothing saved is lost."""
    path = Path(path)
    if path.exists():
        free = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
        path.rename(path.with_name(f"{path.name}.{free}"))


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of a folder. The system drops the lock when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run works here; wait, or name another folder with --out") from None
        yield


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


def train_clip(folder, seed, resume, save_every, world=data, steps=500, batch_size=64, captions=128, width=8):
    """Train the miniature's CLIP on pictures drawn on the fly; save it as a folder that open_clip loads. `world` has
    the scenes: the second half of data.py, or a module with the same names.

    Captions name a random subset of the attributes, and every picture that fits a caption counts as a positive: with
    whole captions two of a batch almost never differ in one attribute alone, and nothing makes CLIP learn it.
    """
    tokenizer = world.build_tokenizer(ends=True)
    config = {
        "embed_dim": 8 * width,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": width, "head_width": 32, "image_size": world.SIDE},
        "text_cfg": {"context_length": world.WORDS, "vocab_size": len(tokenizer), "width": 64, "heads": 4, "layers": 2,
                     "hf_tokenizer_name": "in this folder"},
    }
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config)
    rng = random.Random()

    def pixels(scenes):
        pictures = [np.asarray(world.draw(s, rng)) for s in scenes]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, SIDE, SIDE)

    def words(texts):
        return tokenizer(texts, padding="max_length", max_length=world.WORDS, return_tensors="pt").input_ids

    def subset(scene):
        names = world.attributes(scene)
        some = rng.choices(names, [world.WEIGHTS[name] for name in names], k=rng.choice((1, 2)))
        return names if rng.random() < 0.2 else set(some)

    def losses(step):
        rng.seed(f"{seed} {step}")
        batch = rng.choices(world.TRAINING, k=batch_size)
        told = [batch[i % batch_size] for i in range(captions)]  # the scene that each caption is about
        named = [subset(scene) for scene in told]
        fits = torch.ones(batch_size, captions)
        for name, values in world.VALUES.items():
            value = torch.tensor([values.index(getattr(s, name)) for s in batch])
            said = torch.tensor([values.index(getattr(s, name)) if name in n else -1 for s, n in zip(told, named)])
            fits *= (value[:, None] == said) | (said == -1)
        f = clip.encode_image(pixels(batch), normalize=True)
        v = clip.encode_text(words([world.describe(s, n) for s, n in zip(told, named)]), normalize=True)
        logits = clip.logit_scale.exp() * f @ v.T  # (B, captions)
        yield -sum((logits.log_softmax(axis) * fits / fits.sum(axis, keepdim=True)).sum(axis).mean() for axis in (0, 1))

    with workplace(folder, resume) as part:
        fit("stage 0: CLIP", part, steps, clip.state_dict(), optimizers_for(clip, 0.02, 5e-3), losses, seed, [],
            resume=resume, save_every=save_every)
        clip.eval()
        with torch.no_grad():
            next(losses(steps - 1))  # leaves rng as the last step did, also where a resumed run has none left to do
            # Cosines don't feel the length of a feature; four linear layers do: give both towers unit variance. (The
            # held-out scenes serve for these two numbers.)
            test = world.HELD_OUT
            f, v = clip.encode_image(pixels(test)), clip.encode_text(words([world.describe(s) for s in test]))
            clip.visual.attnpool.c_proj.weight /= f.std()
            clip.visual.attnpool.c_proj.bias /= f.std()
            clip.text_projection /= v.std()
        tokenizer.save_pretrained(part)
        safetensors.torch.save_file(clip.state_dict(), part / "open_clip_model.safetensors")
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
        (part / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def train_llm(folder, seed, resume, save_every, world=data, steps=650, batch_size=32, turns=6, width=128, layers=3):
    """Train the miniature's language model to read: a caption, then questions about it. Save it as transformers do.

    The caption stands where <img> will stand, and names a random part of the attributes in order that the model
    learns to read by content, not by position. Sometimes a hint, a phrase that names one or two more, stands before
    "Answer:", where <img-d> will stand. Only captions and answers are learned, and each ends with eos, also where
    the text goes on: so the model stops after an answer however many turns came before.
    """
    tokenizer = world.build_tokenizer(ends=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    llm = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, dropout=0.0,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=bos, eos_token_id=eos))
    table = llm.get_decoder().embed_positions.weight
    with torch.no_grad():  # a table of sinusoids is learned from sooner than one of noise
        angle = torch.arange(len(table))[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
        table[:, 0::2], table[:, 1::2] = 0.1 * angle.sin(), 0.1 * angle.cos()
    rng = random.Random()

    def losses(step):
        rng.seed(f"{seed} {step}")
        plan = []  # (scene, attributes that its caption names, [(kind of question, those that a hint names or None)])
        for scene in rng.choices(world.TRAINING, k=batch_size):
            names = world.attributes(scene)
            named = rng.sample(names, rng.randint(1, len(names)))
            hints = [rng.sample(names, rng.randint(1, 2)) if rng.random() < 0.4 else None for _ in range(turns)]
            # Yes/no takes comparing, the rest only looking up: it needs more practice.
            kinds = [rng.choice(hint or named) if rng.random() < 0.5 else "yes/no" for hint in hints]
            plan.append((scene, named, zip(kinds, hints)))
        texts = []
        for scene, named, asked in plan:
            texts.append([IMAGE, " " + world.describe(scene, named)])
            for kind, hint in asked:
                question, answer = world.ask(scene, kind, rng, hint or named)
                hint = " " + world.describe(scene, hint) if hint else ""
                texts[-1] += [QUESTION + question + hint + ANSWER, " " + answer]
        coded = tokenizer(texts, is_split_into_words=True, padding=True, return_tensors="pt")
        worth = [0, 0.2] + [0, 1] * turns  # of the tokens of each piece, as something to learn
        before = torch.tensor([[0 if k is None else worth[k] for k in coded.word_ids(i)] for i in range(batch_size)])
        targets, weights = coded.input_ids.roll(-1, 1), before.roll(-1, 1)  # (B, T) both
        ends = (weights == 0) & (before > 0)  # behind what is learned stands eos, also where the text goes on
        targets[ends], weights[ends] = eos, before[ends]
        learned = weights > 0
        h = llm.base_model(input_ids=coded.input_ids).last_hidden_state[learned]
        loss = F.cross_entropy(llm.get_output_embeddings()(h), targets[learned], reduction="none")
        yield (loss * weights[learned]).sum() / weights.sum()

    with workplace(folder, resume) as part:
        fit("stage 0: language model", part, steps, dict(llm.named_parameters()), optimizers_for(llm, 0.01, 1e-3),
            losses, seed, [], resume=resume, save_every=save_every)
        llm.save_pretrained(part)
        tokenizer.save_pretrained(part)


# ---- Evaluation ----------------------------------------------------------------------------------------------


def shuffled(dataset):
    """The same records, each with some other picture: what a model that does not look would lose nothing by."""
    pictures = np.random.default_rng(0).permutation(np.unique(dataset.picture))
    other = dict(zip(pictures, np.roll(pictures, 1)))
    return dataset._replace(picture=np.array([other[p] for p in dataset.picture]))


@torch.no_grad()
def mean_loss(model, dataset, batch_size, most=512):
    """Loss per token of the answers of a Dataset, over `most` records taken evenly from it."""
    model.eval()
    total = count = 0
    rows = range(0, len(dataset.records), math.ceil(len(dataset.records) / most))
    for start in range(0, len(rows), batch_size):
        f, tokens = dataset.batch(rows[start:start + batch_size])
        total += model.loss_sum(f, tokens).item()
        count += tokens.answer_mask.sum().item()
    return total / count


def measure(model, dataset, name="held out", blind=False, batch_size=128):
    """Let a model speak about the records of a Dataset → ({column: (R,) scores}, R texts). With `blind`, it is shown
    other records' pictures: what it still gets right, it did not see.

    Choices are ranked by their log-probability, the others are answered or described; `judge` has the columns. A score
    is NaN where a column does not concern a record.
    """
    model.eval()
    records, shown = dataset.records, shuffled(dataset) if blind else dataset
    scores, said = defaultdict(lambda: np.full(len(records), np.nan)), [""] * len(records)
    rows = sorted(range(len(records)), key=lambda i: (len(records[i].choices), len(dataset.tokens[i][0])))
    parts = []
    for n, alike in itertools.groupby(rows, key=lambda i: len(records[i].choices)):
        while part := list(itertools.islice(alike, math.ceil(batch_size / max(1, n)))):
            parts.append(part)
    for part in tqdm(parts, desc=name, disable=None):
        f, some = shown.f(part), [records[i] for i in part]
        questions = [r.question for r in some] if some[0].turns else None
        if some[0].choices:
            logp = model.score(f, questions, [list(r.choices) for r in some]).cpu()  # (B, 4)
            length = torch.tensor([[len(ids) - 1 for ids in model.token_ids(None, r.choices)[1]] for r in some])
            best = torch.stack([logp.argmax(1), (logp / length).argmax(1)], 1).tolist()
            texts = [r.choices[b[0]] for r, b in zip(some, best)]
            marks = [{("Q→A" if len(r.turns) == 1 else "QA→R") + how: r.choices[k] == r.answer
                      for how, k in zip(("", ", per token"), b)} for r, b in zip(some, best)]
        else:
            texts = model.generate(f, questions, max_tokens=64)
            marks = [judge(model, r, text) for r, text in zip(some, texts)]
            if not questions:
                marks = [m | {"CLIPScore": s.item()} for m, s in zip(marks, clip_score(model, dataset.f(part), texts))]
        for i, text, mark in zip(part, texts, marks):
            said[i] = text
            for column, score in mark.items():
                scores[column][i] = score
    for how in ("", ", per token"):
        if "QA→R" + how in scores:  # right where both are: the answer, and the rationale behind it
            pair = [(r.key, r.image, r.turns[:1]) for r in records]
            answered = {p: right for p, right in zip(pair, scores["Q→A" + how]) if right == right}
            scores["Q→AR" + how] = scores["QA→R" + how] * [answered.get(p, np.nan) for p in pair]
    order = sorted(scores, key=lambda column: (column == "all", np.isnan(scores[column]).argmin()))
    return {column: scores[column] for column in order}, said  # in the order of the records


def judge(model, record, text):
    """What a text scores against a record's answer → {column: score}: exact match (but for case), over all and by kind
    of question; VQA's soft accuracy where the data has the answers of its annotators; for the miniature's captions each
    attribute. Other captions have no truth to match: see `clip_score`."""
    if not record.turns and model.settings.preset == "mini":
        told, truth = text.split(), record.answer.split()
        return {name: told[i:i + 1] == truth[i:i + 1] for i, name in zip((0, 1, 2, 3, 6, 9), data.Scene._fields)}
    if not record.turns:
        return {}
    marks = dict.fromkeys([record.kind, "all"], text.lower() == record.answer.lower())
    return marks | (dict.fromkeys([f"VQA, {record.kind}", "VQA"], vqa_accuracy(text, record.answers))
                    if len(record.answers) > 1 else {})


@torch.no_grad()
def clip_score(model, f, captions):
    """2.5 · max(cos(picture, caption), 0) of each (Hessel et al., 2021), without their code's "A photo depicts"."""
    v = model.clip.encode_text(model.clip_tokenizer(captions).to(model.device)).float()  # (B, C)
    return 2.5 * F.cosine_similarity(f.to(v), v).clamp(min=0).cpu()


def vqa_accuracy(said, answers):
    """VQA's soft accuracy: for each annotator min(1, matches among the others / 3), averaged (Antol et al., 2015). As
    in the official scorer, texts are normalised only where the annotators differ."""
    same = normal if len(set(answers)) > 1 else str.strip
    match = [same(a) == same(said) for a in answers]
    return sum(min(1, (sum(match) - m) / 3) for m in match) / len(match)


def normal(text):
    """A text as the official scorer of VQA compares it: case, punctuation, numbers, articles, apostrophes left out."""
    before = text = text.lower()
    comma = re.search(r"\d,\d", text)
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        text = text.replace(mark, "" if comma or f"{mark} " in before or f" {mark}" in before else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBER_WORDS.get(word, word) for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


NUMBER_WORDS = {"none": "0"} | {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
CONTRACTIONS = {stem + ending.replace("'", ""): stem + ending for ending, stems in {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could i might not should they we what where who would you", "'re": "there they what why you", "'m": "i",
    "'s": "he how that there what when where who why someone somebody something",
    "'d": "he how it there they where who you someone something",
    "'ll": "how it they what who why you someone somebody something"}.items() for stem in stems.split()} | {
    "oclock": "o'clock", "maam": "ma'am", "yall": "y'all", "twas": "'twas"}


def interval(scores, picture, draws=1000):
    """95% bootstrap interval of a mean: scores (R,), the picture of each (R,) → (low, high). Pictures are drawn with
    replacement, all their records with them: what is said about one picture goes together."""
    _, picture = np.unique(picture, return_inverse=True)
    total, count = np.bincount(picture, scores), np.bincount(picture)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(count), size=len(count)) for _ in range(draws))
    return tuple(np.percentile([total[some].sum() / count[some].sum() for some in drawn], (2.5, 97.5)))


def evaluate(model, dataset, folder):
    """Measure a model with the pictures and blind, print a table with 95% intervals, leave the answers in `folder`."""
    if len(set(dataset.picture)) == 1:
        print("note: of one picture no other can be shown, so blind sees it as well")
    scores, said = measure(model, dataset)
    blind, _ = measure(model, dataset, "held out, blind", blind=True)
    print(f"{'':20}{model.settings.interaction:>20}{'blind':>24}    in percent, with 95% intervals")
    for column in scores:
        known, line = ~np.isnan(scores[column]), f"{column:20}"
        if not known.any():
            continue
        for values, width in ((scores[column][known], 20), (blind[column][known], 24)):
            low, high = interval(values, dataset.picture[known])
            line += f"{100 * values.mean():.1f} ({100 * low:.1f}–{100 * high:.1f})".rjust(width)
        print(line)
    set_aside(folder)
    Path(folder).mkdir(parents=True)
    write_answers(dataset.records, said, Path(folder))
    print(f"  {folder}/: {', '.join(sorted(p.name for p in Path(folder).iterdir()))}")


def write_answers(records, said, folder):
    """Write what was said about records: answers.jsonl; where they have ids vqa.json and captions.json, as the official
    scorers of VQA and COCO take them; sheet.png with some of the pictures; failures.png, up to four of each kind."""
    told = [(r, text, text.lower() == r.answer.lower()) for r, text in zip(records, said)]
    lines = [{"image": "drawn" if isinstance(r.image, Image.Image) else str(r.image),
              "question": r.question, "answer": text, "truth": r.answer} for r, text, _ in told]
    vqa = [{"question_id": r.key, "answer": text} for r, text, _ in told if r.answers]
    coco = {r.key: {"image_id": r.key, "caption": text} for r, text, _ in told if r.key != "" and not r.turns}
    folder.joinpath("answers.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    for name, rows in (("vqa.json", vqa), ("captions.json", list(coco.values()))):
        if rows:
            folder.joinpath(name).write_text(json.dumps(rows), "utf-8")

    some = [told[i] for i in np.random.default_rng(0).permutation(len(told))[:12]]
    wrong = sorted((t for t in told if not t[2]), key=lambda t: t[0].kind)
    wrong = [t for _, kind in itertools.groupby(wrong, key=lambda t: t[0].kind) for t in itertools.islice(kind, 4)]
    for name, rows in (("sheet.png", some), ("failures.png", wrong[:40])):
        cells = [(r.image, [(r.question or "(caption)", "#555555"), (text, "black"),
                            ("" if right else r.answer, "#d62728")]) for r, text, right in rows]
        if cells:
            draw_sheet(cells, folder / name)


def draw_sheet(cells, path, columns=4, size=192):
    """Draw pictures with lines of text below to a PNG: cells of (picture, [(text, color), …])."""
    font = ImageFont.load_default(13)
    cells = [(image, [(line, color) for text, color in texts for line in textwrap.wrap(text, 28)[:4]])
             for image, texts in cells]
    height = size + 20 + 16 * max(len(lines) for _, lines in cells)
    page = Image.new("RGB", (columns * (size + 20) + 20, math.ceil(len(cells) / columns) * height + 20), "white")
    canvas = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(cells):
        x, y, image = 20 + i % columns * (size + 20), 20 + i // columns * height, data.load_image(image)
        page.paste(image.resize((size, size), Image.Resampling.NEAREST if image.width < size else None), (x, y))
        for k, (line, color) in enumerate(lines):
            canvas.text((x, y + size + 4 + 16 * k), line, color, font)
    page.save(path)


def draw_curves(curves, path, x_name, log_x=False, log_y=False):
    """Draw curves {name: [(x, y), …]} to a PNG. A logarithmic axis needs numbers above zero."""
    width, height, margin = 800, 480, 60
    image = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    points = np.array([point for curve in curves.values() for point in curve])  # (points, 2)
    spaces = [np.geomspace if log else np.linspace for log in (log_x, log_y)]
    x_marks, y_marks = (space(low, high, 401) for space, low, high in zip(spaces, points.min(0), points.max(0)))

    def at(x, y):
        return (np.interp(x, x_marks, np.linspace(margin, width - margin / 2, 401)),
                np.interp(y, y_marks, np.linspace(height - margin, margin / 2, 401)))

    for x, y in zip(x_marks[::100], y_marks[::100]):
        canvas.line((at(x_marks[0], y), at(x_marks[-1], y)), "#dddddd")
        canvas.text((margin - 6, at(x, y)[1]), f"{y:.3g}", "black", font, "rm")
        canvas.text((at(x, y)[0], height - margin + 8), f"{x:,.0f}", "black", font, "ma")
    canvas.text((width / 2, height - 10), x_name, "black", font, "md")
    for i, ((name, points), color) in enumerate(zip(curves.items(), ("#1f77b4", "#d62728", "#7f7f7f", "#2ca02c"))):
        canvas.line([at(*point) for point in points], color, 2)
        canvas.text((margin + 12 + i * 200, 14), name.replace("_", " "), color, font)
    image.save(path)


# ---- Stages 1 and 2 ------------------------------------------------------------------------------------------


def train_adapter(model, stage, train, test, folder, steps, batch_size, lr, tokens=None, accumulate=1, seed=0,
                  train_align=False, resume=False, save_every=200):
    """Train the layers of one phase on a Dataset; leave adapter, log and loss curve in `folder`.

    `test` is the held-out Dataset or None. A step takes `accumulate` batches; its loss is averaged over all their
    answers' tokens. Beside the held-out loss stands the one with the pictures shuffled: while the two are the same,
    the model does not look. Trained weights, their gradients and the loss are fp32, whatever the frozen weights are.
    """
    optimizer = torch.optim.AdamW(model.set_trained(stage, train_align).values(), lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.llm.dtype == torch.float16)
    other = test and shuffled(test)
    plan, rows, recent, start = None, [], [], time.perf_counter()

    def losses(step):
        nonlocal plan
        plan = plan or itertools.islice(data.batches(train, batch_size, tokens, seed), step * accumulate, None)
        model.train()
        batches = [train.batch(next(plan)) for _ in range(accumulate)]
        count = sum(texts.answer_mask.sum() for _, texts in batches).item()
        for f, texts in batches:
            yield model.loss_sum(f, texts) / count

    def report(step, loss):
        recent.append(loss)
        if step % max(1, steps // 100) and step != steps:
            return
        row = {"step": step, "loss": torch.stack(recent).mean().item(), "lr": optimizer.param_groups[0]["lr"],
               "seconds": round(time.perf_counter() - start, 1)}
        if test and (step == steps or step % max(1, steps // 10) == 0):
            row["held_out_loss"], row["held_out_loss_shuffled"] = (
                mean_loss(model, some, batch_size) for some in (test, other))
            if row["held_out_loss"] == min(r["held_out_loss"] for r in [*rows, row] if "held_out_loss" in r):
                model.save(part / "best.safetensors", stage)
        rows.append(row)
        recent.clear()
        lines = [LOG, *([r.get(name, "") for name in LOG] for r in rows)]
        lmeye.write_atomically(part / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        return f"loss {row['loss']:.3f}"

    settings = (f"{model.llm.dtype}, lr {lr}, batch size {batch_size}, tokens {tokens}, accumulate {accumulate}, align "
                f"{'trained' if train_align else 'frozen'}, {len(train.records)} records of "
                f"{sum(len(q) + len(a) for q, a in train.tokens)} tokens, {model.settings}")
    with workplace(folder, resume) as part:
        fit(f"stage {stage}", part, steps, model.adapter(stage), [optimizer], losses, seed, rows, report,
            scaler=scaler, resume=resume, save_every=save_every, settings=settings)
        rows = [row for row in rows if isinstance(row["loss"], float)]
        model.save(part / CHECKPOINT, stage)
        curves = {name: [(row["step"], row[name]) for row in rows if 0 < row.get(name, 0) < math.inf]
                  for name in LOG[1:4]}
        draw_curves({name: points for name, points in curves.items() if points}, part / "loss.png", "step", log_y=True)
    first, last = rows[0], rows[-1]
    print(f"stage {stage}: {steps:,} steps in {last['seconds']:.0f} s; loss {first['loss']:.3f} → {last['loss']:.3f}"
          + (f"; held out {last['held_out_loss']:.3f}, with the pictures shuffled {last['held_out_loss_shuffled']:.3f}"
             if "held_out_loss" in last else "") + f"\n  {Path(folder) / CHECKPOINT}")


def load_data(model, stage, read, folder=None, whole=False):
    """(training, held-out Dataset or None) from what `data.read_records` gave, or drawn if the model is the miniature.

    With `whole` both are all that the files have. The features of published pictures are kept in `folder`; CLIP's
    image tower has then done its work and is dropped.
    """
    skipped = Counter()
    if model.settings.preset == "mini":
        train, test = (data.encode(model, data.miniature(stage, held_out), skipped) for held_out in (False, True))
    else:
        records, skipped = read
        train = data.encode(model, records, skipped, folder)
        train, test = (train, train) if whole else data.split(train)
        model.clip.visual = None
    held_out = len(test.records) if test else 0
    print(f"data: {held_out:,} records to evaluate" if whole else f"data: {len(train.records):,} records to train on, "
          f"{held_out:,} held out" + ("" if test else " (too few pictures)"))
    reasons = (+skipped).most_common()  # those that did occur
    for reason, n in reasons[:10]:
        print(f"  skipped {n:,}: {lmeye.printable(reason)}")
    if reasons[10:]:
        print(f"  skipped {sum(n for _, n in reasons[10:]):,}: other reasons")
    return train, test


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), required=True,
                        help="0: the miniature's own frozen models. 1: captions. 2: instructions")
    parser.add_argument("--data", action="append", metavar="PATH", help="a folder of a.jpg beside a.txt, tar shards, "
                        "or a file as LLaVA, COCO, VQA, VCR or LMEye publish it; given more than once: mixed")
    parser.add_argument("--images", action="append", metavar="PATH", help="the folder or zip archive where picture "
                        "names in --data start (default: the folder of --data); may be given more than once")
    parser.add_argument("--download", action="store_true", help="without --data: agree to download the published data")
    parser.add_argument("--no-cache", action="store_true", help="do not keep the pictures' features for a later run")
    parser.add_argument("--out", default="out", help="everything is written below this folder (default: out)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument("--epochs", type=float, help="passes over the data, instead of --steps")
    parser.add_argument("--batch-size", type=int, help="records that are computed at once, at most")
    parser.add_argument("--tokens", type=int, help="text tokens that are computed at once, at most, with "
                        "padding: this bounds the memory")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to an optimiser step (default: 1)")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--train-align", action="store_true", help="stage 2: go on training align and img as well")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted, exactly")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS",
                        help="how often the state is saved, to be resumed from (default: 200)")
    parser.add_argument("--eval-only", action="store_true", help="train nothing: evaluate the stage's checkpoint "
                        "on all of --data, or without --data on the held-out part of the published data")
    parser.add_argument("--checkpoint", metavar="FILE", help="the adapter to evaluate or to start from "
                        "(default: that of the stage, or of the one before, below --out)")
    lmeye.add_flags(parser)
    args = parser.parse_args()
    for name in ("steps", "epochs", "batch_size", "tokens", "accumulate", "lr", "save_every"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} has to be above zero")
    if not 0 <= args.seed <= 10 ** 9:
        parser.error("--seed has to be from 0 to 1000000000")
    if args.stage == 0 and (args.eval_only or args.checkpoint):
        parser.error("--stage 0 has no checkpoint: --eval-only and --checkpoint are for stages 1 and 2")
    if args.images and not args.data:
        parser.error("--images has the pictures of --data, which is missing")
    return args


def main():
    args = parse_args()
    settings = lmeye.settings_from(args)
    mini, out = settings.preset == "mini", Path(args.out, settings.preset)
    device, dtype = lmeye.device_and_dtype(settings.precision)
    chosen = "" if args.preset or not mini else " (no CUDA GPU was found)"
    print(f"preset {settings.preset}{chosen}, on {device.type}, frozen weights in {str(dtype).partition('.')[2]}")
    if mini and args.data:
        raise UserError("--data: the miniature reads only its own world; name another --preset, or --llm and --clip")
    if args.stage == 0 and not mini:
        raise UserError("--stage 0 is for the miniature: the other presets' frozen models come trained")
    variant = f"-{settings.interaction}" if args.stage == 2 and settings.interaction != "full" else ""
    folder = out / f"stage{args.stage}{variant}"
    whole = args.eval_only and args.data is not None
    if args.resume and (folder / CHECKPOINT).is_file() and not Path(f"{folder}.part").exists():
        print(f"nothing to resume: {folder} is complete")
        args.eval_only, args.checkpoint = True, None
    before = None  # the checkpoint to evaluate or to start from
    if args.checkpoint or args.eval_only or args.stage == 2:
        before = Path(args.checkpoint or (folder if args.eval_only else out / "stage1") / CHECKPOINT)
    if before and not before.is_file():
        names = ("preset", "llm", "clip", "interaction", "out")
        same = [f"--{name} {shlex.quote(getattr(args, name))}" for name in names
                if getattr(args, name) not in (None, "out")]  # what a further command for this model must repeat
        missing = " ".join([f"--stage {args.stage if args.eval_only else 1}", *same])
        raise UserError(f"{before} is missing" + ("" if args.checkpoint else
                        f". Make it first:  python train.py {missing}"))
    if not mini and not args.data:
        with locked(Path(args.out, "data")):
            args.data, args.images = data.fetch(args.stage, args.out, args.download)
    with locked(out):
        run_stage(args, settings, folder, before, whole)


def run_stage(args, settings, folder, before, whole):
    """Train (or only evaluate) one stage into `folder`; `before` is the checkpoint that it starts from, or None. With
    `whole`, all of --data is evaluated."""
    mini, out = settings.preset == "mini", folder.parent
    if mini:
        frozen = {out / "clip": train_clip, out / "llm": train_llm}
        if args.stage == 0 and not args.resume:  # both anew
            for place in frozen:
                set_aside(place)
        for place, make in frozen.items():
            if not place.is_dir():
                make(place, args.seed, args.resume, args.save_every)
    if args.stage == 0:
        return
    read = None if mini else data.read_records(args.data, args.images, args.stage)  # mistakes there are told first
    torch.manual_seed(args.seed)
    model = LMEye.from_settings(settings)
    stage = model.load(before) if before else None
    if args.eval_only and stage != args.stage:
        raise UserError(f"{before}: is of stage {stage}, not {args.stage}")
    train, test = load_data(model, args.stage, read, None if args.no_cache else out / "features", whole)
    if not args.eval_only:
        names = ("steps", "epochs", "batch_size", "tokens", "lr", "accumulate", "seed", "train_align", "resume",
                 "save_every")
        given = {name: getattr(args, name) for name in names if getattr(args, name)}
        options = DEFAULTS["mini" if mini else "real", args.stage] | given
        epochs = options.pop("epochs", None)
        if args.epochs or "steps" not in options:
            an_epoch = len(data.plan_epoch(train, options["batch_size"], args.tokens, args.seed, 0))
            options["steps"] = math.ceil(epochs * an_epoch / args.accumulate)
        train_adapter(model, args.stage, train, test, folder, **options)
    elif test:
        print("loss {:.3f}, with the pictures shuffled {:.3f}".format(
            *(mean_loss(model, some, 64) for some in (test, shuffled(test)))))
    if test:
        evaluate(model, test, (before.parent if args.eval_only else folder) / "evaluation")
    if mini and args.stage == 2:  # held-out pictures to ask about
        (out / "examples").mkdir(exist_ok=True)
        rng = random.Random(1)
        for i, scene in enumerate(rng.sample(data.HELD_OUT, 6), 1):
            data.draw(scene, rng).save(out / f"examples/{i}.png")
        print(f'Try it:  python sample.py {out}/examples/1.png "what shape is it?"'
              + (f" --out {args.out}" if args.out != "out" else ""))


if __name__ == "__main__":
    lmeye.run(main)
