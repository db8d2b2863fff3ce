"""The plain 110-layer net at its smallest, which learns nothing: found by the third epoch, in a real run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.config.settings import Settings
from lowmem.core.errors import DiskError, ExitCode, Stuck
from lowmem.lifecycle import resume_training, run_training
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.view import read_run
from tests.conftest import assert_same_run
from tests.faults.injection import events
from tests.tiny import Heard, tiny


def settings(*sets: str) -> Settings:
    """25 steps an epoch."""
    return tiny(
        "model.arch=cnn110", "data.train_subset=200", "data.test_subset=10", "train.batch=8", "train.epochs=4",
        "train.log_every_steps=5", *sets,
    )  # fmt: skip


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Heard]:
    path, heard = tmp_path_factory.mktemp("warned") / "run", Heard()
    run_training(settings(), path, heard)
    return path, heard


def test_it_warns_once_with_the_evidence(warned: tuple[Path, Heard]) -> None:
    path, heard = warned
    assert [row["epoch"] for row in heard.rows] == [1, 2, 3, 4]
    (warning,) = [text for text in heard.warnings if "learns nothing" in text]
    assert "--arch res110" in warning
    assert "--on-stuck stop" in warning
    (event,) = events(path, "stuck")
    assert (event["epoch"], event["epochs_at_chance"], event["stopped"]) == (3, 2, False)
    assert event["first_to_last_gradient"] < 1e-3
    assert event["train_loss"] > event["chance_loss"] - event["chance_loss_noise"]
    assert event["train_error_pct"] > event["chance_error_pct"] - event["chance_error_noise_pct"]
    assert (event["layers"]["first"][0], event["layers"]["last"][-1]) == ("conv1.weight", "linear.weight")


def test_its_gradients_explode_first_and_vanish_then(warned: tuple[Path, Heard]) -> None:
    gradients = read_run(warned[0]).gradients
    first = gradients.rows[0]
    assert (first.step, first.epoch) == (1, 1)
    assert first.norms[0] > 1e3 * first.norms[-1]
    late = [row for row in gradients.rows if row.epoch > 1]
    assert sum(row.norms[0] < 1e-3 * row.norms[-1] for row in late) > len(late) / 2


@pytest.mark.slow
def test_asked_to_stop_it_stops_saved_and_goes_on_as_the_same_run(
    warned: tuple[Path, Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    heard = Heard()
    resume_training(path, settings(), heard)
    assert not [text for text in heard.warnings if "learns nothing" in text]  # it was said
    assert_same_run(path, warned[0])
