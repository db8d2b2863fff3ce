"""`lowmem bench`, its tables and its suite of checks: what is measured by default, progress, results, files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table as ShownTable
from rich.text import Text

from lowmem.bench import FIRST_MODE, LEAST, Cell, Setup, acceptance, tables
from lowmem.bench.acceptance import KINDS, AcceptanceSetup, acceptance_cells
from lowmem.bench.results import Account, Environment, Results, ResultTable, Row
from lowmem.bench.run import Bench
from lowmem.bench.tables import TableSetup, table_cells
from lowmem.calibrate.device import ask_device, describe
from lowmem.choose.execution import refuse_size, refuse_unsafe, resolve_execution, why_on_cpu
from lowmem.choose.host import shortage
from lowmem.cli.terminal import say
from lowmem.config.settings import gather
from lowmem.config.sources import SOURCE_SIDE
from lowmem.core.errors import Interrupted, PreflightError, UsageError
from lowmem.core.reading import shorten
from lowmem.core.units import LEAST_TENSORS_BYTES, MIB, counted, parse_memory
from lowmem.isolate import Forks
from lowmem.measure import read_driver
from lowmem.models import check_network, hashes_of
from lowmem.remat.libraries import Numerics
from lowmem.train.signals import StartupSignals
from lowmem.trial import PREPARE

_WIDE = 140  # columns of a terminal that holds all of a table's
_NAME_WIDTH = 21
_FINISH_SECONDS = {"bench": 6.0, "acceptance": 10.0}  # for the last tables and the picture
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
    setup = _table_setup(flags, steps, rounds, budgets, quick)
    net = f"{setup.arch}-{setup.block}-w{setup.width}" if setup.spec is None else setup.model.name
    size = "" if setup.image_size == SOURCE_SIDE else f"-{setup.image_size}"
    folder = out or Path("bench") / f"{net}{size}-b{setup.batch}-{setup.device}"
    environment = _environment(setup)
    limit = (2.0 if quick else 60.0) if minutes is None else minutes
    seconds = 60 * limit - time.process_time()  # importing took its time too
    with Results(folder, setup, environment, tables.account) as results, _teller() as tell:
        cells = table_cells(setup, results.load())
        tell(f"{setup.name}, batch {setup.batch}, on {environment.get('card') or 'the CPU'}; results in {folder}")
        if there := sum(len(cell.trials) for cell in cells):
            tell(f"{counted(there, 'measurement')} from before, not to be made again")
        complete = _measure(setup, cells, results, tell, seconds, "the same command goes on from there")
        account = results.save(cells, complete, partial(_bench_picture, setup, environment, cells))
        written = [file for file in results.files if file.stat().st_size]
    _print(setup, account)
    if not complete:
        print(f"not finished within {limit:g} min: the same command goes on (--minutes for a longer limit)")
    print(f"written: {', '.join(str(path) for path in written)}")


def show_acceptance(
    flags: Mapping[str, Any], *, steps: int, cells: str | None, minutes: float | None, out: Path
) -> None:
    """The suite. `flags`: by dotted setting; `cells`: the kinds of cells, with commas between them; None: all. Raises
    UsageError for what cannot be meant, PreflightError if the folder cannot be written, Interrupted."""
    kinds = KINDS if cells is None else tuple(" ".join(word.split()) for word in cells.split(","))
    if unknown := [one for one in kinds if one not in KINDS]:
        raise UsageError(f"--cells: the suite has no cells {unknown[0]!r}: use {', '.join(KINDS)}")
    usual = {} if _names_network(flags) else {"model.arch": "res110", "model.block": "bottleneck"}
    network = _network(flags, usual | ({} if flags.get("memory.tensors") else {"memory.vram": "6G"}))
    # Asked in a process of its own: a context here would take memory from the trials.
    card_bytes = ask_device(Numerics()).total_bytes if network["device"] == "cuda" else None
    minutes = AcceptanceSetup.minutes if minutes is None else minutes
    setup = AcceptanceSetup(**network, card_bytes=card_bytes, steps=steps, cells=kinds, minutes=minutes)
    environment, all_cells = _environment(setup), acceptance_cells(setup)
    with Results(out, setup, environment, acceptance.account) as results:
        tell = partial(print, flush=True)
        _measure(setup, all_cells, results, tell, 60 * setup.minutes)
        account = results.save(all_cells, True, partial(_acceptance_picture, setup, environment))
    print("\n" + account.markdown())
    print(f"written: {', '.join(map(str, results.files))}")


def _measure(
    setup: Setup, cells: Sequence[Cell], results: Results, tell: Callable[[str], None], seconds: float, then: str = ""
) -> bool:
    """Whether everything is. A signal ends it with what was measured on disk, and no trial left behind. Raises
    Interrupted; `then`: what can be done after that."""
    seconds -= _FINISH_SECONDS[setup.stem]
    try:
        with StartupSignals(), Forks(None if setup.on_card else PREPARE) as call:
            return Bench(setup, cells, seconds=seconds, tell=tell, save=results.save, call=call).run()
    except Interrupted as error:
        kept = counted(sum(len(cell.trials) for cell in cells), "measurement")
        words = f"interrupted: {kept} kept in {results.folder}{then and f'; {then}'}"
        raise Interrupted(words, error.exit_code) from None


# -- what is measured --------------------------------------------------------------------------------------------------


def _network(flags: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `Setup`: what is given, else what is usual. Raises UsageError, PreflightError."""
    mode = {"train.precision": "fp32", "train.memory_format": "contiguous"}
    given = {key: value for key, value in flags.items() if value is not None}
    settings = resolve_execution(gather(flags={**mode, **usual, **given}))
    config = settings.config
    refuse_size(config)
    host = config.memory.host
    if isinstance(host, int) and (why := shortage(host)) is not None:
        raise PreflightError(f"--host is {why}: give less, or auto")
    check_network(config.model, 10, config.data.image_shape)
    refuse_unsafe(config)
    if (why := why_on_cpu(settings)) is not None:
        say(f"warning: this measures {why}", "stderr")
    train = {"batch": config.train.batch, "device": config.train.device, "image_size": config.data.image_size}
    memory: dict[str, Any] = {"vram_bytes": config.memory.vram, "tensors_bytes": config.memory.tensors}
    memory |= {"host": None if host == "off" else host}
    model = config.model.model_dump() | {"sha256": hashes_of(config.model)}  # trials are of what is there now
    return {**model, **train, **memory}


