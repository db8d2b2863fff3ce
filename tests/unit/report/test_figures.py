"""What figures show of a run; they decode, have their size, are the same bytes again, and nothing is clipped."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lowmem.report import figures
from lowmem.report.chart import Chart, draw_charts
from lowmem.report.figures import (
    LOSS,
    TEST_ERROR,
    draw_rate_curve,
    draw_training,
    epoch_points,
    stairs,
    step_losses,
)
from lowmem.report.method_figures import Bar, draw_acceptance, draw_memory_curve
from lowmem.report.naming import common_classes
from lowmem.report.style import DPI, WIDTH_INCHES, Picture
from tests.unit.report.fake_runs import MakeRun, named

LONG = "a title that nobody would think of but a run folder may be called so, $x_1$, and it goes on and on and on"


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    image: np.ndarray = imread(io.BytesIO(png))[..., :3]
    return image


def assert_margins_are_white(png: bytes) -> None:
    """Text that runs out of the figure would leave ink on its edge, and what touches it is hard to read."""
    image, margin = pixels(png), 12
    for edge in (image[:margin], image[-margin:], image[:, :margin], image[:, -margin:]):
        assert edge.min() == 1.0


def draw(*runs: Path) -> dict[str, Picture]:
    return {picture.file_name: picture for picture in draw_training(named(*runs))}


def test_six_runs(six_runs: list[Path]) -> None:
    pictures = draw(*six_runs)
    assert list(pictures) == ["loss.png", "test_error.png", "pair_20.png", "pair_56.png", "pair_110.png"]
    for name, picture in pictures.items():
        assert pixels(picture.png).shape[:2] == ((1520, 1200) if name.startswith("pair") else (840, 1200))
        assert_margins_are_white(picture.png)
    assert pictures["pair_110.png"].title == "Res110 against CNN110"
    assert "log" in pictures["test_error.png"].remark


def test_one_run_of_one_epoch(make_run: MakeRun) -> None:
    pictures = draw(make_run("cnn56", done=1))
    assert list(pictures) == ["loss.png", "test_error.png"]
    for picture in pictures.values():
        assert_margins_are_white(picture.png)


def test_no_rows_no_figure(make_run: MakeRun) -> None:
    assert draw(make_run("res20", done=0)) == {}
    assert "loss.png" in draw(make_run("res20", name="b", done=0), make_run("cnn20"))


def test_bottleneck_pairs_have_their_own_file(make_run: MakeRun) -> None:
    runs = [make_run(arch, model__block="bottleneck") for arch in ("res110", "cnn110")]
    assert "pair_110-bottleneck.png" in draw(*runs)


def test_many_long_names_make_the_figure_taller(make_run: MakeRun) -> None:
    runs = [make_run("res20", name=f"$res_20$-width16-quite-a-long-name-seed{n}", done=2, seed=n) for n in range(24)]
    loss = draw(*runs)["loss.png"]
    assert pixels(loss.png).shape[0] > 900
    assert_margins_are_white(loss.png)


@pytest.mark.parametrize("loss", ["nan", "inf", "1e30", "0", ""])
def test_strange_losses(make_run: MakeRun, loss: str) -> None:
    run = make_run("res20", done=2)
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write(f"3,1173,0.1,{loss},,,0,,,,,,,,,,,,,\n")
    with (run / "steps.csv").open("a", encoding="utf-8") as file:
        file.write(f"1173,3,0.1,{loss}\n")
    for picture in draw(run).values():
        assert_margins_are_white(picture.png)


def watch_charts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Chart, str]]:
    """Grows with every figure that is drawn: its first chart, and the remark."""
    drawn: list[tuple[Chart, str]] = []

    def record(charts: list[Chart], height: float, remark: str = "") -> Figure:
        drawn.append((charts[0], remark))
        return draw_charts(charts, height, remark)

    monkeypatch.setattr(figures, "draw_charts", record)
    return drawn


def test_a_run_that_diverged_is_seen_even_alone(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is lowest; and the chart says what it leaves out, and which line is what."""
    drawn = watch_charts(monkeypatch)
    run = make_run("res20", done=2)
    rows = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    losses = ("9341813685810.4258", "12345.678")
    table = [row.split(",") for row in rows[1:]]
    lines = [",".join([*row[:3], loss, *row[4:]]) for row, loss in zip(table, losses, strict=True)]
    (run / "metrics.csv").write_text("\n".join([rows[0], *lines]) + "\n", encoding="utf-8")
    draw(run)
    (loss, remark), (error, none) = drawn
    assert loss.y_limits[1] > 12345.678
    assert "cut off" in loss.y_title
    assert "faint loss of single steps" in remark
    assert [one.label for one in loss.series if one.label.startswith("Res20")] == ["Res20  12,346"]
    assert "cut off" not in error.y_title
    assert none == ""


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
    assert pixels(png).shape[1] == WIDTH_INCHES * DPI
    assert_margins_are_white(png)


