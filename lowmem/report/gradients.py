"""The figures of gradients.csv: the norm of every layer's gradient, on its way back from the output, and over time.

They show why a plain net of 110 layers fails where a residual one does not. The layers are drawn in the order in which
the gradient meets them, so that the curves of a figure part where they end, at the input, beside their labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lowmem.config.schema import resolve_block
from lowmem.report.curves import Curve, curves_of, find_pairs
from lowmem.report.figures import Filled, Picture, lay_out
from lowmem.report.labels import EndLabel
from lowmem.report.naming import file_names
from lowmem.report.style import AXIS_SIZE, PAIR_HEIGHT_INCHES, dress, new_figure, to_png
from lowmem.runs.rows import GradientRow, Gradients
from lowmem.runs.view import RunView

MOMENTS = 4  # of one run; of each run of a pair only the first and the last
_FAINTEST = 0.4  # opacity of the first moment
_REMARK = (
    "Above: L2 norm of the gradient of each convolution's and linear layer's weights (projections left out), from "
    "the output back to the input, at a few moments. Below: of the first and the last layer over time. Scales: log, "
    "for the norms go over many decades; a norm of zero is not drawn."
)


@dataclass(frozen=True)
class Line:
    """A curve of a panel: points with a positive, finite value, and what is written at its end."""

    points: tuple[tuple[float, float], ...]
    label: str
    colour: str
    dashes: str | tuple[int, tuple[float, ...]]
    width: float
    opacity: float


def draw_gradients(histories: Sequence[RunView]) -> list[Picture]:
    """A figure for each run with a gradients.csv, and one for each pair with and without shortcuts."""
    curves = curves_of(histories)
    recorded = [curve for curve in curves if curve.history.gradients.rows]
    names = dict(zip((id(history) for history in histories), file_names(histories), strict=True))
    pictures = []
    for curve in recorded:
        name = names[id(curve.history)]
        file_name = "gradients.png" if len(recorded) == 1 else f"gradients_{name}.png"
        pictures.append(_draw([curve], MOMENTS, file_name, f"Gradients of {curve.label}"))
    for (depth, block), pair in find_pairs([curve.history for curve in recorded]).items():
        usual = block == resolve_block(f"res{depth}", None)
        name = f"{depth}" if usual else f"{depth}-{block}"
        both = [curve for curve in recorded if any(curve.history is one for one in pair)]
        pictures.append(_draw(both, 2, f"gradients_pair_{name}.png", f"Gradients of Res{name} and CNN{name}"))
    return [picture for picture in pictures if picture is not None]


def moments(gradients: Gradients, count: int) -> list[GradientRow]:
    """`count` rows from the first to the last, evenly in time; fewer if there are fewer."""
    rows = gradients.rows
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def by_depth(gradients: Gradients, row: GradientRow) -> list[tuple[float, float]]:
    """(layers back from the output, norm) of the layers on the main path; 1 is the last layer."""
    main = [norm for name, norm in zip(gradients.layers, row.norms, strict=True) if ".shortcut." not in name]
    return _drawable((float(place), norm) for place, norm in enumerate(reversed(main), start=1))


def over_time(history: RunView, layer: int) -> list[tuple[float, float]]:
    """(epochs done, norm) of one layer of `gradients.layers`; of a run without a whole epoch (steps done, norm)."""
    last = history.last
    scale = last.epoch / last.step if last is not None and last.step > 0 else 1.0
    return _drawable((row.step * scale, row.norms[layer]) for row in history.gradients.rows)


def _drawable(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and y > 0]


def _depth_lines(curves: Sequence[Curve], count: int) -> list[Line]:
    lines = []
    for curve in curves:
        rows = moments(curve.history.gradients, count)
        few = len({row.epoch for row in rows if row.step > 1}) < sum(row.step > 1 for row in rows)
        for turn, row in enumerate(rows):
            share = turn / max(1, len(rows) - 1)
            when = "at first" if row.step == 1 else f"step {row.step:,}" if few else f"epoch {row.epoch}"
            text = when if len(curves) == 1 else f"{curve.label} {when}"
            points = tuple(by_depth(curve.history.gradients, row))
            opacity = _FAINTEST + (1 - _FAINTEST) * share
            lines.append(Line(points, text, curve.colour, curve.dashes, 1.0 + 1.2 * share, opacity))
    return [line for line in lines if line.points]


def _time_lines(curves: Sequence[Curve]) -> list[Line]:
    lines = []
    for curve in curves:
        whose = "" if len(curves) == 1 else f"{curve.label} "
        for layer, what, width, opacity in ((0, "first layer", 2.2, 1.0), (-1, "last layer", 1.2, 0.6)):
            points = tuple(over_time(curve.history, layer))
            lines.append(Line(points, f"{whose}{what}", curve.colour, curve.dashes, width, opacity))
    return [line for line in lines if line.points]


def _draw(curves: Sequence[Curve], count: int, file_name: str, title: str) -> Picture | None:
    panels = [_depth_lines(curves, count), _time_lines(curves)]
    if not all(panels):
        return None
    figure, canvas = new_figure(PAIR_HEIGHT_INCHES)
    epochs = all(curve.history.last is not None for curve in curves)
    x_titles = ("layers back from the output", "epoch" if epochs else "step")
    filled = []
    for row, (lines, x_title, heading) in enumerate(
        zip(panels, x_titles, (f"{title}, by depth", "First and last layer over time"), strict=True), start=1
    ):
        axes = figure.add_subplot(2, 1, row)
        filled.append(Filled(axes, _fill(axes, lines, x_title), heading, "gradient norm, log scale"))
    lay_out(figure, canvas, filled)
    return Picture(file_name, to_png(figure), title, _REMARK)


def _fill(axes: Axes, lines: Sequence[Line], x_title: str) -> list[EndLabel]:
    """Draws the lines on a log axis; what is to be written at their ends."""
    for line in lines:
        x, y = zip(*line.points, strict=True)
        axes.plot(x, y, color=line.colour, linestyle=line.dashes, linewidth=line.width, alpha=line.opacity, zorder=3)
        if len(x) == 1:
            axes.plot(x, y, color=line.colour, marker="o", markersize=4.5, zorder=4)
    values = [y for line in lines for _, y in line.points]
    low, high = min(values), max(values)
    spare = max(high / low, 10.0) ** 0.06
    axes.set_yscale("log")
    axes.set_ylim(low / spare, high * spare)
    axes.set_xlim(0, max(x for line in lines for x, _ in line.points) * 1.01)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(x_title, fontsize=AXIS_SIZE)
    dress(axes)
    return [EndLabel(f"{line.label}  {line.points[-1][1]:.2g}", *line.points[-1], line.colour) for line in lines]
