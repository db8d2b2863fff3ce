"""`--notify COMMAND`: a command of the user's at the end of a run, told by environment variables how that ended. It is
no setting and is written nowhere, so that a run folder, whoever made it, runs nothing that was not typed for this call.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.interrupts import NOTHING_TO_SAVE
from lowmem.cli.terminal import say
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, PreflightError, UsageError, first_line
from lowmem.core.reading import shorten
from lowmem.distributed.launch import is_led
from lowmem.isolate import kill_session
from lowmem.runs.view import RunView, errors_of

if TYPE_CHECKING:
    from lowmem.train.loop import Outcome

_LIMIT_SECONDS, _LOOK_SECONDS = 60.0, 0.1


@contextmanager
def notifying(command: str | None, run: Path) -> Iterator[Callable[[Outcome], None]]:
    """Runs `command` (None: none) when the block is left, however: by an error, which goes on, or after the outcome was
    handed over. `run`: the folder, if no outcome says another. Nothing of it changes how lowmem ends; of several
    processes rank 0 does it."""
    ended: list[Outcome] = []
    if command is None or is_led():
        yield ended.append
        return
    try:
        yield ended.append
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # as the command will turn it into
            error = Interrupted(NOTHING_TO_SAVE, ExitCode.INTERRUPTED)
        how = "interrupted" if isinstance(error, Interrupted) else "failed"
        best = {} if isinstance(error, UsageError | PreflightError) else _best(run)  # of another run, if of any
        _notify(command, run, how, getattr(error, "exit_code", ExitCode.BUG), first_line(error), best)
        raise
    for outcome in ended:
        how = "done" if outcome.finished else "stopped"
        _notify(command, outcome.path, how, ExitCode.DONE, outcome.words, _best(outcome.path))


def _best(run: Path) -> dict[str, object]:
    with suppress(LowmemError, OSError):
        view = RunView(run)
        return errors_of(view.epochs, view.events)
    return {}


def _notify(command: str, run: Path, how: str, code: int, message: str, best: dict[str, object]) -> None:
    """Its output goes where lowmem's goes. What goes wrong with it is a warning."""
    told = {
        "RUN": os.path.abspath(run),
        "OUTCOME": how,
        "EXIT_CODE": int(code),
        "MESSAGE": _plain(message),
        "BEST_ERROR": best.get("best_error_pct"),  # in per cent
        "BEST_EPOCH": best.get("best_epoch"),
    }
    variables = {f"LOWMEM_{name}": "" if value is None else str(value) for name, value in told.items()}
    sys.stdout.flush()
    try:
        with _interrupts() as came:
            # A session of its own: Ctrl-C is for lowmem, which ends it and what it has started.
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, env={**os.environ, **variables}, start_new_session=True
            )
            wrong = _wait(process, came)
    except (OSError, ValueError) as error:
        wrong = f"could not be started ({error})"
    if wrong:
        say(f"warning: the command of --notify {wrong}; the run is what was said of it", "stderr")


def _plain(message: str, *, windows: bool = os.name == "nt") -> str:
    """It may quote what a stranger wrote: one line; and none of the characters by which Windows' shell would run more,
    which reads a line again once the variables are in it."""
    line = shorten(message, 4000)
    return re.sub(r'[&|<>^%!"]', "?", line) if windows else line


def _wait(process: subprocess.Popen[bytes], came: list[int]) -> str:
    """What was wrong with it."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not came and time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(_LOOK_SECONDS)
            return f"left with code {code}" if code else ""
    kill_session(process)
    process.wait()
    return "was interrupted" if came else f"took longer than {_LIMIT_SECONDS:.0f} s and was ended"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Those that come, in place of a KeyboardInterrupt, which may come between any two lines."""
    came: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield came  # it is ignored, under nohup, or never comes here
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous)
