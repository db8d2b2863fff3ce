"""The picture of `lowmem bench`: memory against time as measured, one curve a way of doing the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lowmem.report.labels import tick_room
from lowmem.report.methods import STYLES
from lowmem.report.palette import NEUTRAL
from lowmem.report.placing import Boxes, Label, along, around, from_the_middle, place
from lowmem.report.style import (
    AXIS_SIZE,
    BOTTOM_INCHES,
    LABEL_SIZE,
    LEAST_SIZE,
    TOP_INCHES,
    dress,
    fit,
    head,
    new_figure,
    to_png,
)

_HEIGHT_INCHES = 4.9  # more than most: up to seven ways, some close together
_REMARK_INCHES = 0.22
_RING_POINTS, _MARKER_POINTS = 15.0, 8.0
_NOTE_SIZE = LEAST_SIZE + 1
_REMARK = "Bars: fastest and slowest of the rounds. Rings: the memory as predicted."


@dataclass(frozen=True)
class Point:
    """A measured step: MiB at its peak, the same as predicted (None: not known), its time as a multiple of plain's
    with the range over the rounds, and what is to be written beside it ("": nothing)."""

    mib: float
    predicted_mib: float | None
    ratio: float
    low: float
    high: float
    note: str = ""


def draw_bench(title: str, curves: Mapping[str, Sequence[Point]], memory: str) -> bytes:
    """A PNG. `curves`: way (see `report.methods`) -> its points; `memory`: what is measured, for the axis."""
    return to_png(bench_figure(title, curves, memory))


def bench_figure(title: str, curves: Mapping[str, Sequence[Point]], memory: str) -> Figure:
    """The same, not yet a PNG."""
    figure, canvas = new_figure(_HEIGHT_INCHES)
    axes = figure.add_subplot()
    shown = {name: sorted(points, key=lambda one: one.mib) for name, points in curves.items() if points}
    for name, points in shown.items():
        _draw(axes, name, points)
    _set_axes(axes, [point for points in shown.values() for point in points], memory)
    left = tick_room(axes, canvas) / figure.bbox.width
    figure.subplots_adjust(
        left=left,
        right=0.96,
        bottom=(BOTTOM_INCHES + _REMARK_INCHES) / _HEIGHT_INCHES,
        top=1 - TOP_INCHES / _HEIGHT_INCHES,
    )
    head(axes, title, "time of a step, times plain PyTorch")
    remark = figure.text(left, 0.06 / _HEIGHT_INCHES, _REMARK, fontsize=LABEL_SIZE, color=NEUTRAL, va="bottom")
    fit(remark, (1 - left) * figure.bbox.width)
    drawn = {name: _covered(axes, name, points) for name, points in shown.items()}
    drawn["as plain"] = along(axes, [(x, 1.0) for x in axes.get_xlim()], 1.0)
    place(axes, canvas, _labels(axes, shown), drawn)
    return figure


def _draw(axes: Axes, name: str, points: Sequence[Point]) -> None:
    style = STYLES[name]
    xs, ys = [point.mib for point in points], [point.ratio for point in points]
    errors = [[point.ratio - point.low for point in points], [point.high - point.ratio for point in points]]
    axes.errorbar(xs, ys, errors, fmt="none", ecolor=style.colour, elinewidth=1.2, capsize=3, alpha=0.6, zorder=2)
    axes.plot(
        xs,
        ys,
        color=style.colour,
        marker=style.marker,
        linewidth=style.line_width,
        markersize=_MARKER_POINTS,
        markerfacecolor=style.colour if style.filled else "white",
        zorder=4 if style.filled else 3,
    )
    predicted = [(point.predicted_mib, point.ratio) for point in points if point.predicted_mib is not None]
    axes.plot(
        [x for x, _ in predicted],
        [y for _, y in predicted],
        color=style.colour,
        marker="o",
        linestyle="",
        markersize=_RING_POINTS,
        markerfacecolor="none",
        markeredgewidth=1.0,
        zorder=3,
    )


def _set_axes(axes: Axes, points: Sequence[Point], memory: str) -> None:
    most = max((max(point.mib, point.predicted_mib or 0.0) for point in points), default=1.0)
    low = min((point.low for point in points), default=1.0)
    high = max((point.high for point in points), default=1.0)
    spare = max(0.06, 0.18 * (high - low))
    axes.set_xlim(0, 1.12 * most)
    axes.set_ylim(low - spare, high + spare)
    axes.axhline(1.0, color=NEUTRAL, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}" if high - low > 1 else "{x:.2f}"))
    axes.set_xlabel(f"{memory}, MiB", fontsize=AXIS_SIZE)
    dress(axes)


def _labels(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> list[Label]:
    """Names beside their curves, and notes beside their points. Names first: they have the better places."""
    names, notes = [], []
    for name, points in curves.items():
        style = STYLES[name]
        at = [(point.mib, point.ratio) for point in points]
        places = from_the_middle(axes, at) if style.line_width else at[len(at) // 2 :] + at[: len(at) // 2]
        names.append(Label(name, name, places, style.colour, bold=True))
        notes += [Label(point.note, name, [xy], style.colour, _NOTE_SIZE) for point, xy in zip(points, at, strict=True)]
    names.sort(key=lambda label: len(label.at))  # those with the least choice first
    return [*names, *(note for note in notes if note.text)]


def _covered(axes: Axes, name: str, points: Sequence[Point]) -> Boxes:
    at = [(point.mib, point.ratio) for point in points]
    predicted = [(point.predicted_mib, point.ratio) for point in points if point.predicted_mib is not None]
    boxes = [around(axes, at, _MARKER_POINTS / 2 + 1), around(axes, predicted, _RING_POINTS / 2 + 1)]
    boxes += [along(axes, [(point.mib, point.low), (point.mib, point.high)], 3.0) for point in points]
    if STYLES[name].line_width:
        boxes.append(along(axes, at, STYLES[name].line_width / 2 + 1))
    return np.concatenate(boxes)
