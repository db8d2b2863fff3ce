"""What it takes to sum gradients over several processes, and how much of it the backward hides: on paper.

**Messages.** The backward finishes stages from the last to the first. When one is done, each of its parameters with at
least `ALONE_BYTES` of gradient is a message of its own; smaller ones are packed, in that order, into messages of at
most `PACK_BYTES`. The batch norms' running statistics go last. Messages go one after the other while the backward goes
on; the update waits for the last.

**Time of a message.** A ring all-reduce of m bytes over n processes takes 2(n-1) steps, in each of which every process
sends m/n bytes and receives as many at the same time:

    2 (n-1)/n * m / bandwidth + 2 (n-1) * latency

(Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005; Patarasuk, Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). The first factor is the one by which
`nccl-tests` turns what it measures into "busbw" (doc/PERFORMANCE.md there), so that its figures are this bandwidth.

**Attainable rates**, as sources have them:

- PCIe: NCCL reckons with 12 GB/s of the 15.76 of a 3.0 x16 slot (PCI_BW in src/graph/topo.h), 76 %, and in proportion
  for other slots. Measured busbw: 11.3 GB/s for two Titan X (Maxwell) at 3.0 x16 behind a switch, 8.2 through the
  processor, about half of the first for two at x8 on a desktop (NVIDIA/nccl issue 44).
- Cards without peer-to-peer (the RTX 2080 Ti, NVIDIA/nccl-tests issue 117, and GeForce since) exchange through pinned
  memory of the host (NCCL's SHM transport): a card's link carries the same bytes, one way out and one way in, and cards
  on common lanes divide them. 4.9 GB/s were measured for four cards on PCIe (NVIDIA/nccl issue 445).
- Between two processors of a host NCCL reckons with 10 GB/s (SKL_QPI_BW there).
- Latency over PCIe: NCCL reckons with 8.4 us + 5.7 us a step (src/graph/tuning.cc, ring, simple), 20 us for two cards;
  measured are 26 us for two (ROCm/rccl issue 362) and 42 us for eight (NVIDIA/nccl issue 1530).
- TCP over Ethernet: 1,448 of 1,538 bytes on the wire are payload (MTU 1,500, with time stamps), 94 %. Measured are 9.3
  Gbit/s of 10, and 60 to 80 us for a round trip (tensorflow/benchmarks issue 29). The latency on 1 Gbit/s is assumed to
  be twice that on 10; with some hundred messages of megabytes it has no weight.

Known limitations: the messages take nothing from the backward (in truth the library's kernels use the card's memory and
a part of its multiprocessors, and over TCP the host's processor); all processes are equally fast; no start-up of a step
is counted. gloo, the only library for this on Windows, copies to the host first and sums there: it is slower than this.
Four GTX 1080 Ti in two machines on 1 Gbit/s were reported ten times slower than two in one (horovod issue 752); this
model gives seven to eight for ResNet-50 in batches of 32.

**When gradients are there**: a schedule's backward, stage by stage, in seconds. The walk is `evaluate`'s own, in the
order of the executor: what a segment computes again, forward and backward, and what is restored, delays every stage
before it in the chain.

**A step on several processes**, each with its part of the batch and its own card. Everything is predicted from parts
that exist for one process: the plan for the local batch under that card's budget (without accumulation), the cost
model's backward, the messages and their ring. A smaller local batch often needs no recomputation, which counts into the
speedup: `Scaled.overhead` against `Scaled.alone_overhead` shows how much.

Batch norm takes its statistics from the local batch, without communication, so that n processes do not compute quite
what one does with the whole batch.

Known limitations: seconds by a roofline fall in proportion to the batch, although kernels of a small local batch fill a
large card badly; the communication library's own buffers on the card are assumed (`choose.request`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from lowmem.choose.planning import choose
from lowmem.choose.request import Choice, Request, with_communicators
from lowmem.core.errors import Infeasible, UsageError
from lowmem.distributed.reducer import arrange
from lowmem.plan.cost import ChainCost, OptionCost
from lowmem.plan.evaluate import Walk
from lowmem.plan.policy import Item, Keep, Schedule
from lowmem.plan.record import Plan
from lowmem.remat import decompose

PCIE_SHARE = 0.76
PCIE_LATENCY_SECONDS = 10e-6
HOST_LANES = 16  # that a desktop's processor has for cards
SOCKETS_BYTES_PER_SECOND = 10e9
_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one process has to its neighbour in the ring: attainable bytes per second in each direction, both at the
    same time, and seconds before the first byte of a step arrives. Raises ValueError for anything that is no link."""

    name: str
    bytes_per_second: float
    latency_seconds: float

    def __post_init__(self) -> None:
        if not (self.bytes_per_second > 0 and 0 <= self.latency_seconds < float("inf")):
            raise ValueError(f"{self.name}: a link has a bandwidth above 0 and a latency of 0 or more")

    def all_reduce_seconds(self, size_bytes: int, processes: int) -> float:
        """A ring all-reduce of as many bytes on each process; 0 for one process."""
        steps = 2 * (processes - 1)
        return steps / processes * size_bytes / self.bytes_per_second + steps * self.latency_seconds


ETHERNET_1G = Link(name="1 Gbit/s Ethernet", bytes_per_second=0.94e9 / _BITS, latency_seconds=80e-6)
ETHERNET_10G = Link(name="10 Gbit/s Ethernet", bytes_per_second=9.3e9 / _BITS, latency_seconds=40e-6)


