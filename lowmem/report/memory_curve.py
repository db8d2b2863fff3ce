"""The picture of `lowmem plan --curve`: memory against time, one curve a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lowmem.report.labels import tick_room
from lowmem.report.methods import STYLES
from lowmem.report.style import (
    AXIS_SIZE,
    BOTTOM_INCHES,
    HEIGHT_INCHES,
    LABEL_SIZE,
    TOP_INCHES,
    dress,
    head,
    new_figure,
    to_png,
)
from lowmem.units import MIB

_MANY = 50  # points that are a line, and not single plans


def draw_memory_curve(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], budget_bytes: int) -> bytes:
    """A PNG. `curves`: name -> (peak bytes, share of time more than plain autograd), memory rising."""
    figure, canvas = new_figure()
    axes = figure.add_subplot()
    for name, points in curves.items():
        if not points:
            continue
        style = STYLES[name]
        marker = style.marker if len(points) < _MANY else ""
        xs, ys = [size / MIB for size, _ in points], [100 * share for _, share in points]
        axes.plot(xs, ys, color=style.colour, marker=marker, linewidth=style.line_width, label=name, zorder=3)
    axes.axvline(budget_bytes / MIB, color="#888888", linestyle="--", linewidth=1)
    axes.annotate(
        f"budget {budget_bytes / MIB:,.0f} MiB",
        (budget_bytes / MIB, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=LABEL_SIZE,
        color="#555555",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=-1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("peak of the step's tensors, MiB", fontsize=AXIS_SIZE)
    dress(axes)
    axes.legend(fontsize=LABEL_SIZE, frameon=False)
    figure.subplots_adjust(
        left=tick_room(axes, canvas) / figure.bbox.width,
        right=0.96,
        bottom=BOTTOM_INCHES / HEIGHT_INCHES,
        top=1 - TOP_INCHES / HEIGHT_INCHES,
    )
    head(axes, title, "% more time than plain PyTorch, predicted")
    return to_png(figure)
