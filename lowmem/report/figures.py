"""The report's figures as PNG bytes: training loss, test error, and a figure for each pair Res-n / CNN-n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lowmem.config.schema import resolve_block
from lowmem.report.curves import LOSS, TEST_ERROR, Curve, Panel, common_classes, curves_of, find_pairs
from lowmem.report.labels import EndLabel, place, room_for, tick_room
from lowmem.report.palette import NEUTRAL
from lowmem.report.style import (
    AXIS_SIZE,
    BOTTOM_INCHES,
    HEIGHT_INCHES,
    PAIR_HEIGHT_INCHES,
    TOP_INCHES,
    dress,
    head,
    new_figure,
    to_png,
)
from lowmem.runs.view import RunView

FEW_EPOCHS = 25  # up to here each epoch is marked
FEW_STEPS = 1_000  # up to here single steps can be told apart, and are drawn a little stronger
LOG_FROM_RATIO = 4.0  # a linear axis hides what differs by less than a quarter of the largest value


@dataclass(frozen=True)
class Picture:
    """A PNG with its file name and the words that go with it."""

    file_name: str
    png: bytes
    title: str
    remark: str


def draw_all(histories: Sequence[RunView]) -> list[Picture]:
    """loss.png, test_error.png and the pairs, as far as there is anything to draw."""
    pictures = []
    for panel, file_name in ((LOSS, "loss.png"), (TEST_ERROR, "test_error.png")):
        picture = _draw(histories, (panel,), file_name, panel.title, HEIGHT_INCHES)
        if picture is not None:
            pictures.append(picture)
    for (depth, block), pair in find_pairs(histories).items():
        usual = block == resolve_block(f"res{depth}", None)
        name = f"{depth}" if usual else f"{depth}-{block}"
        picture = _draw(
            pair, (LOSS, TEST_ERROR), f"pair_{name}.png", f"Res{name} against CNN{name}", PAIR_HEIGHT_INCHES
        )
        if picture is not None:
            pictures.append(picture)
    return pictures


def _draw(
    histories: Sequence[RunView], panels: tuple[Panel, ...], file_name: str, title: str, height: float
) -> Picture | None:
    curves = curves_of(histories)
    drawn = [[curve for curve in curves if curve.points(panel)] for panel in panels]
    if not any(drawn):
        return None
    most = max(len(shown) for shown in drawn)
    height = max(height, len(panels) * (1.3 + 0.22 * most))  # taller instead of crowded labels
    figure, canvas = new_figure(height)
    classes = common_classes(histories)
    everything: list[Filled] = []
    last_epoch = max(history.epochs_done for history in histories)
    logs = []
    for row, (panel, shown) in enumerate(zip(panels, drawn, strict=True)):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        log, labels = _fill(axes, panel, shown, classes)
        logs.append(log)
        heading = panel.title if title == panel.title else f"{title}: {panel.title.lower()}"
        axes.set_xlim(0, max(last_epoch, 1) * 1.01)  # from 0: the steps of the first epoch lie there
        everything.append(Filled(axes, labels, heading, panel.y_title + (", log scale" if log else "")))
    lay_out(figure, canvas, everything)
    return Picture(file_name, to_png(figure), title, _remark(panels, logs))


@dataclass(frozen=True)
class Filled:
    """Axes with their curves, and the words that are still to be written around them."""

    axes: Axes
    labels: list[EndLabel]
    title: str
    y_title: str


def lay_out(figure: Figure, canvas: FigureCanvasAgg, panels: Sequence[Filled]) -> None:
    """Panels above each other, as wide as their labels leave room for; then titles and labels."""
    width, height = figure.get_size_inches()
    room = max(room_for(panel.labels, canvas) for panel in panels) / (width * figure.dpi)
    ticks = max(tick_room(panel.axes, canvas) for panel in panels) / (width * figure.dpi)
    between = (TOP_INCHES + BOTTOM_INCHES) / (height / len(panels) - TOP_INCHES - BOTTOM_INCHES)
    figure.subplots_adjust(
        left=ticks, right=1 - room, bottom=BOTTOM_INCHES / height, top=1 - TOP_INCHES / height, hspace=between
    )
    for panel in panels:
        head(panel.axes, panel.title, panel.y_title)
        place(panel.axes, panel.labels)


def _fill(axes: Axes, panel: Panel, curves: list[Curve], classes: int | None) -> tuple[bool, list[EndLabel]]:
    """Draw the curves and set the axes. Whether the vertical axis is logarithmic, and what to write beside it."""
    top_of_view = 4 * panel.chance(classes or 10)  # a diverging run must not flatten all others
    values = [min(value, top_of_view) for curve in curves for _, value in curve.points(panel)] or [0.0, 1.0]
    log = min(values) > 0 and max(values) > LOG_FROM_RATIO * min(values)
    if panel.with_steps:
        losses = [loss for curve in curves for _, loss in curve.step_losses()]
        if losses:
            spread = (float(np.quantile(losses, share)) for share in (0.02, 0.98))  # not the odd spike
            values += [min(value, top_of_view) for value in spread if value > 0]
        for curve in curves:
            _draw_steps(axes, curve, few=len(losses) <= FEW_STEPS)
    for curve in curves:
        _draw_curve(axes, curve, panel)
    labels = [_end_label(curve, panel) for curve in curves]
    if classes is not None and max(values) > 0.5 * panel.chance(classes):
        level = panel.chance(classes)
        axes.axhline(level, color=NEUTRAL, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        # Beside the axes with the others: inside, some curve always runs through it.
        labels.append(EndLabel(panel.chance_text(classes), None, level, NEUTRAL))
        values.append(level)
    _set_vertical(axes, min(values), max(values), log)
    axes.set_xlabel("epoch", fontsize=AXIS_SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 4, 5, 10]))
    dress(axes)
    return log, labels


def _draw_curve(axes: Axes, curve: Curve, panel: Panel) -> None:
    points = curve.points(panel)
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    few = curve.history.epochs_done <= FEW_EPOCHS
    axes.plot(
        epochs,
        values,
        color=curve.colour,
        linestyle=curve.dashes,
        linewidth=curve.line_width,
        marker="o" if few else None,
        markersize=4.5,
        zorder=3,
        solid_capstyle="round",
    )
    axes.plot(epochs[-1:], values[-1:], color=curve.colour, marker="o", markersize=4.5, zorder=4)


def _draw_steps(axes: Axes, curve: Curve, few: bool) -> None:
    points = curve.step_losses()
    axes.plot(
        [epoch for epoch, _ in points],
        [loss for _, loss in points],
        color=curve.colour,
        linewidth=0.8 if few else 0.4,
        alpha=0.35 if few else 0.16,
        zorder=2,
    )


def _set_vertical(axes: Axes, lowest: float, highest: float, log: bool) -> None:
    if not log:
        axes.set_ylim(0, highest * 1.15 or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        return
    axes.set_yscale("log")
    spare = (highest / lowest) ** 0.08
    axes.set_ylim(lowest / spare, highest * spare**1.5)
    decades = math.log10(highest / lowest)
    subs = (1.0,) if decades > 4.5 else (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _end_label(curve: Curve, panel: Panel) -> EndLabel:
    epoch, value = curve.points(panel)[-1]
    newest = curve.history.last
    assert newest is not None
    value_now = panel.value(newest)
    broken = value_now is not None and not math.isfinite(value_now)
    text = f"{curve.label}  {panel.number(value)}" + (" then diverged" if broken else "")
    return EndLabel(text, epoch, value, curve.colour)


def _remark(panels: tuple[Panel, ...], logs: list[bool]) -> str:
    """How to read the figure, with the reason for its scales."""
    said = []
    if LOSS in panels:
        said.append("Loss: the mean of each epoch, over the faint loss of single steps.")
    for panel, log in zip(panels, logs, strict=True):
        why = "log, or the lowest curves would lie on each other" if log else "linear, from zero"
        said.append(f"Scale of the {panel.title.lower()}: {why}.")
    return " ".join(said)
