"""What several processes must hold, checked in all at once: `torchrun … -m tests.distributed.checks OUT.json NAME…`.

One group of processes does all checks, because starting one takes longer than most of them. Rank 0 writes for each its
failure, or null; the tests read that.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.core.errors import PeerError, UsageError
from lowmem.distributed import reducer
from lowmem.distributed.group import Group, Split, even_shares, join
from lowmem.distributed.launch import Launch
from lowmem.distributed.reducer import Wait
from lowmem.runs.store import NullFolder
from lowmem.step.data_parallel import are_alike
from lowmem.train.loop import Trainer
from tests.distributed import small
from tests.distributed.troubles import (
    a_loss_that_breaks_in_one_process,
    memory_that_runs_short_in_one_process,
    no_room_to_evaluate_in_one_process,
    out_of_memory,
    out_of_memory_anywhere,
    out_of_memory_without_a_smaller_plan,
    simulated_memory_is_what_a_step_takes,
)

Check = Callable[[Group], None]


def _shares(group: Group) -> tuple[tuple[int, ...], ...]:
    """Even ones, and unlike ones; among four a process that has nothing."""
    unlike = (5, 7) if group.size == 2 else (0, 2, 3, 7)
    return even_shares(small.BATCH, group.size), unlike


def _step(t: Trainer, epoch: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients before the update, and the sums of losses and wrong predictions."""
    images, labels, size, _ = t.next_batch(epoch, step)
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
    plans = list(small.schedules().values())
    assert plans[-1].hosts
    for turn, shares in enumerate(_shares(group)):
        split = Split(shares, group.rank)
        plan = small.plan(plans[(turn + group.rank) % len(plans)], shares[group.rank], shares)
        for step in (0, 2):  # 2: the last, of three pictures
            ours, whole = (
                small.trainer(group, small.config(), data, split, plan),
                small.trainer(Group(), small.config(), data),
            )
            gradients, totals = _step(ours, 0, step)
            images, labels, size, _ = whole.next_batch(0, step)
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


def frozen_parts_are_left_alone(group: Group) -> None:
    """Whole stages at the beginning, norms in others: nothing of them is summed or moves, and with --sync-bn the rest
    is that of one process, to rounding."""
    data = small.dataset(pictures=2 * small.BATCH + 3)
    frozen = ("conv1", "bn1", "layer1", "layer2.0.bn1", "layer3.*.bn2", "layer2.1.conv2")
    for sync_bn, shares in product((False, True), _shares(group)):
        settings = small.config(sync_bn=sync_bn, freeze=frozen)
        ours = small.trainer(group, settings, data, Split(shares, group.rank), dtype=torch.float64)
        one = small.trainer(Group(), settings, data, dtype=torch.float64)
        # Without the counts of batches, of which one that has no pictures makes none.
        before = {name: one.clone() for name, one in ours.model.state_dict().items() if one.is_floating_point()}
        for step in range(3):
            gradients, _ = _step(ours, 0, step, torch.float64)
            expected, _ = _step(one, 0, step, torch.float64)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items() if sync_bn else ():
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10 * scale)
        assert are_alike(group, ours.model)
        stays = {name for name, tensor in before.items() if torch.equal(tensor, ours.model.state_dict()[name])}
        assert stays == {name for name in before if any(fnmatch(name, f"{pattern}*") for pattern in frozen)}


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
    start, done = group.start_total, run.lowmem.stage_done
    assert done is not None

    def start_total(tensor: Tensor) -> Wait:
        happened.append("sum")
        return start(tensor)

    def stage_done(index: int) -> None:
        happened.append(f"stage {index}")
        done(index)

    joint._reducer._start = start_total
    run.lowmem.stage_done = stage_done
    _step(t, 0, 0)
    messages = joint._reducer.messages
    assert happened.count("sum") == len(messages) + 1  # and the running statistics
    assert len(messages) > 5
    if group.rank == 0:
        assert happened.count("stage 0") == 6, "every micro-batch goes backward through all stages"
        before = happened[: len(happened) - happened[::-1].index("stage 0")].count("sum")
        assert before > len(messages) / 2
        last = len(happened) - happened[::-1].index(f"stage {len(run.lowmem.stages) - 1}")
        assert "sum" not in happened[: last - 1], "no sum before the last micro-batch"


