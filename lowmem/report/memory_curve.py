"""The picture of `lowmem plan --curve`: memory against time, one curve a method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lowmem.report.methods import STYLES
from lowmem.units import MIB

_MANY = 50  # points that are a line, and not single plans


def draw_memory_curve(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], budget_bytes: int) -> bytes:
    """A PNG. `curves`: name -> (peak bytes, share of time more than plain autograd), memory rising."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
        fontsize=11,
        color="#555555",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=-1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("peak of the step's tensors, MiB", fontsize=12)
    axes.set_ylabel("more time than plain PyTorch, % (predicted)", fontsize=12)
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=11, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
