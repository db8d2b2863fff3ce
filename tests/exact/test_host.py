"""What waits in host memory comes back as it was, when it was planned to, and the device has its memory meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config.schema import OptimConfig
from lowmem.measure.out_of_memory import Failure
from lowmem.plan.policy import GRADS, OUTPUT, SAVE_ALL, Host, Keep, Schedule, Segment
from lowmem.remat import PlannedModule, apply_plan, decompose
from lowmem.remat.host import Traffic
from lowmem.remat.links import CpuLink
from lowmem.simulate.effects import OutlineMode
from lowmem.simulate.step import empty_copy
from lowmem.simulate.trace import Recorder
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.step.undo import Undo
from tests.exact.compare import (
    BLOCKS,
    FORMAT_NAMES,
    FORMATS,
    differences,
    in_use,
    pictures,
    small_net,
    training,
    twins,
)
from tests.exact.schedules import hosting


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("block", BLOCKS)
def test_bits(block: Any, memory_format: torch.memory_format) -> None:
    model = small_net(block)
    x, labels = pictures(memory_format=memory_format)
    for seed in range(6):
        schedule = hosting(decompose(model), seed)
        plain, planned = twins(model, schedule, memory_format)
        assert differences(plain, planned, training(x, labels)) == [], schedule


def test_a_slow_link_is_waited_for() -> None:
    model = small_net(BLOCKS[1])
    x, labels = pictures()
    schedule = hosting(decompose(model), 1)
    plain, planned = twins(model, schedule, torch.contiguous_format)
    planned.lowmem.link = CpuLink(20e6)
    assert differences(plain, planned, training(x, labels)) == []


def changes(model: nn.Module, x: Tensor, labels: Tensor, recorder: Recorder) -> list[int]:
    """Bytes that come to exist and go, in order, of a step."""
    with recorder:
        recorder.adopt((*model.parameters(), *model.buffers(), x, labels))
        begun = len(recorder.trace.events)
        training(x, labels)(model)
    return [event.change_bytes for event in recorder.trace.events[begun:]]


@pytest.mark.parametrize("seed", range(4))
def test_the_device_has_what_is_simulated_at_every_event(seed: int) -> None:
    model = small_net(BLOCKS[1])
    schedule = hosting(decompose(model), seed)
    assert schedule.hosts
    x, labels = pictures()
    real = changes(apply_plan(model, schedule), x, labels, Recorder())
    with OutlineMode():
        recorder = Recorder()
        with recorder:
            outline = empty_copy(model).train()
            images, classes = torch.empty(x.shape), torch.zeros(labels.shape, dtype=torch.int64)
        simulated = changes(apply_plan(outline, schedule), images, classes, recorder)
    assert real == simulated
    bare = Schedule(tuple(replace(item, host=()) for item in schedule.items))
    assert peak(real) <= peak(changes(apply_plan(small_net(BLOCKS[1]), bare), x, labels, Recorder()))


def peak(of: list[int]) -> int:
    most = live = 0
    for change in of:
        live += change
        most = max(most, live)
    return most


def planned_and_link() -> tuple[PlannedModule, CpuLink]:
    model = small_net(BLOCKS[1])
    planned = apply_plan(model, hosting(decompose(model), 2))
    planned.lowmem.link = link = CpuLink()
    return planned, link


def test_steps_take_the_same_slabs() -> None:
    planned, link = planned_and_link()
    x, labels = pictures()
    training(x, labels)(planned)
    taken = link.arena.bytes
    assert taken > 0
    assert in_use(link) == 0
    training(x, labels)(planned)
    assert link.arena.bytes == taken


def test_a_forward_without_a_backward_gives_its_slabs_back() -> None:
    planned, link = planned_and_link()
    output = planned(pictures()[0])
    assert in_use(link) > 0
    del output
    assert in_use(link) == 0


def test_two_forwards_before_their_backwards() -> None:
    planned, link = planned_and_link()
    first, second = pictures(seed=1)[0], pictures(seed=2)[0]
    (planned(first).sum() + planned(second).square().sum()).backward()
    found = [parameter.grad for parameter in planned.parameters()]
    plain = small_net(BLOCKS[1])
    (plain(first).sum() + plain(second).square().sum()).backward()
    for one, parameter in zip(found, plain.parameters(), strict=True):
        assert one is not None
        assert parameter.grad is not None
        assert torch.equal(one, parameter.grad)
    assert in_use(link) == 0


def only_gradients() -> tuple[PlannedModule, CpuLink, nn.Module]:
    """Of all stages but the first, from the next stage's backward to the end; and a twin that is untouched."""
    model = small_net(BLOCKS[1])
    count = len(decompose(model))
    hosts = [() if k == 0 else (Host(frozenset({GRADS}), k - 1, -1),) for k in range(count)]
    planned = apply_plan(model, Schedule(tuple(Keep(k, SAVE_ALL, hosts[k]) for k in range(count))))
    planned.lowmem.link = link = CpuLink()
    return planned, link, small_net(BLOCKS[1])


def test_gradients_wait_and_are_there_when_the_backward_is_over() -> None:
    planned, link, plain = only_gradients()
    x, labels = pictures()
    assert differences(plain, planned, training(x, labels)) == []
    assert link.arena.bytes > 0.9 * sum(one.nbytes for one in plain.parameters())
    assert in_use(link) == 0


def test_gradients_that_are_there_already_are_added_to_on_the_device() -> None:
    planned, link, plain = only_gradients()
    for model in (plain, planned):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    assert differences(plain, planned, training(*pictures()), clear=False) == []
    assert link.arena.bytes == 0


