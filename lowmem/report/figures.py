"""The figures of runs: training loss, test error, one for each pair Res-n / CNN-n, the gradients, and a fork's learning
rate.

Gradients show why a plain net of 110 layers fails where a residual one does not. The layers are drawn in the order in
which the gradient meets them, so that the curves of a figure part where they end, at the input, beside their labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from lowmem.core.units import format_number
from lowmem.report import style
from lowmem.report.agg import drawn_alike
from lowmem.report.chart import Chart, draw_charts, log_limits, to_bytes
from lowmem.report.naming import NamedRun, common_classes, find_pairs
from lowmem.report.style import LineStyle, Picture, Points, Series
from lowmem.runs.rows import EpochRow, GradientRow, GradientRows
from lowmem.runs.view import RunView

FEW_EPOCHS = 25  # up to here each epoch is marked
FEW_STEPS = 1_000  # up to here single steps can be told apart, and are drawn a little stronger
LOG_FROM_RATIO = 4.0  # a linear axis hides what differs by less than a quarter of the largest value
_RATE_HEIGHT_INCHES = 3.6
_LOSSES_EXPLAINED = "Loss: the mean of each epoch, over the faint loss of single steps."


@dataclass(frozen=True)
class Panel:
    """What a chart shows: which column of metrics.csv, in what words and numbers."""

    title: str
    y_title: str
    value: Callable[[EpochRow], float | None]
    chance: Callable[[int], float]  # by the number of classes
    chance_text: Callable[[int], str]
    number: Callable[[float], str]  # of the value at a label


LOSS = Panel(
    title="Training loss",
    y_title="cross-entropy (nats)",
    value=lambda row: row.train_loss,
    chance=lambda classes: math.log(classes),
    chance_text=lambda classes: f"chance  {math.log(classes):.3f}",
    number=lambda value: format_number(value, 3 if value >= 1 else 2),
)
TEST_ERROR = Panel(
    title="Test error",
    y_title="% of the test pictures",
    value=lambda row: row.test_error_pct,
    chance=lambda classes: 100 * (1 - 1 / classes),
    chance_text=lambda classes: f"chance  {100 * (1 - 1 / classes):.4g} %",
    number=lambda value: f"{value:.2f} %",
)


@drawn_alike
def draw_training(runs: Sequence[NamedRun]) -> list[Picture]:
    """loss.png, test_error.png and the pairs, as far as there is anything to draw."""
    pictures = [*_draw(runs, (LOSS,), "loss.png", LOSS.title)]
    pictures += _draw(runs, (TEST_ERROR,), "test_error.png", TEST_ERROR.title)
    for name, pair in find_pairs(runs).items():
        pictures += _draw(pair, (LOSS, TEST_ERROR), f"pair_{name}.png", f"Res{name} against CNN{name}")
    return pictures


def epoch_points(history: RunView, panel: Panel) -> list[tuple[float, float]]:
    """(epoch, value) of every epoch with a finite value."""
    return _finite((row.epoch, panel.value(row)) for row in history.epochs)


def step_losses(history: RunView) -> list[tuple[float, float]]:
    """(epoch, loss) of logged steps; an epoch's mean stands at its end, so a step at its share of it."""
    last = history.last
    if last is None or last.step <= 0:
        return []
    rows = (row for row in history.steps if row.step <= last.step)
    return _finite((row.step * last.epoch / last.step, row.loss) for row in rows)


