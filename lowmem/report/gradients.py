"""The figures of gradients.csv: the norm of every layer's gradient, on its way back from the output, and over time.

They show why a plain net of 110 layers fails where a residual one does not. The layers are drawn in the order in which
the gradient meets them, so that the curves of a figure part where they end, at the input, beside their labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lowmem.report.chart import Chart, draw_charts, log_limits, to_png
from lowmem.report.naming import NamedRun, find_pairs
from lowmem.report.style import PAIR_HEIGHT_INCHES, Picture, Series
from lowmem.runs.rows import GradientRow, Gradients
from lowmem.runs.view import RunView

MOMENTS = 4  # of one run; of each run of a pair only the first and the last
_FAINTEST = 0.4  # opacity of the first moment
_REMARK = (
    "Above: L2 norm of the gradient of each convolution's and linear layer's weights (projections left out), from "
    "the output back to the input, at a few moments. Below: of the first and the last layer over time. Scales: log, "
    "for the norms go over many decades; a norm of zero is not drawn."
)


def draw_gradients(runs: Sequence[NamedRun]) -> list[Picture]:
    """A figure for each run with a gradients.csv, and one for each pair with and without shortcuts."""
    recorded = [run for run in runs if run.history.gradients.rows]
    pictures = []
    for run in recorded:
        file_name = "gradients.png" if len(recorded) == 1 else f"gradients_{run.file_name}.png"
        pictures.append(_draw([run], MOMENTS, file_name, f"Gradients of {run.label}"))
    for name, pair in find_pairs(recorded).items():
        pictures.append(_draw(pair, 2, f"gradients_pair_{name}.png", f"Gradients of Res{name} and CNN{name}"))
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


def _line(
    run: NamedRun, words: str, points: list[tuple[float, float]], *, alone: bool, width: float, opacity: float
) -> Series:
    label = words if alone else f"{run.label} {words}"
    label += f"  {points[-1][1]:.2g}" if points else ""
    return Series(points=points, style=replace(run.style, width=width, opacity=opacity), label=label)


def _depth_lines(runs: Sequence[NamedRun], count: int) -> list[Series]:
    lines = []
    for run in runs:
        rows = moments(run.history.gradients, count)
        few = len({row.epoch for row in rows if row.step > 1}) < sum(row.step > 1 for row in rows)
        for turn, row in enumerate(rows):
            share = turn / max(1, len(rows) - 1)
            when = "at first" if row.step == 1 else f"step {row.step:,}" if few else f"epoch {row.epoch}"
            width, opacity = 1.0 + 1.2 * share, _FAINTEST + (1 - _FAINTEST) * share
            points = by_depth(run.history.gradients, row)
            lines.append(_line(run, when, points, alone=len(runs) == 1, width=width, opacity=opacity))
    return [line for line in lines if line.points]


def _time_lines(runs: Sequence[NamedRun]) -> list[Series]:
    lines = []
    for run in runs:
        for layer, words, width, opacity in ((0, "first layer", 2.2, 1.0), (-1, "last layer", 1.2, 0.6)):
            points = over_time(run.history, layer)
            lines.append(_line(run, words, points, alone=len(runs) == 1, width=width, opacity=opacity))
    return [line for line in lines if line.points]


def _draw(runs: Sequence[NamedRun], count: int, file_name: str, title: str) -> Picture | None:
    depth, time = _depth_lines(runs, count), _time_lines(runs)
    if not (depth and time):
        return None
    x_title = "epoch" if all(run.history.last is not None for run in runs) else "step"
    charts = [
        _chart(f"{title}, by depth", "layers back from the output", depth),
        _chart("First and last layer over time", x_title, time),
    ]
    return Picture(file_name, to_png(draw_charts(charts, PAIR_HEIGHT_INCHES)), title, _REMARK)


def _chart(title: str, x_title: str, lines: Sequence[Series]) -> Chart:
    points = [point for line in lines for point in line.points]
    return Chart(
        title=title,
        x_title=x_title,
        y_title="gradient norm, log scale",
        series=lines,
        x_limit=1.01 * max(x for x, _ in points),
        y_limits=log_limits(y for _, y in points),
        log=True,
    )
