"""What several processes must hold, checked in all of them at once: `torchrun … -m tests.distributed.checks OUT.json`.

One group of processes does all checks, because starting one takes longer than most of them. Rank 0 writes for each its
failure, or null; the tests read that.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.cards import load_card
from lowmem.choose.request import card_rates
from lowmem.choose.simulated import StepShape, simulate_step
from lowmem.config import Config, known_keys
from lowmem.data import Dataset
from lowmem.distributed.group import Group, PeerError, join
from lowmem.distributed.launch import Launch
from lowmem.distributed.reducer import Work
from lowmem.distributed.split import Split, even_shares
from lowmem.errors import OutOfMemory, UsageError
from lowmem.measure.tensors import TensorMeter
from lowmem.plan import exchange
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.absent import AbsentFolder
from lowmem.runs.store import RunFolder
from lowmem.settings import Settings, to_yaml
from lowmem.train.joint import are_alike
from lowmem.train.loop import Trainer
from lowmem.train.pressure import Pressure
from lowmem.train.step import Execution
from lowmem.train.survive import Undo
from tests.distributed import small
from tests.faults.injection import Scarce, scarce_step

Check = Callable[[Group], None]


def _shares(group: Group) -> tuple[tuple[int, ...], ...]:
    """Even ones, and unlike ones; among four a process that has nothing."""
    unlike = (5, 7) if group.size == 2 else (0, 2, 3, 7)
    return even_shares(small.BATCH, group.size), unlike


def _step(t: Trainer, epoch: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients before the update, and the sums of losses and wrong predictions."""
    images, labels, size = t.next_batch(epoch, step)
    found: dict[str, Tensor] = {}

    def look() -> None:
        found.update({name: p.grad.clone() for name, p in t.model.named_parameters() if p.grad is not None})

    totals = t.step(images.to(dtype), labels, 0.05, look, size)
    return found, totals


def _alone(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """By autograd, of one slice: its part of the mean loss over `size` pictures."""
    model.zero_grad()
    if len(labels) == 0:
        return {name: torch.zeros_like(p) for name, p in model.named_parameters()}, torch.zeros(2, dtype=torch.float64)
    logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    (loss / size).backward()
    wrong = (logits.argmax(1) != labels).sum()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, torch.stack([loss.detach().double(), wrong.double()])


def gradients_are_the_sum_of_the_slices(group: Group) -> None:
    """Whatever the plans, which differ by process, and the shares. Two processes: bit for bit."""
    data = small.dataset(pictures=2 * small.BATCH + 3)
    for shares in _shares(group):
        split = Split(shares, group.rank)
        plans = list(small.schedules().values())
        plan = small.plan(plans[group.rank % len(plans)], shares[group.rank], shares)
        for step in (0, 2):  # 2: the last, of three pictures
            ours, whole = (
                small.trainer(group, small.config(), data, split, plan),
                small.trainer(Group(), small.config(), data),
            )
            gradients, totals = _step(ours, 0, step)
            images, labels, size = whole.next_batch(0, step)
            statistics: dict[str, Tensor] = {}
            summed: dict[str, Tensor] = {}
            sums = torch.zeros(2, dtype=torch.float64)
            for rank in range(group.size):
                first, past = split.part(size, rank)
                reference = small.trainer(Group(), small.config(), data).model
                part, part_sums = _alone(reference, images[first:past], labels[first:past], size)
                sums += part_sums
                for name, gradient in part.items():
                    summed[name] = gradient if rank == 0 else summed[name] + gradient
                for name, buffer in reference.named_buffers():
                    if buffer.is_floating_point():
                        statistics[name] = statistics.get(name, 0) + buffer * ((past - first) / size)
            assert torch.equal(totals, sums) or group.size > 2
            torch.testing.assert_close(totals, sums)
            for name, gradient in gradients.items():
                same = torch.equal(gradient, summed[name])
                assert same or group.size > 2, f"{name} under {shares} in step {step}"
                torch.testing.assert_close(gradient, summed[name], rtol=1e-5, atol=1e-6)
            buffers = dict(ours.model.named_buffers())
            for name, expected in statistics.items():
                torch.testing.assert_close(buffers[name], expected, rtol=1e-6, atol=1e-7)
            assert are_alike(group, ours.model)


def norms_over_all_pictures_equal_one_process(group: Group) -> None:
    """--sync-bn, to rounding: float64, three steps with their updates, the last of them smaller than the group."""
    data = small.dataset(pictures=2 * small.BATCH + 3)
    settings = small.config(sync_bn=True)
    for shares in _shares(group):
        split = Split(shares, group.rank)
        ours = small.trainer(group, settings, data, split, dtype=torch.float64)
        one = small.trainer(Group(), settings, data, dtype=torch.float64)
        for step in range(3):
            gradients, totals = _step(ours, 0, step, torch.float64)
            expected, expected_totals = _step(one, 0, step, torch.float64)
            torch.testing.assert_close(totals, expected_totals, rtol=1e-10, atol=0)
            for name, gradient in gradients.items():
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10 * scale)
        for name, tensor in ours.model.state_dict().items():
            torch.testing.assert_close(tensor, one.model.state_dict()[name], rtol=1e-8, atol=1e-12)
        assert are_alike(group, ours.model)


