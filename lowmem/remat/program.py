"""What a stage does under a policy, settled beforehand: which operation runs when, what is computed again and when,
what is written in place, and after which step each tensor dies. The stage then only follows it (`stage.Stage`).

The backward goes through the operations in reverse; what one of them reads and nobody has is computed again just before
it, from the nearest tensors that are there, and lives until the last that needs it. Gradients that meet at a value are
summed in autograd's order, the latest use first.

Known not to be optimal: what was computed again is never dropped and computed a third time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lowmem.remat.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Collection


class Step(NamedTuple):
    """One step of a stage. `frees`: values that die after it; a graph's number follows the values'."""

    operation: int
    into: int | None = None  # position of the operand that the result is written into
    graph: bool = False  # with its graph, which is kept
    # Under autograd, whose graph is dropped: some functions (matmul, attention) choose kernels by whether a gradient is
    # wanted.
    recorded: bool = False
    needed: tuple[bool, ...] = ()  # of a graph, or backward: the operands whose gradients are wanted
    backward: bool = False
    reads: tuple[int | None, ...] = ()  # of a backward: by operand the value it gets, None: nothing
    output: int | None = None  # likewise: its result, or graph
    owned: bool = False  # whether the gradient that comes in may be written into
    spent: bool = False  # likewise the operand that the operation uses up
    sums: tuple[bool, ...] = ()  # by operand: whether a gradient that is there already may be added to in place
    frees: tuple[int, ...] = ()

    def uses(self, operations: Sequence[Operation]) -> list[int]:
        """Values and graphs it needs."""
        if not self.backward:
            return list(operations[self.operation].operands)
        return [value for value in (*self.reads, self.output) if value is not None]


@dataclass(frozen=True)
class Kept:
    """What is there between two runs of a stage: values and graphs by number."""

    values: frozenset[int] = frozenset()
    graphs: frozenset[int] = frozenset()  # of operations


class Compiler:
    """Of one stage, for one choice of what needs a gradient. Values: 0 is the stage's input, k + 1 the result of
    operation k, and `len(operations) + 1 + k` its graph. `trains`: by operation, whether a parameter of it is trained.
    `tail`: whether the last operation's backward is somebody else's."""

    def __init__(self, operations: Sequence[Operation], need_input: bool, trains: Sequence[bool], tail: bool) -> None:
        self.operations, self.tail = operations, tail
        self.count = len(operations)
        needs = [need_input]
        for operation, trained in zip(operations, trains, strict=True):
            needs.append(trained or any(needs[value] for value in operation.operands))
        self.needs, self.trains = needs, trains
        self._alias = self._aliases()

    def graph_of(self, operation: int) -> int:
        return self.count + 1 + operation

    def needed(self, operation: int) -> tuple[bool, ...]:
        return tuple(self.needs[value] for value in self.operations[operation].operands)

    def graphs(self, kept: Iterable[int]) -> frozenset[int]:
        """Operations whose graph is made in a forward that keeps something: those that are kept, and the light ones."""
        wanted = set(kept)
        return frozenset(
            k
            for k, operation in enumerate(self.operations)
            if operation.graphed and self.needs[k + 1] and (operation.light or k + 1 in wanted)
        )

    def _aliases(self) -> list[int]:
        """By value a number of the memory it may be in."""
        alias = list(range(self.count + 1))
        for k, operation in enumerate(self.operations):
            if operation.view or operation.under_autograd:
                for value in operation.operands:
                    old, new = alias[k + 1], alias[value]
                    alias = [new if one == old else one for one in alias]
        return alias

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, kept: Kept, want_output: bool) -> tuple[Step, ...]:
        """All operations in order; without the output those that what is kept is made of."""
        steps: list[Step] = []
        if want_output:
            for k in range(self.count):
                steps.append(self._run(k, kept.graphs))
        else:
            there = {0}
            for value in sorted(kept.values | {k + 1 for k in kept.graphs}):
                self._make(value, there, steps, kept.graphs)
        last = {self.count} if want_output else set()
        return self._finish(steps, set(kept.values) | last, kept)

    def restore(self, kept: Kept) -> tuple[tuple[Step, ...], Kept]:
        """The output again; and what is there afterwards for the backward: of what was made, what it reads stays."""
        steps: list[Step] = []
        self._make(self.count, {0, *kept.values}, steps, frozenset())
        backward = (step for step in self._backward_steps(Kept(frozenset({0})))[0] if step.backward)
        read = {value for step in backward for value in step.uses(self.operations)}
        stay = {step.operation + 1 for step in steps} & read - {self.count}
        after = Kept(kept.values | stay, kept.graphs)
        return self._finish(steps, set(after.values) | {self.count}, after), after

    def _run(self, k: int, graphs: Collection[int]) -> Step:
        recorded = self.operations[k].under_autograd and self.operations[k].dear and self.needs[k + 1]
        return Step(k, graph=k in graphs, recorded=recorded and k not in graphs, needed=self.needed(k))

    def _make(self, value: int, there: set[int], steps: list[Step], graphs: Collection[int]) -> None:
        """Steps that compute the value, from what is there."""
        if value in there:
            return
        for operand in self.operations[value - 1].operands:
            self._make(operand, there, steps, graphs)
        steps.append(self._run(value - 1, graphs))
        there.add(value)

    # -- backward ------------------------------------------------------------------------------------------------------

    def backward(self, kept: Kept, owned: bool = True) -> tuple[tuple[Step, ...], bool]:
        """And whether the gradient of the stage's input is a tensor of its own, which may be written into. `owned`:
        whether that of its output is."""
        steps, owned = self._backward_steps(kept, owned)
        return self._finish(steps, set(), kept), owned

    def computed_again(self, kept: Kept) -> set[int]:
        """Operations that the backward runs again, beside those of graphs that it makes only there."""
        return {step.operation for step in self._backward_steps(kept)[0] if not step.backward}

    def _backward_steps(self, kept: Kept, owned: bool = True) -> tuple[list[Step], bool]:
        steps: list[Step] = []
        there = {0, *kept.values}
        tokens = _Tokens()
        start = self.count
        if self.tail:
            start = self.operations[-1].operands[0]
        tokens.arrive(start, tokens.new(owned))
        for k in reversed(range(self.count - self.tail)):
            operation, value = self.operations[k], k + 1
            if value not in tokens.of or not self.needs[value]:
                continue
            token, owned = tokens.take(value)
            needed = self.needed(k)
            output: int | None = None
            reads: list[int | None] = [None] * len(operation.operands)
            if k in kept.graphs:
                output = self.graph_of(k)
            else:
                for position in operation.reads:
                    reads[position] = operation.operands[position]
                    self._make(operation.operands[position], there, steps, frozenset())
                if operation.reads_output:
                    output = value
                    self._make(value, there, steps, frozenset())
            sums = []
            for position, operand in enumerate(operation.operands):
                sums.append(False)
                if needed[position]:
                    mine = tokens.share(token, operation) if position in operation.shares else tokens.new()
                    sums[-1] = tokens.arrive(operand, mine)
            steps.append(
                Step(
                    k,
                    needed=needed,
                    backward=True,
                    reads=tuple(reads),
                    output=output,
                    owned=owned,
                    sums=tuple(sums),
                )
            )
        return steps, 0 in tokens.of and tokens.take(0)[1]

    def useful(self, kept: Kept) -> Kept:
        """Of what is kept that which the backward uses. Where parameters are frozen it does not come to all."""
        used = {value for step in self._backward_steps(kept)[0] for value in step.uses(self.operations)}
        return Kept(kept.values & used, kept.graphs)

    # -- lifetimes -----------------------------------------------------------------------------------------------------

    def _others(self, kept: Kept) -> set[int]:
        """Values that graphs, or anybody outside, may hold too."""
        in_graphs = {
            value
            for k in kept.graphs
            if self.operations[k].under_autograd and not self.operations[k].light
            for value in (k + 1, *self.operations[k].operands)
        }
        exposed = {
            value
            for k, operation in enumerate(self.operations)
            if operation.exposed
            for value in (k + 1, *operation.operands)
        }
        return in_graphs | exposed

    def alone(self, kept: Kept) -> frozenset[int]:
        """Of what is kept, the input and the output: those whose memory is free when nobody has the value any more."""
        others = self._others(kept)
        holders = Counter(self._alias[value] for value in kept.values | others | {0, self.count})
        found = {value for value in (*kept.values, 0, self.count) if holders[self._alias[value]] == 1} - others
        return frozenset(found - (kept.values & {self.count}))

    def _finish(self, steps: list[Step], stay: set[int], kept: Kept) -> tuple[Step, ...]:
        """With the deaths of everything that does not `stay`, and results written in place where nobody minds."""
        last: dict[int, int] = {}
        for at, step in enumerate(steps):
            for value in step.uses(self.operations):
                last[value] = at
            if not step.backward:
                last.setdefault(step.operation + 1, at)
        fixed = {self._alias[value] for value in stay | self._others(kept) | {0}}
        until: dict[int, int] = {}  # by memory: the last step that needs it
        for value, at in last.items():
            if value <= self.count:
                memory = self._alias[value]
                until[memory] = max(until.get(memory, -1), at)
        finished = []
        for at, step in enumerate(steps):
            dying = {value for value in step.uses(self.operations) if last[value] == at and value not in stay}
            if not step.backward and last[step.operation + 1] == at and step.operation + 1 not in stay:
                dying.add(step.operation + 1)
            operation = self.operations[step.operation]

            def alone(position: int, operation: Operation = operation, at: int = at, dying: set[int] = dying) -> bool:
                value = operation.operands[position]
                memory = self._alias[value]
                last_of_memory = memory not in fixed and until[memory] == at
                return last_of_memory and value in dying and operation.operands.count(value) == 1

            into, spent = None, False
            if step.backward:
                spent = operation.uses_up is not None and step.output is None and alone(operation.uses_up)
            elif not step.graph:
                # A result in its operand's place keeps the memory in use, but under its own name.
                into = next((position for position in operation.in_place if alone(position)), None)
            finished.append(step._replace(into=into, spent=spent, frees=tuple(sorted(dying))))
        return tuple(finished)


class _Tokens:
    """Which gradients are one tensor: a gradient may be written into if it is nobody else's too."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}  # by value
        self._holders: list[int] = []
        self._writable: list[bool] = []

    def new(self, writable: bool = True) -> int:
        self._holders.append(1)
        self._writable.append(writable)
        return len(self._holders) - 1

    def share(self, token: int, operation: Operation) -> int:
        """The same tensor, or a view of it, of which only the operations with own kernels say that it is a whole."""
        self._holders[token] += 1
        if operation.under_autograd:
            self._writable[token] = False
        return token

    def take(self, value: int) -> tuple[int, bool]:
        token = self.of.pop(value)
        owned = self._mine(token)
        self._holders[token] -= 1
        return token, owned

    def arrive(self, value: int, token: int) -> bool:
        """A gradient of the value; whether the one that is there already may be added to in place."""
        if value not in self.of:
            self.of[value] = token
            return False
        there = self.of[value]
        in_place = self._mine(there)
        self._holders[token] -= 1
        if not in_place:
            self._holders[there] -= 1
            self.of[value] = self.new()
        return in_place

    def _mine(self, token: int) -> bool:
        return self._writable[token] and self._holders[token] == 1
