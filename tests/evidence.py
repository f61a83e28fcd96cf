"""The experiments behind what the README claims: each trains many miniatures, and prints one table.

    python tests/evidence.py ablation --seeds 5     full, norequest, static and blind from the same phase 1
    python tests/evidence.py sheet                  held-out pictures with questions, answers and the truth: a PNG
"""

import argparse
import contextlib
import io
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import lmeye
import train
from lmeye import CHECKPOINT, LMEye

OUT = Path("out/mini")


class TwoPictureTokens(LMEye):
    """`static` with as many picture tokens as `full` has with its slot: tells "more tokens" from "asking"."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.align = torch.nn.Linear(self.align.in_features, 2 * self.align.out_features)

    def see(self, f):
        return self.align(f).unflatten(-1, (2, -1)) + self.img  # (B, 2, D)


def new_model(seed, name="full"):
    """The miniature after phase 1, its other layers new. UserError if there is no phase 1."""
    if not (OUT / "stage1" / CHECKPOINT).is_file():
        raise lmeye.UserError("there is no phase 1 yet: run  python train.py --stage 1 --preset mini")
    torch.manual_seed(seed)
    kind = TwoPictureTokens if name == "static, 2 tokens" else LMEye
    model = kind.from_settings(replace(lmeye.PRESETS["mini"], interaction=name.partition(",")[0]))
    if kind is LMEye:
        model.load(OUT / "stage1" / CHECKPOINT)
    else:  # it needs a phase 1 of its own
        train_phase(1, model, train.load_data(model, 1, None, None), "ablation/phase-1", seed)
    return model


def mean_and_interval(values):
    """Mean and half the width of its 95% interval (Student's t), in percent → text."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 2.0)
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * t * statistics.stdev(values) / len(values) ** 0.5:.1f}"
    return text


def markdown(rows):
    """{name: [{column: share}, one for each seed]} → a table in Markdown."""
    columns = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        lines.append(f"| {name} | " + " | ".join(mean_and_interval([s[c] for s in seeds]) for c in columns) + " |")
    return "\n".join(lines)


def train_phase(stage, model, datasets, name, seed, **options):
    run = train.DEFAULTS["mini", stage] | options
    with contextlib.redirect_stdout(io.StringIO()):
        train.train_adapter(model, stage, *datasets, OUT / "evidence" / name, seed=seed, **run)


def ablation(seeds, **options):
    """full, norequest and static from the same frozen models and phase 1; what differs between seeds is phase 2: the
    layers' start and the order of the records. `blind` is `full` with other pictures' features."""
    datasets = train.load_data(new_model(0), 2, None, None)
    rows = {name: [] for name in ("full", "norequest", "static", "static, 2 tokens", "blind")}
    for seed in tqdm(range(seeds), desc="seeds", disable=None):
        for name in list(rows)[:4]:
            model = new_model(seed, name)
            train_phase(2, model, datasets, f"ablation/{name}-{seed}", seed, **options)
            rows[name].append(train.accuracy(model, datasets[1], name))
            if name == "full":
                rows["blind"].append(train.accuracy(model, train.shuffled(datasets[1]), "blind"))
    print(f"held-out accuracy in percent, {seeds} seeds, mean ± 95% interval\n\n{markdown(rows)}")


def sheet(seeds):
    """Held-out pictures, each with two questions, what the model of stage 2 answers, and the truth where it differs."""
    model = new_model(0)
    model.load(OUT / "stage2" / CHECKPOINT)
    _, test = train.load_data(model, 2, None, None)
    size, columns = 3 * data.SIDE, 4
    rows = random.Random(0).sample(range(0, len(test.records), len(data.KINDS)), 8)
    page = Image.new("RGB", (columns * (size + 20) + 20, 2 * (size + 100) + 20), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        x, y = 20 + i % columns * (size + 20), 20 + i // columns * (size + 100)
        page.paste(test.records[row].image.resize((size, size), Image.Resampling.NEAREST), (x, y))
        asked = [row + i % 6, row + 6]  # one of the six kinds in turn, and yes/no
        records = [test.records[r] for r in asked]
        for k, (record, said) in enumerate(zip(records, model.generate(test.f(asked), [r.question for r in records]))):
            right = said == record.answer
            canvas.text((x, y + size + 6 + 40 * k), record.question, "#555555", font)
            canvas.text((x, y + size + 22 + 40 * k), said if right else f"{said}  (it is: {record.answer})",
                        "black" if right else "#d62728", font)
    (OUT / "evidence").mkdir(exist_ok=True)
    page.save(OUT / "evidence" / "sheet.png")
    print(OUT / "evidence" / "sheet.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("ablation", "sheet"))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    {"ablation": ablation, "sheet": sheet}[args.experiment](args.seeds)


if __name__ == "__main__":
    lmeye.run(main)
