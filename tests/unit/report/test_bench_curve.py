"""The picture of `lowmem bench`, and the colours that all pictures of methods share."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lowmem.bench.cells import FAMILIES
from lowmem.report.bench_curve import Point, draw_bench
from lowmem.report.methods import STYLES


def a_point(mib: float, ratio: float, note: str = "") -> Point:
    return Point(mib=mib, predicted_mib=mib, ratio=ratio, low=ratio - 0.05, high=ratio + 0.05, note=note)


def colours_of(png: bytes) -> set[tuple[int, ...]]:
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    return {tuple(one) for one in np.unique((255 * pixels).round().astype(int).reshape(-1, 3), axis=0)}


def test_every_way_is_in_the_picture() -> None:
    curves = {name: [a_point(100 + 50 * place, 1 + place / 10)] for place, name in enumerate(FAMILIES)}
    curves["lowmem"] += [a_point(60, 1.6, "least"), a_point(320, 1.05, "95%")]
    found = colours_of(draw_bench("res20", curves, "peak"))
    for name in FAMILIES:
        assert tuple(round(255 * part) for part in to_rgb(STYLES[name].colour)) in found, name


@pytest.mark.parametrize("count", [0, 1])
def test_little_can_be_drawn_too(count: int) -> None:
    png = draw_bench("res20", {"plain PyTorch": [a_point(100, 1.0)] * count}, "peak")
    assert png.startswith(b"\x89PNG")


def test_two_ways_never_look_the_same() -> None:
    drawn = [(STYLES[name].colour, STYLES[name].marker, STYLES[name].filled) for name in FAMILIES]
    assert len(set(drawn)) == len(drawn)