def gradients_are_summed_once_and_during_the_backward_pass(group: Group) -> None:
    """Also with micro-batches: one sum for each message of an effective batch, most of them before the last stage."""
    data = small.dataset()
    t = small.trainer(
        group, small.config(micro_batch=2), data, Split((12,) + (0,) * (group.size - 1), group.rank, (2,) * group.size)
    )
    joint, run = t.step.joint, t.planned
    assert joint is not None
    assert run is not None
    happened: list[str] = []
    start, done = group.start_total, run.stage_done
    assert done is not None

    def start_total(tensor: Tensor) -> Work:
        happened.append("sum")
        return start(tensor)

    def stage_done(index: int) -> None:
        happened.append(f"stage {index}")
        done(index)

    joint._reducer._start = start_total
    run.stage_done = stage_done
    _step(t, 0, 0)
    messages = joint._reducer.messages
    assert happened.count("sum") == len(messages) + 1  # and the running statistics
    assert len(messages) > 5
    if group.rank == 0:
        assert happened.count("stage 0") == 6, "every micro-batch goes backward through all stages"
        before = happened[: len(happened) - happened[::-1].index("stage 0")].count("sum")
        assert before > len(messages) / 2
        last = len(happened) - happened[::-1].index(f"stage {len(run.stages) - 1}")
        assert "sum" not in happened[: last - 1], "no sum before the last micro-batch"


def mixed_precision_channels_last_and_micro_batches(group: Group) -> None:
    """All at once, against autograd on the untouched model, slice by slice: the same bits for two processes."""
    data = small.dataset(pictures=2 * small.BATCH + 3)
    settings = small.config(micro_batch=2)
    execution = Execution("cpu", "amp", "channels-last")
    split = Split(even_shares(small.BATCH, group.size), group.rank, (2,) * group.size)
    for step in (0, 2):
        ours = small.trainer(group, settings, data, split, execution=execution)
        gradients, totals = _step(ours, 0, step)
        summed: dict[str, Tensor] = {}
        sums = torch.zeros(2, dtype=torch.float64)
        for rank in range(group.size):
            alone = small.trainer(Group(), settings, data, execution=execution)
            images, labels, size = alone.next_batch(0, step)
            first, past = split.part(size, rank)
            if first == past:
                continue
            found: dict[str, Tensor] = {}
            named = list(alone.model.named_parameters())

            def look(found: dict[str, Tensor] = found, named: Any = named) -> None:
                found.update({name: p.grad.clone() for name, p in named})

            sums += alone.step(images[first:past], labels[first:past], 0.05, look, size)
            for name, gradient in found.items():
                summed[name] = summed[name] + gradient if name in summed else gradient
        torch.testing.assert_close(totals, sums)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, summed[name]) or group.size > 2, (name, step)


def out_of_memory(group: Group) -> None:
    """Wherever it strikes, all undo the step, take a smaller plan and repeat it: the run ends as if it had not. In the
    last process, in rank 0, in all of them, and in the same step twice."""
    data, last = small.dataset(), group.size - 1
    for sync_bn in (False, True):
        settings = small.config(sync_bn=sync_bn)
        reference = _trained(group, settings, data, set(), ())
        cases = [({count}, (last,), 1) for count in (1, 8, 30, 60, 90, 120)]
        cases += [({25}, (0,), 1), ({25}, tuple(range(group.size)), 1), ({40}, (last,), 2)]
        for fail_at, ranks, failures in cases[4:] if sync_bn else cases:
            t = _trained(group, settings, data, fail_at, ranks, failures)
            assert t.plan is not None
            assert len(t.plan.ladder) == 2 - failures, (fail_at, ranks, failures)
            _assert_same_training(t, reference)


def memory_that_runs_short_in_one_process(group: Group) -> None:
    """All take the smaller plan at the same step, and go on."""
    data = small.dataset()
    reference = _trained(group, small.config(), data, set(), ())
    told = 0

    def interval(self: Pressure, steps: int, seconds: float) -> str | None:
        nonlocal told
        told += 1
        return "it is made up" if told == 1 and group.rank == 1 else None

    with mock.patch.object(Pressure, "interval", interval):
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
            folder = AbsentFolder(path)
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
    first, second = (small.plan(one, shares[group.rank], shares) for one in small.schedules().values())
    plan = small.plan(first.schedule, shares[group.rank], shares, ladder=(second, first))
    t = small.trainer(group, settings, data, Split(shares, group.rank), plan)
    fails = group.rank in ranks
    with scarce_step(t, Scarce(fail_at if fails else set()), step=1, failures=failures if fails else 0):
        t.run(AbsentFolder(Path("nowhere")))
    return t


