"""The picture of `lowmem bench --suite acceptance`: measured against predicted, memory above and time below."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lowmem.report.methods import ENGINE_COLOUR, PREDICTED_COLOUR
from lowmem.report.palette import NEUTRAL

# Bar and diamond repeat what the colours say.
_MEASURED, _PREDICTED = ENGINE_COLOUR, PREDICTED_COLOUR
_BAR_INCHES = 0.34


@dataclass(frozen=True)
class Bar:
    """A line of the picture; None is not known. `limit`: a mark that must not be passed."""

    label: str
    measured: float | None
    predicted: float | None = None
    limit: float | None = None
    note: str = ""


def draw_acceptance(title: str, memory: Sequence[Bar], seconds: Sequence[Bar]) -> bytes:
    """A PNG. `memory` in MiB, `seconds` of a step."""
    panels = [(bars, name) for bars, name in ((memory, "memory, MiB"), (seconds, "a training step, seconds")) if bars]
    counts = [len(bars) + 1.6 for bars, _ in panels] or [1.0]
    figure = Figure(figsize=(9, 1.6 + _BAR_INCHES * sum(counts)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    if panels:
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)
        for axes, (bars, name) in zip(grid[:, 0], panels, strict=True):
            _fill(axes, bars, name)
        _legend(figure, any(bar.limit is not None for bars, _ in panels for bar in bars))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _fill(axes: Axes, bars: Sequence[Bar], name: str) -> None:
    most = max((value for bar in bars for value in (bar.measured, bar.predicted) if value is not None), default=1.0)
    for row, bar in enumerate(bars):
        if bar.measured is not None:
            axes.barh(row, bar.measured, height=0.62, color=_MEASURED, zorder=2)
        if bar.predicted is not None:
            axes.plot(bar.predicted, row, "D", color=_PREDICTED, markeredgecolor="black", markersize=7, zorder=4)
        if bar.limit is not None and bar.limit < 1.6 * most:
            axes.plot([bar.limit, bar.limit], [row - 0.42, row + 0.42], color="black", linewidth=1.6, zorder=3)
        ends = [value for value in (bar.measured, bar.predicted) if value is not None]
        # Beyond a limit mark that stands close to the bar's end, or the text would lie on it.
        if bar.limit is not None and ends and max(ends) < bar.limit < 1.35 * most:
            ends.append(bar.limit)
        axes.annotate(
            _words(bar),
            (max(ends, default=0.0), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color="#333333",
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=10)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.75)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if most > 20 else "{x:,g}"))
    axes.set_xlabel(name, fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _words(bar: Bar) -> str:
    if bar.measured is None:
        return bar.note or "not measured"
    shown = f"{bar.measured:,.0f}" if bar.measured >= 100 else f"{bar.measured:.3g}"
    error = f" ({bar.measured / bar.predicted - 1:+.1%})" if bar.predicted else ""
    return f"{shown}{error}{'  ' + bar.note if bar.note else ''}"


def _legend(figure: Figure, with_limits: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(color=_MEASURED, label="measured"),
        Line2D([], [], marker="D", color=_PREDICTED, markeredgecolor="black", linestyle="", label="predicted"),
    ]
    if with_limits:
        handles.append(Line2D([], [], color="black", linewidth=1.6, label="budget"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10, frameon=False, labelcolor=NEUTRAL)
