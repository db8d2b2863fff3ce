"""The processes of a run, as every one of them sees the others (the base class is one process alone), and which
pictures of the effective batch each takes: its slice, in the order of the ranks (invariant 3).

Tensors of the network go over the device's own backend (NCCL on CUDA, gloo on the CPU), everything that is said beside
them, a few numbers or a line of JSON, over gloo: it waits for nothing on the device. Nothing is pickled.

Every process calls the same methods in the same order. What fails on one alone is known to all at the next point where
they meet (`together`, `lead`, `most`); a process that is gone is known by its connection, and raises PeerLost.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.core.errors import ExitCode, LowmemError, PeerError, PeerLost, UsageError
from lowmem.distributed.launch import Launch
from lowmem.distributed.reducer import Wait
from lowmem.measure.out_of_memory import classify

T = TypeVar("T")

_MEETING_PAUSE_SECONDS = 0.02
_PATIENCE = 6  # times the timeout
_LETTING_GO_SECONDS = 10.0  # takes microseconds, on a busy machine some milliseconds


# -- the batch ---------------------------------------------------------------------------------------------------------


def even_shares(batch: int, size: int) -> tuple[int, ...]:
    """`batch` pictures for `size` like processes; what does not divide goes to the first."""
    return tuple(batch // size + (rank < batch % size) for rank in range(size))


def weighted_shares(batch: int, speeds: tuple[float, ...]) -> tuple[int, ...]:
    """In proportion to `speeds` (pictures per second, or any weights; not all 0), by largest remainders; exactly
    even where all are equal."""
    total = sum(speeds)
    exact = [batch * speed / total for speed in speeds]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(speeds)), key=lambda rank: (shares[rank] - exact[rank], rank))
    for rank in by_remainder[: batch - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)


@dataclass(frozen=True)
class Split:
    """The effective batch is the sum of `shares`, one for each process; a share may be 0. `micro_batches`: how many
    pictures each takes at a time, by default its share."""

    shares: tuple[int, ...]
    rank: int = 0
    micro_batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.micro_batches:
            object.__setattr__(self, "micro_batches", self.shares)
        if len(self.micro_batches) != len(self.shares) or not 0 <= self.rank < len(self.shares) or self.batch < 1:
            raise ValueError(f"shares {self.shares}, micro-batches {self.micro_batches}, rank {self.rank}: no split")

    @property
    def batch(self) -> int:
        return sum(self.shares)

    def part(self, size: int, rank: int | None = None) -> tuple[int, int]:
        """The slice [first, past) of `size` pictures that a process takes, this one by default: its share of a whole
        batch, and of a smaller one (the last of an epoch, the test pictures) as nearly as can be."""
        rank = self.rank if rank is None else rank
        ends = (0, *accumulate(self.shares))
        first, past = ((2 * size * end + self.batch) // (2 * self.batch) for end in ends[rank : rank + 2])  # rounded
        return first, past

    def pieces(self, size: int) -> int:
        """Micro-batches that the process with the most of them makes of its part of `size` pictures."""
        parts = (self.part(size, rank) for rank in range(len(self.shares)))
        return max(-(-(past - first) // max(1, m)) for (first, past), m in zip(parts, self.micro_batches, strict=True))


# -- the processes -----------------------------------------------------------------------------------------------------


class Group:
    """One process that trains alone: everything it would say to others it says to itself."""

    rank = 0
    local_rank = 0  # on this machine
    size = 1
    restarts = 0
    alone = True

    @property
    def leads(self) -> bool:
        """Whether this process talks to the user and writes the run's files."""
        return self.rank == 0

    def most(self, values: Sequence[int]) -> list[int]:
        """The greatest of every process's values, one by one."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (JSON), in the order of the ranks."""
        return [value]

    def share(self, value: Any) -> Any:
        """The value (JSON) that rank 0 gives; what others give is ignored."""
        return self.gather(value if self.leads else None)[0]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, in host memory; others give None."""
        assert tensors is not None
        return dict(tensors)

    def total(self, tensor: Tensor) -> None:
        """Sums a contiguous tensor over the processes, in place."""

    def start_total(self, tensor: Tensor) -> Wait:
        """Begins to."""
        return lambda: None

    def together(self, work: Callable[[], T]) -> T:
        """Does `work` in every process. If it fails in any it fails in all: in the first of them with its own error,
        in the others with that as PeerError."""
        return work()

    def lead(self, work: Callable[[], T], default: T) -> T:
        """Does `work` in rank 0 only, whose error is everyone's; the others have `default`."""
        return self.together(work if self.leads else lambda: default)

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Around what all processes decide alike: they fail together. Rank 0 says it, the others raise PeerError."""
        try:
            yield
        except (PeerLost, PeerError):
            raise
        except LowmemError as error:
            if self.leads:
                raise
            raise PeerError(0, str(error), error.exit_code) from error


class _Processes(Group):
    """Several. `small` and `norms` are groups of the same processes with connections of their own, so that what is said
    at the same time in two of them is not mistaken."""

    alone = False

    def __init__(self, launch: Launch, timeout: timedelta) -> None:
        self.rank, self.local_rank = launch.rank, launch.local_rank
        self.size, self.restarts = launch.size, launch.restarts
        with _peers():
            # Where processes wait for one that reads pictures or saves; one that is dead is known by its connection.
            self._small: Any = dist.new_group(backend="gloo", timeout=_PATIENCE * timeout)
            self._norms: Any = dist.new_group(timeout=timeout)

    def most(self, values: Sequence[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        with _exchange(tensor):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self._small)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        (longest,) = self.most([len(text)])
        mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)  # blanks after JSON mean nothing
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        with _exchange(mine, *everyones):
            dist.all_gather(everyones, mine, self._small)
        return [json.loads(bytes(each.tolist())) for each in everyones]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        known = tensors or {}
        table = [[name, list(one.shape), str(one.dtype).removeprefix("torch.")] for name, one in known.items()]
        received: dict[str, Tensor] = {}
        for name, shape, dtype in self.share(table):
            tensor = known[name] if self.leads else torch.empty(shape, dtype=getattr(torch, dtype))
            with _exchange(tensor):
                dist.broadcast(tensor, 0, self._small)
            received[name] = tensor
        return received

    def total(self, tensor: Tensor) -> None:
        with _exchange(tensor):
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self._norms)

    def start_total(self, tensor: Tensor) -> Wait:
        held = _Held(tensor)
        with _peers():
            works = [dist.all_reduce(tensor, dist.ReduceOp.SUM, async_op=True)]

        def wait() -> None:
            with _peers():
                works.pop().wait()
            held.until_let_go()

        return wait

    def together(self, work: Callable[[], T]) -> T:
        failure: Exception | None = None
        words, result = None, cast(T, None)
        try:
            result = work()
        except PeerLost:
            raise
        except Exception as error:
            failure, words = error, [str(error) or type(error).__name__, int(getattr(error, "exit_code", ExitCode.BUG))]
        failures = self.gather(words)
        first = next((rank for rank, one in enumerate(failures) if one is not None), None)
        if first is None:
            return result
        if failure is None or self.rank != first:
            raise PeerError(first, *failures[first]) from failure
        raise failure


class _Held:
    """Tensors that go into a collective. gloo wakes who waits for it before its own threads let go of them: memory that
    is taken for longer than it is used, and a thread that does so while the interpreter ends takes the process down."""

    def __init__(self, *tensors: Tensor) -> None:
        on_host: list[Any] = [tensor for tensor in tensors if not tensor.is_cuda]
        self._before = [(tensor, tensor._use_count()) for tensor in on_host]

    def until_let_go(self) -> None:
        until = time.monotonic() + _LETTING_GO_SECONDS
        while any(tensor._use_count() > count for tensor, count in self._before) and time.monotonic() < until:
            time.sleep(0)  # they need the interpreter's lock


@contextmanager
def _exchange(*tensors: Tensor) -> Iterator[None]:
    """Around a collective that is waited for: over when these are the caller's alone."""
    held = _Held(*tensors)
    with _peers():
        yield
    held.until_let_go()


