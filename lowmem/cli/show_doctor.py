"""`lowmem doctor`: one screen of findings, or JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem.config.schema import Config
from lowmem.core.errors import ExitCode
from lowmem.doctor import Facts, Finding, Status, can_start, examine, gather

_STYLES = {Status.OK: "green", Status.NOTE: "cyan", Status.WARNING: "bold yellow", Status.FAIL: "bold red"}
_STATUS_COLUMNS = max(len(status) for status in Status)


def show_doctor(config: Config, out: Path | None, as_json: bool) -> ExitCode:
    """Gathers, examines, prints. PREFLIGHT if training cannot start, DONE otherwise."""
    facts = gather(config, out)
    findings = examine(facts)
    if as_json:
        listed = [finding.to_json() for finding in findings]
        print(json.dumps({"can_start": can_start(findings), "findings": listed}, indent=1))
    else:
        _print(findings, summary(facts, findings))
    return ExitCode.DONE if can_start(findings) else ExitCode.PREFLIGHT


def summary(facts: Facts, findings: list[Finding]) -> str:
    """The last line: whether training can start, where, and how much there is to mend."""
    counts = {status: sum(finding.status == status for finding in findings) for status in Status}
    warned = f", with {_count(counts[Status.WARNING], 'warning')}" if counts[Status.WARNING] else ""
    if counts[Status.FAIL]:
        return f"training cannot start: {_count(counts[Status.FAIL], 'failure')}{warned}"
    device = (facts.execution or {}).get("device")
    where = {"cpu": " on the CPU", "cuda": " on the card"}.get(device or "", "")
    return f"training can start{where}{warned}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def lines(findings: list[Finding]) -> list[str]:
    """Plain text: a line a finding, its mend on a line of its own."""
    width = max((len(finding.name) for finding in findings), default=0)
    shown = []
    for finding in findings:
        shown.append(f"{finding.status:{_STATUS_COLUMNS}}  {finding.name:{width}}  {finding.finding}")
        if finding.mend is not None:
            shown.append(f"{'':{_STATUS_COLUMNS}}  {'':{width}}  > {finding.mend}")
    return shown


def _print(findings: list[Finding], last: str) -> None:
    if not sys.stdout.isatty():
        print("\n".join([*lines(findings), last]))
        return
    console = Console(highlight=False)
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=_STATUS_COLUMNS)
        row.add_column(width=width)
        row.add_column()
        row.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.name, Text(finding.finding))
        console.print(row)
        if finding.mend is not None:
            # Not wrapped by us: a command must be copied in one piece.
            indent = " " * (_STATUS_COLUMNS + width + 4)
            console.print(Text(f"{indent}> {finding.mend}", style="bold"), soft_wrap=True)
    console.print(Text(last, style="bold"))
