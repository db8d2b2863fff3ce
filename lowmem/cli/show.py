"""What is there, as a screen of lines or as JSON: runs, a verified run, a report, the doctor's findings; and what would
be planned. No torch but for that."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lowmem.cli.layout import fold, room, table
from lowmem.cli.terminal import observer, printable
from lowmem.config.cards import load_card
from lowmem.config.processes import cards_of
from lowmem.config.schema import Config
from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, Infeasible, PreflightError, UsageError
from lowmem.core.units import aligned, counted, format_size
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.folder import refuse_unwritable
from lowmem.runs.view import list_runs, recorded_settings

if TYPE_CHECKING:
    from lowmem.choose.request import Choice
    from lowmem.doctor import Facts, Finding
    from lowmem.plan.solver import Points
    from lowmem.report import ReportResult

_LIST_HEADER = ("run", "state", "epoch", "last error", "best error", "on disk", "fork --at")
_MOST_SHOWN = 6  # checkpoints; all of them are in --json
_STATUS_STYLES = {"ok": "green", "note": "cyan", "warning": "bold yellow", "fail": "bold red"}
_STATUS_COLUMNS = 7


def show_ls(folder: Path, as_json: bool) -> None:
    """Prints the runs in `folder`, a line each. Raises UsageError if it does not exist."""
    runs = list_runs(folder)
    if as_json:
        print(json.dumps([run.to_json() for run in runs], indent=1))
        return
    if not runs:
        print(f"there are no runs in {printable(str(folder))}: start one with `lowmem train`")
        return
    rows, trouble = [_LIST_HEADER], []
    for run in runs:
        name = run.path.name or str(run.path) if run.path == folder else str(run.path.relative_to(folder))
        state = run.state if run.writer is None else f"{run.state} ({run.writer})"
        epochs = f"{'?' if run.epoch is None else run.epoch}/{run.config.train.epochs if run.config else '?'}"
        last = "" if run.last_error_pct is None else f"{run.last_error_pct:.2f} %"
        best = "" if run.best_error_pct is None else f"{run.best_error_pct:.2f} % (epoch {run.best_epoch})"
        # The newest, as `fork --at` takes them. The one before the first step is nothing to fork from.
        places = [kept.at for kept in run.checkpoints if kept.step > 0]
        more = [f"{len(places) - _MOST_SHOWN} more"] if len(places) > _MOST_SHOWN else []
        size, places = format_size(run.size_bytes), more + places[-_MOST_SHOWN:]
        rows.append((name, state, epochs, last, best, size, ", ".join(places)))
        trouble += [f"{name}: {words}" for words in run.trouble]
    shown, columns = [tuple(map(printable, row)) for row in rows], room()
    print("\n".join(table(shown, {2, 3, 4, 5}, columns) + fold(list(map(printable, trouble)), columns)))


def show_verify(run: Path, as_json: bool) -> ExitCode:
    """Looks, prints a line a finding. CHECKPOINT if the run cannot be resumed, DONE otherwise."""
    recorded_settings(run)  # refused before torch is loaded
    with observer("stderr") as shown:
        with shown.loading("torch"):
            from lowmem.lifecycle.verify import verify
        verified = verify(run, shown.phase)
    if as_json:
        print(verified.to_json())
        return ExitCode.DONE if verified.can_resume else ExitCode.CHECKPOINT
    epoch, newest = verified.epoch or 0, verified.resumes_from
    if not verified.can_resume:
        outcome = f"cannot be resumed: {verified.obstacle}"
    elif verified.finished:
        outcome = f"is finished: its {counted(epoch, 'epoch')} {'is' if epoch == 1 else 'are'} in {newest}"
    else:
        outcome = f"can be resumed exactly, from {newest}: epoch {epoch + 1}, step {verified.step_in_epoch} of it"
    lines = aligned([(f"{one.status:{_STATUS_COLUMNS}}", one.where, one.what) for one in verified.findings])
    print("\n".join(fold([*map(printable, lines), printable(f"{verified.run} {outcome}")], room())))
    return ExitCode.DONE if verified.can_resume else ExitCode.CHECKPOINT


def show_doctor(config: Config, out: Path | None, as_json: bool) -> ExitCode:
    """Gathers, examines, prints one screen. PREFLIGHT if training cannot start, DONE otherwise."""
    from lowmem import doctor

    with observer("stderr") as shown:
        shown.phase("looking at torch, the card, the disk and the data")
        facts = doctor.gather(config, out)
    findings = doctor.examine(facts)
    can_start = doctor.can_start(findings)
    if as_json:
        print(json.dumps({"can_start": can_start, "findings": [vars(one) for one in findings]}, indent=1))
    elif sys.stdout.isatty():
        _print_findings(findings, summary(facts, findings))
    else:
        print("\n".join(fold([*finding_lines(findings), summary(facts, findings)], room())))
    return ExitCode.DONE if can_start else ExitCode.PREFLIGHT


def summary(facts: Facts, findings: list[Finding]) -> str:
    """The last line: whether training can start, where, and how much there is to mend."""
    failures, warnings = (sum(finding.status == status for finding in findings) for status in ("fail", "warning"))
    warned = f", with {counted(warnings, 'warning')}" if warnings else ""
    if failures:
        return f"training cannot start: {counted(failures, 'failure')}{warned}"
    device = (facts.execution or {}).get("device")
    where = {"cpu": " on the CPU", "cuda": " on the card"}.get(device or "", "")
    return f"training can start{where}{warned}"


def finding_lines(findings: list[Finding]) -> list[str]:
    """Plain text: a line a finding, its mend on a line of its own."""
    rows: list[tuple[str, str, str]] = []
    for finding in findings:
        rows.append((f"{finding.status:{_STATUS_COLUMNS}}", finding.name, finding.finding))
        rows += [] if finding.mend is None else [("", "", f"> {finding.mend}")]
    return aligned(rows)


def _print_findings(findings: list[Finding], last: str) -> None:
    """In colours, wrapped at the terminal's width, all but the mends: a command must be copied in one piece."""
    console = Console(highlight=False)
    widths = (_STATUS_COLUMNS, max((len(finding.name) for finding in findings), default=0))
    for finding in findings:
        row = Table.grid(*(Column(width=width) for width in (*widths, None)), padding=(0, 2, 0, 0))
        row.add_row(Text(finding.status, style=_STATUS_STYLES[finding.status]), finding.name, Text(finding.finding))
        console.print(row)
        if finding.mend is not None:
            console.print(Text(f"{'':{sum(widths) + 4}}> {finding.mend}", style="bold"), soft_wrap=True)
    console.print(Text(last, style="bold"))


