"""Signals while there is nothing to save: before the first step, a signal ends the process by way of everything that
cleans up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowmem.core.errors import ExitCode, Interrupted
from lowmem.train.signals import NAMES, BeforeTraining


class _Leave(BaseException):
    """No Exception: nothing that makes the best of a failure may take a signal for one."""


@contextmanager
def leaving_early() -> Iterator[None]:
    """Raises Interrupted (code 130 after Ctrl-C, else 143) on a signal; a second Ctrl-C ends the process on the spot.
    What catches signals itself inside of this, like training, comes first. After training a signal changes nothing any
    more: the process is leaving, with what training ended with; a second one of a kind ends it.

    Outside the main thread Python cannot catch signals; there it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {}

    def leave(number: int) -> None:
        for one in previous:  # several of them may be sent at once, and must not cut the cleaning up off
            signal.signal(one, signal.SIG_DFL if one == signal.SIGINT else signal.SIG_IGN)
        raise _Leave(signal.Signals(number).name)

    for name in NAMES:
        number = getattr(signal, name, None)
        # Under nohup a hang-up is ignored, and stays so.
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.getsignal(number)
    handler = BeforeTraining(leave)
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    except _Leave as left:
        code = ExitCode.INTERRUPTED if str(left) == "SIGINT" else ExitCode.TERMINATED
        raise Interrupted(f"{left}: stopped, there was nothing to save", code) from None
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
