"""Read runs, draw, write: the whole of `lowmem report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.errors import DiskError, UsageError
from lowmem.report.figures import Picture, draw_all
from lowmem.report.gradients import draw_gradients
from lowmem.report.markdown import render
from lowmem.report.resources import resource_rows
from lowmem.report.tables import TableRow, build_rows, in_order
from lowmem.runs.atomic import write_bytes_atomic, write_text_atomic
from lowmem.runs.history import History, read_history


@dataclass(frozen=True)
class ReportResult:
    """What was written and where, and the table for the terminal (`TABLE_HEADER` over each row's `cells()`)."""

    folder: Path
    markdown: Path
    figures: tuple[Path, ...]
    rows: tuple[TableRow, ...]
    text: str
    pictures: tuple[Picture, ...]  # in the order of `figures`
    resources: tuple[tuple[str, ...], ...]  # see `resources.HEADER`


def write_report(runs: Sequence[Path], out: Path | None = None) -> ReportResult:
    """Write report.md and its figures to `out`, by default to `report/` in the run if there is only one.

    Raises UsageError before anything is written if a run cannot be read or there is no telling where to
    write, and DiskError if the folder refuses. Figures of an earlier report of the same name are replaced,
    others left alone.
    """
    histories = _read_all(runs)
    if out is None:
        if len(histories) != 1:
            raise UsageError(f"a report on {len(histories)} runs needs a folder to go to: give --out report")
        out = histories[0].path / "report"
    pictures = [*draw_all(histories), *draw_gradients(histories)]
    rows = build_rows(histories)
    text = render(histories, rows, pictures)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            write_bytes_atomic(out / picture.file_name, picture.png)
        write_text_atomic(out / "report.md", text)  # last: it names only figures that are there
    except OSError as error:
        raise DiskError(f"cannot write the report to {out}: {error.strerror or error}: give another --out") from error
    figures = tuple(out / picture.file_name for picture in pictures)
    return ReportResult(out, out / "report.md", figures, rows, text, tuple(pictures), tuple(resource_rows(histories)))


def _read_all(runs: Sequence[Path]) -> list[History]:
    """The runs in the table's order; one that is given twice counts once."""
    if not runs:
        raise UsageError("no run given: lowmem report runs/res20 [runs/cnn20 ...]")
    once = {Path(run).resolve(): Path(run) for run in runs}
    return in_order([read_history(run) for run in once.values()])
