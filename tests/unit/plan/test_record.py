"""The recorded plan: what plan.json holds, and that it reads back as it was."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lowmem.plan.policy import SAVE_ALL, uniform
from lowmem.plan.record import Candidate, Plan, Predicted
from tests.unit.plan.test_policy import nested

NAMES = ("stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "head")


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "budget_bytes": 6 * 2**30,
        "batch": 128,
        "micro_batch": 128,
        "accumulation": 1,
        "precision": "fp32",
        "memory_format": "contiguous",
        "exact": True,
        "stages": NAMES,
        "schedule": nested(),
        "predicted": Predicted(peak_allocated_bytes=5 * 2**30, step_seconds=1.25, overhead=0.125, extra_flops=0),
        "candidates": (Candidate(what="save all", refused_because="7 GiB", peak_bytes=7 * 2**30),),
    }
    return Plan(**{**values, **changes})


def with_ladder() -> Plan:
    return plan(ladder=(plan(budget_bytes=5 * 2**30), plan(budget_bytes=None)))


def test_a_plan_survives_json() -> None:
    original = with_ladder()
    assert Plan.from_json(json.loads(json.dumps(original.to_json()))) == original
    assert dataclasses.replace(original, ladder=()) == plan()


def test_the_keys_of_plan_json() -> None:
    values = plan().to_json()
    assert list(values)[1:] == [
        "budget_bytes", "batch", "micro_batch", "accumulation", "precision", "memory_format", "batch_norm", "tf32",
        "allocator_bytes", "exact", "predicted", "blocks", "schedule", "candidates", "ladder",
    ]  # fmt: skip
    assert set(values["predicted"]) == {
        "peak_allocated_bytes", "peak_reserved_bytes", "device_bytes",
        "step_seconds", "overhead", "extra_flops", "host_bytes", "waiting_seconds", "hidden_share",
    }  # fmt: skip
    assert values["predicted"]["device_bytes"] is None
    assert values["blocks"]["stem"] == "SAVE_ALL"
    assert values["blocks"]["layer2.1"] == "in segment: FUSED"


def test_a_plan_from_before_it_said_which_batch_norm() -> None:
    later = {"batch_norm", "tf32", "allocator_bytes"}
    values = {name: value for name, value in plan().to_json().items() if name not in later}
    assert Plan.from_json(values) == plan(batch_norm="native", tf32=False, allocator_bytes=None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"micro_batch": 64}, "2 of them"),
        ({"batch": 0}, "at least 1"),
        ({"precision": "fp8"}, "precision is 'fp8', not fp32, amp or bf16"),
        ({"memory_format": "nchw"}, "memory_format"),
        ({"batch_norm": "cudnn"}, "not library or native"),
        ({"tf32": "no"}, "tf32 is 'no', not bool or None"),
        ({"allocator_bytes": 1.5}, "not int or None"),
        ({"schedule": uniform([SAVE_ALL] * 6)}, r"0\.\.5"),
        ({"stages": (*NAMES[:6], "stem")}, "same name"),
        ({"ladder": (with_ladder(),)}, "ladder of its own"),
    ],
)
def test_inconsistent_plans_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        plan(**changes)


def test_bytes_are_integers() -> None:
    with pytest.raises(ValueError, match=r"1\.5, not int"):
        Predicted(peak_allocated_bytes=1.5)  # type: ignore[arg-type]


def test_accumulation_rounds_up() -> None:
    assert plan(batch=100, micro_batch=32, accumulation=4).accumulation == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 99}, "format"),
        ({"more": 1}, "keys"),
        ({"schedule": []}, "at least one"),
        ({"predicted": {"seconds": 1}}, "no plan"),
        ({"candidates": [{"why": "x"}]}, "no plan"),
        ({"blocks": dict.fromkeys(NAMES, "LEAN")}, "different things"),
    ],
)
def test_other_json_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Plan.from_json({**plan().to_json(), **changes})
    with pytest.raises(ValueError, match="dictionary"):
        Plan.from_json([])


def test_plans_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().batch = 1  # type: ignore[misc]
