"""Programs of stages, followed with symbols instead of tensors: whatever a step reads is there and is what it was, what
is written in place is nobody's any more, and nothing is left over."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
import torch

from lowmem.models.resnet import Bottleneck
from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, PolicyKind, keep
from lowmem.remat import decompose
from lowmem.remat.operation import Operation
from lowmem.remat.program import Compiler, Kept, Step
from lowmem.remat.stage import StagePass


class _Operation(Operation):
    """Only its properties."""

    def __init__(self, name: str, operands: Sequence[int], **properties: Any) -> None:
        self.name, self.operands = name, tuple(operands)
        self.__dict__.update(properties)


@dataclass
class Memory:
    version: int = 0


@dataclass
class Symbols:
    """A room in which values are memories and what was in them. `made`: bytes as it were, of every step."""

    compiler: Compiler
    operations: Sequence[Operation]
    room: dict[int, tuple[Memory, int]] = field(default_factory=dict)
    graphs: dict[int, list[tuple[Memory, int]]] = field(default_factory=dict)
    grads: dict[int, list[int]] = field(default_factory=dict)  # by value: one tensor, as a list that is shared

    def enter(self) -> Memory:
        self.room[0] = (Memory(), 0)
        return self.room[0][0]

    def read(self, value: int) -> tuple[Memory, int]:
        assert value in self.room, f"value {value} is not there"
        memory, version = self.room[value]
        assert memory.version == version, f"value {value} was written over"
        return memory, version

    def follow(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.backward:
                self._back(step)
            else:
                self._forward(step)
            for value in step.frees:
                assert value in self.room or value in self.graphs, f"{value} is freed and was not there"
                self.room.pop(value, None)
                self.graphs.pop(value, None)

    def _forward(self, step: Step) -> None:
        operation = self.operations[step.operation]
        read = [self.read(value) for value in operation.operands]
        if step.into is not None:
            assert not step.graph
            memory = read[step.into][0]
            memory.version += 1
        else:
            memory = read[0][0] if operation.view or operation.under_autograd else Memory()
        self.room[step.operation + 1] = (memory, memory.version)
        if step.graph:
            held = [] if operation.light else [*read, (memory, memory.version)]
            self.graphs[self.compiler.graph_of(step.operation)] = held

    def _back(self, step: Step) -> None:
        operation = self.operations[step.operation]
        grad = self.grads.pop(step.operation + 1)
        others = [one for one in self.grads.values() if one is grad]
        assert not (step.owned and others), "a gradient that is somebody else's is written into"
        if step.output is not None and step.output > len(self.operations):
            assert all(memory.version == version for memory, version in self.graphs[step.output])
        else:
            for value in step.uses(self.operations):
                self.read(value)
        if step.spent:
            assert operation.uses_up is not None
            memory, _ = self.read(operation.operands[operation.uses_up])
            memory.version += 1
        for position, operand in enumerate(operation.operands):
            if not step.needed[position]:
                continue
            new = grad if position in operation.shares else [0]
            old = self.grads.get(operand)
            if old is None:
                self.grads[operand] = new
            elif step.sums[position]:
                assert old is not new
                assert not [one for value, one in self.grads.items() if one is old and value != operand]
            else:
                self.grads[operand] = [0]


def _random_operations(rng: random.Random) -> list[Operation]:
    found: list[Operation] = []
    for k in range(rng.randint(2, 7)):
        kind = rng.choice(["dear", "norm", "activation", "add", "autograd", "light", "view"])
        near = [rng.randint(max(0, k - 2), k)]
        if kind == "add":
            near = [k, rng.randint(0, k)]
        properties: dict[str, Any] = {
            "dear": {"dear": True, "reads": (0,)},
            "norm": {"reads": (0,), "in_place": (0,), "uses_up": 0},
            "activation": {"reads_output": True, "in_place": (0,)},
            "add": {"in_place": (0, 1), "shares": (0, 1)},
            "autograd": {"under_autograd": True, "reads": (0,), "shares": (0,), "dear": rng.random() < 0.5},
            "light": {"under_autograd": True, "reads": (0,), "shares": (0,), "light": True},
            "view": {"under_autograd": True, "reads": (0,), "shares": (0,), "light": True, "view": True},
        }[kind]
        found.append(_Operation(f"{kind}{k}", near, **properties))
    return found


def _check(compiler: Compiler, operations: Sequence[Operation], values: frozenset[int], tail: bool) -> None:
    graphs = compiler.graphs(values)
    kept = Kept(frozenset(value for value in values if value - 1 not in graphs), graphs)
    last = len(operations)
    for want_output in (True, False):
        for restores in (False, True):
            here = Symbols(compiler, operations)
            entered = here.enter()
            here.follow(compiler.forward(kept, want_output))
            if want_output:
                here.read(last)
            left = set(here.room) - {0} - ({last} if want_output else set())
            assert left <= kept.values, "something is kept that nobody asked for"
            assert {value for value in kept.values if value != last} <= set(here.room), "something is not kept"
            assert set(here.graphs) == {compiler.graph_of(k) for k in kept.graphs}
            if last not in kept.values:
                here.room.pop(last, None)
            there = kept
            if restores and want_output and last not in kept.values:
                steps, there = compiler.restore(kept)
                here.room[0] = (entered, 0)
                here.follow(steps)
                here.read(last)
                del here.room[last]
            here.room[0] = (entered, 0)
            here.grads[operations[-1].operands[0] if tail else last] = [0]
            steps, _ = compiler.backward(there)
            here.follow(steps)
            here.room.pop(0, None)  # nothing may have read it
            unread = {value for step in steps if step.backward for value in step.uses(operations)}
            assert set(here.room) <= there.values - unread, "something that was read is left over"
            assert entered.version == 0, "the stage's input was written into"
            assert set(here.grads) <= {0}, "a gradient was not taken on"


@pytest.mark.parametrize("seed", range(150))
def test_random_stages(seed: int) -> None:
    rng = random.Random(seed)
    operations = _random_operations(rng)
    used = {value for operation in operations for value in operation.operands}
    operations = [one for k, one in enumerate(operations) if k + 1 in used or k + 1 == len(operations)]
    if any(value > k for k, one in enumerate(operations) for value in one.operands):
        operations = [_Operation(f"{k}", [k], dear=k % 2 == 0, reads=(0,)) for k in range(3)]
    tail = rng.random() < 0.5
    if tail:
        operations.append(_Operation("tail", [len(operations)], reads_output=True, in_place=(0,)))
    trains = [operation.dear and rng.random() < 0.7 for operation in operations]
    compiler = Compiler(operations, rng.random() < 0.7, trains, tail)
    if not compiler.needs[len(operations) - tail]:
        compiler = Compiler(operations, True, trains, tail)
    keepable = [
        k + 1 for k, one in enumerate(operations) if not (one.view or one.light or (tail and one is operations[-1]))
    ]
    for size in (0, 1, 2, len(keepable)):
        for some in list(combinations(keepable, min(size, len(keepable))))[:6]:
            _check(compiler, operations, frozenset(some), tail)


def _bottleneck(channels: int = 16) -> Any:
    torch.manual_seed(0)
    (stage,) = decompose(Bottleneck(channels, 4))
    return stage


def _written(steps: Sequence[Step], stage: Any) -> list[str]:
    return [stage.operations[step.operation].name for step in steps if step.into is not None]


@pytest.mark.parametrize(
    ("policy", "written"),
    [
        # A ReLU whose result is kept is written over its batch norm's, which nobody reads.
        (SAVE_ALL, ["relu", "relu_2", "add", "relu_3"]),
        (LEAN, ["relu", "relu_2", "add", "relu_3"]),
        (INPUT_ONLY, ["bn1", "relu", "bn2", "relu_2", "bn3", "add", "relu_3"]),
        (keep("conv2"), ["bn1", "relu", "relu_2", "bn3", "add", "relu_3"]),
    ],
    ids=str,
)
def test_what_a_block_writes_in_place(policy: BlockPolicy, written: list[str]) -> None:
    stage = _bottleneck()
    steps, _ = stage._program("forward", policy, StagePass(need_input=True, trains=stage.trains()))
    assert _written(steps, stage) == written


@pytest.mark.parametrize(
    ("policy", "again"),
    [
        (SAVE_ALL, []),
        (LEAN, ["bn2", "relu_2", "bn1", "relu"]),
        (keep("conv1", "conv2"), ["bn2", "relu_2", "conv3", "bn1", "relu"]),
        (keep("conv2"), ["bn2", "relu_2", "conv3", "conv1", "bn1", "relu"]),
        (INPUT_ONLY, ["conv1", "bn1", "relu", "conv2", "bn2", "relu_2", "conv3"]),
    ],
    ids=str,
)
def test_what_a_block_computes_again(policy: BlockPolicy, again: list[str]) -> None:
    """The last batch norm, the sum and the last ReLU never, and no convolution twice."""
    stage = _bottleneck()
    steps, owned = stage._program("backward", policy, StagePass(need_input=True, trains=stage.trains()))
    assert [stage.operations[step.operation].name for step in steps if not step.backward] == again
    assert owned


def test_frozen_parameters_need_less() -> None:
    """Nothing goes below the lowest trained one, and a frozen convolution's operand is not computed again."""
    stage = _bottleneck()
    memo = StagePass(need_input=False, trains=tuple(one.name == "conv3" for one in stage.operations))
    steps, _ = stage._program("backward", INPUT_ONLY, memo)
    backwards = [stage.operations[step.operation].name for step in steps if step.backward]
    assert backwards == ["add", "bn3", "conv3"]
    assert sum(step.backward for step in steps) == 3


@pytest.mark.parametrize(
    "policy",
    [SAVE_ALL, LEAN, INPUT_ONLY, keep("conv2", "relu"), BlockPolicy(PolicyKind.LEAN, drop_output=True)],
    ids=str,
)
def test_after_a_backward_the_room_is_empty(policy: BlockPolicy) -> None:
    """With real tensors."""
    stage = _bottleneck()
    memo, x = StagePass(need_input=True, trains=stage.trains()), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        y, saved = stage.forward([x], policy, memo)
        kept = {stage.operations[at - 1].name for at, value in enumerate(saved) if value is not None}
        assert kept == stage.kept(policy)
        if policy.drop_output:
            again = stage.restore(saved, x, policy, memo)
            assert torch.equal(again, y)
        stage.backward([torch.ones_like(y)], saved, x, policy, memo)
    assert all(value is None for value in saved)
