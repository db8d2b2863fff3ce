"""Files that are there whole or not at all (invariant 9): write aside, flush, fsync, replace, fsync the folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

PARTIAL = ".partial"


def fsync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable. Windows cannot open a folder for this, and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_path(source: Path, target: Path) -> None:
    """`os.replace`. On Windows a reader or a virus scanner that has a file open makes it fail for a moment: tried
    again for two seconds. Raises OSError."""
    deadline = time.monotonic() + (2.0 if os.name == "nt" else 0.0)
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def write_synced(path: Path, data: bytes) -> None:
    """Writes `data` and waits until it is on the disk. Not atomic by itself. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: a reader, or a crash, sees the old or the new content. Raises OSError."""
    aside = path.with_name(path.name + PARTIAL)
    write_synced(aside, data)
    replace_path(aside, path)
    fsync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def append_lines(path: Path, lines: list[str]) -> None:
    """Appends whole lines in one write and waits until they are on the disk. Raises OSError.

    The half line that a killed process or a full disk left at the end is cut off first: the new one must not be glued
    to it.
    """
    if not lines:
        return
    _cut_half_line(path)
    with open(path, "ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _cut_half_line(path: Path) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
    os.truncate(path, whole)
