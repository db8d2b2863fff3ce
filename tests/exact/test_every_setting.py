"""Every setting of a recipe under everything that a run survives: a resume in the middle of an epoch, a fork, and
several processes give the run that was never stopped, to the last bit.

`ROWS` is the table; a new setting that changes what is computed gets a row in it, and goes into one of `TOGETHER`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem.config.schema import OPERATIONAL, flatten
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.runs import checkpoint as checkpoints
from tests.conftest import assert_same_run, assert_same_tensors, exact_rows
from tests.distributed.torchrun import torchrun
from tests.tiny import tiny

# Two epochs of three steps; checkpoints of the end of the first one and of what max_steps leaves.
SHAPE = ("train.epochs=2", "checkpoint.keep=4", "checkpoint.keep_every=1", "train.memory_format=contiguous")
IN_AN_EPOCH, END = 4, 6
# By themselves.
ROWS: dict[str, tuple[str, ...]] = {
    "nesterov": ("optim.nesterov=true",),
    "adamw": ("optim.kind=adamw", "optim.lr=0.002", "optim.betas=[0.8, 0.99]", "optim.eps=1e-6"),
    "decay_norms": ("optim.weight_decay=0.05", "optim.decay_norms=false"),
    "clip_norm": ("optim.clip_norm=0.5",),
    "ema": ("optim.ema=0.9",),
    "bf16": ("train.precision=bf16",),
    "cosine": ("schedule.kind=cosine", "schedule.warmup_epochs=0.7", "schedule.final_share=0.1"),
    "one-cycle": ("schedule.kind=one-cycle",),
    "warm-up": ("schedule.warmup_epochs=1.5",),
    "label_smoothing": ("train.label_smoothing=0.1",),
    "cutout": ("data.cutout=9",),
    "random_erasing": ("data.random_erasing=0.6",),
    "mixup": ("data.mixup=0.4",),
    "channels": ("data.channels=1",),
    "freeze": ("train.freeze=[conv1, bn1, layer1*, layer3.1.bn2]",),
}
# Several at once, which is quick.
TOGETHER: dict[str, tuple[str, ...]] = {
    "sgd": (*ROWS["nesterov"], *ROWS["clip_norm"], *ROWS["ema"], *ROWS["one-cycle"], *ROWS["cutout"], *ROWS["freeze"]),
    "all": (
        *ROWS["adamw"],
        *ROWS["decay_norms"],
        *ROWS["clip_norm"],
        *ROWS["ema"],
        *ROWS["bf16"],
        *ROWS["cosine"],
        *ROWS["label_smoothing"],
        *ROWS["cutout"],
        *ROWS["random_erasing"],
        *ROWS["mixup"],
        *ROWS["channels"],
    ),
}

_slow = [pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
rows = pytest.mark.parametrize("row", [*TOGETHER, *_slow])
Made = Callable[[str], Path]


def settings_of(row: str) -> tuple[str, ...]:
    return (*SHAPE, *{"": (), **ROWS, **TOGETHER}[row])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The run of a row ("": of none) that was never stopped."""
    runs: dict[str, Path] = {}

    def make(row: str) -> Path:
        if row not in runs:
            runs[row] = tmp_path_factory.mktemp("whole") / "run"
            run_training(tiny(*settings_of(row)), runs[row])
        return runs[row]

    return make


@rows
def test_resumed_in_the_middle_of_an_epoch(row: str, made: Made, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(tiny(*settings_of(row), f"train.max_steps={IN_AN_EPOCH}"), run)
    assert checkpoints.checkpoint_folders(run / "checkpoints")[0].name == checkpoints.folder_name(IN_AN_EPOCH)
    resume_training(run, {"train.max_steps": None})
    assert_same_run(run, made(row))


@rows
def test_forked_with_nothing_changed(row: str, made: Made, tmp_path: Path) -> None:
    """But for what matters to several processes only: a fork has to change something."""
    whole, run = made(row), tmp_path / "run"
    fork_run(whole, at=1, changes={"train.peer_timeout_minutes": 9.0}, out=run)
    last = f"checkpoints/{checkpoints.folder_name(END)}"
    for name in (f"{last}/model", f"{last}/optimizer", "weights/last"):
        assert_same_tensors(run / f"{name}.safetensors", whole / f"{name}.safetensors")
    assert exact_rows(run) == exact_rows(whole)
    assert (run / "steps.csv").read_text() == (whole / "steps.csv").read_text()


@pytest.mark.parametrize("names", [("all",), pytest.param((*ROWS, "sgd"), marks=pytest.mark.slow)])
def test_two_processes_resumed_in_the_middle_of_an_epoch(names: tuple[str, ...], tmp_path: Path) -> None:
    code, output = torchrun(tmp_path, 2, "tests.exact.test_every_setting", str(tmp_path), *names)
    assert code == 0, output
    for row in names:
        assert_same_run(tmp_path / row / "run", tmp_path / row / "whole")


def in_several_processes(folder: Path, names: list[str]) -> None:
    """What each of them does: the run of each row at once, and stopped and resumed."""
    for row in names:
        run_training(tiny(*settings_of(row)), folder / row / "whole")
        run_training(tiny(*settings_of(row), f"train.max_steps={IN_AN_EPOCH}"), folder / row / "run")
        # Named, so that the next row's process need not take a card again.
        resume_training(folder / row / "run", {"train.max_steps": None, "train.device": "cpu"})


@rows
def test_a_row_is_another_run(row: str, made: Made) -> None:
    """Its settings count when a checkpoint is taken for this run's, and change what the run computes."""
    plain, mine = (flatten(tiny(*settings_of(name)).config) for name in ("", row))
    assert {key for key in plain if plain[key] != mine[key]} - OPERATIONAL
    assert exact_rows(made(row)) != exact_rows(made(""))


if __name__ == "__main__":
    in_several_processes(Path(sys.argv[1]), sys.argv[2:])
