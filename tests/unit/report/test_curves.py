"""What is drawn of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lowmem.report.curves import LOSS, TEST_ERROR, common_classes, curves_of, find_pairs
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun


def test_chance_levels() -> None:
    assert LOSS.chance(10) == pytest.approx(2.302585)
    assert TEST_ERROR.chance(10) == pytest.approx(90)
    assert "90 %" in TEST_ERROR.chance_text(10)


def test_values_that_are_no_number_are_left_out(make_run: MakeRun) -> None:
    run = make_run("res20", done=2)
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("3,1173,0.1,nan,,,,,,,,,,\n4,1564,0.1,inf,,,90,,,,,,,\n")
    (curve,) = curves_of([read_run(run)])
    assert [epoch for epoch, _ in curve.points(LOSS)] == [1, 2]
    assert [epoch for epoch, _ in curve.points(TEST_ERROR)] == [1, 2, 4]


def test_steps_stand_at_their_share_of_the_epoch(make_run: MakeRun) -> None:
    (curve,) = curves_of([read_run(make_run("res20", done=2))])
    epochs = [epoch for epoch, _ in curve.step_losses()]
    assert epochs[0] == pytest.approx(20 / 391)
    assert 1.9 < max(epochs) <= 2
    assert all(math.isfinite(loss) for _, loss in curve.step_losses())


def test_no_epoch_no_curve(make_run: MakeRun) -> None:
    (curve,) = curves_of([read_run(make_run("res20", done=0))])
    assert curve.points(LOSS) == []
    assert curve.step_losses() == []


def test_runs_of_one_network_share_colour_not_width(make_run: MakeRun) -> None:
    runs = [make_run("res20", name=f"s{seed}", seed=seed) for seed in range(2)]
    first, second = curves_of([read_run(run) for run in runs])
    assert first.colour == second.colour
    assert first.line_width > second.line_width
    assert first.label != second.label


def test_pairs_by_depth_and_block(make_run: MakeRun, six_runs: list[Path]) -> None:
    more = [make_run("res110", name="b", model__block="bottleneck"), make_run("res34"), make_run("cnn34", done=0)]
    pairs = find_pairs([read_run(run) for run in [*six_runs, *more]])
    assert list(pairs) == [(20, "basic"), (56, "basic"), (110, "basic")]
    assert [history.name for history in pairs[110, "basic"]] == ["res110", "cnn110"]


def test_classes_must_agree(make_run: MakeRun) -> None:
    known = read_run(make_run("res20"))
    unknown = read_run(make_run("cnn20", done=0, data__source="folder:pets"))
    assert common_classes([known, unknown]) == 10
    assert common_classes([unknown]) is None
