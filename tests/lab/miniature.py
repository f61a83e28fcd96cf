"""The miniature: a small world of shapes, and a tiny CLIP and a tiny language model that know it.

    python tests/lab/miniature.py [--out out] [--seed 0]

So the whole method can be trained and measured on a laptop, by the programs that train it on anything else.
What is written below OUT/mini could as well have been downloaded:

    clip/, llm/                          frozen models, as open_clip and transformers keep them
    captions.json, val_captions.json     pictures with captions, to train on and held out
    questions.json, val_questions.json   the same with questions
    absent.json                          yes/no questions, half of them about what held-out pictures lack
    pictures.zip, examples/              all pictures; six more held-out ones to ask about
"""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C meanwhile ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import io
import itertools
import json
import math
import multiprocessing
import random
import sys
import tempfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import lmeye
import shapes
from lmeye import ANSWER, IMAGE, QUESTION, UserError
from shapes import HELD_OUT, SIDE, TRAINING, VALUES, Scene, ask, build_tokenizer, describe

# ---- The frozen models ---------------------------------------------------------------------------------


def minimise(loss, model, steps, muon_lr, adam_lr, name, line):
    """Train a model: `loss()` gives the loss of the next batch. Its bar, `name`, stands in this line.

    Muon (Jordan, 2024) takes a fraction of AdamW's steps. It learns matrices only: convolution kernels are
    given to it as matrices that share their memory.
    """
    matrices, others = [], []
    for key, p in model.named_parameters():
        if p.ndim > 1 and "embed" not in key:
            matrices.append(p)
        else:
            others.append(p)  # embeddings, gains and biases
    flat = [p.detach().flatten(1) for p in matrices]
    muon = torch.optim.Muon(flat, muon_lr, weight_decay=0.0, momentum=0.9)
    adam = torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98))
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps")
    for step in tqdm(range(steps), name, disable=None, position=line):
        # The rates rise for a twentieth of the steps, then fall along a cosine.
        rate = min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        model.zero_grad()
        loss().backward()
        for p, matrix in zip(matrices, flat):
            matrix.grad = p.grad.flatten(1)
        for optimizer, highest in ((muon, muon_lr), (adam, adam_lr)):
            optimizer.param_groups[0]["lr"] = highest * rate
            optimizer.step()


