"""The same training with other flags, on several sets of frozen models and with several seeds.

    python tests/lab/ablation.py --sets 5 --seeds 2 lmeye="--lr 0.005" norequest="--variant norequest"

A set is a miniature with its phase 1: OUT/s0, made with seed 0, and so on (frozen models move results more
than seeds of phase 2 do). A row is a name with the flags of train.py for its phase 2. Its run with seed 1
in set 0 stands below OUT/s0/NAME/seed1, and is also asked about what is absent. What is complete is not
made again, what was interrupted goes on. Then table.py prints two tables, of the held-out questions and of
those about absent things, over all sets and seeds of these rows that stand below OUT.
"""

import argparse
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from lmeye import CHECKPOINT, UserError, run_main
from train import run_name

STARTED = []  # programs: those that still run are stopped when this one ends


def call(folder, program, *flags):
    """Run a program on one thread; what it says goes to log.txt in `folder`. UserError if it fails."""
    command = [sys.executable, str(ROOT / program), *map(str, flags)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=one_thread, start_new_session=True)
        STARTED.append(process)
        if process.wait():
            raise UserError(f"{program} ended with status {process.returncode}: see {log.name}")


def begin(folder, flags):
    """Make a folder, with a note of the flags that its runs have. UserError if they had others before."""
    folder.mkdir(parents=True, exist_ok=True)
    note, flags = folder / "flags.txt", shlex.join(flags)
    if note.exists() and note.read_text("utf-8") != flags:
        raise UserError(f"{folder}: was made with {note.read_text('utf-8')!r}, not with {flags!r}: remove it")
    note.write_text(flags, "utf-8")


def train(folder, run, seed, *flags):
    """Train a run below `folder`, unless it is complete → its own folder."""
    run = folder / "mini" / run
    if not Path(run, "evaluation", "scores.json").is_file():
        call(folder, "train.py", "--preset", "mini", "--seed", seed, "--out", folder, "--resume", *flags)
    return run


def make_set(folder, flags):
    """A miniature and its phase 1."""
    begin(folder, flags)
    seed = folder.name[1:]
    if not Path(folder, "mini", "llm").is_dir():
        call(folder, "tests/lab/miniature.py", "--out", folder, "--seed", seed, *flags)
    train(folder, "stage1", seed, "--stage", 1)


def stage2(flags):
    """The name of the folder that train.py gives to phase 2 with these flags."""
    variant = flags[flags.index("--variant") + 1] if "--variant" in flags else "lmeye"
    return run_name(2, variant, "--train-align" in flags)


def make_run(of_set, row, seed, flags):
    """Phase 2 of a row, and what it answers about absent things. It has a folder of its own, with links to
    the set's models and data, for two runs below one --out would wait for each other."""
    folder = of_set / row / f"seed{seed}"
    begin(folder, flags)
    if not Path(folder, "mini").is_dir():
        shutil.rmtree(folder / "part", ignore_errors=True)
        not_linked = shutil.ignore_patterns("stage*", "lock")
        shutil.copytree(of_set / "mini", folder / "part", copy_function=os.link, ignore=not_linked)
        Path(folder, "part").rename(folder / "mini")
    phase_1 = of_set / "mini" / "stage1"
    if "--n-image-tokens" in flags:  # `align` has another shape then: a phase 1 of its own
        at = flags.index("--n-image-tokens")
        phase_1 = train(folder, "stage1", seed, "--stage", 1, *flags[at:at + 2])
    run = train(folder, stage2(flags), seed, "--stage", 2, "--init", phase_1 / CHECKPOINT, *flags)
    if not Path(run, "evaluation-absent", "scores.json").is_file():
        absent, pictures = [of_set / "mini" / name for name in ("absent.json", "pictures.zip")]
        call(folder, "sample.py", "--checkpoint", run / CHECKPOINT, "--data", absent, "--images", pictures)


def main():
    parser = argparse.ArgumentParser(usage='ablation.py [flags] NAME="FLAGS" …', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", nargs="+", metavar="NAME=FLAGS", help="a row of the tables, with flags of train.py")
    add("--sets", type=int, default=1, help="how many (default: 1)")
    add("--seeds", type=int, default=1, help="of phase 2, in each set (default: 1)")
    add("--miniature", default="", help='flags of miniature.py, as "--hint-share 0"')
    add("--out", default="out/ablation", help="the folder of the sets (default: out/ablation)")
    add("--jobs", type=int, default=os.cpu_count(), help="at a time (default: one for each core)")
    args = parser.parse_args()
    if min(args.sets, args.seeds, args.jobs) < 1:
        parser.error("--sets, --seeds and --jobs have to be at least 1")
    rows = {}
    for row in args.rows:
        name, equals, flags = row.partition("=")
        if not equals or name in ("", "mini") or "/" in name or name in rows:
            parser.error(f'{row!r}: a row is NAME="FLAGS", with a name of its own')
        rows[name] = shlex.split(flags.replace("=", " "))
    sets = [Path(args.out, f"s{seed}") for seed in range(args.sets)]
    runs = list(itertools.product(sets, rows, range(args.seeds)))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    pool = ThreadPoolExecutor(args.jobs)
    try:
        made = pool.map(lambda of_set: make_set(of_set, shlex.split(args.miniature)), sets)
        list(tqdm(made, "sets", len(sets), disable=None))
        trained = pool.map(lambda run: make_run(*run, rows[run[1]]), runs)
        list(tqdm(trained, "runs", len(runs), disable=None))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in STARTED:
            process.terminate()
    for evaluation in ("evaluation", "evaluation-absent"):
        print(f"\n{evaluation}\n", flush=True)
        patterns = [f"{name}={args.out}/s*/{name}/seed*/mini/{stage2(flags)}/{evaluation}"
                    for name, flags in rows.items()]
        if subprocess.run([sys.executable, ROOT / "tests" / "lab" / "table.py", *patterns]).returncode:
            raise UserError("the runs are complete, but there is no table of them: see above")


if __name__ == "__main__":
    run_main(main)
