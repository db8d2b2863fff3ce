"""Entry point: `lowmem COMMAND`. Errors become one line and the exit code of `lowmem.core.errors`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import typer
from typer.main import get_command

from lowmem.cli.commands import app
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, PeerError, PeerLost, UsageError
from lowmem.core.reading import shorten
from lowmem.distributed.launch import is_led, leave, linger, report_failure

# Before a process leaves that is not the one to speak: torchrun ends the others as soon as it sees one gone.
_AFTER_OTHERS_SECONDS = 5.0
_AFTER_SIGNAL_SECONDS = 1.0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command and leaves with its code. A traceback is only shown for a bug (code 1)."""
    # A Windows console may be in an old code page: a character it lacks must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = _run(arguments)
    except Exception:
        traceback.print_exc()
        code = ExitCode.BUG
    leave(code)


def _run(arguments: list[str] | None) -> int:
    command = get_command(app)
    try:
        code = command.main(args=arguments, prog_name="lowmem", standalone_mode=False)
        return int(code or ExitCode.DONE)
    except LowmemError as error:
        return _lowmem_error(error)
    except typer.Exit as leaving:
        return leaving.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted before anything was to be saved", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left (`| head`); nobody is there to be told.
        sys.stderr.close()
        return ExitCode.BUG
    except Exception as error:
        # The usage errors of the library under typer: unknown options, missing arguments.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if is_led():
                linger(_AFTER_OTHERS_SECONDS)
                return ExitCode.USAGE
            return _fail(f"{error.format_message()} (see `{_path(error)} --help`)", ExitCode.USAGE)
        report_failure(error)
        raise


def _lowmem_error(error: LowmemError) -> int:
    """Of several processes of a run, one says what all of them met; one that failed by itself says which it is."""
    if is_led() and isinstance(error, PeerError | UsageError):  # all were typed alike
        signalled = error.exit_code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
        linger(_AFTER_SIGNAL_SECONDS if signalled else _AFTER_OTHERS_SECONDS)
        return int(error.exit_code)
    if not isinstance(error, Interrupted | PeerLost):  # nobody's failure, or another's
        report_failure(error.with_traceback(None))  # the message is all a user needs
    who = f"process {os.environ['RANK']}: " if is_led() else ""
    code = _fail(f"{who}{error}", error.exit_code)
    if isinstance(error, PeerLost) and not error.dismissed:
        linger(_AFTER_OTHERS_SECONDS)
    return code


def _path(error: object) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "lowmem"


def _fail(message: str, code: int) -> int:
    # A message may quote a file that somebody else made: no control characters, and an end.
    one_line = shorten(message, 4000)
    print(f"lowmem: {one_line}", file=sys.stderr)
    return int(code)
