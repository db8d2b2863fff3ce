"""The plain 110-layer net at its smallest, which learns nothing: found by the third epoch, in a real run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.settings import Settings, gather
from lowmem.core.errors import DiskError, ExitCode, Stuck
from lowmem.lifecycle.api import resume_training, run_training
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.view import read_run
from lowmem.train.observer import Observer
from tests.conftest import assert_same_run
from tests.faults.injection import events

FLAGS = {
    "model.arch": "cnn110", "model.block": "basic", "model.width": 2, "data.source": "shapes",
    "train.epochs": 4, "train.batch": 8,
}  # fmt: skip
SETS = ("data.train_subset=200", "data.test_subset=10", "train.log_every_steps=5")  # 25 steps an epoch


class Listener(Observer):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.epochs: list[int] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self.epochs.append(row["epoch"])


def settings(*sets: str) -> Settings:
    return gather(flags=FLAGS, sets=[*SETS, *sets])


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listener]:
    path, listener = tmp_path_factory.mktemp("warned") / "run", Listener()
    run_training(settings(), path, listener)
    return path, listener


def test_it_warns_once_with_the_evidence(warned: tuple[Path, Listener]) -> None:
    path, listener = warned
    assert listener.epochs == [1, 2, 3, 4]
    (warning,) = [text for text in listener.warnings if "learns nothing" in text]
    assert "--arch res110" in warning
    assert "--on-stuck stop" in warning
    (event,) = events(path, "stuck")
    assert (event["epoch"], event["epochs_at_chance"], event["stopped"]) == (3, 2, False)
    assert event["first_to_last_gradient"] < 1e-3
    assert event["train_loss"] > event["chance_loss"] - event["chance_loss_noise"]
    assert event["train_error_pct"] > event["chance_error_pct"] - event["chance_error_noise_pct"]
    assert (event["layers"]["first"][0], event["layers"]["last"][-1]) == ("conv1.weight", "linear.weight")


def test_its_gradients_explode_first_and_vanish_then(warned: tuple[Path, Listener]) -> None:
    gradients = read_run(warned[0]).gradients
    first = gradients.rows[0]
    assert (first.step, first.epoch) == (1, 1)
    assert first.norms[0] > 1e3 * first.norms[-1]
    late = [row for row in gradients.rows if row.epoch > 1]
    assert sum(row.norms[0] < 1e-3 * row.norms[-1] for row in late) > len(late) / 2


def test_asked_to_stop_it_stops_saved_and_goes_on_as_the_same_run(
    warned: tuple[Path, Listener], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the epoch in which it is found: what was counted so far is part of the state. The disk refuses
    the last save once: it says that it is saved only when it is."""
    path = tmp_path / "run"
    run_training(settings("train.max_steps=60", "train.on_stuck=stop"), path)
    assert not events(path, "stuck")
    save, refused = checkpoints.save, []

    def once_refused(folder: Path, saved: checkpoints.Checkpoint, **kept: int | None) -> Path:
        if saved.step == 75 and not refused:
            refused.append(saved.step)
            raise DiskError("the disk is full")
        return save(folder, saved, **kept)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save", once_refused)
    with pytest.raises(Stuck, match=r"learns nothing.*saved at epoch 3.*--on-stuck warn") as raised:
        resume_training(path, settings("train.on_stuck=stop"))
    monkeypatch.undo()
    assert refused
    assert raised.value.exit_code is ExitCode.DIVERGED
    assert checkpoints.checkpoint_folders(path / "checkpoints")[0].name == "step-00000075"
    (event,) = events(path, "stuck")
    (other,) = events(warned[0], "stuck")
    assert event["stopped"]
    assert {**event, "stopped": False, "time": ""} == {**other, "time": ""}
    listener = Listener()
    resume_training(path, settings(), listener)
    assert not [text for text in listener.warnings if "learns nothing" in text]  # it was said
    assert_same_run(path, warned[0])
