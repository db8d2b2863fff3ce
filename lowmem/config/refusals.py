"""What of a run's settings is refused by looking at names alone, before anything is imported that takes seconds."""

from __future__ import annotations

import os

from lowmem.config.cards import load_card
from lowmem.config.paths import folder_of
from lowmem.config.processes import cards_of
from lowmem.config.schema import Config
from lowmem.config.sources import CSV, FOLDER
from lowmem.core.errors import DataError


def refuse_unknown_cards(config: Config) -> None:
    """Raises UsageError."""
    for name in cards_of(config):
        load_card(name)


def refuse_missing_pictures(config: Config, elsewhere: str = "") -> None:
    """Raises DataError, which ends with `elsewhere`, for a folder of pictures, or a list of them, that is not there."""
    root = folder_of(config.data.source)
    if config.data.source.startswith(CSV) and not os.path.isfile(root):
        raise DataError(f"{root} is no file: give csv: the path of one that has lines of path,label{elsewhere}")
    if not config.data.source.startswith(FOLDER):
        return
    try:
        with os.scandir(root) as entries:
            trouble = None if any(os.path.isdir(entry.path) for entry in entries) else "has no folders in it"
    except OSError as error:
        trouble = f"cannot be looked into ({error.strerror or error})"
    if trouble is not None:
        belong = f"pictures belong in {root}/train/<class>/ and {root}/test/<class>/"
        raise DataError(f"{root} {trouble}: {belong}{elsewhere}")
