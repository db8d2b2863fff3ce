"""What is new in a file that is being written, and noticing when what was read no longer holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowmem.runs.atomic import append_lines, write_text_atomic
from lowmem.runs.follow import Follower, News, TableFollower, parse_row
from lowmem.runs.table import cut


def test_only_whole_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    follower = Follower(path)
    assert follower.look() == News()
    path.write_bytes(b"a\nb\nhal")
    assert follower.look() == News(("a", "b"))
    assert not follower.look()
    with path.open("ab") as file:
        file.write(b"f\r\n")
    assert follower.look() == News(("half",))
    append_lines(path, ["c", "d"])
    assert follower.look() == News(("c", "d"))


def test_cut_back_and_grown_past_it_again(tmp_path: Path) -> None:
    """A resume replaces the table; that it is longer than before by the next look must not hide it."""
    path = tmp_path / "rows"
    append_lines(path, ["1", "2", "3"])
    follower = Follower(path)
    follower.look()
    write_text_atomic(path, "1\n")
    append_lines(path, ["2", "9", "10", "11"])
    assert follower.look() == News(("1", "2", "9", "10", "11"), anew=True)
    assert not follower.look()
    write_text_atomic(path, "")
    assert follower.look() == News((), anew=True)
    append_lines(path, ["1"])
    assert follower.look() == News(("1",))


def test_rewritten_in_place(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"aaaa\nbbbb\n")
    follower = Follower(path)
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
    append_lines(path, ["1"])
    follower = Follower(path)
    follower.look()
    path.unlink()
    assert not follower.look()
    append_lines(path, ["2"])
    assert follower.look() == News(("2",), anew=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_does_not_hold_it_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    assert not Follower(tmp_path / "rows").look()


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    table = TableFollower(path)
    append_lines(path, ["step,epoch,lr,loss"])
    assert not table.look()
    append_lines(path, ["1,1,0.1,", "2,1,x,3", "3,1", "4,1,0.1,nan"])
    rows = table.look().rows
    assert rows[0] == {"step": 1.0, "epoch": 1.0, "lr": 0.1, "loss": None}
    assert [row["step"] for row in rows] == [1.0, 4.0]
    cut(path, ("step", "epoch", "lr", "loss"), "step", 1)
    again = table.look()
    assert again.anew
    assert [row["step"] for row in again.rows] == [1.0]
    assert table.columns == ("step", "epoch", "lr", "loss")


def test_rows_that_are_none() -> None:
    assert parse_row(("a", "b"), "1") is None
    assert parse_row(("a", "b"), "1,word") is None
    assert parse_row(("a", "b"), "1,inf") == {"a": 1.0, "b": float("inf")}
