"""What every figure shares: size, type, grid and how it becomes a PNG.

A figure is six inches wide and 1,200 pixels: a column of a printed page, and on a phone of 360 points its smallest
text is still some nine points high. Drawn with matplotlib's objects on an Agg canvas, never through pyplot: no window,
no global state.
"""

from __future__ import annotations

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

WIDTH_INCHES, HEIGHT_INCHES = 6.0, 4.2
PAIR_HEIGHT_INCHES = 7.6  # two panels above each other: side by side they would be too narrow for a phone
DPI = 200
TITLE_SIZE, AXIS_SIZE, TICK_SIZE, LABEL_SIZE = 13.0, 11.5, 11.0, 11.5  # points
TOP_INCHES, BOTTOM_INCHES = 0.62, 0.58  # what title and vertical axis' words take above the axes, and below them
LEAST_SIZE = 9.5
_MARGIN_POINTS = 3.0
_INK, _GRID = "#333333", "#e3e3e3"


def new_figure(height: float = HEIGHT_INCHES, *, constrained: bool = False) -> tuple[Figure, FigureCanvasAgg]:
    """A white figure of the common width, with its canvas."""
    layout: Literal["constrained"] | None = "constrained" if constrained else None
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor="white", layout=layout)
    return figure, FigureCanvasAgg(figure)


def dress(axes: Axes, *, grid: Literal["both", "x"] = "both") -> None:
    """Faint grid behind the data, no frame on the sides where no axis is, legible numbers."""
    axes.tick_params(labelsize=TICK_SIZE, colors=_INK)
    axes.grid(True, which="major", axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", *(("left",) if grid == "x" else ())):
        axes.spines[side].set_visible(False)


def head(axes: Axes, title: str, y_title: str) -> None:
    """The title, and under it what the vertical axis shows: along the side it would take the curves' room and have to
    be read with the head on the shoulder. The axes must be in their place."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    _above(axes, y_title, 6).set(fontsize=AXIS_SIZE, color="#555555")
    drawn = _above(axes, title, 22)
    drawn.set(fontsize=TITLE_SIZE, fontweight="bold")
    fit(drawn, figure.bbox.x1 - axes.get_window_extent().x0)


def fit(drawn: Text, room: float) -> None:
    """Makes a text smaller, and then shorter, until it takes `room` pixels at the most."""
    figure = drawn.get_figure(root=True)
    assert figure is not None
    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer, words = figure.canvas.get_renderer(), drawn.get_text()
    room -= _MARGIN_POINTS * figure.dpi / 72
    size, shown = float(drawn.get_fontsize()), words
    while drawn.get_window_extent(renderer).width > room and len(shown) > 1:
        if size > LEAST_SIZE:
            size -= 0.5
            drawn.set_fontsize(size)
        else:
            shown = shown[:-1]
            drawn.set_text(f"{shown.rstrip()}…")


def _above(axes: Axes, text: str, points: float) -> Annotation:
    """No mathematics in it: a run may be called $x$."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    return axes.annotate(text, (0, 1), xytext=(0, points), parse_math=False, **place)  # type: ignore[arg-type]


def to_png(figure: Figure) -> bytes:
    """The same bytes for the same figure: without the drawing library's name and version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
