"""The miniature: a small world of shapes, and a tiny CLIP and a tiny language model that know it.

    python tests/lab/miniature.py [--out out] [--seed 0]

writes below OUT/mini what could as well have been downloaded: `clip/` and `llm/`, frozen models as open_clip and
transformers keep them; `captions.json` and `questions.json` with their held-out companions `val_captions.json` and
`val_questions.json`, in LLaVA's shape; `pictures.zip`; `examples/`, held-out pictures to ask about. The whole method
can so be trained and measured on a laptop, by the programs that train it on anything else. `llm` is put in its place
last: where it is, all is there.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM

import lmeye
from lmeye import ANSWER, IMAGE, QUESTION, UserError
from shapes import HELD_OUT, KINDS, OFTEN, SIDE, TRAINING, VALUES, ask, attributes, build_tokenizer, describe, draw


class World(NamedTuple):
    """What a tiny CLIP and a tiny language model can be trained on. A scene is whatever `draw` can draw."""
    training: list  # scenes
    values: dict  # {attribute: its values}; a scene, a NamedTuple, has one of them, or None, as a field
    weights: dict  # {attribute: its weight in CLIP's loss}: more for those that are hard to see
    attributes: Callable  # (scene) → names of the attributes that a caption of it can name
    draw: Callable  # (scene, rng) → RGB picture, side × side
    describe: Callable  # (scene, named) → caption that names these attributes
    ask: Callable  # (scene, kind, rng, named) → (question, answer); kind: one of `named`, or "yes/no"
    build_tokenizer: Callable  # (ends) → see build_tokenizer
    side: int  # of a picture, in pixels
    caption_tokens: int  # of the longest caption, with its start and end


WORLD = World(TRAINING, VALUES, {"number": 2, "size": 1, "color": 2, "shape": 4, "place": 2, "background": 0.5},
              attributes, draw, describe, ask, build_tokenizer, SIDE, 16)

# ---- The frozen models ---------------------------------------------------------------------------------------


class Muon(torch.optim.Muon):
    """Muon (Jordan, 2024) learns the miniature's models in a fraction of AdamW's steps. torch's takes matrices only:
    it is given convolution kernels as matrices that share their memory."""

    def __init__(self, parameters, lr):
        self.parameters = parameters
        super().__init__([p.detach().flatten(1) for p in parameters], lr, weight_decay=0.0, momentum=0.9)

    def step(self):
        for p, matrix in zip(self.parameters, self.param_groups[0]["params"]):
            matrix.grad = p.grad.flatten(1)
        super().step()


def make_optimizers(model, muon_lr, adam_lr, steps):
    """Muon for matrices and convolution kernels, AdamW for embeddings, gains and biases → (optimizers, schedulers)."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.ndim > 1 and "embed" not in name:
            matrices.append(p)
        else:
            others.append(p)
    optimizers = [Muon(matrices, muon_lr), torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98))]

    def rate(step):  # rises for a twentieth of the steps, then falls along a cosine
        return min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]


