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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.units import MIB

ALONE_BYTES = 1 * MIB  # a gradient of this size is summed in place, without a copy
PACK_BYTES = 4 * MIB

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


@dataclass(frozen=True)
class Parcel:
    """What goes as one message: places in the order of completion. Several, and a small one alone, are `packed`."""

    places: tuple[int, ...]
    packed: bool


def arrange(sizes_bytes: Sequence[int]) -> tuple[Parcel, ...]:
    """The gradients, in the order in which they are complete -> messages, in the order in which they are sent: a pack
    once its last part is there, a large gradient at once, also between the parts of a pack."""
    parcels: list[Parcel] = []
    pack: list[int] = []
    filled = 0

    def close() -> None:
        if pack:
            parcels.append(Parcel(tuple(pack), packed=True))
            pack.clear()

    for place, size in enumerate(sizes_bytes):
        if size >= ALONE_BYTES:
            parcels.append(Parcel((place,), packed=False))
            continue
        if filled + size > PACK_BYTES:
            close()
        filled = size + (filled if pack else 0)
        pack.append(place)
    close()
    return tuple(sorted(parcels, key=lambda parcel: parcel.places[-1]))


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
