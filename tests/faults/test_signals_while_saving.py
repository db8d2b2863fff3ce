"""Signals that come while a checkpoint is written in the background, and while the disk takes nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem.runs import atomic
from lowmem.runs import checkpoint as cp
from tests.conftest import assert_same_run
from tests.faults.processes import resume, train, wait_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes with fork")
EVERY = ("--set", "checkpoint.every_steps=8")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder / "run", folder / "log").wait() == 0
    return folder / "run"


def _held(tmp_path: Path, name: str) -> Callable[[], None]:
    """In the child: writing this file of step 8 waits in its middle for the file `go`."""

    def prepare() -> None:
        write = atomic.write_synced

        def held(path: Path, data: bytes) -> None:
            if path.name == name and path.parent.name == ".aside-step-00000008":
                path.write_bytes(data[: len(data) // 2])
                (tmp_path / "begun").touch()
                wait_for(tmp_path / "go")
            write(path, data)

        cp.write_synced = held  # type: ignore[attr-defined]

    return prepare


def _signals(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["signal"] for event in lines if event["event"] == "signal"]


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", 130), *(pytest.param(name, 143, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGHUP"))],
)
def test_a_signal_during_a_save(name: str, code: int, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    child = train(run, tmp_path / "log", *EVERY, before=_held(tmp_path, "model.safetensors"))
    wait_for(tmp_path / "begun")
    child.signal(getattr(signal, name))
    (tmp_path / "go").touch()
    assert child.wait() == code, child.said
    assert "lowmem resume" in child.said
    assert _signals(run) == [name]
    loaded, _, skipped = cp.load_newest(run / "checkpoints")
    assert loaded.step >= 8
    assert not skipped
    resumed = resume(run, tmp_path / "log2")
    assert resumed.wait() == 0
    assert "taken over" not in resumed.said
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("name", [pytest.param("model.safetensors", marks=pytest.mark.slow), "manifest.json"])
def test_a_second_signal_during_a_save_leaves_the_checkpoint_before(
    name: str, tmp_path: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    child = train(run, tmp_path / "log", *EVERY, before=_held(tmp_path, name))
    wait_for(tmp_path / "begun")
    assert child.insist(signal.SIGINT) == 130
    assert "the last checkpoint stands" in child.said
    assert (run / "checkpoints/.aside-step-00000008").is_dir()
    assert cp.load_newest(run / "checkpoints")[0].step == 6
    resumed = resume(run, tmp_path / "log2")
    assert resumed.wait() == 0
    assert f"is taken over from process {child.pid} on" in resumed.said
    assert not (run / "checkpoints/.aside-step-00000008").exists()
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGHUP"), pytest.param("SIGHUP", "SIGHUP", marks=pytest.mark.slow)]
)
def test_signals_that_come_together_do_not_cut_a_save_off(
    first: str, second: str, tmp_path: Path, uninterrupted: Path
) -> None:
    """A system that shuts down sends two, and so do some shells: nobody insists."""
    run = tmp_path / "run"
    child = train(run, tmp_path / "log", *EVERY, before=_held(tmp_path, "model.safetensors"))
    wait_for(tmp_path / "begun")
    child.signal(getattr(signal, first))
    time.sleep(0.2)  # until it is taken
    child.signal(getattr(signal, second))
    time.sleep(0.2)
    (tmp_path / "go").touch()
    assert child.wait() == 143, child.said
    assert cp.load_newest(run / "checkpoints")[0].step >= 8
    assert resume(run, tmp_path / "log2").wait() == 0
    assert_same_run(run, uninterrupted)


def test_a_signal_while_the_disk_takes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"

    def full() -> None:
        write, append = cp.write_synced, atomic.append_lines

        def refuse(path: Path, data: bytes) -> None:
            if path.parent.name == ".aside-step-00000008":
                (tmp_path / "begun").touch()
            if (tmp_path / "begun").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, data)

        def refuse_rows(path: Path, lines: list[str], *, after_bytes: int | None = None) -> int:
            if (tmp_path / "begun").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return append(path, lines, after_bytes=after_bytes)

        cp.write_synced = refuse  # type: ignore[attr-defined]
        atomic.append_lines = refuse_rows  # type: ignore[attr-defined]

    child = train(run, tmp_path / "log", *EVERY, before=full)
    wait_for(tmp_path / "begun")
    child.signal(signal.SIGTERM)
    assert child.wait() == 8, child.said
    last = child.said.splitlines()[-1]
    for said in ("the last save failed", "the disk is full", "saved last is step 6 (", "lowmem resume"):
        assert said in last
    assert cp.load_newest(run / "checkpoints")[0].step == 6
    assert resume(run, tmp_path / "log2").wait() == 0
    assert_same_run(run, uninterrupted)
