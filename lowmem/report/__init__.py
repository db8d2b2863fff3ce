"""Tables and figures of finished and unfinished runs: the whole of `lowmem report`. Needs no torch, changes no run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.core.errors import DiskError, UsageError
from lowmem.core.phases import Phase, untold
from lowmem.core.reading import shorten
from lowmem.report.markdown import render, to_page
from lowmem.report.naming import in_order, name_runs
from lowmem.report.tables import ReportTable, departures, error_table, resource_table
from lowmem.runs.atomic import write_bytes_atomic, write_text_atomic
from lowmem.runs.event_files import EventFiles, require_tensorboard
from lowmem.runs.view import read_run

__all__ = ["ReportResult", "write_report"]


@dataclass(frozen=True)
class ReportResult:
    """What was written, and the tables for the terminal."""

    markdown: Path
    figures: tuple[Path, ...]
    tables: tuple[ReportTable, ...]  # of errors and of resources, a row a run
    departures: tuple[tuple[str, str], ...]  # which runs, and what differs from the published setting
    page: Path | None  # report.html, if it was asked for
    event_files: Path | None  # for `tensorboard --logdir`, if they were


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    html: bool = False,
    tensorboard: bool = False,
    phase: Phase = untold,
) -> ReportResult:
    """Write report.md and its figures to `out`, by default to `report/` in the run if there is only one; with `html`
    the same as one page, with `tensorboard` each run's event file in a folder of its own. Figures of an earlier report
    of the same name are replaced, others left alone.

    Raises UsageError before anything is written if a run cannot be read or there is no telling where to write, and
    DiskError if the folder refuses."""
    if not runs:
        raise UsageError("no run given: lowmem report runs/res20 [runs/cnn20 ...]")
    phase("reading runs")
    once = {Path(run).resolve(): Path(run) for run in runs}  # one that is given twice counts once
    named = name_runs(in_order([read_run(run) for run in once.values()]))
    if out is None:
        if len(named) != 1:
            raise UsageError(f"a report on {len(named)} runs needs a folder to go to: give --out report")
        out = named[0].history.path / "report"
    if tensorboard:
        require_tensorboard()
    phase("drawing figures")
    # matplotlib takes a second, and not all who import this draw
    from lowmem.report.figures import draw_gradients, draw_training

    pictures = [*draw_training(named), *draw_gradients(named)]
    text = render(named, pictures)
    result = ReportResult(
        markdown=out / "report.md",
        figures=tuple(out / picture.file_name for picture in pictures),
        tables=(error_table(named), resource_table(named)),
        departures=departures(named),
        page=out / "report.html" if html else None,
        event_files=out / "tensorboard" if tensorboard else None,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, picture in zip(result.figures, pictures, strict=True):
            write_bytes_atomic(path, picture.png)
        write_text_atomic(result.markdown, text)  # last: it names only figures that are there
        if result.page is not None:
            title = f"lowmem: {shorten(', '.join(run.name for run in named), 80)}"
            write_text_atomic(result.page, to_page(text, pictures, title))
        if result.event_files is not None:
            for run in named:
                # Not where a run that is still trained keeps its own: the two would take each other's away.
                files = EventFiles(run.history.path, result.event_files / run.file_name)
                files.update()
                files.close()
    except OSError as error:
        raise DiskError(f"cannot write the report to {out}: {error.strerror or error}: give another --out") from error
    return result