def _names_network(flags: Mapping[str, Any]) -> bool:
    return any(flags.get(key) is not None for key in ("model.arch", "model.spec"))


def _table_setup(
    flags: Mapping[str, Any], steps: int | None, rounds: int | None, budgets: str | None, quick: bool
) -> TableSetup:
    """What was not said is chosen so that it is bounded on what is there. Raises UsageError, PreflightError."""
    device = resolve_execution(gather(flags={"train.device": flags.get("train.device")})).config.train.device
    on_card = device == "cuda"
    usual: dict[str, Any] = {"model.width": 16 if quick else 64, "train.batch": 16 if quick else 128 if on_card else 32}
    if flags.get("model.spec") is not None:
        del usual["model.width"]
    if not _names_network(flags):
        arch = "res56" if quick else "res110" if on_card else "res20"
        usual |= {"model.arch": arch, "model.block": "basic" if arch == "res20" else "bottleneck"}
    return TableSetup(
        **_network(flags, usual),
        rounds=rounds or 3,
        mode_rounds=1 if quick else min(rounds or 3, 2),
        steps=steps or (3 if quick else 5),
        warmup=1 if quick else 2,
        quick=quick,
        budgets=_budgets(budgets) if budgets is not None else _QUICK_BUDGETS if quick else TableSetup.budgets,
    )


def _budgets(text: str) -> tuple[int | float | str, ...]:
    """`1200M,0.5,least` -> bytes, a share, `LEAST`. Raises UsageError."""

    def budget(part: str) -> int | float | str:
        with suppress(ValueError):
            if 0 < (share := float(part)) < 1:
                return share
        try:
            return LEAST if part == LEAST else parse_memory(part, LEAST_TENSORS_BYTES)
        except ValueError as error:
            words = f"--budgets {part!r}: {error}; or a share of plain's memory like 0.5, or {LEAST}"
            raise UsageError(words) from None

    return tuple(dict.fromkeys(budget(part.strip()) for part in text.split(",")))


def _environment(setup: Setup) -> Environment:
    """What figures are told with: versions, processor, card, driver."""
    return {**describe(setup.device), "driver": read_driver().driver_version if setup.on_card else None}


# -- what is shown -----------------------------------------------------------------------------------------------------


@contextmanager
def _teller() -> Iterator[Callable[[str], None]]:
    """Lines on standard error; in a terminal the measurement at hand is a line that is redrawn."""
    if not sys.stderr.isatty():
        yield lambda text: say(text, "stderr")
        return
    with Live(console=Console(stderr=True, highlight=False), refresh_per_second=4, transient=True) as live:
        yield lambda text: live.update(Text(text)) if text.startswith("[") else live.console.print(Text(text))


