"""What does a request say, and what does v, which comes back? A linear probe reads both.

    python tests/lab/probe.py out/mini/stage2 [--log requests.npz]

Every held-out picture of the miniature is asked the same questions, in the same words, so that what a request
says of the picture does not come from the words. `--log` keeps the requests and v in a file.
"""

import argparse
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

import data
import sample
import shapes
from lmeye import CHECKPOINT, UserError, run_main
from table import print_table

ASKED = {  # {attribute: a question about it}
    "number": "how many are there?", "size": "how big are they?", "color": "what color are they?",
    "shape": "what shape are they?", "place": "where are they?",
    "background": "what color is the background?",
}


def load_run(run, records, pictures):
    """The folder of a run, and records → (its model, their Dataset). UserError if the model asks nothing."""
    model, stage = sample.load_trained(Path(run, CHECKPOINT))
    if stage == 1 or model.settings.variant != "lmeye":
        raise UserError(f"{run}: makes no requests: take a run of stage 2 with --variant lmeye")
    skipped = Counter()
    dataset = data.encode(model, records, skipped, pictures, Path(run).parent / "features")
    data.report(skipped)
    return model, dataset


@torch.no_grad()
def requests_and_v(model, dataset):
    """The request (R, W) and v (R, C) of each record: what leaves `request`, and what enters `transmit`."""
    requests, v = [], []
    hook = model.request.register_forward_hook(lambda layer, inputs, output: requests.append(output.cpu()))
    hook_of_v = model.transmit.register_forward_pre_hook(lambda layer, inputs: v.append(inputs[0].cpu()))
    with hook, hook_of_v:
        for rows in torch.arange(len(dataset.records)).split(256):
            f, tokens = dataset.batch(rows)
            model.read_prompt(*model.to_device(f, tokens.question, tokens.question_mask))
    return torch.cat(requests), torch.cat(v)


def linear(x, labels, picture, strength=1e-4):
    """A linear probe, fitted on every other picture → percent right on the rest. It is ridge regression from
    x (R, ·) onto one-hot labels (R,); more `strength` than this made all probes worse."""
    values, y = np.unique(labels, return_inverse=True)
    fit, y = picture % 2 == 0, torch.from_numpy(y)
    x = (x - x[fit].mean(0)) / x[fit].std(0).clamp(min=1e-6)
    x = F.pad(x, (0, 1), value=1).double()
    a = x[fit].T @ x[fit] + strength * fit.sum() * torch.eye(x.shape[1])
    w = torch.linalg.solve(a, x[fit].T @ F.one_hot(y[fit], len(values)).double())
    return 100 * ((x @ w).argmax(1) == y)[~fit].double().mean().item()


def ask_all(mini):
    """The folder of a miniature → (records, pictures, {picture: its Scene}): ASKED of each held-out one."""
    pictures, records, scenes = data.Pictures(mini / "pictures.zip"), [], {}
    scene_of = {shapes.describe(scene): scene for scene in shapes.HELD_OUT}
    captions, _ = data.read_records(mini / "val_captions.json", pictures, 1)
    for caption in captions:
        scenes[caption.image] = scene_of[caption.answer]
        for kind, question in ASKED.items():
            records.append(data.Record(caption.image, (question,), "", kind))
    return records, pictures, scenes


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("run", help="the folder of a run of stage 2")
    parser.add_argument("--mini", help="the folder of the miniature (default: the one that the run is in)")
    parser.add_argument("--log", metavar="FILE", help="a .npz for requests and v")
    args = parser.parse_args()
    if args.log and not args.log.endswith(".npz"):
        parser.error("--log has to end in .npz")
    records, pictures, scenes = ask_all(Path(args.mini or Path(args.run).parent))
    model, dataset = load_run(args.run, records, pictures)
    request, v = requests_and_v(model, dataset)
    kinds = np.array([record.category for record in dataset.records])
    labels = {"kind of question": kinds}
    for name in ASKED:
        labels[name] = np.array([getattr(scenes[record.image], name) for record in dataset.records])
    if args.log:
        sample.set_aside(args.log)
        np.savez(args.log, request=request, v=v, **labels)

    torch.manual_seed(0)
    model.request.reset_parameters()
    vectors = {"request": request, "request, its layer untrained": requests_and_v(model, dataset)[0], "v": v,
               "f": dataset.f(np.arange(len(kinds)))}
    picture, rows = torch.from_numpy(dataset.picture), {}
    for row, x in vectors.items():
        rows[row] = [{name: linear(x, y, picture) for name, y in labels.items()}]
    asked_for, not_asked_for, chance = {}, {}, {}
    for name, y in labels.items():
        chance[name] = 100 * np.unique(y, return_counts=True)[1].max() / len(y)
    for name in ASKED:
        shares = {}
        for kind in ASKED:
            part = kinds == kind
            shares[kind] = linear(v[part], labels[name][part], picture[part])
        asked_for[name] = shares.pop(name)
        not_asked_for[name] = statistics.mean(shares.values())
    rows |= {"v, where it was asked for": [asked_for], "v, where another was: mean of five": [not_asked_for],
             "always the most frequent": [chance]}
    print("What a linear probe finds, percent right\n")
    print_table(rows, labels)


if __name__ == "__main__":
    run_main(main)
