"""A kill loses no more than the configured interval, however slow the disk is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.sections import CheckpointConfig
from lowmem.data import load
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.saver import Saved, Saver
from lowmem.runs.store import RunFolder
from lowmem.train.watchers import Act, CheckpointInterval, Verdict
from tests.faults.injection import events, make_trainer, run
from tests.tiny import tiny

STEPS = 20  # of one epoch


@dataclass
class Disk:
    """What an interval asks of a saver, with the clock in hand: a write ends when `wait` is called, or never."""

    last_saved: Saved | None = None
    longest_write_seconds: float = 0.0
    now: float = 1000.0
    writing: Saved | None = None
    waits: int = 0

    def wait(self) -> None:
        self.waits += 1
        self.last_saved, self.writing = self.writing or self.last_saved, None


def _interval(disk: Disk, **settings: Any) -> CheckpointInterval:
    config = CheckpointConfig(**{"every_minutes": None, **settings})
    return CheckpointInterval(config, disk, 0, lambda: disk.now)  # type: ignore[arg-type]


def _due(interval: CheckpointInterval, step: int) -> bool:
    return interval.look(step).act is Act.SAVE


@pytest.mark.parametrize(
    ("most", "places"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 2, 3, 4, 5, 6]), (5, [2, 4, 6]), (6, [3, 6])]
)
def test_by_steps_it_saves_at_every_half(most: int, places: list[int]) -> None:
    interval, seen = _interval(Disk(), every_steps=most), []
    for step in range(1, 7):
        if _due(interval, step):
            interval.submitted(step)
            seen.append(step)
    assert seen == places


def test_what_something_stronger_came_before_is_due_after_it() -> None:
    interval = _interval(Disk(), every_steps=6)
    assert interval.look(2) == Verdict()
    assert [_due(interval, step) for step in (3, 4)] == [True, True]
    interval.submitted(4)
    assert [_due(interval, step) for step in (4, 5, 6)] == [False, False, True]


def test_by_the_clock_it_saves_before_the_end() -> None:
    disk = Disk(longest_write_seconds=20.0)
    interval = _interval(disk, every_minutes=2.0)
    disk.now += 99
    assert not _due(interval, 7)
    assert interval.due_before(5.0)
    assert not interval.due_before(0.5)
    assert interval.due_before(None)  # nobody knows how long: half of the interval is allowed for
    assert not _interval(disk, every_minutes=6.0).due_before(None)
    disk.now += 2
    assert _due(interval, 7)
    interval.submitted(7)
    assert not _due(interval, 8)
    disk.longest_write_seconds = 500.0  # never earlier than half
    disk.now += 59
    assert not _due(interval, 9)
    disk.now += 2
    assert _due(interval, 9)


def test_it_waits_only_for_what_would_be_lost() -> None:
    disk = Disk(Saved(Path("a"), 10))
    interval = _interval(disk, every_steps=4, every_minutes=1.0)
    disk.writing = Saved(Path("b"), 12, disk.now, disk.now)
    for step in (10, 11, 12, 13):
        interval.hold(step)
    assert disk.waits == 0
    interval.hold(14)
    assert (disk.waits, disk.last_saved.step) == (1, 12)  # type: ignore[union-attr]
    interval.hold(14)
    assert disk.waits == 1
    disk.now += 61
    disk.writing = Saved(Path("c"), 14, disk.now, disk.now)
    interval.hold(14)
    assert disk.waits == 2


def test_without_an_interval_it_never_waits() -> None:
    disk = Disk(Saved(Path("a"), 0))
    interval = _interval(disk)
    disk.now += 1e6
    interval.hold(100_000)
    assert not _due(interval, 100_000)
    assert disk.waits == 0


class Patient(Saver):
    """Its writes end while they are waited for, and at no other time."""

    waiting = 0

    def wait(self) -> None:
        Patient.waiting += 1
        super().wait()
        Patient.waiting -= 1

    def finish(self, *args: Any) -> None:
        Patient.waiting += 1
        super().finish(*args)
        Patient.waiting -= 1


@pytest.mark.parametrize(("most", "saves"), [(1, [*range(1, 21)]), (6, [3, 6, 9, 12, 15, 18, 20])])
def test_a_run_on_a_slow_disk_is_never_further_than_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, saves: list[int]
) -> None:
    """Before every step, with what is on disk then: what a kill at the end of that step would lose."""
    settings = tiny(
        f"data.train_subset={4 * STEPS}", "data.test_subset=8", "train.epochs=1", "train.batch=4",
        f"checkpoint.every_steps={most}",
    )  # fmt: skip
    trainer = make_trainer(settings, load(settings.config.data, settings.config.seed), None)
    save, fetch, seen = checkpoints.save, trainer.batches.batch, list[tuple[int, int]]()

    def slow(*args: Any, **kwargs: Any) -> Path:
        until = time.monotonic() + 60
        while not Patient.waiting:
            assert time.monotonic() < until
            time.sleep(0.001)
        return save(*args, **kwargs)

    def batch(*args: Any, **kwargs: Any) -> Any:
        on_disk = checkpoints.checkpoint_folders(tmp_path / "run" / "checkpoints")
        seen.append((trainer.state.step + 1, checkpoints.step_of(on_disk[0])))
        return fetch(*args, **kwargs)

    def make(folder: RunFolder, **kwargs: Any) -> Saver:
        save(folder.checkpoints, trainer.checkpoint(), keep=2)  # what every run has before its first step
        return Patient(folder, **kwargs)

    monkeypatch.setattr(trainer.batches, "batch", batch)
    monkeypatch.setattr("lowmem.train.loop.Saver", make)
    monkeypatch.setattr("lowmem.runs.saver.checkpoints.save", slow)
    path = run(tmp_path / "run", settings, trainer)
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    assert max(step - kept for step, kept in seen) == most  # not fewer: training goes on during a write
    assert [event["step"] for event in events(path, "checkpoint")] == saves
