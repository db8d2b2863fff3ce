"""Where files are that belong to no run: those that can be made again, and those that come with lowmem."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lowmem.core.errors import PreflightError

_PACKAGE = Path(__file__).resolve().parent.parent


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


def profiles_folder(kind: str) -> Path:
    """The folder `profiles/<kind>`: beside the package in a checkout, inside it when installed. Raises PreflightError
    if the installation lacks it."""
    for folder in (_PACKAGE / "profiles" / kind, _PACKAGE.parent / "profiles" / kind):
        if folder.is_dir():
            return folder
    raise PreflightError(f"the installation lacks profiles/{kind}: install lowmem again")


def profile_names(kind: str) -> tuple[str, ...]:
    """Names of the shipped profiles of a kind, sorted."""
    return tuple(sorted(path.stem for path in profiles_folder(kind).glob("*.yaml")))
