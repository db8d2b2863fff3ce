"""The pictures of ways to do a training step: memory against time as planned (`lowmem plan --curve`) and as measured
(`lowmem bench`), and measured against predicted (`lowmem bench --suite acceptance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowmem.core.units import MIB
from lowmem.report import style
from lowmem.report.agg import Axes, Line2D, MaxNLocator, Patch, StrMethodFormatter, drawn_alike
from lowmem.report.chart import Chart, draw_charts, dress, fit, new_figure, to_bytes
from lowmem.report.style import LineStyle, Series

_MANY = 50  # points that are a line, and not single plans
_FAR = 1.4  # a budget beyond this many times the most that is drawn would leave the curves no room: an arrow
_BUDGET_LINE, _BUDGET_TEXT = LineStyle("#888888", "--", 1.0), LineStyle("#555555", width=0.0)


@drawn_alike
def draw_memory_curve(
    title: str, curves: Mapping[str, Sequence[tuple[int, float]]], budget_bytes: int, kind: str = "png"
) -> bytes:
    """`curves`: name -> (peak bytes, share of time more than plain autograd), memory rising. `kind`: one of
    `style.FORMATS`."""
    shown = {name: [(size / MIB, 100 * share) for size, share in points] for name, points in curves.items() if points}
    budget = budget_bytes / MIB
    points = [point for points in shown.values() for point in points]
    most, top = max((x for x, _ in points), default=budget), max(1.0, *(y for _, y in points), 0.0)
    right = 1.06 * (max(most, budget) if budget <= _FAR * most else most)
    low, high = -0.035 * top, 1.08 * top
    methods = [_method(name, points, 7.0 if len(points) < _MANY else 0.0) for name, points in shown.items()]
    # The first is the subject: no line lies on it. A single point would vanish under a line.
    lines, single = ([one for one in methods if bool(one.style.width) is line] for line in (True, False))
    # Beside the budget's line from its top downwards, or at the right edge.
    words = f"budget {budget:,.0f} MiB" + (" →" if budget > right else "")
    places = [(min(budget, right), high - share * (high - low)) for share in np.linspace(0.04, 0.96, 12)]
    said = Series(places, _BUDGET_TEXT, words, inside=True, of="budget")
    line = Series([(budget, low), (budget, high)] if budget <= right else [], _BUDGET_LINE, of="budget")
    chart = Chart(
        title=title,
        x_title="peak of the step's tensors, MiB",
        y_title="% more time than plain PyTorch, predicted",
        series=[said, line, *lines[::-1], *single],
        x_limit=right,
        y_limits=(low, high),
    )
    return to_bytes(draw_charts([chart]), kind)


def _method(name: str, points: Sequence[tuple[float, float]], marker_size: float) -> Series:
    """`marker_size` 0: the line alone."""
    look = style.METHOD_STYLES[name]
    look = replace(look, marker=look.marker if marker_size else "", marker_size=marker_size)
    return Series(points, look, name.replace(" with ", "\nwith "), inside=True)  # in two lines: there is little room


_BENCH_HEIGHT_INCHES = 4.9  # more than most: up to seven ways, some close together
_NOTE_SIZE = style.LEAST_SIZE + 1
_BENCH_REMARK = "Bars: fastest and slowest of the rounds. Rings: the memory as predicted."


@dataclass(frozen=True)
class MeasuredPoint:
    """A measured step: MiB at its peak, the same as predicted (None: not known), its time as a multiple of plain's
    with the range over the rounds, and what is to be written beside it ("": nothing)."""

    mib: float
    predicted_mib: float | None
    ratio: float
    low: float
    high: float
    note: str = ""


@drawn_alike
def draw_bench(title: str, curves: Mapping[str, Sequence[MeasuredPoint]], memory: str) -> bytes:
    """A PNG. `curves`: way (see style.METHOD_STYLES) -> its points; `memory`: what is measured, for the axis."""
    points = [point for points in curves.values() for point in points]
    right = 1.12 * max((max(point.mib, point.predicted_mib or 0.0) for point in points), default=1.0)
    low, high = min((point.low for point in points), default=1.0), max((point.high for point in points), default=1.0)
    spare = max(0.06, 0.18 * (high - low))
    plain = LineStyle(style.NEUTRAL, style.DOTTED, 1.0)
    series = [Series([(0, 1.0), (right, 1.0)], plain, of="as plain")]
    rings, lines, notes = [], [], []
    for name, of_one in curves.items():
        colour = style.METHOD_STYLES[name].colour
        bar = LineStyle(colour, width=1.2, marker="_", marker_size=6.0, opacity=0.6)
        ring = LineStyle(colour, width=0.0, marker="o", marker_size=15.0, face="none")
        ordered = sorted(of_one, key=lambda point: point.mib)
        lines.append(_method(name, [(point.mib, point.ratio) for point in ordered], 8.0))
        for point in ordered:
            series.append(Series([(point.mib, point.low), (point.mib, point.high)], bar, of=name))
            if point.predicted_mib is not None:
                rings.append(Series([(point.predicted_mib, point.ratio)], ring, of=name))
            at, look = [(point.mib, point.ratio)], LineStyle(colour, width=0.0)
            notes.append(Series(at if point.note else [], look, point.note, True, name, _NOTE_SIZE))
    chart = Chart(
        title=title,
        x_title=f"{memory}, MiB",
        y_title="time of a step, times plain PyTorch",
        series=[*series, *rings, *lines, *notes],
        x_limit=right,
        y_limits=(low - spare, high + spare),
    )
    return to_bytes(draw_charts([chart], _BENCH_HEIGHT_INCHES, _BENCH_REMARK))


_ROW_INCHES = 0.5  # a line of words, and the bar under it: beside it they would take half of a phone's width
_TITLE_INCHES, _AXIS_INCHES, _LEGEND_INCHES = 0.75, 0.7, 0.4
_SIDE_INCHES = 0.12
_DIAMOND: dict[str, Any] = {"marker": "D", "color": style.PREDICTED, "markeredgecolor": "black"}
_NUMBERS_ROOM = 1.5  # the axis in terms of the longest bar, at whose end its number stands


@dataclass(frozen=True)
class Bar:
    """A line of the picture; None is not known. `limit`: a mark that must not be passed."""

    label: str
    measured: float | None
    predicted: float | None = None
    limit: float | None = None
    note: str = ""


@drawn_alike
def draw_acceptance(title: str, memory: Sequence[Bar], seconds: Sequence[Bar]) -> bytes:
    """A PNG, memory above and time below. `memory` in MiB, `seconds` of a step."""
    panels = [(bars, name) for bars, name in ((memory, "memory, MiB"), (seconds, "a training step, seconds")) if bars]
    height = _TITLE_INCHES + _LEGEND_INCHES + sum(_ROW_INCHES * len(bars) + _AXIS_INCHES for bars, _ in panels)
    figure = new_figure(height)
    side = _SIDE_INCHES / style.WIDTH_INCHES
    for number, line in enumerate(title.split("\n")):
        drawn = figure.text(side, 1 - (0.1 + 0.25 * number) / height, line, va="top", parse_math=False)
        drawn.set(fontsize=style.AXIS_SIZE) if number else drawn.set(fontsize=style.TITLE_SIZE, fontweight="bold")
        fit(drawn, figure.bbox.width * (1 - side))
    top = height - _TITLE_INCHES
    for bars, name in panels:
        top -= _ROW_INCHES * len(bars)
        axes = figure.add_axes((side, top / height, 1 - 2 * side, _ROW_INCHES * len(bars) / height))
        _fill_bars(axes, bars, name)
        top -= _AXIS_INCHES
    # Bar and diamond repeat what the colours say.
    handles: list[Patch | Line2D] = [
        Patch(color=style.MEASURED, label="measured"),
        Line2D([], [], linestyle="", label="predicted", **_DIAMOND),
    ]
    if any(bar.limit is not None for bars, _ in panels for bar in bars):
        handles.append(Line2D([], [], color="black", linewidth=1.6, label="budget"))
    if panels:
        look = {"fontsize": style.LABEL_SIZE, "frameon": False, "labelcolor": style.NEUTRAL}
        figure.legend(handles=handles, loc="lower center", ncols=3, **look)
    return to_bytes(figure)


def _fill_bars(axes: Axes, bars: Sequence[Bar], name: str) -> None:
    most = max(value or 0.0 for bar in bars for value in (bar.measured, bar.predicted)) or 1.0
    axes.set_xlim(0, most * _NUMBERS_ROOM)
    axes.set_ylim(len(bars) - 0.6, -0.75)
    for row, bar in enumerate(bars):
        end = max(bar.measured or 0.0, bar.predicted or 0.0)
        if bar.measured is not None:
            axes.barh(row, bar.measured, height=0.44, color=style.MEASURED, zorder=2)
        if bar.predicted is not None:
            axes.plot(bar.predicted, row, markersize=7, zorder=4, **_DIAMOND)
        if bar.limit is not None and bar.limit < 1.2 * most:
            axes.plot([bar.limit, bar.limit], [row - 0.3, row + 0.3], color="black", linewidth=1.6, zorder=3)
            # The number beyond a mark that stands close to the bar's end, or the text would lie on it.
            if bar.measured is not None or bar.predicted is not None:
                end = max(end, bar.limit)
        beside = axes.annotate(_number(bar), (end, row), xytext=(8, 0), textcoords="offset points")
        beside.set(va="center", fontsize=style.LABEL_SIZE, color="#333333")
        label = " ".join(f"{bar.label}: {bar.note}".split()) if bar.note else ", ".join(bar.label.split("\n"))
        above = axes.annotate(label, (0, row - 0.27), fontsize=style.LABEL_SIZE, va="bottom", parse_math=False)
        fit(above, axes.get_window_extent().width)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if most > 20 else "{x:,g}"))
    axes.set_xlabel(name, fontsize=style.AXIS_SIZE)
    dress(axes, grid="x")


def _number(bar: Bar) -> str:
    if bar.measured is None:
        return "not measured"
    shown = f"{bar.measured:,.0f}" if bar.measured >= 100 else f"{bar.measured:.3g}"
    return f"{shown} ({bar.measured / bar.predicted - 1:+z.1%})" if bar.predicted else shown
