"""The picture of `lowmem plan --curve`: memory against time, one curve a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lowmem.core.units import MIB
from lowmem.report.labels import tick_room
from lowmem.report.methods import STYLES
from lowmem.report.placing import Boxes, Label, along, around, from_the_middle, place
from lowmem.report.style import AXIS_SIZE, BOTTOM_INCHES, HEIGHT_INCHES, TOP_INCHES, dress, head, new_figure, to_png

Points = Sequence[tuple[float, float]]

_MANY = 50  # points that are a line, and not single plans
_MARKER_POINTS = 7.0
_FAR = 1.4  # a budget beyond this many times the most that is drawn would leave the curves no room: an arrow
_BUDGET, _BUDGET_COLOUR = "budget", "#555555"


def draw_memory_curve(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], budget_bytes: int) -> bytes:
    """A PNG. `curves`: name -> (peak bytes, share of time more than plain autograd), memory rising."""
    return to_png(memory_figure(title, curves, budget_bytes))


def memory_figure(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], budget_bytes: int) -> Figure:
    """The same, not yet a PNG."""
    figure, canvas = new_figure()
    axes = figure.add_subplot()
    shown = {name: [(size / MIB, 100 * share) for size, share in points] for name, points in curves.items() if points}
    for order, (name, points) in enumerate(shown.items()):
        style = STYLES[name]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=style.colour,
            marker=style.marker if len(points) < _MANY else "",
            markersize=_MARKER_POINTS,
            linewidth=style.line_width,
            solid_capstyle="round",
            # The first is the subject: nothing lies on it, but a single point would vanish under it.
            zorder=3 + (len(shown) - order) / (1 + len(shown)) if style.line_width else 5,
        )
    budget = budget_bytes / MIB
    _set_axes(axes, [point for points in shown.values() for point in points], budget)
    figure.subplots_adjust(
        left=tick_room(axes, canvas) / figure.bbox.width,
        right=0.96,
        bottom=BOTTOM_INCHES / HEIGHT_INCHES,
        top=1 - TOP_INCHES / HEIGHT_INCHES,
    )
    head(axes, title, "% more time than plain PyTorch, predicted")
    drawn = {name: _covered(axes, name, points) for name, points in shown.items()}
    words, places = _budget_words(axes, budget)
    if budget <= axes.get_xlim()[1]:
        axes.axvline(budget, color="#888888", linestyle="--", linewidth=1, zorder=2)
        drawn[_BUDGET] = along(axes, [(budget, y) for y in axes.get_ylim()], 1.0)
    labels = [
        Label(
            name,
            name,
            from_the_middle(axes, points) if STYLES[name].line_width else points,
            STYLES[name].colour,
            bold=STYLES[name].line_width > 2,
        )
        for name, points in shown.items()
    ]
    labels.sort(key=lambda label: len(label.at))  # those with the least choice first
    place(axes, canvas, [Label(words, _BUDGET, places, _BUDGET_COLOUR), *labels], drawn)
    return figure


def _set_axes(axes: Axes, points: Points, budget: float) -> None:
    most = max((x for x, _ in points), default=budget)
    top = max((y for _, y in points), default=0.0)
    axes.set_xlim(0, 1.06 * (max(most, budget) if budget <= _FAR * most else most))
    axes.set_ylim(-0.035 * max(top, 1.0), 1.08 * max(top, 1.0))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("peak of the step's tensors, MiB", fontsize=AXIS_SIZE)
    dress(axes)


def _covered(axes: Axes, name: str, points: Points) -> Boxes:
    style = STYLES[name]
    boxes = [around(axes, points, _MARKER_POINTS / 2 + 1)] if len(points) < _MANY else []
    if style.line_width:
        boxes.append(along(axes, points, style.line_width / 2 + 1))
    return np.concatenate(boxes)


def _budget_words(axes: Axes, budget: float) -> tuple[str, Points]:
    """And where they may stand: beside the line from its top downwards, or at the right edge."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    words = f"budget {budget:,.0f} MiB" if budget <= right else f"budget {budget:,.0f} MiB →"
    return words, [(min(budget, right), high - share * (high - low)) for share in np.linspace(0.04, 0.96, 24)]