def test_a_reports_figures_are_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run("res20", done=2)
    first, second = draw(run), draw(run)
    assert first == second
    assert not [picture for picture in first.values() if b"Software" in picture.png]


@pytest.mark.parametrize(
    "points", [[], [(2.0, 0.1)], pytest.param([(0.0, 0.1), (2.0, 0.0), (3.0, 0.0)], marks=pytest.mark.slow)]
)
def test_a_fork_of_which_little_is_known(points: list[tuple[float, float]]) -> None:
    assert_margins_are_white(draw_rate_curve("b", points, points, points, 2.0))


def test_a_rate_that_ends_at_zero_is_drawn_on_a_linear_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = watch_charts(monkeypatch)
    for last in (0.01, 0.0):
        draw_rate_curve("b", [(0.0, 0.1), (2.0, 0.2)], [], [(2.0, 0.2), (3.0, last)], 2.0)
    (log, _), (linear, _) = drawn
    assert (log.log, log.y_title) == (True, "learning rate, log scale")
    assert (linear.log, linear.y_title, linear.y_limits[0]) == (False, "learning rate", 0.0)
    assert linear.y_limits[1] > 0.2


def test_a_rate_holds_up_to_the_next() -> None:
    assert stairs([(0.0, 0.1), (2.0, 0.01), (3.0, 0.01)]) == [(0, 0.1), (2, 0.1), (2, 0.01), (3, 0.01), (3, 0.01)]


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_chance_levels() -> None:
    assert LOSS.chance(10) == pytest.approx(2.302585)
    assert TEST_ERROR.chance(10) == pytest.approx(90)
    assert "90 %" in TEST_ERROR.chance_text(10)


def test_values_that_are_no_number_are_left_out(make_run: MakeRun) -> None:
    run = make_run("res20", done=2)
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("3,1173,0.1,nan,,,,,,,,,,,,,,,,\n4,1564,0.1,inf,,,90,,,,,,,,,,,,,\n")
    (found,) = named(run)
    assert [epoch for epoch, _ in epoch_points(found.history, LOSS)] == [1, 2]
    assert [epoch for epoch, _ in epoch_points(found.history, TEST_ERROR)] == [1, 2, 4]


def test_steps_stand_at_their_share_of_the_epoch(make_run: MakeRun) -> None:
    (run,) = named(make_run("res20", done=2))
    epochs = [epoch for epoch, _ in step_losses(run.history)]
    assert epochs[0] == pytest.approx(20 / 391)
    assert 1.9 < max(epochs) <= 2
    assert all(math.isfinite(loss) for _, loss in step_losses(run.history))


def test_no_epoch_no_curve(make_run: MakeRun) -> None:
    (run,) = named(make_run("res20", done=0))
    assert epoch_points(run.history, LOSS) == step_losses(run.history) == []


def test_classes_must_agree(make_run: MakeRun) -> None:
    known, unknown = named(make_run("res20"), make_run("cnn20", done=0, data__source="folder:pets"))
    assert common_classes([known, unknown]) == 10
    assert common_classes([unknown]) is None
