"""What there is to choose from, and what was kept: settings, cards, the cache; as lines or as JSON. No torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.cli.flags import FLAGS
from lowmem.cli.layout import fold, room, table
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
    rows = [("name = default", "takes", "may be changed by", "flag, or --set NAME=VALUE")]
    for one in found:
        default = one.default if isinstance(one.default, str) else json.dumps(one.default)
        ways = ", ".join(way for way, may in (("resume", one.on_resume), ("fork", one.on_fork)) if may)
        rows.append((f"{one.name} = {default}", one.kind, ways or "a new run only", _flag(one) or ""))
    head, *heads = aligned(rows)
    lines = [head]
    for line, one in zip(heads, found, strict=True):
        lines += [line, f"    {one.meaning}"]
    print("\n".join(fold(lines, room())))


def _flag(setting: Setting) -> str | None:
    return next((flag.name for flag in FLAGS if flag.setting == setting.name), None)


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
    print("\n".join(table(rows, {2, 3, 4, 5, 6}, room())))


def show_cache(clear: bool, as_json: bool) -> None:
    """What is in the user's cache folder, by kind; with `clear` it is removed first. Raises DiskError for what cannot
    be."""
    folder = user_cache_folder()
    before = there = _kept(folder)
    if clear:
        _remove(folder, before)
        there = _kept(folder)
    kinds: list[dict[str, Any]] = []
    for kind, (words, then) in _KINDS.items():
        sizes = [size for of, _, size in there if of == kind]
        kinds.append({"kind": words, "entries": len(sizes), "size_bytes": sum(sizes), "when_removed": then})
    total, was = (sum(size for _, _, size in kept) for kept in (there, before))
    if as_json:
        values = {"folder": str(folder), "size_bytes": total, "removed_bytes": was - total, "kinds": kinds}
        print(json.dumps(values, indent=1))
        return
    print(f"{printable(str(folder))}: {format_size(total)}" + f", {format_size(was - total)} removed" * clear)
    if not there:
        print("nothing is kept there")
        return
    rows = [("what", "entries", "size", "when removed")]
    for one in kinds:
        if one["entries"]:
            rows.append((one["kind"], str(one["entries"]), format_size(one["size_bytes"]), one["when_removed"]))
    print("\n".join(table(rows, {1, 2}, room())))
    if not clear:
        print("\n".join(fold(["all of lowmem's can be made again: `lowmem cache --clear` removes it"], room())))


def _kept(folder: Path) -> list[tuple[str, Path, int]]:
    """What lies in the folder: its kind, where it is, its bytes; files of measurements, folders of pictures."""
    kept = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind = next(kind for kind in _KINDS if path.name.startswith(kind))
        inside = sorted(path.iterdir()) if kind == "calibration" and path.is_dir() else [path]
        kept += [(kind, one, sum(_sizes(one))) for one in inside]
    return kept


def _sizes(path: Path) -> Iterator[int]:
    """Of the files in it; what vanishes meanwhile is nothing."""
    files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    for file in files:
        try:
            yield file.lstat().st_size
        except OSError:
            continue


def _remove(folder: Path, kept: list[tuple[str, Path, int]]) -> None:
    for path in (path for kind, path, _ in kept if kind):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(
                f"{path} cannot be removed ({error.strerror or error}): end what uses it, or remove {folder} by hand"
            ) from None
