"""Tiny random models of the real classes, for all tests. Nothing here needs a network or a GPU."""

import contextlib
import faulthandler
import importlib
import io
import json
import logging
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lab")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on several

import open_clip
import pytest
import safetensors.torch
import torch
import transformers

import lmeye
import shapes
from lmeye import LMEye, Settings


LIMIT = 900  # seconds of a test; most take less than one
if "LMEYE_ALL" in os.environ or "LMEYE_FUZZ" in os.environ:
    LIMIT = 3600


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    config.stderr_of_a_hang = os.dup(2)  # a test's own standard error is caught, and would be lost


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that hangs, or its fixture, ends the suite and shows where: an endless loop never fails."""
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=item.config.stderr_of_a_hang)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


# Every width differs from every other, so that no two axes can be mistaken for each other.
CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 40, "layers": 1, "head_width": 20},
    "text_cfg": {"context_length": 16, "width": 36, "heads": 4, "layers": 2, "hf_tokenizer_name": "in this folder"},
}
HIDDEN = 64
FAMILIES = {  # of language models, which differ in positions, embeddings or norm: what each has beside its sizes
    "opt": dict(word_embed_proj_dim=HIDDEN, ffn_dim=128),
    # Embeddings narrower than the states, norm after, none at the end.
    "opt-350m": dict(word_embed_proj_dim=20, ffn_dim=128, do_layer_norm_before=False),
    "bloom": {},
    "llama": dict(intermediate_size=128, num_key_value_heads=2),
    "gpt2": {},
}


def tiny_llm(family, tokenizer):
    """A random causal LM of one of the families."""
    return with_random_weights(transformers.AutoConfig.for_model(
        family.partition("-")[0], hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, vocab_size=len(tokenizer), pad_token_id=0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **FAMILIES[family]))


def with_random_weights(config, std=0.2):
    """The published initialisations are so small that mistakes would hide in rounding."""
    llm = transformers.AutoModelForCausalLM.from_config(config)
    for p in llm.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std)
    return llm.eval()


def tiny_clip(vocabulary):
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["text_cfg"]["vocab_size"] = vocabulary
    return open_clip.CLIP(**config).eval(), config


@pytest.fixture(autouse=True)
def logging_is_on():
    """Programs may switch it off for themselves, and here all run in one process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def folders(tmp_path):
    """(--llm, --clip): folders of a tiny OPT and a tiny CLIP, which speak the miniature's words."""
    return save_llm(tmp_path / "llm"), save_clip(tmp_path / "clip")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with tiny models and 20 pictures, their captions, two questions about each, some choices."""
    home, rng = tmp_path_factory.mktemp("home"), random.Random(0)
    save_llm(home / "llm")
    save_clip(home / "clip")
    captions, chats, choices = [], [], []
    for i, scene in enumerate(rng.sample(shapes.SCENES, 20)):
        shapes.draw(scene, rng).save(home / f"{i}.png")
        captions.append({"image": f"{i}.png", "caption": shapes.describe(scene)})
        conversation = []
        for kind in ("color", "shape"):
            question, answer = shapes.ask(scene, kind, rng)
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        chats.append({"image": f"{i}.png", "conversations": conversation})
        choices.append({"image": f"{i}.png", "question": "what color?", "answer": "red",
                        "choices": [["red", "blue thing", "green"]]})
    files = {"captions": captions, "chats": chats, "val_captions": captions[:3], "val_chats": chats[:3],
             "choices": choices[:3]}
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


def save_llm(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer = shapes.build_tokenizer(ends=False)
    tokenizer.save_pretrained(folder)
    tiny_llm("opt", tokenizer).save_pretrained(folder)
    return str(folder)


def opt_tokenizer(folder):
    """Put OPT's own tokenizer into a folder as facebook/opt-… has it → whether it is at hand."""
    folder, files = Path(folder), ROOT.parent / "shared" / "opt-tokenizer"
    if not files.is_dir():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(files / name, folder)
    ends = {f"{name}_token": "</s>" for name in ("bos", "eos", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "add_bos_token": True, **ends}))
    return True


def save_clip(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer = shapes.build_tokenizer(ends=True)
    tokenizer.save_pretrained(folder)
    clip, config = tiny_clip(len(tokenizer))
    safetensors.torch.save_file(clip.state_dict(), Path(folder, "open_clip_model.safetensors"))
    Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


def tiny_model(family="opt", seed=0, **settings):
    """LMEye between a tiny random LM of a family and a tiny random CLIP, dropout off unless asked for."""
    torch.manual_seed(seed)
    tokenizer = shapes.build_tokenizer(ends=False)
    clip_tokenizer = shapes.build_tokenizer(ends=True)
    llm = tiny_llm(family, tokenizer)
    clip, _ = tiny_clip(len(clip_tokenizer))

    def tokenize_for_clip(texts):
        return clip_tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids

    preprocess = open_clip.image_transform(32, is_train=False)
    return LMEye(Settings(**{"dropout": 0.0, **settings}), llm, tokenizer, clip, preprocess, tokenize_for_clip)


def run(program, *flags, cwd=".", stdin=""):
    """Run a program's main() in this process, as from the command line in `cwd` → Result with its texts.

    A process for each would spend most of the suite's time on importing torch; test_command_line.py starts some.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(Path(program).stem).main
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [program, *map(str, flags)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            lmeye.run_main(main)
        except SystemExit as end:
            status = end.code or 0
    return Result(status, out.getvalue(), err.getvalue())


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def fails_in_one_line(result):
    """Whether a program ended as a user's mistake should: status 2, one line, no traceback. For use in assert."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr and len(lines[0]) > 20
