"""Labels at the ends of curves, beside the axes: no legend to look up, and none on top of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from lowmem.report.style import LABEL_SIZE

FONT_SIZE = LABEL_SIZE
LEADER_POINTS = 14.0  # from the axes to the text
PAD_POINTS = 5.0
_TICK_POINTS = 8.0  # tick marks and the gap to their numbers


@dataclass(frozen=True)
class EndLabel:
    """A text for the curve that ends at (x, y) in data units; x is None for a line across."""

    text: str
    x: float | None
    y: float
    colour: str


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to `wanted` (least squares) in the same order, `gap` apart and within [low, high].

    Pool adjacent violators: after taking off i * gap, being `gap` apart is being monotone, and the nearest
    monotone sequence is the one of block means. If the labels cannot fit, they share the room evenly.
    """
    count = len(wanted)
    if count > 1 and gap * (count - 1) > high - low:
        gap = (high - low) / (count - 1)
    order = sorted(range(count), key=lambda index: wanted[index])
    blocks: list[tuple[float, int]] = []  # mean, members
    for rank, index in enumerate(order):
        mean, members = wanted[index] - rank * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, size = blocks.pop()
            mean, members = (before * size + mean * members) / (size + members), size + members
        blocks.append((mean, members))
    slack = high - low - gap * max(0, count - 1)
    flat = [min(max(mean, low), low + max(0.0, slack)) for mean, members in blocks for _ in range(members)]
    placed = [0.0] * count
    for rank, index in enumerate(order):
        placed[index] = flat[rank] + rank * gap
    return placed


def room_for(labels: Sequence[EndLabel], canvas: FigureCanvasAgg) -> float:
    """The width in pixels that the labels take to the right of the axes."""
    figure = canvas.figure
    renderer = canvas.get_renderer()
    widest = 0.0
    for label in labels:
        text = figure.text(0, 0, label.text, fontsize=FONT_SIZE, parse_math=False)
        widest = max(widest, text.get_window_extent(renderer).width)
        text.remove()
    return widest + (LEADER_POINTS + PAD_POINTS) * figure.dpi / 72


def tick_room(axes: Axes, canvas: FigureCanvasAgg) -> float:
    """The width in pixels that the vertical axis' numbers take to the left of the axes."""
    renderer = canvas.get_renderer()
    texts = [text for text in axes.get_yticklabels() if text.get_text()]
    widest = max((text.get_window_extent(renderer).width for text in texts), default=0.0)
    return widest + (_TICK_POINTS + PAD_POINTS) * axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]


def place(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Write the labels beside the axes. Limits and position of the axes must be final."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    if not labels:
        return
    point = figure.dpi / 72
    box = axes.get_window_extent()
    right = axes.get_xlim()[1]
    data = [(right if label.x is None else label.x, label.y) for label in labels]
    ends = [(min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)) for x, y in axes.transData.transform(data)]
    line_height = FONT_SIZE * 1.28 * point
    middles = spread([y for _, y in ends], line_height, box.y0 + line_height / 4, box.y1 - line_height / 4)
    to_figure = figure.transFigure.inverted()
    for label, (x, y), middle in zip(labels, ends, middles, strict=True):
        text_x = box.x1 + LEADER_POINTS * point
        knee = max(x + 3 * point, box.x1 + 2 * point)  # level up to the axes' edge, then to the text
        corners = to_figure.transform([(x, y), (knee, y), (text_x - 3 * point, middle)])
        leader = Line2D(
            corners[:, 0],
            corners[:, 1],
            color=label.colour,
            linewidth=0.8,
            linestyle=(0, (1, 1.5)),
            alpha=0.8,
        )
        figure.add_artist(leader)
        left, height = to_figure.transform((text_x, middle))
        figure.text(
            left,
            height,
            label.text,
            color=label.colour,
            fontsize=FONT_SIZE,
            va="center_baseline",
            parse_math=False,
        )  # no mathematics: a run may be called $x$
