"""What was measured on one device, kept in a file per card, driver and torch version.

A calibration only makes predictions better: one that is missing, damaged or of another format is never an error, it is
measured again. Keys say everything a figure depends on; a figure's name has the hash of their text, and is what the
file has, and what a process that measures is told (`lowmem.calibrate.measuring`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.core.reading import read_json, user_cache_folder
from lowmem.core.units import LARGEST

FORMAT = 2
_LARGEST_FILE_BYTES = 32 << 20
_LARGEST_NUMBER = 1e9  # seconds; NaN is not below it either


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a figure is of. `device` is `cuda` or `cpu`; `threads` matter on the CPU only, `numerics` (which kernels the
    libraries may take) on CUDA only."""

    device: str
    name: str
    driver: str | None
    torch: str
    library: str | None  # cuDNN's version
    threads: int | None = None
    numerics: str | None = None

    @property
    def file_name(self) -> str:
        """Readable, and different for different identities."""
        words = [
            self.name,
            self.driver or "",
            f"torch {self.torch}",
            "" if self.threads is None else f"t{self.threads}",
        ]
        slug = re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-.")[:80]
        return f"{slug}-{_digest(repr(self))[:8]}.json"


@dataclass(frozen=True)
class Seconds:
    """Of one policy of one stage: forward, backward, and making a dropped output again."""

    forward: float
    backward: float
    restore: float = 0.0


@dataclass(frozen=True)
class Mode:
    """A precision in a memory format: seconds of a plain step's blocks, and whether all results were finite."""

    seconds: float
    finite: bool


class Calibration:
    """Figures of one device by key. `folder` None: nothing is read or kept."""

    def __init__(self, identity: Identity, folder: Path | None) -> None:
        self.identity = identity
        self.path = None if folder is None else folder / identity.file_name
        self.figures: dict[str, Any] = {} if self.path is None else _read(self.path, identity)

    @staticmethod
    def usual_folder() -> Path:
        """Where calibrations are kept unless told otherwise."""
        return user_cache_folder() / "calibration"

    def __len__(self) -> int:
        return len(self.figures)

    def clear(self) -> None:
        """Everything is to be measured again."""
        self.figures.clear()

    def seconds(self, key: object) -> Seconds | None:
        found = self._numbers("seconds", key, 3)
        return None if found is None else Seconds(*found)

    def mode(self, key: object) -> Mode | None:
        found = self._numbers("mode", key, 2)
        return None if found is None else Mode(found[0], bool(found[1]))

    def size_bytes(self, key: object) -> int | None:
        """A workspace, a context, a number of pictures: integers."""
        found = self.figures.get(figure_name("bytes", key))
        return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= LARGEST else None

    def put(self, kind: str, key: object, figure: Any) -> None:
        """As a file has it: `seconds` and `mode` are lists of their fields, `bytes` a number."""
        self.figures[figure_name(kind, key)] = figure

    def save(self) -> None:
        """Replaces the file whole. A disk that refuses costs only that it is measured again next time."""
        if self.path is None:
            return
        content = {"format": FORMAT, "identity": asdict(self.identity), "figures": self.figures}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=self.path.parent, prefix=".writing-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file)
                os.replace(aside, self.path)
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise

    def _numbers(self, kind: str, key: object, count: int) -> list[float] | None:
        found = self.figures.get(figure_name(kind, key))
        if not isinstance(found, list) or len(found) != count:
            return None
        good = all(isinstance(one, (int, float)) and 0 <= one <= _LARGEST_NUMBER for one in found)
        return [float(one) for one in found] if good else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def figure_name(kind: str, key: object) -> str:
    """`kind` is `seconds`, `mode` or `bytes`."""
    return f"{kind}:{_digest(repr(key))[:24]}"


def _read(path: Path, identity: Identity) -> dict[str, Any]:
    try:
        content = read_json(path, _LARGEST_FILE_BYTES)
        if content["format"] != FORMAT or content["identity"] != asdict(identity):
            return {}
        figures = content["figures"]
        return dict(figures) if isinstance(figures, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
