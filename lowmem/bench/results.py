"""The results folder of `lowmem bench`: what was measured stays, and the same command goes on from there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lowmem.bench.cells import Cell, Setup
from lowmem.core.errors import DiskError, PreflightError, UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, parse_json, read_limited, shorten
from lowmem.runs.atomic import write_bytes_atomic, write_text_atomic

FORMAT = 1
# What a figure depends on beside the settings. Not the commit, which is recorded: most change something else.
_SAME = ("lowmem", "torch", "device", "card", "driver", "cudnn", "cpu", "cpu_threads")
Environment = dict[str, Any]


class Results:
    """Context manager: the folder, held against a second writer. `forms`: what makes texts of cells and names the files
    (`lowmem.bench.tables`, `lowmem.bench.acceptance_tables`). Raises PreflightError if the folder cannot be written,
    UsageError if somebody else writes it."""

    def __init__(self, folder: Path, setup: Setup, environment: Environment, forms: ModuleType) -> None:
        self.folder, self._setup, self._environment, self._forms = folder, setup, environment, forms
        self.files = [folder / f"{forms.STEM}.{suffix}" for suffix in ("json", "csv", "md", "png")]
        self._lock = FileLock(folder / f"{forms.STEM}.lock", timeout=0)

    def __enter__(self) -> Results:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for file in self.files:  # before minutes of measuring, not after
                with open(file, "ab"):
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
        for file in self.files:
            if file.is_file() and file.stat().st_size == 0:
                file.unlink()

    def load(self) -> dict[str, Cell]:
        """Key -> cell of the tables that are there. Raises UsageError if they are of other settings, another machine or
        torch, or no results of this command."""
        path = self.files[0]
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
        here = plain_values(self._setup.record()), self._environment
        differing = [
            f"{name}: {shorten(str(then.get(name)))} there, {now.get(name)} here"
            for then, now, names in ((there[0], here[0], sorted(here[0])), (there[1], here[1], _SAME))
            for name in names
            if then.get(name) != now.get(name)
        ]
        if differing:
            raise UsageError(f"{self.folder} has the results of something else ({'; '.join(differing)}): {way_out}")
        return {cell.key: cell for cell in cells}

    def save(self, cells: Sequence[Cell], finished: bool) -> None:
        """After each measurement, all but the picture. Raises DiskError."""
        of = self._setup, self._environment, cells, finished
        texts = (self._forms.to_json(*of), self._forms.to_csv(self._setup, cells), self._forms.to_markdown(*of))
        for file, text in zip(self.files, texts, strict=False):
            self._write(file, text)

    def save_picture(self, png: bytes) -> None:
        """Raises DiskError."""
        self._write(self.files[-1], png)

    def _write(self, file: Path, content: str | bytes) -> None:
        try:
            if isinstance(content, bytes):
                write_bytes_atomic(file, content)
            else:
                write_text_atomic(file, content)
        except OSError as error:
            raise DiskError(
                f"{file} could not be written ({error.strerror}); what was measured before is there: "
                "make room and give the same command again"
            ) from None


def plain_values(value: Any) -> Any:
    """As JSON has it: lists, and null for what is no number."""
    if isinstance(value, dict):
        return {str(key): plain_values(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_values(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
