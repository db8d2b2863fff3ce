"""A real process, stopped by real signals in the middle of an epoch, and resumed: the same run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.cli.main import _run
from tests.conftest import assert_same_run, environment
from tests.tiny import arguments

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")

# Steps that are long enough to be met by a signal, ten an epoch.
TRAINED = arguments("model.width=4", "train.batch=64", "data.train_subset=600", "data.test_subset=100")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert _run(["train", *TRAINED, "--out", str(out)]) == 0
    return out


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lowmem", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def _wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = run / "steps.csv"
        if file.is_file() and len(file.read_text().splitlines()) > steps:
            return
        time.sleep(0.005)
    raise AssertionError("the run did not get going")


def _last_event(run: Path) -> dict[str, object]:
    return json.loads((run / "events.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "code", "steps"),
    [
        ("SIGINT", 130, 3),
        # The same while a checkpoint is being written is in test_signals_while_saving.py.
        pytest.param("SIGTERM", 143, 14, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 143, 21, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    name: str, code: int, steps: int, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = _start("train", *TRAINED, "--out", str(out))
    _wait_for_steps(out, steps)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "lowmem resume" in err
    assert len(err.strip().splitlines()) == 1
    stopped = _last_event(out)
    assert stopped["event"] == "signal"
    assert stopped["signal"] == name
    assert _run(["resume", str(out)]) == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.slow  # the quick ones, in processes that are forked, are in test_kill.py
def test_sigkill_loses_no_more_than_since_the_checkpoint_before_the_one_being_written(
    uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = _start("train", *TRAINED, "--out", str(out), "--set", "checkpoint.every_steps=8")
    _wait_for_steps(out, 17)
    process.kill()
    process.communicate()
    output = _finish(_start("resume", str(out)))
    # The save of step 20 waits until that of step 16 is committed, and that one until step 12 is.
    assert any(f"step-000000{step}" in output for step in (12, 16, 20))
    assert "is taken over from process" in output
    assert_same_run(out, uninterrupted)


@pytest.mark.slow  # the quick ones are in test_signals_while_saving.py
def test_a_second_signal_leaves_at_once_and_nothing_is_lost(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = _start("train", *TRAINED, "--out", str(out), "--set", "checkpoint.every_steps=1")
    _wait_for_steps(out, 5)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    _finish(_start("resume", str(out)))
    assert_same_run(out, uninterrupted)


@pytest.mark.slow  # the quick ones are in tests/unit/runs/test_lock.py
def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = _start("train", *TRAINED, "--set", "train.epochs=50", "--out", str(out))
    _wait_for_steps(out, 1)
    second = _start("resume", str(out))
    _, err = second.communicate(timeout=120)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    # The first checkpoint may not be there yet; the lock is looked at before.
    assert second.returncode == 2
    assert f"process {process.pid} on {socket.gethostname()} since 20" in err
