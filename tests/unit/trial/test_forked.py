"""Trials in forked processes: what a process of its own would have found, and every failure a refusal of one trial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.trial.forked import Trials, forks
from lowmem.trial.trial import OUT_OF_MEMORY, Trial, run_trial
from lowmem.trial.ways import PER_BLOCK

pytestmark = pytest.mark.skipif(not forks("cpu"), reason="forks on Linux only")
TINY: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 4, "batch": 16, "steps": 1, "warmup": 1}


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    with Trials("cpu") as running:
        yield running


def test_it_finds_what_a_process_of_its_own_finds(trials: Trials) -> None:
    trial = Trial(**TINY, detailed=True)
    forked, apart = trials(trial, 300), run_trial(trial)
    assert forked.refused is None
    for name in ("losses", "peak_allocated_bytes", "gradients", "buffers", "flops", "norm_updates"):
        assert getattr(forked, name) == getattr(apart, name) is not None
    assert forked.resident_growth_bytes is not None
    assert forked.resident_growth_bytes > 0


def test_one_trial_leaves_nothing_to_the_next(trials: Trials) -> None:
    first = trials(Trial(**TINY), 300)
    large = trials(Trial(**{**TINY, "batch": 256}), 300)
    again = trials(Trial(**TINY), 300)
    assert first.losses == again.losses
    assert first.peak_allocated_bytes == again.peak_allocated_bytes
    assert large.resident_growth_bytes is not None
    assert again.resident_growth_bytes is not None
    assert again.resident_growth_bytes < large.resident_growth_bytes / 2


def test_a_trial_that_crashes_or_is_killed_is_a_refusal(trials: Trials) -> None:
    assert "no way of doing a step" in (trials(Trial(**TINY, way="by hand"), 300).refused or "")
    late = trials(Trial(**{**TINY, "batch": 4096}, way=PER_BLOCK), 0.3)
    assert late.refused == "took longer than 0 s"
    server = trials._started()
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    assert trials(Trial(**TINY), 300).refused is None


def test_a_killed_server_is_taken_for_out_of_memory(trials: Trials) -> None:
    server = trials._started()
    command = f"sleep 1; kill -KILL {server.pid}"
    killer = subprocess.Popen(["sh", "-c", command])
    result = trials(replace(Trial(**TINY), batch=4096, steps=50), 300)
    killer.wait()
    assert (result.refused, result.out_of_memory) == (OUT_OF_MEMORY, True)


def test_nothing_is_left_behind() -> None:
    with Trials("cpu") as running:
        running(Trial(**TINY), 300)
        server = running._started()
    assert server.poll() is not None


def test_it_ends_with_whoever_asks() -> None:
    code = (
        "import os, signal\n"
        "from lowmem.trial.forked import Trials\n"
        "trials = Trials('cpu').__enter__()\n"
        "print(trials._started().pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    number = int(done.stdout)
    for _ in range(600):
        status = Path(f"/proc/{number}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {number} still runs")
