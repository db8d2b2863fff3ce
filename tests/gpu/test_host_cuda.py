"""Host memory on a card: the bits, the bytes of the device, pinned memory and its absence, the link's rates. Run with
`python -m pytest -m gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lowmem.bench.plan_checks import GRADIENTS, PlanQuestion
from lowmem.choose.planning import make_plan
from lowmem.config.cards import host_bytes_per_second
from lowmem.core.units import MIB
from lowmem.isolate import run
from lowmem.measure import read_driver
from lowmem.measure.cuda import device_uuid
from lowmem.models import skeleton
from lowmem.plan.hosting import HostTerms
from lowmem.plan.policy import GRADS, Host, Schedule
from lowmem.plan.timeline import LinkRates
from lowmem.remat import PlannedModule, apply_plan
from lowmem.remat.host import Traffic
from lowmem.remat.links_cuda import CudaLink, measured_rates
from lowmem.simulate.effects import OutlineMode
from lowmem.simulate.step import empty_copy
from lowmem.simulate.trace import Recorder
from tests.exact.compare import training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TERMS = HostTerms(LinkRates(12e9, 12e9), 1 << 30)
BATCH, WIDTH, SHAPE = 2048, 1024, (1, 32, 32)  # a tensor of 8 MiB between two layers


@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize(("arch", "block", "budget"), [("res20", "basic", "40M"), ("cnn56", "bottleneck", "60M")])
def test_a_step_with_host_memory_has_autograds_bits(
    arch: str,
    block: str,
    budget: str,
    precision: Literal["fp32", "amp"],
    memory_format: Literal["contiguous", "channels-last"],
) -> None:
    """Loss, gradients and buffers, with deterministic algorithms."""
    plan = make_plan(
        skeleton(arch, block, width=16),
        batch=64,
        budget=budget,
        precision=precision,
        memory_format=memory_format,
        batch_norm="library",
        host=TERMS,
    )
    assert plan.predicted.host_bytes, "nothing waits on the host: the budget is too large to tell anything"
    question = PlanQuestion(arch=arch, block=block, width=16, batch=64, plan=plan.to_json(), device="cuda")
    outcome = run(GRADIENTS, asdict(question), timeout_seconds=300)
    assert outcome.refused is None, outcome
    assert outcome.answer.get("deterministic_refused") is None
    assert outcome.answer["deterministic_bitwise"], outcome.answer


# -- a net of matrix products alone, which takes no workspace but what cuBLAS keeps ----------------------------------


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, 10, bias=False))


def _given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, *SHAPE, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


@pytest.fixture(scope="module", params=[False, True], ids=["activations", "gradients too"])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Under which much waits on the host."""
    plan = make_plan(_net(), batch=BATCH, budget="130M", image_shape=SHAPE, momentum=False, host=TERMS)
    assert (plan.predicted.host_bytes or 0) >= 32 * MIB
    assert plan.accumulation == 1
    items = plan.schedule.items
    if request.param:
        gone = [Host(frozenset({GRADS}), before.end, -1) for before in items[:-1]]
        later = (replace(item, host=(*item.host, one)) for item, one in zip(items[1:], gone, strict=True))
        items = (items[0], *later)
    return Schedule(items)


@pytest.fixture(params=[True, False], ids=["pinned", "pageable"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaLink]:
    """One of its own, as memory that was pinned stays so."""
    link = CudaLink(torch.cuda.current_device())
    if not request.param:
        monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *_: 2)  # cudaErrorMemoryAllocation
        with pytest.warns(UserWarning, match=r"cannot be pinned \(CUDA error 2"):
            link.arena.give_back(link.arena.take(4096))
    yield link
    assert link.pinned == request.param
    link.unpin()


def _step(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss = training(x, labels)(model)
    return [loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def _planned(schedule: Schedule, link: CudaLink | None = None) -> tuple[PlannedModule, Tensor, Tensor]:
    planned = apply_plan(_net().cuda(), schedule)
    if link is not None:
        planned.lowmem.link = link
    x, labels = _given()
    return planned, x.cuda(), labels.cuda()


def test_bits_step_after_step(schedule: Schedule, link: CudaLink) -> None:
    """Of the same schedule without host memory, under the same kernels: slabs and the card's memory are used again
    while copies are under way."""
    planned, x, labels = _planned(schedule, link)
    bare, *_ = _planned(Schedule(tuple(replace(item, host=()) for item in schedule.items)))
    for step in range(5):
        batch = x * (step + 1)
        ours, theirs = _step(planned, batch, labels), _step(bare, batch, labels)
        assert all(map(torch.equal, ours, theirs)), step
    assert link.arena.bytes > 0


def _simulated_changes(schedule: Schedule) -> list[int]:
    """Bytes that come to exist and go, in order, of a step on outlines."""
    with OutlineMode():
        recorder = Recorder()
        with recorder:
            outline = empty_copy(_net()).train()
            x, labels = torch.empty(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64)
        return _changes(apply_plan(outline, schedule), x, labels, recorder)


def _changes(model: nn.Module, x: Tensor, labels: Tensor, recorder: Recorder) -> list[int]:
    with recorder:
        recorder.adopt((*model.parameters(), *model.buffers(), x, labels))
        begun = len(recorder.trace.events)
        training(x, labels)(model)
    return [event.change_bytes for event in recorder.trace.events[begun:]]


def _peak(changes: list[int]) -> int:
    most = live = 0
    for change in changes:
        live += change
        most = max(most, live)
    return most


def test_the_card_has_what_is_simulated(schedule: Schedule, link: CudaLink) -> None:
    """At its peak, as the allocator counts; but for how it rounds the few tensors of some bytes."""
    planned, x, labels = _planned(schedule, link)
    for _ in range(2):  # cuBLAS takes its workspaces, and the link its slabs
        _step(planned, x, labels)
    planned.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training(x, labels)(planned)
    torch.cuda.synchronize()
    simulated = _peak(_simulated_changes(schedule))
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(simulated, abs=16 * 1024)
    bare = Schedule(tuple(replace(item, host=()) for item in schedule.items))
    assert simulated < _peak(_simulated_changes(bare)) - 16 * MIB


def test_after_an_error_nothing_moves(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a backward: the next step has its bits, and the device's memory is all there again."""
    link = CudaLink(torch.cuda.current_device())
    planned, x, labels = _planned(schedule, link)
    expected = _step(copy.deepcopy(_net()).cuda(), x, labels)
    _step(planned, x, labels)
    planned.zero_grad(set_to_none=True)
    before, works, calls = torch.cuda.memory_allocated(), Traffic.reaches, 0

    def fails(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise MemoryError("here")
        works(*given)

    with monkeypatch.context() as changed:
        changed.setattr(Traffic, "reaches", fails)
        with pytest.raises(MemoryError, match="here"):
            training(x, labels)(planned)
    assert all(stream.query() for stream in link.streams)
    planned.zero_grad(set_to_none=True)
    assert torch.cuda.memory_allocated() <= before
    assert all(map(torch.equal, _step(planned, x, labels), expected))
    link.unpin()


def test_the_rates_are_a_links() -> None:
    """Not of another kind than the driver says of the slot, nor those of memory."""
    out, back = measured_rates()
    assert 0.1e9 < out < 200e9
    assert 0.1e9 < back < 200e9
    device = read_driver().device(device_uuid())
    pcie = None if device is None else device.link
    attained = pcie and host_bytes_per_second(pcie.most_generation or 0, pcie.lanes or 0)
    if attained:
        assert max(out, back) < 1.5 * attained
