"""Signals: the first asks the run to save and leave, a second Ctrl-C leaves at once.

A system that shuts down sends SIGTERM and SIGHUP together, and a shell that ends may send SIGHUP twice: nobody insists
there. SIGTERM insists when it comes again some seconds later, SIGHUP never.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from lowmem.core.errors import ExitCode, Interrupted

# SIGHUP: the terminal was closed. SIGBREAK: Ctrl-Break on Windows. Only what this system has.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
# Seconds after which the same signal once more means at once.
_INSISTS_AFTER = {"SIGINT": 0.0, "SIGBREAK": 0.0, "SIGTERM": 2.0}


class _Leave(BaseException):
    """No Exception: nothing that makes the best of a failure may take a signal for one."""


class StartupSignals:
    """Context manager around all that a run does. While there is nothing to save, a signal leaves by way of everything
    that cleans up, and raises Interrupted; a second Ctrl-C ends the process on the spot. What catches signals itself
    inside of this, like training, comes first. After training a signal changes nothing any more, for the process is
    leaving with what training ended with; a second one of its kind ends it. Outside the main thread Python cannot catch
    signals; there it does nothing."""

    def __init__(self) -> None:
        self.trained = False  # whether a `StopSignals` took over: a step may have been taken
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StartupSignals:
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
            before = {number: signal.getsignal(number) for number in numbers}
            # Under nohup a hang-up is ignored, and stays so.
            self._previous = {key: each for key, each in before.items() if each not in (signal.SIG_IGN, None)}
            try:
                for number in self._previous:
                    signal.signal(number, self._handle)
            except _Leave as leaving:  # one came before the last was caught: nobody calls `__exit__` then
                self.__exit__(_Leave, leaving, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if isinstance(error, _Leave):
            code = ExitCode.INTERRUPTED if str(error) == "SIGINT" else ExitCode.TERMINATED
            raise Interrupted(f"{error}: stopped, there was nothing to save", code) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.trained:
            signal.signal(number, signal.SIG_DFL)
            return
        for each in self._previous:  # several of them may be sent at once, and must not cut the cleaning up off
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)
        raise _Leave(signal.Signals(number).name)


class StopSignals:
    """Context manager that catches the signals, in the main thread; `requested` is the first one's name, or None."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._first: dict[str, float] = {}  # when each came first
        self._previous: dict[int, Any] = {}

    def came(self) -> bool:
        """Whether a signal has come: somebody waits for this process to leave."""
        return self.requested is not None

    @property
    def exit_code(self) -> ExitCode:
        """130 after Ctrl-C, 143 after any other signal."""
        return ExitCode.INTERRUPTED if self.requested == "SIGINT" else ExitCode.TERMINATED

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)
                # Under nohup a hang-up is ignored, and stays so.
                ignored = name == "SIGHUP" and number is not None and signal.getsignal(number) == signal.SIG_IGN
                if number is not None and not ignored:
                    previous = self._previous[number] = signal.signal(number, self._handle)
                    if isinstance(startup := getattr(previous, "__self__", None), StartupSignals):
                        startup.trained = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _insists(self, name: str) -> bool:
        """Whether this signal, which has come now, is the second that means at once."""
        now, first = time.monotonic(), self._first.get(name)
        self._first.setdefault(name, now)
        return first is not None and now - first >= _INSISTS_AFTER.get(name, math.inf)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._insists(name):
            # At once means without unwinding: a checkpoint being written is not committed, the one before it stands.
            try:
                sys.stderr.write("\nstopped at once; the last checkpoint stands\n")
                sys.stderr.flush()
            finally:
                os._exit(self.exit_code)
        self.requested = self.requested or name
