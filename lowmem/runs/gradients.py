"""gradients.csv: a row for each recorded step, with the gradient norm of every layer.

    step,epoch,conv1.weight,layer1.0.conv1.weight,...,linear.weight

Its columns are the network's own layers, in the order of the forward pass. Six digits are kept: the figure is drawn
over many decades, and a run of 110 layers writes some 1,600 rows.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten

FILE_NAME = "gradients.csv"
_LEADING = ("step", "epoch")


@dataclass(frozen=True)
class GradientRow:
    """The norms of one step, in the order of `Gradients.layers`; infinite or NaN where the step overflowed."""

    step: int
    epoch: int
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Gradients:
    """What gradients.csv holds; `layers` are parameter names from the input to the output."""

    layers: tuple[str, ...] = ()
    rows: tuple[GradientRow, ...] = ()


def columns(layers: Sequence[str]) -> tuple[str, ...]:
    """The header."""
    return (*_LEADING, *layers)


def line(step: int, epoch: int, norms: Sequence[float]) -> str:
    """A row without its line end."""
    return ",".join([str(step), str(epoch), *(f"{norm:.6g}" for norm in norms)])


def parse(path: Path, lines: Sequence[str]) -> Gradients:
    """The whole lines of the file. Raises UsageError naming the file and the line, for a damaged one."""
    if not lines:
        return Gradients()
    try:
        header = next(csv.reader([lines[0]]), [])
    except csv.Error as error:
        raise UsageError(f"{path} line 1 is no header: {error}") from None
    layers = tuple(header[len(_LEADING) :])
    if tuple(header[: len(_LEADING)]) != _LEADING or not layers or len(set(header)) != len(header):
        raise UsageError(f"{path} line 1: the columns must be step, epoch and a layer each, every one once")
    rows = tuple(_row(path, number, text, len(header)) for number, text in enumerate(lines[1:], start=2))
    for number, (before, after) in enumerate(pairwise(rows), start=3):
        if after.step <= before.step:
            raise UsageError(f"{path} line {number}: step {after.step} follows step {before.step}: restore the file")
    return Gradients(layers, rows)


def _row(path: Path, number: int, text: str, width: int) -> GradientRow:
    fields = text.split(",")
    if len(fields) != width:
        raise UsageError(f"{path} line {number}: {len(fields)} fields where the header has {width}")
    try:
        return GradientRow(int(fields[0]), int(fields[1]), tuple(map(float, fields[2:])))
    except ValueError as error:
        raise UsageError(f"{path} line {number}: {shorten(error)}") from None