def show_report(result: ReportResult) -> None:
    """The report's tables, and where the rest is."""
    from lowmem.report.tables import HOMEWORK

    columns = room()
    for written in result.tables:
        rows = [tuple(map(printable, row)) for row in (written.header, *written.rows)]
        print("\n".join([*table(rows, set(range(written.names, written.numbers)), columns), ""]))
    said = [f"{runs}: {differs}" for runs, differs in result.departures]
    said = [f"Against the setting of {HOMEWORK}:", *said] if said else []
    said += [f"not in the report: {why}" for why in result.left_out]
    print("".join(f"{line}\n" for line in fold(list(map(printable, said)), columns)), end="")
    page = "" if result.page is None else f", and all of it in {result.page}"
    figures = counted(len(result.figures), "figure")
    print(printable(f"written: {result.markdown} and {figures} beside it{page}"))
    if result.event_files is not None:
        print(f"curves for TensorBoard: tensorboard --logdir {result.event_files}")


def show_export(run: Path, form: str, out: Path, weights: str, raw_uint8: bool) -> None:
    """Writes the network for another program, and says what is in the file. Raises as `export` does."""
    with observer("stderr") as shown:
        with shown.loading("torch"):
            from lowmem.inference.export import export
        lines = export(run, form, out, weights=weights, raw_uint8=raw_uint8, phase=shown.phase)
    print("\n".join(map(printable, lines)))


