"""How everything in a figure looks: sizes, the lines of a chart, one look a network and one a way of doing the step.

A look is the same in every figure and whatever else is shown. A residual net is solid and dark, its plain counterpart
dashed and of another lightness: a pair stays apart in grey print. The six networks of the homework report stay apart
in normal vision and under each simulated colour blindness by a CIELAB distance of 15 or more (checked in the tests);
all colours have a contrast of 2.7 or more on white. Ways of doing the step have the colours of Okabe and Ito, and a
marker that repeats what the colour says.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.schema import ModelConfig

# A figure is six inches wide and 1,200 pixels: a column of a printed page, and on a phone of 360 points its smallest
# text is still some nine points high.
WIDTH_INCHES, HEIGHT_INCHES = 6.0, 4.2
PAIR_HEIGHT_INCHES = 7.6  # two charts above each other: side by side they would be too narrow for a phone
DPI = 200
FORMATS = ("png", "jpg", "jpeg", "svg", "pdf")  # of a picture, as the suffixes of their files
POINT_PIXELS = DPI / 72
TITLE_SIZE, AXIS_SIZE, TICK_SIZE, LABEL_SIZE, LEAST_SIZE = 13.0, 11.5, 11.0, 11.5, 9.5  # points

NEUTRAL = "#666666"  # chance levels and notes: no network has it
MEASURED, PREDICTED = "#0072B2", "#E69F00"
DOTTED = (0, (1.0, 2.0))

Points = Sequence[tuple[float, float]]
"""(x, y) in data units."""


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn: a matplotlib line style and marker, widths in points."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    width: float = 1.2  # 0: markers only
    marker: str = ""
    marker_size: float = 4.5
    face: str = ""  # the inside of the markers: as their edge, else a colour or "none"
    opacity: float = 1.0


@dataclass(frozen=True)
class Series:
    """A line of a chart (none without points), and the text at its end beside the axes, or with `inside` next to it
    where there is room. `of`: what the text is about, where several series show the same; by default the label."""

    points: Points
    style: LineStyle
    label: str = ""
    inside: bool = False
    of: str = ""
    label_size: float = LABEL_SIZE


@dataclass(frozen=True)
class Picture:
    """A PNG with its file name and the words that go with it."""

    file_name: str
    png: bytes
    title: str
    remark: str


# By depth and block: of the residual net, and of its plain counterpart.
_NETWORK_COLOURS = {
    ("20", "basic"): ("#0b4f9e", "#4a9be0"),
    ("56", "basic"): ("#a83800", "#e5822e"),
    ("110", "basic"): ("#1c1c1c", "#c94f9c"),
    ("110", "bottleneck"): ("#00594a", "#2b9c81"),
    ("56", "bottleneck"): ("#7a5c00", "#b8930a"),
    ("34", "basic"): ("#4b2a8c", "#9678d3"),
    ("50", "bottleneck"): ("#8f1027", "#e06377"),
    ("101", "bottleneck"): ("#3f6212", "#7ba428"),
}
_OTHERS_DASHES = (0, (5.0, 1.5, 1.0, 1.5))  # of networks that are not of the family
_TURN_WIDTHS = (1.9, 1.3, 0.9)  # the runs of one network, which share its colour

METHOD_STYLES: dict[str, LineStyle] = {
    "lowmem": LineStyle(MEASURED, width=2.5, marker="o"),
    "lowmem with host memory": LineStyle("#CC79A7", width=1.9, marker="v"),
    "plain PyTorch": LineStyle("#000000", width=0.0, marker="D"),
    "plain PyTorch, fused optimizer": LineStyle("#000000", width=0.0, marker="D", face="white"),
    "plain PyTorch, nondeterministic kernels": LineStyle("#888888", width=0.0, marker="D", face="white"),
    "checkpoint, selective": LineStyle("#D55E00", width=0.0, marker="^"),
    "checkpoint per block": LineStyle("#009E73", width=0.0, marker="s"),
    "one policy for all blocks": LineStyle(PREDICTED, marker="o"),
    "checkpoint every k-th block": LineStyle("#009E73", marker="s"),
}


def network_style(model: ModelConfig, turn: int = 0) -> LineStyle:
    """By architecture and block alone, never by the other runs of a figure. `turn`: how many runs of it came before."""
    width = _TURN_WIDTHS[min(turn, len(_TURN_WIDTHS) - 1)]
    if model.spec is not None:  # which colour follows from the name: two networks may share one
        colours = list(_NETWORK_COLOURS.values())
        return LineStyle(colours[zlib.crc32(model.name.encode()) % len(colours)][0], _OTHERS_DASHES, width)
    residual, plain = _NETWORK_COLOURS[model.arch[3:], model.block]
    return LineStyle(residual, "-", width) if model.arch.startswith("res") else LineStyle(plain, (0, (4.0, 1.6)), width)