def test_gradients_that_others_look_at_stay() -> None:
    planned, link, plain = only_gradients()
    x, labels = pictures()
    asked = torch.autograd.grad(F.cross_entropy(planned(x), labels), tuple(planned.parameters()))
    wanted = torch.autograd.grad(F.cross_entropy(plain(x), labels), tuple(plain.parameters()))
    assert all(map(torch.equal, asked, wanted))
    done: list[int] = []
    planned.lowmem.stage_done = done.append
    training(x, labels)(planned)
    assert done
    planned.lowmem.stage_done = None
    planned.zero_grad()
    assert link.arena.bytes == 0
    seen = []
    for name, parameter in planned.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda one, name=name: seen.append((name, one.grad)))
    training(x, labels)(planned)
    assert link.arena.bytes == 0
    assert all(grad is planned.get_parameter(name).grad for name, grad in seen)


def test_a_parameter_of_two_stages_gets_both_gradients() -> None:
    def shared() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)))
        model[3][0].weight = model[1][0].weight
        return model

    model, x = shared(), torch.randn(3, 64)
    count = len(decompose(model))
    assert count >= 4
    hosts = [() if k == 0 else (Host(frozenset({GRADS}), k - 1, -1),) for k in range(count)]
    planned = apply_plan(model, Schedule(tuple(Keep(k, SAVE_ALL, hosts[k]) for k in range(count))))
    planned.lowmem.link = link = CpuLink()

    def step(model: nn.Module) -> Tensor:
        output: Tensor = model(x)
        output.square().sum().backward()
        return output.detach()

    assert differences(shared(), planned, step) == []
    assert 0 < link.arena.bytes <= 2 * 64 * 64 * 4


def test_out_of_memory_in_the_middle_of_a_backward_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, link, plain = only_gradients()
    execution, (x, labels) = Execution("cpu", "fp32", "contiguous"), pictures()
    steps = [
        TrainStep(model, make_optimizer(model, OptimConfig(), "cpu"), make_scaler(execution), execution, None)
        for model in (plain, planned)
    ]
    undo = Undo(steps[1], planned)
    completed, left = Traffic.completed, 4

    def fails(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError("here")
        completed(*args)

    monkeypatch.setattr(Traffic, "completed", fails)
    failure = undo.attempt(lambda: steps[1](x, labels, 0.1))
    assert isinstance(failure, Failure)
    assert not failure.final
    assert in_use(link) == 0
    assert all(parameter.grad is None for parameter in planned.parameters())
    for _ in range(2):
        steps[0](x, labels, 0.1)
        assert not isinstance(undo.attempt(lambda: steps[1](x, labels, 0.1)), Failure)
    assert all(map(torch.equal, planned.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("method", ["ran", "completed", "reaches", "_begin"])
def test_after_an_error_nothing_moves(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, link = planned_and_link()
    x, labels = pictures()
    works, left = getattr(Traffic, method), 0

    def fails(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError("here")
        return works(*args)

    def step() -> None:
        planned.zero_grad()
        training(x, labels)(planned)

    step()
    monkeypatch.setattr(Traffic, method, fails)
    step()
    count = -left
    assert count > 4
    for left in range(1, count + 1):  # noqa: B007
        with pytest.raises(MemoryError, match="here"):
            step()
        assert in_use(link) == 0
    planned.zero_grad()
    assert torch.equal(training(x, labels)(planned), training(x, labels)(small_net(BLOCKS[1])))


def test_schedules_with_hosts_are_written_and_read() -> None:
    model = small_net(BLOCKS[0])
    stages = decompose(model)
    for seed in range(20):
        schedule = hosting(stages, seed)
        assert Schedule.from_json(schedule.to_json()) == schedule


def test_what_cannot_wait_is_refused() -> None:
    model = small_net(BLOCKS[1])
    count = len(decompose(model))
    usual = [Keep(k, SAVE_ALL) for k in range(count)]

    def with_first(host: Host) -> Schedule:
        return Schedule((Keep(0, SAVE_ALL, (host,)), *usual[1:]))

    with pytest.raises(ValueError, match="goes after stage 0 and comes back before stage 3"):
        with_first(Host(frozenset({OUTPUT}), 0, 3))  # the next stage reads it
    with pytest.raises(ValueError, match="goes after stage 99"):
        with_first(Host(frozenset({"conv1"}), 99, 3))
    with pytest.raises(ValueError, match=f"the output of stage {count - 1} cannot wait"):
        Schedule((*usual[:-1], Keep(count - 1, SAVE_ALL, (Host(frozenset({OUTPUT}), count - 1, count - 1),))))
    with pytest.raises(ValueError, match="no nothing that could wait on the host"):
        apply_plan(model, with_first(Host(frozenset({"nothing"}), 1, 1)))

    def with_last(*hosts: Host) -> Schedule:
        return Schedule((*usual[:-1], Keep(count - 1, SAVE_ALL, hosts)))

    with pytest.raises(ValueError, match=f"gradients of stage {count - 1} wait alone"):
        with_last(Host(frozenset({GRADS, "conv1"}), 1, 0))
    for gone, back in ((count - 1, 0), (1, 1), (1, 2)):
        with pytest.raises(ValueError, match=f"gradients of stage {count - 1} go before the backward of stage {gone}"):
            with_last(Host(frozenset({GRADS}), gone, back))
    inner = Schedule((Keep(0, SAVE_ALL, (Host(frozenset({"conv1"}), 0, 0),)), Keep(1, SAVE_ALL)))
    with pytest.raises(ValueError, match=r"inside of the segment 0\.\.1"):
        Segment(0, 1, inner)
