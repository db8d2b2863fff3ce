"""Finds the files that come with lowmem: `profiles/` beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

from lowmem.core.errors import PreflightError

_PACKAGE = Path(__file__).resolve().parent.parent


def profiles_folder(kind: str) -> Path:
    """The folder `profiles/<kind>`. Raises PreflightError if the installation lacks it."""
    for folder in (_PACKAGE / "profiles" / kind, _PACKAGE.parent / "profiles" / kind):
        if folder.is_dir():
            return folder
    raise PreflightError(f"the installation lacks profiles/{kind}: install lowmem again")


def profile_names(kind: str) -> tuple[str, ...]:
    """Names of the shipped profiles of a kind, sorted."""
    return tuple(sorted(path.stem for path in profiles_folder(kind).glob("*.yaml")))
