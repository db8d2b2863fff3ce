"""A run as it is at this moment: what trains it, where it is, what it is against its budget."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem.runs.watch as module
from lowmem.config.settings import gather, to_yaml
from lowmem.runs.rows import EpochRow
from lowmem.runs.store import RunFolder
from lowmem.runs.watch import Live, epoch_seconds


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    settings = gather(sets=["train.epochs=4", "train.batch=32", "model.width=2"])
    return RunFolder.create(tmp_path / "run", to_yaml(settings), {})


def steps(folder: RunFolder, *numbers: int, epoch: int = 1) -> None:
    folder.append_steps([{"step": n, "epoch": epoch, "lr": 0.1, "loss": 2 - n / 100} for n in numbers])


def epoch(folder: RunFolder, number: int, per_epoch: int = 10, **more: object) -> None:
    row = {
        "epoch": number,
        "step": number * per_epoch,
        "lr": 0.1,
        "test_error_pct": 50.0,
        "elapsed_seconds": 7.0 * number,
    }
    folder.append_metrics(row | more)


def test_from_getting_ready_to_finished(folder: RunFolder) -> None:
    watched = Live(folder.path)
    assert watched.look().state == "starting"
    folder.event("start", steps_per_epoch=10)
    steps(folder, 2, 4)
    live = watched.look()
    assert (live.state, live.running, live.epoch, live.step) == ("training", True, 0, 4)
    assert live.writer is not None
    assert live.writer.pid == os.getpid()
    assert (live.step_in_epoch, live.steps_per_epoch, live.lr, live.losses) == (4, 10, 0.1, (1.98, 1.96))
    steps(folder, 6, 8, 10)
    epoch(folder, 1, device_used_bytes=5000)
    folder.event("checkpoint", epoch=1, step=10)
    live = watched.look()
    assert (live.epoch, live.step, live.step_in_epoch, live.device_bytes) == (1, 10, 0, 5000)
    assert live.seconds_left == pytest.approx(21.0)
    assert live.checkpoint is not None
    assert live.checkpoint.detail["step"] == 10
    folder.event("done", epoch=4, step=40)
    folder.close()
    live = watched.look()
    assert (live.state, live.running, live.writer, live.seconds_left) == ("finished", False, None, None)


@pytest.mark.parametrize(
    ("event", "fields", "state"),
    [
        ("stop", {"reason": "train.max_steps"}, "stopped"),
        ("signal", {"signal": "SIGINT"}, "interrupted"),
        ("diverged", {}, "diverged"),
        ("stuck", {"stopped": True}, "stuck"),
        ("stuck", {"stopped": False}, "ended"),
        ("out-of-memory", {}, "ended"),
    ],
)
def test_how_it_ended(folder: RunFolder, event: str, fields: dict[str, object], state: str) -> None:
    folder.event("start")
    folder.event(event, **fields)
    assert Live(folder.path).look().state == "training"
    folder.close()
    assert Live(folder.path).look().state == state


def test_what_an_earlier_life_ended_with_does_not_count(folder: RunFolder) -> None:
    folder.event("signal", signal="SIGINT")
    folder.event("resume", step=3)
    folder.close()
    assert Live(folder.path).look().state == "ended"


def test_a_dead_writer(folder: RunFolder) -> None:
    folder.event("start")
    folder.close()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = {"pid": gone.pid, "host": socket.gethostname(), "since": "2026-11-25T08:00:00+0000"}
    (folder.path / "run.owner.json").write_text(json.dumps(owner), encoding="utf-8")
    assert Live(folder.path).look().state == "died"


def test_a_number_that_another_process_has_now(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner file was left and its number given to somebody else: only the lock tells, and it is tried once."""
    folder.event("start")
    folder.close()
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026-11-25T08:00:00+0000"}
    (folder.path / "run.owner.json").write_text(json.dumps(owner), encoding="utf-8")
    tried: list[Path] = []
    monkeypatch.setattr(module, "writer_of", lambda run: tried.append(run))
    watched = Live(folder.path)
    assert [watched.look().state for _ in range(3)] == ["died"] * 3
    assert len(tried) == 1


