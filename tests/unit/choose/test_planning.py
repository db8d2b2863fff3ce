"""Plans: under the budget when simulated whole, cheaper with more memory, honest in the order of what is tried."""

from __future__ import annotations

import pytest
from torch import nn

from lowmem.choose.execution import by_kind
from lowmem.choose.planning import Choice, Request, card_rates, choose, make_plan
from lowmem.choose.request import Budget
from lowmem.config.cards import load_card
from lowmem.config.schema import Config
from lowmem.core.errors import Infeasible, PreflightError, UsageError
from lowmem.core.units import MIB
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.simulate import simulate_step

MODEL = skeleton("res20", width=8)
BOTH = {"fp32": "contiguous", "amp": "contiguous"}


def _request(budget_mib: float, **changes: object) -> Request:
    values: dict[str, object] = {
        "model": MODEL,
        "batch": 64,
        "budget": Budget(total_bytes=int(budget_mib * MIB)),
        "rates": card_rates(load_card("gtx1060-6g")),
        **changes,
    }
    return Request(**values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def choices() -> dict[int, Choice]:
    return {mib: choose(_request(mib)) for mib in (16, 22, 30, 60)}


def test_the_whole_simulated_step_is_under_the_budget(choices: dict[int, Choice]) -> None:
    for mib, choice in choices.items():
        peak = choice.plan.predicted.peak_allocated_bytes
        assert peak is not None
        assert peak <= mib * MIB
        again = simulate_step(
            _request(mib).shape("fp32", 64), choice.plan.schedule, card_rates(load_card("gtx1060-6g"))("fp32")
        )
        assert again.estimate.peak_allocated_bytes == peak


def test_more_budget_is_never_slower(choices: dict[int, Choice]) -> None:
    seconds = [choice.plan.predicted.step_seconds or 0 for _, choice in sorted(choices.items())]
    assert seconds == sorted(seconds, reverse=True)
    overhead = choices[60].plan.predicted.overhead
    assert overhead is not None
    assert abs(overhead) < 1e-3
    assert choices[60].plan.predicted.extra_flops == 0


def test_a_plan_survives_its_file(choices: dict[int, Choice]) -> None:
    plan = choices[16].plan
    assert Plan.from_json(plan.to_json()) == plan
    assert set(plan.to_json()) >= {
        "budget_bytes", "batch", "micro_batch", "accumulation", "precision", "memory_format", "exact", "predicted",
        "blocks", "schedule", "candidates",
    }  # fmt: skip


def test_fp32_first_then_amp() -> None:
    fp32 = choose(_request(16, modes=BOTH)).plan
    assert (fp32.precision, fp32.exact) == ("fp32", True)
    amp = choose(_request(12, modes=BOTH)).plan
    assert (amp.precision, amp.exact, amp.accumulation) == ("amp", True, 1)


@pytest.mark.slow
def test_accumulation_comes_after_amp() -> None:
    cut = choose(_request(7.5, modes=BOTH)).plan
    assert not cut.exact
    assert cut.accumulation * cut.micro_batch >= 64
    refused = [one.what for one in cut.candidates if one.refused_because]
    assert refused[:2] == ["fp32 at batch 64", "amp at batch 64"]


@pytest.mark.slow
def test_infeasible_has_both_sides_and_the_way_out() -> None:
    with pytest.raises(Infeasible, match=r"at least \d+ MiB, and 8 MiB are left.*lower --batch") as caught:
        choose(_request(7.5, allow_accumulation=False))
    # What it says would fit does fit, and one byte less does not.
    least = caught.value.least_bytes
    assert choose(_request(least / MIB, allow_accumulation=False)).plan.exact
    with pytest.raises(Infeasible):
        choose(_request((least - 1) / MIB, allow_accumulation=False))


def test_a_card_counts_the_allocators_segments() -> None:
    plan = make_plan(MODEL, batch=512, budget="1000M", card=load_card("gtx1060-6g"))
    assert plan.predicted.peak_reserved_bytes is not None
    assert plan.budget_bytes is not None
    assert plan.predicted.peak_reserved_bytes <= plan.budget_bytes
    assert plan.predicted.device_bytes is not None
    assert plan.predicted.device_bytes <= 1000 * MIB


def test_precision_order() -> None:
    assert list(by_kind("auto", "auto", tensor_cores=False).items()) == [("fp32", "contiguous"), ("amp", "contiguous")]
    assert list(by_kind("auto", "contiguous", tensor_cores=True)) == ["amp", "fp32"]
    assert by_kind("fp32", "auto", tensor_cores=True) == {"fp32": "channels-last"}


def test_a_plan_needs_something_to_fit_into() -> None:
    from lowmem.choose.execution import budget_of

    with pytest.raises(ValueError, match="budget or a card"):
        make_plan(MODEL, batch=8)
    with pytest.raises(UsageError, match="--vram 6G"):
        budget_of(Config())


def test_bad_sizes_and_cards_in_settings() -> None:
    from lowmem.config.settings import gather

    with pytest.raises(UsageError, match="write it like 6G"):
        gather(flags={"memory.vram": "six"})
    from lowmem.choose.execution import request_of

    with pytest.raises(UsageError, match="did you mean gtx1060-3g or gtx1060-6g"):
        request_of(gather(flags={"memory.card": "gtx1060"}).config)


def test_a_budget_without_its_unit() -> None:
    for budget in ("6", "4600"):
        with pytest.raises(ValueError, match="did you mean"):
            make_plan(MODEL, batch=8, budget=budget)
    with pytest.raises(ValueError, match="did you mean 6G"):
        make_plan(MODEL, batch=8, budget="6M", card=load_card("gtx1060-6g"))
    tiny = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 30 * 30, 2))
    assert make_plan(tiny, batch=1, budget="200K").budget_bytes == 200 * 1024
    for budget in ("10K", 6):  # a number is bytes
        with pytest.raises(Infeasible):
            make_plan(tiny, batch=1, budget=budget)


