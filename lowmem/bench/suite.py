"""What is measured, the process that measures it, and the table.

Memory on CUDA is the caching allocator's peak; on the CPU it is by how much the process's resident memory grew from
before the network was built, which holds whatever the library keeps for itself too.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from lowmem.units import format_size

COLUMNS = ("batch", "precision", "memory format", "images/s", "slowest–fastest step", "peak memory")


@dataclass(frozen=True)
class Cell:
    """One measurement: a training step (forward, backward, update) of a network of the family."""

    arch: str
    block: str
    width: int
    batch: int
    precision: str
    memory_format: str
    device: str
    steps: int = 5
    warmup: int = 2


@dataclass(frozen=True)
class Measurement:
    """Seconds per step (median, least, most) and peak bytes; `refused` says why there are none."""

    cell: Cell
    step_seconds: float | None = None
    least_seconds: float | None = None
    most_seconds: float | None = None
    peak_bytes: int | None = None
    refused: str | None = None

    def row(self) -> tuple[str, ...]:
        """The texts under COLUMNS."""
        cell = self.cell
        head = (str(cell.batch), cell.precision, cell.memory_format)
        if self.step_seconds is None or self.least_seconds is None or self.most_seconds is None:
            return (*head, "–", "–", self.refused or "–")
        spread = f"{self.most_seconds:.3f}–{self.least_seconds:.3f} s"
        return (*head, f"{cell.batch / self.step_seconds:,.0f}", spread, format_size(self.peak_bytes))


def cells(arch: str, block: str, width: int, batches: Sequence[int], device: str, steps: int) -> Iterator[Cell]:
    """Every batch with every precision and memory format."""
    for batch, precision, layout in itertools.product(batches, ("fp32", "amp"), ("contiguous", "channels-last")):
        yield Cell(arch, block, width, batch, precision, layout, device, steps)


def measure(cell: Cell, timeout_seconds: float = 1800) -> Measurement:
    """Runs the cell in a process of its own: nothing of another cell is cached, fragmented or still allocated.

    A cell that does not fit or takes too long is a refusal, not an error.
    """
    command = [sys.executable, "-m", "lowmem.bench.cell", json.dumps(asdict(cell))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return Measurement(cell, refused=f"took longer than {timeout_seconds:,.0f} s")
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        refused = "out of memory" if "out of memory" in last[0].lower() or done.returncode == -9 else last[0]
        return Measurement(cell, refused=refused)
    return Measurement(cell, **json.loads(done.stdout.splitlines()[-1]))


def to_markdown(title: str, measurements: Sequence[Measurement]) -> str:
    """A Markdown table under a title that says the conditions."""
    lines = [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(measurement.row())} |" for measurement in measurements]
    return "\n".join(lines) + "\n"
