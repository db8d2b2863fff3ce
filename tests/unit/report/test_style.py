"""What every figure shares: the same bytes again, legible on a phone, nothing beyond its edge."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lowmem.report import style
from lowmem.report.acceptance import Bar, draw_acceptance
from lowmem.report.figures import draw_all
from lowmem.report.memory_curve import draw_memory_curve
from lowmem.report.rate_curve import draw_rate_curve
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun

LONG = "a title that nobody would think of but a run folder may be called so, $x_1$, and it goes on and on and on"
PHONE_POINTS = 360.0


def rate() -> bytes:
    past, before = [(0.0, 0.1), (2.0, 0.1)], [(2.0, 0.1), (4.0, 0.01), (5.0, 0.01)]
    return draw_rate_curve(LONG, past, before, [(2.0, 0.02), (5.0, 0.002)], 2.0)


def memory() -> bytes:
    curves = {"lowmem": [(10 << 20, 0.4), (50 << 20, 0.0)], "plain PyTorch": [(51 << 20, 0.0)]}
    return draw_memory_curve(LONG, curves, 30 << 20)


def acceptance() -> bytes:
    bars = [
        Bar(f"{LONG}\ntensors", 4890.0, 4902.0, 5240.0),
        Bar("refused", None, None, None, LONG),
        Bar("over", 100.0, 12345.0),
    ]
    return draw_acceptance(f"{LONG}\n{LONG}", bars, [Bar("plain", 0.431)])


@pytest.mark.parametrize("draw", [rate, memory, acceptance])
def test_the_same_bytes_and_nothing_beyond_the_edge(draw: Callable[[], bytes]) -> None:
    png = draw()
    assert png == draw()
    assert b"Software" not in png
    image: np.ndarray = imread(io.BytesIO(png))[..., :3]
    assert image.shape[1] == style.WIDTH_INCHES * style.DPI
    for edge in (image[:4], image[-4:], image[:, :4], image[:, -4:]):
        assert edge.min() == 1.0


def test_a_reports_figures_are_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run("res20", done=2)
    first, second = (draw_all([read_run(run)]) for _ in range(2))
    assert [picture.png for picture in first] == [picture.png for picture in second]
    assert not [picture for picture in first if b"Software" in picture.png]


def test_text_on_a_phone() -> None:
    """No type smaller than eight points of the screen, however wide the figure is drawn."""
    shrunk = PHONE_POINTS / (72 * style.WIDTH_INCHES)
    assert min(style.AXIS_SIZE, style.TICK_SIZE, style.LABEL_SIZE) * shrunk > 9
    assert style.LEAST_SIZE * shrunk > 7.5


def test_nobody_sets_up_figures_alone() -> None:
    """Size and file format are decided once."""
    folder = Path(style.__file__).parent
    alone = [path.name for path in folder.glob("*.py") if path.name != "style.py" and "savefig" in path.read_text()]
    assert not alone
