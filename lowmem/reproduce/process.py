"""A run in a process of its own, and how the one that waits for it hands on what it is asked to do.

The process reads its request, one line of JSON, from the pipe that is its standard input. Each byte after that asks it
to stop, as Ctrl-C does: the first saves and leaves, the second leaves at once. The end of the pipe means that whoever
conducts the job is gone, by whatever death: then it saves and leaves, too. So nothing depends on signals between
processes, which Windows has not, and no run is trained on without its job.

The process is in a group of its own, or a Ctrl-C in the terminal would reach it twice. What stops and continues a
job of the shell (Ctrl-Z, `fg`) is handed on for that reason.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from lowmem.core.errors import ExitCode
from lowmem.core.reading import RECORD_LIMIT_BYTES, parse_json
from lowmem.train.signals import Insistence

COMMAND = "reproduce-run"
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SLICE_SECONDS = 0.2  # on Windows a wait without end cannot be interrupted by Ctrl-C


class Conductor:
    """Starts one process after the other; a context manager that catches the signals meanwhile. `requested` is the name
    of the first one, or None."""

    def __init__(self, start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen) -> None:
        self.requested: str | None = None
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0
        self._insistence = Insistence()
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> ExitCode:
        """130 after Ctrl-C, 143 after any other signal."""
        return ExitCode.INTERRUPTED if self.requested == "SIGINT" else ExitCode.TERMINATED

    def run(self, request: Mapping[str, Any]) -> int:
        """The exit code of a process that does what is requested; of a killed one minus the signal's number."""
        command = [sys.executable, "-m", "lowmem", COMMAND]
        apart: dict[str, Any] = {"process_group": 0} if os.name != "nt" else {"creationflags": _new_group()}
        with self._start(command, stdin=subprocess.PIPE, **apart) as process:
            assert process.stdin is not None
            with suppress(OSError):  # it is gone already: its code says how
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            # In this order: a signal may come between any two of these lines, and twice asked means at once.
            self._asked = 0
            self._process = process
            if self.requested is not None and not self._asked:  # in the meantime
                self._ask()
            try:
                return self._wait(process)
            finally:
                self._process = None

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_SLICE_SECONDS if os.name == "nt" else None)

    def _ask(self) -> None:
        """Asks the process to stop; a third time it is not asked any more."""
        process = self._process
        if process is None or process.stdin is None:
            return
        self._asked += 1
        if self._asked > 2:
            process.kill()
        with suppress(OSError, ValueError):
            os.write(process.stdin.fileno(), b"!")

    # -- signals -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Conductor:
        for name in _NAMES:
            number = getattr(signal, name, None)
            # Under nohup a hang-up is ignored, and stays so.
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._stop)
        if hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        if hasattr(signal, "SIGBREAK"):  # reaches every process of the console by itself
            self._previous[signal.SIGBREAK] = signal.signal(signal.SIGBREAK, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first = self.requested is None
        self._note(number, frame)
        if self._insistence.insists(signal.Signals(number).name) or first:
            self._ask()

    def _pause(self, number: int, frame: FrameType | None) -> None:
        process = self._process
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # goes on from here when the shell continues it
        signal.signal(signal.SIGTSTP, self._pause)
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGCONT)


def _new_group() -> int:
    return int(getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))


# -- in the process --------------------------------------------------------------------------------------------------


def read_request() -> dict[str, Any]:
    """The request on standard input; from then on whoever conducts the job is listened to. Raises ValueError."""
    pipe = os.dup(sys.stdin.fileno())
    with open(os.devnull, "rb") as nothing:  # what this process starts must not read of the pipe
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    if hasattr(signal, "SIGTTOU"):  # a terminal with `tostop` would stop a process of another group that writes to it
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(pipe, 1)
        if not byte or len(line) > RECORD_LIMIT_BYTES:
            raise ValueError("there is no request on standard input")
        line += byte
    request = parse_json(bytes(line))
    if not isinstance(request, dict):
        raise ValueError("the request on standard input is none")
    threading.Thread(target=_listen, args=(pipe,), name="lowmem-conductor", daemon=True).start()
    return request


def _listen(pipe: int) -> None:
    while True:
        try:
            byte = os.read(pipe, 1)
        except OSError:
            byte = b""
        _interrupt()
        if not byte:
            return


def _interrupt() -> None:
    """Ctrl-C, from within. To the main thread, so that what it waits for in the system ends, too."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()
