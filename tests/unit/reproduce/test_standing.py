"""How far a run is, from its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
from lowmem.lifecycle.api import run_training
from lowmem.reproduce.job import Job
from lowmem.reproduce.members import Member
from lowmem.reproduce.progress import epoch_seconds, standing_of
from lowmem.runs.rows import EpochRow
from lowmem.train.observer import Observer

RES20, CNN20 = Member("res20", "res20", "basic"), Member("cnn20", "cnn20", "basic")
SMALL = (
    "model.width=2", "data.source=shapes", "data.train_subset=40", "data.test_subset=20", "train.batch=20",
    "train.epochs=2", "train.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """res20 is stopped after three of its four steps."""
    job = Job(tmp_path_factory.mktemp("job"), gather(sets=SMALL))
    run_training(job.settings_of(RES20).replace({"train.max_steps": 3}, "test"), job.path / "res20", Observer())
    return job


def test_a_run_that_is_not_there(job: Job) -> None:
    standing = standing_of(job, CNN20)
    assert (standing.state, standing.begun, standing.left, standing.epochs) == ("to begin", False, True, 2)


def test_a_run_that_was_begun(job: Job) -> None:
    standing = standing_of(job, RES20)
    assert (standing.state, standing.epochs_done, standing.step) == ("to go on", 1, 3)
    assert standing.epoch_seconds is not None
    assert standing.epoch_seconds > 0
    assert standing.size_bytes > 100_000


def test_a_run_that_was_to_stop_there(job: Job) -> None:
    assert standing_of(job, RES20, max_steps=3).state == "stopped"
    assert not standing_of(job, RES20, max_steps=3).left
    assert standing_of(job, RES20, max_steps=4).state == "to go on"


def test_a_damaged_run_is_tried_all_the_same(job: Job, tmp_path: Path) -> None:
    copy = Job(tmp_path, job.settings)
    shutil.copytree(job.path / "res20", tmp_path / "res20")
    for manifest in (tmp_path / "res20").rglob("manifest.json"):
        manifest.unlink()
    standing = standing_of(copy, RES20)
    assert (standing.state, standing.begun, standing.left) == ("damaged", True, True)


def test_a_folder_left_before_the_first_checkpoint(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "res20"
    folder.mkdir()
    for name in ("run.lock", "config.yaml"):
        (folder / name).touch()
    assert standing_of(Job(tmp_path, job.settings), RES20).state == "to begin"


@pytest.mark.parametrize("name", ["precious.txt", "res20"])
def test_something_else_in_its_place(job: Job, tmp_path: Path, name: str) -> None:
    if name == "res20":
        (tmp_path / "res20").write_text("a file")
    else:
        (tmp_path / "res20").mkdir()
        (tmp_path / "res20" / name).touch()
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        standing_of(Job(tmp_path, job.settings), RES20)


def rows(*elapsed: float | None, first: int = 1) -> list[EpochRow]:
    return [EpochRow(epoch=n, step=n, elapsed_seconds=seconds) for n, seconds in enumerate(elapsed, start=first)]


def test_seconds_of_an_epoch() -> None:
    assert epoch_seconds([]) is None
    assert epoch_seconds(rows(8.0)) == 8.0
    assert epoch_seconds(rows(8.0, 13.0)) == 5.0
    # An epoch in which the machine did something else does not count for much, and what is long ago not at all.
    assert epoch_seconds(rows(100, 200, 205, 210, 260, 265, 270)) == 5.0
    assert epoch_seconds(rows(30.0, first=4)) is None  # of a fork, or after a resume
    assert epoch_seconds(rows(None, 5.0)) is None
