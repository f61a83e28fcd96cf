"""Speed and memory, side by side in one run. Random weights serve: they cost the same.

    python tests/benchmark.py                    every row that this machine can run
    python tests/benchmark.py train first        the rows with these names

    train       phase-2 samples/s against the authors' schedule (batch 1 × 16, two whole passes, logits everywhere)
    share       a step's share of the machine's matmul rate, measured beside it, 4·P·T operations for T tokens through
                P frozen weights (forward, and backward to the inputs; the head counts at labelled places only)
    first       time to the first token of `full` over that of `static`, and of two whole passes over it
    generate    tokens/s against transformers' own `generate` on the same language model without a picture
    features    pictures/s of decoding alone, of CLIP's image tower alone, and of the feature pass
    padding     tokens computed over tokens real, on lengths as in LLaVA-Instruct-150K
    zip         seconds to open a zip archive of a million pictures
    grow        step time as one thing grows: batch, prompt, language model, N, slots
    full-size   OPT-1.3b and ViT-L/14 in bf16: a step of each phase and an answer, with the peak of memory
    mini        seconds of the miniature's stages from the command line
    epoch       phase 1 on 595,375 pairs, features included, projected from the rates (needs CUDA)
    memory      peak memory and time of a step at 4,096 tokens for each size of language model (needs CUDA)
"""

import argparse
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import data
import lmeye
from lmeye import LMEye, Settings

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = {  # (width, layers, heads, width of the feed-forward layer)
    "opt-125m": (768, 12, 12, 3072), "opt-350m": (1024, 24, 16, 4096), "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240), "opt-6.7b": (4096, 32, 32, 16384), "bloomz-7b1": (4096, 30, 32, 16384),
}
CLIP = {}
train_py = str(Path(__file__).resolve().parent.parent / "train.py")


def random_llm(size, dtype):
    width, layers, heads, inner = SIZES[size]
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if size.startswith("bloom"):
        config = transformers.BloomConfig(vocab_size=250880, hidden_size=width, n_layer=layers, n_head=heads, **ends)
    else:
        narrow = 512 if size == "opt-350m" else width
        config = transformers.OPTConfig(
            vocab_size=50272, hidden_size=width, word_embed_proj_dim=narrow, ffn_dim=inner, num_hidden_layers=layers,
            num_attention_heads=heads, do_layer_norm_before=size != "opt-350m", **ends)
    torch.set_default_dtype(dtype)
    with DEVICE:
        llm = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return llm


def random_model(size="opt-125m", dtype=torch.float32, clip="ViT-L-14-quickgelu", llm=None, **settings):
    """LMEye between random models of published shapes; the miniature's tokenizer stands in for theirs."""
    if (clip, dtype) not in CLIP:
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        CLIP[clip, dtype] = open_clip.create_model_and_transforms(clip, precision=precision, device=DEVICE)
    model, _, preprocess = CLIP[clip, dtype]
    tokenizer = data.build_tokenizer(ends=False)
    return LMEye(Settings(**settings), llm or random_llm(size, dtype), tokenizer, model, preprocess,
                 open_clip.get_tokenizer(clip))


def random_batch(model, B, question, answer):
    """(f, Tokens) of B records, all questions and all answers of one length."""
    def ids(n):
        return torch.randint(10, 50, (B, n)), torch.ones(B, n, dtype=torch.long)

    f = torch.randn(B, model.align.in_features, device=DEVICE)
    return f, lmeye.Tokens(*ids(question), *ids(answer))


def seconds(*functions, repeat=5):
    """Median time of each function; they take turns, so that a machine that slows down slows all of them."""
    times = [[] for _ in functions]
    for turn in range(repeat + 1):
        for function, kept in zip(functions, times):
            start = time.perf_counter()
            function()
            if CUDA:
                torch.cuda.synchronize()
            if turn:  # the first warms up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def matmul_rate(dtype):
    """Operations per second of one large product."""
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b)[0]


def step(model, batch, optimizer):
    f, tokens = batch
    (model.loss_sum(f, tokens) / tokens.answer_mask.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model, stage):
    return torch.optim.AdamW(model.set_trained(stage).values(), 1e-4, fused=True)