def test_what_the_optimizer_keeps_is_part_of_the_plan() -> None:
    """A tensor of each parameter's size for SGD's momentum and for mean weights, two for Adam."""
    parameters = list(MODEL.parameters())
    sizes, counts = sum(parameter.nbytes for parameter in parameters), 512 * len(parameters)  # the allocator's units
    taken = {
        copies: make_plan(MODEL, batch=8, budget="60M", **given).predicted.peak_allocated_bytes  # type: ignore[arg-type]
        for copies, given in (
            (0, {"momentum": False}),
            (1, {}),
            (2, {"ema": True}),
            (2.5, {"optimizer": "adam"}),
            (3.5, {"optimizer": "adamw", "ema": True}),
        )
    }
    for copies, size in taken.items():
        assert size is not None
        more = int(copies) * sizes + counts * (copies % 1 > 0)
        # Small tensors are rounded up, and so is each in the copies by which a failed update is noticed.
        assert more <= size - (taken[0] or 0) <= more + int(copies) * 512 * len(parameters) + 4096
    with pytest.raises(ValueError, match="'lion' keeps is not known here: give what keeps as much, sgd, adam, adamw"):
        make_plan(MODEL, batch=8, budget="60M", optimizer="lion")  # type: ignore[arg-type]


def test_bf16_on_cards_that_have_it() -> None:
    plan = make_plan(MODEL, batch=8, card=load_card("rtx3060-12g"), precision="bf16")
    same = make_plan(MODEL, batch=8, card=load_card("rtx3060-12g"), precision="amp")
    assert (plan.precision, plan.tf32) == ("bf16", False)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.predicted == same.predicted  # as many bytes, at the same rate
    for name in ("gtx1060-6g", "rtx2080ti"):
        with pytest.raises(PreflightError, match=r"bf16 begins with 8\.0 .*: use --precision amp"):
            make_plan(MODEL, batch=8, card=load_card(name), precision="bf16")
