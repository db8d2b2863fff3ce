"""The figures of runs: training loss, test error, one for each pair Res-n / CNN-n, and a fork's learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from lowmem.report.chart import Chart, draw_charts, log_limits, to_png
from lowmem.report.naming import NamedRun, find_pairs
from lowmem.report.style import (
    DOTTED,
    HEIGHT_INCHES,
    MEASURED,
    NEUTRAL,
    PAIR_HEIGHT_INCHES,
    LineStyle,
    Picture,
    Points,
    Series,
)
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView

FEW_EPOCHS = 25  # up to here each epoch is marked
FEW_STEPS = 1_000  # up to here single steps can be told apart, and are drawn a little stronger
LOG_FROM_RATIO = 4.0  # a linear axis hides what differs by less than a quarter of the largest value
_RATE_HEIGHT_INCHES = 3.6


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
    number=lambda value: f"{value:.2f}" if value >= 0.1 else f"{value:#.2g}",
)
TEST_ERROR = Panel(
    title="Test error",
    y_title="% of the test pictures",
    value=lambda row: row.test_error_pct,
    chance=lambda classes: 100 * (1 - 1 / classes),
    chance_text=lambda classes: f"chance  {100 * (1 - 1 / classes):.4g} %",
    number=lambda value: f"{value:.2f} %",
)


def draw_training(runs: Sequence[NamedRun]) -> list[Picture]:
    """loss.png, test_error.png and the pairs, as far as there is anything to draw."""
    pictures = [
        _draw(runs, (LOSS,), "loss.png", LOSS.title, HEIGHT_INCHES),
        _draw(runs, (TEST_ERROR,), "test_error.png", TEST_ERROR.title, HEIGHT_INCHES),
    ]
    for name, pair in find_pairs(runs).items():
        title = f"Res{name} against CNN{name}"
        pictures.append(_draw(pair, (LOSS, TEST_ERROR), f"pair_{name}.png", title, PAIR_HEIGHT_INCHES))
    return [picture for picture in pictures if picture is not None]


def epoch_points(history: RunView, panel: Panel) -> list[tuple[float, float]]:
    """(epoch, value) of every epoch with a finite value."""
    values = ((row.epoch, panel.value(row)) for row in history.epochs)
    return [(epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]


def step_losses(history: RunView) -> list[tuple[float, float]]:
    """(epoch, loss) of logged steps; an epoch's mean stands at its end, so a step at its share of it."""
    last = history.last
    if last is None or last.step <= 0:
        return []
    return [
        (row.step * last.epoch / last.step, row.loss)
        for row in history.steps
        if row.loss is not None and math.isfinite(row.loss) and row.step <= last.step
    ]


def common_classes(runs: Sequence[NamedRun]) -> int | None:
    """The number of classes if all runs that know it agree: there is one chance level or none."""
    known = {run.history.classes for run in runs if run.history.classes is not None}
    return known.pop() if len(known) == 1 else None


def _draw(
    runs: Sequence[NamedRun], panels: Sequence[Panel], file_name: str, title: str, height: float
) -> Picture | None:
    shown = [[run for run in runs if epoch_points(run.history, panel)] for panel in panels]
    if not any(shown):
        return None
    height = max(height, len(panels) * (1.3 + 0.22 * max(map(len, shown))))  # taller instead of crowded labels
    last_epoch, classes = max(run.history.epochs_done for run in runs), common_classes(runs)
    charts = []
    for panel, those in zip(panels, shown, strict=True):
        heading = panel.title if title == panel.title else f"{title}: {panel.title.lower()}"
        charts.append(_chart(panel, those, classes, heading, max(last_epoch, 1) * 1.01))
    return Picture(file_name, to_png(draw_charts(charts, height)), title, _remark(panels, charts))


