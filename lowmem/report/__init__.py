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
from lowmem.runs.folder import run_folders
from lowmem.runs.view import RunView, read_run

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
    left_out: tuple[str, ...]  # of folders of runs: what is none and what cannot be read, and why


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    html: bool = False,
    tensorboard: bool = False,
    phase: Phase = untold,
) -> ReportResult:
    """Write report.md and its figures to `out`, by default to `report/` in the run if there is only one, else here;
    with `html` the same as one page, with `tensorboard` each run's event file in a folder of its own. Figures of an
    earlier report of the same name are replaced, others left alone. `runs`: run folders, and folders that hold runs,
    where one that cannot be read does not hide the others.

    Raises UsageError before anything is written if a run that is named cannot be read, or there is none; DiskError if
    the folder refuses."""
    if not runs:
        raise UsageError("no run given: lowmem report runs/res20 [runs/cnn20 ...]")
    phase("reading runs")
    views, left_out = _read(runs)
    named = name_runs(in_order(views))
    if out is None:
        out = named[0].history.path / "report" if len(named) == 1 else Path("report")
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
        left_out=tuple(left_out),
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


def _read(paths: Sequence[Path]) -> tuple[list[RunView], list[str]]:
    """Each run once, and what is not among them of what lies in folders of runs. Raises UsageError."""
    views: dict[Path, RunView] = {}
    left_out: list[str] = []
    for path in map(Path, paths):
        found = run_folders(path) if path.is_dir() else [path]
        if found == [path]:
            views.setdefault(path.resolve(), read_run(path))
            continue
        if not found:
            raise UsageError(f"there is no run in {path}: give the folder of a run, like runs/res110, or of several")
        for run in found:
            try:
                views.setdefault(run.resolve(), read_run(run))
            except UsageError as error:
                left_out.append(str(error))
        left_out += [f"{folder} holds no run" for folder in _others(path, found)]
    if not views:
        raise UsageError(f"no run of {shorten(', '.join(map(str, paths)))} can be read: {left_out[0]}")
    return list(views.values()), left_out


def _others(path: Path, runs: Sequence[Path]) -> list[Path]:
    """The folders in `path` in which there is no run, but for an earlier report."""
    holding = {path / run.relative_to(path).parts[0] for run in runs}
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(folder for folder in folders if folder not in holding and not (folder / "report.md").is_file())