def desktop_link(lane_bytes_per_second: float, card_lanes: int, cards: int) -> Link:
    """Cards on one host that share `HOST_LANES` lanes to its processor, through its memory: each gets its part of them,
    if it has as many itself. `lane_bytes_per_second`: in one direction, by the standard."""
    lanes = min(card_lanes, HOST_LANES / cards)
    return Link(
        name=f"PCIe, {cards} cards on {HOST_LANES} lanes",
        bytes_per_second=PCIE_SHARE * lanes * lane_bytes_per_second,
        latency_seconds=PCIE_LATENCY_SECONDS,
    )


def server_link(lane_bytes_per_second: float, card_lanes: int, cards: int) -> Link:
    """Cards on a host of two processors with all their lanes each; the ring crosses from one processor to the other,
    once in each direction."""
    return Link(
        name=f"PCIe, {cards} cards with {card_lanes} lanes each",
        bytes_per_second=min(PCIE_SHARE * card_lanes * lane_bytes_per_second, SOCKETS_BYTES_PER_SECOND),
        latency_seconds=PCIE_LATENCY_SECONDS,
    )


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is summed at once. `stage`: after whose backward it can go. `packed`: copied together, not in place."""

    stage: int
    size_bytes: int
    packed: bool


def pack(gradients: Sequence[Sequence[int]], statistics: Sequence[int] = ()) -> tuple[Message, ...]:
    """The messages of a step, in the order in which they go.

    `gradients`: bytes of each parameter's gradient, per stage, in forward order. `statistics`: bytes of the batch
    norms' running statistics, which go last.
    """
    ordered = [(stage, size) for stage in reversed(range(len(gradients))) for size in gradients[stage]]
    messages = [
        Message(
            stage=ordered[parcel.places[-1]][0],
            size_bytes=sum(ordered[place][1] for place in parcel.places),
            packed=parcel.packed,
        )
        for parcel in arrange([size for _, size in ordered])
    ]
    if statistics:
        messages.append(Message(stage=0, size_bytes=sum(statistics), packed=True))
    return tuple(messages)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """`communication_seconds`: of all messages, one after the other. `exposed_seconds`: from the end of the backward to
    that of the last message, by which the step gets longer."""

    messages: int
    size_bytes: int
    communication_seconds: float
    exposed_seconds: float

    @property
    def exposed_share(self) -> float:
        """Of the communication, what the backward does not hide; 0 where there is none."""
        return self.exposed_seconds / self.communication_seconds if self.communication_seconds else 0.0


def exchange(messages: Sequence[Message], ends: Sequence[float], link: Link, processes: int) -> Exchange:
    """The timeline of a step's messages, which go in their order. `ends`: per stage, the seconds into the backward at
    which its gradients are there (`Ready.ends`); the latest is the backward's own end.

    Raises ValueError for fewer than one process.
    """
    if processes < 1:
        raise ValueError(f"{processes} is not a number of processes")
    if processes == 1:
        return Exchange(messages=0, size_bytes=0, communication_seconds=0.0, exposed_seconds=0.0)
    over = busy = 0.0
    for message in messages:
        seconds = link.all_reduce_seconds(message.size_bytes, processes)
        over = max(over, ends[message.stage]) + seconds
        busy += seconds
    return Exchange(
        messages=len(messages),
        size_bytes=sum(message.size_bytes for message in messages),
        communication_seconds=busy,
        exposed_seconds=max(0.0, over - max(ends)),
    )


# -- when gradients are there --


@dataclass(frozen=True, kw_only=True)
class Ready:
    """`forward_seconds`: before the backward begins. `ends`: per stage, in forward order, the seconds from the
    beginning of the backward to the end of that stage's, when its parameters' gradients are complete. They fall from
    the first stage, with which the backward is over, to the last."""

    forward_seconds: float
    ends: tuple[float, ...]

    @property
    def backward_seconds(self) -> float:
        return self.ends[0]

    @property
    def seconds(self) -> float:
        """Forward and backward, as `Evaluation.seconds`."""
        return self.forward_seconds + self.backward_seconds


def ready(schedule: Schedule, chain: ChainCost) -> Ready:
    """Of a step under the cost model. Raises ValueError if it is not a schedule of this chain, KeyError if a stage has
    not got the policy."""
    schedule.check_covers(len(chain))
    walk = _Timed(chain)
    walk.items(schedule.items)
    ends = tuple(walk.ended[stage] - walk.forward_seconds for stage in range(len(chain)))
    return Ready(forward_seconds=walk.forward_seconds, ends=ends)


class _Timed(Walk):
    """`ended`: per stage, `seconds` when its backward is done. `forward_seconds`: before the first backward, and before
    anything is restored for it."""

    def __init__(self, chain: ChainCost) -> None:
        super().__init__(chain)
        self.forward_seconds = 0.0
        self.ended: dict[int, float] = {}
        self._backwards = False

    def forward(self, item: Item, free_input: bool, last: bool) -> OptionCost | None:
        dropping = super().forward(item, free_input, last)
        if not self._backwards:
            self.forward_seconds = self.seconds
        return dropping

    def backward(self, item: Item, last: bool) -> None:
        self._backwards = True
        super().backward(item, last)
        if isinstance(item, Keep):
            self.ended[item.stage] = self.seconds


# -- a step on several processes --

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
