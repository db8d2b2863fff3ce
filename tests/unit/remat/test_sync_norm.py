"""Batch norm over several processes: slices of a batch together equal the untouched model on the whole batch.

The processes are threads, each with its own copy of the model (see `tests.exact.processes`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models import build
from lowmem.models.resnet import BasicBlock, Bottleneck
from lowmem.plan.cost import Rates
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, PolicyKind, Schedule, Segment, keep
from lowmem.remat import PlannedModule, apply_plan, decompose
from lowmem.remat.batch_norm import global_statistics, norm_again, norm_backward, norm_first
from lowmem.remat.stage import Stage
from lowmem.simulate import StepShape, simulate_step
from tests.exact.compare import FORMAT_NAMES, FORMATS, small_net
from tests.exact.processes import Processes, error_of_one_norm, relative_error, slices_of
from tests.exact.schedules import alternating, segments, uniform

DROPPED = BlockPolicy(PolicyKind.LEAN, drop_output=True)


def _fused(stages: Sequence[Stage]) -> Schedule:
    """Segments of three whose last stage makes no output."""
    items = segments(stages, 3, LEAN).items
    assert all(isinstance(item, Segment) for item in items)
    fused = [
        Segment(item.start, item.end, Schedule((*item.inner.items[:-1], Keep(item.end, FUSED))))
        for item in items
        if isinstance(item, Segment)
    ]
    return Schedule(tuple(fused))


SCHEDULES: dict[str, Callable[[Sequence[Stage]], Schedule]] = {
    "lean": lambda stages: uniform(stages, LEAN),
    "keep": lambda stages: uniform(stages, keep("conv2")),
    "input only": lambda stages: uniform(stages, INPUT_ONLY),
    "save-all": lambda stages: uniform(stages, SAVE_ALL),
    "dropped outputs": lambda stages: alternating(stages, DROPPED, keep("conv1")),
    "fused": _fused,
    "nested": lambda stages: Schedule(
        (
            Segment(
                0,
                4,
                Schedule(
                    (
                        Keep(0, LEAN),
                        Segment(1, 3, Schedule((Keep(1, DROPPED), Keep(2, LEAN), Keep(3, FUSED)))),
                        Keep(4, FUSED),
                    )
                ),
            ),
            *(Keep(i, SAVE_ALL) for i in range(5, len(stages))),
        )
    ),
}
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
by_format = pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)


def _batch(count: int, memory_format: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    x += torch.linspace(-1, 1, count, dtype=dtype).reshape(-1, 1, 1, 1)  # slices with statistics of their own
    return x.contiguous(memory_format=memory_format), torch.randint(10, (count,), generator=generator)


def _step(model: nn.Module, x: Tensor, labels: Tensor, whole: int, low: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", low, enabled=low is not None):
        loss = F.cross_entropy(model(x), labels, reduction="sum") / whole
    loss.backward()
    return loss.detach()


def _both(
    model: nn.Module,
    schedule: Callable[[Sequence[Stage]], Schedule],
    sizes: Sequence[int],
    memory_format: Any = torch.contiguous_format,
    low: torch.dtype | None = None,
    steps: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Processes]:
    """Loss, gradients and buffers: of autograd on the whole batch, and of the slices (summed; buffers are equal)."""
    model = model.to(memory_format=memory_format)
    x, labels = _batch(sum(sizes), memory_format, next(model.parameters()).dtype)
    plain = copy.deepcopy(model)
    whole = sum(_step(plain, x, labels, len(x), low) for _ in range(steps))
    processes, cuts = Processes(len(sizes)), list(slices_of(sizes))

    def work(rank: int) -> tuple[Tensor, PlannedModule]:
        planned = apply_plan(copy.deepcopy(model), schedule(decompose(model)))
        planned.lowmem.total = processes.total(rank)
        mine = x[cuts[rank]].contiguous(memory_format=memory_format), labels[cuts[rank]]
        losses = [_step(planned, *mine, len(x), low) for _ in range(steps)]
        return torch.stack(losses).sum(), planned

    results = processes.run(work)
    planned = [module for _, module in results]
    for name, buffer in planned[0].named_buffers():
        assert all(torch.equal(buffer, other.get_buffer(name)) for other in planned), name
    assert all(calls == processes.calls[0] for calls in processes.calls)
    wanted, found = {"loss": torch.as_tensor(whole)}, {"loss": torch.stack([loss for loss, _ in results]).sum()}
    for name, parameter in plain.named_parameters():
        grads = [module.get_parameter(name).grad for module in planned]
        assert parameter.grad is not None
        for grad, size in zip(grads, sizes, strict=True):
            assert grad is not None, name
            assert grad.shape == parameter.shape
            assert torch.isfinite(grad).all(), name
            assert size or not grad.any(), name
        wanted[name], found[name] = parameter.grad, torch.stack([grad for grad in grads if grad is not None]).sum(0)
    wanted |= dict(plain.named_buffers())
    found |= dict(planned[0].named_buffers())
    return wanted, found, processes


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


SLICES = [(3, 3), (1, 4), (2, 1, 3), (2, 0, 1), (1, 2, 0, 3)]


@by_schedule
@pytest.mark.parametrize("sizes", SLICES, ids=str)
def test_slices_equal_the_whole_batch(sizes: tuple[int, ...], schedule: str) -> None:
    wanted, found, processes = _both(small_net(Bottleneck).double(), SCHEDULES[schedule], sizes, steps=2)
    assert relative_error(wanted, found) < 1e-12
    assert len(processes.calls[0]) == 2 * 2 * len(_norms(small_net(Bottleneck)))


@by_schedule
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@by_format
def test_every_block(block: Any, residual: bool, schedule: str, memory_format: Any) -> None:
    model = small_net(block, residual)
    wanted, found, _ = _both(copy.deepcopy(model).double(), SCHEDULES[schedule], (2, 0, 3), memory_format)
    assert relative_error(wanted, found) < 1e-12


@pytest.mark.parametrize(("arch", "block"), [("res20", "basic"), ("cnn20", "basic"), ("res56", "bottleneck")])
def test_networks_of_the_family(arch: str, block: str) -> None:
    torch.manual_seed(0)
    wanted, found, _ = _both(build(arch, block, width=4).double(), SCHEDULES["fused"], (3, 2))
    assert relative_error(wanted, found) < 1e-10  # what is left of the last digit after 59 layers is 1e-12


def test_float32_and_bfloat16_to_their_own_rounding() -> None:
    """Of a whole network, up to a ReLU here and there whose input is zero to rounding: autograd's own float32 moves
    by 8e-4 where the last digit of a picture changes. (`test_one_norm` has no ReLU, and is strict.)"""
    sizes = (3, 0, 5)
    exact, _, _ = _both(small_net(BasicBlock).double(), SCHEDULES["lean"], sizes)
    wanted, found, _ = _both(small_net(BasicBlock), SCHEDULES["lean"], sizes)
    assert relative_error(wanted, found) < 5e-3
    for memory_format in FORMATS:
        wanted, found, _ = _both(small_net(BasicBlock), SCHEDULES["lean"], sizes, memory_format, torch.bfloat16)
        assert relative_error(exact, found) < 2 * relative_error(exact, wanted)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str
)
@by_format
def test_one_norm(memory_format: Any, dtype: torch.dtype, tolerance: float) -> None:
    assert error_of_one_norm("cpu", dtype, memory_format) < tolerance


def test_the_order_of_calls_is_the_models() -> None:
    """Forward by stage, in a block pair by pair and then the shortcut; the backward is the reverse of it."""
    model = small_net(Bottleneck)
    order = [len(bn.weight) for stage in decompose(model)[:-1] for bn in stage.norms]
    wanted = [2 * channels + 1 for channels in order] + [2 * channels for channels in reversed(order)]
    for make in SCHEDULES.values():
        _, _, processes = _both(copy.deepcopy(model), make, (1, 2))
        assert processes.calls == [wanted, wanted]


@by_schedule
def test_frozen_parameters_leave_the_calls_alike(schedule: str) -> None:
    model = small_net(Bottleneck)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn1", "layer1", "layer2.0.conv1", "layer2.0.bn1")))
    frozen = SCHEDULES[schedule](decompose(model))
    x, labels = _batch(3, torch.contiguous_format, torch.float32)

    def calls(sizes: tuple[int, ...]) -> list[list[int]]:
        processes, cuts = Processes(len(sizes)), list(slices_of(sizes))

        def work(rank: int) -> None:
            planned = apply_plan(copy.deepcopy(model), frozen)
            planned.lowmem.total = processes.total(rank)
            _step(planned, x[cuts[rank]], labels[cuts[rank]], 3, None)

        processes.run(work)
        return processes.calls

    every = [*calls((2, 1)), *calls((0, 3))]
    assert every[0]
    assert all(one == every[0] for one in every)


def test_evaluation_and_frozen_statistics_ask_nobody() -> None:
    model = small_net(BasicBlock)
    planned = apply_plan(model, uniform(decompose(model), LEAN))

    def nobody(values: Tensor) -> None:
        raise AssertionError("asked")

    planned.lowmem.total = nobody
    planned.eval()
    x, labels = _batch(3, torch.contiguous_format, torch.float32)
    _step(planned, x, labels, 3, None)
    _step(planned, x[:0], labels[:0], 3, None)  # an empty slice also passes norms whose statistics are frozen
    planned.train()
    with pytest.raises(AssertionError, match="asked"):
        planned(x)


def test_without_gradients_the_statistics_are_everybodys() -> None:
    model = small_net(BasicBlock).double()
    x, _ = _batch(5, torch.contiguous_format)
    plain = copy.deepcopy(model)
    processes, cuts = Processes(2), list(slices_of((4, 1)))

    def work(rank: int) -> tuple[Tensor, PlannedModule]:
        planned = apply_plan(copy.deepcopy(model), uniform(decompose(model), LEAN))
        planned.lowmem.total = processes.total(rank)
        with torch.no_grad():
            return planned(x[cuts[rank]]), planned

    results = processes.run(work)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([y for y, _ in results]), plain(x), rtol=1e-12, atol=1e-12)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(results[0][1].get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@by_format
@torch.no_grad()
def test_recomputations_have_the_same_bits_and_move_nothing(memory_format: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(16).to(torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.uniform_(bn.weight)
    calls: list[int] = []
    z = (torch.randn(4, 16, 5, 5) * 3 + 2).to(dtype).contiguous(memory_format=memory_format)
    for in_place in (False, True):
        first, stats = norm_first(bn, z.clone(), in_place, total=lambda values: calls.append(len(values)))
        buffers = [buffer.clone() for buffer in bn.buffers()]
        for again_in_place in (False, True):
            assert torch.equal(norm_again(bn, z.clone(), stats, again_in_place), first)
        assert all(torch.equal(one, other) for one, other in zip(bn.buffers(), buffers, strict=True))
    assert calls == [33, 33]


def test_cumulative_statistics() -> None:
    """Momentum None: the average over all batches so far."""
    model = small_net(BasicBlock).double()
    for bn in _norms(model):
        bn.momentum = None
    wanted, found, _ = _both(model, SCHEDULES["lean"], (1, 3), steps=3)
    assert relative_error(wanted, found) < 1e-12


def test_one_value_per_channel_may_be_a_share_but_not_all() -> None:
    bn = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="all processes together got 1"):
        norm_first(bn, torch.randn(1, 4, 1, 1), False, total=lambda values: None)
    assert bn.num_batches_tracked is not None
    assert not bn.num_batches_tracked
    z = torch.randn(2, 4, 1, 1)
    processes = Processes(2)
    results = processes.run(
        lambda rank: norm_first(copy.deepcopy(bn), z[rank : rank + 1], False, total=processes.total(rank))
    )
    torch.testing.assert_close(torch.cat([out for out, _ in results]), copy.deepcopy(bn)(z).detach())


def test_an_empty_batch_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm_first(nn.BatchNorm2d(4), torch.empty(0, 4, 2, 2), False)


def test_large_means_keep_their_digits() -> None:
    """Sums of squares of float32 would have none left."""
    torch.manual_seed(0)
    z = torch.randn(64, 8, 8, 8) + 300
    processes = Processes(2)
    (_, var, count), _ = processes.run(
        lambda rank: global_statistics(z[32 * rank : 32 * rank + 32], processes.total(rank))
    )
    assert count == 64 * 64
    torch.testing.assert_close(var, z.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_the_gradient_of_parameters_alone_needs_no_call() -> None:
    torch.manual_seed(0)
    bn, z, grad = nn.BatchNorm2d(8), torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    calls: list[int] = []
    _, stats = norm_first(bn, z, False, total=lambda values: calls.append(len(values)))
    found = norm_backward(bn, grad, z, stats, False, lambda values: calls.append(len(values)))
    assert calls == [17]
    assert found.operands == [None]
    (_, of_bias) = found.parameters[1]
    torch.testing.assert_close(of_bias, grad.sum((0, 2, 3)))


def test_batch_norm_that_cannot_be_synchronised_is_refused() -> None:
    """One inside a module that runs as a whole."""

    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bn(self.conv(x))
            return y if y.sum() > 1e9 else -y

    model = nn.Sequential(Depends(), BasicBlock(4, 4))
    planned = apply_plan(model, Schedule((Keep(0, SAVE_ALL), Keep(1, LEAN))))
    planned.lowmem.total = lambda values: None
    with pytest.raises(ValueError, match=r"batch norm bn in .* is inside a module that runs as a whole"):
        planned(torch.randn(2, 3, 8, 8))
    model[0].eval()
    planned(torch.randn(2, 3, 8, 8)).sum().backward()


@by_schedule
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_takes_no_more_memory(schedule: str, low: torch.dtype | None) -> None:
    """Predicted peaks: [C] vectors apart the same as without."""
    model = small_net(Bottleneck)
    shape = StepShape(
        model=model,
        image_shape=(3, 32, 32),
        batch=64,
        micro_batch=64,
        precision="fp32" if low is None else "amp",
        memory_format="contiguous",
        joint=True,
    )
    rates = Rates(1.0, 1.0)
    chosen = SCHEDULES[schedule](decompose(model))
    peaks = [
        simulate_step(replace(shape, sync_bn=sync_bn), chosen, rates).estimate.peak_tensor_bytes
        for sync_bn in (False, True)
    ]
    few_vectors = 24 * 1024
    assert peaks[0] > 100 * few_vectors
    assert peaks[1] <= peaks[0] + few_vectors
