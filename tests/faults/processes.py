"""The real command in a process of its own, forked from this one: it need not import the libraries again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

import lowmem.cli.show
import lowmem.cli.terminal
import lowmem.lifecycle.execute
import lowmem.reproduce.check
import lowmem.reproduce.conduct
from lowmem.cli.main import _run
from tests.tiny import arguments

# Six steps an epoch.
SMALL = arguments("model.width=4", "train.batch=32", "data.train_subset=192", "data.test_subset=32")


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
        except BaseException:
            traceback.print_exc()
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


class ForkedProcess:
    """What `lowmem.reproduce.conduct.Conductor` needs of a `subprocess.Popen`, of a process that is forked."""

    def __init__(self, command: list[str], **options: object) -> None:
        assert command[1:3] == ["-m", "lowmem"]
        assert set(options) == {"stdin", "process_group"}
        reads, writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writes)
            os.setpgid(0, 0)
            self._child(reads, command[3:])
        os.close(reads)
        self.stdin = os.fdopen(writes, "wb")
        self.returncode: int | None = None

    def _child(self, reads: int, arguments: list[str]) -> NoReturn:
        code = 99
        try:
            # Handlers are inherited by a fork, not by a new program.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(reads, 0)
            sys.stdin = os.fdopen(0, closefd=False)
            code = _run(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> ForkedProcess:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.stdin.close()
        self.wait()


class Served:
    """`lowmem reproduce` in a process of its own, forked like those it starts from one that has only imported: where a
    backward pass over meta tensors was run (any plan does), autograd's threads are in the way of a fork."""

    _context = None

    def __init__(self, log: Path, arguments: list[str]) -> None:
        if Served._context is None:
            Served._context = multiprocessing.get_context("forkserver")
            Served._context.set_forkserver_preload([__name__])
        self.log = log
        self._process = Served._context.Process(target=_serve, args=(log, arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; of a killed process minus the signal's number."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


def _serve(log: Path, arguments: list[str]) -> NoReturn:
    os.setpgid(0, 0)  # a group that nobody above it waits for (tests in the background) would not stop by SIGTSTP
    torch.set_num_threads(1)
    lowmem.reproduce.conduct.Popen = ForkedProcess  # type: ignore[assignment,misc]
    code = 99
    try:
        with open(log, "w", encoding="utf-8", buffering=1) as file:
            sys.stdout = sys.stderr = file
            code = _run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def reproduce(out: Path, log: Path, *arguments: str) -> Served:
    return Served(log, ["reproduce", "--out", str(out), *arguments])
