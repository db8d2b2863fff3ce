"""What there is to choose from, and what was kept: settings, cards, the cache; as lines or as JSON. No torch."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lowmem.cli.flags import FLAGS
from lowmem.cli.terminal import printable
from lowmem.config import catalogue
from lowmem.config.cards import load_card
from lowmem.config.catalogue import Setting
from lowmem.core.errors import DiskError, UsageError
from lowmem.core.reading import profile_names, shorten, user_cache_folder
from lowmem.core.units import aligned, format_size

# What the cache has, by how its names begin, and what becomes of it when it is gone.
_KINDS = {
    "calibration": ("measurements of this machine", "made again by the next plan that goes by them"),
    "folder-": ("decoded pictures", "decoded again when they are trained on"),
    "": ("other things", "not lowmem's: --clear leaves them"),
}


def show_settings(pattern: str | None, as_json: bool) -> None:
    """Each setting in two lines. Raises UsageError where none is like `pattern`."""
    found = catalogue.find(pattern) if pattern is not None else list(catalogue.catalogue().values())
    if not found:
        raise UsageError(
            f"no setting has {shorten(pattern)!r} in its name or meaning: `lowmem settings` lists them all"
        )
    if as_json:
        print(json.dumps([vars(one) | {"flag": _flag(one)} for one in found], indent=1))
        return
    rows = [(f"{one.name} = {_value(one)}", one.kind, _changed_by(one), _flag(one) or "") for one in found]
    head, *heads = aligned([("name = default", "takes", "may be changed by", "flag, or --set NAME=VALUE"), *rows])
    print(head)
    width = shutil.get_terminal_size((120, 24)).columns
    for line, one in zip(heads, found, strict=True):
        print(line)
        print(textwrap.fill(one.meaning, width, initial_indent="    ", subsequent_indent="    "))


def _value(setting: Setting) -> str:
    default = setting.default
    return default if isinstance(default, str) else json.dumps(default)


def _flag(setting: Setting) -> str | None:
    return next((flag.name for flag in FLAGS if flag.setting == setting.name), None)


def _changed_by(setting: Setting) -> str:
    return {(True, True): "resume, fork", (False, True): "fork", (True, False): "resume"}.get(
        (setting.on_resume, setting.on_fork), "a new run only"
    )


def show_cards(as_json: bool) -> None:
    """Every shipped card, smallest memory first."""
    cards = sorted(((load_card(name), name) for name in profile_names("cards")), key=lambda one: one[0].memory_bytes)
    if as_json:
        values = [
            {"profile": name, **card.model_dump(), "amp_flops_per_second": card.amp_flops_per_second}
            for card, name in cards
        ]
        print(json.dumps(values, indent=1))
        return
    rows = [("--card", "card", "memory", "compute", "GB/s", "fp32 TFLOPS", "amp TFLOPS", "fp16", "PCIe")]
    for card, name in cards:
        rates = (card.bandwidth_bytes_per_second / 1e9, card.fp32_flops_per_second / 1e12)
        amp = card.amp_flops_per_second / 1e12
        figures = (f"{rates[0]:.0f}", f"{rates[1]:.1f}", f"{amp:.1f}")
        rows.append((name, card.name, format_size(card.memory_bytes), card.capability, *figures, card.fp16, card.pcie))
    print("\n".join(aligned(rows, right={2, 3, 4, 5, 6})))


def show_cache(clear: bool, as_json: bool) -> None:
    """What is in the user's cache folder, by kind; with `clear` it is removed first. Raises DiskError for what cannot
    be."""
    folder = user_cache_folder()
    before = _kept(folder)
    if clear:
        _remove(folder, before)
    there = {
        kind: [(path, size) for path, size in entries if os.path.lexists(path)] for kind, entries in before.items()
    }
    sizes = {kind: sum(size for _, size in entries) for kind, entries in there.items()}
    removed = sum(size for entries in before.values() for _, size in entries) - sum(sizes.values())
    if as_json:
        kinds = [
            {"kind": words, "entries": len(there[kind]), "size_bytes": sizes[kind], "when_removed": then}
            for kind, (words, then) in _KINDS.items()
        ]
        values = {"folder": str(folder), "size_bytes": sum(sizes.values()), "removed_bytes": removed, "kinds": kinds}
        print(json.dumps(values, indent=1))
        return
    rows = [
        (words, str(len(there[kind])), format_size(sizes[kind]), then)
        for kind, (words, then) in _KINDS.items()
        if there[kind]
    ]
    print(
        f"{printable(str(folder))}: {format_size(sum(sizes.values()))}"
        + (f", {format_size(removed)} removed" if clear else "")
    )
    print("\n".join(aligned(rows, right={1, 2}) or ["nothing is kept there"]))
    if rows and not clear:
        print("all of lowmem's can be made again: `lowmem cache --clear` removes it")


def _kept(folder: Path) -> dict[str, list[tuple[Path, int]]]:
    """What lies in the folder with its bytes, by kind: files of measurements, folders of pictures."""
    kept: dict[str, list[tuple[Path, int]]] = {kind: [] for kind in _KINDS}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind = next(kind for kind in _KINDS if path.name.startswith(kind))
        inside = sorted(path.iterdir()) if kind == "calibration" and path.is_dir() else [path]
        kept[kind] += [(one, sum(_sizes(one))) for one in inside]
    return kept


def _sizes(path: Path) -> Iterator[int]:
    """Of the files in it; what vanishes meanwhile is nothing."""
    files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    for file in files:
        try:
            yield file.lstat().st_size
        except OSError:
            continue


def _remove(folder: Path, kept: dict[str, list[tuple[Path, int]]]) -> None:
    for path, _ in (entry for kind, entries in kept.items() if kind for entry in entries):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(
                f"{path} cannot be removed ({error.strerror or error}): end what uses it, or remove {folder} by hand"
            ) from None
