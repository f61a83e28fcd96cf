"""Whose answer does a model give if another question's request is swapped in?

    python tests/lab/swap.py out/ablation/s*/lmeye/seed0/mini/stage2

Every held-out picture of the miniature is asked its six questions about an attribute. Into the answer to one
goes the request that another question made of the same picture; or the v that another picture gave to its own
question of the same kind. Nothing else that the model reads changes. The other is drawn among those that
have another true answer. The table tells whose true answer is given, in percent. Of several runs, one of each
set of frozen models, it has the mean with its 95% interval over sets.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from tqdm import tqdm

import data
from lmeye import run_main
from probe import load_run, requests_and_v
from table import print_table

COLUMNS = ("its own", "the other's", "neither's")


def answers_with(model, dataset, method, vectors):
    """The answers of a model whose `method`, ask or interact, gives these vectors (R, ·) to the records of a
    Dataset. All else that it reads, picture and question, stays as it is."""
    texts = []
    for rows in tqdm(torch.arange(len(dataset.records)).split(256), "answers", disable=None):
        given, questions = vectors[rows].to(model.device), [dataset.records[i].question for i in rows]
        with mock.patch.object(model, method, lambda *_: given):
            texts += model.generate(dataset.f(rows), questions, max_tokens=8)
    return np.array(texts)


def draw_others(groups, truths, rng):
    """For each record one of its group that has another true answer: rows (R,)."""
    others = []
    for group, truth in zip(groups, truths):
        others.append(rng.choice(np.flatnonzero((groups == group) & (truths != truth))))
    return np.array(others)


def whose_truth(texts, truths, of_other):
    """The percentages of texts (R,) that tell their own record's truth, the other's, or neither's."""
    own, other = texts == truths, texts == of_other
    return dict(zip(COLUMNS, (100 * told.mean() for told in (own, other, ~own & ~other))))


def measure(run, mini):
    """A run and its miniature, folders → {row: {column: percent}}."""
    pictures = data.Pictures(mini / "pictures.zip")
    records, _ = data.read_records(mini / "val_questions.json", pictures, 2)
    model, dataset = load_run(run, [record for record in records if record.category != "yes/no"], pictures)
    kinds = np.array([record.category for record in dataset.records])
    truths = np.array([record.answer for record in dataset.records])
    rng = np.random.default_rng(0)
    other, other_picture = draw_others(dataset.picture, truths, rng), draw_others(kinds, truths, rng)
    request, v = requests_and_v(model, dataset)

    own = answers_with(model, dataset, "ask", request)
    swapped = answers_with(model, dataset, "ask", request[other])
    nothing = answers_with(model, dataset, "ask", 0 * request)
    swapped_v = answers_with(model, dataset, "interact", v[other_picture])
    of_color = np.isin(kinds, ("color", "background"))
    both = of_color & of_color[other]
    return {
        "its own request": whose_truth(own, truths, truths[other]),
        "another question's request": whose_truth(swapped, truths, truths[other]),
        "the same, both about colors": whose_truth(swapped[both], truths[both], truths[other][both]),
        "no request": whose_truth(nothing, truths, truths[other]),
        "another picture's v": whose_truth(swapped_v, truths, truths[other_picture]),
    }


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run of stage 2")
    parser.add_argument("--mini", help="the folder of its miniature (default: the one that the run is in)")
    args = parser.parse_args()
    rows = {}
    for run in args.runs:
        for row, shares in measure(run, Path(args.mini or Path(run).parent)).items():
            rows.setdefault(row, []).append(shares)
    print("Whose true answer is given, in percent\n")
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    run_main(main)
