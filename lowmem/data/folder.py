"""Pictures in folders: stub."""

from __future__ import annotations

from pathlib import Path

from lowmem.data.pictures import Progress, Source
from lowmem.errors import DataError


def read(path: str | Path, *, cache: str | None, progress: Progress | None) -> Source:
    """Not there yet."""
    raise DataError(f"{path}: folders are not read yet; use --data shapes")
