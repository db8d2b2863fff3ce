"""Line charts, one above another: every line with its name at it, as a picture's bytes.

Drawn with matplotlib's objects on an Agg canvas, never through pyplot: no window, no global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem.report import style
from lowmem.report.agg import (
    Axes,
    ConstrainedLayoutEngine,
    Figure,
    FigureCanvasAgg,
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
    Text,
)
from lowmem.report.labels import spread_ends, write_at_ends, write_inside
from lowmem.report.style import Series

_PAD_INCHES = 0.12
_INK, _GRID = "#333333", "#e3e3e3"
_LINES_ORDER = 3.0  # above the grid, under the labels
# Of a log axis, the coarsest first: within a decade. Fewer labels than `_LEAST_TICKS` tell no scale.
_LOG_STEPS, _LEAST_TICKS, _MOST_POWERS = ((1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), 3, 9


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over axes of which the horizontal one begins at 0. Later lines lie on earlier ones."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    x_limit: float
    y_limits: tuple[float, float]
    log: bool = False


def log_limits(values: Iterable[float]) -> tuple[float, float]:
    """Limits of a log axis with some room above and below the values, which must be positive."""
    known = list(values)
    low, high = min(known), max(known)
    spare = max(high / low, 2.0) ** 0.08
    return low / spare, high * spare


def draw_charts(charts: Sequence[Chart], height_inches: float = style.HEIGHT_INCHES, remark: str = "") -> Figure:
    """The charts above each other, as wide as their labels leave room for; `remark` stands under the last."""
    figure = new_figure(height_inches)
    below = figure.supxlabel(remark, ha="left", fontsize=style.LABEL_SIZE, color=style.NEUTRAL)
    written = []
    for row, chart in enumerate(charts, start=1):
        axes = figure.add_subplot(len(charts), 1, row)
        series = [one for one in chart.series if one.points]
        _draw_lines(axes, series)
        headings = _set_axes(axes, chart)
        written.append((axes, series, write_at_ends(axes, series), headings))
    ConstrainedLayoutEngine(w_pad=_PAD_INCHES, h_pad=_PAD_INCHES, hspace=0.05).execute(figure)
    for axes, series, texts, headings in written:
        for heading in headings:
            fit(heading, figure.bbox.width - axes.bbox.x0)
        spread_ends(axes, texts)
        write_inside(axes, series)
        below.set_x(axes.get_position().x0)
    fit(below, (1 - below.get_position()[0]) * figure.bbox.width)
    return figure


def _draw_lines(axes: Axes, series: Sequence[Series]) -> None:
    for order, one in enumerate(series):
        look = one.style
        axes.plot(
            [x for x, _ in one.points],
            [y for _, y in one.points],
            color=look.colour,
            linestyle=look.dashes if look.width else "none",
            linewidth=look.width,
            # A line of one point would not be seen.
            marker=look.marker or ("o" if look.width and len(one.points) == 1 else ""),
            markersize=look.marker_size,
            markerfacecolor=look.face or look.colour,
            alpha=look.opacity,
            zorder=_LINES_ORDER + order / len(series),
            solid_capstyle="round",
        )


def _set_axes(axes: Axes, chart: Chart) -> tuple[Text, Text]:
    """Returns what stands above: the title, and what the vertical axis shows. Along the side that would take the
    curves' room and have to be read with the head on the shoulder."""
    axes.set_xlim(0, chart.x_limit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 4, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(chart.x_title, fontsize=style.AXIS_SIZE)
    look = {"fontsize": style.TITLE_SIZE, "fontweight": "bold", "parse_math": False}
    title = axes.set_title(chart.title, look, loc="left", pad=22)
    fit(title, 0.88 * style.WIDTH_INCHES * style.DPI)  # roughly: it takes part in the layout
    said = axes.annotate(chart.y_title, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points")
    said.set(fontsize=style.AXIS_SIZE, color="#555555", in_layout=False)
    if chart.log:
        axes.set_yscale("log")
        ticks = log_ticks(*chart.y_limits)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    if not chart.log or ticks[-1] < 1e6 * ticks[0]:  # beyond, powers of ten
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axes.set_ylim(*chart.y_limits)
    dress(axes)
    return title, said


def log_ticks(low: float, high: float) -> list[float]:
    """Where a log axis has numbers: at powers of ten if there are some, else at as many steps between as it takes, so
    that there are several wherever it begins and ends."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    within = [power for power in powers if low <= power <= high]
    if len(within) > _LEAST_TICKS:
        return within[:: math.ceil(len(within) / _MOST_POWERS)]
    for steps in _LOG_STEPS:
        within = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(within) >= _LEAST_TICKS:
            return within
    even = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in even if low <= value <= high]


def format_tick(value: float) -> str:
    """`0.005`, `1`, `2,000`; `1e7`, `5e-6` where zeros would have to be counted."""
    shown = f"{value:,.6f}".rstrip("0").rstrip(".") if 1e-4 <= abs(value) < 1e7 or value == 0 else f"{value:g}"
    return re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", shown)


def new_figure(height_inches: float) -> Figure:
    figure = Figure(figsize=(style.WIDTH_INCHES, height_inches), dpi=style.DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, *, grid: Literal["both", "x"] = "both") -> None:
    """Faint grid behind the data, no frame on the sides where no axis is, legible numbers."""
    axes.tick_params(labelsize=style.TICK_SIZE, colors=_INK)
    axes.grid(True, which="major", axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", *(("left",) if grid == "x" else ())):
        axes.spines[side].set_visible(False)


def fit(drawn: Text, room: float) -> None:
    """Makes a text smaller, and then shorter, until it takes `room` pixels at the most."""
    room -= _PAD_INCHES * style.DPI
    size, shown = float(drawn.get_fontsize()), drawn.get_text()
    while drawn.get_window_extent().width > room and len(shown) > 1:
        if size > style.LEAST_SIZE:
            size -= 0.5
            drawn.set_fontsize(size)
        else:
            shown = shown[:-1]
            drawn.set_text(f"{shown.rstrip()}…")


# Otherwise the drawing library's name and version go into it, and the time.
_BARE: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}


def to_bytes(figure: Figure, kind: str = "png") -> bytes:
    """As one of `style.FORMATS`; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=_BARE.get(kind))
    return buffer.getvalue()
