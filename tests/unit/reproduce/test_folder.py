"""The folder of a job: whose it is, and that nothing stays of one in which nothing was begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.core.errors import UsageError
from lowmem.reproduce.folder import begun, held


def test_nothing_stays_where_nothing_was_begun(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "job"
    with held(out):
        (out / "job.json").write_text("{}")
        assert (out / "job.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with held(tmp_path):
        pass
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_begun_job_stays(tmp_path: Path) -> None:
    out = tmp_path / "job"
    with held(out):
        (out / "job.json").write_text("{}")
        (out / "res20").mkdir()
        assert not begun(out)  # an empty folder is no run
        (out / "res20" / "metrics.csv").write_text("epoch\n1\n")
        assert begun(out)
    assert (out / "job.json").exists()
    assert not (out / "job.owner.json").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "job"
    with held(out), pytest.raises(UsageError, match="is being written by process"), held(out):
        pass


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", "res20"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"is not the folder of a job.*--out"), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("mine")
    with pytest.raises(UsageError, match="is a file"), held(tmp_path / "job"):
        pass


def test_what_a_killed_one_left_is_taken_over(tmp_path: Path) -> None:
    for name in ("job.lock", "job.json.partial"):
        (tmp_path / name).touch()
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
