"""What a part found, on disk: a JSON file that is whole after every row, so that a part that dies keeps what it knew.

A row is a fact or a promise. Of a promise `met` says whether it was kept; of a fact it is None. The conductor adds how
the part's process ended (`outcome`), its seconds, and where it ran. No torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.core.errors import UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, read_json
from lowmem.runs.atomic import write_text_atomic

DONE = "done"
NO_TIME = "not run: time"
RESULTS = "results.json"  # all parts, once a run has ended


class Account:
    """Written by the part's own process. `device`: `cuda`, or `cpu` in a rehearsal. `at_once`: questions that may be
    asked side by side."""

    def __init__(self, path: Path, part: str, device: str, seconds: float, at_once: int = 1) -> None:
        self._path = path
        self.at_once = at_once
        self._began = self._row_began = time.monotonic()
        self._ends = self._began + seconds
        self.record: dict[str, Any] = {"part": part, "device": device, "skipped": None, "finished": False, "rows": []}
        self._write()

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def row(self, name: str, found: Mapping[str, Any] | str | None, *, met: bool | None = None) -> None:
        """`found`: figures, or in words why there are none."""
        now = time.monotonic()
        row: dict[str, Any] = {"name": name, "seconds": round(now - self._row_began, 3)}
        if isinstance(found, str):
            met = None if found == NO_TIME else met
            row |= {"refused": found, "found": None, "met": met}
        else:
            row |= {"refused": None, "found": dict(found or {}), "met": met}
        self._row_began = now
        self.record["rows"].append(row)
        self._write()
        kept = {None: "", True: ": as promised", False: ": NOT as promised"}[met]
        print(f"{name}{kept}{f' ({found})' if isinstance(found, str) else ''}", flush=True)

    def skip(self, reason: str) -> None:
        """What only a card can do, where there is none."""
        self.record["skipped"] = reason
        self._write()

    def finish(self) -> None:
        self.record["finished"] = True
        self._write()

    def _write(self) -> None:
        write_account(self._path, self.record)


def write_account(path: Path, record: Mapping[str, Any]) -> None:
    write_text_atomic(path, json.dumps(plain(record), indent=1) + "\n")


def plain(value: Any) -> Any:
    """Figures that are no numbers become null: JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_account(path: Path) -> dict[str, Any] | None:
    """None if there is no whole one: its process died before the first row."""
    try:
        found = read_json(path, TABLE_LIMIT_BYTES)
    except (OSError, Unreadable):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) else None


def read_accounts(folder: Path, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Part -> account, of a run that has ended or of one that was cut off. Raises UsageError if there are none."""
    try:
        packed = read_json(folder / RESULTS, TABLE_LIMIT_BYTES) if (folder / RESULTS).exists() else {}
    except (OSError, Unreadable) as error:
        raise UsageError(f"{folder / RESULTS} {error}") from None
    found: dict[str, dict[str, Any]] = dict(packed.get("parts", {}))
    for part in parts:
        account = read_account(folder / f"{part}.json")
        if account is not None:
            found[part] = account
    return {part: found[part] for part in parts if part in found}


def shortcomings(account: Mapping[str, Any]) -> list[str]:
    """What did not go as it should, a sentence each: a process that died, what could not be found out, and promises
    that were not kept."""
    part = account["part"]
    found = [] if account.get("outcome") == DONE else [f"{part}: {account.get('outcome', 'was cut off')}"]
    for row in account["rows"]:
        if row["refused"] is not None:
            found.append(f"{part}: {row['name']}: {row['refused']}")
        elif row["met"] is False:
            found.append(f"{part}: {row['name']}: not as promised")
    return found