@contextmanager
def _peers() -> Iterator[None]:
    """What the library says of a connection that broke or was waited for too long."""
    try:
        yield
    except RuntimeError as error:  # all of torch.distributed's own are
        if classify(error, "reduction") is not None:  # NCCL's buffers, say: this process's own trouble
            raise
        message = str(error).splitlines()[0].partition(". ")[0][:200]
        late = ", or raise train.peer_timeout_minutes if it only needs longer" if "imed out" in message else ""
        raise PeerLost(
            f"another process of the run is gone or does not answer ({message}): see what it said{late}"
        ) from None


def meet(store: dist.Store, launch: Launch, timeout: timedelta) -> dist.Store:
    """A part of the store that only this start of the processes uses: torchrun keeps its store when it starts them
    again, and with it the addresses of those that are dead. So every process asks under a name that was never used, and
    rank 0 answers it with the name of what is common. Raises RuntimeError if somebody does not come."""
    if launch.rank > 0:
        mine = uuid.uuid4().hex
        store.set(f"lowmem/hello/{launch.rank}", mine)
        store.wait([f"lowmem/welcome/{mine}"], timeout)
        common = store.get(f"lowmem/welcome/{mine}").decode()
        store.set(f"lowmem/{common}/{launch.rank}", "")
        return dist.PrefixStore(f"lowmem/{common}", store)
    common, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, launch.size))
    while missing:
        for rank in list(missing):
            if store.check([f"lowmem/{common}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"lowmem/hello/{rank}"]):  # perhaps of a process that is dead: then it is asked again
                store.set(f"lowmem/welcome/{store.get(f'lowmem/hello/{rank}').decode()}", common)
        if time.monotonic() > until:
            raise RuntimeError(f"process {min(missing)} did not come within {timeout.total_seconds():g} s")
        time.sleep(_MEETING_PAUSE_SECONDS)
    return dist.PrefixStore(f"lowmem/{common}", store)


@contextmanager
def join(launch: Launch | None, device: str, timeout_seconds: float) -> Iterator[Group]:
    """The group that this process belongs to. `timeout_seconds`: after which a process that does not answer is given
    up. Raises PeerLost if the others do not come."""
    launch = launch or Launch(rank=0, size=1, local_rank=0)
    if launch.size == 1:
        alone = Group()
        alone.restarts = launch.restarts
        yield alone
        return
    if dist.is_initialized():
        raise UsageError("this process is in a process group already: a run makes its own, in a process of its own")
    timeout = timedelta(seconds=timeout_seconds)
    # Its buffers are memory of the card, for each channel; PCIe is full with two. The planner reckons with this.
    os.environ.setdefault("NCCL_MAX_NCHANNELS", "4")
    with _peers():
        store = meet(next(dist.rendezvous("env://", timeout=timeout))[0], launch, timeout)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
    # Not after an error: it would wait for sums that nobody answers any more. `leave` ends such a process.
    yield _Processes(launch, timeout)
    with suppress(RuntimeError):  # the others may have left
        dist.destroy_process_group()
