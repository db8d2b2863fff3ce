"""Rows that a disk refuses: none lost, none doubled, in order."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem.core.errors import DiskError
from lowmem.runs import atomic
from lowmem.runs.atomic import RowFile
from lowmem.runs.rows import EPOCH_TABLE
from lowmem.runs.store import RunFolder
from tests.faults.disk import FailingDisk


class Refusing:
    """A file whose disk takes `room` more bytes, and nothing at all in `fsync`, if that is to fail."""

    def __init__(self, file: Any, code: int, room: int) -> None:
        self._file, self._code, self.room = file, code, room

    def write(self, data: memoryview) -> int:
        if self.room <= 0:
            raise OSError(self._code, os.strerror(self._code))
        written = self._file.write(data[: self.room])
        self.room -= written
        return int(written)

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _opener(kind: type[Refusing], code: int, room: int) -> Callable[..., Refusing]:
    def opened(*args: Any, **kwargs: Any) -> Refusing:
        return kind(open(*args, **kwargs), code, room)

    return opened


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("room", [0, 1, 5, 6, 7, 11])
def test_a_write_that_stops_anywhere_leaves_whole_lines(
    code: int, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = RowFile(tmp_path / "rows.csv")
    rows.append(["before"])
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "open", _opener(Refusing, code, room), raising=False)
        with pytest.raises(OSError, match=os.strerror(code)):
            rows.append(["first", "second"])
        assert rows.path.read_text() == "before\n"
        with pytest.raises(OSError, match=os.strerror(code)):
            rows.append(["third"])
    assert len(rows.waiting) == 3
    rows.append(["fourth"])
    assert rows.path.read_text().split() == ["before", "first", "second", "third", "fourth"]
    assert len(rows.waiting) == 0


@pytest.mark.parametrize("cut_back", [True, False])
def test_what_could_not_be_synced_is_written_again_once(
    cut_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = RowFile(tmp_path / "rows.csv")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Stuck(Refusing):
        truncate = fail  # not even cutting back what was written

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        if not cut_back:
            patch.setattr(atomic, "open", _opener(Stuck, errno.EIO, 1 << 20), raising=False)
        for line in ("first", "second"):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                rows.append([line])
    assert (rows.path.read_text() == "") is cut_back
    rows.append()
    assert rows.path.read_text() == "first\nsecond\n"
    rows.append()
    assert rows.path.read_text() == "first\nsecond\n"


def test_half_a_line_of_a_dead_process_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("whole\nha")
    RowFile(tmp_path / "events.jsonl").append(["next"])
    assert (tmp_path / "events.jsonl").read_text() == "whole\nnext\n"
    (tmp_path / "half").write_text("ha")
    RowFile(tmp_path / "half").append(["next"])
    assert (tmp_path / "half").read_text() == "next\n"


def test_a_run_folder_keeps_its_rows_and_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**dict.fromkeys(EPOCH_TABLE.names), "epoch": 1, "step": 4}
    step = {"step": 4, "epoch": 1, "lr": 0.1, "loss": 2.3}
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        run.append_steps([step])

        def fail(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("lowmem.runs.atomic.append_lines", fail)
            patch.setattr("lowmem.runs.atomic.replacing", fail)
            run.event("replan", budget_bytes=1)
            run.update_plan({"budget_bytes": 1})
            run.append_steps([{**step, "step": 5}])
            run.append_metrics(row)
            assert run.rows_waiting == 3
            with pytest.raises(DiskError, match=r"the disk is full: .*metrics\.csv could not be written"):
                run.flush()
            assert not (run.path / "plan.json").exists()
        run.flush()
        assert run.rows_waiting == 0
        assert [line.split(",")[0] for line in run.steps_file.read_text().splitlines()] == ["step", "4", "5"]
        assert len(run.metrics_file.read_text().splitlines()) == 2
        assert '"replan"' in run.events_file.read_text()
        assert '"budget_bytes": 1' in (run.path / "plan.json").read_text()
        run.cut_back(epoch=0, step=0)
        with monkeypatch.context() as patch:
            patch.setattr("lowmem.runs.atomic.os.fsync", fail)
            run.append_steps([{**step, "step": 1}])  # to the file that took the place of the one before
        run.append_steps([{**step, "step": 2}])
        assert [line.split(",")[0] for line in run.steps_file.read_text().splitlines()] == ["step", "1", "2"]
        with monkeypatch.context() as patch:
            patch.setattr("lowmem.runs.atomic.os.fsync", fail)
            run.append_steps([{**step, "step": 3}])
        run.cut_back(epoch=0, step=1)  # going back drops what waits, too
        run.append_steps([{**step, "step": 2}])
        assert [line.split(",")[0] for line in run.steps_file.read_text().splitlines()] == ["step", "1", "2"]


def test_a_name_that_is_not_yet_durable_is_refused_and_the_rows_come_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was just made is there after a power cut only once its folder is synced."""
    rows = RowFile(tmp_path / "rows.csv")
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch)
        disk.refuses = lambda count: disk.operations[-1][0] == "fsync" and len(disk.operations) == 3
        with pytest.raises(OSError, match=os.strerror(disk.code)):
            rows.append(["first"])
        assert [kind for kind, _ in disk.operations] == ["write", "fsync", "fsync"]
    assert len(rows.waiting) == 1
    rows.append(["second"])
    assert rows.path.read_text() == "first\nsecond\n"
