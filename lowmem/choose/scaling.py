"""What a step would take on several processes, each with its part of the batch and its own card: on paper.

Everything is predicted from parts that exist for one process: the plan for the local batch under that card's budget
(without accumulation), the cost model's backward (`lowmem.plan.ready`), the messages and their ring
(`lowmem.plan.exchange`, with what that does not see). A smaller local batch often needs no recomputation, which counts
into the speedup: `Scaled.overhead` against `Scaled.alone_overhead` shows how much.

Batch norm takes its statistics from the local batch, without communication, so that n processes do not compute quite
what one does with the whole batch.

Known limitations: seconds by a roofline fall in proportion to the batch, although kernels of a small local batch fill a
large card badly; the communication library's own buffers on the card are assumed (`choose.budget`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from lowmem.choose.budget import with_communicators
from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request
from lowmem.errors import Infeasible, UsageError
from lowmem.plan.exchange import Exchange, Link, Message, exchange, pack
from lowmem.plan.ready import ready
from lowmem.plan.record import Plan
from lowmem.remat import decompose

_GRADIENT_BYTES = 4  # fp32, under AMP too


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A step on `processes` processes; all of it predicted. `plan` is for `local_batch`, the largest part of the batch
    that a process gets, and for what summing gradients takes of memory. `alone_*`: of one process on the same card with
    the whole batch, None if that does not fit."""

    processes: int
    batch: int
    local_batch: int
    link: Link | None
    plan: Plan
    exchange: Exchange
    step_seconds: float
    alone_step_seconds: float | None
    alone_overhead: float | None

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step_seconds

    @property
    def overhead(self) -> float | None:
        """Of the local plan over plain autograd at the local batch, as a share; without the exchange."""
        return self.plan.predicted.overhead

    @property
    def speedup(self) -> float | None:
        """Over one process with the whole batch; None if that does not fit."""
        return None if self.alone_step_seconds is None else self.alone_step_seconds / self.step_seconds

    @property
    def exposed_share(self) -> float:
        """Of the step, what is spent waiting for the exchange."""
        return self.exchange.exposed_seconds / self.step_seconds

    @property
    def peak_allocated_bytes(self) -> int | None:
        """Of each process, what is packed for the sums included."""
        return self.plan.predicted.peak_allocated_bytes


class Scaling:
    """One network, batch and card, on any number of processes and any link; plans are made once a local batch.

    Raises UsageError if the request asks for accumulation.
    """

    def __init__(self, request: Request) -> None:
        if request.micro_batch is not None and request.micro_batch < request.batch:
            raise UsageError(
                f"--micro-batch {request.micro_batch} accumulates up to the batch of {request.batch}, which no "
                "prediction for several processes covers: leave it out"
            )
        self.request = replace(request, allow_accumulation=False, micro_batch=None)
        self.messages = messages_of(request.model)
        self._choices: dict[tuple[int, bool], Choice] = {}

    def predict(self, processes: int, link: Link | None) -> Scaled:
        """The link may be None for one process only. Raises UsageError for more processes than pictures, Infeasible if
        a process's part of the batch does not fit its card."""
        batch = self.request.batch
        if not 1 <= processes <= batch:
            raise UsageError(f"a batch of {batch} pictures can go to 1 to {batch} processes, not to {processes}")
        if link is None and processes > 1:
            raise UsageError(f"{processes} processes need a link between them")
        local = -(-batch // processes)
        choice = self._choice(local, joint=processes > 1)
        exchanged = self._exchange(choice, processes, link)
        alone = self._alone
        return Scaled(
            processes=processes,
            batch=batch,
            local_batch=local,
            link=link,
            plan=choice.plan,
            exchange=exchanged,
            step_seconds=_seconds(choice) + exchanged.exposed_seconds,
            alone_step_seconds=None if alone is None else _seconds(alone),
            alone_overhead=None if alone is None else alone.plan.predicted.overhead,
        )

    def break_even(self, processes: int, latency_seconds: float, speedup: float = 1.0) -> float | None:
        """The least bandwidth, in bytes per second, with which as many processes are `speedup` times as fast as one;
        None if no bandwidth is enough, or one process does not fit. Raises as `predict` does."""

        def enough(bytes_per_second: float) -> bool:
            link = Link(name="searched", bytes_per_second=bytes_per_second, latency_seconds=latency_seconds)
            reached = self.predict(processes, link).speedup
            return reached is not None and reached >= speedup

        return least(enough)

    def _exchange(self, choice: Choice, processes: int, link: Link | None) -> Exchange:
        if link is None:
            return Exchange(messages=0, size_bytes=0, communication_seconds=0.0, exposed_seconds=0.0)
        return exchange(self.messages, ready(choice.plan.schedule, choice.chain).ends, link, processes)

    @cached_property
    def _alone(self) -> Choice | None:
        try:
            return self._choice(self.request.batch, joint=False)
        except Infeasible:
            return None

    def _choice(self, batch: int, *, joint: bool) -> Choice:
        """The plan for a batch on one card, of one process among several or alone."""
        key = (batch, joint)
        if key not in self._choices:
            budget = with_communicators(self.request.budget) if joint else self.request.budget
            self._choices[key] = choose(replace(self.request, batch=batch, joint=joint, budget=budget))
        return self._choices[key]


def messages_of(model: nn.Module) -> tuple[Message, ...]:
    """What the processes sum in a step of the model (any device, `meta` included), in order."""
    gradients = [
        [parameter.numel() * _GRADIENT_BYTES for parameter in stage.parameters() if parameter.requires_grad]
        for stage in decompose(model)
    ]
    statistics = [buffer.numel() * buffer.element_size() for buffer in model.buffers() if buffer.is_floating_point()]
    return pack(gradients, statistics)


def least(enough: Callable[[float], bool], low: float = 1e3, high: float = 1e13, digits: float = 1e-4) -> float | None:
    """The least value between `low` and `high` that is enough, where everything above an enough one is; to a relative
    precision of `digits`. None if not even `high` is."""
    if not enough(high):
        return None
    while high > low * (1 + digits):
        middle = (low * high) ** 0.5
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _seconds(choice: Choice) -> float:
    seconds = choice.plan.predicted.step_seconds
    assert seconds is not None
    return seconds