def test_a_lock_that_is_held_is_left_alone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried at the first look, and again only when nothing has come for a while."""
    real, tried = module.writer_of, []

    def counted(run: Path) -> str | None:
        tried.append(run)
        return real(run)

    monkeypatch.setattr(module, "writer_of", counted)
    watched = Live(folder.path)
    for number in range(1, 5):
        steps(folder, number)
        assert watched.look().running
    assert len(tried) == 1
    monkeypatch.setattr(module, "_QUIET_SECONDS", -1.0)
    assert watched.look().running
    assert len(tried) == 2


def test_on_another_machine(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.close()
    owner = {"pid": 1, "host": "elsewhere", "since": "2026-11-25T08:00:00+0000", "boot": "1"}
    (folder.path / "run.owner.json").write_text(json.dumps(owner), encoding="utf-8")
    monkeypatch.setattr("lowmem.runs.lock._boot", lambda: "2")
    assert Live(folder.path).look().running
    # In a container that was here: its lock is free.
    monkeypatch.setattr("lowmem.runs.lock._boot", lambda: "1")
    assert (Live(folder.path).look().running, Live(folder.path).look().state) == (False, "died")


def test_a_fork_counts_its_own_steps_and_not_those_of_the_rows_that_it_took_over(folder: RunFolder) -> None:
    """Twice the batch: five steps an epoch, of which the old run had ten."""
    epoch(folder, 1)
    epoch(folder, 2)
    folder.event("fork", source="old", epoch=2, step=10)
    folder.event("start", steps_per_epoch=5)
    watched = Live(folder.path)
    live = watched.look()
    assert (live.epoch, live.step, live.step_in_epoch, live.end) == (2, 10, 0, 20)
    steps(folder, 12, epoch=3)
    folder.event("progress", step=12, images_per_second=64.0, device_used_bytes=7000)
    live = watched.look()
    assert (live.step, live.step_in_epoch, live.device_bytes, live.images_per_second) == (12, 2, 7000, 64.0)
    folder.append_metrics({"epoch": 3, "step": 15, "lr": 0.1, "test_error_pct": 50.0})
    live = watched.look()
    assert (live.epoch, live.step, live.step_in_epoch) == (3, 15, 0)


def test_the_time_left_is_until_it_stops_as_asked(tmp_path: Path) -> None:
    settings = gather(sets=["train.epochs=4", "train.batch=32", "train.max_steps=6"])
    with RunFolder.create(tmp_path / "run", to_yaml(settings), {}) as folder:
        folder.event("start", steps_per_epoch=10)
        steps(folder, 2)
        folder.event("progress", step=2, images_per_second=64.0)
        live = Live(folder.path).look()
    assert (live.end, live.seconds_left) == (6, 2.0)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-300, 1e300, True, "5", None, [], 10**400])
def test_a_strangers_speed_is_none(folder: RunFolder, value: object) -> None:
    folder.event("start", steps_per_epoch=10)
    folder.event("progress", step=value, images_per_second=value, device_used_bytes=value)
    live = Live(folder.path).look()
    assert (live.images_per_second, live.seconds_left, live.step) == (None, None, 0)


def test_cut_back_by_a_resume(folder: RunFolder) -> None:
    watched = Live(folder.path)
    folder.event("start", steps_per_epoch=10)
    steps(folder, 5, 10, 15, 20)
    epoch(folder, 1)
    epoch(folder, 2)
    assert watched.look().step == 20
    folder.cut_back(epoch=1, step=12)
    steps(folder, 15, epoch=2)
    live = watched.look()
    assert (live.epoch, live.step, len(live.losses), len(live.rows)) == (1, 15, 3, 1)


def test_back_at_an_older_checkpoint(folder: RunFolder) -> None:
    folder.event("start", steps_per_epoch=3)
    for n in range(1, 3):
        epoch(folder, n, per_epoch=3)
    for step in (4, 8):
        folder.event("checkpoint", epoch=step // 3, step=step)
    watched = Live(folder.path)
    live = watched.look()
    assert (live.step, live.step_in_epoch, live.checkpoint and live.checkpoint.detail["step"]) == (8, 2, 8)
    folder.cut_back(epoch=1, step=4)
    folder.event("rollback", what="broken", step=9, epoch=3, checkpoint="step-00000004", rollbacks=1, lr_scale=0.5)
    live = watched.look()
    assert (live.step, live.step_in_epoch, live.checkpoint and live.checkpoint.detail["step"]) == (4, 1, 4)
    folder.event("checkpoint", epoch=1, step=5)
    live = watched.look()
    assert (live.step, live.step_in_epoch, live.checkpoint and live.checkpoint.detail["step"]) == (5, 2, 5)


def test_half_a_line_waits(folder: RunFolder) -> None:
    watched = Live(folder.path)
    with folder.steps_file.open("ab") as file:
        file.write(b"1,1,0.1,2.5\n2,1,0.")
    assert watched.look().step == 1
    with folder.steps_file.open("ab") as file:
        file.write(b"1,2.4\n")
    assert watched.look().losses == (2.5, 2.4)


def test_budget_and_what_was_measured(folder: RunFolder) -> None:
    watched = Live(folder.path)
    assert watched.look().budget_bytes is None
    folder.write_plan({"budget_bytes": 1000})
    folder.event("measured", measured_peak_bytes=900)
    live = watched.look()
    assert (live.budget_bytes, live.peak_bytes) == (1000, 900)
    folder.update_plan({"budget_bytes": 800})  # a rung down the ladder
    epoch(folder, 1, peak_allocated_bytes=700)
    live = watched.look()
    assert (live.budget_bytes, live.peak_bytes) == (800, 700)
    folder.update_plan({"budget_bytes": 10**400})  # no size of anything
    assert watched.look().budget_bytes is None


def test_what_waits_in_host_memory(folder: RunFolder) -> None:
    watched = Live(folder.path)
    folder.write_plan({"predicted": {"host_bytes": 0, "hidden_share": None}})
    assert (watched.look().host_bytes, watched.hidden_share) == (None, None)
    folder.update_plan({"predicted": {"host_bytes": 3 << 30, "hidden_share": 0.9}})
    assert (watched.look().host_bytes, watched.hidden_share) == (3 << 30, 0.9)
    for odd in ({"host_bytes": 3 << 30}, {"host_bytes": 3 << 30, "hidden_share": "much"}):  # an older run; by hand
        folder.update_plan({"predicted": odd})
        assert (watched.look().host_bytes, watched.hidden_share) == (3 << 30, None)
    folder.update_plan({"predicted": [1]})
    assert watched.look().host_bytes is None


def test_damaged_files_hide_only_themselves(folder: RunFolder) -> None:
    folder.event("start")
    for name in ("config.yaml", "plan.json"):
        (folder.path / name).write_bytes(b"\xff{[")
    folder.metrics_file.write_bytes(b"what,is,this\n1,2,3\n" + b"\x00" * 20)
    with folder.events_file.open("ab") as file:
        file.write(b'\xfe\n[1]\n{"event": 3}\n')
    steps(folder, 7)
    live = Live(folder.path).look()
    assert (live.config, live.budget_bytes, live.rows, live.step) == (None, None, (), 7)
    assert [event.kind for event in live.events] == ["start"]


def test_nothing_there(tmp_path: Path) -> None:
    live = Live(tmp_path / "nowhere").look()
    assert (live.state, live.config, live.step, live.quiet_seconds) == ("ended", None, 0, None)


def test_seconds_of_an_epoch() -> None:
    def rows(*elapsed: float | None, first: int = 1) -> list[EpochRow]:
        return [EpochRow(epoch=n, step=n, elapsed_seconds=value) for n, value in enumerate(elapsed, start=first)]

    assert epoch_seconds([]) is None
    assert epoch_seconds(rows(None)) is None
    assert epoch_seconds(rows(5.0)) == 5.0
    assert epoch_seconds(rows(5.0, 7.0, 10.0, 12.0)) == 2.0  # not the slow one
    # An epoch in which the machine did something else does not count for much, and what is long ago not at all.
    assert epoch_seconds(rows(100, 200, 205, 210, 260, 265, 270)) == 5.0
    assert epoch_seconds(rows(30.0, first=4)) is None  # of a fork, or after a resume
    assert epoch_seconds(rows(None, 5.0)) is None
    assert epoch_seconds(rows(float("nan"), float("inf"))) is None
