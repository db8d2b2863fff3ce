"""The most telling cells of `lowmem bench --suite acceptance`, by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.account import NO_TIME, Account
from benchmarks.gpu.parts.commands import lowmem
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, read_json

_SPARE_SECONDS = 15.0  # the suite starts torch before its own clock, and draws a picture after it
_LEAST_SECONDS = 20.0


def work(questions: dict[str, Any], account: Account, artefacts: Path) -> None:
    """A row a cell, and one a target of the suite: on a card what was judged must be met. `minutes`: the suite's own
    limit; None: what the part has."""
    seconds = account.seconds_left - _SPARE_SECONDS
    if questions["minutes"] is not None:
        seconds = min(seconds, 60 * questions["minutes"])
    if seconds < _LEAST_SECONDS:
        account.row("the suite", NO_TIME)
        return
    limits = ["--minutes", f"{seconds / 60:.2f}", "--out", str(artefacts)]
    command = ["bench", "--suite", "acceptance", *questions["arguments"], *limits]
    refused = lowmem(command, artefacts / "lowmem.txt", account.seconds_left)
    found = _written(artefacts / "acceptance.json")
    if refused is None and all(cell["refused"] == NO_TIME for cell in found["cells"]):
        refused = NO_TIME
    if refused is not None:
        account.row("the suite", refused, met=False)
    for cell in found["cells"]:
        # What the suite itself had no time for, or found not to hold, stands in its own account.
        account.row(cell["name"], {**cell, "refused_by_the_suite": cell["refused"]})
    on_card = account.record["device"] == "cuda"  # of a thin network on a busy processor nothing is promised
    for target in found["targets"]:
        account.row(f"target: {target['what']}", target, met=target["met"] if on_card else None)


def _written(path: Path) -> dict[str, Any]:
    """The suite writes after every cell: one that was ended leaves those before."""
    try:
        found: dict[str, Any] = read_json(path, TABLE_LIMIT_BYTES)
    except (OSError, Unreadable):
        return {"cells": [], "targets": []}
    return found
