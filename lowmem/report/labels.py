"""Labels at what they name: no legend to look up, and none on top of another.

Beside the axes, at the ends of lines, in their order; or inside, on no line, no marker and no other label.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from lowmem.report.agg import Annotation, Axes, IdentityTransform, Line2D, to_hex, to_rgb, withStroke
from lowmem.report.style import DPI, LABEL_SIZE, POINT_PIXELS, Points, Series

Boxes = NDArray[np.float64]
"""(boxes, 4): x0, y0, x1, y1 in points of the page."""
_NO_BOXES: Boxes = np.empty((0, 4))

_LEADER_POINTS = 14.0  # from the axes to the text
_LEAST_CONTRAST = 4.0

# Inside. Of a text from its place, in points: its near edge sideways (0: its middle), its middle upwards.
_SIDEWAYS, _UPWARDS = (10, -10, 0, -20, 20), (0, 12, -12, 18, -18, 26, -26, 36, -36, 48, -48, 64, -64)
_OFFSETS = np.array([offset for offset in product(_SIDEWAYS, _UPWARDS) if offset != (0, 0)], dtype=float)
_FAR_POINTS = 2e3  # beyond any page
_STEP_POINTS = 4.0  # between the boxes that stand for a line
_AIR_POINTS = 2.0  # around a text and a line
_BOLD_FROM_POINTS = 2.0  # the text of a line that is wider: the subject of the chart
# What is bad, in points of distance: a square point covered, one outside the axes, the last of the places named, and
# each point by which something else is nearer than what the label names; and a leader through a label.
_COVERED, _OUTSIDE, _LAST_PLACE, _MISTAKEN, _CROSSED = 10.0, 40.0, 15.0, 3.0, 1e6


def ink(colour: str) -> str:
    """The colour, darker if need be, so that words in it are legible on white (and in grey)."""
    parts = np.array(to_rgb(colour))
    while True:  # contrast as WCAG 2 defines it
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        if 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= _LEAST_CONTRAST:
            return to_hex((float(parts[0]), float(parts[1]), float(parts[2])))
        parts = 0.97 * parts


def write_at_ends(axes: Axes, series: Sequence[Series]) -> list[tuple[Series, Annotation]]:
    """The labels beside the axes, where they take their room, but not yet in their places."""
    texts = []
    for one in (one for one in series if one.label and not one.inside):
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        text = axes.annotate(one.label, (1, 0.5), xytext=(_LEADER_POINTS, 0), va="center_baseline", **place)  # type: ignore[arg-type]
        text.set(fontsize=LABEL_SIZE, color=ink(one.style.colour), parse_math=False)  # a run may be called $x$
        texts.append((one, text))
    return texts


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to `wanted` (least squares) in the same order, `gap` apart and within [low, high]; what cannot
    fit shares the room evenly.

    After taking off i * gap, being `gap` apart is being monotone, and the nearest monotone sequence is that of the
    min-max formula of isotonic regression.
    """
    count = len(wanted)
    if count > 1:
        gap = min(gap, (high - low) / (count - 1))
    order = sorted(range(count), key=lambda index: wanted[index])
    apart = [wanted[index] - rank * gap for rank, index in enumerate(order)]
    placed = [0.0] * count
    for rank, index in enumerate(order):
        mean = max(min(fmean(apart[first:past]) for past in range(rank + 1, count + 1)) for first in range(rank + 1))
        placed[index] = min(max(mean, low), high - gap * (count - 1)) + rank * gap
    return placed


def spread_ends(axes: Axes, texts: Sequence[tuple[Series, Annotation]]) -> None:
    """Puts them next to the ends of their lines, with a leader to each. The axes must be in their place."""
    if not texts:
        return
    box = np.array(axes.get_window_extent().extents).reshape(2, 2) / POINT_PIXELS
    ends = np.concatenate([_on_page(axes, one.points[-1:]) for one, _ in texts]).clip(*box)
    line_height = LABEL_SIZE * 1.28
    middles = spread(ends[:, 1].tolist(), line_height, box[0, 1] + line_height / 4, box[1, 1] - line_height / 4)
    for (one, text), (x, y), middle in zip(texts, ends, middles, strict=True):
        text.set_position((_LEADER_POINTS, middle - box[:, 1].mean()))
        knee = max(x + 3, box[1, 0] + 2)  # level up to the axes' edge, then to the text
        corners = np.array([(x, y), (knee, y), (box[1, 0] + _LEADER_POINTS - 3, middle)]) * POINT_PIXELS
        leader = Line2D(*corners.T, color=one.style.colour, linestyle=(0, (1, 1.5)), linewidth=0.8, alpha=0.8)
        axes.figure.add_artist(leader)
        leader.set_transform(IdentityTransform())


