"""What goes on now, told while it goes on: how rooms below the observer say what may take more than a second."""

from __future__ import annotations

from typing import Protocol


class Phase(Protocol):
    """Hears what goes on from here on, until something else is told; `done` of `total` where that is known."""

    def __call__(self, what: str, done: int | None = None, total: int | None = None) -> None: ...


def untold(what: str, done: int | None = None, total: int | None = None) -> None:
    """Nobody waits."""
