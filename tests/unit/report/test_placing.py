"""Labels inside the axes: on no curve, no marker, no other label, and always on the same place."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lowmem.report import placing
from lowmem.report.bench_curve import Point, bench_figure
from lowmem.report.memory_curve import draw_memory_curve, memory_figure
from lowmem.report.methods import STYLES

# `lowmem plan --arch res110 --block bottleneck --card gtx1060-6g --vram 6G --curve`; of lowmem's points each third.
RES110: dict[str, list[tuple[int, float]]] = {
    "lowmem": [
        (1156621704, 0.3116),
        (1226636168, 0.2591),
        (1293683592, 0.2372),
        (1361894280, 0.2156),
        (1432150920, 0.1985),
        (1499279240, 0.1819),
        (1566388104, 0.1689),
        (1633757064, 0.1559),
        (1704806280, 0.1484),
        (1771918216, 0.1411),
        (1839027080, 0.1364),
        (1906129800, 0.1318),
        (1973244296, 0.1274),
        (2044547464, 0.1241),
        (2111656328, 0.121),
        (2178765192, 0.1178),
        (2245874056, 0.1147),
        (2312982920, 0.1115),
        (2384286088, 0.1082),
        (2451394952, 0.1051),
        (2518503816, 0.1019),
        (2585612680, 0.0988),
        (2652721544, 0.0956),
        (2724030856, 0.0922),
        (2791139720, 0.0891),
        (2858248584, 0.0859),
        (2925357448, 0.0828),
        (2992466312, 0.0797),
        (3063769480, 0.0765),
        (3130878344, 0.0734),
        (3197987208, 0.0703),
        (3265096072, 0.0671),
        (3332204936, 0.064),
        (3403501960, 0.0602),
        (3470610824, 0.0571),
        (3537719688, 0.054),
        (3604828552, 0.0509),
        (3671937416, 0.0478),
        (3743240584, 0.0446),
        (3810349448, 0.0415),
        (3877458312, 0.039),
        (3944567176, 0.0368),
        (4011676040, 0.0343),
        (4082979208, 0.0324),
        (4150088072, 0.0306),
        (4217196936, 0.0288),
        (4284305800, 0.027),
        (4351414664, 0.0252),
        (4422717832, 0.0233),
        (4489826696, 0.0215),
        (4556935560, 0.0197),
        (4624044424, 0.0179),
        (4691153288, 0.0161),
        (4762456456, 0.0142),
        (4837953928, 0.0124),
        (4905062792, 0.0108),
        (4972171656, 0.0093),
        (5043474824, 0.0078),
        (5118972296, 0.0064),
        (5190275464, 0.0059),
        (5257384328, 0.0048),
        (5349659016, 0.0037),
        (5450322312, 0.003),
        (5521625480, 0.0018),
        (5597122952, 0.0011),
        (5664231816, 0.0),
        (5664231816, 0.0),
    ],
    "one policy for all blocks": [
        (2116921736, 0.2767),
        (2512238984, 0.1503),
        (2898114952, 0.1396),
        (2980948360, 0.0907),
        (3366824328, 0.08),
        (3459099016, 0.0776),
        (3844974984, 0.0669),
        (4779233672, 0.0238),
        (5299327368, 0.0155),
        (5328687496, 0.009),
        (5513236872, 0.0041),
        (5601317256, 0.0017),
        (5664231816, 0.0),
    ],
    "checkpoint every k-th block": [
        (1625755528, 0.3061),
        (2116512648, 0.2765),
        (3526433160, 0.2553),
        (4103674248, 0.1964),
    ],
    "plain PyTorch": [(5680601088, 0.0)],
}
# `lowmem plan --arch res20 --width 16 --vram 60M --curve`: steep, and close together where plain PyTorch stands.
RES20: dict[str, list[tuple[int, float]]] = {
    "lowmem": [
        (61223896, 0.1712),
        (69612504, 0.1441),
        (78662360, 0.1236),
        (88099288, 0.1073),
        (97536856, 0.0934),
        (106974040, 0.0796),
        (116411480, 0.0659),
        (125848664, 0.0521),
        (135285848, 0.0386),
        (144723032, 0.025),
        (154160216, 0.0114),
        (167791704, 0.0),
    ],
    "one policy for all blocks": [
        (69594328, 0.2602),
        (96063576, 0.1659),
        (117460056, 0.1108),
        (135285848, 0.0495),
        (153111640, 0.0289),
        (167791704, 0.0),
    ],
    "checkpoint every k-th block": [(69593688, 0.2597)],
    "plain PyTorch": [(169346560, 0.0)],
}
FEW = {name: points[:: max(1, len(points) // 4)] for name, points in RES110.items()}
MIB = 1 << 20


def boxes_of(figure: Figure) -> dict[str, Bbox]:
    """The labels as they stand in the drawn figure; title and axis' words have another place."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text() and text.get_zorder() == 6]
    return {text.get_text(): text.get_window_extent(canvas.get_renderer()) for text in texts}


def collisions(figure: Figure) -> list[str]:
    """Asked of matplotlib's own lines and texts, not of the boxes that placing made of them."""
    axes, boxes = figure.axes[0], boxes_of(figure)
    found = [f"{one} on {other}" for one, other in combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]
    frame = axes.get_window_extent()
    for text, box in boxes.items():
        if box.x0 < frame.x0 or box.y0 < frame.y0 or box.x1 > frame.x1 or box.y1 > frame.y1:
            found.append(f"{text} outside")
        for line in axes.lines:
            path = line.get_path().transformed(line.get_transform())
            if line.get_linestyle() != "None" and path.intersects_bbox(box, filled=False):
                found.append(f"{text} on a line")
            half = line.get_markersize() / 2 * figure.dpi / 72 if line.get_marker() not in ("", "None") else 0.0
            if half and any(box.padded(half).contains(x, y) for x, y in path.vertices):
                found.append(f"{text} on a marker")
    return found


@pytest.mark.parametrize("curves", [RES110, FEW], ids=["all", "few"])
@pytest.mark.parametrize("budget_mib", [300, 1_400, 2_600, 5_242, 6_000, 60_000])
def test_nothing_lies_on_anything(curves: dict[str, list[tuple[int, float]]], budget_mib: int) -> None:
    figure = memory_figure("res110", curves, budget_mib * MIB)
    assert {*curves} < {*boxes_of(figure)}
    assert any(text.startswith(f"budget {budget_mib:,} MiB") for text in boxes_of(figure))
    assert collisions(figure) == []


@pytest.mark.parametrize("budget_mib", [50, 60, 5_000])
def test_nor_where_the_curves_are_steep(budget_mib: int) -> None:
    assert collisions(memory_figure("res20", RES20, budget_mib * MIB)) == []


def test_without_placing_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_cost", lambda *_: 0.0)
    assert collisions(memory_figure("res110", RES110, 5_242 * MIB))


def test_measured_curves_too() -> None:
    curves = {
        name: [Point(size / MIB, size / MIB, 1 + share, 0.99 + share, 1.01 + share) for size, share in points]
        for name, points in FEW.items()
    }
    assert collisions(bench_figure("res110", curves, "peak")) == []


def test_the_same_place_each_time() -> None:
    first, second = (draw_memory_curve("res110", RES110, 5_242 * MIB) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", STYLES)
def test_words_are_legible_in_grey(name: str) -> None:
    grey = np.array(to_rgb(placing.ink(STYLES[name].colour))) @ [0.299, 0.587, 0.114]
    assert grey < 0.56