def show_plan(settings: Settings, as_json: bool, curve: Path | None, recalibrate: bool = False) -> None:
    """Plans, prints, draws. With `recalibrate` the device at hand is measured first. For several cards, one process on
    each: who takes how much of the batch, and each one's plan.

    Raises Infeasible, UsageError, PreflightError."""
    card, names = settings.config.memory.card, cards_of(settings.config)
    if curve is not None:
        _refuse_curve(curve, names)
    if recalibrate:
        if card is not None:
            raise UsageError(
                f"--recalibrate measures the device at hand, and --card {card} asks for another: leave one out"
            )
        settings = settings.replace({"memory.calibrate": "always"}, "--recalibrate")
    cards = [load_card(name).name for name in names]
    try:
        with observer("stderr") as shown:
            with shown.loading("torch"):
                from lowmem.choose.batch_size import describe_split
                from lowmem.choose.decide import decide
                from lowmem.choose.execution import resolve_execution, why_on_cpu
                from lowmem.choose.explain import in_full
            if card is None:
                # Without a named card it is about this machine: what `lowmem train` would do here.
                settings = resolve_execution(settings, planned=True)
                if (why := why_on_cpu(settings)) is not None:
                    shown.warning(f"this plans {why}")
            decided = decide(settings, tell=shown, on_paper=True, recalibrate=recalibrate)
            config, split = decided.settings.config, decided.planned
            assert split is not None
            choice = split.choices[0]
            title = config.model.words
            if curve is not None:
                shown.phase("drawing memory against time")
            curves = None if curve is None else _draw(choice, title, curve)
    except Infeasible as error:  # the live line is gone
        if as_json:
            print(json.dumps({"infeasible": error.record}, indent=1))
        raise
    if as_json:
        record = choice.plan.to_json()
        if len(cards) > 1:
            processes = [split.choices[rank].plan.to_json() for rank in range(len(cards))]
            record = {"shares": split.shares, "step_seconds": split.step_seconds, "processes": processes}
        elif curves is not None:
            record["curve"] = curves  # the points of the picture, as [bytes, share of time more than plain]
        print(json.dumps(record, indent=1))
        return
    rate = f"Learning rate {config.optim.lr:g} ({decided.settings.sources['optim.lr']})."
    rates = [rate] if settings.config.memory.auto_batch else []
    if len(cards) > 1:
        parts = ["\n".join([title, "", *describe_split(split, cards), *rates])]
        parts += [f"Process {rank}, {name}\n\n{in_full(split.choices[rank])}" for rank, name in enumerate(cards)]
    else:
        parts = [title, in_full(choice), *rates, *([] if curve is None else [f"drawn: {curve}"])]
    print("\n".join(fold("\n\n".join(parts).split("\n"), room())))


def _refuse_curve(path: Path, cards: Sequence[str]) -> None:
    """Before anything is planned. Raises UsageError, PreflightError."""
    from lowmem.report.style import FORMATS  # and with it all of the report: only for those who draw

    if path.suffix[1:].lower() not in FORMATS:
        raise UsageError(
            f"--curve {path}: its suffix says what is drawn: give a name that ends in .{', .'.join(FORMATS)}"
        )
    if len(cards) > 1:
        raise UsageError("--curve draws one card's plans: name one with --card")
    if not path.parent.is_dir():
        raise PreflightError(f"{path} cannot be written ({path.parent} is no folder): give --curve another path")
    refuse_unwritable(path, "give --curve another path")


def _draw(choice: Choice, title: str, path: Path) -> Mapping[str, Points]:
    """The picture; returns what is in it. Raises PreflightError."""
    from lowmem.plan.hosting import HostSolver
    from lowmem.plan.solver import solved, strategies
    from lowmem.report.method_figures import draw_memory_curve  # matplotlib: only if there is something to draw

    plan, curves = choice.plan, strategies(choice.chain, choice.plain.estimate.peak_allocated_bytes)
    if isinstance(choice.solver, HostSolver):
        curves["lowmem with host memory"] = solved(choice.solver)
    words = f"{title}, batch {plan.batch}, {plan.precision}, {plan.memory_format}"
    try:
        drawn = draw_memory_curve(words, curves, choice.budget.tensor_bytes, path.suffix[1:].lower())
        write_bytes_atomic(path, drawn)
    except OSError as error:
        raise PreflightError(f"{path} cannot be written ({error.strerror}): give --curve another path") from None
    return curves
