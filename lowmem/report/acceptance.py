"""The picture of `lowmem bench --suite acceptance`: measured against predicted, memory above and time below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lowmem.report.methods import ENGINE_COLOUR, PREDICTED_COLOUR
from lowmem.report.palette import NEUTRAL
from lowmem.report.style import AXIS_SIZE, LABEL_SIZE, TITLE_SIZE, WIDTH_INCHES, dress, fit, new_figure, to_png

# Bar and diamond repeat what the colours say.
_MEASURED, _PREDICTED = ENGINE_COLOUR, PREDICTED_COLOUR
_ROW_INCHES = 0.5  # a line of words, and the bar under it: beside it they would take half of a phone's width
_TITLE_INCHES, _AXIS_INCHES, _LEGEND_INCHES = 0.75, 0.7, 0.4
_SIDE_INCHES = 0.12
_NUMBERS_ROOM = 1.5  # the axis in terms of the longest bar, at whose end its number stands


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
    heights = [_ROW_INCHES * len(bars) for bars, _ in panels]
    height = _TITLE_INCHES + sum(heights) + _AXIS_INCHES * len(panels) + _LEGEND_INCHES
    figure, _ = new_figure(height)
    words = title.split("\n")
    for number, line in enumerate(words):
        style = {"fontsize": TITLE_SIZE, "fontweight": "bold"} if number == 0 else {"fontsize": AXIS_SIZE}
        at = 1 - (0.1 + 0.25 * number) / height
        drawn = figure.text(_SIDE_INCHES / WIDTH_INCHES, at, line, va="top", parse_math=False, **style)
        fit(drawn, figure.bbox.width * (1 - _SIDE_INCHES / WIDTH_INCHES))
    top = height - _TITLE_INCHES
    for (bars, name), rows in zip(panels, heights, strict=True):
        share = 1 - 2 * _SIDE_INCHES / WIDTH_INCHES
        axes = figure.add_axes((_SIDE_INCHES / WIDTH_INCHES, (top - rows) / height, share, rows / height))
        _fill(axes, bars, name)
        top -= rows + _AXIS_INCHES
    if panels:
        _legend(figure, any(bar.limit is not None for bars, _ in panels for bar in bars))
    return to_png(figure)


def _fill(axes: Axes, bars: Sequence[Bar], name: str) -> None:
    known = [value for bar in bars for value in (bar.measured, bar.predicted) if value is not None]
    most = max(known, default=1.0) or 1.0
    axes.set_xlim(0, most * _NUMBERS_ROOM)
    axes.set_ylim(len(bars) - 0.6, -0.75)
    for row, bar in enumerate(bars):
        if bar.measured is not None:
            axes.barh(row, bar.measured, height=0.44, color=_MEASURED, zorder=2)
        if bar.predicted is not None:
            axes.plot(bar.predicted, row, "D", color=_PREDICTED, markeredgecolor="black", markersize=7, zorder=4)
        if bar.limit is not None and bar.limit < 1.2 * most:
            axes.plot([bar.limit, bar.limit], [row - 0.3, row + 0.3], color="black", linewidth=1.6, zorder=3)
        ends = [value for value in (bar.measured, bar.predicted) if value is not None]
        # Beyond a limit mark that stands close to the bar's end, or the text would lie on it.
        if bar.limit is not None and ends and max(ends) < bar.limit < 1.2 * most:
            ends.append(bar.limit)
        beside = axes.annotate(_number(bar), (max(ends, default=0.0), row), xytext=(8, 0), textcoords="offset points")
        beside.set(va="center", fontsize=LABEL_SIZE, color="#333333")
        label = " ".join(f"{bar.label}: {bar.note}".split()) if bar.note else ", ".join(bar.label.split("\n"))
        above = axes.annotate(label, (0, row - 0.27), fontsize=LABEL_SIZE, va="bottom", parse_math=False)
        fit(above, axes.get_window_extent().width)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if most > 20 else "{x:,g}"))
    axes.set_xlabel(name, fontsize=AXIS_SIZE)
    dress(axes, grid="x")


def _number(bar: Bar) -> str:
    if bar.measured is None:
        return "not measured"
    shown = f"{bar.measured:,.0f}" if bar.measured >= 100 else f"{bar.measured:.3g}"
    return f"{shown} ({bar.measured / bar.predicted - 1:+.1%})" if bar.predicted else shown


def _legend(figure: Figure, with_limits: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(color=_MEASURED, label="measured"),
        Line2D([], [], marker="D", color=_PREDICTED, markeredgecolor="black", linestyle="", label="predicted"),
    ]
    if with_limits:
        handles.append(Line2D([], [], color="black", linewidth=1.6, label="budget"))
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=LABEL_SIZE, frameon=False, labelcolor=NEUTRAL)
