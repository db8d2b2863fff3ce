"""The learning-rate schedule, and that of two runs beside each other, in a few lines."""

from __future__ import annotations

import pytest

from lowmem.config.schema import Config, nest
from lowmem.config.settings import gather
from lowmem.train.schedule import (
    learning_rate,
    milestone_steps,
    next_low_start,
    rate_curve,
    side_by_side,
    starts_low,
)


def test_the_reports_schedule_at_full_length() -> None:
    config = gather().config
    rates = {epoch: learning_rate(config, 391, epoch * 391, low_start=False) for epoch in (0, 80, 81, 121, 122, 163)}
    assert rates == {0: 0.1, 80: 0.1, 81: 0.01, 121: 0.01, 122: 0.001, 163: 0.001}
    assert learning_rate(config, 391, 81 * 391 - 1, low_start=False) == 0.1


def test_a_short_run_scales_the_milestones() -> None:
    config = gather(flags={"train.epochs": 3}).config
    assert milestone_steps(config, 100) == (148, 223)


@pytest.mark.parametrize(
    ("arch", "sets", "low"),
    [
        ("res110", [], True),
        ("cnn110", [], True),
        ("res101", [], False),
        ("res20", ["schedule.low_start=always"], True),
        ("res110", ["schedule.low_start=never"], False),
        ("res110", ["optim.lr=0.005"], False),
    ],
)
def test_who_starts_low(arch: str, sets: list[str], low: bool) -> None:
    assert starts_low(gather(flags={"model.arch": arch}, sets=sets).config) is low


def test_a_network_of_ones_own_starts_low_only_if_asked_to() -> None:
    flags = {"model.spec": "torchvision:resnet101"}
    assert not starts_low(gather(flags=flags).config)
    assert starts_low(gather(flags=flags, sets=["schedule.low_start=always"]).config)


def test_the_low_start_ends_under_80_percent_error_or_at_the_first_milestone() -> None:
    config = gather(flags={"model.arch": "res110"}).config
    assert learning_rate(config, 391, 0, low_start=True) == 0.01
    assert next_low_start(config, True, 80.0)
    assert next_low_start(config, True, float("nan"))
    assert not next_low_start(config, True, 79.9)
    assert not next_low_start(config, False, 90.0)
    assert learning_rate(config, 391, 122 * 391, low_start=True) == 0.001


def _config(**flat: object) -> Config:
    return Config.model_validate(nest({key.replace("__", "."): value for key, value in flat.items()}))


def test_only_where_it_changes() -> None:
    curve = rate_curve(_config(), 391, 391 * 12, low_start=False)
    assert curve.points == ((12, 0.1), (81, 0.01), (122, 0.001))
    assert [curve.rate(at) for at in (11, 12, 80.5, 81, 163.9, 164)] == [None, 0.1, 0.1, 0.01, 0.001, None]


def test_two_runs() -> None:
    before = rate_curve(_config(), 391, 391 * 12, low_start=False)
    shorter = _config(optim__lr=0.05, train__epochs=123, schedule__milestones=[81, 100.5])
    after = rate_curve(shorter, 782, 782 * 12, low_start=False)
    assert side_by_side(before, after) == [
        "learning rate          before  after",
        "from epoch 13          0.1     0.05",
        "from epoch 61, 75% in  0.1     0.005",
        "from epoch 76, 37% in  0.1     0.0005",
        "from epoch 82          0.01    0.0005",
        "from epoch 123         0.001   0.0005",
        "last epoch             164     123",
    ]


def test_a_milestone_rounded_to_another_step_is_the_same_place() -> None:
    before = rate_curve(_config(train__epochs=100), 391, 0, low_start=False)
    after = rate_curve(_config(train__epochs=100, optim__lr=0.2), 196, 0, low_start=False)
    assert before.points[1][0] != after.points[1][0]
    assert [line.split()[-2:] for line in side_by_side(before, after)[1:-1]] == [
        ["0.1", "0.2"],
        ["0.01", "0.02"],
        ["0.001", "0.002"],
    ]


def test_a_run_that_is_over_has_no_rate() -> None:
    over = rate_curve(_config(train__epochs=5), 10, 50, low_start=False)
    assert over.points == ()
    longer = _config(train__epochs=6, schedule__reference_epochs=6, schedule__milestones=[4])
    on = rate_curve(longer, 10, 50, low_start=False)
    assert side_by_side(over, on)[1:] == ["from epoch 6   over    0.01", "last epoch     5       6"]


def test_a_low_start_lasts_until_the_first_milestone_at_most() -> None:
    curve = rate_curve(_config(optim__lr=0.1, schedule__low_start_lr=0.02), 10, 0, low_start=True)
    assert [rate for _, rate in curve.points] == [0.02, 0.01, 0.001]
