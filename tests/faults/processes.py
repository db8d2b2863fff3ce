"""The real command in a process of its own, forked from this one: it need not import the libraries again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401

import lowmem.api
import lowmem.cli.show  # noqa: F401
from lowmem.cli.main import _run

SMALL = (
    "--arch", "res20", "--width", "4", "--data", "shapes", "--epochs", "3", "--batch", "32",
    "--set", "data.train_subset=192", "--set", "data.test_subset=32", "--set", "train.log_every_steps=1",
)  # fmt: skip


class Forked:
    """`lowmem ARGUMENTS` in a child. `before` is run in it first. Not on Windows."""

    def __init__(self, log: Path, arguments: list[str], before: Callable[[], object] = lambda: None) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            self._child(arguments, before)

    def _child(self, arguments: list[str], before: Callable[[], object]) -> NoReturn:
        code = 99
        try:
            with open(self.log, "w", encoding="utf-8", buffering=1) as file:
                sys.stdout = sys.stderr = file
                before()
                code = _run(arguments)
        finally:
            os._exit(code)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; of a killed process minus the signal's number."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def insist(self, number: int) -> int:
        """The exit code after a first signal and a second. Sent until it leaves: two that are not taken yet are one."""
        while True:
            self.signal(number)
            time.sleep(0.1)
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


def train(run: Path, log: Path, *more: str, before: Callable[[], object] = lambda: None) -> Forked:
    return Forked(log, ["train", *SMALL, "--out", str(run), *more], before)


def resume(run: Path, log: Path) -> Forked:
    return Forked(log, ["resume", str(run)])


def wait_for(path: Path) -> None:
    """Until `path` is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.005)
