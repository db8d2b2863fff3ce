"""A run folder that came from somebody else holds files and folders of its own, nothing that leads out of it.

Everything lowmem writes goes to a fixed name below the run folder. A symbolic link of that name (`metrics.csv`,
`checkpoints`, `weights/last.safetensors.partial`) would make it write, truncate or delete somewhere else; a pipe or a
device would make it wait for ever.

Known limitation: the folder is looked at once, when it is opened. Who can change it at the same time has this user's
rights already.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten

_MOST_ENTRIES = 100_000


def refuse_leads(run: Path) -> None:
    """Raises UsageError naming the first thing under `run` that is neither a file nor a folder of its own.

    `run` itself may be a link: that is the user's. What cannot be looked at cannot be followed either, and is left
    to its reader."""
    folders, seen = [run], 0
    while folders:
        for entry in _entries(folders.pop()):
            seen += 1
            if seen > _MOST_ENTRIES:
                raise UsageError(f"{run} holds more than {_MOST_ENTRIES:,} files: that is no run folder")
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if _is_link(status):
                raise UsageError(
                    f"{shorten(entry.path)} is a link, and a run folder holds its own files only: "
                    "put what it leads to in its place"
                )
            if stat.S_ISDIR(status.st_mode):
                folders.append(Path(entry.path))
            elif not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{shorten(entry.path)} is neither a file nor a folder: take it out of the run folder")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append(entry)
                if len(found) > _MOST_ENTRIES:
                    break
    except OSError:
        pass
    return found


def _is_link(status: os.stat_result) -> bool:
    """Windows has two kinds: symbolic links, and junctions, which `S_ISLNK` does not know."""
    tag = getattr(status, "st_reparse_tag", 0)
    return stat.S_ISLNK(status.st_mode) or tag == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
