"""Checks of memory that runs out and losses that break, in all processes at once (see checks.py)."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lowmem.choose.request import card_rates
from lowmem.config.cards import load_card
from lowmem.config.schema import Config, known_keys
from lowmem.config.settings import Settings, to_yaml
from lowmem.core.errors import LowmemError, OutOfMemory, PeerError
from lowmem.data import Dataset
from lowmem.distributed.group import Group, Split, even_shares
from lowmem.measure.tensors import TensorMeter
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.store import NullFolder, RunFolder
from lowmem.simulate import StepShape, simulate_step
from lowmem.step.data_parallel import are_alike
from lowmem.step.undo import Undo
from lowmem.train import replica
from lowmem.train.loop import Trainer
from lowmem.train.watchers import Act, MemoryPressure, Verdict
from tests.distributed import small
from tests.faults.injection import Scarce, scarce_step


def out_of_memory(group: Group) -> None:
    """Wherever it strikes, all undo the step, take a smaller plan and repeat it: the run ends as if it had not. In the
    last process once, in rank 0, and in the last process twice in the same step."""
    last = group.size - 1
    _out_of_memory(group, [({60}, (last,), 1)], [({25}, (0,), 1), ({40}, (last,), 2)])


def out_of_memory_anywhere(group: Group) -> None:
    """The same at other allocations, in all processes, and with and without batch norm over all pictures."""
    last = group.size - 1
    cases = [({count}, (last,), 1) for count in (1, 30, 60, 120)]
    cases += [({25}, (0,), 1), ({25}, tuple(range(group.size)), 1), ({40}, (last,), 2)]
    _out_of_memory(group, cases, cases[3:])


Case = tuple[set[int], tuple[int, ...], int]  # allocations that fail, in which processes, how often


def _out_of_memory(group: Group, cases: list[Case], cases_sync_bn: list[Case]) -> None:
    data = small.dataset()
    for sync_bn in (False, True):
        settings = small.config(sync_bn=sync_bn)
        reference = _trained(group, settings, data, set(), ())
        for fail_at, ranks, failures in cases_sync_bn if sync_bn else cases:
            t = _trained(group, settings, data, fail_at, ranks, failures)
            assert t.plan is not None
            assert len(t.plan.ladder) == 2 - failures, (fail_at, ranks, failures)
            _assert_same_training(t, reference)


def memory_that_runs_short_in_one_process(group: Group) -> None:
    """All take the smaller plan at the same step, and go on."""
    data = small.dataset()
    reference = _trained(group, small.config(), data, set(), ())
    told = 0

    def look(*given: object) -> Verdict:
        nonlocal told
        told += 1
        return Verdict(Act.REPLAN, "it is made up") if told == 1 and group.rank == 1 else Verdict()

    with mock.patch.object(MemoryPressure, "look", look):
        t = _trained(group, small.config(), data, set(), ())
    assert t.plan is not None
    assert len(t.plan.ladder) == 1
    _assert_same_training(t, reference)


def a_loss_that_breaks_in_one_process(group: Group) -> None:
    """All go back to the checkpoint that rank 0 has, with half the rate, and end alike."""
    settings, data = small.config(epochs=2), small.dataset()
    t = small.trainer(group, settings, data)
    fetch, broken = t.batches.batch, 0

    def batch(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        nonlocal broken
        images, labels = fetch(*arguments, **named)
        if group.rank == 1 and t.state.step == 2 and not broken:
            broken += 1
            images = images * float("nan")
        return images, labels

    t.batches.batch = batch  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "run"
        if group.leads:
            values = Settings(settings, dict.fromkeys(known_keys(), "test"))
            folder: RunFolder = RunFolder.create(path, to_yaml(values), {})
            checkpoints.save(folder.checkpoints, t.checkpoint(), keep=2)
        else:
            folder = NullFolder(path)
        with folder:
            outcome = t.run(folder)
    assert outcome.finished
    assert (t.state.rollbacks, t.state.lr_scale, t.state.step) == (1, 0.5, 6)
    assert are_alike(group, t.model)
    assert all(bool(torch.isfinite(one).all()) for one in t.model.parameters())


def _assert_same_training(t: Trainer, reference: Trainer) -> None:
    for name, tensor in t.model.state_dict().items():
        assert torch.equal(tensor, reference.model.state_dict()[name]), name
    for parameter, other in zip(t.model.parameters(), reference.model.parameters(), strict=True):
        left, right = (one.optimizer.state[p] for one, p in ((t, parameter), (reference, other)))
        assert torch.equal(left["momentum_buffer"], right["momentum_buffer"])


def _trained(
    group: Group, settings: Config, data: Dataset, fail_at: set[int], ranks: tuple[int, ...], failures: int = 1
) -> Trainer:
    """A run whose processes `ranks` fail at these allocations of its second step, so often."""
    shares = even_shares(small.BATCH, group.size)
    _, second, first = (small.plan(one, shares[group.rank], shares) for one in small.schedules().values())
    plan = small.plan(first.schedule, shares[group.rank], shares, ladder=(second, first))
    t = small.trainer(group, settings, data, Split(shares, group.rank), plan)
    fails = group.rank in ranks
    with scarce_step(t, Scarce(fail_at if fails else set()), step=1, failures=failures if fails else 0):
        t.run(NullFolder(Path("nowhere")))
    return t


def out_of_memory_without_a_smaller_plan(group: Group) -> None:
    """All give up, none hangs."""
    data, shares = small.dataset(), even_shares(small.BATCH, group.size)
    plan = small.plan(next(iter(small.schedules().values())), shares[group.rank], shares)
    t = small.trainer(group, small.config(), data, Split(shares, group.rank), plan)
    fails = group.rank == group.size - 1
    try:
        with scarce_step(t, Scarce({5} if fails else set()), step=1):
            t.run(NullFolder(Path("nowhere")))
    except LowmemError as error:
        assert isinstance(error, OutOfMemory if group.leads else PeerError)  # noqa: PT017
        assert "no smaller plan left" in str(error)  # noqa: PT017
        assert (f"of process {group.size - 1}" in str(error)) is not fails  # noqa: PT017
    else:
        raise AssertionError("it went on")


def no_room_to_evaluate_in_one_process(group: Group) -> None:
    """Not even one picture at a time: all give up after the epoch, with its cause, and none hangs."""
    t = small.trainer(group, small.config(), small.dataset())
    score = replica.evaluate

    def scarce(*arguments: Any) -> Any:
        if group.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 MiB. There is no more.")
        return score(*arguments)

    with mock.patch.object(replica, "evaluate", scarce):
        try:
            t.run(NullFolder(Path("nowhere")))
        except LowmemError as error:
            assert "evaluation of process 1" in str(error)  # noqa: PT017
        else:
            raise AssertionError("it went on")
    assert t.state.step_in_epoch == t.batches.steps_per_epoch


def simulated_memory_is_what_a_step_takes(group: Group) -> None:
    """In every process, packs and sums included, to the byte."""
    data, shares = small.dataset(), even_shares(small.BATCH, group.size)
    rates = card_rates(load_card("gtx1060-6g"))("fp32")
    for sync_bn in (False, True):
        for schedule in small.schedules().values():
            plan = small.plan(schedule, shares[group.rank], shares)
            t = small.trainer(group, small.config(sync_bn=sync_bn), data, Split(shares, group.rank), plan)
            shape = StepShape(
                model=t.model, image_shape=(3, 32, 32), batch=plan.batch, micro_batch=plan.batch, precision="fp32",
                memory_format="contiguous", joint=True, sync_bn=sync_bn,
            )  # fmt: skip
            predicted = simulate_step(shape, schedule, rates).estimate.peak_tensor_bytes
            alone = simulate_step(replace(shape, joint=False), schedule, rates).estimate.peak_tensor_bytes
            assert predicted >= alone
            undo, meter = Undo(t.step, t.model), TensorMeter()
            images, labels, size, _ = t.next_batch(0, 0)
            state = [slots["momentum_buffer"] for slots in t.optimizer.state.values()]
            meter.adopt((*t.model.parameters(), *t.model.buffers(), *state, *undo.copies, images, labels))
            with meter:
                t.step(images, labels, 0.05, None, size)
            assert meter.peak_bytes == predicted, (meter.peak_bytes, predicted, alone, schedule)
