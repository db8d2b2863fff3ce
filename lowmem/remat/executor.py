"""Runs a chain of stages forward and backward under a schedule.

One autograd function covers the whole chain, so that this file, and not a graph, decides when each activation dies.
Between forward and backward there is one entry per item of the schedule: the input of its first stage and what its
stage keeps; the output is held by the next entry, as its input. The gradient that travels down the chain is changed in
place where it is the executor's own: the caller's is not.

What the schedule lets wait in host memory leaves and comes back at the planned items (`lowmem.remat.host`).

Gradients of parameters are added to `.grad` directly, as soon as they are complete, unless somebody asks autograd for
some of them (`torch.autograd.grad`, `backward(inputs=…)`): then autograd is given all, and sees to the rest. Where the
schedule lets gradients wait in host memory, `.grad` is None meanwhile, and all are there when the backward is over; if
it was not None before, if a hook of the parameter may look at it, or other processes, it stays.

Known limitations: a hook of one module that looks at another's `.grad` in the middle of the backward may find None, if
the plan was made for gradients to wait (`lowmem.plan.hosting.HostTerms`); after an error so may everybody. A second
backward through the same output does not work; outputs have no second derivative.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem.plan.policy import Keep, Schedule, Segment
from lowmem.remat.elementwise import OutputActivation
from lowmem.remat.host import Traffic, grad_may_wait
from lowmem.remat.links import HostLink
from lowmem.remat.operation import PassState, Total
from lowmem.remat.stage import Box, Saved, Stage, StagePass


@dataclass
class Held:
    """What one item of the schedule holds. `x` None: the entry before dropped it and can restore it."""

    item: Keep | Segment
    x: Tensor | None
    saved: Saved


class Run:
    """One forward pass of the chain and the backward that belongs to it.

    `low`: what autocast casts to, or None. `total`: see `lowmem.remat.operation.Total`. `stage_done` is called with a
    stage's number as soon as its `backward` is over, once for every stage that a gradient reaches, from the last to the
    first, whatever the schedule: from then on this pass adds nothing to the `.grad` of its parameters (unless another
    stage has the same ones).
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        low: torch.dtype | None,
        input_needs_grad: bool,
        library_norm: bool = False,
        total: Total | None = None,
        stage_done: Callable[[int], None] | None = None,
        link: HostLink | None = None,
    ) -> None:
        self.stages = stages
        self.traffic = None if link is None else Traffic(link)
        self.stage_done = stage_done
        self.low = low
        wanted = torch.is_grad_enabled()
        needs = input_needs_grad and wanted
        self.state = PassState(low, library_norm, total, cast_once=torch.is_autocast_cache_enabled())
        self.memos: list[StagePass] = []
        self.active: list[bool] = []  # per stage: does it take part in the backward
        self.parameters: list[Tensor] = []  # one for each use
        for stage in stages:
            owned = [tuple(operation.parameters()) for operation in stage.operations]
            trains = tuple(wanted and any(one.requires_grad for one in mine) for mine in owned)
            self.parameters += (one for mine in owned for one in mine)
            self.memos.append(StagePass(self.state, needs, trains))
            needs = needs or any(trains)
            self.active.append(needs)
        self.entries: list[Held] = []
        self.output: Tensor | None = None
        self.trained: list[Tensor] = []
        self._without_grad: set[int] = set()  # parameters, by identity, as the backward began
        self._owned = False  # whether the gradient that travels down the chain may be written into
        self._versions: list[tuple[Tensor, int]] = []

    def execute(self, schedule: Schedule, x: Tensor) -> Tensor:
        """The chain's output for x, [N, ...]; differentiable if gradients are enabled and anything wants one."""
        if self.active[-1]:
            anchor = torch.empty(0, device=x.device, requires_grad=True)
            self.trained = list({id(one): one for one in self.parameters if one.requires_grad}.values())
            return _Chain.apply(anchor, x, self, schedule, *self.trained)
        with torch.no_grad(), _autocast_off(x, self.low):
            return self.fast([x], 0, len(self.stages) - 1)

    def fast(self, box: Box, start: int, end: int) -> Tensor:
        """Stages start..end, saving nothing."""
        for index in range(start, end + 1):
            y, _ = self.stages[index].forward(box, None, self.memos[index])
            assert y is not None
            box.append(y)
            del y
        return box.pop()

    def forward(
        self, schedule: Schedule, box: Box, *, want_output: bool = True, depth: int = 0
    ) -> tuple[Tensor | None, list[Held]]:
        """The tensor in the box -> output and entries; without `want_output` the last computes what it keeps."""
        entries: list[Held] = []
        dropped = False
        for item in schedule.items:
            if not self.active[item.end]:
                box.append(self.fast(box, item.start, item.end))
                continue
            last = item.end == schedule.end and not want_output
            entry = Held(item, None if dropped else box[0], [])
            y: Tensor | None
            if isinstance(item, Segment):
                y = None if last else self.fast(box, item.start, item.end)
            else:
                y, entry.saved = self.stages[item.stage].forward(box, item.policy, self.memos[item.stage], not last)
            entries.append(entry)
            if self.traffic is not None and depth == 0:
                self.traffic.ran(item.end, item.host, entry, self._movable(item), y)
            dropped = isinstance(item, Keep) and item.policy.drop_output
            box.clear()
            if y is not None:
                box.append(y)
            del y
        return (box.pop() if box else None), entries

    def backward(self, entries: list[Held], grad: Box) -> Tensor | None:
        """The gradient of the chain's input, or None if it is not asked for; empties `entries`."""
        while entries:
            if self.traffic is not None:
                self.traffic.reaches(entries[-1].item.end, entries[-1])
            x = self._input(entries)
            entry = entries.pop()
            start = entry.item.start
            hosts = entry.item.host
            if isinstance(entry.item, Segment):
                _, inner = self.forward(entry.item.inner, [x], want_output=False, depth=1)
                grad_x = self.backward(inner, grad)
            else:
                stage = self.stages[start]
                memo, policy = self.memos[start], entry.item.policy
                grad_x, self._owned = stage.backward(grad, entry.saved, x, policy, memo, self._owned)
                if self.stage_done is not None:
                    self.stage_done(start)
                if grad_x is not None and start > 0 and (tail := self.stages[start - 1].tail) is not None:
                    grad_x = self.mask(tail, grad_x, x)
            if hosts and self.traffic is not None:
                self.traffic.completed(hosts, self._grads_alone(start, entry.item.end))
            del x, entry
            if grad_x is None:
                return None
            grad.append(grad_x)
            del grad_x
        return grad.pop()

    def _grads_alone(self, start: int, end: int) -> Iterator[Tensor]:
        """Parameters of stages start..end whose gradients are complete, and looked at by nobody before the backward is
        over: there were none, no other use adds to them, and neither a hook nor other processes want them."""
        if self.state.asked or self.stage_done is not None:
            return
        for stage in self.stages[start : end + 1]:
            for one in stage.parameters():
                if id(one) in self._without_grad and id(one) not in self.state.uses and grad_may_wait(one):
                    yield one

    def _movable(self, item: Keep | Segment) -> dict[str, int]:
        if not item.host or isinstance(item, Segment):
            return {}
        return self.stages[item.stage].movable(item.policy, self.memos[item.stage])

    def mask(self, tail: OutputActivation, grad: Tensor, output: Tensor) -> Tensor:
        """The gradient before a stage's last activation; from then on it is a tensor of its own."""
        owned, self._owned = self._owned, True
        return tail.mask(grad, output, owned)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """After an error nothing moves any more: memory that copies write to or read from is about to be others'."""
        try:
            yield
        except BaseException:
            if self.traffic is not None:
                self.traffic.link.drain()  # with what had just begun, and is not in the traffic yet
                self.traffic.abandon()
            raise

    def note_versions(self, x: Tensor) -> None:
        """Of what the backward reads and others may change meanwhile: the input, the parameters, and the output if
        the backward begins with it."""
        self._versions = [(one, one._version) for one in (*self.parameters, x, self.output) if one is not None]
        uses = Counter([id(one) for one in self.parameters if one.requires_grad])
        self.state.uses = {key: count for key, count in uses.items() if count > 1}

    def check_versions(self) -> None:
        """Raises RuntimeError, as autograd does, if anything of it has changed."""
        now = [parameter for stage in self.stages for parameter in stage.parameters()]
        noted = [tensor for tensor, _ in self._versions]
        if any(one is not other for one, other in zip(now, noted, strict=False)):
            raise RuntimeError(
                "a parameter was replaced by another between forward and backward (torch.func.functional_call does so "
                "at its end), but the backward reads parameters again: leave them until it is over"
            )
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {list(tensor.shape)} that the backward needs (a parameter, the input or the "
                    "output) was changed in place after the forward: change it before the forward or after the backward"
                )
        self._versions.clear()

    def _input(self, entries: list[Held]) -> Tensor:
        """Of the last entry's first stage, restored if it was dropped."""
        entry = entries[-1]
        if entry.x is None:
            before = entries[-2]
            at = before.item.end
            assert isinstance(before.item, Keep)
            stage, policy, memo = self.stages[at], before.item.policy, self.memos[at]
            if self.traffic is not None:
                self.traffic.bring(before)
            x = self._input(entries[:-1]) if stage.restore_reads_input(policy, memo) else None
            entry.x = stage.restore(before.saved, x, policy, memo)
        return entry.x


