"""Keeps what came back from a card: `benchmarks/results/gpu-CARD/` with the raw figures and a page of tables."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.account import RESULTS, plain, read_accounts
from benchmarks.gpu.job import FORMAT, PARTS
from benchmarks.gpu.table import page
from lowmem.core.errors import UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, read_json
from lowmem.runs.atomic import write_text_atomic

RESULTS_FOLDER = Path(__file__).resolve().parents[1] / "results"


def collect(folders: Sequence[Path], into: Path = RESULTS_FOLDER) -> Path:
    """Of several turns on one card the later folders win, part by part, and what was kept before stays beside them.
    The folder that was written. Raises UsageError for a rehearsal, for figures of different cards, and for nothing."""
    accounts: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    prepared: dict[str, Any] = {}
    names = tuple(part.name for part in PARTS)
    for folder in folders:
        found = read_accounts(folder, names)
        turns = {path.stem: _read(path) for path in sorted(folder.glob("train-*.json"))}
        if not found and not turns:
            raise UsageError(f"{folder} holds no results of a run and no trained network")
        accounts |= found
        trained |= turns
        if (folder / RESULTS).exists():
            prepared = _read(folder / RESULTS).get("prepared", {})
    card = _card([*accounts.values(), *trained.values()])
    out = into / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}"
    if (out / RESULTS).exists():
        before = _read(out / RESULTS)
        accounts = {**before["parts"], **accounts}
        trained = {**before["trained"], **trained}
        prepared = prepared or before["prepared"]
    accounts = {name: accounts[name] for name in names if name in accounts}
    out.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "card": card, "prepared": prepared, "parts": accounts, "trained": trained}
    write_text_atomic(out / RESULTS, json.dumps(plain(record), indent=1) + "\n")
    write_text_atomic(out / "results.md", page(accounts, list(trained.values()), prepared))
    return out


def _card(records: Sequence[dict[str, Any]]) -> str:
    """The one card that all figures are of."""
    if any(one.get("device") != "cuda" or not one.get("environment", {}).get("card") for one in records):
        raise UsageError("these figures were made on a CPU: a rehearsal, no card's result. They are not collected")
    cards = {one["environment"]["card"] for one in records}
    if len(cards) > 1:
        raise UsageError(
            f"these figures are of different cards, {' and '.join(sorted(cards))}: collect them one by one"
        )
    return str(cards.pop())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, TABLE_LIMIT_BYTES)
    except (OSError, Unreadable) as error:
        raise UsageError(f"{path} {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no record")
    return found
