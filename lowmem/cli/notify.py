"""`--notify COMMAND`: a command of the user's at the end of a run, told by environment variables how that ended. It is
no setting and is written nowhere, so that a run folder, whoever made it, runs nothing that was not typed for this call.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.interrupts import NOTHING_TO_SAVE
from lowmem.cli.terminal import say
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, PreflightError, UsageError, first_line
from lowmem.core.reading import shorten
from lowmem.distributed.launch import is_led
from lowmem.runs.view import RunView, errors_of

if TYPE_CHECKING:
    from lowmem.train.loop import Outcome

_LIMIT_SECONDS = 60.0


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
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        code = (
            ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", ExitCode.BUG)
        )
        message = first_line(error) if isinstance(error, Exception) else NOTHING_TO_SAVE
        begun = isinstance(error, LowmemError) and not isinstance(error, UsageError | PreflightError)
        best = _best(run) if begun else {}  # else it is that of another run, if of any
        _notify(command, run, "interrupted" if interrupted else "failed", code, message, best)
        raise
    for outcome in ended:
        how = "done" if outcome.finished else "stopped"
        _notify(command, outcome.path, how, ExitCode.DONE, outcome.words, _best(outcome.path))


def _best(run: Path) -> dict[str, object]:
    with suppress(LowmemError, OSError):
        return errors_of(RunView(run).epochs)
    return {}


def _notify(command: str, run: Path, how: str, code: int, message: str, best: dict[str, object]) -> None:
    """Its output goes where lowmem's goes. What goes wrong with it is a warning."""
    told = {
        "RUN": os.path.abspath(run),
        "OUTCOME": how,
        "EXIT_CODE": int(code),
        "MESSAGE": shorten(message, 4000),
        "BEST_ERROR": best.get("best_error_pct"),  # in per cent
        "BEST_EPOCH": best.get("best_epoch"),
    }
    variables = {f"LOWMEM_{name}": "" if value is None else str(value) for name, value in told.items()}
    wrong = None
    sys.stdout.flush()
    try:
        # A session of its own: Ctrl-C is for lowmem, and what it started is ended with it. Windows has none of this.
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            if (left := process.wait(_LIMIT_SECONDS)) != 0:
                wrong = f"left with code {left}"
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            wrong = f"took longer than {_LIMIT_SECONDS:.0f} s and was ended" if late else "was interrupted"
            _end(process)
    except (OSError, ValueError) as error:
        wrong = f"could not be started ({error})"
    if wrong is not None:
        say(f"warning: the command of --notify {wrong}; the run is what was said of it", "stderr")


def _end(process: subprocess.Popen[bytes]) -> None:
    if os.name == "nt":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