def write_inside(axes: Axes, series: Sequence[Series]) -> None:
    """Each where it covers least and is near what it names. Names choose before notes, least choice first."""
    frame = np.array([axes.get_window_extent().extents]) / POINT_PIXELS
    drawn = [(one.of or one.label, _covered(axes, one)) for one in series]
    texts, lines = [_NO_BOXES], [_NO_BOXES]  # the labels that have their place, and their leaders
    wanted = [(one, _places(axes, one)) for one in series if one.label and one.inside]
    for one, places in sorted(wanted, key=lambda pair: (-pair[0].label_size, len(pair[1]))):
        text = axes.annotate(one.label, one.points[0], xytext=(0, 0), textcoords="offset points")
        text.set(color=ink(one.style.colour), fontsize=one.label_size, ha="center", va="center", parse_math=False)
        text.set(fontweight="bold" if one.style.width > _BOLD_FROM_POINTS else "normal", zorder=6)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        extent = text.get_window_extent()
        half = np.array([extent.width, extent.height]) / POINT_PIXELS / 2
        name = one.of or one.label
        own = np.concatenate([_NO_BOXES, *(boxes for of, boxes in drawn if of == name)])
        others = np.concatenate([_NO_BOXES, *(boxes for of, boxes in drawn if of != name), *texts])
        # All places times all offsets: the text's middle from the place, and its box on the page.
        middles = np.column_stack([_OFFSETS[:, 0] + np.sign(_OFFSETS[:, 0]) * half[0], _OFFSETS[:, 1]])
        centres = (places[:, None] + middles).reshape(-1, 2)
        boxes = np.concatenate([centres - half - _AIR_POINTS, centres + half + _AIR_POINTS], axis=1)
        away = 0.5 * np.abs(_OFFSETS).sum(axis=1) + _LAST_PLACE * np.arange(len(places))[:, None] / len(places)
        # A thin line from the nearest point of the text's edge to its place, where the text stands far off.
        far = _gaps(boxes, own) > _LEADER_POINTS if len(own) else np.zeros(len(boxes), dtype=bool)
        starts = np.clip(0.0, middles - half, middles + half)
        leaders = _along(places, starts)
        crossed = far & _touch(leaders, np.concatenate(texts)) | (_overlaps(boxes, np.concatenate(lines)) > 0)
        best = int(np.argmin(_costs(boxes, own, others, frame) + away.reshape(-1) + _CROSSED * crossed))
        place, middle = places[best // len(_OFFSETS)], middles[best % len(_OFFSETS)]
        x, y = axes.transData.inverted().transform(place * POINT_PIXELS)
        text.xy = (float(x), float(y))
        text.set_position((float(middle[0]), float(middle[1])))
        texts.append(boxes[best : best + 1])
        if far[best]:
            lines.append(np.hstack([leaders[best] - _AIR_POINTS, leaders[best] + _AIR_POINTS]))
            arrow = {"arrowstyle": "-", "color": one.style.colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
            across, up = starts[best % len(_OFFSETS)].tolist()
            line = axes.annotate("", text.xy, (across, up), textcoords="offset points", arrowprops=arrow)
            line.set_zorder(4.5)


def _costs(boxes: Boxes, own: Boxes, others: Boxes, frame: Boxes) -> NDArray[np.float64]:
    """(boxes,): how bad each is."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    costs = _COVERED * (_overlaps(boxes, own) + _overlaps(boxes, others)) + _OUTSIDE * (area - _overlaps(boxes, frame))
    if len(own) and len(others):
        costs += _MISTAKEN * np.clip(_gaps(boxes, own) + _AIR_POINTS - _gaps(boxes, others), 0, None)
    return costs


def _along(places: NDArray[np.float64], starts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(places * starts, points, 2): points of the lines to each place from each start, which is relative to it."""
    shares = np.linspace(0.0, 1.0, 12)[:, None]
    return (places[:, None, None] + starts[None, :, None] * shares).reshape(-1, len(shares), 2)


def _touch(lines: NDArray[np.float64], boxes: Boxes) -> NDArray[np.bool_]:
    """(lines,): whether any point of each is in any of the boxes."""
    points = lines[:, :, None]
    inside = (points >= boxes[:, :2]).all(axis=-1) & (points <= boxes[:, 2:]).all(axis=-1)
    return np.asarray(inside.any(axis=-1).any(axis=-1))


def _overlaps(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """(boxes,): square points of each that the others cover."""
    sides = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
    return np.asarray(np.clip(sides, 0, None).prod(axis=2).sum(axis=1))


def _gaps(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """(boxes,): points from each to the nearest of the others."""
    apart = np.maximum(others[:, :2] - boxes[:, None, 2:], boxes[:, None, :2] - others[:, 2:])
    return np.asarray(np.hypot(*np.moveaxis(np.clip(apart, 0, None), 2, 0)).min(axis=1))


def _covered(axes: Axes, series: Series) -> Boxes:
    """Boxes along a line and around its markers."""
    style, shapes = series.style, []
    if style.width:
        shapes.append((_sampled(axes, series.points, _STEP_POINTS), style.width))
    if style.marker:
        shapes.append((_on_page(axes, series.points), style.marker_size))
    halves = [(middles, (size + _AIR_POINTS) / 2) for middles, size in shapes]
    return np.concatenate([_NO_BOXES, *(np.hstack([middles - half, middles + half]) for middles, half in halves)])


def _places(axes: Axes, series: Series) -> NDArray[np.float64]:
    """Where the label may stand, the best first: on a line outwards from its middle, else the points in their order."""
    if not series.style.width:
        return _on_page(axes, series.points)
    places = _sampled(axes, series.points, 3 * _STEP_POINTS)
    return places[sorted(range(len(places)), key=lambda index: abs(2 * index - len(places) + 1))]


def _sampled(axes: Axes, points: Points, step: float) -> NDArray[np.float64]:
    corners = _on_page(axes, points)
    lengths = np.concatenate([[0.0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    at = np.linspace(0, lengths[-1], 2 + int(lengths[-1] / step)) if lengths[-1] else np.zeros(1)
    return np.column_stack([np.interp(at, lengths, corners[:, axis]) for axis in (0, 1)])


def _on_page(axes: Axes, points: Points) -> NDArray[np.float64]:
    """(points, 2): in points of the page."""
    pixels = np.asarray(axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2)))
    # A zero on a log axis lies a thousand decades down.
    return np.clip(pixels * 72 / DPI, -_FAR_POINTS, _FAR_POINTS)
