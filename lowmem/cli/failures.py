"""How errors end a command: a line on standard error, and the exit code."""

from __future__ import annotations

import os
import sys

from lowmem.core.errors import ExitCode, Infeasible, Interrupted, LowmemError, PeerError, PeerLost, UsageError
from lowmem.core.reading import shorten
from lowmem.distributed.launch import is_led, linger, report_failure

# Before a process leaves that is not the one to speak: torchrun ends the others as soon as it sees one gone.
_AFTER_OTHERS_SECONDS = 5.0
_AFTER_SIGNAL_SECONDS = 1.0


def tell_error(error: LowmemError) -> int:
    """Of several processes of a run, one says what all of them met; one that failed by itself says which it is."""
    if is_led() and isinstance(error, PeerError | UsageError):  # all were typed alike
        signalled = error.exit_code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
        linger(_AFTER_SIGNAL_SECONDS if signalled else _AFTER_OTHERS_SECONDS)
        return int(error.exit_code)
    if not isinstance(error, Interrupted | PeerLost):  # nobody's failure, or another's
        report_failure(error.with_traceback(None))  # the message is all a user needs
    who = f"process {os.environ['RANK']}: " if is_led() else ""
    if isinstance(error, Infeasible):
        code = fail(f"{who}{error.both_sides}", error.exit_code, then=error.way_out)
    else:
        code = fail(f"{who}{error}", error.exit_code)
    if isinstance(error, PeerLost) and not error.dismissed:
        linger(_AFTER_OTHERS_SECONDS)
    return code


def fail(message: str, code: int, then: str = "") -> int:
    # A message may quote a file that somebody else made: no control characters, and an end.
    for line in (message, then) if then else (message,):
        print(f"lowmem: {shorten(line, 4000)}", file=sys.stderr)
    return int(code)