def mixed_precision_channels_last_and_micro_batches(group: Group) -> None:
    """All at once, against autograd on the untouched model, slice by slice: the same bits for two processes."""
    data = small.dataset(pictures=2 * small.BATCH + 3)
    settings = small.config(micro_batch=2, precision="amp", memory_format="channels-last")
    split = Split(even_shares(small.BATCH, group.size), group.rank, (2,) * group.size)
    for step in (0, 2):
        ours = small.trainer(group, settings, data, split)
        gradients, totals = _step(ours, 0, step)
        summed: dict[str, Tensor] = {}
        sums = torch.zeros(2, dtype=torch.float64)
        for rank in range(group.size):
            alone = small.trainer(Group(), settings, data)
            images, labels, size, _ = alone.next_batch(0, step)
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


def weights_that_come_apart_are_seen(group: Group) -> None:
    t = small.trainer(group, small.config(), small.dataset())
    assert are_alike(group, t.model)
    with torch.no_grad():
        if group.rank == 1:
            next(t.model.parameters()).view(-1)[0].mul_(1 + 1e-6)
    assert not are_alike(group, t.model)
    t.execution = replace(t.execution, device="cuda")  # where it may be rounding
    t.keep_alike(NullFolder(Path("nowhere")))
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
    except UsageError:
        assert group.rank == group.size - 1
    except PeerError as error:
        assert (str(error), error.exit_code) == (f"process {group.size - 1}: mine alone", 2)  # noqa: PT017
    else:
        raise AssertionError("nobody heard of it")
    assert group.lead(lambda: 5, 0) == (5 if group.leads else 0)


def a_sum_is_the_callers_alone_when_it_is_there(group: Group) -> None:
    """No thread of the transport holds it any more, which would be memory, and an abort where the interpreter ends."""
    for _ in range(300):
        tensor = torch.ones(64)
        before = tensor._use_count()
        group.total(tensor)
        assert tensor._use_count() == before
        group.start_total(tensor)()
        assert tensor._use_count() == before
    assert torch.equal(tensor, torch.full((64,), float(group.size**2)))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        what_one_says_all_hear,
        an_error_of_one_is_everyones,
        a_sum_is_the_callers_alone_when_it_is_there,
        gradients_are_the_sum_of_the_slices,
        mixed_precision_channels_last_and_micro_batches,
        norms_over_all_pictures_equal_one_process,
        frozen_parts_are_left_alone,
        gradients_are_summed_once_and_during_the_backward_pass,
        weights_that_come_apart_are_seen,
        simulated_memory_is_what_a_step_takes,
        out_of_memory,
        out_of_memory_without_a_smaller_plan,
        memory_that_runs_short_in_one_process,
        a_loss_that_breaks_in_one_process,
        no_room_to_evaluate_in_one_process,
        out_of_memory_anywhere,
    )
}

SLOW = ("out_of_memory_anywhere",)

# What does not depend on how many there are, two show; four take their time on two cores.
BY_FOUR = (
    "what_one_says_all_hear",
    "gradients_are_the_sum_of_the_slices",
    "norms_over_all_pictures_equal_one_process",
    "frozen_parts_are_left_alone",
)


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    # Small nets have small gradients: as many messages as a large one.
    reducer.ALONE_BYTES, reducer.PACK_BYTES = 4096, 8192
    results: dict[str, str | None] = {}
    with join(Launch.of_environment(), "cpu", 120.0) as group:
        for name in names:
            words: str | None = None
            try:
                CHECKS[name](group)
            except Exception:
                words = traceback.format_exc()
            failed = [f"process {rank}: {one}" for rank, one in enumerate(group.gather(words)) if one is not None]
            results[name] = "\n".join(failed) or None
            if group.leads:
                out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
