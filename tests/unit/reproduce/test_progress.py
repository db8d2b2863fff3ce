"""How far a run is, from its folder, and the time left of a job, from what was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowmem.core.errors import UsageError
from lowmem.lifecycle import run_training
from lowmem.reproduce.job import Job, Member
from lowmem.reproduce.progress import Standing, seconds_left, seconds_left_of, standing_of
from lowmem.train.observer import Observer
from tests.tiny import tiny

RES20, CNN20 = Member("res20", "res20", "basic"), Member("cnn20", "cnn20", "basic")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """res20 is stopped after three of its four steps."""
    job = Job(tmp_path_factory.mktemp("job"), tiny("data.train_subset=40", "train.epochs=2"))
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
    with pytest.raises(UsageError, match=r"is a file|exists and is not an empty folder"):
        standing_of(Job(tmp_path, job.settings), RES20)


# -- the time left -----------------------------------------------------------------------------------------------------


def pace(weight: float, epochs_left: float, epoch_seconds: float | None = None) -> Standing:
    done = {"epochs_done": 10 - epochs_left, "epoch_seconds": epoch_seconds}
    return Standing(RES20, Path("res20"), "to go on", 10, weight=weight, **done)  # type: ignore[arg-type]


def test_nothing_is_known_before_something_was_measured() -> None:
    assert seconds_left([pace(1.0, 10), pace(3.0, 10)]) is None
    assert seconds_left_of(pace(1.0, 10), []) is None


def test_a_measured_run_counts_as_measured() -> None:
    assert seconds_left([pace(1.0, 10, 7.0), pace(3.0, 2, 20.0)]) == 70 + 40


def test_others_are_scaled_from_the_nearest() -> None:
    small, large = pace(1.0, 0, 10.0), pace(6.0, 0, 90.0)
    assert seconds_left_of(pace(1.2, 5), [small, large]) == 5 * 12.0
    assert seconds_left_of(pace(5.0, 5), [small, large]) == 5 * 75.0
    # What is finished takes no time, and still tells of the others.
    assert seconds_left([small, large, pace(3.0, 2)]) == 2 * 45.0


def test_nothing_is_left_and_nothing_is_negative() -> None:
    assert seconds_left([pace(1.0, 0), pace(2.0, 0, 5.0)]) == 0
    assert seconds_left([pace(1.0, -1, 5.0)]) == 0
