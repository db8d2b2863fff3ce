"""One writer per run: really two processes, a dead one, one on another host."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem.core.errors import UsageError
from lowmem.runs import lock as module
from lowmem.runs.lock import OWNER_NAME, RunLock, read_owner

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its second process with fork")


def _child(work: Callable[[], None]) -> tuple[int, int]:
    """Runs `work` in a process of its own, which then waits to be killed -> (pid, a pipe that ends with it)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            work()
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    return pid, reader


def _kill(pid: int, reader: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)


@forks
def test_a_second_process_is_told_who_and_since_when_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    held: list[RunLock] = []
    pid, reader = _child(lambda: held.append(RunLock(tmp_path)))
    try:
        host = socket.gethostname()
        with pytest.raises(UsageError, match=rf"being written by process {pid} on {host} since 20\d\d-.*stop it first"):
            RunLock(tmp_path)
    finally:
        _kill(pid, reader)
    lock = RunLock(tmp_path)
    assert lock.taken_over is not None
    assert lock.taken_over.pid == pid
    owner = read_owner(tmp_path / OWNER_NAME)
    assert owner is not None
    assert owner.pid == os.getpid()
    lock.release()
    assert not (tmp_path / OWNER_NAME).exists()
    lock = RunLock(tmp_path)
    assert lock.taken_over is None
    lock.release()
    lock.release()


def test_a_writer_on_another_host_is_not_taken_over(tmp_path: Path) -> None:
    owner = {"pid": 7, "host": "elsewhere", "since": "2026-11-23T10:00:00+0000", "boot": "another"}
    (tmp_path / OWNER_NAME).write_text(json.dumps(owner))
    with pytest.raises(UsageError, match=rf"process 7 on elsewhere since 2026-11-23.* delete .*{OWNER_NAME}") as caught:
        RunLock(tmp_path)
    assert "cannot be checked" in str(caught.value)
    assert json.loads((tmp_path / OWNER_NAME).read_text()) == owner
    (tmp_path / OWNER_NAME).unlink()  # what the message says
    lock = RunLock(tmp_path)
    assert lock.taken_over is None
    lock.release()


@pytest.mark.skipif(module._boot() == "", reason="the system tells no boot of its kernel")
def test_in_a_container_with_another_name_the_lock_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed there, and started again: the same kernel."""
    told = {"pid": 7, "host": "0c1f5e2a9b7d", "boot": module._boot()}
    (tmp_path / OWNER_NAME).write_text(json.dumps(told))
    lock = RunLock(tmp_path)
    assert lock.taken_over is not None
    assert lock.taken_over.host == told["host"]
    mine = read_owner(tmp_path / OWNER_NAME)
    assert mine is not None
    assert (mine.here, mine.boot) == (True, module._boot())
    lock.release()
    # A lock that everybody gets proves nothing.
    (tmp_path / OWNER_NAME).write_text(json.dumps(told))
    monkeypatch.setattr(RunLock, "_excludes", lambda lock: False)
    with pytest.raises(UsageError, match="cannot be checked"):
        RunLock(tmp_path)


@forks
def test_a_writer_in_another_container_is_alive_while_it_holds_the_lock(tmp_path: Path) -> None:
    held: list[RunLock] = []
    pid, reader = _child(lambda: held.append(RunLock(tmp_path)))
    try:
        owner = json.loads((tmp_path / OWNER_NAME).read_text())
        (tmp_path / OWNER_NAME).write_text(json.dumps({**owner, "host": "0c1f5e2a9b7d"}))
        with pytest.raises(UsageError, match=r"being written by process .* on 0c1f5e2a9b7d"):
            RunLock(tmp_path)
        assert module.writer_of(tmp_path) == f"pid {pid} on 0c1f5e2a9b7d"
    finally:
        _kill(pid, reader)
    assert module.writer_of(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"pid": 1}', '{"pid": "x", "host": "y"}', '{"pid": 1e999, "host": "y"}',
     '{"pid": 1, "host": 2}',
     "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), '{"pid": 1, "host": "' + "y" * 9000],
)  # fmt: skip
def test_an_owner_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / OWNER_NAME).write_text(text, encoding="latin-1")
    assert read_owner(tmp_path / OWNER_NAME) is None
    RunLock(tmp_path).release()


def test_a_strangers_owner_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    (tmp_path / OWNER_NAME).write_text(json.dumps({"pid": 1, "host": "a\x1b[2J\nb", "since": "s" * 500}))
    owner = read_owner(tmp_path / OWNER_NAME)
    assert owner is not None
    assert owner.host == "a?[2J b"
    assert len(owner.since) == 100


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", ["run.lock", OWNER_NAME])
def test_links_lead_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("thesis")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link"):
        RunLock(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "thesis"
