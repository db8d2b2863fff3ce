"""A fork is a new run from an old checkpoint; the old run is only read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem.api import fork_run, recorded_settings, run_training
from lowmem.errors import UsageError
from lowmem.settings import gather
from tests.conftest import assert_same_tensors

SETS = ["data.train_subset=200", "data.test_subset=50", "train.log_every_steps=1", "schedule.milestones=[164]"]


def _settings(**flags: object):  # type: ignore[no-untyped-def]
    base = {"model.arch": "res20", "model.width": 2, "data.source": "shapes", "train.batch": 50, "train.epochs": 3}
    return gather(flags={**base, **{key.replace("__", "."): value for key, value in flags.items()}}, sets=SETS)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "run"
    run_training(_settings(), path)
    return path


def _files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_fork_trains_on_from_the_checkpoint(parent: Path, tmp_path: Path) -> None:
    before = _files(parent)
    changes = recorded_settings(parent).replace({"optim.lr": 0.02}, "fork of run")
    result = fork_run(parent, at=2, changes=changes, out=tmp_path / "fork")
    assert result.outcome.finished
    rows = [(path / "metrics.csv").read_text().splitlines() for path in (parent, result.path)]
    assert rows[0][:3] == rows[1][:3]
    assert rows[1][3].split(",")[2] == "0.02"
    events = [json.loads(line)["event"] for line in (result.path / "events.jsonl").read_text().splitlines()]
    assert events[:2] == ["fork", "resume"]
    assert "lr: 0.02  # fork of run" in (result.path / "config.yaml").read_text()
    # The lock was looked at, nothing else was touched.
    assert {name: data for name, data in _files(parent).items() if "owner" not in name} == {
        name: data for name, data in before.items() if "owner" not in name
    }


def test_a_fork_that_only_asks_for_what_was_is_the_parents_continuation(parent: Path, tmp_path: Path) -> None:
    """lr 0.1 was the setting: with more epochs the third epoch is the parent's, to the last bit."""
    changes = recorded_settings(parent).replace({"train.epochs": 4}, "fork")
    result = fork_run(parent, at=2, changes=changes, out=tmp_path / "fork")
    name = "step-00000012/model.safetensors"
    assert_same_tensors(parent / "checkpoints" / name, result.path / "checkpoints" / name)


@pytest.mark.parametrize(
    ("at", "values", "message"),
    [
        (1, {"optim.lr": 0.02}, "there are epochs 2, 3"),
        (2, {}, "is a resume"),
        (2, {"model.width": 4}, "cannot become 4"),
        (3, {"optim.lr": 0.02}, "ask for more"),
    ],
)
def test_refusals(parent: Path, tmp_path: Path, at: int, values: dict[str, object], message: str) -> None:
    changes = recorded_settings(parent).replace(values, "fork")
    with pytest.raises(UsageError, match=message):
        fork_run(parent, at=at, changes=changes, out=tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_another_batch_keeps_the_place_in_the_schedule(parent: Path, tmp_path: Path) -> None:
    changes = recorded_settings(parent).replace({"train.batch": 25}, "fork")
    result = fork_run(parent, at=2, changes=changes, out=tmp_path / "fork")
    assert result.outcome.state.step == 3 * 8
