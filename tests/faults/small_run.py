"""A small finished run, made once and copied for every trial: what is damaged is always a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lowmem.config.settings import gather
from lowmem.lifecycle.api import run_training
from lowmem.runs import checkpoint as checkpoints
from lowmem.train.observer import Observer

SETTINGS = (
    "model.arch=res20", "model.width=2", "data.source=shapes", "data.train_subset=60", "data.test_subset=20",
    "train.batch=20", "train.epochs=3", "train.max_steps=7", "train.log_every_steps=1", "checkpoint.every_steps=4",
    "checkpoint.keep=4", "train.device=cpu", "train.precision=fp32",
)  # fmt: skip


class Heard(Observer):
    """Keeps what a user would have been told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def make_run(path: Path, *extra: str) -> Path:
    """Seven steps of nine, stopped by train.max_steps; a later value of the same setting wins."""
    run_training(gather(sets=(*SETTINGS, *extra)), path, Heard())
    return path


def copy_run(run: Path, to: Path) -> Path:
    """A fresh copy of `run` at `to`, in place of what is there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    return to


def same_checkpoint(left: checkpoints.Checkpoint, right: checkpoints.Checkpoint) -> bool:
    """To the last bit, dtypes and names included."""
    return (
        (left.step, left.state) == (right.step, right.state)
        and _same(dict(left.model), dict(right.model))
        and _same(dict(left.optimizer), dict(right.optimizer))
    )


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype and tensor.shape == right[name].shape and _bits(tensor) == _bits(right[name])
        for name, tensor in left.items()
    )


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