class _Chain(torch.autograd.Function):
    """Anchor, input, parameters -> output. The anchor, empty, is a leaf that nobody asks for: autograd comes to it if
    it goes to all leaves, as `backward()` does."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, run: Run, schedule: Schedule, *trained: Tensor) -> Tensor:
        with _autocast_off(x, run.low), run.moving():
            y, run.entries = run.forward(schedule, [x])
        assert y is not None
        if run.stages[-1].tail is not None:
            run.output = y.detach()  # an alias: the output itself refers to this run
        run.note_versions(x)
        ctx.run = run
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: Run | None = ctx.run
        ctx.run = None
        if run is None:
            raise RuntimeError("this output went backward already: its activations were freed; run forward again")
        run.check_versions()
        run._without_grad = {id(one) for one in run.trained if one.grad is None}
        run.state.asked = not torch._C._will_engine_execute_node(ctx.next_functions[0][0])
        tail = run.stages[-1].tail
        if run.output is not None and tail is not None:  # the caller's gradient is not ours to change
            grad, run.output = run.mask(tail, grad, run.output), None
        box = [grad]
        with _autocast_off(grad, run.low), run.moving():
            del grad
            grad_x = run.backward(run.entries, box)
            if run.traffic is not None:
                run.traffic.finish()
            run.state.finish()
            return None, grad_x, None, None, *(run.state.returned.pop(id(one), None) for one in run.trained)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to, or None."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _autocast_off(x: Tensor, low: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if low is None else torch.autocast(x.device.type, enabled=False)
