"""The record as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.conditions import sentence, table
from benchmarks.peers.ways import ROWS
from lowmem.core.units import MIB

HEADER = (
    "way",
    "version",
    "batch found",
    "in, s",
    "trials",
    "peak of its trial, MiB",
    "trains and evaluates as many at a time",
    "peak of that, MiB",
    "evaluates {eval_batch} at a time",
    "images/s (lowest to highest)",
    "what becomes of batch {batch}, lr {lr:g}",
)


def markdown(record: dict[str, Any]) -> str:
    cells, asked, task = record["cells"], record["asked"], record["asked"]["task"]
    header = [title.format(**asked | task) for title in HEADER]
    rows = [row(name, cells, task) for name in ROWS if f"{name}/find" in cells]
    wall = sum(cell.get("wall_seconds", 0.0) for cell in cells.values())
    check = cells.get("check", {}).get("words", "not yet")
    budget = "of tensors" if task["device"] == "cpu" else "of an emulated card"
    return (
        f"# Batch finders and checkpointing of others\n\n{task['arch']} {task['block']}, width {task['width']}, fp32, "
        f"SGD with momentum; {task['budget_bytes'] / MIB:,.0f} MiB {budget}, {asked['threads']} threads. Searches as "
        f"documented by each; training ({task['steps']} steps) and evaluation ({task['eval_pictures']} pictures) in "
        "clean processes under the same budget.\n\n"
        f"{sentence(record['conditions'])}; all cells {wall:,.0f} s. The budget, checked: {check}.\n\n"
        + table(header, rows)
        + "\n"
        + "".join(f"- {ROWS[name].title}: {'; '.join(said)}.\n" for name in ROWS if (said := details(name, cells)))
        + "\nSeconds of a search are without loading libraries. "
        + ("Steps of a search are slowed down by the count of tensors; images/s are without it.\n"
           if task["device"] == "cpu" else "The card is emulated: a larger one, its allocator capped.\n")
    )  # fmt: skip


def row(name: str, cells: dict[str, Any], task: dict[str, Any]) -> list[str]:
    """The texts under HEADER."""
    found = cells[f"{name}/find"]
    first = [ROWS[name].title, found.get("version") or "–"]
    if "batch" not in found:
        why = next((found[key] for key in ("missing", "impossible", "died", "failed") if key in found), "–")
        return [*first, why, *["–"] * (len(HEADER) - 3)]
    trained, evaluated = (cells.get(f"{name}/{what}", {}) for what in ("train", "evaluate"))
    return [
        *first,
        str(found["batch"]),
        f"{found['seconds']:.1f}",
        str(len(found["tried"])) if found["tried"] else "none, simulated",
        peak_as_found(found),
        outcome(trained),
        mib(trained.get("train_peak_bytes")),
        outcome(evaluated),
        rate(name, found["batch"], cells.get("speed", {})),
        recipe(found, task),
    ]


def peak_as_found(found: dict[str, Any]) -> str:
    """Of the trial with the batch that was found."""
    peaks = [one["peak_bytes"] for one in found["tried"] if one["batch"] == found["batch"] and one["ran"]]
    if peaks:
        return mib(peaks[-1])
    predicted = found["carry"].get("predicted_peak_bytes")
    return "not tried" if predicted is None else f"{mib(predicted)}, predicted"


def outcome(trained: dict[str, Any]) -> str:
    if "survived" not in trained:
        return str(trained.get("died") or trained.get("failed") or "–")
    how = trained["how"]
    return (f"yes ({how})" if how else "yes") if trained["survived"] else f"**no**: {how}"


def rate(name: str, batch: int, speed: dict[str, Any]) -> str:
    """Median, lowest and highest."""
    if name not in speed.get("seconds", {}):
        return str(speed.get("died") or speed.get("failed") or "–")
    rates = sorted(batch / seconds for seconds in speed["seconds"][name])
    return f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"


def recipe(found: dict[str, Any], task: dict[str, Any]) -> str:
    """What the way did to the recipe."""
    batch, lr = found["batch"], found["lr"]
    if batch == task["batch"]:
        return "kept" if not found["tried"] else "the same, as it happens to be the largest tried that ran"
    rates = "lr left as it was" if lr == task["lr"] else f"lr {task['lr']:g} → {lr:g}"
    return f"batch {task['batch']} → {batch}, {rates}"


def details(name: str, cells: dict[str, Any]) -> list[str]:
    """What the search did, in words."""
    found = cells.get(f"{name}/find", {})
    if "batch" not in found:
        return []
    said = []
    if found["tried"]:
        said.append("tried " + ", ".join(f"{one['batch']}{'' if one['ran'] else ' (no)'}" for one in found["tried"]))
    if found["goes_on"] is not None:
        said.append(f"in the search's own process it then: {found['goes_on']}")
    if found["alive_before_bytes"] is not None:
        alive = f"{mib(found['alive_before_bytes'])} and {mib(found['alive_after_bytes'])} MiB"
        said.append(f"tensors alive before and after the search: {alive}")
    if found["weights_kept"] is not None:
        said.append(
            "parameters and buffers were put back" if found["weights_kept"] else "parameters or buffers CHANGED"
        )
    return [*said, *found["notes"]]


def mib(size_bytes: int | None) -> str:
    return "–" if size_bytes is None else f"{size_bytes / MIB:,.0f}"
