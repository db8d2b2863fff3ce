"""The picture of `lowmem bench`: memory against time as measured, one curve a way of doing the step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import StrMethodFormatter
from matplotlib.transforms import Bbox

from lowmem.report.methods import STYLES
from lowmem.report.palette import NEUTRAL

_LABEL_SIZE, _POINT_SIZE = 12.0, 11.0
_PLACES = tuple(product((12, -12, 0), (0, 14, -14, 26, -26, 40, -40)))  # of a label, points from its marker


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
    figure = Figure(figsize=(7.2, 5.6), dpi=150, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = {name: sorted(points, key=lambda one: one.mib) for name, points in curves.items() if points}
    for name, points in shown.items():
        _draw(axes, name, points)
    _set_axes(axes, [point for points in shown.values() for point in points], memory)
    axes.set_title(title, fontsize=13, loc="left", fontweight="bold")
    figure.text(
        0.01,
        0.0,
        "Bars: fastest and slowest of the rounds. Rings: the memory as predicted.",
        fontsize=10.5,
        color=NEUTRAL,
        va="bottom",
    )
    axes.set_xlabel(axes.get_xlabel() + "\n ", fontsize=12)  # room for the line above
    canvas.draw()
    _label(axes, canvas, shown)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
        markersize=8,
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
        markersize=15,
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
    axes.set_xlabel(f"{memory}, MiB", fontsize=12)
    axes.set_ylabel("time of a step, times plain PyTorch", fontsize=12)
    axes.tick_params(labelsize=11.5, colors="#333333")
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(axes: Axes, canvas: FigureCanvasAgg, curves: Mapping[str, Sequence[Point]]) -> None:
    """Names beside their points, and notes, each where it covers least: no legend to look up."""
    wanted = []
    for name, points in curves.items():
        at = len(points) // 2 if len(points) > 1 else 0
        wanted.append((name, points[at], _LABEL_SIZE, True))
        wanted += [(point.note, point, _POINT_SIZE, False) for point in points if point.note]
    taken = [_marker_box(axes, point) for points in curves.values() for point in points]
    taken += _line_boxes(axes, curves)
    names = {id(point): name for name, points in curves.items() for point in points}
    # Names before notes: they have the better places.
    for text, point, size, is_name in sorted(wanted, key=lambda one: not one[3]):
        taken.append(_place(axes, canvas, text, point, size, is_name, STYLES[names[id(point)]].colour, taken))


def _marker_box(axes: Axes, point: Point) -> Bbox:
    x, y = axes.transData.transform((point.mib, point.ratio))
    _, low = axes.transData.transform((point.mib, point.low))
    _, high = axes.transData.transform((point.mib, point.high))
    half = 9 * axes.figure.dpi / 72
    return Bbox([[x - half, min(y - half, low)], [x + half, max(y + half, high)]])


def _line_boxes(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> list[Bbox]:
    """Small boxes along the lines, which labels keep off too."""
    boxes = []
    for name, points in curves.items():
        if not STYLES[name].line_width:
            continue
        for one, following in pairwise(points):
            for step in range(1, 12):
                share = step / 12
                x, y = axes.transData.transform(
                    (one.mib + share * (following.mib - one.mib), one.ratio + share * (following.ratio - one.ratio))
                )
                boxes.append(Bbox([[x - 4, y - 4], [x + 4, y + 4]]))
    return boxes


def _place(
    axes: Axes,
    canvas: FigureCanvasAgg,
    text: str,
    point: Point,
    size: float,
    bold: bool,
    colour: str,
    taken: Sequence[Bbox],
) -> Bbox:
    """Writes the text at the place of least overlap -> the box that it takes."""
    best: tuple[float, Bbox] | None = None
    drawn = axes.annotate(
        text,
        (point.mib, point.ratio),
        xytext=(0, 0),
        textcoords="offset points",
        color=colour,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        va="center",
        parse_math=False,
        zorder=6,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
    drawn.set_in_layout(False)
    frame = axes.get_window_extent()
    chosen = _PLACES[0]
    for x, y in _PLACES:
        drawn.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
        drawn.set_position((x, y))
        box = drawn.get_window_extent(canvas.get_renderer())
        covered = sum(_overlap(box, other) for other in taken)
        covered += 4 * (box.width * box.height - _overlap(box, frame)) + 0.5 * (abs(x) + abs(y))
        if best is None or covered < best[0]:
            best, chosen = (covered, box), (x, y)
    drawn.set_horizontalalignment("left" if chosen[0] > 0 else "right" if chosen[0] < 0 else "center")
    drawn.set_position(chosen)
    assert best is not None
    return best[1]


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0
