"""What a stage keeps between forward and backward (`BlockPolicy`), and in which order a chain of stages is run
(`Schedule`): plain values that the solver makes, the executor (`lowmem.remat`) obeys and the run folder stores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, TypeAlias

_NAME = re.compile(r"(?P<kind>[A-Z_]+)(?:\{(?P<kept>[^{}]*)\})?(?P<drop>-out)?")
_TENSOR = re.compile(r"[^\s,{}.][^\s,{}]*")


class PolicyKind(StrEnum):
    SAVE_ALL = "SAVE_ALL"  # what autograd keeps: all that the backward reads
    LEAN = "LEAN"  # what is dear to compute again: results of convolutions and matrix products; the rest is
    KEEP = "KEEP"  # some of the tensors SAVE_ALL keeps; others are computed again from the nearest kept one
    FUSED = "FUSED"  # nothing: the backward itself runs the forward, so a separate forward is skipped


@dataclass(frozen=True)
class BlockPolicy:
    """What one stage keeps from its forward for its backward, beside its input (which the stage before holds).

    `kept`, only with KEEP: operations of the stage whose results are kept, by their names in the stage (`conv1`,
    `relu_1`). `KEEP{}` keeps the stage's output only.

    `drop_output`: the output is freed as soon as the next stage has run forward, and computed again ("restored") from
    the stage's input and kept tensors just before the next item's backward, after that input if it was dropped too;
    what is restored stays until the backward of the stage that reads it.

    FUSED is only for the last stage of a segment, whose backward follows at once: its forward is not run at all. Raises
    ValueError on an inconsistent choice.
    """

    kind: PolicyKind
    kept: frozenset[str] = frozenset()
    drop_output: bool = False

    def __post_init__(self) -> None:
        if self.kept and self.kind is not PolicyKind.KEEP:
            raise ValueError(f"{self.kind} takes no names of kept tensors, got {sorted(self.kept)}")
        wrong = sorted(name for name in self.kept if not _TENSOR.fullmatch(name))
        if wrong:
            raise ValueError(f"{wrong} are no names of operations: they have no spaces, commas and braces")
        if self.drop_output and self.kind in (PolicyKind.FUSED, PolicyKind.SAVE_ALL):
            raise ValueError(f"{self.kind} cannot drop its output: only LEAN and KEEP know how to restore it")

    @property
    def fused(self) -> bool:
        return self.kind is PolicyKind.FUSED

    @property
    def anywhere(self) -> bool:
        """Whether it can be used at any place of a chain."""
        return not (self.fused or self.drop_output)

    @property
    def name(self) -> str:
        """`SAVE_ALL`, `LEAN`, `KEEP{conv1,conv2}`, `FUSED`; with `-out` at the end if the output is dropped."""
        names = "{" + ",".join(sorted(self.kept)) + "}" if self.kind is PolicyKind.KEEP else ""
        return f"{self.kind}{names}{'-out' if self.drop_output else ''}"

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(name: str) -> BlockPolicy:
        """The inverse of `name`; raises ValueError on anything else."""
        match = _NAME.fullmatch(name.strip())
        if match is None or match["kind"] not in PolicyKind.__members__:
            raise ValueError(f"{name!r} is no policy: write SAVE_ALL, LEAN, FUSED or KEEP{{conv1,conv2}}")
        kind = PolicyKind(match["kind"])
        if (kind is PolicyKind.KEEP) != (match["kept"] is not None):
            raise ValueError(f"{name!r} is no policy: KEEP takes names in braces, the others take none")
        kept = frozenset(part.strip() for part in (match["kept"] or "").split(",") if part.strip())
        return BlockPolicy(kind, kept, match["drop"] is not None)


SAVE_ALL = BlockPolicy(PolicyKind.SAVE_ALL)
LEAN = BlockPolicy(PolicyKind.LEAN)
INPUT_ONLY = BlockPolicy(PolicyKind.KEEP)
FUSED = BlockPolicy(PolicyKind.FUSED)


def keep(*names: str, drop_output: bool = False) -> BlockPolicy:
    """`keep("conv1", "conv2")` is `KEEP{conv1,conv2}`."""
    return BlockPolicy(PolicyKind.KEEP, frozenset(names), drop_output)


OUTPUT = "output"  # of an item, among the names of what waits on the host
GRADS = ".grad"  # of its parameters, which no operation's name can be


@dataclass(frozen=True)
class Host:
    """Tensors of an item that wait in host memory between its forward and its backward, and when they move.

    `names`: of what its policy keeps, and `output` for its output. The copy out begins when the item has run forward;
    the tensors on the device are freed after the forward of the item whose last stage is `gone`, which waits for the
    copy if need be. The copy back begins before the backward of the item whose last stage is `back`.

    `GRADS`, alone among the names: the gradients of the item's parameters, which its backward completes. They leave
    then, are freed before the backward of the item whose last stage is `gone`, and are there again when the whole
    backward is over; the copy back begins before that of `back`, or (-1) at the end.
    """

    names: frozenset[str]
    gone: int
    back: int


@dataclass(frozen=True)
class Keep:
    """Run the stage forward, once, under the policy; in the backward run its backward."""

    stage: int
    policy: BlockPolicy
    host: tuple[Host, ...] = ()

    @property
    def start(self) -> int:
        return self.stage

    @property
    def end(self) -> int:
        return self.stage


@dataclass(frozen=True)
class Segment:
    """A checkpoint: stages start..end run forward without saving; the input of `start` stays (with whoever made it) and
    the output of `end`. In the backward that is freed, and `inner` runs over start..end, forward and then backward."""

    start: int
    end: int  # inclusive
    inner: Schedule
    host: tuple[Host, ...] = ()

    def __post_init__(self) -> None:
        if (self.inner.start, self.inner.end) != (self.start, self.end):
            inside = f"{self.inner.start}..{self.inner.end}"
            raise ValueError(f"the segment is {self.start}..{self.end}, its inner schedule {inside}")
        if any(item.host for _, item in self.inner.walk()):
            raise ValueError(f"inside of the segment {self.start}..{self.end} nothing can wait on the host")


Item: TypeAlias = Keep | Segment


@dataclass(frozen=True)
class Schedule:
    """Items over consecutive stages, in forward order; the backward takes them in reverse. Raises ValueError if it is
    empty, has a gap or an overlap, or drops an output that cannot be restored."""

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("a schedule needs at least one item")
        # What a segment keeps is its input and its output.
        policies = [item.policy if isinstance(item, Keep) else INPUT_ONLY for item in self.items]
        for index, (item, following) in enumerate(pairwise(self.items)):
            if following.start != item.end + 1:
                raise ValueError(f"stage {item.end} is followed by {following.start}: items must be consecutive")
            if policies[index].fused:
                raise ValueError(f"stage {item.end} is FUSED but not the last of its segment")
            if policies[index].drop_output and policies[index + 1].fused:
                raise ValueError(f"stage {item.end} drops its output: stage {following.start} cannot be FUSED")
        if policies[-1].drop_output:
            raise ValueError(f"stage {self.end} is the last of its schedule: nothing would restore its dropped output")
        for number, item in enumerate(self.items):
            for host in item.host:
                self._check_host(number, item, host)

    def _check_host(self, number: int, item: Item, host: Host) -> None:
        """Raises ValueError for what is not there, and for points that are none."""
        ends = [one.end for one in self.items]
        if GRADS in host.names:
            if host.names != {GRADS} or not (host.gone in ends and host.back in (-1, *ends)):
                raise ValueError(f"gradients of stage {item.end} wait alone, until the backward of an item or the end")
            if not host.back < host.gone < item.start:
                raise ValueError(
                    f"gradients of stage {item.end} go before the backward of stage {host.gone} and come back before "
                    f"that of {host.back}: it has to be after their own, and in this order"
                )
            return
        drops = isinstance(item, Keep) and item.policy.drop_output
        if host.names - {OUTPUT} and (drops or isinstance(item, Segment)):
            raise ValueError(f"stage {item.end} has nothing that could wait on the host but its output")
        least = item.end
        if OUTPUT in host.names:
            following = self.items[number + 1] if number + 1 < len(self.items) else None
            if drops or following is None or (isinstance(following, Keep) and following.policy.drop_output):
                raise ValueError(f"the output of stage {item.end} cannot wait on the host")
            least = following.end
        if not (host.gone in ends and host.back in ends and least <= min(host.gone, host.back)):
            raise ValueError(
                f"what stage {item.end} has on the host goes after stage {host.gone} and comes back before stage "
                f"{host.back}: both are the last of an item, from stage {least} on"
            )

    @property
    def start(self) -> int:
        return self.items[0].start

    @property
    def end(self) -> int:
        """Inclusive."""
        return self.items[-1].end

    @property
    def hosts(self) -> bool:
        """Whether anything waits on the host."""
        return any(item.host for item in self.items)

    def check_covers(self, stages: int) -> None:
        """Raises ValueError unless this is a schedule for the whole chain of `stages` stages."""
        if (self.start, self.end) != (0, stages - 1):
            raise ValueError(f"the schedule covers stages {self.start}..{self.end}, the chain has 0..{stages - 1}")
        last = self.items[-1]
        if isinstance(last, Keep) and last.policy.fused:
            raise ValueError(f"stage {self.end} is the last of the chain: it must run forward, so it cannot be FUSED")

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Item]]:
        """(depth, item) in forward order, a segment before its inside."""
        for item in self.items:
            yield depth, item
            if isinstance(item, Segment):
                yield from item.inner.walk(depth + 1)

    def policies(self) -> dict[int, tuple[int, BlockPolicy]]:
        """stage -> (in how many nested segments, policy of the one forward that its backward follows)."""
        return {item.stage: (depth, item.policy) for depth, item in self.walk() if isinstance(item, Keep)}

    def to_json(self) -> list[Any]:
        """For `json`: a list of `{"keep": 3, "policy": "LEAN"}` and `{"segment": [4, 9], "inner": [...]}`."""
        return [
            {"keep": item.stage, "policy": item.policy.name, **_hosts_to_json(item)}
            if isinstance(item, Keep)
            else {"segment": [item.start, item.end], "inner": item.inner.to_json(), **_hosts_to_json(item)}
            for item in self.items
        ]

    @staticmethod
    def from_json(items: object) -> Schedule:
        """The inverse of `to_json`; raises ValueError on anything else."""
        if not isinstance(items, list):
            raise ValueError(f"a schedule is a list of items, not {type(items).__name__}")
        return Schedule(tuple(map(_item_from_json, items)))


def _hosts_to_json(item: Item) -> dict[str, Any]:
    hosts = [{"names": sorted(one.names), "gone": one.gone, "back": one.back} for one in item.host]
    return {"host": hosts} if hosts else {}


def _item_from_json(item: object) -> Item:
    match item:
        case {"keep": int(stage), "policy": str(name), **rest} if rest.keys() <= {"host"} and type(stage) is int:
            return Keep(stage, BlockPolicy.parse(name), _hosts_from_json(rest.get("host", [])))
        case {"segment": [int(start), int(end)], "inner": list(inner), **rest} if rest.keys() <= {"host"}:
            return Segment(start, end, Schedule.from_json(inner), _hosts_from_json(rest.get("host", [])))
    raise ValueError(f"{str(item)[:100]} is no item of a schedule: it has keep and policy, or segment and inner")


def _hosts_from_json(hosts: object) -> tuple[Host, ...]:
    found = []
    for host in hosts if isinstance(hosts, list) else [hosts]:
        match host:
            case {"names": list(names), "gone": int(gone), "back": int(back), **rest} if not rest:
                if type(gone) is type(back) is int and all(isinstance(name, str) for name in names):
                    found.append(Host(frozenset(names), gone, back))
                    continue
        raise ValueError(f"{str(host)[:100]} is nothing that waits on the host: it has names, gone and back")
    return tuple(found)


def uniform(policies: Sequence[BlockPolicy], start: int = 0) -> Schedule:
    """A schedule without segments: stage start+i under policies[i]."""
    return Schedule(tuple(Keep(start + index, policy) for index, policy in enumerate(policies)))
