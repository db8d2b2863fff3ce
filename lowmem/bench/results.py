"""The results folder of `lowmem bench`: what was measured stays, and the same command goes on from there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lowmem.bench.cells import Cell, Setup, record
from lowmem.core.errors import DiskError, PreflightError, UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, parse_json, read_limited, shorten
from lowmem.runs.atomic import write_bytes_atomic, write_text_atomic

FORMAT = 1
NAMES = ("bench.json", "bench.csv", "bench.md", "bench.png")
# What a figure depends on beside the settings. Not the commit, which is recorded: most change something else.
_SAME = ("lowmem", "torch", "device", "card", "driver", "cudnn", "cpu", "cpu_threads")


class Results:
    """Context manager: the folder, held against a second writer. Raises PreflightError if it cannot be written,
    UsageError if somebody else writes it."""

    def __init__(self, folder: Path, setup: Setup, environment: dict[str, Any]) -> None:
        self.folder, self._setup, self._environment = folder, setup, environment
        self._lock = FileLock(folder / "bench.lock", timeout=0)

    def __enter__(self) -> Results:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for name in NAMES:  # before minutes of measuring, not after
                with open(self.folder / name, "ab"):
                    pass
        except Timeout:
            raise UsageError(f"another `lowmem bench` is writing {self.folder}: wait, or give another --out") from None
        except OSError as error:
            self._lock.release()
            words = f"{self.folder} cannot be written ({error.strerror}): choose another with --out"
            raise PreflightError(words) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # while it is held: results are looked at, and kept, without it
            Path(self._lock.lock_file).unlink()
        self._lock.release()
        for name in NAMES:
            path = self.folder / name
            if path.is_file() and path.stat().st_size == 0:
                path.unlink()

    def load(self) -> dict[str, Cell]:
        """Key -> cell of what is there. Raises UsageError if it is of other settings, another machine or torch, or
        no results of this command."""
        path = self.folder / NAMES[0]
        way_out = "give another --out, or delete it"
        try:
            data = read_limited(path, TABLE_LIMIT_BYTES)
            if not data:
                return {}
            found = parse_json(data)
            if not isinstance(found, dict) or found.get("bench") != FORMAT:
                raise Unreadable(f"has no results of this version of `lowmem bench` (format {FORMAT})")
            there = dict(found["settings"]), dict(found["environment"])
            cells = [Cell.from_record(one) for one in found["cells"]]
        except FileNotFoundError:
            return {}
        except (Unreadable, OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} {shorten(str(error))}: {way_out}") from None
        here = _plain(asdict(self._setup)), self._environment
        differing = [
            f"{name}: {shorten(str(then.get(name)))} there, {now.get(name)} here"
            for then, now, names in ((there[0], here[0], sorted(here[0])), (there[1], here[1], _SAME))
            for name in names
            if then.get(name) != now.get(name)
        ]
        if differing:
            raise UsageError(f"{self.folder} has the results of something else ({'; '.join(differing)}): {way_out}")
        return {cell.key: cell for cell in cells}

    def save(self, cells: Iterable[Cell], finished: bool) -> None:
        """After each measurement. Raises DiskError."""
        found = {
            "bench": FORMAT,
            "finished": finished,
            "settings": asdict(self._setup),
            "environment": self._environment,
            "cells": [record(cell) for cell in cells],
        }
        self._write(NAMES[0], json.dumps(_plain(found), indent=1) + "\n")

    def write(self, name: str, content: str | bytes) -> Path:
        """One of the other files. Raises DiskError."""
        self._write(name, content)
        return self.folder / name

    def _write(self, name: str, content: str | bytes) -> None:
        try:
            if isinstance(content, bytes):
                write_bytes_atomic(self.folder / name, content)
            else:
                write_text_atomic(self.folder / name, content)
        except OSError as error:
            raise DiskError(
                f"{self.folder / name} could not be written ({error.strerror}); what was measured before is there: "
                "make room and give the same command again"
            ) from None


def _plain(value: Any) -> Any:
    """As JSON has it: lists, and null for what is no number."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
