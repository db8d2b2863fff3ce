"""What is there, as a screen of lines or as JSON: runs, a verified run, a report, the doctor's findings. No torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem.cli.terminal import aligned, printable
from lowmem.config.schema import Config
from lowmem.core.errors import ExitCode
from lowmem.core.units import format_size
from lowmem.runs.view import RunSummary, list_runs

if TYPE_CHECKING:
    from lowmem.doctor import Facts, Finding
    from lowmem.lifecycle.verify import Verified
    from lowmem.report import ReportResult

_LIST_HEADER = ("run", "state", "epoch", "last error", "best error", "on disk", "fork --at")
_MOST_SHOWN = 6  # checkpoints; all of them are in --json
_STATUS_STYLES = {"ok": "green", "note": "cyan", "warning": "bold yellow", "fail": "bold red"}
_STATUS_COLUMNS = max(map(len, _STATUS_STYLES))


# -- lowmem ls ---------------------------------------------------------------------------------------------------------


def show_ls(folder: Path, as_json: bool) -> None:
    """Prints the runs in `folder`, a line each. Raises UsageError if it does not exist."""
    runs = list_runs(folder)
    if as_json:
        print(json.dumps([run.to_json() for run in runs], indent=1))
        return
    if not runs:
        print(f"there are no runs in {printable(str(folder))}: start one with `lowmem train`")
        return
    print("\n".join(aligned([_LIST_HEADER, *(_cells(run, folder) for run in runs)], right={2, 3, 4, 5})))
    for run in runs:
        for words in run.trouble:
            print(f"{printable(_name(run, folder))}: {printable(words)}")


def _cells(run: RunSummary, folder: Path) -> tuple[str, ...]:
    epochs = run.config.train.epochs if run.config else "?"
    state = run.state if run.writer is None else f"{run.state} ({run.writer})"
    best = "" if run.best_error_pct is None else f"{_percent(run.best_error_pct)} (epoch {run.best_epoch})"
    # The newest, as `fork --at` takes them. The one before the first step is nothing to fork from.
    places = [kept.at for kept in run.checkpoints if kept.step > 0]
    more = [f"{len(places) - _MOST_SHOWN} more"] if len(places) > _MOST_SHOWN else []
    return (
        printable(_name(run, folder)),
        printable(state),
        f"{'?' if run.epoch is None else run.epoch}/{epochs}",
        _percent(run.last_error_pct),
        best,
        format_size(run.size_bytes),
        ", ".join(more + places[-_MOST_SHOWN:]),
    )


def _name(run: RunSummary, folder: Path) -> str:
    return run.path.name or str(run.path) if run.path == folder else str(run.path.relative_to(folder))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


# -- lowmem verify -----------------------------------------------------------------------------------------------------


def show_verify(run: Path, as_json: bool) -> ExitCode:
    """Looks, prints a line a finding. CHECKPOINT if the run cannot be resumed, DONE otherwise."""
    from lowmem.lifecycle.verify import verify

    verified = verify(run)
    if as_json:
        print(verified.to_json())
    else:
        width = max(len(finding.where) for finding in verified.findings)
        for finding in verified.findings:
            print(printable(f"{finding.status:8} {finding.where:{width}}  {finding.what}"))
        print(printable(_outcome(verified)))
    return ExitCode.DONE if verified.can_resume else ExitCode.CHECKPOINT


def _outcome(verified: Verified) -> str:
    if not verified.can_resume:
        return f"{verified.run} cannot be resumed: {verified.obstacle}"
    assert verified.epoch is not None
    if verified.finished:
        return f"{verified.run} is finished: all {verified.epoch} epochs are in {verified.resumes_from}"
    return (
        f"{verified.run} can be resumed exactly, from {verified.resumes_from}: epoch {verified.epoch + 1}, "
        f"step {verified.step_in_epoch} of it"
    )


# -- lowmem doctor -----------------------------------------------------------------------------------------------------


def show_doctor(config: Config, out: Path | None, as_json: bool) -> ExitCode:
    """Gathers, examines, prints one screen. PREFLIGHT if training cannot start, DONE otherwise."""
    from lowmem import doctor

    facts = doctor.gather(config, out)
    findings = doctor.examine(facts)
    can_start = doctor.can_start(findings)
    if as_json:
        print(json.dumps({"can_start": can_start, "findings": [one.to_json() for one in findings]}, indent=1))
    elif sys.stdout.isatty():
        _print_findings(findings, summary(facts, findings))
    else:
        print("\n".join([*finding_lines(findings), summary(facts, findings)]))
    return ExitCode.DONE if can_start else ExitCode.PREFLIGHT


def summary(facts: Facts, findings: list[Finding]) -> str:
    """The last line: whether training can start, where, and how much there is to mend."""

    def count(status: str, what: str) -> str:
        number = sum(finding.status == status for finding in findings)
        return f"{number} {what}{'s' * (number != 1)}" if number else ""

    warned = f", with {warnings}" if (warnings := count("warning", "warning")) else ""
    if failures := count("fail", "failure"):
        return f"training cannot start: {failures}{warned}"
    device = (facts.execution or {}).get("device")
    where = {"cpu": " on the CPU", "cuda": " on the card"}.get(device or "", "")
    return f"training can start{where}{warned}"


def finding_lines(findings: list[Finding]) -> list[str]:
    """Plain text: a line a finding, its mend on a line of its own."""
    width = max((len(finding.name) for finding in findings), default=0)
    shown = []
    for finding in findings:
        shown.append(f"{finding.status:{_STATUS_COLUMNS}}  {finding.name:{width}}  {finding.finding}")
        if finding.mend is not None:
            shown.append(f"{'':{_STATUS_COLUMNS}}  {'':{width}}  > {finding.mend}")
    return shown


def _print_findings(findings: list[Finding], last: str) -> None:
    console = Console(highlight=False)
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=_STATUS_COLUMNS)
        row.add_column(width=width)
        row.add_column()
        row.add_row(Text(finding.status, style=_STATUS_STYLES[finding.status]), finding.name, Text(finding.finding))
        console.print(row)
        if finding.mend is not None:
            # Not wrapped by us: a command must be copied in one piece.
            indent = " " * (_STATUS_COLUMNS + width + 4)
            console.print(Text(f"{indent}> {finding.mend}", style="bold"), soft_wrap=True)
    console.print(Text(last, style="bold"))


# -- lowmem report -----------------------------------------------------------------------------------------------------


def show_report(result: ReportResult) -> None:
    """The report's tables, and where the rest is."""
    console = Console(highlight=False)
    for written in result.tables:
        table = Table(*written.header)
        for column in table.columns[:2]:
            column.overflow = "fold"  # a name that is cut off names no run
        for cells in written.rows:
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    print("against the published setting:")
    for runs, differs in result.departures:
        console.print(Text(f"{runs}: {differs}"))
    page = "" if result.page is None else f", and all of it in {result.page}"
    print(printable(f"written: {result.markdown} and {len(result.figures)} figures beside it{page}"))
    if result.event_files is not None:
        print(f"curves for TensorBoard: tensorboard --logdir {result.event_files}")