def out_of_memory_without_a_smaller_plan(group: Group) -> None:
    """All give up, none hangs."""
    data, shares = small.dataset(), even_shares(small.BATCH, group.size)
    plan = small.plan(next(iter(small.schedules().values())), shares[group.rank], shares)
    t = small.trainer(group, small.config(), data, Split(shares, group.rank), plan)
    fails = group.rank == group.size - 1
    try:
        with scarce_step(t, Scarce({5} if fails else set()), step=1):
            t.run(AbsentFolder(Path("nowhere")))
    except OutOfMemory as error:
        assert "no smaller plan left" in str(error)  # noqa: PT017
        assert (f"of process {group.size - 1}" in str(error)) is not fails  # noqa: PT017
    else:
        raise AssertionError("it went on")


def simulated_memory_is_what_a_step_takes(group: Group) -> None:
    """In every process, packs and sums included: to the small tensors that the simulated loop has not."""
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
            images, labels, size = t.next_batch(0, 0)
            state = [slots["momentum_buffer"] for slots in t.optimizer.state.values()]
            meter.adopt((*t.model.parameters(), *t.model.buffers(), *state, *undo.copies, images, labels))
            with meter:
                t.step(images, labels, 0.05, None, size)
            assert abs(meter.peak_bytes - predicted) <= 4096, (meter.peak_bytes, predicted, alone, schedule)


def weights_that_come_apart_are_seen(group: Group) -> None:
    t = small.trainer(group, small.config(), small.dataset())
    assert are_alike(group, t.model)
    with torch.no_grad():
        if group.rank == 1:
            next(t.model.parameters()).view(-1)[0].mul_(1 + 1e-6)
    assert not are_alike(group, t.model)
    t.take_over_from_rank_0()
    assert are_alike(group, t.model)


def what_one_says_all_hear(group: Group) -> None:
    assert group.gather({"rank": group.rank, "text": "ä" * group.rank}) == [
        {"rank": rank, "text": "ä" * rank} for rank in range(group.size)
    ]
    assert group.share([group.rank, 0.1]) == [0, 0.1]
    assert group.most([group.rank, -group.rank]) == [group.size - 1, 0]
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.int64)} if group.leads else None
    received = group.share_tensors(tensors)
    assert received["a"].tolist() == [0, 1, 2, 3, 4]
    assert received["b"].dtype == torch.int64


def an_error_of_one_is_everyones(group: Group) -> None:
    def work() -> int:
        if group.rank == group.size - 1:
            raise UsageError("mine alone")
        return 1

    try:
        group.together(work)
    except UsageError as error:
        assert not error.told  # noqa: PT017
        assert group.rank == group.size - 1
    except PeerError as error:
        assert error.told  # noqa: PT017
        assert (str(error), error.exit_code) == (f"process {group.size - 1}: mine alone", 2)  # noqa: PT017
    else:
        raise AssertionError("nobody heard of it")
    assert group.lead(lambda: 5, 0) == (5 if group.leads else 0)


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        what_one_says_all_hear,
        an_error_of_one_is_everyones,
        gradients_are_the_sum_of_the_slices,
        mixed_precision_channels_last_and_micro_batches,
        norms_over_all_pictures_equal_one_process,
        gradients_are_summed_once_and_during_the_backward_pass,
        weights_that_come_apart_are_seen,
        simulated_memory_is_what_a_step_takes,
        out_of_memory,
        out_of_memory_without_a_smaller_plan,
        memory_that_runs_short_in_one_process,
        a_loss_that_breaks_in_one_process,
    )
}

# What does not depend on how many there are, two show; four take their time on two cores.
BY_FOUR = (
    "what_one_says_all_hear",
    "gradients_are_the_sum_of_the_slices",
    "norms_over_all_pictures_equal_one_process",
)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    # Small nets have small gradients: as many messages as a large one.
    exchange.ALONE_BYTES, exchange.PACK_BYTES = 4096, 8192
    results: dict[str, str | None] = {}
    with join(Launch.of_environment(), "cpu", 120.0) as group:
        for name, check in CHECKS.items():
            if group.size > 2 and name not in BY_FOUR:
                continue
            words: str | None = None
            try:
                check(group)
            except Exception:
                words = traceback.format_exc()
            failed = [f"process {rank}: {one}" for rank, one in enumerate(group.gather(words)) if one is not None]
            results[name] = "\n".join(failed) or None
            if group.leads:
                out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
