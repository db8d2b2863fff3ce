"""What a shell offers for a value that is being typed. Nothing of it is imported before it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

Completion = Callable[[str], list[str]]


def of_setting(name: str) -> Completion | None:
    """For the flag of a setting, by its dotted name; None for a flag that is none."""
    known = {"": None, "model.arch": _networks, "memory.card": _cards, "data.source": _sources}
    return known[name] if name in known else _choices(name)


def _choices(name: str) -> Completion:
    def complete(incomplete: str) -> list[str]:
        from lowmem.config.catalogue import catalogue

        return _beginning(incomplete, catalogue()[name].choices)

    return complete


def settings(incomplete: str) -> list[str]:
    """`optim.lr=`, for --set."""
    from lowmem.config.schema import known_keys

    return _beginning(incomplete, (f"{name}=" for name in known_keys()))


def runs(incomplete: str) -> list[str]:
    """Run folders, in the folder that is being typed, else in `runs` and in this one."""
    folder = os.path.dirname(incomplete)
    there = [path for one in ([folder] if folder else ["runs", ""]) for path in _folders(incomplete, one)]
    return [path for path in there if os.path.isfile(os.path.join(path, "config.yaml"))]


def _networks(incomplete: str) -> list[str]:
    from lowmem.config.networks import ARCHITECTURES

    return _beginning(incomplete, ARCHITECTURES)


def _cards(incomplete: str) -> list[str]:
    from lowmem.core.reading import profile_names

    return _beginning(incomplete, profile_names("cards"))


def _sources(incomplete: str) -> list[str]:
    from lowmem.config.sources import CSV, FOLDER, SOURCES, path_in

    typed, folder = path_in(incomplete), os.path.dirname(path_in(incomplete))
    paths = _folders(typed, folder)
    if not incomplete.startswith(FOLDER):
        paths += _there(typed, folder, lambda one: one.is_file() and one.name.lower().endswith(CSV[:-1]))
    return _beginning(incomplete, SOURCES) + [incomplete.removesuffix(typed) + path for path in paths]


def _folders(incomplete: str, folder: str) -> list[str]:
    return _there(incomplete, folder, lambda one: one.is_dir() and not one.name.startswith("."))


def _there(incomplete: str, folder: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    try:
        names = sorted(one.name for one in os.scandir(folder or ".") if wanted(one))
    except OSError:
        return []
    return _beginning(incomplete, (os.path.join(folder, name) for name in names))


def _beginning(incomplete: str, values: Iterable[str]) -> list[str]:
    return [value for value in values if value.startswith(incomplete)]
