"""Where files are kept that can be made again: decoded pictures, what was measured on a card."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_folder() -> Path:
    """The folder for files that can be made again, by the platform's custom, with `lowmem` at its end."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(base) / "lowmem" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lowmem"
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    base = named if Path(named).is_absolute() else str(Path.home() / ".cache")
    return Path(base) / "lowmem"