def _finite(points: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _draw(runs: Sequence[NamedRun], panels: Sequence[Panel], file_name: str, title: str) -> list[Picture]:
    """One, or none if there is nothing to draw."""
    shown = [[run for run in runs if epoch_points(run.history, panel)] for panel in panels]
    if not any(shown):
        return []
    height = style.HEIGHT_INCHES if len(panels) == 1 else style.PAIR_HEIGHT_INCHES
    height = max(height, len(panels) * (1.3 + 0.22 * max(map(len, shown))))  # taller instead of crowded labels
    x_limit, classes = max(1, *(run.history.epochs_done for run in runs)) * 1.01, common_classes(runs)
    charts = []
    steps = LOSS in panels and any(len(step_losses(run.history)) > 1 for run in shown[panels.index(LOSS)])
    remark = [_LOSSES_EXPLAINED] if steps else []
    for panel, those in zip(panels, shown, strict=True):
        heading = panel.title if title == panel.title else f"{title}: {panel.title.lower()}"
        charts.append(_chart(panel, those, classes, heading, x_limit))
        why = "log, or the lowest curves would lie on each other" if charts[-1].log else "linear, from zero"
        remark.append(f"Scale of the {panel.title.lower()}: {why}.")
    figure = draw_charts(charts, height, _LOSSES_EXPLAINED if steps else "")
    return [Picture(file_name, to_bytes(figure), title, " ".join(remark))]


def _chart(panel: Panel, runs: Sequence[NamedRun], classes: int | None, title: str, x_limit: float) -> Chart:
    curves = [(run, epoch_points(run.history, panel)) for run in runs]
    values = [value for _, points in curves for _, value in points] or [0.0, 1.0]
    # A diverging run must not flatten all others; alone, it is seen where it is lowest.
    top_of_view = max(4 * panel.chance(classes or 10), 1.2 * min(values))
    cut = f", above {format_number(top_of_view, 2)} cut off" if max(values) > top_of_view else ""
    values = [min(value, top_of_view) for value in values]
    log = min(values) > 0 and max(values) > LOG_FROM_RATIO * min(values)
    series = []
    if panel is LOSS:
        steps = [(run, step_losses(run.history)) for run in runs]
        losses = [loss for _, points in steps for _, loss in points]
        width, opacity = (0.8, 0.35) if len(losses) <= FEW_STEPS else (0.4, 0.16)
        for run, points in (those for those in steps if len(those[1]) > 1):  # of one step there is no line
            series.append(Series(points, LineStyle(run.style.colour, width=width, opacity=opacity)))
        if losses:
            shares = (float(np.quantile(losses, share)) for share in (0.02, 0.98))  # not the odd spike
            values += [min(value, top_of_view) for value in shares if value > 0]
    if classes is not None and max(values) > 0.5 * panel.chance(classes):
        level = panel.chance(classes)
        # Its text beside the axes with the others: inside, some curve always runs through it.
        across = LineStyle(style.NEUTRAL, style.DOTTED, 1.0)
        series.append(Series([(0, level), (x_limit, level)], across, panel.chance_text(classes)))
        values.append(level)
    for run, points in curves:
        now = None if run.history.last is None else panel.value(run.history.last)
        label = f"{run.label}  {panel.number(points[-1][1])}"
        label += " then diverged" if now is not None and not math.isfinite(now) else ""
        marker = "o" if run.history.epochs_done <= FEW_EPOCHS else ""
        series.append(Series(points, replace(run.style, marker=marker), label))
    series += [Series(points[-1:], replace(run.style, width=0.0, marker="o")) for run, points in curves]
    return Chart(
        title=title,
        x_title="epoch",
        y_title=panel.y_title + (", log scale" if log else "") + cut,
        series=series,
        x_limit=x_limit,  # and from 0: the steps of the first epoch lie there
        y_limits=log_limits(values) if log else (0, max(values) * 1.15 or 1.0),
        log=log,
    )


MOMENTS = 4  # of one run; of each run of a pair only the first and the last
_FAINTEST = 0.4  # opacity of the first moment
_GRADIENTS_EXPLAINED = (
    "Above: L2 norm of the gradient of each convolution's and linear layer's weights (projections left out), from "
    "the output back to the input, at a few moments. Below: of the first and the last layer over time. Scales: log, "
    "for the norms go over many decades; a norm of zero is not drawn."
)


@drawn_alike
def draw_gradients(runs: Sequence[NamedRun]) -> list[Picture]:
    """A figure for each run with a gradients.csv, and one for each pair with and without shortcuts."""
    recorded, pictures = [run for run in runs if run.history.gradients.rows], []
    for run in recorded:
        file_name = "gradients.png" if len(recorded) == 1 else f"gradients_{run.file_name}.png"
        pictures += _draw_gradients([run], MOMENTS, file_name, f"Gradients of {run.label}")
    for name, pair in find_pairs(recorded).items():
        pictures += _draw_gradients(pair, 2, f"gradients_pair_{name}.png", f"Gradients of Res{name} and CNN{name}")
    return pictures


def moments(gradients: GradientRows, count: int) -> list[GradientRow]:
    """`count` rows from the first to the last, evenly in time; fewer if there are fewer."""
    rows = gradients.rows
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def by_depth(gradients: GradientRows, row: GradientRow) -> list[tuple[float, float]]:
    """(layers back from the output, norm) of the layers on the main path; 1 is the last layer."""
    main = [norm for name, norm in zip(gradients.layers, row.norms, strict=True) if ".shortcut." not in name]
    return [(x, y) for x, y in _finite(enumerate(reversed(main), start=1)) if y > 0]


def over_time(history: RunView, layer: int) -> list[tuple[float, float]]:
    """(epochs done, norm) of one layer of `gradients.layers`; of a run without a whole epoch (steps done, norm)."""
    last = history.last
    scale = last.epoch / last.step if last is not None and last.step > 0 else 1.0
    points = _finite((row.step * scale, row.norms[layer]) for row in history.gradients.rows)
    return [(x, y) for x, y in points if y > 0]


def _draw_gradients(runs: Sequence[NamedRun], count: int, file_name: str, title: str) -> list[Picture]:
    """One, or none if there is nothing to draw."""
    depth: list[Series] = []
    time: list[Series] = []

    def add(lines: list[Series], run: NamedRun, words: str, points: Points, width: float, opacity: float) -> None:
        if points:
            label = f"{words if len(runs) == 1 else f'{run.label} {words}'}  {format_number(points[-1][1], 2)}"
            lines.append(Series(points, replace(run.style, width=width, opacity=opacity), label))

    for run in runs:
        rows = moments(run.history.gradients, count)
        few = len({row.epoch for row in rows if row.step > 1}) < sum(row.step > 1 for row in rows)
        for turn, row in enumerate(rows):
            share = turn / max(1, len(rows) - 1)
            when = "at first" if row.step == 1 else f"step {row.step:,}" if few else f"epoch {row.epoch}"
            opacity = _FAINTEST + (1 - _FAINTEST) * share
            add(depth, run, when, by_depth(run.history.gradients, row), 1.0 + 1.2 * share, opacity)
        add(time, run, "first layer", over_time(run.history, 0), 2.2, 1.0)
        add(time, run, "last layer", over_time(run.history, -1), 1.2, 0.6)
    if not (depth and time):
        return []
    x_title = "epoch" if all(run.history.last is not None for run in runs) else "step"
    charts = [
        Chart(
            title=heading,
            x_title=words,
            y_title="gradient norm, log scale",
            series=lines,
            x_limit=1.01 * max(x for line in lines for x, _ in line.points),
            y_limits=log_limits(y for line in lines for _, y in line.points),
            log=True,
        )
        for heading, words, lines in (
            (f"{title}, by depth", "layers back from the output", depth),
            ("First and last layer over time", x_title, time),
        )
    ]
    return [Picture(file_name, to_bytes(draw_charts(charts, style.PAIR_HEIGHT_INCHES)), title, _GRADIENTS_EXPLAINED)]


@drawn_alike
def draw_rate_curve(title: str, past: Points, before: Points, after: Points, fork_at: float) -> bytes:
    """The learning rate of a fork as it was, as it would have gone on, and as it goes on: a PNG.

    Each curve: (epochs done, rate), drawn from point to point (`stairs`, of rates that hold); any may be empty.
    `fork_at`: epochs done at the fork.
    """
    rates = [rate for points in (past, before, after) for _, rate in points] or [1.0]
    log = min(rates) > 0  # a smooth schedule may end at zero, where a log scale never comes
    limits = log_limits(rates) if log else (0.0, 1.08 * max(rates) or 1.0)
    series = [Series([(fork_at, rate) for rate in limits], LineStyle(style.NEUTRAL, style.DOTTED, 1.0))]
    for points, look, words, inside in (
        (past, LineStyle("#000000", width=2.0), "until the fork", True),  # it ends in the middle
        (before, LineStyle("#B87400", (0, (2.0, 1.0)), 3.0), "as before", False),
        (after, LineStyle(style.MEASURED, width=2.0), "after the fork", False),
    ):
        label = words if inside or not points else f"{words}  {points[-1][1]:.3g}"
        series.append(Series(points, look, label, inside=inside))
    chart = Chart(
        title=title,
        x_title="epochs done",
        y_title="learning rate, log scale" if log else "learning rate",
        series=series,
        x_limit=1.02 * max(fork_at, 1.0, *(at for points in (past, before, after) for at, _ in points)),
        y_limits=limits,
        log=log,
    )
    return to_bytes(draw_charts([chart], _RATE_HEIGHT_INCHES))


def stairs(points: Points) -> list[tuple[float, float]]:
    """The corners of a line that keeps each value up to the next point."""
    corners = list(points[:1])
    for (_, before), (at, value) in pairwise(points):
        corners += [(at, before), (at, value)]
    return corners
