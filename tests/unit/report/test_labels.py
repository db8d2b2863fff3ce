"""Labels beside the axes: near their place, in order, apart. Inside: on no curve, no marker, no other label."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from lowmem.core.units import MIB
from lowmem.report import method_figures
from lowmem.report.labels import ink, spread
from lowmem.report.method_figures import MeasuredPoint, draw_bench, draw_memory_curve
from lowmem.report.style import METHOD_STYLES


def test_labels_that_do_not_touch_stay() -> None:
    assert spread([10, 50, 30], gap=10, low=0, high=100) == [10, 50, 30]


def test_two_on_one_place_move_apart_alike() -> None:
    assert spread([50, 50], gap=10, low=0, high=100) == [45, 55]


def test_a_pushed_label_pushes_its_neighbour() -> None:
    assert spread([50, 52, 61], gap=10, low=0, high=100) == pytest.approx([44.333, 54.333, 64.333], abs=0.01)


def test_edges_hold() -> None:
    assert spread([0, 0, 0], gap=10, low=0, high=100) == [0, 10, 20]
    assert spread([100, 99], gap=10, low=0, high=100) == [100, 90]


def test_too_many_share_the_room() -> None:
    assert spread([5, 5, 5], gap=10, low=0, high=10) == [0, 5, 10]


def test_nothing() -> None:
    assert spread([], gap=10, low=0, high=10) == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_always_apart_in_order_and_inside(wanted: list[float]) -> None:
    placed = spread(wanted, gap=8, low=0, high=100)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in placed)
    assert all(after - before >= 8 - 1e-9 for before, after in pairwise(sorted(placed)))
    by_wish = [place for _, place in sorted(zip(wanted, placed, strict=True))]
    assert by_wish == sorted(by_wish)


# As of `lowmem plan --arch res110 --block bottleneck --card gtx1060-6g --vram 6G --curve`: many plans are a line.
RES110: dict[str, list[tuple[int, float]]] = {
    "lowmem": [(round((1103 + 4299 * t) * MIB), 0.3116 * (1 - t) ** 2.2) for t in np.linspace(0, 1, 67)],
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
# `lowmem plan --arch res20 --width 16 --tensors 60M --curve`: steep, and close together where plain PyTorch stands.
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
PUBLISHED = Path(__file__).parents[3] / "benchmarks/results/memory_curve/res110_bottleneck_host.json"
CROWDS = (1, 2, 7)
FEW = {name: points[:: max(1, len(points) // 4)] for name, points in RES110.items()}


def figure_of(draw: Callable[..., bytes], *given: Any) -> Figure:
    """What is drawn, before it becomes a PNG."""
    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method_figures, "to_bytes", lambda figure, *_: drawn.append(figure))
        draw(*given)
    return drawn[0]


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
        leaders = [one.arrow_patch for one in axes.texts if isinstance(one, Annotation) and one.arrow_patch is not None]
        for leader in leaders:
            if leader.get_path().transformed(leader.get_transform()).intersects_bbox(box.padded(-6), filled=False):
                found.append(f"a leader through {text}")
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
    figure = figure_of(draw_memory_curve, "res110", curves, budget_mib * MIB)
    assert {*curves} < {*boxes_of(figure)}
    assert any(text.startswith(f"budget {budget_mib:,} MiB") for text in boxes_of(figure))
    assert collisions(figure) == []


@pytest.mark.parametrize("budget_mib", [1_400, 5_242, 60_000])
def test_nor_with_host_memory(budget_mib: int) -> None:
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["curve"]
    figure = figure_of(draw_memory_curve, "res110", published, budget_mib * MIB)
    assert "lowmem\nwith host memory" in boxes_of(figure)
    assert collisions(figure) == []


@pytest.mark.parametrize("budget_mib", [50, 60, 5_000])
def test_nor_where_the_curves_are_steep(budget_mib: int) -> None:
    assert collisions(figure_of(draw_memory_curve, "res20", RES20, budget_mib * MIB)) == []


def test_without_placing_they_would() -> None:
    figure = figure_of(draw_memory_curve, "res110", RES110, 5_242 * MIB)
    for text in figure.axes[0].texts:
        text.set_position((0.0, 0.0))
    assert collisions(figure)


def test_measured_curves_too() -> None:
    curves = {
        name: [MeasuredPoint(size / MIB, size / MIB, 1 + share, 0.99 + share, 1.01 + share) for size, share in points]
        for name, points in FEW.items()
    }
    assert collisions(figure_of(draw_bench, "res110", curves, "peak")) == []


@pytest.mark.parametrize("seed", CROWDS)
def test_no_leader_runs_through_a_label(seed: int) -> None:
    """Seven ways close together: some have to stand far off."""
    drawn = random.Random(seed)
    curves: dict[str, list[MeasuredPoint]] = {}
    for name in METHOD_STYLES:
        mib, ratio = drawn.uniform(60, 130), drawn.uniform(0.95, 1.3)
        curves[name] = [MeasuredPoint(mib, mib, ratio, ratio - 0.03, ratio + 0.03)]
    assert not [words for words in collisions(figure_of(draw_bench, "crowd", curves, "peak")) if "leader" in words]


def test_the_same_place_each_time() -> None:
    first, second = (draw_memory_curve("res110", RES110, 5_242 * MIB) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", METHOD_STYLES)
def test_words_are_legible_in_grey(name: str) -> None:
    grey = np.array(to_rgb(ink(METHOD_STYLES[name].colour))) @ [0.299, 0.587, 0.114]
    assert grey < 0.56
