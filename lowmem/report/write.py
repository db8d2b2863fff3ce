"""Read runs, draw, write: the whole of `lowmem report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.core.errors import DiskError, UsageError
from lowmem.core.reading import shorten
from lowmem.report.figures import Picture, draw_all
from lowmem.report.gradients import draw_gradients
from lowmem.report.markdown import render
from lowmem.report.naming import file_names
from lowmem.report.page import to_page
from lowmem.report.resources import resource_rows
from lowmem.report.tables import TableRow, build_rows, in_order
from lowmem.runs.atomic import write_bytes_atomic, write_text_atomic
from lowmem.runs.event_files import EventFiles, require_tensorboard
from lowmem.runs.view import RunView, read_run


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
    page: Path | None = None  # report.html, if it was asked for
    event_files: Path | None = None  # for `tensorboard --logdir`, if they were


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, html: bool = False, tensorboard: bool = False
) -> ReportResult:
    """Write report.md and its figures to `out`, by default to `report/` in the run if there is only one; with `html`
    the same as one page, report.html, too; with `tensorboard` each run's event file, in a folder of its own under
    `tensorboard/`.

    Raises UsageError before anything is written if a run cannot be read or there is no telling where to
    write, and DiskError if the folder refuses. Figures of an earlier report of the same name are replaced,
    others left alone.
    """
    histories = _read_all(runs)
    if out is None:
        if len(histories) != 1:
            raise UsageError(f"a report on {len(histories)} runs needs a folder to go to: give --out report")
        out = histories[0].path / "report"
    if tensorboard:
        require_tensorboard()
    pictures = [*draw_all(histories), *draw_gradients(histories)]
    rows = build_rows(histories)
    text = render(histories, rows, pictures)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            write_bytes_atomic(out / picture.file_name, picture.png)
        write_text_atomic(out / "report.md", text)  # last: it names only figures that are there
        if html:
            write_text_atomic(out / "report.html", to_page(text, pictures, _title(rows)))
        if tensorboard:
            for history, name in zip(histories, file_names(histories), strict=True):
                _export(history, out / "tensorboard" / name)
    except OSError as error:
        raise DiskError(f"cannot write the report to {out}: {error.strerror or error}: give another --out") from error
    figures = tuple(out / picture.file_name for picture in pictures)
    page = out / "report.html" if html else None
    board = out / "tensorboard" if tensorboard else None
    return ReportResult(
        out, out / "report.md", figures, rows, text, tuple(pictures), tuple(resource_rows(histories)), page, board
    )


def _export(history: RunView, folder: Path) -> None:
    # Not where a run that is still trained keeps its own: the two would take each other's away.
    files = EventFiles(history.path, folder)
    files.update()
    files.close()


def _title(rows: Sequence[TableRow]) -> str:
    names = ", ".join(row.run for row in rows)
    return f"lowmem: {shorten(names, 80)}"


def _read_all(runs: Sequence[Path]) -> list[RunView]:
    """The runs in the table's order; one that is given twice counts once."""
    if not runs:
        raise UsageError("no run given: lowmem report runs/res20 [runs/cnn20 ...]")
    once = {Path(run).resolve(): Path(run) for run in runs}
    return in_order([read_run(run) for run in once.values()])
