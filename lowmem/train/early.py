"""Signals while there is nothing to save: before the first step, a signal ends the process by way of everything that
cleans up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lowmem.errors import ExitCode, Interrupted

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # what this system has of them


class _Leave(BaseException):
    """No Exception: nothing that makes the best of a failure may take a signal for one."""


@contextmanager
def leaving_early() -> Iterator[None]:
    """Raises Interrupted (code 130 after Ctrl-C, else 143) on a signal; the second one ends the process on the spot.
    What catches signals itself inside of this, like training, comes first.

    Outside the main thread Python cannot catch signals; there it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {}

    def leave(number: int, frame: FrameType | None) -> None:
        for one in previous:
            signal.signal(one, signal.SIG_DFL)
        raise _Leave(signal.Signals(number).name)

    for name in _NAMES:
        number = getattr(signal, name, None)
        # Under nohup a hang-up is ignored, and stays so.
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.getsignal(number)
    try:
        for number in previous:
            signal.signal(number, leave)
        yield
    except _Leave as left:
        code = ExitCode.INTERRUPTED if str(left) == "SIGINT" else ExitCode.TERMINATED
        raise Interrupted(f"{left}: stopped, there was nothing to save", code) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
