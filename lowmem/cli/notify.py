"""`--notify COMMAND`: a command of the user's at the end of a run, told by environment variables how that ended. It is
no setting and is written nowhere, so that a run folder, whoever made it, runs nothing that was not typed for this call.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.interrupts import NOTHING_TO_SAVE
from lowmem.cli.terminal import say
from lowmem.core.errors import ExitCode, Interrupted, first_line
from lowmem.core.reading import shorten
from lowmem.distributed.launch import is_led
from lowmem.isolate import kill_session

if TYPE_CHECKING:
    from lowmem.train.loop import Outcome

_LIMIT_SECONDS = 60.0


@contextmanager
def notifying(command: str | None, run: Path) -> Iterator[Callable[[Outcome], None]]:
    """Runs `command` (None: none) when the block is left, however: by an error, which goes on, or after the outcome was
    handed over. `run`: the folder, if no outcome says another. Nothing of it changes how lowmem ends; of several
    processes rank 0 does it."""
    ended: list[Outcome] = []
    try:
        yield ended.append
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # as the command will turn it into
            error = Interrupted(NOTHING_TO_SAVE, ExitCode.INTERRUPTED)
        how = "interrupted" if isinstance(error, Interrupted) else "failed"
        _notify(command, run, how, getattr(error, "exit_code", ExitCode.BUG), first_line(error))
        raise
    for outcome in ended:
        _notify(command, outcome.path, "done" if outcome.finished else "stopped", ExitCode.DONE, outcome.words)


def _notify(command: str | None, run: Path, how: str, code: int, message: str) -> None:
    """Its output goes where lowmem's goes. What goes wrong with it is a warning."""
    if command is None or is_led():
        return
    told = {
        "LOWMEM_RUN": os.path.abspath(run),
        "LOWMEM_OUTCOME": how,
        "LOWMEM_EXIT_CODE": str(int(code)),
        "LOWMEM_MESSAGE": _plain(message),
    }
    sys.stdout.flush()
    try:
        # A session of its own: Ctrl-C is for lowmem, which ends it and what it has started.
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, env={**os.environ, **told}, start_new_session=True
        )
        wrong = _wait(process)
    except (OSError, ValueError) as error:
        wrong = f"could not be started ({error})"
    if wrong:
        say(f"warning: the command of --notify {wrong}; the run is what was said of it", "stderr")


def _plain(message: str, *, windows: bool = os.name == "nt") -> str:
    """It may quote what a stranger wrote: one line; and none of the characters by which Windows' shell would run more,
    which reads a line again once the variables are in it."""
    line = shorten(message, 4000)
    return re.sub(r'[&|<>^%!"]', "?", line) if windows else line


def _wait(process: subprocess.Popen[bytes]) -> str:
    """What was wrong with it."""
    try:
        code = process.wait(_LIMIT_SECONDS)
        return f"left with code {code}" if code else ""
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        kill_session(process)
        process.wait()
        if isinstance(stopped, KeyboardInterrupt):
            return "was interrupted"
        return f"took longer than {_LIMIT_SECONDS:.0f} s and was ended"
