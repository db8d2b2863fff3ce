"""The picture of a fork: the learning rate as it was, as it would have gone on, and as it goes on."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]


def draw_rate_curve(title: str, past: Points, before: Points, after: Points, fork_at: float) -> bytes:
    """A PNG. Each curve: (epochs done, rate from there on), its last point repeating the rate at the end; any may be
    empty. `fork_at`: epochs done at the fork."""
    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for points, label, style in (
        (past, "until the fork", {"color": "#000000", "linewidth": 2.0}),
        (before, "before: it would have gone on so", {"color": "#E69F00", "linewidth": 3.0, "linestyle": (0, (2, 1))}),
        (after, "after: the fork", {"color": "#0072B2", "linewidth": 2.0}),
    ):
        if points:
            xs, ys = [at for at, _ in points], [rate for _, rate in points]
            axes.step(xs, ys, where="post", label=label, **style)  # type: ignore[arg-type]
    axes.axvline(fork_at, color="#888888", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("epochs done", fontsize=12)
    axes.set_ylabel("learning rate, log scale", fontsize=12)
    axes.set_title(title, loc="left", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=11, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