def authors_step(model, batch, optimizer):
    """The schedule of the authors' release: one record at a time, two whole passes, logits at every place."""
    f, tokens = batch
    for i in range(len(f)):
        question, answer = tokens.question[i:i + 1].to(DEVICE), tokens.answer[i:i + 1].to(DEVICE)
        prefix = [model.embed(model.image_ids)[None], model.see(f[i:i + 1]), model.embed(question)]
        first = torch.cat([*prefix, model.img_d.expand(1, 1, -1)], 1).to(model.llm.dtype)
        h = model.llm(inputs_embeds=first, output_hidden_states=True).hidden_states[-1][:, -1]
        v = model.interact(f[i:i + 1], model.ask(h))
        second = torch.cat([*prefix, model.tell(v), model.embed(model.answer_ids)[None], model.embed(answer)], 1)
        logits = model.llm(inputs_embeds=second.to(model.llm.dtype)).logits.float()
        labels = torch.full(second.shape[:2], -100, device=DEVICE)
        labels[:, -answer.shape[1]:] = answer
        (F.cross_entropy(logits[0, :-1], labels[0, 1:]) / len(f)).backward()
    optimizer.step()
    optimizer.zero_grad()


def train():
    size, dtype = ("opt-1.3b", torch.bfloat16) if CUDA else ("opt-125m", torch.float32)
    model = random_model(size, dtype)
    batch, optimizer = random_batch(model, 16, 40, 44), optimizer_of(model, 2)
    ours, theirs = seconds(lambda: step(model, batch, optimizer), lambda: authors_step(model, batch, optimizer), repeat=3)
    return [f"{size}, phase 2, 16 records of 40 + 44 tokens: {16 / ours:.1f} samples/s, the authors' schedule "
            f"{16 / theirs:.1f}: {theirs / ours:.2f} ×"]


def share():
    size, dtype = ("opt-1.3b", torch.bfloat16) if CUDA else ("opt-125m", torch.float32)
    model, rate, lines = random_model(size, dtype), matmul_rate(dtype), []
    head = model.llm.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.llm.base_model.parameters()) - model.llm.get_input_embeddings().weight.numel()
    B = 48 if CUDA else 16
    for stage, question, answer in ((1, 0, 44), (2, 40, 44)):
        optimizer = optimizer_of(model, stage)
        batch = random_batch(model, B, question, answer)
        time_ = seconds(lambda: step(model, batch, optimizer), repeat=3)[0]
        tokens = len(model.image_ids) + 1 + question + answer - 1 + (len(model.answer_ids) + 1 if question else 0)
        operations = 4 * B * (body * tokens + head * answer)
        lines.append(f"{size}, phase {stage}: {100 * operations / time_ / rate:.0f}% of {rate / 1e12:.2f} T operations/s")
    return lines


@torch.no_grad()
def first():
    size, dtype = ("opt-1.3b", torch.bfloat16) if CUDA else ("opt-125m", torch.float32)
    llm = random_llm(size, dtype)
    full, static = (random_model(size, dtype, llm=llm, interaction=i) for i in ("full", "static"))
    lines = []
    for prompt in (40, 200, 800):
        f, tokens = random_batch(full, 1, prompt, 1)

        def to_first_token(model):
            x, mask, cache = model.begin(f, tokens.question, tokens.question_mask)
            h, _ = model.read(x, mask, cache)
            return model.logits(h[:, -1]).argmax(-1)

        def two_whole_passes():
            question = tokens.question.to(DEVICE)
            prefix = [full.embed(full.image_ids)[None], full.see(f), full.embed(question)]
            x = torch.cat([*prefix, full.img_d.expand(1, 1, -1)], 1)
            h, _ = full.read(x, torch.ones(x.shape[:2], dtype=torch.long, device=DEVICE))
            told = full.tell(full.interact(f, full.ask(h[:, -1])))
            x = torch.cat([*prefix, told, full.embed(full.answer_ids)[None]], 1)
            h, _ = full.read(x, torch.ones(x.shape[:2], dtype=torch.long, device=DEVICE))
            return full.logits(h[:, -1]).argmax(-1)

        a, b, c = seconds(lambda: to_first_token(full), lambda: to_first_token(static), two_whole_passes, repeat=15)
        lines.append(f"{size}, prompt of {prompt}: full {1000 * a:.0f} ms, static {1000 * b:.0f} ms: {a / b:.2f}; two "
                     f"whole passes {c / b:.2f}")
    return lines


