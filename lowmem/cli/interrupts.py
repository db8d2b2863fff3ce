"""Ctrl-C while libraries are imported. Nothing imported here takes time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NOTHING_TO_SAVE = "interrupted before anything was to be saved"
_INTERRUPTED = 130  # core.errors is not imported yet


@contextmanager
def leaves_at_once(before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Until its end, or until `interruptible`, the first Ctrl-C ends the process on the spot, with a line: in an import
    a KeyboardInterrupt may come out as any exception, or be swallowed by a callback. `before`: puts the terminal in
    order. Where Ctrl-C is ignored, or in another thread, it does nothing."""

    def leave(number: int, frame: FrameType | None) -> None:
        try:
            with suppress(Exception):
                before()
            with suppress(Exception):
                print(f"lowmem: {NOTHING_TO_SAVE}", file=sys.stderr, flush=True)
        finally:
            os._exit(_INTERRUPTED)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again: there is something to clean up."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)
