"""Tables cut back to a checkpoint: every row that can be had, and a word about those that cannot. And what is new in a
file that is being written, and noticing when what was read no longer holds."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable
from lowmem.runs.atomic import RowFile, write_text_atomic
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, EpochRow, StepRow, csv_line
from lowmem.runs.tables import Follower, News, TableFollower, cut_table, read_table, scan_table

COLUMNS = STEP_TABLE
NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**9), 10**9)


def _row(step: int, loss: float | int | None) -> str:
    return csv_line(COLUMNS.names, {"step": step, "epoch": 1, "lr": 0.1, "loss": loss})


def _write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_text("\n".join([COLUMNS.header, *lines]) + end)
    return path


@given(st.lists(NUMBERS, max_size=12), st.integers(0, 14))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_comes_back(tmp_path: Path, losses: list[float | None], last: int) -> None:
    lines = [_row(step, loss) for step, loss in enumerate(losses, start=1)]
    path = _write(tmp_path / "steps.csv", lines)
    taken: list[bytes] = []
    assert scan_table(path, COLUMNS, last, take=taken.append).kept == len(lines[:last])
    assert [line.decode() for line in taken] == lines[:last]
    assert cut_table(path, COLUMNS, last) is None
    assert path.read_text() == "\n".join([COLUMNS.header, *lines[:last]]) + "\n"


@given(st.binary(max_size=300), st.integers(0, 1000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_cut_or_refused_and_then_stay(tmp_path: Path, tail: bytes, last: int) -> None:
    path = _write(tmp_path / "steps.csv", [_row(1, 2.0)])
    path.write_bytes(path.read_bytes() + tail)
    cut_table(path, COLUMNS, last)
    once = path.read_bytes()
    assert cut_table(path, COLUMNS, last) is None
    assert path.read_bytes() == once
    path.write_bytes(tail)
    try:
        cut_table(path, COLUMNS, last)
    except CorruptCheckpoint:
        assert path.read_bytes() == tail


def test_one_damaged_row_costs_one_row(tmp_path: Path) -> None:
    lines = [_row(step, 2.5) for step in range(1, 9)]
    rng = random.Random(3)
    for _ in range(50):
        at = rng.randrange(7)
        damaged = [*lines[:at], lines[at].replace(",", rng.choice(";x"), 1), *lines[at + 1 :]]
        path = _write(tmp_path / "steps.csv", damaged)
        assert (cut_table(path, COLUMNS, 8) or "").startswith(f"{path}: 1 damaged lines; ")
        assert path.read_text().splitlines()[1:] == [line for n, line in enumerate(lines) if n != at]
        kept = tmp_path / "damaged-steps.csv"
        assert kept.read_text().splitlines()[1:] == damaged
        kept.unlink()


def test_the_first_damaged_copy_is_kept(tmp_path: Path) -> None:
    path = _write(tmp_path / "steps.csv", ["first"])
    cut_table(path, COLUMNS, 8)
    _write(path, ["second"])
    cut_table(path, COLUMNS, 8)
    assert (tmp_path / "damaged-steps.csv").read_text().splitlines()[1:] == ["first"]


def test_a_row_that_only_seems_to_be_later(tmp_path: Path) -> None:
    path = _write(tmp_path / "steps.csv", [_row(step, 2.5) for step in (1, 9, 3, 4)])
    rows = scan_table(path, COLUMNS, 4)
    assert (rows.kept, rows.lost, rows.beyond) == (3, 1, 0)


def test_a_table_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    assert scan_table(path, COLUMNS, 4).kept == 0
    assert scan_table(path, EPOCH_TABLE, 4).missing == 4
    path.write_text("step,epoch,l")  # cut off while it was made
    assert cut_table(path, COLUMNS, 4) is None
    path.write_text("step,epoch,lr\n1,1,1\n")
    with pytest.raises(CorruptCheckpoint, match="other columns"):
        cut_table(path, COLUMNS, 4)


def test_rows_of_an_older_version_get_the_columns_that_came_since(tmp_path: Path) -> None:
    path, names = tmp_path / "metrics.csv", EPOCH_TABLE.names[:14]
    rows = [{"epoch": epoch, "step": 3 * epoch, "train_loss": 0.1, "val_error_pct": 7.5} for epoch in (1, 2, 3)]
    older = "\n".join([",".join(names), *(csv_line(names, row) for row in rows)]) + "\n"
    path.write_text(older)
    scan = scan_table(path, EPOCH_TABLE, 3)
    assert (scan.kept, scan.damage, path.read_text()) == (3, None, older), "who looks changes nothing"
    assert cut_table(path, EPOCH_TABLE, 2) is None
    now = "\n".join([EPOCH_TABLE.header, *(csv_line(EPOCH_TABLE.names, row) for row in rows[:2])]) + "\n"
    assert path.read_text() == now
    assert read_table(path, EPOCH_TABLE, [])[1] == tuple(EpochRow(**row) for row in rows[:2])  # type: ignore[arg-type]
    # A damaged row costs that row, and no other header is taken for an older one.
    path.write_text(older.replace("2,6,", "2,x,"))
    assert "1 damaged lines" in (cut_table(path, EPOCH_TABLE, 3) or "")
    assert [row.epoch for row in read_table(path, EPOCH_TABLE, [])[1]] == [1, 3]
    path.write_text(",".join(EPOCH_TABLE.names[:13]) + "\n")
    with pytest.raises(CorruptCheckpoint, match="other columns"):
        cut_table(path, EPOCH_TABLE, 2)


def test_a_table_of_any_size_is_cut_without_holding_it(tmp_path: Path) -> None:
    """The rows after the 200th are a hole of NULs as large as the limit of what is read whole."""
    path = _write(tmp_path / "steps.csv", [_row(step, 2.5) for step in range(1, 301)])
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.truncate(TABLE_LIMIT_BYTES + (1 << 20))
    tracemalloc.start()
    assert cut_table(path, COLUMNS, 200) is None
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(path.read_text().splitlines()) == 201
    assert path.stat().st_size < size
    assert peak_bytes < 8 << 20


def test_a_line_that_is_no_line_costs_one_line_and_no_time(tmp_path: Path) -> None:
    for text in ("9" * 100_000, "x" * (3 << 20), "1," * 200_000):
        path = _write(tmp_path / "steps.csv", [_row(1, 2.5), text, _row(3, 2.5)])
        assert (scan_table(path, COLUMNS, 4).kept, scan_table(path, COLUMNS, 4).lost) == (2, 1)


def test_many_digits_before_a_bad_field_take_no_time() -> None:
    """With 30 ways to match each field this took hours."""
    digits = "1" * 30
    for columns in (EPOCH_TABLE, GRADIENT_TABLE.of_layers([f"layer{n}" for n in range(1200)])):
        fields = ["1", "1", *[digits] * (len(columns.names) - 3), "x"]
        with pytest.raises(Unreadable, match=r"is '[1x]+', which is no number"):
            columns.read_row(",".join(fields))


def test_what_is_cut_off_needs_no_room(tmp_path: Path) -> None:
    """On a full disk a run can still go on from its checkpoint."""
    path = _write(tmp_path / "steps.csv", [_row(step, 2.5) for step in range(1, 9)])
    (tmp_path / "steps.csv.partial").mkdir()  # nothing can be written beside it
    assert cut_table(path, COLUMNS, 4) is None
    assert len(path.read_text().splitlines()) == 5


# -- while it grows ----------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> Follower[str]:
    return Follower(path, lambda lines, from_the_beginning: lines)


def test_only_whole_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    follower = lines_of(path)
    assert follower.look() == News()
    path.write_bytes(b"a\nb\nhal")
    assert follower.look() == News(("a", "b"))
    assert not follower.look()
    with path.open("ab") as file:
        file.write(b"f\r\n")
    assert follower.look() == News(("half",))
    RowFile(path).append(["c", "d"])
    assert follower.look() == News(("c", "d"))


def test_cut_back_and_grown_past_it_again(tmp_path: Path) -> None:
    """A resume replaces the table; that it is longer than before by the next look must not hide it."""
    path = tmp_path / "rows"
    RowFile(path).append(["1", "2", "3"])
    follower = lines_of(path)
    follower.look()
    write_text_atomic(path, "1\n")
    RowFile(path).append(["2", "9", "10", "11"])
    assert follower.look() == News(("1", "2", "9", "10", "11"), anew=True)
    assert not follower.look()
    write_text_atomic(path, "")
    assert follower.look() == News((), anew=True)
    RowFile(path).append(["1"])
    assert follower.look() == News(("1",))


def test_rewritten_in_place(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"aaaa\nbbbb\n")
    follower = lines_of(path)
    follower.look()
    inode = path.stat().st_ino
    with path.open("r+b") as file:
        file.write(b"aaaa\ncccc\ndddd\n")
    assert path.stat().st_ino == inode
    assert follower.look() == News(("aaaa", "cccc", "dddd"), anew=True)
    os.truncate(path, 5)
    assert follower.look() == News(("aaaa",), anew=True)


def test_vanishing_is_no_news(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    RowFile(path).append(["1"])
    follower = lines_of(path)
    follower.look()
    path.unlink()
    assert not follower.look()
    RowFile(path).append(["2"])
    assert follower.look() == News(("2",), anew=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_does_not_hold_it_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    assert not lines_of(tmp_path / "rows").look()


def test_rows_come_as_they_are_written_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    table = TableFollower(path, STEP_TABLE)
    RowFile(path).append([COLUMNS.header])
    assert not table.look()
    RowFile(path).append(["1,1,0.1,", "2,1,x,3", "3,1", "4,1,0.1,nan"])
    rows = table.look().items
    assert rows[0] == StepRow(step=1, epoch=1, lr=0.1)
    assert [row.step for row in rows] == [1, 4]
    cut_table(path, COLUMNS, 1)
    assert table.look() == News((rows[0],), anew=True)
    write_text_atomic(path, "what,is,this\n1,2,3\n")
    assert table.look() == News((), anew=True)
    assert table.table is None
