"""Schedules for tests: uniform ones, and random mixed and nested ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from lowmem.plan.policy import (
    FUSED,
    GRADS,
    INPUT_ONLY,
    LEAN,
    OUTPUT,
    SAVE_ALL,
    BlockPolicy,
    Host,
    Keep,
    PolicyKind,
    Schedule,
    Segment,
    keep,
)
from lowmem.remat.operation import PassState
from lowmem.remat.stage import Stage, StagePass


def fitting(stage: Stage, policy: BlockPolicy) -> BlockPolicy:
    """The policy, without what the stage has not got; by the name under which its costs are measured."""
    kept = stage.kept(policy) & stage.tensors
    if policy.fused or (kept != stage.read and policy.kind is not PolicyKind.KEEP):
        return policy
    if kept == stage.read and not policy.drop_output:
        return INPUT_ONLY if policy == INPUT_ONLY else SAVE_ALL
    if len(stage.dear) < 2:  # nothing of it is worth restoring
        return SAVE_ALL
    return BlockPolicy(PolicyKind.KEEP, kept, policy.drop_output)


def uniform(stages: Sequence[Stage], policy: BlockPolicy) -> Schedule:
    """Every stage under the policy."""
    return Schedule(tuple(Keep(i, fitting(stage, policy)) for i, stage in enumerate(stages)))


def segments(stages: Sequence[Stage], length: int, policy: BlockPolicy) -> Schedule:
    """Checkpoints every `length` stages, with the policy inside."""
    items = []
    for start in range(0, len(stages), length):
        end = min(start + length, len(stages)) - 1
        inner = tuple(Keep(i, fitting(stages[i], policy)) for i in range(start, end + 1))
        items.append(Segment(start, end, Schedule(inner)))
    return Schedule(tuple(items))


def alternating(stages: Sequence[Stage], first: BlockPolicy, second: BlockPolicy) -> Schedule:
    """Stages in turn; the last never drops its output."""
    policies = [fitting(stage, second if i % 2 else first) for i, stage in enumerate(stages)]
    if policies[-1].drop_output:
        policies[-1] = SAVE_ALL
    return Schedule(tuple(Keep(i, policy) for i, policy in enumerate(policies)))


@st.composite
def schedules(
    draw: st.DrawFn, stages: Sequence[Stage], start: int = 0, end: int | None = None, depth: int = 0
) -> Schedule:
    """Any valid schedule of start..end."""
    end = len(stages) - 1 if end is None else end
    items: list[Keep | Segment] = []
    dropped = False
    at = start
    while at <= end:
        if depth < 4 and draw(st.integers(0, 2)) == 0:
            last = draw(st.integers(at, end))
            items.append(Segment(at, last, draw(schedules(stages, at, last, depth + 1))))
            at, dropped = last + 1, False
            continue
        fused = depth > 0 and at == end and not dropped
        policy = draw(_policies(stages[at], may_drop=at < end, may_fuse=fused))
        items.append(Keep(at, policy))
        at, dropped = at + 1, policy.drop_output
    return Schedule(tuple(items))


def _policies(stage: Stage, may_drop: bool, may_fuse: bool) -> st.SearchStrategy[BlockPolicy]:
    simple = [SAVE_ALL, INPUT_ONLY, LEAN, *([FUSED] if may_fuse else [])]
    drops = st.booleans() if may_drop else st.just(False)
    names = sorted(stage.tensors)
    subsets = st.sets(st.sampled_from(names)) if names else st.just(set[str]())
    kept = st.builds(lambda names, drop: BlockPolicy(PolicyKind.KEEP, frozenset(names), drop), subsets, drops)
    lean = st.builds(lambda drop: BlockPolicy(PolicyKind.LEAN, drop_output=drop), drops)
    return st.one_of(st.sampled_from(simple), kept, lean)


_POLICIES = (SAVE_ALL, LEAN, INPUT_ONLY, keep("conv1", "conv2"))


def _movable(stages: Sequence[Stage], item: Keep | Segment) -> set[str]:
    if isinstance(item, Segment):
        return {OUTPUT}
    stage = stages[item.stage]
    return set(stage.movable(item.policy, StagePass(PassState(), True, stage.trains()))) - {"input"}


def hosting(stages: Sequence[Stage], seed: int) -> Schedule:
    """Any policies, now and then a segment, and of what may leave some, at any time; gradients too."""
    draw = random.Random(seed)
    items: list[Keep | Segment] = []
    while (at := items[-1].end + 1 if items else 0) < len(stages):
        policies = [fitting(stage, draw.choice(_POLICIES)) for stage in stages]
        if draw.random() < 0.25:
            end = draw.randint(at, len(stages) - 1)
            inner = Schedule(tuple(Keep(k, policies[k]) for k in range(at, end + 1)))
            items.append(Segment(at, end, inner))
        else:
            items.append(Keep(at, policies[at]))
    ends = [item.end for item in items]

    def hosts(number: int, item: Keep | Segment) -> Iterator[Host]:
        for name in sorted(_movable(stages, item)):
            least = number + (name == OUTPUT)
            if draw.random() < 0.7 and least < len(items):
                yield Host(frozenset({name}), draw.choice(ends[least:]), draw.choice(ends[least:]))
        if number and draw.random() < 0.7:
            gone = draw.choice(ends[:number])
            yield Host(frozenset({GRADS}), gone, draw.choice([-1, *(end for end in ends if end < gone)]))

    return Schedule(tuple(replace(item, host=tuple(hosts(number, item))) for number, item in enumerate(items)))
