"""What may go to a terminal of a text that is not ours: a folder's name may hold anything."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line: a terminal obeys control characters, and a line end in a name makes a line of its own."""
    return "".join(one if one.isprintable() else "?" for one in text)
