"""The tiny run that tests train, as settings and as arguments of a command, and an observer that remembers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.config.settings import Settings, gather
from lowmem.lifecycle import run_training
from lowmem.train.observer import Observer, Progress

# Nine steps on the CPU, three an epoch: seconds. Where a test's figures depend on a value, it gives its own.
TINY = {
    "model.arch": "res20", "model.width": "2", "data.source": "shapes", "data.train_subset": "60",
    "data.test_subset": "20", "train.batch": "20", "train.epochs": "3", "train.log_every_steps": "1",
    "train.device": "cpu", "train.precision": "fp32",
}  # fmt: skip


def sets(*changes: str) -> list[str]:
    """The tiny run as `KEY=VALUE`; `changes` ("train.epochs=2") take the place of its own values, the last one wins."""
    return [f"{key}={value}" for key, value in {**TINY, **dict(text.split("=", 1) for text in changes)}.items()]


def tiny(*changes: str) -> Settings:
    return gather(sets=sets(*changes))


def arguments(*changes: str) -> tuple[str, ...]:
    """What makes `lowmem train` train it, in a way in which no other flag can change it."""
    return tuple(word for text in sets(*changes) for word in ("--set", text))


class Heard(Observer):
    """Keeps what a user would have been told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.rows: list[Mapping[str, Any]] = []  # of metrics.csv
        self.progresses: list[Progress] = []
        self.steps: list[Progress] = []
        self.phases: list[tuple[str, int | None, int | None]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self.rows.append(row)

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def step(self, progress: Progress) -> None:
        self.steps.append(progress)

    def phase(self, what: str, done: int | None = None, total: int | None = None) -> None:
        self.phases.append((what, done, total))


def make_run(path: Path, *changes: str) -> Path:
    """Seven steps of nine, stopped by train.max_steps, with checkpoints within epochs: made once, and copied for what
    would change it."""
    run_training(tiny("train.max_steps=7", "checkpoint.every_steps=4", "checkpoint.keep=4", *changes), path, Heard())
    return path


def copy_run(run: Path, to: Path) -> Path:
    """A fresh copy of `run` at `to`, in place of what is there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    return to
