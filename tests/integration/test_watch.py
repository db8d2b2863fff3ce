"""`lowmem watch` beside a process that trains."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from lowmem.cli.main import _run
from tests.faults.processes import wait_for
from tests.tiny import arguments

LOWMEM = (sys.executable, "-m", "lowmem")


def start(run: Path, epochs: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    settings = arguments("train.batch=16", "data.train_subset=64", "data.test_subset=16", f"train.epochs={epochs}")
    return subprocess.Popen([*LOWMEM, "train", *settings, "--out", str(run)], stdout=log, stderr=log)


@pytest.mark.skipif(os.name == "nt", reason="holds the trainer by signals of POSIX until it is watched")
def test_follows_a_training_process_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open(tmp_path / "log", "wb") as log:
        training = start(run, 4, log)
        wait_for(run / "run.owner.json")
        training.send_signal(signal.SIGSTOP)
        command = [*LOWMEM, "watch", str(run), "--interval", "0.05"]
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        assert watching.stdout is not None
        assert watching.stdout.readline() == f"{run}\n"
        assert watching.stdout.readline().startswith("  state   getting ready (process ")
        training.send_signal(signal.SIGCONT)
        said, complained = watching.communicate(timeout=120)
        assert training.wait(60) == 0
    assert (watching.returncode, complained) == (0, "")
    lines = said.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == [f"{n}/4" for n in range(1, 5)]
    assert [line[10:] for line in lines if re.match(r"\d\d:\d\d:\d\d  ", line)] == ["started", "finished"]
    assert lines[-2].startswith(f"{run}: finished; epoch 4: train ")
    assert lines[-1].startswith(f"`lowmem report {run}` draws the curves")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    assert _run(["verify", str(run)]) == 0


@pytest.mark.slow  # quick: what is drawn and how it ends, in tests/unit/cli/test_watch.py
@pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")
def test_on_a_terminal_until_the_run_is_killed(tmp_path: Path) -> None:
    """In a pseudo-terminal: drawn, and left when the writer dies."""
    import pty

    run = tmp_path / "run"
    with open(tmp_path / "log", "wb") as log:
        training = start(run, 5000, log)
        wait_for(run / "weights" / "last.safetensors")
        here, there = pty.openpty()
        environment = {**os.environ, "COLUMNS": "50", "LINES": "40", "TERM": "xterm", "LANG": "C.UTF-8"}
        command = [*LOWMEM, "watch", str(run), "--interval", "0.05"]
        watching = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=environment)
        os.close(there)
        seen = b""
        while seen.count(b"training (process") < 3:
            seen += os.read(here, 65536)
        training.kill()
        training.wait(60)
        try:
            while data := os.read(here, 65536):
                seen += data
        except OSError:
            pass  # how Linux says that nobody is at the other end any more
        os.close(here)
    assert watching.wait(60) == 0
    text = seen.decode()
    assert "died: its process" in text
    assert "\x1b[" in text
    assert _run(["verify", str(run)]) == 0
