"""`lowmem bench --suite acceptance`: runs the suite, writes its account after every cell, prints the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowmem.bench import acceptance_tables as forms
from lowmem.bench.acceptance import (
    DEFAULT_MINUTES,
    FINISH_SECONDS,
    KINDS,
    AcceptanceSetup,
    Record,
    acceptance_cells,
    records,
    targets,
)
from lowmem.bench.results import Results
from lowmem.bench.run import Bench
from lowmem.calibrate.device import ask_device
from lowmem.choose.execution import refuse_unsafe, resolve_execution
from lowmem.cli.show_bench import environment_of
from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
from lowmem.core.units import MIB, format_size
from lowmem.remat.libraries import Numerics


def show_acceptance(
    flags: Mapping[str, Any], *, steps: int, cells: str | None, minutes: float | None, out: Path
) -> None:
    """`flags`: by dotted setting; `cells`: the kinds of cells, with commas between them; None: all. Raises UsageError
    for what cannot be meant, PreflightError if the folder cannot be written."""
    kinds = _kinds(cells)
    given = {key: value for key, value in flags.items() if value is not None}
    usual = {} if "model.arch" in given else {"model.arch": "res110", "model.block": "bottleneck"}
    usual |= {"memory.vram": "6G", "train.precision": "fp32", "train.memory_format": "contiguous"}
    config = resolve_execution(gather(flags={**usual, **given})).config
    refuse_unsafe(config)
    assert config.memory.vram is not None
    setup = AcceptanceSetup(
        arch=config.model.arch,
        block=config.model.block,
        width=config.model.width,
        batch=config.train.batch,
        vram_bytes=config.memory.vram,
        device=config.train.device,
        card_bytes=_card_bytes(config.train.device),
        minutes=DEFAULT_MINUTES if minutes is None else minutes,
        steps=steps,
        cells=kinds,
    )
    environment = environment_of(config.train.device)
    with Results(out, setup, environment, forms) as results:
        seconds = 60 * setup.minutes - FINISH_SECONDS
        tell = partial(print, flush=True)
        bench = Bench(setup, acceptance_cells(setup), seconds=seconds, tell=tell, save=results.save)
        bench.run()
        results.save(bench.cells, finished=True)
        results.save_picture(_picture(setup, environment, records(setup, bench.cells)))
    print("\n" + forms.to_markdown(setup, environment, bench.cells, finished=True))
    print(f"written: {', '.join(map(str, results.files))}")


def _kinds(text: str | None) -> tuple[str, ...]:
    given = KINDS if text is None else tuple(" ".join(word.split()) for word in text.split(","))
    unknown = [one for one in given if one not in KINDS]
    if unknown:
        raise UsageError(f"--cells: the suite has no cells {unknown[0]!r}: use {', '.join(KINDS)}")
    return given


def _card_bytes(device: str) -> int | None:
    """Asked in a process of its own: a context here would take memory from the trials."""
    return ask_device(Numerics()).total_bytes if device == "cuda" else None


def _picture(setup: AcceptanceSetup, environment: dict[str, Any], rows: Sequence[Record]) -> bytes:
    from lowmem.report.method_figures import Bar, draw_acceptance  # matplotlib: only if there is something to draw

    memory, seconds = [], []
    for row in (row for row in rows if row["kind"] in ("memory", "time", "format", "largest")):
        label = row["name"] + (f": {row['batch']}" if row["kind"] == "largest" and row["allocated_bytes"] else "")
        label += " (emulated)" if row["emulated"] else ""
        limit = row["budget"][-1][1] / MIB if row["budget"] and row["kind"] != "time" else None
        note = row["refused"] or ""
        what = "allocated" if row["predicted_reserved_bytes"] is not None else "tensors"
        taken, predicted = _mib(row["allocated_bytes"]), _mib(row["predicted_allocated_bytes"])
        memory.append(
            Bar(f"{label}\n{what}" if row["kind"] == "memory" else label, taken, predicted, limit, _short(note))
        )
        if row["kind"] == "memory" and row["reserved_bytes"] is not None:
            memory.append(Bar("reserved", _mib(row["reserved_bytes"]), _mib(row["predicted_reserved_bytes"])))
            memory.append(Bar("on the card", _mib(row["device_bytes"]), _mib(row["predicted_device_bytes"])))
        if row["kind"] != "largest":
            over = "" if row["overhead"] is None else f"{row['overhead']:+.1%} time"
            seconds.append(Bar(label, row["step_seconds"], row["predicted_step_seconds"], None, over or _short(note)))
    where = environment.get("card") or "CPU"
    met = [target for target in targets(list(rows)) if target.met is not None]
    said = f": {sum(bool(target.met) for target in met)} of {len(met)} judged targets met" if met else ""
    size = format_size(setup.vram_bytes) + (" (emulated)" if setup.emulates(setup.vram_bytes) else "")
    title = f"{setup.name}, batch {setup.batch}\n{size}, {where}{said}"
    return draw_acceptance(title, memory, seconds)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / MIB
