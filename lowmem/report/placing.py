"""Labels at what they name, inside the axes: on no curve, no marker and no other label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from lowmem.report.style import LABEL_SIZE

Boxes = NDArray[np.float64]
"""(boxes, 4): x0, y0, x1, y1 in points of the page."""

Places = Sequence[tuple[float, float]]
"""(x, y) in data units."""

# Of a text from its place, in points: its near edge sideways (0: its middle), its middle upwards.
_OFFSETS = tuple(product((10, -10, 0, -20, 20), (0, 12, -12, 18, -18, 26, -26, 36, -36, 48, -48, 64, -64)))
_LEADER_FROM_POINTS = 14.0  # a text further away than this is tied to its place by a thin line
_STEP_POINTS = 4.0  # between the boxes that stand for a line
_AIR_POINTS = 2.0  # around a text
_LEAST_CONTRAST = 4.0
# What is bad, in points of distance: a square point covered, one outside the axes, the last of the places named, and
# each point by which something else is nearer than what the label names.
_COVERED, _OUTSIDE, _LAST_PLACE, _MISTAKEN = 10.0, 40.0, 15.0, 3.0


@dataclass(frozen=True)
class Label:
    """A text for what is called `of`, beside one of the places `at`, the best first."""

    text: str
    of: str
    at: Places
    colour: str
    size: float = LABEL_SIZE
    bold: bool = False


def place(axes: Axes, canvas: FigureCanvasAgg, labels: Sequence[Label], drawn: Mapping[str, Boxes]) -> None:
    """Writes the labels, earlier ones choosing first, each where it covers least and is near what it names.

    `drawn`: name -> what it covers. Limits and position of the axes must be final.
    """
    taken: dict[str, Boxes] = {**drawn}
    point, frame = _point(axes), _frame(axes)
    for number, label in enumerate(labels):
        text = axes.annotate(
            label.text,
            label.at[0],
            xytext=(0, 0),
            textcoords="offset points",
            color=ink(label.colour),
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            ha="center",
            va="center",
            parse_math=False,  # no mathematics: a run may be called $x$
            zorder=6,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        text.set_in_layout(False)
        extent = text.get_window_extent(canvas.get_renderer())
        size = np.array([extent.width, extent.height]) / point
        own = drawn.get(label.of, np.empty((0, 4)))
        others = np.concatenate([np.empty((0, 4)), *(boxes for name, boxes in taken.items() if name != label.of)])
        _, at, middle, box = min(
            (_cost(box, own, others, frame) + _away(offset) + _LAST_PLACE * rank / len(label.at), at, middle, box)
            for rank, at, offset, middle, box in _candidates(axes, label.at, size)
        )
        text.xy = at
        text.set_position(middle)
        taken[f"label {number}"] = np.array([box])
        if len(own) and _gap(np.array(box), own) > _LEADER_FROM_POINTS:
            _lead(axes, at, middle, size, label.colour)


def ink(colour: str) -> str:
    """The colour, darker if need be, so that words in it are legible on white (and in grey)."""
    parts = np.array(to_rgb(colour))
    while _contrast(parts) < _LEAST_CONTRAST:
        parts = 0.97 * parts
    return to_hex((float(parts[0]), float(parts[1]), float(parts[2])))


def _contrast(parts: NDArray[np.float64]) -> float:
    """Of a colour on white, as WCAG 2 defines it."""
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05))


def _lead(
    axes: Axes, at: tuple[float, float], middle: tuple[float, float], size: NDArray[np.float64], colour: str
) -> None:
    """From the nearest point of the text's edge to the place."""
    x, y = np.clip(0.0, middle - size / 2, middle + size / 2)
    axes.annotate(
        "",
        at,
        xytext=(float(x), float(y)),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4},
        zorder=4.5,
    )


def along(axes: Axes, points: Places, half_width: float) -> Boxes:
    """Boxes, `half_width` points to each side, along the line through the points."""
    return _around(_sampled(axes, points, _STEP_POINTS), half_width)


def around(axes: Axes, points: Places, half_width: float) -> Boxes:
    """A box around each marker."""
    return _around(_on_page(axes, points), half_width)


def from_the_middle(axes: Axes, points: Places) -> Places:
    """Places on the line through the points, outwards from its middle."""
    on_page = _sampled(axes, points, 3 * _STEP_POINTS)
    order = sorted(range(len(on_page)), key=lambda index: abs(2 * index - len(on_page) + 1))
    data = axes.transData.inverted().transform(on_page[order] * _point(axes))
    return [(float(x), float(y)) for x, y in data]


Candidate = tuple[int, tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, ...]]


def _candidates(axes: Axes, places: Places, size: NDArray[np.float64]) -> Iterator[Candidate]:
    """Rank and place, offset of the text's near edge, offset of its middle, its box on the page."""
    on_page = _on_page(axes, places)
    half = size / 2
    for (rank, at), offset in product(enumerate(places), _OFFSETS):
        if offset == (0, 0):
            continue
        middle = (float(offset[0] + np.sign(offset[0]) * half[0]), float(offset[1]))
        centre = on_page[rank] + middle
        box = (*(centre - half - _AIR_POINTS), *(centre + half + _AIR_POINTS))
        yield rank, at, offset, middle, tuple(float(edge) for edge in box)


def _cost(box: tuple[float, ...], own: Boxes, others: Boxes, frame: Boxes) -> float:
    one = np.array(box)
    area = (one[2] - one[0]) * (one[3] - one[1])
    covered = _overlap(one, own).sum() + _overlap(one, others).sum()
    outside = area - _overlap(one, frame).sum()
    mistaken = max(0.0, _gap(one, own) + _AIR_POINTS - _gap(one, others)) if len(own) and len(others) else 0.0
    return float(_COVERED * covered + _OUTSIDE * outside + _MISTAKEN * mistaken)


def _away(offset: tuple[float, float]) -> float:
    return 0.5 * (abs(offset[0]) + abs(offset[1]))


def _overlap(one: NDArray[np.float64], boxes: Boxes) -> NDArray[np.float64]:
    sides = np.minimum(one[2:], boxes[:, 2:]) - np.maximum(one[:2], boxes[:, :2])
    return np.asarray(np.clip(sides, 0, None).prod(axis=1))


def _gap(one: NDArray[np.float64], boxes: Boxes) -> float:
    apart = np.maximum(boxes[:, :2] - one[2:], one[:2] - boxes[:, 2:])
    return float(np.hypot(*np.clip(apart, 0, None).T).min())


def _sampled(axes: Axes, points: Places, step: float) -> NDArray[np.float64]:
    corners = _on_page(axes, points)
    lengths = np.concatenate([[0.0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    at = np.linspace(0, lengths[-1], 2 + int(lengths[-1] / step)) if lengths[-1] else np.zeros(1)
    return np.column_stack([np.interp(at, lengths, corners[:, axis]) for axis in (0, 1)])


def _around(middles: NDArray[np.float64], half_width: float) -> Boxes:
    return np.concatenate([middles - half_width, middles + half_width], axis=1)


def _on_page(axes: Axes, points: Places) -> NDArray[np.float64]:
    return np.asarray(axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2))) / _point(axes)


def _frame(axes: Axes) -> Boxes:
    return np.array([axes.get_window_extent().extents]) / _point(axes)


def _point(axes: Axes) -> float:
    """Pixels of a point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return float(figure.dpi / 72)