def generate():
    size, dtype = ("opt-1.3b", torch.bfloat16) if CUDA else ("opt-125m", torch.float32)
    model, lines, few, many = random_model(size, dtype), [], 8, 48
    model.tokenizer.eos_token = "<unk>"  # which random weights write as seldom as any word: they rarely end early
    for B in (1, 32):
        f = torch.randn(B, model.align.in_features, device=DEVICE)
        ids = torch.randint(10, 50, (B, 45), device=DEVICE)

        def ours(n):
            return lambda: list(model.stream(f, ["two " * 40] * B, max_tokens=n))

        def theirs(n):
            return lambda: model.llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                                              min_new_tokens=n, do_sample=False)

        a, b, c, d = seconds(ours(few), ours(many), theirs(few), theirs(many), repeat=2)
        mine, other = (B * (many - few) / t for t in (b - a, d - c))  # the prompt's time taken off on both sides
        lines.append(f"{size}, batch {B}: {mine:.0f} tokens/s, transformers' generate {other:.0f}: {mine / other:.2f} ×")
    return lines


def features():
    dtype = torch.bfloat16 if CUDA else torch.float32
    model, n = random_model("opt-125m", dtype), 4096 if CUDA else 32
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        small = rng.integers(0, 255, (16, 15, 20, 3), np.uint8)
        for i in range(n):  # as large as COCO's
            Image.fromarray(small[i % 16]).resize((640, 480), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=90)
        images = [f"{folder}/{i}.jpg" for i in range(n)]
        pixels = torch.randn(min(n, 128), 3, 224, 224)
        decode, tower, both = seconds(lambda: list(data.decode(model.preprocess, images, 32)),
                                      lambda: [model.encode_image(pixels) for _ in range(n // len(pixels))],
                                      lambda: data.encode_images(model, images, batch_size=128 if CUDA else 16),
                                      repeat=3 if CUDA else 1)
    return [f"pictures/s: decoding {n / decode:.0f}, ViT-L/14 {n / tower:.1f}, the feature pass {n / both:.1f}: "
            f"{100 * max(decode, tower) / both:.0f}% of the slower"]


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


def padding():
    lengths = llava_like_lengths(100_000)
    some = data.Dataset([], [(range(q), range(a)) for q, a in lengths], None, None)
    lengths = np.array(lengths)
    lines = []
    for size, tokens in ((64, None), (1000, 4096)):
        start = time.perf_counter()
        plan = data.plan_epoch(some, size, tokens, 0, 0)
        padded = sum(len(rows) * lengths[rows].max(0).sum() for rows in plan)
        lines.append(f"batches of {f'{tokens:,} tokens' if tokens else f'{size} records'}: {padded / lengths.sum():.3f}, "
                     f"planned in {time.perf_counter() - start:.1f} s for {len(lengths):,} records")
    return lines


def zip_():
    stream = tempfile.NamedTemporaryFile(suffix=".zip")
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(1_000_000):
            archive.writestr(zipfile.ZipInfo(f"GCC_train_{i:09d}.jpg"), b"")
    start = time.perf_counter()
    data.open_root(Path(stream.name))
    return [f"{time.perf_counter() - start:.1f} s"]


def grow():
    dtype, lines = torch.bfloat16 if CUDA else torch.float32, []
    sizes = list(SIZES)[:5] if CUDA else ["opt-125m", "opt-350m"]
    B = 16 if CUDA else 4

    def line(name, values, make):
        times = []
        for value in values:
            model, batch = make(value)
            optimizer = optimizer_of(model, 2)
            times.append(seconds(lambda: step(model, batch, optimizer), repeat=2)[0])
        lines.append(f"{name}: " + ", ".join(f"{v}: {1000 * t:.0f} ms" for v, t in zip(values, times)))

    llm = random_llm(sizes[0], dtype)
    model = random_model(dtype=dtype, llm=llm)
    line("batch", (1, 2, 4, 8, 16), lambda n: (model, random_batch(model, n, 40, 44)))
    line("prompt", (40, 80, 160, 320, 640), lambda n: (model, random_batch(model, B, n, 44)))
    line("N", (1, 5, 20, 70), lambda n: ((m := random_model(dtype=dtype, llm=llm, n_features=n)), random_batch(m, B, 40, 44)))
    line("slots", (1, 5, 20), lambda n: ((m := random_model(dtype=dtype, llm=llm, n_slots=n)), random_batch(m, B, 40, 44)))
    line("language model", sizes, lambda size: ((m := random_model(size, dtype)), random_batch(m, B, 40, 44)))
    return lines


def full_size():
    model, lines = random_model("opt-1.3b", torch.bfloat16), []
    for stage, question in ((1, 0), (2, 40)):
        optimizer, batch = optimizer_of(model, stage), random_batch(model, 2, question, 20)
        start = time.perf_counter()
        step(model, batch, optimizer)
        lines.append(f"phase {stage}: a step of 2 records in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    picture = model.preprocess(Image.new("RGB", (640, 480)))[None]
    model.eval().generate(model.encode_image(picture), ["what color is it?"], max_tokens=8)
    lines.append(f"an answer of 8 tokens, picture included, in {time.perf_counter() - start:.1f} s")
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return lines + [f"peak memory {peak / 1e9:.1f} GB"]


def memory():
    lines = []
    for size in ("opt-125m", "opt-1.3b", "opt-6.7b", "bloomz-7b1"):
        try:
            model = random_model(size, torch.bfloat16)
            for stage, question, answer in ((1, 0, 58), (2, 64, 58)):  # 64 or 32 records of about 64 or 128 tokens: 4,096
                optimizer, batch = optimizer_of(model, stage), random_batch(model, 64 // stage, question, answer)
                torch.cuda.reset_peak_memory_stats()
                time_ = seconds(lambda: step(model, batch, optimizer), repeat=3)[0]
                peak = torch.cuda.max_memory_allocated() / 1e9
                lines.append(f"{size}, phase {stage}: {peak:.1f} GB, {1000 * time_:.0f} ms")
        except torch.OutOfMemoryError:
            lines.append(f"{size}: does not fit into this card")
        model = optimizer = batch = None
        torch.cuda.empty_cache()
    return lines


def mini():
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for stages in ((0, 1), (2,)):
            start = time.perf_counter()
            subprocess.run([sys.executable, train_py, "--preset", "mini", "--stage", str(stages[-1]), "--out", folder],
                           check=True, capture_output=True)
            lines.append(time.perf_counter() - start)
    return [f"stages 0 and 1 {lines[0]:.0f} s, stage 2 {lines[1]:.0f} s, in all {sum(lines):.0f} s"]


def epoch():
    model, pairs = random_model("opt-1.3b", torch.bfloat16), 595_375
    pixels, optimizer, batch = torch.randn(128, 3, 224, 224), optimizer_of(model, 1), random_batch(model, 128, 0, 16)
    encoding, stepping = seconds(lambda: model.encode_image(pixels), lambda: step(model, batch, optimizer))
    return [f"{pairs / 128 * encoding / 60:.1f} minutes of features (decoding has to keep up: see that row) and "
            f"{pairs / 128 * stepping / 60:.1f} of training"]


ROWS = {"train": train, "share": share, "first": first, "generate": generate, "features": features, "padding": padding,
        "zip": zip_, "grow": grow, "full-size": full_size, "mini": mini,
        "epoch": epoch, "memory": memory}


def main():
    logging.disable(logging.WARNING)  # open_clip's, about weights that are random on purpose
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        raise lmeye.UserError(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for row in args.rows or ROWS:
        torch.manual_seed(0)
        lines = ["needs CUDA"] if row in ("epoch", "memory") and not CUDA else ROWS[row]()
        for line in lines:
            print(f"{row:<10} {line}", flush=True)


if __name__ == "__main__":
    lmeye.run(main)
