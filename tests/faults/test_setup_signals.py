"""A signal before the first step: nothing is left of a run that took none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem.lifecycle.preflight
from lowmem.core.errors import ExitCode, Interrupted
from lowmem.train.signals import StartupSignals, StopSignals
from tests.faults.processes import SMALL, Forked, wait_for
from tests.tiny import make_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes with fork")


def _in_preflight(tmp_path: Path) -> Callable[[], None]:
    """In the child: the last of the trial outputs does not end."""

    def held(run: object) -> None:
        (tmp_path / "begun").touch()
        wait_for(tmp_path / "never")

    return lambda: setattr(lowmem.lifecycle.preflight, "_try_report", held)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_nothing_stays_of_a_run_that_is_set_up(name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "t/x/y"
    child = Forked(tmp_path / "log", ["train", *SMALL, "--out", str(out), *more], _in_preflight(tmp_path))
    wait_for(tmp_path / "begun")
    assert (out / ".preflight").is_dir()
    child.signal(getattr(signal, name))
    assert child.wait() == (ExitCode.INTERRUPTED if name == "SIGINT" else ExitCode.TERMINATED)
    *phases, last = child.said.splitlines()
    assert last == f"lowmem: {name}: stopped, there was nothing to save"
    assert phases[-1] == "writing every output and reading it back"
    assert "Traceback" not in child.said
    assert not (tmp_path / "t").exists()


def test_nothing_stays_of_a_fork(tmp_path: Path) -> None:
    source = make_run(tmp_path / "source")
    files = sorted(source.rglob("*"))
    command = ["fork", str(source), "--at", "1", "--set", "train.epochs=4", "--out", str(tmp_path / "new")]
    child = Forked(tmp_path / "log", command, _in_preflight(tmp_path))
    wait_for(tmp_path / "begun")
    child.signal(signal.SIGTERM)
    assert child.wait() == ExitCode.TERMINATED, child.said
    assert "SIGTERM" in child.said
    assert not (tmp_path / "new").exists()
    assert sorted(source.rglob("*")) == files


def test_handlers_come_back_and_an_ignored_hang_up_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    term = signal.getsignal(signal.SIGTERM)
    try:
        with StartupSignals():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted) as raised, StartupSignals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.exit_code == ExitCode.TERMINATED
        assert signal.getsignal(signal.SIGTERM) == term
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_between_two_handlers_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    install, installed = signal.signal, []

    def interrupted(number: int, handler: Any) -> Any:
        found = install(number, handler)
        installed.append(number)
        if len(installed) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(Interrupted), StartupSignals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def _saved_and_left() -> None:
    with StartupSignals():
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)  # while the run's files are closed
        raise Interrupted("saved", signals.exit_code)


def test_after_training_a_signal_changes_nothing() -> None:
    with StartupSignals():
        with StopSignals():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="saved") as raised:
        _saved_and_left()
    assert raised.value.exit_code == ExitCode.TERMINATED


def _signalled_while_another_thread_trained() -> None:
    def train() -> None:
        with StopSignals():
            pass

    with StartupSignals():
        other = threading.Thread(target=train)
        other.start()
        other.join()
        os.kill(os.getpid(), signal.SIGTERM)


def test_training_elsewhere_in_the_process_changes_nothing() -> None:
    with pytest.raises(Interrupted, match="nothing to save"):
        _signalled_while_another_thread_trained()


def _cleans_up(done: Path) -> None:
    with StartupSignals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            done.touch()


def test_several_signals_at_once_do_not_cut_the_cleaning_up_off(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _cleans_up(tmp_path / "cleaned")
    assert (tmp_path / "cleaned").exists()
