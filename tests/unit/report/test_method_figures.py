"""The picture of `lowmem bench`."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lowmem.bench import FAMILIES
from lowmem.report.method_figures import MeasuredPoint, draw_bench
from lowmem.report.style import METHOD_STYLES
from tests.unit.report.test_figures import pixels


def a_point(mib: float, ratio: float, note: str = "") -> MeasuredPoint:
    return MeasuredPoint(mib=mib, predicted_mib=mib, ratio=ratio, low=ratio - 0.05, high=ratio + 0.05, note=note)


def colours_of(png: bytes) -> set[tuple[int, ...]]:
    return {tuple(one) for one in np.unique((255 * pixels(png)).round().astype(int).reshape(-1, 3), axis=0)}


def test_every_way_is_in_the_picture() -> None:
    curves = {name: [a_point(100 + 50 * place, 1 + place / 10)] for place, name in enumerate(FAMILIES)}
    curves["lowmem"] += [a_point(60, 1.6, "least"), a_point(320, 1.05, "95%")]
    found = colours_of(draw_bench("res20", curves, "peak"))
    for name in FAMILIES:
        assert tuple(round(255 * part) for part in to_rgb(METHOD_STYLES[name].colour)) in found, name


@pytest.mark.parametrize("count", [0, 1])
def test_little_can_be_drawn_too(count: int) -> None:
    png = draw_bench("res20", {"plain PyTorch": [a_point(100, 1.0)] * count}, "peak")
    assert png.startswith(b"\x89PNG")
