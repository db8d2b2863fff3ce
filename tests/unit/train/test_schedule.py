from __future__ import annotations

import pytest

from lowmem.config.settings import gather
from lowmem.train.schedule import learning_rate, milestone_steps, next_low_start, starts_low


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


def test_the_low_start_ends_under_80_percent_error_or_at_the_first_milestone() -> None:
    config = gather(flags={"model.arch": "res110"}).config
    assert learning_rate(config, 391, 0, low_start=True) == 0.01
    assert next_low_start(config, True, 80.0)
    assert next_low_start(config, True, float("nan"))
    assert not next_low_start(config, True, 79.9)
    assert not next_low_start(config, False, 90.0)
    assert learning_rate(config, 391, 122 * 391, low_start=True) == 0.001
