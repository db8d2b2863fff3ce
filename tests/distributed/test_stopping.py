"""Several processes end together, by patience and by the clock of one of them."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.lifecycle import resume_training
from lowmem.runs.view import RunView
from tests.conftest import exact_rows
from tests.distributed.torchrun import torchrun
from tests.tiny import arguments

TRAIN = ("lowmem", "train", *arguments("train.epochs=6", "optim.lr=1e-9", "data.val_split=10"))


def test_they_run_out_of_patience_together(tmp_path: Path) -> None:
    """At such a rate nothing becomes better: the first epoch that is, is among the first."""
    code, output = torchrun(tmp_path, 2, *TRAIN, "--patience", "2", "--hours", "5", "--out", "run")
    assert code == 0, output
    assert output.count("train.hours = 5: all 6 epochs fit") == 1, "rank 0 alone talks"
    run = RunView(tmp_path / "run")
    assert run.state == "finished early", output
    best = min(run.epochs, key=lambda row: row.val_error_pct or 0)
    assert best.epoch + 2 == len(run.epochs) < 6
    # One process finds it so as well, and goes on from there.
    assert resume_training(run.path).why == "train.patience"
    assert resume_training(run.path, {"train.patience": None}).finished


def test_the_clock_of_one_decides(tmp_path: Path) -> None:
    """The run is begun with a number of epochs that one of them has measured, and left when its time is over."""
    code, output = torchrun(tmp_path, 2, *TRAIN, "--set", "train.epochs=9999", "--hours", "0.003", "--out", "run")
    assert code == 0, output
    run = RunView(tmp_path / "run")
    assert run.config.train.epochs < 9999
    assert run.state in ("finished", "out of time"), output
    spent = json.loads((run.checkpoints[0].path / "state.json").read_text(encoding="utf-8"))["run"]["elapsed_seconds"]
    assert spent < 3600 * 0.003 + 10
    before = exact_rows(run.path)
    more = str((spent + 1) / 3600)
    code, output = torchrun(tmp_path, 2, "lowmem", "resume", "run", "--hours", more)
    assert code == 0, output
    assert exact_rows(run.path)[: len(before)] == before
