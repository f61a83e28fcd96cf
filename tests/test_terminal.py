"""Nothing is lost at the terminal: whoever reads what the programs say, or stops to, and however they are
told to stop, their files are written."""

import io
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_command_line import EVALUATE, ONE, made, names, trained, trains  # noqa: F401 (a fixture)
from test_resume import FORKS
from tqdm import tqdm

import lmeye
import sample
import train
from lmeye import CHECKPOINT


def child(program, cwd, flags, output):
    """A program in a process and session of its own that writes into a file, a pipe or a terminal."""
    os.chdir(cwd)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever was ignored where the tests were started
    is_terminal = output.startswith("/dev/")
    os.dup2(os.open(output, os.O_RDWR if is_terminal else os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = [program, *map(str, flags)]
    lmeye.run_main({"train.py": train, "sample.py": sample}[program].main)


def test_a_run_whose_reader_leaves_after_three_lines_ends_well(trained, tmp_path):
    flags = " ".join(map(str, [*ONE, "--val", "pictures", "--steps", 20, "--out", tmp_path]))
    shell = f"{sys.executable} {ROOT}/train.py {flags} 2>&1 | head -3; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", shell], cwd=trained, capture_output=True, text=True)
    assert (process.returncode, process.stderr, process.stdout.count("\n")) == (0, "", 3)
    expected = {CHECKPOINT, "best.safetensors", "log.csv", "run.json", "evaluation"}
    assert names(made(tmp_path, "stage1")) == expected
    assert names(made(tmp_path, "stage1/evaluation")) == {"answers.jsonl", "scores.json"}


def test_an_evaluation_whose_reader_leaves_after_a_line_leaves_its_files(trained, tmp_path):
    """As with `sample.py … 2>&1 | head -1`."""
    shutil.copytree(made(trained / "out", "stage2"), made(tmp_path, "stage2"))
    os.mkfifo(tmp_path / "pipe")
    command = ("sample.py", str(trained), [*EVALUATE, "--out", tmp_path], str(tmp_path / "pipe"))
    process = FORKS.Process(target=child, args=command)
    process.start()
    with open(tmp_path / "pipe") as pipe:
        assert pipe.readline().startswith("answers:")
    process.join(100)
    assert names(made(tmp_path, "stage2/evaluation-chat")) == {"answers.jsonl", "scores.json"}
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    trains(*ONE, "--steps", 100, "--accumulate", 4, "--out", out, cwd=trained)
    return made(out, "stage1") / CHECKPOINT


@pytest.mark.parametrize("what", ("Ctrl-C, of which tee died first", "SIGHUP", "a terminal that is closed"))
def test_a_stop_saves_first_whoever_reads_what_it_says(trained, unbroken, tmp_path, what):
    flags = [*ONE, "--steps", 100, "--accumulate", 4, "--out", tmp_path]
    output, ends = str(tmp_path / "output"), []
    if what.startswith("a terminal"):
        ends = pty.openpty()
        output = os.ttyname(ends[1])
    elif what.startswith("Ctrl-C"):
        os.mkfifo(output)
        ends = [os.open(output, os.O_RDONLY | os.O_NONBLOCK)]
    process = FORKS.Process(target=child, args=("train.py", str(trained), flags, output))
    process.start()
    folder, deadline = made(tmp_path, "stage1"), time.monotonic() + 100
    while not (folder / "log.csv").exists() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for end in ends:  # a terminal that is closed sends SIGHUP itself
        os.close(end)
    if not what.startswith("a terminal"):
        os.kill(process.pid, signal.SIGHUP if what == "SIGHUP" else signal.SIGINT)
    process.join(100)
    reached = int((folder / "log.csv").read_text().splitlines()[-1].split(",")[0])
    assert process.exitcode == 130 and 1 <= reached < 100
    assert torch.load(folder / train.STATE)["step"] == reached
    if what == "SIGHUP":
        *_, before, last = Path(output).read_text().splitlines()
        assert before.startswith(f"step {reached}/100")
        said, command = last.split(" to go on:")
        assert said == f"stopped after step {reached} of 100;"
        assert shlex.split(command) == ["python", "train.py", *map(str, flags), "--resume"]
    trains(*flags, "--resume", cwd=trained)
    assert (folder / CHECKPOINT).read_bytes() == unbroken.read_bytes()


def test_nohup_is_left_in_force(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not stop.is_set()


@pytest.mark.parametrize("program", ("train.py", "sample.py"))
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, program):
    stop = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(stop)  # what is imported in the place of torch
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / program]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


def test_a_service_without_a_standard_output_trains(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, ONE), "--steps", "1", "--out", str(tmp_path)])
    monkeypatch.chdir(trained)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    lmeye.run_main(train.main)
    assert (made(tmp_path, "stage1") / CHECKPOINT).is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_told(monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "stdout", full)
        lmeye.run_main(lambda: print("the answer"))
    assert ended.value.code == 2 and "No space left" in capsys.readouterr().err


def test_a_line_is_written_as_soon_as_it_is_printed_and_with_what_a_terminal_lacks(monkeypatch):
    """As of a run with `> log`, and of a terminal that has ASCII only."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    lmeye.run_main(lambda: (tqdm.write("→ step 1"), written.write(b"then this")))
    assert written.getvalue() == b"\\u2192 step 1\nthen this"
