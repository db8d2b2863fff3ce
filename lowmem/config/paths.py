"""Settings that are paths. A relative one is kept as it was typed, and meant from the folder where the run was begun,
which is kept beside it: so a run goes on from another folder, and from where both of them have been moved to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lowmem.config.schema import Config, flatten
from lowmem.config.settings import Settings
from lowmem.config.sources import CSV, OWN, path_in

# Settings that may be paths, and what tells.
_PATHS: tuple[tuple[str, str, str | tuple[str, ...]], ...] = (
    *(("data.source", begins, "") for begins in OWN),
    ("data.root", "", ""),
    ("data.cache", "", ""),
    ("memory.card", "", (".yaml", ".yml")),
)


def folder_of(source: str) -> Path:
    """The folder that a `data.source` or `data.root` names, or the file of `csv:FILE`, absolute."""
    # Unlike pathlib's, these raise nothing for links in a circle and homes that are nobody's.
    return Path(os.path.realpath(os.path.expanduser(path_in(source))))


def started_in(path: Path) -> str | None:
    """This process's folder as seen from the run (or job) `path`: where its relative paths are meant, also after both
    have moved. None: they have no way to each other, as between two drives of Windows."""
    try:
        return os.path.relpath(os.getcwd(), path.resolve())
    except (OSError, ValueError):
        return None


def as_meant(settings: Settings, path: Path, started: object) -> Settings:
    """With those relative paths made absolute that lead to something from the folder that the run (or job) `path` was
    `started` in, if this process is elsewhere."""
    try:
        folder = (path.resolve() / str(started)).resolve()
        if not isinstance(started, str) or folder == Path.cwd():
            return settings
        paths = absolute_paths(flatten(settings.config), folder)
    except (OSError, ValueError):
        return settings
    found = {key: text for key, text in paths.items() if os.path.exists(path_in(text))}
    return settings.replace(found, "where the run was begun") if found else settings


def absolute_paths(values: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Of settings by name those that are relative paths, as seen from `folder`."""
    paths = {}
    for key, begins, ends in _PATHS:
        text = values.get(key)
        if isinstance(text, str) and text.startswith(begins):
            several = text.removeprefix(begins).split(",") if key == "memory.card" else [text.removeprefix(begins)]
            absolute = [one if one.startswith("~") or not one.endswith(ends) else str(folder / one) for one in several]
            if absolute != several:
                paths[key] = begins + ",".join(absolute)
    return paths


def where_else(config: Config, *, flags: bool) -> str:
    """Where the data is looked for, what that means here, and what to add to the command to say where it is: `flags`,
    or a setting."""
    source, root = config.data.source, config.data.root
    if source == "shapes":
        return ""
    begins = source[: len(source) - len(path_in(source))]
    key, text = ("data.source", source) if begins else ("data.root", root)
    flag = ("--data " if begins else "--data-root ") if flags else f"--set {key}="
    folder = folder_of(text)
    meant = "" if str(folder) == path_in(text) else f", which from here is {folder}"
    new = "FILE" if begins == CSV else "PATH"
    return f"; {key} is {text}{meant}: if the pictures are elsewhere, add `{flag}{begins}{new}`"