def pixels(pictures):
    """RGB pictures → tensor (B, 3, side, side) from -1 to 1, as the saved CLIP's preprocessing makes it."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def train_clip(folder, seed, world=shapes, steps=550, batch_size=64, width=8, context=16):
    """Train a tiny CLIP on pictures; save it as a folder that open_clip loads (`local-dir:`).

    Two losses: each picture is to find its whole caption in the batch, each caption its picture; and among
    captions that name one value of one attribute, "red things", a picture is to find the true one. With whole
    captions alone two of a batch almost never differ in one attribute only, and nothing makes CLIP learn it.
    `context` is at least the length of the longest caption, with its start and end; `world` is the module
    shapes or emoji.
    """
    tokenizer = world.build_tokenizer(ends=True)
    config = {
        "embed_dim": 8 * width,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": width, "head_width": 32, "image_size": SIDE},
        "text_cfg": {"context_length": context, "vocab_size": len(tokenizer), "width": 64, "heads": 4,
                     "layers": 2, "hf_tokenizer_name": "in this folder"},
    }
    torch.manual_seed(seed)
    rng = random.Random(seed)
    clip = open_clip.CLIP(**config)
    captions = world.part_captions()  # {attribute: {value: a caption of it alone}}
    texts = [text for values in captions.values() for text in values.values()]

    def encode(scenes, normalize):
        """→ (features of their pictures, of their whole captions), each (B, C)."""
        f = clip.encode_image(pixels([world.draw(scene, rng) for scene in scenes]), normalize)
        return f, encode_text([world.describe(scene) for scene in scenes], normalize)

    def encode_text(texts, normalize):
        padded = tokenizer(texts, padding="max_length", max_length=context, return_tensors="pt")
        return clip.encode_text(padded.input_ids, normalize)

    def loss():
        scenes = rng.choices(world.TRAINING, world.HOW_OFTEN, k=batch_size)
        f, whole = encode(scenes, normalize=True)
        logits = clip.logit_scale.exp() * f @ whole.T  # (B, B)
        own = torch.arange(batch_size)
        total = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        logits = clip.logit_scale.exp() * f @ encode_text(texts, normalize=True).T  # (B, all values)
        parts = logits.split([len(values) for values in captions.values()], 1)
        for part, (name, values) in zip(parts, captions.items()):
            rows = [i for i, scene in enumerate(scenes) if getattr(scene, name) in values]
            target = torch.tensor([list(values).index(getattr(scenes[i], name)) for i in rows])
            each = F.cross_entropy(part[rows], target, reduction="sum") / batch_size
            total += world.CLIP_WEIGHTS[name] * each
        return total

    minimise(loss, clip, steps, 0.02, 5e-3, "CLIP", line=0)
    clip.eval()
    with torch.no_grad():  # unit variance: cosines don't feel the length of a feature, but linear layers do
        f, v = encode(rng.sample(world.TRAINING, 500), normalize=False)
        clip.visual.attnpool.c_proj.weight /= f.std()
        clip.visual.attnpool.c_proj.bias /= f.std()
        clip.text_projection /= v.std()
    tokenizer.save_pretrained(folder)
    safetensors.torch.save_file(clip.state_dict(), Path(folder, "open_clip_model.safetensors"))
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    Path(folder, "open_clip_config.json").write_text(json.dumps(settings))


def write_example(scene, turns, hint_share, rng):
    """A text to learn reading from → [(piece of it, weight of the piece's tokens in the loss)].

    A caption, which names a random part of the attributes, so that its reader learns to look for content,
    not for places in it; then questions about that part. Before some answers stands a hint, a phrase that
    names one or two attributes, also such as the caption left out. Yes/no takes comparing, the rest only
    looking up: it gets half of the questions.
    """
    names = Scene._fields
    named = rng.sample(names, rng.randint(1, len(names)))
    pieces = [(IMAGE, 0), (" " + describe(scene, named), 0.2)]
    for _ in range(turns):
        known, hint = named, ""
        if rng.random() < hint_share:
            known = rng.sample(names, rng.randint(1, 2))
            hint = " " + describe(scene, known)
        kind = rng.choice((rng.choice(known), "yes/no"))
        question, answer = ask(scene, kind, rng, known)
        pieces += [(QUESTION + question + hint + ANSWER, 0), (" " + answer, 1)]
    return pieces


def encode_example(pieces, tokenizer):
    """→ its tokens, the one to follow each, and the weight of that one in the loss: three tensors (T,)."""
    tokens, targets, weights = [tokenizer.bos_token_id], [0], [0]
    for text, weight in pieces:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens += ids
        if weight:  # the token before predicts the first of these, and the last of them the end
            targets = targets[:-1] + ids + [tokenizer.eos_token_id]
            weights = weights[:-1] + [weight] * (len(ids) + 1)
        else:
            targets += [0] * len(ids)
            weights += [0] * len(ids)
    return torch.tensor(tokens), torch.tensor(targets), torch.tensor(weights)


def train_llm(folder, seed, steps=550, batch_size=48, turns=3, hint_share=0.4, width=128, layers=2):
    """Train a tiny OPT to read: a caption, then questions about it. Save it as transformers load it.

    The caption stands where <img> will stand. In `hint_share` of the questions a hint stands before
    "Answer:", where <img-d> will stand; with 0 the model never saw anything there. Only captions and answers
    are learned, and behind each the end of the text, although it goes on: so the model stops after an answer.
    """
    tokenizer = build_tokenizer(ends=False)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    llm = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        dropout=0.0, num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id))
    positions = llm.get_decoder().embed_positions.weight
    frequencies = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    angles = torch.arange(len(positions))[:, None] * frequencies
    with torch.no_grad():  # a table of sinusoids is learned from sooner than one of noise
        positions[:, 0::2] = 0.1 * angles.sin()
        positions[:, 1::2] = 0.1 * angles.cos()

    def loss():
        rows = []
        for scene in rng.choices(TRAINING, k=batch_size):
            rows.append(encode_example(write_example(scene, turns, hint_share, rng), tokenizer))
        tokens, targets, weights = [pad_sequence(column, True) for column in zip(*rows)]  # (B, T)
        h = llm.base_model(input_ids=tokens).last_hidden_state  # padding, at the right, disturbs nothing
        learned = weights > 0
        logits = llm.get_output_embeddings()(h[learned])
        losses = F.cross_entropy(logits, targets[learned], reduction="none")
        return (losses * weights[learned]).sum() / weights.sum()

    minimise(loss, llm, steps, 0.01, 1e-3, "language model", line=1)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- The files -----------------------------------------------------------------------------------------

FILES = ("captions.json", "questions.json", "val_captions.json", "val_questions.json", "absent.json",
         "pictures.zip", "examples", "clip", "llm")  # `llm` last: where it is, all is there


def write_json(path, records):
    """Write a list of records as JSON, one a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", "utf-8")


def to_record(image, texts, **more):
    """[question, answer, …] about a picture → a conversation in LLaVA's shape."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": Path(image).stem, "image": image, "conversations": turns} | more


def question_record(image, scene, kinds, rng, world):
    """A conversation with a question of each of these kinds; one alone is its category."""
    texts = []
    for kind in kinds:
        texts += world.ask(scene, kind, rng)
    texts[0] = "<image>\n" + texts[0]
    return to_record(image, texts, **({"category": kinds[0]} if len(kinds) == 1 else {}))


def write_data(folder, seed, pictures, world=shapes):
    """Write `pictures` random scenes to train on and each held-out scene once, with captions and questions,
    and six more held-out pictures as examples. Returns the scenes to train on."""
    rng = random.Random(f"data {seed}")
    training = rng.choices(world.TRAINING, world.HOW_OFTEN, k=pictures)
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for part, prefix, scenes in (("train", "", training), ("val", "val_", world.HELD_OUT)):
            captions, questions = [], []
            for number, scene in enumerate(scenes):
                image, file = f"{part}/{number:06d}.png", io.BytesIO()
                world.draw(scene, rng).save(file, "PNG", compress_level=1)
                archive.writestr(image, file.getvalue())
                captions.append(to_record(image, ["Describe the picture.\n<image>", world.describe(scene)]))
                for kinds in world.draw_kinds(scene, rng, held_out=part == "val"):
                    questions.append(question_record(image, scene, kinds, rng, world))
            write_json(folder / f"{prefix}captions.json", captions)
            write_json(folder / f"{prefix}questions.json", questions)
    (folder / "examples").mkdir()
    for number, scene in enumerate(rng.sample(world.HELD_OUT, 6), 1):
        world.draw(scene, rng).save(folder / "examples" / f"{number}.png")
    return training


def absent_records(training):
    """Records of yes/no questions about held-out pictures, half of them about what is absent.

    That is chosen as POPE does (Li et al., arXiv 2305.10355): at random; the value that is most frequent in
    the `training` scenes; or the one that there comes most often with the rest of the scene. The fourth
    category is a trap of this world's own, "are they red?" of blue objects on red: the background is red.
    """
    alone, together, records = Counter(), Counter(), []  # how often a fact, or two of them, are in the scenes
    for scene in training:
        facts = scene._asdict().items()
        alone.update(facts)
        together.update(itertools.permutations(facts, 2))

    def absent(scene, name, category, rng):
        values = [value for value in VALUES[name] if value != getattr(scene, name)]
        others = [fact for fact in scene._asdict().items() if fact[0] != name]
        if category == "trap":
            return scene.background
        if category == "random":
            return rng.choice(values)
        if category == "popular":
            return max(values, key=lambda value: alone[name, value])
        return max(values, key=lambda value: sum(together[(name, value), fact] for fact in others))

    for category in ("random", "popular", "adversarial", "trap"):
        rng = random.Random(0)
        names = ("color",) if category == "trap" else ("color", "shape")  # a background has no shape
        for (number, scene), name in itertools.product(enumerate(HELD_OUT), names):
            lure = absent(scene, name, category, rng)
            for value, answer in ((getattr(scene, name), "yes"), (lure, "no")):
                one = scene.number == "one"
                if name == "shape":
                    value = ("a " if one else "") + scene._replace(shape=value).noun
                records.append({"image": f"val/{number:06d}.png", "category": category,
                                "question": f"{'is it' if one else 'are they'} {value}?", "answer": answer})
    return records


def train_llm_in_child(folder, seed, recipe):
    """What runs in a process of its own, on one core beside CLIP's. `make` sees to Ctrl-C, and stops it."""
    tqdm.set_lock(threading.RLock())  # tqdm's own, a semaphore, would outlive a process that is stopped
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    train_llm(folder, seed, **recipe)


def make(out, seed=0, clip_steps=550, pictures=6000, **recipe):
    """Make the miniature below `out`/mini, or nothing: all is put in its place when it is complete.

    The two models are trained side by side, each on one core; `recipe` are options of `train_llm`. UserError
    if something of the miniature is there already.
    """
    place = Path(out, "mini")
    for name in FILES:
        if (place / name).exists():
            raise UserError(f"{place / name} is there already: remove {place}, or name another --out")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=place) as part:
        part = Path(part)
        context = multiprocessing.get_context("spawn")  # there is on every system
        child = context.Process(target=train_llm_in_child, args=(part / "llm", seed, recipe), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits that
        child.start()
        signal.signal(signal.SIGINT, handler)
        try:
            training = write_data(part, seed, pictures)
            write_json(part / "absent.json", absent_records(training))
            train_clip(part / "clip", seed, steps=clip_steps)
            child.join()
        finally:
            child.terminate()
            child.join()
        if child.exitcode != 0:
            raise UserError(f"the language model's training failed, with status {child.exitcode}: see above")
        for name in FILES:
            (part / name).rename(place / name)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--out", default="out", help="everything is written to the folder mini below it (default: out)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--hint-share", type=float, default=0.4, help="share of the language model's training questions with "
        "a hint where <img-d> will stand (default: 0.4)")
    add("--width", type=int, default=128, help="of the language model, a multiple of 4 (default: 128)")
    add("--layers", type=int, default=2, help="of the language model (default: 2)")
    args = parser.parse_args()
    if args.width < 4 or args.width % 4 or args.layers < 1 or not 0 <= args.hint_share <= 1:
        parser.error("--width has to be a multiple of 4, --layers at least 1, --hint-share from 0 to 1")
    for number in (signal.SIGINT, signal.SIGTERM):  # both end it in the same way
        signal.signal(number, signal.default_int_handler)
    torch.set_num_threads(1)
    make(args.out, args.seed, hint_share=args.hint_share, width=args.width, layers=args.layers)


if __name__ == "__main__":
    lmeye.run_main(main)
