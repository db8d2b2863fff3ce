"""Calls without data: what is told apart, what is computed all the same, which results lie where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.core.errors import PreflightError
from lowmem.measure.outline import Outline, is_outline
from lowmem.simulate import OutlineMode, Recorder, effects

aten = torch.ops.aten


def _home(tensor: Tensor) -> Any:
    assert isinstance(tensor, Outline)
    return tensor._outline_storage


def test_numbers_that_are_equal_are_told_apart() -> None:
    with OutlineMode():
        x = torch.empty(3, dtype=torch.int64)
        assert [(x + 1).dtype, (x + 1.0).dtype, (x * True).dtype] == [torch.int64, torch.float32, torch.int64]
        truth = torch.empty(3, dtype=torch.bool)
        assert [(truth + 1).dtype, (truth + True).dtype] == [torch.int64, torch.bool]


def test_the_default_dtype_is_part_of_a_call() -> None:
    with OutlineMode():
        assert torch.empty(2).dtype is torch.float32
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.empty(2).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_call_is_found_once() -> None:
    with OutlineMode():
        x = torch.empty(11, 13)
        x.relu()
        before = len(effects._effects)
        x.relu(), torch.empty(11, 13).relu()
        assert len(effects._effects) == before
        x.t().relu()
        assert len(effects._effects) > before


def test_results_lie_where_they_should() -> None:
    with OutlineMode():
        x, y = torch.empty(4, 6), torch.empty(4, 6)
        first, second = x.split(2)
        assert _home(first) is _home(second) is _home(x.t()[1:]) is _home(x)
        assert second.storage_offset() == 12
        assert _home(x + y) is not _home(x)
        assert x.add_(y) is x
        assert aten.relu_(y) is y


def test_what_is_written_is_told_by_its_place() -> None:
    """Not by what it looks like: the first call gives one tensor twice, the second two that are alike."""
    with OutlineMode():
        grad, other, result = (torch.empty(5, 7) for _ in range(3))
        assert aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad) is grad
        assert aten.threshold_backward.grad_input(grad, result, 0, grad_input=other) is other


def test_an_operation_that_changes_a_shape_in_place_changes_the_tensor() -> None:
    with OutlineMode():
        x = torch.empty(3, 5)
        assert x.t_() is x
        assert x.shape == (5, 3)
        assert (x + 1).stride() == (1, 5)


def test_real_tensors_stay_real() -> None:
    one = torch.ones(3)
    with OutlineMode():
        two = one + 1
        both = torch.empty(3) * two
        counter = torch.zeros((), dtype=torch.int64)
        counter.add_(1)
        told = torch.tensor([1, 2])
    assert two.tolist() == [2, 2, 2]
    assert is_outline(both)
    assert int(counter) == 1
    assert told.tolist() == [1, 2]


def test_a_batch_norm_that_averages_over_all_batches_reads_its_counter() -> None:
    with OutlineMode():
        norm = nn.BatchNorm2d(3, momentum=None)
        for _ in range(2):
            assert is_outline(norm(torch.empty(2, 3, 4, 4)))
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2


def test_values_that_are_not_there_are_refused_in_one_line() -> None:
    with (
        OutlineMode(),
        pytest.raises(PreflightError, match=r"aten\._local_scalar_dense.* cannot be planned") as refused,
    ):
        float(torch.empty(()))
    assert "\n" not in str(refused.value)


def test_a_step_under_autograd_autocast_and_the_fused_optimizer() -> None:
    with OutlineMode():
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 5)
        )
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        with torch.autocast("cpu", torch.bfloat16):
            scores = net(torch.empty(2, 3, 8, 8))
        nn.functional.cross_entropy(scores.float(), torch.empty(2, dtype=torch.int64)).backward()
        sgd.step()
    assert scores.dtype is torch.bfloat16
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32)


def test_two_recorders_do_not_count_one_tensor() -> None:
    with OutlineMode():
        x = torch.empty(3)
        Recorder().adopt([x])
        with pytest.raises(AssertionError, match="another recorder"):
            Recorder().adopt([x])
