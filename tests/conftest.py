"""Shared by all tests: small settings, the command as a process, comparison of two runs bit for bit."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.numpy import load_file

from lowmem.runs.rows import EPOCH_TABLE
from tests.convolutions import refuse_corrupting
from tests.workers import pytest_handlecrashitem, pytest_sessionfinish, pytest_testnodedown, pytest_testnodeready

__all__ = ["pytest_handlecrashitem", "pytest_sessionfinish", "pytest_testnodedown", "pytest_testnodeready"]

refuse_corrupting()

# Whoever starts the tests may ignore these (`nohup`, a background job), and what the tests start would inherit that.
for _number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# One thread, as the tests share their cores. A part of CI has two, whose sums are other bits (.ci/run).
THREADS = os.environ.get("LOWMEM_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))
# Processes that are started by what is tested (trials, measurements) share the cores just the same.
os.environ["OMP_NUM_THREADS"] = THREADS
# Where the width of the terminal is handed on, tables would be printed for it.
os.environ.pop("COLUMNS", None)
# The machines that test are busy: no test may fail for being slow.
hypothesis.settings.register_profile("lowmem", deadline=None)
hypothesis.settings.load_profile("lowmem")

_TF32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def _libraries_as_they_were() -> Iterator[None]:
    """`train.tf32: never` is for the process: a test that trained so would change what a later one is told."""
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = _TF32


WORKERS = 2
SLOW_TIMEOUT_SECONDS = 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Behind a slow test that starts processes stands a longer timeout than the usual one (pyproject.toml)."""
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`. Tests of a card have it to themselves, and must find its memory free."""
    wanted = str(config.getoption("markexpr"))
    return 0 if "gpu" in wanted and "not gpu" not in wanted else WORKERS


def environment() -> dict[str, str]:
    """With as many threads as here: the arithmetic must not depend on how many cores are free."""
    return {**os.environ, "OMP_NUM_THREADS": THREADS, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}


@pytest.fixture
def lowmem_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `lowmem ARGS` as a process of its own in a fresh folder."""

    def run(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lowmem", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)

    return run


def assert_same_run(left: Path, right: Path) -> None:
    """Weights, what they say of themselves, optimizer, buffers, position and the exact columns of the metrics are equal
    to the last bit."""
    for name in ("weights/last.safetensors", "weights/best.safetensors"):
        assert_same_tensors(left / name, right / name)
        assert (left / name).read_bytes() == (right / name).read_bytes(), f"{name} says something else of itself"
    checkpoints = [sorted(path.name for path in (run / "checkpoints").glob("step-*")) for run in (left, right)]
    assert checkpoints[0][-1] == checkpoints[1][-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(
            left / "checkpoints" / checkpoints[0][-1] / name, right / "checkpoints" / checkpoints[1][-1] / name
        )
    assert exact_rows(left) == exact_rows(right)
    for name in ("steps.csv", "gradients.csv"):
        assert (left / name).read_text() == (right / name).read_text()


def assert_same_tensors(left: Path, right: Path) -> None:
    ours, theirs = load_file(left), load_file(right)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in ours.items():
        assert tensor.tobytes() == theirs[name].tobytes(), f"{name} of {left.name} differs"


MEASURED = frozenset(
    {name for name in EPOCH_TABLE.names if name.endswith("_bytes") or name.startswith("gpu_")}
    | {"images_per_second", "elapsed_seconds"}
)


def exact_rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{key: row[key] for key in row if key not in MEASURED} for row in csv.DictReader(file)]