def _print(setup: Setup, account: Account) -> None:
    console = Console(highlight=False)
    console.print(Text(f"\n{setup.name}. {account.conditions}"))
    for table in account.tables:
        console.print(_shown(table, console.width))
        if table.note:
            console.print(Text(table.note, style="dim"))


def _shown(table: ResultTable, room: int) -> ShownTable:
    """Figures whole, ranges below their medians, names in two lines where they are long; the last column, which has
    the refusals, takes the room that is left."""
    shown = ShownTable(
        title=Text(f"\n{table.title}", style="bold"), title_justify="left", box=SIMPLE, padding=0, show_edge=False
    )
    header, *lines = table.lines(brief=room < _WIDE)
    texts = list(zip(header, *lines, strict=True))
    widths = [max(len(word) for text in column for word in text.split()) for column in texts]
    widths[0] = max(widths[0], min(_NAME_WIDTH, max(map(len, texts[0]))))
    longest = max(map(len, texts[-1]))
    widths[-1] = max(widths[-1], min(longest, room - sum(widths[:-1]) - len(widths)))
    for name, width in zip(header, widths, strict=True):
        shown.add_column(Text(name), width=width)
    for line in lines:
        shown.add_row(*map(Text, line))
    return shown


# -- pictures (matplotlib is imported only if there is something to draw) ----------------------------------------------


def _bench_picture(setup: Setup, environment: Environment, cells: Sequence[Cell], account: Account) -> bytes | None:
    """None if there is nothing to draw."""
    from lowmem.report.method_figures import MeasuredPoint, draw_bench

    curves: dict[str, list[MeasuredPoint]] = {}
    for cell, row in zip(cells, account.rows, strict=True):
        peak, predicted = _mib(row["peak_allocated_bytes"]), _mib(row["predicted_allocated_bytes"])
        if cell.kind != "step" or cell.mode != FIRST_MODE or not row["ratios"] or peak is None:
            continue
        note = f"{cell.budget:.0%}" if isinstance(cell.budget, float) else "least" if cell.budget == LEAST else ""
        times = row["times_plain"], row["least_times_plain"], row["most_times_plain"]
        curves.setdefault(cell.family, []).append(MeasuredPoint(peak, predicted, *times, note))
    if not curves:
        return None
    where = environment.get("card") or "CPU"
    memory = "peak of the step, allocated" if setup.on_card else "peak of the step's tensors"
    return draw_bench(f"{setup.name}, batch {setup.batch}, fp32, {where}", curves, memory)


def _acceptance_picture(setup: AcceptanceSetup, environment: Environment, account: Account) -> bytes:
    from lowmem.report.method_figures import Bar, draw_acceptance

    def bar(label: str, row: Row, name: str, limit: float | None = None, note: str = "") -> Bar:
        return Bar(label, _mib(row[f"{name}_bytes"]), _mib(row[f"predicted_{name}_bytes"]), limit, shorten(note, 40))

    memory, seconds = [], []
    for row in (row for row in account.rows if row["kind"] in ("memory", "time", "format", "largest")):
        kind, note = row["kind"], row["refused"] or ""
        label = row["name"] + (f": {row['batch']}" if kind == "largest" and row["allocated_bytes"] else "")
        label += " (emulated)" if row["emulated"] else ""
        what = "allocated" if row["predicted_reserved_bytes"] is not None else "tensors"
        limit = row["budget"][-1][1] / MIB if row["budget"] and kind != "time" else None
        memory.append(bar(f"{label}\n{what}" if kind == "memory" else label, row, "allocated", limit, note))
        if kind == "memory" and row["reserved_bytes"] is not None:
            memory += [bar("reserved", row, "reserved"), bar("on the card", row, "device")]
        if kind != "largest":
            over = note if row["overhead"] is None else f"{row['overhead']:+.1%} time"
            seconds.append(Bar(label, row["step_seconds"], row["predicted_step_seconds"], None, shorten(over, 40)))
    where = environment.get("card") or "CPU"
    met = [target["met"] for target in account.record["targets"] if target["met"] is not None]
    said = f": {sum(met)} of {len(met)} judged targets met" if met else ""
    size = setup.memory(setup.memory_bytes) + (" (emulated)" if setup.emulates(setup.memory_bytes) else "")
    title = f"{setup.name}, batch {setup.batch}\n{size}, {where}{said}"
    return draw_acceptance(title, memory, seconds)


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / MIB
