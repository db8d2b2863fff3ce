"""What the figures show: panels (a column of metrics.csv each) and curves (a run each)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowmem.report.naming import curve_labels
from lowmem.report.palette import style_of
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView

LINE_WIDTHS = (1.9, 1.3, 0.9)  # the runs of one network, which share its colour


@dataclass(frozen=True)
class Panel:
    """What an axis shows: which column, in what words and numbers."""

    title: str
    y_title: str
    value: Callable[[EpochRow], float | None]
    chance: Callable[[int], float]
    chance_text: Callable[[int], str]
    number: Callable[[float], str]  # of the value at a label
    with_steps: bool


LOSS = Panel(
    title="Training loss",
    y_title="cross-entropy (nats)",
    value=lambda row: row.train_loss,
    chance=lambda classes: math.log(classes),
    chance_text=lambda classes: f"chance  {math.log(classes):.3f}",
    number=lambda value: f"{value:.2f}" if value >= 0.1 else f"{value:#.2g}",
    with_steps=True,
)
TEST_ERROR = Panel(
    title="Test error",
    y_title="% of the test pictures",
    value=lambda row: row.test_error_pct,
    chance=lambda classes: 100 * (1 - 1 / classes),
    chance_text=lambda classes: f"chance  {100 * (1 - 1 / classes):.4g} %",
    number=lambda value: f"{value:.2f} %",
    with_steps=False,
)


@dataclass(frozen=True)
class Curve:
    """One run in one figure."""

    history: RunView
    label: str
    colour: str
    dashes: str | tuple[int, tuple[float, ...]]
    line_width: float

    def points(self, panel: Panel) -> list[tuple[int, float]]:
        """(epoch, value) of every epoch with a finite value."""
        values = ((row.epoch, panel.value(row)) for row in self.history.epochs)
        return [(epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]

    def step_losses(self) -> list[tuple[float, float]]:
        """(epoch, loss) of logged steps; an epoch's mean stands at its end, so a step at its share of it."""
        last = self.history.last
        if last is None or last.step <= 0:
            return []
        return [
            (row.step * last.epoch / last.step, row.loss)
            for row in self.history.steps
            if row.loss is not None and math.isfinite(row.loss) and row.step <= last.step
        ]


def find_pairs(histories: Sequence[RunView]) -> dict[tuple[int, str], list[RunView]]:
    """Runs by (depth, block), where both a residual and a plain net have a curve."""
    groups: dict[tuple[int, str], list[RunView]] = {}
    for history in histories:
        model = history.config.model
        if not history.epochs:
            continue
        groups.setdefault((int(model.arch[3:]), model.block), []).append(history)
    return {
        key: group
        for key, group in sorted(groups.items())
        if {history.config.model.arch[:3] for history in group} == {"res", "cnn"}
    }


def curves_of(histories: Sequence[RunView]) -> list[Curve]:
    """Label, colour and line of every run; the runs of one network get thinner in turn."""
    seen: dict[tuple[str, str], int] = {}
    curves = []
    for history, label in zip(histories, curve_labels(histories), strict=True):
        model = history.config.model
        turn = seen.get((model.arch, model.block), 0)
        seen[model.arch, model.block] = turn + 1
        style = style_of(model)
        line_width = LINE_WIDTHS[min(turn, len(LINE_WIDTHS) - 1)]
        curves.append(Curve(history, label, style.colour, style.dashes, line_width))
    return curves


def common_classes(histories: Sequence[RunView]) -> int | None:
    """The number of classes if all runs that know it agree: there is one chance level or none."""
    known = {history.classes for history in histories if history.classes is not None}
    return known.pop() if len(known) == 1 else None
