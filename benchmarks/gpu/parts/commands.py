"""`lowmem COMMAND` as a user types it, with what it says in a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.account import NO_TIME


def lowmem(arguments: Sequence[str], said: Path, seconds: float) -> str | None:
    """None if it left with 0; else why not. `said`: what it prints is added to this file."""
    return run([sys.executable, "-m", "lowmem", *arguments], said, seconds)


def run(command: Sequence[str], said: Path, seconds: float, fine: tuple[int, ...] = (0,)) -> str | None:
    """The same of any command, with the codes that are `fine`."""
    if seconds < 1:
        return NO_TIME
    with open(said, "ab") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds:.0f} s"
    if done.returncode in fine:
        return None
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    return f"left with code {done.returncode}: {lines[-1][:200]}"
