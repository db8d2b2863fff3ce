"""`lowmem reproduce` in a terminal: the process that conducts the job. No torch before the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, UsageError
from lowmem.reproduce.conduct import Asked, JobStopped, ask, command, conduct, interrupted, to_report
from lowmem.reproduce.folder import held
from lowmem.reproduce.members import select
from lowmem.reproduce.process import Conductor


def reproduce_job(out: Path, settings: Settings, only: str | None, block: str | None, dry_run: bool) -> int:
    """Does it and returns the exit code. Raises LowmemError."""
    members = select(only, block)
    with held(out) as lock:
        stopped: JobStopped | None = None
        with Conductor() as conductor:
            asked = ask(out, settings, members, command(out, members))
            if lock.taken_over is not None:
                say(f"{out} is taken over from {lock.taken_over}, which ended without leaving it")
            try:
                code = conduct(asked, conductor, say, dry_run=dry_run)
            except JobStopped as error:
                stopped, code = error, error.exit_code
        # From here on signals end the process: the report is written again in seconds.
        if conductor.requested is not None:
            raise stopped or interrupted(conductor, "stopped before the report", asked)
        if not dry_run and (stopped is not None or code == 0):
            _report_or_say(asked, stopped)
        if stopped is not None:
            raise stopped
        return code


def _report_or_say(asked: Asked, stopped: JobStopped | None) -> None:
    """Of what is there. Raises Interrupted; LowmemError unless the job itself has stopped, which says more."""
    try:
        _report(asked)
    except KeyboardInterrupt:
        where = "stopped in the report, all runs are saved"
        raise Interrupted(f"SIGINT: {where}; go on with `{asked.again}`", ExitCode.INTERRUPTED) from None
    except LowmemError as error:
        if stopped is None:
            raise
        say(f"there is no report: {error}")


def _report(asked: Asked) -> None:
    runs, left_out = to_report(asked.job.path)
    folder = asked.job.path / "report"
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, which no job of lowmem has: put what it leads to in its place")
    for words in left_out:
        say(f"not in the report: {words}")
    if runs:
        from lowmem.cli.show import show_report
        from lowmem.report import write_report

        show_report(write_report(runs, folder, html=True))


def say(text: str) -> None:
    """To whoever reads; a process that trains must not end because nobody does any more."""
    with suppress(OSError):
        print(text, flush=True)


def table(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Lines of aligned cells; `right`: columns that are aligned at their end."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