def _chart(panel: Panel, runs: Sequence[NamedRun], classes: int | None, title: str, x_limit: float) -> Chart:
    top_of_view = 4 * panel.chance(classes or 10)  # a diverging run must not flatten all others
    curves = [(run, epoch_points(run.history, panel)) for run in runs]
    values = [min(value, top_of_view) for _, points in curves for _, value in points] or [0.0, 1.0]
    log = min(values) > 0 and max(values) > LOG_FROM_RATIO * min(values)
    series = []
    if panel is LOSS:
        steps = [(run, step_losses(run.history)) for run in runs]
        losses = [loss for _, points in steps for _, loss in points]
        width, opacity = (0.8, 0.35) if len(losses) <= FEW_STEPS else (0.4, 0.16)
        for run, points in (those for those in steps if len(those[1]) > 1):  # of one step there is no line
            series.append(Series(points=points, style=LineStyle(run.style.colour, width=width, opacity=opacity)))
        if losses:
            shares = (float(np.quantile(losses, share)) for share in (0.02, 0.98))  # not the odd spike
            values += [min(value, top_of_view) for value in shares if value > 0]
    if classes is not None and max(values) > 0.5 * panel.chance(classes):
        level = panel.chance(classes)
        across = LineStyle(NEUTRAL, DOTTED, 1.0)
        # Its text beside the axes with the others: inside, some curve always runs through it.
        series.append(Series(points=[(0, level), (x_limit, level)], style=across, label=panel.chance_text(classes)))
        values.append(level)
    for run, points in curves:
        marker = "o" if run.history.epochs_done <= FEW_EPOCHS else ""
        label = _label(run, points[-1][1], panel)
        series.append(Series(points=points, style=replace(run.style, marker=marker), label=label))
    series += [Series(points=points[-1:], style=replace(run.style, width=0.0, marker="o")) for run, points in curves]
    return Chart(
        title=title,
        x_title="epoch",
        y_title=panel.y_title + (", log scale" if log else ""),
        series=[one for one in series if one.points],
        x_limit=x_limit,  # and from 0: the steps of the first epoch lie there
        y_limits=log_limits(values) if log else (0, max(values) * 1.15 or 1.0),
        log=log,
    )


def _label(run: NamedRun, value: float, panel: Panel) -> str:
    newest = run.history.last
    assert newest is not None
    value_now = panel.value(newest)
    broken = value_now is not None and not math.isfinite(value_now)
    return f"{run.label}  {panel.number(value)}" + (" then diverged" if broken else "")


def _remark(panels: Sequence[Panel], charts: Sequence[Chart]) -> str:
    """How to read the figure, with the reason for its scales."""
    said = []
    if LOSS in panels:
        said.append("Loss: the mean of each epoch, over the faint loss of single steps.")
    for panel, chart in zip(panels, charts, strict=True):
        why = "log, or the lowest curves would lie on each other" if chart.log else "linear, from zero"
        said.append(f"Scale of the {panel.title.lower()}: {why}.")
    return " ".join(said)


def draw_rate_curve(title: str, past: Points, before: Points, after: Points, fork_at: float) -> bytes:
    """The learning rate of a fork as it was, as it would have gone on, and as it goes on: a PNG.

    Each curve: (epochs done, rate from there on), its last point repeating the rate at the end; any may be empty.
    `fork_at`: epochs done at the fork.
    """
    limits = log_limits([rate for points in (past, before, after) for _, rate in points if rate > 0] or [1.0])
    series = [Series(points=[(fork_at, rate) for rate in limits], style=LineStyle(NEUTRAL, DOTTED, 1.0))]
    for points, look, words, inside in (
        (past, LineStyle("#000000", width=2.0), "until the fork", True),  # it ends in the middle
        (before, LineStyle("#B87400", (0, (2.0, 1.0)), 3.0), "as before", False),
        (after, LineStyle(MEASURED, width=2.0), "after the fork", False),
    ):
        label = words if inside or not points else f"{words}  {points[-1][1]:.3g}"
        series.append(Series(points=stairs(points), style=look, label=label, inside=inside))
    chart = Chart(
        title=title,
        x_title="epochs done",
        y_title="learning rate, log scale",
        series=[one for one in series if one.points],
        x_limit=1.02 * max(fork_at, 1.0, *(at for points in (past, before, after) for at, _ in points)),
        y_limits=limits,
        log=True,
    )
    return to_png(draw_charts([chart], _RATE_HEIGHT_INCHES))


def stairs(points: Points) -> list[tuple[float, float]]:
    """The corners of a line that keeps each value up to the next point."""
    corners = list(points[:1])
    for (_, before), (at, value) in pairwise(points):
        corners += [(at, before), (at, value)]
    return corners
