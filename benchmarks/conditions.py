"""What every benchmark here writes beside its figures: hardware, versions, revision, command line; and its tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def revision() -> str | None:
    """The commit that is checked out, with `-dirty` if tracked files differ; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _program() -> list[str]:
    """As it was typed: a file of this folder, or `-m` and a module of its packages."""
    main = sys.modules["__main__"].__spec__
    return ["-m", main.name.removesuffix(".__main__")] if main else [f"benchmarks/{Path(sys.argv[0]).name}"]


def conditions() -> dict[str, str | int | float | None]:
    """Flat, for a result's JSON."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *_program(), *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": revision(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def sentence(found: dict[str, str | int | float | None]) -> str:
    """The same for a reader."""
    return (
        f"{found['cpu']}, {found['cores']} cores, Python {found['python']}, torch {found['torch']}, revision "
        f"{found['revision']}, {found['date']}, load average before {found['load_average_1min']}; made by "
        f"`{found['command']}`"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, record: dict[str, object], text: str) -> None:
    """`name.json` and `name.md` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
