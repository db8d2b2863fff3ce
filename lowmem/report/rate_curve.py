"""The picture of a fork: the learning rate as it was, as it would have gone on, and as it goes on."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lowmem.report.labels import EndLabel, place, room_for, tick_room
from lowmem.report.palette import NEUTRAL
from lowmem.report.style import AXIS_SIZE, BOTTOM_INCHES, LABEL_SIZE, TOP_INCHES, dress, head, new_figure, to_png

Points = Sequence[tuple[float, float]]

_HEIGHT_INCHES = 3.6


def draw_rate_curve(title: str, past: Points, before: Points, after: Points, fork_at: float) -> bytes:
    """A PNG. Each curve: (epochs done, rate from there on), its last point repeating the rate at the end; any may be
    empty. `fork_at`: epochs done at the fork."""
    figure, canvas = new_figure(_HEIGHT_INCHES)
    axes = figure.add_subplot()
    labels = []
    for points, words, colour, width, dashes in (
        (past, "until the fork", "#000000", 2.0, "-"),
        (before, "as before", "#B87400", 3.0, (0, (2, 1))),
        (after, "after the fork", "#0072B2", 2.0, "-"),
    ):
        if not points:
            continue
        xs, ys = [at for at, _ in points], [rate for _, rate in points]
        axes.step(xs, ys, where="post", color=colour, linewidth=width, linestyle=dashes)
        if points is past:  # it ends in the middle: its words stand on it
            on_it = axes.annotate(words, (xs[0], ys[0]), xytext=(4, 5), textcoords="offset points")
            on_it.set(fontsize=LABEL_SIZE, color=colour)
        else:
            labels.append(EndLabel(f"{words}  {ys[-1]:.3g}", xs[-1], ys[-1], colour))
    axes.axvline(fork_at, color=NEUTRAL, linestyle=(0, (1, 2)), linewidth=1)
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("epochs done", fontsize=AXIS_SIZE)
    dress(axes)
    pixels = figure.bbox.width
    figure.subplots_adjust(
        left=tick_room(axes, canvas) / pixels,
        right=1 - room_for(labels, canvas) / pixels,
        bottom=BOTTOM_INCHES / _HEIGHT_INCHES,
        top=1 - TOP_INCHES / _HEIGHT_INCHES,
    )
    head(axes, title, "learning rate, log scale")
    place(axes, labels)
    return to_png(figure)
