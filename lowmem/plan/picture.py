"""A schedule as text: one line per run of stages that are treated alike or in turns, not one per stage.

stem          1 stage   KEEP{}
layer1.0-2    3 stages  checkpoint of 3 [KEEP{z2} x2, FUSED]
layer3.1-20  20 stages  10 x (KEEP{conv2}-out, KEEP{conv1,conv2})
head          1 stage   SAVE_ALL
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile

from lowmem.core.units import aligned
from lowmem.plan.policy import GRADS, BlockPolicy, Item, Keep, PolicyKind, Schedule, Segment

LONGEST_TURN = 4  # items
MOST_NAMED = 6  # kept tensors
MOST_COUNTED = 4  # policies
_NUMBERED = re.compile(r"(?P<group>.+)\.(?P<number>\d+)")

EXPLAINED = {
    PolicyKind.SAVE_ALL: "keeps all that the backward pass reads: nothing is computed again",
    PolicyKind.LEAN: "keeps results of convolutions and matrix products; norms, activations, … are computed again",
    PolicyKind.KEEP: "keeps its output and what is named, as operations of the stage; all else is computed again",
    PolicyKind.FUSED: "keeps nothing: its forward runs inside its backward",
}


def lines(schedule: Schedule, names: Sequence[str]) -> list[tuple[str, int, str]]:
    """The picture: stages in words, how many, what is done with them. `names` are the stages' in order. Within a group
    of stages (`layer1`, …) items that look alike, or turns of up to `LONGEST_TURN` items, share a line."""
    found: list[tuple[str, int, str]] = []
    items = schedule.items
    while items:
        length, turns = _best_turn(items, names)
        run, items = items[: length * turns], items[length * turns :]
        action = _counted(run[:length])
        if turns > 1 and length > 1:
            action = f"{turns} x ({action})"
        elif turns > 1 and isinstance(run[0], Segment):
            action = f"{turns} x {action}"
        first, last = run[0].start, run[-1].end
        found.append((_range(names, first, last), last - first + 1, action))
    return found


def text(schedule: Schedule, names: Sequence[str]) -> str:
    """`lines` in columns, and below them what the policies that occur mean."""
    rows = [(stages, f"{n} {'stage ' if n == 1 else 'stages'}", action) for stages, n, action in lines(schedule, names)]
    return "\n".join([*aligned(rows, right={1}), "", *legend(schedule)])


def legend(schedule: Schedule) -> list[str]:
    policies = [policy for _, policy in schedule.policies().values()]
    said = [f"{kind}: {EXPLAINED[kind]}" for kind in PolicyKind if any(policy.kind is kind for policy in policies)]
    if any(len(policy.kept) > MOST_NAMED for policy in policies):
        said.append("…: `lowmem plan --json` names all that is kept")
    if any(policy.drop_output for policy in policies):
        said.append("-out: and drops the output, which is computed again from the input and what is kept")
    if any(isinstance(item, Segment) for item in schedule.items):
        said.append("checkpoint: keeps only the input of its first stage; then runs forward again, as in brackets")
    hosts = [host for item in schedule.items for host in item.host]
    if any(GRADS not in host.names for host in hosts):
        said.append("+host: tensors that it keeps wait in host memory until its backward pass comes near")
    if any(GRADS in host.names for host in hosts):
        said.append("+host.grad: its parameters' gradients wait in host memory until the backward pass is over")
    return said


def _best_turn(items: Sequence[Item], names: Sequence[str]) -> tuple[int, int]:
    """(length, times) of the turn at the beginning that covers the most items, within one group of stages; the shortest
    of those. Turns of several items count only if they come at least twice."""
    group = _group(names[items[0].start])
    within = takewhile(lambda item: {_group(name) for name in names[item.start : item.end + 1]} == {group}, items)
    actions = [] if group is None else list(map(_action, within))
    best = (1, 1)
    for length in range(1, min(LONGEST_TURN, len(actions) // 2) + 1):
        turns = 1
        while actions[turns * length : (turns + 1) * length] == actions[:length]:
            turns += 1
        if turns > 1 and turns * length > best[0] * best[1]:
            best = (length, turns)
    return best


def _group(name: str) -> str | None:
    match = _NUMBERED.fullmatch(name)
    return match["group"] if match else None


def _range(names: Sequence[str], start: int, end: int) -> str:
    """`layer1.0-3`, `layer1.8 to layer2.1`, `stem`."""
    first, last = names[start], names[end]
    if start == end:
        return first
    if _group(first) is not None and _group(first) == _group(last):
        return f"{first}-{last.rpartition('.')[2]}"
    return f"{first} to {last}"


def _action(item: Item) -> str:
    host = "".join(sorted({" +host.grad" if GRADS in one.names else " +host" for one in item.host}))
    if isinstance(item, Keep):
        return f"{shown(item.policy)}{host}"
    size = item.end - item.start + 1
    return f"checkpoint{f' of {size}' if size > 1 else ''}{host} [{_counted(item.inner.items)}]"


def _counted(items: Iterable[Item]) -> str:
    """`KEEP{z2} x3, FUSED`: repetitions counted."""
    counted = [(action, len(list(same))) for action, same in groupby(map(_action, items))]
    return ", ".join(action if count == 1 else f"{action} x{count}" for action, count in counted)


def in_short(schedule: Schedule) -> str:
    """`8 x SAVE_ALL, 2 x LEAN`: how many stages are under which policy, most first; if these are many, sets of kept
    tensors count together."""
    policies = [policy for _, policy in schedule.policies().values()]
    counts = Counter(map(shown, policies))
    if len(counts) > MOST_COUNTED:
        counts = Counter("KEEP{…}" if policy.kind is PolicyKind.KEEP else shown(policy) for policy in policies)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def shown(policy: BlockPolicy) -> str:
    """Its name; of many tensors that are kept the first ones."""
    if len(policy.kept) <= MOST_NAMED:
        return policy.name
    first = ",".join(sorted(policy.kept)[:2])
    return f"KEEP{{{first},… {len(policy.kept)} in all}}{'-out' if policy.drop_output else ''}"