def pixels(pictures):
    """RGB pictures → tensor (B, 3, side, side) from -1 to 1, as the saved CLIP's preprocessing makes it."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def train_clip(folder, seed, world=WORLD, steps=550, batch_size=64, width=8, text_layers=2):
    """Train a tiny CLIP on pictures of a world; save it as a folder that open_clip loads (`local-dir:`).

    Two losses: each picture is to find its whole caption in the batch, each caption its picture; and among captions
    that name one value of one attribute, "red things", a picture is to find the true one. With whole captions alone
    two of a batch almost never differ in one attribute only, and nothing makes CLIP learn it.
    """
    tokenizer = world.build_tokenizer(ends=True)
    config = {
        "embed_dim": 8 * width,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": width, "head_width": 32, "image_size": world.side},
        "text_cfg": {"context_length": world.caption_tokens, "vocab_size": len(tokenizer), "width": 64, "heads": 4,
                     "layers": text_layers, "hf_tokenizer_name": "in this folder"},
    }
    torch.manual_seed(seed)
    rng = random.Random(seed)
    clip = open_clip.CLIP(**config)
    optimizers, schedulers = make_optimizers(clip, 0.02, 5e-3, steps)

    def words(texts):
        return tokenizer(texts, padding="max_length", max_length=world.caption_tokens, return_tensors="pt").input_ids

    values, singles = {}, []  # what an attribute can be, and the captions that say just that
    for name, options in world.values.items():
        values[name] = [value for value in options if value is not None]
        singles += [world.describe(world.training[0]._replace(**{name: value}), [name]) for value in values[name]]
    print(f"CLIP: {sum(p.numel() for p in clip.parameters()):,} parameters, {steps} steps")
    start = time.perf_counter()
    for _ in tqdm(range(steps), "CLIP", disable=None):
        scenes = rng.choices(world.training, k=batch_size)
        f = clip.encode_image(pixels([world.draw(scene, rng) for scene in scenes]), normalize=True)
        whole = clip.encode_text(words([world.describe(s, world.attributes(s)) for s in scenes]), normalize=True)
        logits = clip.logit_scale.exp() * f @ whole.T  # (B, B)
        loss = F.cross_entropy(logits, torch.arange(batch_size)) + F.cross_entropy(logits.T, torch.arange(batch_size))
        single = clip.encode_text(words(singles), normalize=True)
        parts = (clip.logit_scale.exp() * f @ single.T).split([len(options) for options in values.values()], 1)
        for part, (name, options) in zip(parts, values.items()):  # part (B, number of values)
            has = [getattr(scene, name) for scene in scenes]
            target = torch.tensor([-100 if value is None else options.index(value) for value in has])  # -100: left out
            loss += world.weights[name] * F.cross_entropy(part, target, reduction="sum") / batch_size
        clip.zero_grad()
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()

    clip.eval()
    with torch.no_grad():  # cosines don't feel the length of a feature, but linear layers do: unit variance for both
        scenes = rng.sample(world.training, 500)
        f = clip.encode_image(pixels([world.draw(scene, rng) for scene in scenes]))
        v = clip.encode_text(words([world.describe(s, world.attributes(s)) for s in scenes]))
        clip.visual.attnpool.c_proj.weight /= f.std()
        clip.visual.attnpool.c_proj.bias /= f.std()
        clip.text_projection /= v.std()
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    safetensors.torch.save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    tqdm.write(f"CLIP: trained in {time.perf_counter() - start:.0f} s")


def write_example(world, scene, turns, hint_share, rng):
    """A text to learn reading from → [(piece of it, weight of the piece's tokens in the loss)].

    A caption, which names a random part of the attributes, so that its reader learns to look for content, not for
    places in it; then questions about that part. Before some answers stands a hint, a phrase that names one or two
    attributes more. Yes/no takes comparing, the rest only looking up: it gets half of the questions.
    """
    names = world.attributes(scene)
    named = rng.sample(names, rng.randint(1, len(names)))
    pieces = [(IMAGE, 0), (" " + world.describe(scene, named), 0.2)]
    for _ in range(turns):
        known, hint = named, ""
        if rng.random() < hint_share:
            known = rng.sample(names, rng.randint(1, 2))
            hint = " " + world.describe(scene, known)
        kind = rng.choice((rng.choice(known), "yes/no"))
        question, answer = world.ask(scene, kind, rng, known)
        pieces += [(QUESTION + question + hint + ANSWER, 0), (" " + answer, 1)]
    return pieces


def train_llm(folder, seed, world=WORLD, steps=550, batch_size=48, turns=3, hint_share=0.4, width=128, layers=2):
    """Train a tiny OPT to read: a caption, then questions about it. Save it as a folder that transformers load.

    The caption stands where <img> will stand. In `hint_share` of the questions a hint stands before "Answer:", where
    <img-d> will stand; with 0 the model never saw anything at that place. Only captions and answers are learned, and
    behind each the end of the text, although it goes on: so the model stops after an answer, whatever stood before.
    """
    tokenizer = world.build_tokenizer(ends=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    rng = random.Random(seed)
    llm = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, dropout=0.0,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=bos, eos_token_id=eos))
    positions = llm.get_decoder().embed_positions.weight
    with torch.no_grad():  # a table of sinusoids is learned from sooner than one of noise
        angle = torch.arange(len(positions))[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
        positions[:, 0::2], positions[:, 1::2] = 0.1 * angle.sin(), 0.1 * angle.cos()
    optimizers, schedulers = make_optimizers(llm, 0.01, 1e-3, steps)

    print(f"language model: {llm.num_parameters():,} parameters, {steps} steps")
    start = time.perf_counter()
    for _ in tqdm(range(steps), "language model", disable=None, position=1):
        all_tokens, all_targets, all_weights = [], [], []  # tokens, the one to follow each, its weight in the loss
        for scene in rng.choices(world.training, k=batch_size):
            pieces = write_example(world, scene, turns, hint_share, rng)
            coded = tokenizer([text for text, _ in pieces], add_special_tokens=False).input_ids
            tokens, targets, weights = [bos], [0], [0]
            for ids, (_, weight) in zip(coded, pieces):
                tokens += ids
                if weight:  # the token before predicts the first of these, and the last of them the end
                    targets = targets[:-1] + ids + [eos]
                    weights = weights[:-1] + [weight] * (len(ids) + 1)
                else:
                    targets += [0] * len(ids)
                    weights += [0] * len(ids)
            all_tokens.append(torch.tensor(tokens))
            all_targets.append(torch.tensor(targets))
            all_weights.append(torch.tensor(weights))
        tokens, targets, weights = [pad_sequence(rows, True) for rows in (all_tokens, all_targets, all_weights)]  # (B, T)
        h = llm.base_model(input_ids=tokens).last_hidden_state  # padding is at the right, where nothing learned sees it
        learned = weights > 0
        loss = F.cross_entropy(llm.get_output_embeddings()(h[learned]), targets[learned], reduction="none")
        loss = (loss * weights[learned]).sum() / weights.sum()
        llm.zero_grad()
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tqdm.write(f"language model: trained in {time.perf_counter() - start:.0f} s")


# ---- The files -----------------------------------------------------------------------------------------------

FILES = ("captions.json", "questions.json", "val_captions.json", "val_questions.json", "pictures.zip", "examples",
         "clip", "llm")  # in the order in which they are put in their place


def write_json(path, records):
    """Write a list of records as JSON, one a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", "utf-8")


def question_record(image, scene, kinds, rng):
    """A conversation in the shape of LLaVA's instruction data, with a question of each of these kinds. Where there is
    one alone, its kind is the record's category."""
    turns = []
    for kind in kinds:
        question, answer = ask(scene, kind, rng)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    record = {"id": Path(image).stem, "image": image, "conversations": turns}
    if len(kinds) == 1:
        record["category"] = kinds[0]
    return record


def draw_kinds(rng):
    """Kinds of six questions to train on, in four or five conversations: one in four comes after another one."""
    conversations = [[kind] for kind in rng.choices(KINDS, OFTEN, k=rng.choice((4, 5)))]
    for kinds in conversations[:6 - len(conversations)]:
        kinds += rng.choices(KINDS, OFTEN)
    return conversations


def write_data(folder, seed, pictures):
    """Write pictures with captions and questions: `pictures` random scenes to train on, with six questions each, and
    each held-out scene once, with a question of each kind; and six more held-out pictures as examples."""
    rng = random.Random(f"data {seed}")
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for part, prefix, scenes in (("train", "", rng.choices(TRAINING, k=pictures)), ("val", "val_", HELD_OUT)):
            captions, questions = [], []
            for number, scene in enumerate(scenes):
                image, file = f"{part}/{number:06d}.png", io.BytesIO()
                draw(scene, rng).save(file, "PNG", compress_level=1)
                archive.writestr(image, file.getvalue())
                request = {"from": "human", "value": "Describe the picture.\n<image>"}
                captions.append({"id": Path(image).stem, "image": image,
                                 "conversations": [request, {"from": "gpt", "value": describe(scene)}]})
                conversations = draw_kinds(rng) if part == "train" else [[kind] for kind in KINDS]
                for kinds in conversations:
                    questions.append(question_record(image, scene, kinds, rng))
            write_json(folder / f"{prefix}captions.json", captions)
            write_json(folder / f"{prefix}questions.json", questions)
    (folder / "examples").mkdir()
    for number, scene in enumerate(rng.sample(HELD_OUT, 6), 1):
        draw(scene, rng).save(folder / "examples" / f"{number}.png")


def end_with_parent():
    """Wait for the end of the program that started this one, and end, too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def train_llm_in_child(folder, seed, steps):
    """What runs in a process of its own, on one core beside CLIP's; the program that started it minds Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    train_llm(folder, seed, steps=steps)


def make(out, seed=0, clip_steps=550, llm_steps=550, pictures=6000):
    """Make the miniature below `out`/mini, or nothing: all is put in its place when it is complete, `llm` last. The two
    models are trained side by side, each on one core. UserError if something of it is there already."""
    place = Path(out, "mini")
    for name in FILES:
        if (place / name).exists():
            raise UserError(f"{place / name} is there already: remove {place}, or name another folder with --out")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=place) as part:
        part = Path(part)
        context = multiprocessing.get_context("spawn")  # there is on every system
        child = context.Process(target=train_llm_in_child, args=(part / "llm", seed, llm_steps), daemon=True)
        try:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child is born without ears for Ctrl-C
            child.start()
            signal.signal(signal.SIGINT, handler)
            write_data(part, seed, pictures)
            train_clip(part / "clip", seed, steps=clip_steps)
            child.join()
        finally:
            if child.pid:
                child.terminate()
                child.join()
        if child.exitcode != 0:
            raise UserError(f"the language model's training ended with status {child.exitcode}; what it said is above")
        for name in FILES:
            (part / name).rename(place / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="everything is written to the folder mini below this one")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    torch.set_num_threads(1)
    make(args.out, args.seed)


if __name__ == "__main__":
    lmeye.run_main(main)
