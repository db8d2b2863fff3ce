"""The figures decode, have their size, and nothing is clipped."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lowmem.report.figures import Picture, draw_all
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun


def pixels(picture: Picture) -> np.ndarray:
    assert picture.png.startswith(b"\x89PNG")
    image: np.ndarray = imread(io.BytesIO(picture.png))
    return image


def assert_margins_are_white(picture: Picture) -> None:
    """Text that runs out of the figure would leave ink on its edge."""
    image = pixels(picture)[..., :3]
    for edge in (image[:4], image[-4:], image[:, :4], image[:, -4:]):
        assert edge.min() == 1.0


def draw(*runs: Path) -> dict[str, Picture]:
    return {picture.file_name: picture for picture in draw_all([read_run(run) for run in runs])}


def test_six_runs(six_runs: list[Path]) -> None:
    pictures = draw(*six_runs)
    assert list(pictures) == ["loss.png", "test_error.png", "pair_20.png", "pair_56.png", "pair_110.png"]
    for name, picture in pictures.items():
        assert pixels(picture).shape[:2] == ((1520, 1200) if name.startswith("pair") else (840, 1200))
        assert_margins_are_white(picture)
    assert pictures["pair_110.png"].title == "Res110 against CNN110"
    assert "log" in pictures["test_error.png"].remark


def test_one_run_of_one_epoch(make_run: MakeRun) -> None:
    pictures = draw(make_run("cnn56", done=1))
    assert list(pictures) == ["loss.png", "test_error.png"]
    for picture in pictures.values():
        assert_margins_are_white(picture)


def test_no_rows_no_figure(make_run: MakeRun) -> None:
    assert draw(make_run("res20", done=0)) == {}
    assert "loss.png" in draw(make_run("res20", name="b", done=0), make_run("cnn20"))


def test_bottleneck_pairs_have_their_own_file(make_run: MakeRun) -> None:
    runs = [make_run(arch, model__block="bottleneck") for arch in ("res110", "cnn110")]
    assert "pair_110-bottleneck.png" in draw(*runs)


def test_many_long_names_make_the_figure_taller(make_run: MakeRun) -> None:
    runs = [make_run("res20", name=f"$res_20$-width16-quite-a-long-name-seed{n}", done=2, seed=n) for n in range(24)]
    loss = draw(*runs)["loss.png"]
    assert pixels(loss).shape[0] > 900
    assert_margins_are_white(loss)


@pytest.mark.parametrize("loss", ["nan", "inf", "1e30", "0", ""])
def test_strange_losses(make_run: MakeRun, loss: str) -> None:
    run = make_run("res20", done=2)
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write(f"3,1173,0.1,{loss},,,0,,,,,,,\n")
    with (run / "steps.csv").open("a", encoding="utf-8") as file:
        file.write(f"1173,3,0.1,{loss}\n")
    for picture in draw(run).values():
        assert_margins_are_white(picture)
