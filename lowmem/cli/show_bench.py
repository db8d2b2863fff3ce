"""`lowmem bench`: what is measured by default, progress, tables, files."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table as ShownTable
from rich.text import Text

from lowmem.bench import tables as forms
from lowmem.bench.cells import ENGINE, FIRST_MODE, LEAST, Cell, TableSetup, plain_of, table_cells
from lowmem.bench.results import Results
from lowmem.bench.run import Bench
from lowmem.bench.tables import ResultTable, conditions, tables
from lowmem.calibrate.device import describe
from lowmem.choose.execution import refuse_unsafe, resolve_execution
from lowmem.cli.terminal import say
from lowmem.config.settings import gather
from lowmem.core.errors import ExitCode, Interrupted, UsageError
from lowmem.core.units import MIB, parse_size
from lowmem.trial.trial import calls_on

_WIDE = 140  # columns of a terminal that holds all of a table's
_NAME_WIDTH = 21
_FINISH_SECONDS = 6.0  # for the last tables and the picture
_QUICK_BUDGETS: tuple[int | float | str, ...] = (0.75, 0.5, LEAST)


def show_bench(
    flags: Mapping[str, Any],
    *,
    steps: int | None = None,
    rounds: int | None = None,
    budgets: str | None = None,
    quick: bool = False,
    minutes: float | None = None,
    out: Path | None = None,
) -> None:
    """`flags`: by dotted setting. Raises UsageError for what cannot be meant and for a folder with other results,
    PreflightError if the folder cannot be written, Interrupted."""
    setup = _setup(flags, steps, rounds, budgets, quick)
    folder = out or Path("bench") / f"{setup.arch}-{setup.block}-w{setup.width}-b{setup.batch}-{setup.device}"
    environment = environment_of(setup.device)
    limit = (2.0 if quick else 60.0) if minutes is None else minutes
    seconds = 60 * limit - _FINISH_SECONDS - time.process_time()  # importing took its time too
    with Results(folder, setup, environment, forms) as results, _teller() as tell, calls_on(setup.device) as call:
        cells = table_cells(setup, results.load())
        bench = Bench(setup, cells, seconds=seconds, tell=tell, save=results.save, call=call)
        tell(f"{setup.name}, batch {setup.batch}, on {environment.get('card') or 'the CPU'}; results in {folder}")
        if bench.done_before:
            tell(f"{bench.done_before} measurements are there from before and are not made again")
        complete = _measure(bench, folder)
        if (picture := _picture(setup, environment, bench.cells)) is not None:
            results.save_picture(picture)
        written = [file for file in results.files if file.stat().st_size]
    _print(setup, environment, bench.cells)
    if not complete:
        print(f"not finished within {limit:g} minutes: the same command goes on (--minutes for a longer limit)")
    print(f"written: {', '.join(str(path) for path in written)}")


def _measure(bench: Bench, folder: Path) -> bool:
    try:
        with _terminated():
            return bench.run()
    except KeyboardInterrupt as error:
        code = ExitCode.TERMINATED if isinstance(error, _Terminated) else ExitCode.INTERRUPTED
        count = sum(len(cell.trials) for cell in bench.cells)
        words = f"interrupted: {count} measurements are in {folder}; the same command goes on from there"
        raise Interrupted(words, code) from None


def _setup(
    flags: Mapping[str, Any], steps: int | None, rounds: int | None, budgets: str | None, quick: bool
) -> TableSetup:
    """What was not said is chosen so that it is bounded on what is there. Raises UsageError, PreflightError."""
    given = {key: value for key, value in flags.items() if value is not None}
    device = resolve_execution(gather(flags={"train.device": given.get("train.device")})).config.train.device
    on_card = device == "cuda"
    usual: dict[str, object] = {"model.width": 16 if quick else 64, "train.batch": 128 if on_card else 32}
    usual |= {"train.precision": "fp32", "train.memory_format": "contiguous"}
    usual |= {"train.batch": 16} if quick else {}
    if "model.arch" not in given:
        usual["model.arch"] = "res56" if quick else "res110" if on_card else "res20"
        usual |= {"model.block": "bottleneck"} if usual["model.arch"] != "res20" else {}
    config = gather(flags={**usual, **given, "train.device": device}).config
    refuse_unsafe(config)
    chosen: dict[str, Any] = {"mode_rounds": 1 if quick else min(rounds or 3, 2)}
    if budgets is not None or quick:
        chosen["budgets"] = _QUICK_BUDGETS if budgets is None else _budgets(budgets)
    return TableSetup(
        arch=config.model.arch,
        block=config.model.block,
        width=config.model.width,
        batch=config.train.batch,
        device=device,
        vram_bytes=config.memory.vram,
        rounds=rounds or 3,
        steps=steps or (3 if quick else 5),
        warmup=1 if quick else 2,
        quick=quick,
        **chosen,
    )


def _budgets(text: str) -> tuple[int | float | str, ...]:
    """`1200M,0.5,least` -> bytes, a share, `LEAST`. Raises UsageError."""
    found: list[int | float | str] = []
    for part in (one.strip() for one in text.split(",")):
        share = None
        with suppress(ValueError):
            share = float(part)
        if part == LEAST:
            found.append(LEAST)
        elif share is not None and 0 < share < 1:
            found.append(share)
        else:
            try:
                found.append(parse_size(part))
            except ValueError as error:
                words = f"--budgets {part!r}: {error}; or a share of plain's memory like 0.5, or {LEAST}"
                raise UsageError(words) from None
    return tuple(dict.fromkeys(found))


def environment_of(device: str) -> dict[str, Any]:
    """What figures are told with: versions, processor, card, driver."""
    from lowmem.measure import read_driver

    return {**describe(device), "driver": read_driver().driver_version if device == "cuda" else None}


# -- progress ----------------------------------------------------------------------------------------------------------


class _Terminated(KeyboardInterrupt):
    """Asked to end by another signal than Ctrl-C."""


@contextmanager
def _terminated() -> Iterator[None]:
    """Ends by SIGTERM as by Ctrl-C: with what was measured on disk, and no trial left behind."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _teller() -> Iterator[Callable[[str], None]]:
    """Lines on standard error; in a terminal the measurement at hand is a line that is redrawn."""
    if not sys.stderr.isatty():
        yield lambda text: say(text, "stderr")
        return
    with Live(console=Console(stderr=True, highlight=False), refresh_per_second=4, transient=True) as live:
        yield lambda text: live.update(Text(text)) if text.startswith("[") else live.console.print(Text(text))


