"""`lowmem reproduce` on the command line: what is printed of the job's time, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli.main import _run
from lowmem.cli.terminal import describe_epoch
from lowmem.config.settings import gather
from lowmem.reproduce.check import times_left
from lowmem.reproduce.job import Job, select
from lowmem.reproduce.progress import JobObserver, Standing
from lowmem.train.observer import Progress
from tests.tiny import Heard


@pytest.fixture
def job(tmp_path: Path) -> Job:
    weights = {"res20": 1.0, "cnn20": 1.0, "res56": 3.0, "cnn56": 3.0, "res110": 6.0, "cnn110": 6.0}
    return Job(tmp_path / "job", gather(flags={"train.epochs": 10}), "abc", weights)


def standings(job: Job, **known: dict[str, Any]) -> list[Standing]:
    """Of the six runs, to begin but for what is `known`."""
    found: list[Standing] = []
    for member in select(None, None):
        values: dict[str, Any] = {"state": "to begin", "epochs": 10, **known.get(member.name, {})}
        values["weight"] = job.weights[member.name]
        found.append(Standing(member=member, path=job.path / member.name, **values))
    return found


def progress(epoch: int, step: int, seconds_left: float | None) -> Progress:
    return Progress(epoch, 10, step, 100, 0.1, None, None, None, None, seconds_left)


def row(epoch: int, elapsed: float) -> dict[str, Any]:
    return {
        "epoch": epoch, "step": epoch * 100, "lr": 0.1, "train_loss": 1.0, "train_error_pct": 50.0,
        "test_error_pct": 50.0, "elapsed_seconds": elapsed,
    }  # fmt: skip


def last(heard: Heard) -> str:
    """The line of the last epoch."""
    return describe_epoch(heard.rows[-1], 10)


def test_the_first_run_tells_of_all(job: Job) -> None:
    heard = Heard()
    told = JobObserver(heard, standings(job), 0)
    told.progress(progress(1, 10, None))
    assert heard.progresses[-1].job == "run 1 of 6"
    told.progress(progress(1, 50, 95.0))  # 10 s an epoch, by its own clock
    assert heard.progresses[-1].job == "run 1 of 6, about 33:15 left in all"  # 95 s and 100 * (1 + 3 + 3 + 6 + 6)
    told.epoch(row(1, 12.0), 10)
    assert last(heard).startswith("epoch 1/10")
    assert last(heard).endswith("run 1 of 6, about 39:48 left in all")  # 9 * 12 and 10 * 12 * 19
    told.epoch(row(2, 22.0), 10)
    assert last(heard).endswith("run 1 of 6, about 33:00 left in all")  # 8 * 10 and 10 * 10 * 19


def test_what_is_finished_counts_no_more_and_tells_of_the_rest(job: Job) -> None:
    done = {"state": "finished", "epochs_done": 10, "epoch_seconds": 10.0}
    heard = Heard()
    told = JobObserver(heard, standings(job, res20=done, cnn20=done), 2)
    told.progress(progress(1, 50, 285.0))
    assert heard.progresses[-1].job == "run 3 of 6, about 29:45 left in all"  # 285 and 300 of cnn56 and 2 * 600


def test_after_a_resume_it_is_neither_negative_nor_of_the_whole_run(job: Job) -> None:
    """FACTS: "ETA negative after resume" (Lightning #13493)."""
    half = {"state": "to go on", "epochs_done": 9, "step": 950, "epoch_seconds": 10.0}
    heard = Heard()
    told = JobObserver(heard, standings(job, res20=half)[:1], 0)
    told.progress(progress(10, 60, None))
    assert heard.progresses[-1].job == "run 1 of 1, about 0:04 left in all"
    told.progress(progress(10, 100, 1.5))
    assert heard.progresses[-1].job == "run 1 of 1, about 0:02 left in all"
    told.epoch(row(10, 130.0), 10)
    assert last(heard).endswith("run 1 of 1, about 0:00 left in all")


def test_another_machine_than_before(job: Job) -> None:
    """What this process measures goes before what an earlier one did."""
    slow = {"state": "to go on", "epochs_done": 4, "epoch_seconds": 100.0}
    heard = Heard()
    told = JobObserver(heard, standings(job, res20=slow)[:2], 0)
    told.epoch(row(5, 450.0), 10)
    told.epoch(row(6, 452.0), 10)
    assert last(heard).endswith("run 1 of 2, about 0:28 left in all")  # 4 * 2 and 10 * 2


def test_runs_that_are_left_out_tell_of_the_rest(job: Job) -> None:
    runs = standings(job)[4:5]  # res110
    done = [replace(standings(job)[3], state="finished", epoch_seconds=10.0)]  # cnn56
    lines, in_all = times_left(runs, done)
    assert "about 3:20" in lines[1]
    assert in_all == "about 3:20"
    heard = Heard()
    JobObserver(heard, runs, 0, done).progress(progress(1, 0, None))
    assert heard.progresses[-1].job == "run 1 of 1, about 3:20 left in all"


def test_the_table_before_the_first_run(job: Job) -> None:
    done = {"state": "finished", "epochs_done": 10, "epoch_seconds": 60.0, "size_bytes": 5 << 20}
    begun = {"state": "to go on", "epochs_done": 4, "epoch_seconds": 60.0}
    lines, in_all = times_left(
        [replace(run, disk_bytes=5 << 20) for run in standings(job, res20=done, cnn20=begun)[:3]]
    )
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "res20 finished 10/10 5 MiB",
        "cnn20 to go on 4/10 about 6:00 at most 5 MiB",
        "res56 to begin 0/10 about 30:00 at most 5 MiB",
    ]
    assert in_all == "about 36:00"
    assert times_left(standings(job))[1] == "known after the first epoch"


def test_refusals_are_one_line_and_leave_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, words in (
        (("--only", "res21"), "the job has no run 'res21'"),
        (("--set", "model.arch=res20"), "leave it out, and choose among them with --only"),
        (("--block", "wide"), "there are no 'wide' blocks"),
        (("--epochs", "0"), "train.epochs"),
    ):
        assert _run(["reproduce", "--out", str(tmp_path / "job"), *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.strip().splitlines()) == 1
        assert list(tmp_path.iterdir()) == []


def test_a_jobs_folder_is_no_run(capsys: pytest.CaptureFixture[str], job: Job) -> None:
    job.path.mkdir()
    job.write()
    assert _run(["resume", str(job.path)]) == 2
    assert f"go on with `lowmem reproduce --out {job.path}`" in capsys.readouterr().err
