"""The learning-rate schedule, and that of two runs beside each other, in a few lines."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from lowmem.config.schema import Config, nest
from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
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


def _torchs(lr: float, steps: int, make: type[LRScheduler], **options: object) -> list[float]:
    """The rates that a scheduler of the library gives the steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer, **options), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _rates(config: Config, steps_per_epoch: int) -> list[float]:
    steps = config.train.epochs * steps_per_epoch
    return [learning_rate(config, steps_per_epoch, step, low_start=False) for step in range(steps)]


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_cosine_is_the_librarys(share: float) -> None:
    config = _config(schedule__kind="cosine", train__epochs=6, optim__lr=0.3, schedule__final_share=share)
    usual = _torchs(0.3, 42, CosineAnnealingLR, T_max=41, eta_min=0.3 * share)
    assert _rates(config, 7) == pytest.approx(usual, rel=1e-9, abs=1e-12)
    assert _rates(config, 7)[-1] == 0.3 * share


@pytest.mark.parametrize(("warmup", "risen"), [(None, 12.6), (2.0, 14), (0.5, 3.5)])
def test_one_cycle_is_the_librarys(warmup: float | None, risen: float) -> None:
    options = {"schedule__kind": "one-cycle", "schedule__warmup_epochs": warmup, "schedule__final_share": 1 / 25 / 1e4}
    config = _config(train__epochs=6, optim__lr=0.3, **options)
    usual = _torchs(0.3, 42, OneCycleLR, max_lr=0.3, total_steps=42, pct_start=round(risen) / 42, cycle_momentum=False)
    assert _rates(config, 7) == pytest.approx(usual, rel=1e-9)


def test_before_a_cosine_the_rate_rises_in_equal_parts() -> None:
    config = _config(schedule__kind="cosine", train__epochs=6, optim__lr=0.3, schedule__warmup_epochs=2)
    rates = _rates(config, 5)
    assert rates[:10] == pytest.approx([0.03 * (step + 1) for step in range(10)])
    assert rates[9:] == pytest.approx(_torchs(0.3, 21, CosineAnnealingLR, T_max=20), abs=1e-12)


def test_a_warm_up_before_steps() -> None:
    config = _config(
        train__epochs=4, schedule__reference_epochs=4, schedule__milestones=(3,), schedule__warmup_epochs=1
    )
    assert _rates(config, 4) == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 9, *[0.01] * 4])


@pytest.mark.parametrize("kind", ["cosine", "one-cycle"])
@pytest.mark.parametrize(("epochs", "warmup"), [(1, None), (1, 0.0), (1, 0.99), (2, 1.9)])
def test_the_shortest_runs_have_a_rate_in_every_step(kind: str, epochs: int, warmup: float | None) -> None:
    config = _config(schedule__kind=kind, train__epochs=epochs, schedule__warmup_epochs=warmup)
    for steps in (1, 2, 3, 10):
        rates = _rates(config, steps)
        assert all(0 <= rate <= 0.1 for rate in rates)
        assert max(rates) == pytest.approx(0.1)


@pytest.mark.parametrize("sets", [["schedule.kind=cosine"], ["schedule.kind=one-cycle"], ["schedule.warmup_epochs=2"]])
def test_the_low_start_is_of_steps_alone(sets: list[str]) -> None:
    assert not starts_low(gather(flags={"model.arch": "res110"}, sets=sets).config)
    with pytest.raises(UsageError, match=r"low_start always and .* are two warm-ups: set low_start to auto or never"):
        gather(sets=[*sets, "schedule.low_start=always"])


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["schedule.final_share=0.1"], r"final_share 0\.1 is for cosine and one-cycle, the kind is steps"),
        (["schedule.warmup_epochs=164"], r"schedule\.warmup_epochs 164 leaves nothing of a run of train\.epochs 164"),
        (["schedule.kind=cos"], "schedule.kind"),
    ],
)
def test_what_is_refused(sets: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        gather(sets=sets)
    assert not str(refused.value).startswith(":")


def test_smooth_curves_beside_each_other_fit_a_screen() -> None:
    before = rate_curve(_config(schedule__kind="one-cycle"), 391, 391 * 12, low_start=False)
    after = rate_curve(_config(schedule__kind="cosine", train__epochs=300), 100, 100 * 12, low_start=False)
    assert len(before.points) == 164 - 12 + 1  # and the last step of the rise
    lines = side_by_side(before, after)
    assert len(lines) == 14
    assert lines[1].split() == ["at", "epoch", "13", "0.0174", "0.0996"]
    assert lines[-2].split()[:4] == ["at", "epoch", "300", "over"]


def test_a_warm_up_is_drawn_epoch_by_epoch() -> None:
    config = _config(schedule__warmup_epochs=3)
    curve = rate_curve(config, 10, 0, low_start=False)
    assert curve.smooth
    at, rates = zip(*curve.points, strict=True)
    assert at == (0, 1, 2, 2.9, 81, 122)
    assert rates == pytest.approx((0.1 / 30, 1.1 / 30, 2.1 / 30, 0.1, 0.01, 0.001))
    assert not rate_curve(config, 10, 29, low_start=False).smooth


def test_a_picture_has_the_last_step_before_each_point() -> None:
    """Corners of a line that holds; of a smooth one its end too, where the rate is zero."""
    held = rate_curve(_config(), 391, 391 * 12, low_start=False)
    assert held.line == ((12, 0.1), (81, 0.1), (81, 0.01), (122, 0.01), (122, 0.001), (164, 0.001))
    config = _config(schedule__kind="one-cycle", train__epochs=3)
    at, rates = zip(*rate_curve(config, 10, 20, low_start=False).line, strict=True)
    assert at == (2, 3)
    assert rates == (learning_rate(config, 10, 20, low_start=False), learning_rate(config, 10, 29, low_start=False))
    assert rates[1] == 0
    assert rate_curve(config, 10, 30, low_start=False).line == ()  # it is over
    two = _config(schedule__kind="one-cycle", train__epochs=2)  # of four steps, the first of which is all of the rise
    assert [at for at, _ in rate_curve(two, 2, 0, low_start=False).line] == [0, 1, 1, 2]


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
