"""The figures of gradients: what they draw, and that they are not empty."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lowmem.report import write_report
from lowmem.report.figures import by_depth, draw_gradients, moments, over_time
from lowmem.runs.rows import GRADIENT_TABLE, GradientRow, GradientTable, gradient_line
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun, named
from tests.unit.report.test_figures import assert_margins_are_white, pixels

LAYERS = ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight", "linear.weight")


def with_gradients(run: Path, start: float, layers: tuple[str, ...] = LAYERS, rows: int = 40) -> Path:
    """The first layer's norm begins at `start` and falls by a tenth a row; the last layer's is 0.5."""
    lines = [GRADIENT_TABLE.of_layers(layers).header]
    for index in range(rows):
        norms = [start * 0.9**index, 0.2, 7.0, 0.5]
        lines.append(gradient_line(1 + 48 * index, 1 + 48 * index // 391, norms))
    (run / "gradients.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


def test_by_depth_is_from_the_output_back_without_projections() -> None:
    gradients = GradientTable(
        LAYERS, (GradientRow(1, 1, (4.0, 0.0, 9.0, 1.0)), GradientRow(2, 1, (math.inf, 3.0, 9.0, 1.0)))
    )
    assert by_depth(gradients, gradients.rows[0]) == [(1.0, 1.0), (3.0, 4.0)]  # a zero is not drawn
    assert by_depth(gradients, gradients.rows[1]) == [(1.0, 1.0), (2.0, 3.0)]


def test_moments_are_spread_from_the_first_to_the_last() -> None:
    gradients = GradientTable(LAYERS, tuple(GradientRow(step, 1, (1.0,) * 4) for step in range(1, 101)))
    assert [row.step for row in moments(gradients, 4)] == [1, 34, 67, 100]
    assert [row.step for row in moments(gradients, 2)] == [1, 100]
    assert moments(GradientTable(LAYERS, gradients.rows[:1]), 4) == [gradients.rows[0]]


def test_over_time_is_in_epochs(make_run: MakeRun) -> None:
    history = read_run(with_gradients(make_run("res20"), 100.0))
    points = over_time(history, 0)
    assert points[0] == (pytest.approx(1 / 391), 100.0)
    assert points[10] == (pytest.approx(481 / 391), pytest.approx(100 * 0.9**10, rel=1e-5))
    assert over_time(history, -1)[5][1] == 0.5
    early = read_run(with_gradients(make_run("res20", name="early", done=0), 100.0))
    assert [x for x, _ in over_time(early, 0)][:2] == [1.0, 49.0]  # in steps


def test_one_run_has_one_figure(make_run: MakeRun) -> None:
    (picture,) = draw_gradients(named(with_gradients(make_run("cnn110"), 1e6)))
    assert (picture.file_name, picture.title) == ("gradients.png", "Gradients of CNN110")
    assert_margins_are_white(picture.png)
    image = pixels(picture.png)
    pink = np.abs(image - np.array([0xC9, 0x4F, 0x9C]) / 255).max(axis=2) < 0.02  # the colour of cnn110
    top, bottom = pink[: len(pink) // 2], pink[len(pink) // 2 :]
    assert top.sum() > 500
    assert bottom.sum() > 500


def test_a_pair_has_one_more(make_run: MakeRun) -> None:
    runs = [with_gradients(make_run(arch), start) for arch, start in (("res110", 10.0), ("cnn110", 1e6))]
    pictures = {one.file_name: one for one in draw_gradients(named(*runs))}
    assert list(pictures) == ["gradients_res110.png", "gradients_cnn110.png", "gradients_pair_110.png"]
    assert pictures["gradients_pair_110.png"].title == "Gradients of Res110 and CNN110"
    for picture in pictures.values():
        assert_margins_are_white(picture.png)


def test_without_records_there_is_no_figure(make_run: MakeRun) -> None:
    old, empty, zero = make_run("res20"), make_run("cnn20"), make_run("res56")
    with_gradients(empty, 1.0, rows=0)
    (zero / "gradients.csv").write_text("step,epoch,a,b\n1,1,0,0\n", encoding="utf-8")
    assert draw_gradients(named(old, empty, zero)) == []


def test_strange_names_and_one_row(make_run: MakeRun) -> None:
    runs = [with_gradients(make_run("res20", name=name), 1.0, rows=1) for name in ("a b/$x$", "ünd so")]
    pictures = draw_gradients(named(*runs))
    assert [one.file_name for one in pictures] == ["gradients_x.png", "gradients_nd-so.png"]
    for picture in pictures:
        assert_margins_are_white(picture.png)


def test_the_report_has_the_figures_and_says_what_went_wrong(make_run: MakeRun, tmp_path: Path) -> None:
    run = with_gradients(make_run("cnn110"), 1e6)
    with open(run / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"time": "t", "event": "rollback", "what": "the training loss is nan", "lr_scale": 0.25}\n')
        file.write('{"time": "t", "event": "stuck", "epoch": 3}\n')
    result = write_report([run], tmp_path / "out")
    assert (tmp_path / "out" / "gradients.png").is_file()
    text = result.markdown.read_text(encoding="utf-8")
    assert "![Gradients of CNN110](gradients.png)" in text
    assert "went back to a checkpoint once, at last with 0.25 of the learning rate" in text
    assert "learns nothing" in text
