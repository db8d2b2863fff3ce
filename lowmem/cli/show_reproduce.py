"""`lowmem reproduce` in a terminal: the process that conducts the job. No torch before the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lowmem.errors import LowmemError, UsageError
from lowmem.reproduce.conduct import Asked, JobStopped, ask, command, conduct, to_report
from lowmem.reproduce.folder import held
from lowmem.reproduce.members import select
from lowmem.reproduce.process import Conductor
from lowmem.settings import Settings


def reproduce_job(out: Path, settings: Settings, only: str | None, block: str | None, dry_run: bool) -> int:
    """Does it and returns the exit code. Raises LowmemError."""
    members = select(only, block)
    with held(out) as lock, Conductor() as conductor:
        asked = ask(out, settings, members, command(out, members))
        if lock.taken_over is not None:
            say(f"{out} is taken over from {lock.taken_over}, which ended without leaving it")
        try:
            code = conduct(asked, conductor, say, dry_run=dry_run)
        except JobStopped:
            if not dry_run:
                try:
                    _report(asked)  # of what is there
                except LowmemError as error:
                    say(f"there is no report: {error}")
            raise
        if code == 0 and not dry_run:
            _report(asked)
        return code


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