# -- results -----------------------------------------------------------------------------------------------------------


def _picture(setup: TableSetup, environment: dict[str, Any], cells: list[Cell]) -> bytes | None:
    """None if there is nothing to draw."""
    import statistics

    from lowmem.report.method_figures import MeasuredPoint, draw_bench  # matplotlib: only if there is a picture

    curves: dict[str, list[MeasuredPoint]] = {}
    for cell in cells:
        if cell.kind != "step" or cell.mode != FIRST_MODE:
            continue
        ratios, peak = cell.ratios(plain_of(cells, cell)), cell.most("peak_allocated_bytes")
        if not ratios or peak is None:
            continue
        predicted = cell.predicted_allocated_bytes
        curves.setdefault(cell.family, []).append(
            MeasuredPoint(
                mib=peak / MIB,
                predicted_mib=None if predicted is None else predicted / MIB,
                ratio=statistics.median(ratios),
                low=min(ratios),
                high=max(ratios),
                note=_note(cell),
            )
        )
    if not curves:
        return None
    where = environment.get("card") or "CPU"
    memory = "peak of the step, allocated" if setup.on_card else "peak of the step's tensors"
    return draw_bench(f"{setup.name}, batch {setup.batch}, fp32, {where}", curves, memory)


def _note(cell: Cell) -> str:
    if cell.family != ENGINE:
        return ""
    return f"{cell.budget:.0%}" if isinstance(cell.budget, float) else "least" if cell.budget == LEAST else ""


def _print(setup: TableSetup, environment: dict[str, Any], cells: list[Cell]) -> None:
    console = Console(highlight=False)
    console.print(Text(f"\n{setup.name}. {conditions(environment)}"))
    for table in tables(setup, cells):
        columns = range(len(table.header)) if console.width >= _WIDE else table.brief
        console.print(_shown(table, columns, console.width))
        if table.note:
            console.print(Text(table.note, style="dim"))


def _shown(table: ResultTable, columns: Sequence[int], room: int) -> ShownTable:
    """Figures whole, ranges below their medians, names in two lines where they are long; the last column, which has
    the refusals, takes the room that is left."""
    shown = ShownTable(
        title=Text(f"\n{table.title}", style="bold"), title_justify="left", box=SIMPLE, padding=0, show_edge=False
    )
    texts = [[table.header[column], *(row[column] for row in table.rows)] for column in columns]
    widths = [max(len(word) for text in column for word in text.split()) for column in texts]
    widths[0] = max(widths[0], min(_NAME_WIDTH, max(map(len, texts[0]))))
    longest = max(map(len, texts[-1]))
    widths[-1] = max(widths[-1], min(longest, room - sum(widths[:-1]) - len(widths)))
    for column, width in zip(texts, widths, strict=True):
        shown.add_column(Text(column[0]), width=width)
    for row in zip(*(column[1:] for column in texts), strict=True):
        shown.add_row(*map(Text, row))
    return shown
