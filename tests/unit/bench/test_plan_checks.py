"""The comparison of a planned step with the untouched one, on the CPU: it finds equal bits, and differences too."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.bench import plan_checks
from lowmem.bench.plan_checks import PlanQuestion, compare_gradients, survive
from lowmem.choose.execution import request_of
from lowmem.choose.planning import choose, make_plan, with_ladder
from lowmem.config.settings import gather
from lowmem.models import build, skeleton
from lowmem.trial import native_norms


def _question(batch_norm: Literal["library", "native"] = "native") -> dict[str, Any]:
    plan = make_plan(skeleton("res20", width=4), batch=8, budget="3M", batch_norm=batch_norm)
    assert plan.predicted.extra_flops  # something is computed again
    return asdict(PlanQuestion(arch="res20", block="basic", width=4, batch=8, plan=plan.to_json()))


def _at_another_size() -> dict[str, Any]:
    flags = {"model.arch": "res20", "model.width": 4, "train.batch": 8, "train.device": "cpu", "data.image_size": 48}
    flags |= {"memory.tensors": "6M", "train.precision": "fp32", "train.memory_format": "contiguous"}
    plan = with_ladder(choose(request_of(gather(flags=flags).config))).plan.to_json()
    network: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 4, "image_size": 48, "stored_side": 32}
    return asdict(PlanQuestion(**network, batch=8, plan=plan))


@pytest.mark.parametrize("batch_norm", ["library", "native"])
def test_a_planned_step_has_the_untouched_ones_bits(batch_norm: Literal["library", "native"]) -> None:
    found = compare_gradients(_question(batch_norm))
    assert found["batch_norm"] == batch_norm
    assert (found["bitwise"], found["noise_bitwise"], found["deterministic_bitwise"]) == (True, True, True)
    assert (found["difference"], found["batch"]) == (0.0, 8)
    assert not torch.are_deterministic_algorithms_enabled()


class _Twice(nn.Module):
    """The right output and gradients; the running statistics moved twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.model(x)
        return self.model(x)


def test_pictures_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Noted(_Twice):
        def forward(self, x: Tensor) -> Any:
            seen.append(x.shape[-1])
            return self.model(x)

    planned = plan_checks.apply_plan
    monkeypatch.setattr(plan_checks, "apply_plan", lambda model, plan: Noted(planned(model, plan)))
    assert compare_gradients(_at_another_size())["bitwise"]
    failing = plan_checks._failing

    def noted() -> Any:
        hook = failing()

        def after_forward(module: nn.Module, given: tuple[Tensor], logits: Tensor) -> None:
            seen.append(given[0].shape[-1])
            hook(module, given, logits)

        return after_forward

    monkeypatch.setattr(plan_checks, "_failing", noted)
    assert survive(_at_another_size())["weights_bitwise"]
    assert len(seen) > 6
    assert set(seen) == {48}


def test_buffers_that_moved_twice_are_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_checks, "apply_plan", lambda model, plan: _Twice(model))
    found = compare_gradients(_question())
    assert found["noise_bitwise"]
    assert not found["bitwise"]


def test_native_norms_are_the_modules_own_on_the_cpu_and_go_again() -> None:
    one, other, x = build("res20", width=4), build("res20", width=4), torch.randn(4, 3, 32, 32)
    usual, expected = F.batch_norm, one(x)
    with native_norms():
        assert F.batch_norm is not usual
        assert torch.equal(expected, other(x))
    assert all(torch.equal(*pair) for pair in zip(one.buffers(), other.buffers(), strict=True))
    assert torch.equal(one(x), other(x))
    assert F.batch_norm is usual


def test_injected_out_of_memory_is_survived() -> None:
    flags = {"model.arch": "res20", "model.width": 4, "train.batch": 8, "train.device": "cpu", "memory.tensors": "4M"}
    choice = with_ladder(
        choose(request_of(gather(flags=flags, sets=["train.precision=fp32", "train.memory_format=contiguous"]).config))
    )
    plan = choice.plan.to_json()
    found = survive(asdict(PlanQuestion(arch="res20", block="basic", width=4, batch=8, plan=plan)))
    assert (found["survived"], found["times_out_of_memory"], found["weights_bitwise"]) == (True, 2, True)
    assert found["last_budget_bytes"] < found["budget_bytes"]
