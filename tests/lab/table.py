"""Accuracy by category in several runs, with 95% intervals, and the differences between them.

    python tests/lab/table.py [--blind] lmeye="s*/mini/stage2" norequest="s*/mini/stage2-norequest"

Each row is NAME=PATTERN. The pattern, in quotes, finds folders of runs or evaluations, or their
answers.jsonl. What its first part with a * finds, here s0, s1, …, is a set of frozen models. Runs of one set,
which differ in their seed, are averaged first: means and intervals are over sets, which differ more than
seeds do. Below stand the differences between the first row and each other, set by set: what makes one set
harder drops out of them.
"""

import argparse
import glob
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lmeye import UserError, printable, run_main
from look import questions, read_answers

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # of 2 to 10 values; for more, too wide


def read_row(pattern, asked):
    """A pattern → {set: [the answers of each of its runs]}; without a * there is one set. `asked`, {set: its
    questions}, is filled by the first row. UserError if a row has no runs, other sets or other questions."""
    stars = [i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part)]
    known, sets = list(asked), {}
    for path in sorted(glob.glob(pattern)):
        name, answers = Path(path).parts[stars[0]] if stars else "one set", read_answers(path)
        sets.setdefault(name, []).append(answers)
        if asked.setdefault(name, questions(answers)) != questions(answers):
            raise UserError(f"{path}: answers other questions than the first run of {name}")
    if not sets or (known and list(sets) != known):
        raise UserError(f"{pattern}: finds the sets {list(sets)}, and the rows before it have {known}")
    return sets


def percent_right(runs, field="right"):
    """The answers of the runs of a set → {category: percent right}, where "all" holds every answer. One does
    not count if nobody knows whether it is right."""
    hits = {}
    for answers in runs:
        for answer in answers:
            if answer[field] is not None:
                for category in {answer["category"], "all"}:
                    hits.setdefault(category, []).append(answer[field])
    return {category: 100 * sum(values) / len(values) for category, values in hits.items()}


def mean_and_interval(values):
    """"96.6 ± 1.2": the mean, and half the width of its 95% interval by Student's t. One value has none."""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        t = STUDENT[min(len(values), 10) - 2]
        text += f" ± {t * statistics.stdev(values) / len(values) ** 0.5:.1f}"
    return text


def print_table(rows, columns):
    """Print {name: [{column: value} of each set]} in Markdown."""
    print("| |", " | ".join(map(printable, columns)), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, sets in rows.items():
        cells = []
        for column in columns:
            values = [of_set[column] for of_set in sets if column in of_set]
            cells.append(mean_and_interval(values) if len(values) == len(sets) else "–")
        print(f"| {name} |", " | ".join(cells), "|")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("rows", nargs="+", metavar="NAME=PATTERN")
    parser.add_argument("--blind", action="store_true", help="one more row: the first, shown other pictures")
    args = parser.parse_args()
    rows, asked = {}, {}
    for argument in args.rows:
        name, _, pattern = argument.partition("=")
        if name in rows:
            parser.error(f"two rows have the name {name}")
        sets = read_row(pattern, asked)
        print(f"{name}: {sum(map(len, sets.values()))} runs of {len(sets)} sets ({', '.join(sets)})")
        rows[name] = [percent_right(runs) for runs in sets.values()]
        if args.blind and len(rows) == 1:
            rows[f"{name}, blind"] = [percent_right(runs, "blind_right") for runs in sets.values()]

    first, *others = rows
    for name in others:
        differences = []
        for a, b in zip(rows[first], rows[name]):
            differences.append({column: a[column] - b[column] for column in a.keys() & b.keys()})
        rows[f"{first} − {name}"] = differences
    print("\nPercent right, mean ± 95% interval over sets\n")
    print_table(rows, sorted(rows[first][0].keys() - {"all"}) + ["all"])


if __name__ == "__main__":
    run_main(main)
