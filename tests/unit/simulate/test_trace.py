"""What the recorder sees: storages, lifetimes, kinds, operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.config.optimization import OptimConfig
from lowmem.core.units import MIB
from lowmem.plan.cost import KernelWork
from lowmem.plan.policy import LEAN
from lowmem.simulate import (
    Kind,
    MemoryEvent,
    OutlineMode,
    Recorder,
    Trace,
    empty_copy,
    estimate,
    trace_steps,
)
from tests.exact.schedules import uniform
from tests.unit.simulate.loops import Setup


@pytest.mark.parametrize("fake", [True, False])
def test_allocations_and_frees(fake: bool) -> None:
    recorder = Recorder()
    mode = OutlineMode() if fake else torch.no_grad()
    with mode, recorder:
        a = torch.empty(1000)
        view = a[:10].view(2, 5)
        b = a + 1
        del a
        assert [event.change_bytes for event in recorder.trace.events] == [4000, 4000]
        del view
        del b
    assert [event.change_bytes for event in recorder.trace.events] == [4000, 4000, -4000, -4000]
    assert recorder.peak_bytes == 8000


def test_in_place_work_allocates_nothing_and_is_counted() -> None:
    recorder = Recorder()
    with OutlineMode(), recorder:
        a, b = torch.empty(256), torch.empty(256)
        a.relu_()
        a.add_(b)
        torch.ops.aten.threshold_backward.grad_input(a, b, 0, grad_input=a)
        a.view(16, 16)
    assert len(recorder.trace.events) == 2
    assert [work.moved_bytes for work in recorder.trace.work] == [2048, 3072, 3072]


def test_the_fused_update_is_counted_though_it_returns_nothing() -> None:
    """Parameters, gradients and momentum are read, parameters and momentum written; nothing is allocated."""
    trace = trace_steps(Setup().build)
    parameters = sum(p.numel() * 4 for p in Setup().model(fake=False).parameters())
    assert [work.moved_bytes for work in trace.work if work.phase == "update"] == [5 * parameters]
    assert not [event for event in trace.events if event.phase == "update" and event.change_bytes > 0]


def test_the_update_of_adamw_and_of_the_mean_weights_is_counted_too() -> None:
    """AdamW reads parameters, gradients and two means, and writes all but the gradients; their mean's reads two and
    writes one."""
    trace = trace_steps(Setup(optim=OptimConfig(kind="adamw", ema=0.9)).build)
    parameters = list(Setup().model(fake=False).parameters())
    sizes, counts = sum(p.nbytes for p in parameters), 4 * len(parameters)
    moved = [work.moved_bytes for work in trace.work if work.phase == "update"]
    assert moved == [7 * sizes + counts, 3 * sizes]
    assert not [event for event in trace.events if event.phase == "update" and event.change_bytes > 0]


def test_flops_are_those_of_the_flop_counter() -> None:
    recorder = Recorder()
    with OutlineMode(), recorder:
        x, w = torch.empty(2, 3, 8, 8), torch.empty(5, 3, 3, 3)
        torch.ops.aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    (work,) = recorder.trace.work
    assert work.flops == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    assert work.moved_bytes == 4 * (x.numel() + w.numel() + 2 * 5 * 8 * 8)


def test_kinds() -> None:
    trace = trace_steps(Setup(schedule=lambda stages: uniform(stages, LEAN)).build, 2)
    result = estimate(trace)
    model = Setup().model(fake=False)
    sizes = sum(p.numel() * 4 for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert result.at_peak_bytes[Kind.PARAMS] == sizes + buffers
    assert result.at_peak_bytes[Kind.OPTIMIZER] == sizes
    assert sum(result.at_peak_bytes.values()) == result.peak_tensor_bytes
    kinds = trace.all_kinds()
    grads = sum(e.change_bytes for e in trace.events if e.change_bytes > 0 and kinds[e.storage] is Kind.GRADS)
    assert grads == 2 * sizes  # once a step
    assert result.peak_tensor_bytes <= result.peak_allocated_bytes <= result.peak_reserved_bytes


def test_nothing_survives_the_loop() -> None:
    trace = trace_steps(Setup(schedule=lambda stages: uniform(stages, LEAN)).build, 1)
    assert sum(event.change_bytes for event in trace.events) == 0


def test_steps_repeat_exactly() -> None:
    """No leak: momentum exists from the start, and every step's peak is the first's."""
    build = Setup(schedule=lambda stages: uniform(stages, LEAN)).build
    peaks = [estimate(trace_steps(build, steps)).peak_tensor_bytes for steps in (1, 2, 3)]
    assert len(set(peaks)) == 1


def test_estimate_of_a_known_trace() -> None:
    events = [
        MemoryEvent(1, 3 * MIB, "setup", "a"),
        MemoryEvent(2, 12 * MIB, "forward", "b"),
        MemoryEvent(3, MIB, "backward", "c"),
        MemoryEvent(2, -12 * MIB, "backward", ""),
        MemoryEvent(3, -MIB, "backward", ""),
    ]
    result = estimate(Trace(events, [KernelWork(7, 1, "b", "forward")], {1: Kind.PARAMS}))
    assert result.peak_tensor_bytes == 16 * MIB
    assert result.at_peak_bytes == {
        Kind.PARAMS: 3 * MIB,
        Kind.ACTIVATIONS: 12 * MIB,
        Kind.TEMPORARY: MIB,
        Kind.GRADS: 0,
        Kind.OPTIMIZER: 0,
        Kind.WORKSPACE: 0,
    }
    assert (result.peak_at.phase, result.peak_at.operation) == ("backward", "c")
    assert result.peak_reserved_bytes == (20 + 2) * MIB  # the 12 MiB fit into what is left of the first segment


def test_empty_copy_is_the_same_model_without_values() -> None:
    model = Setup().model(fake=False)
    model.conv1.weight.requires_grad_(False)
    names = list(model.state_dict())
    with OutlineMode():
        copied = empty_copy(model, torch.channels_last)
        assert list(copied.state_dict()) == names
        assert not copied.conv1.weight.requires_grad
        assert isinstance(copied.conv1.weight, nn.Parameter)
        assert copied.layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.conv1.weight.device.type == "cpu"
