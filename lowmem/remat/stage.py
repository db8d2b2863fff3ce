"""One link of the chain: a small graph of operations between two tensors, and how it runs under a policy.

Tensors are handed over in a one-element list ("box") wherever the callee should be able to free them: it pops the
tensor, and nobody else holds it. Where the last operation is an activation whose backward reads its result (`tail`), a
gradient handed to `backward` has already gone through it: the result is at hand as the next stage's input.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from lowmem.plan.policy import GRADS, OUTPUT, BlockPolicy, Host, PolicyKind
from lowmem.remat.elementwise import OutputActivation
from lowmem.remat.operation import Norm, Operation, PassState
from lowmem.remat.program import Compiler, Kept, Step

Box: TypeAlias = list[Any]
Saved: TypeAlias = list[Any]  # values and graphs by their number in the program; None: not there
Forwarded: TypeAlias = tuple[Any, Saved]


@dataclass(eq=False)
class StagePass:
    """One forward pass of a stage, and the recomputations and the backward that belong to it."""

    state: PassState = field(default_factory=PassState)
    need_input: bool = False  # the gradient of the input is asked for
    trains: tuple[bool, ...] = ()  # by operation


@dataclass(frozen=True, eq=False)
class Stage:
    """`name`: dotted path in the model of what its operations have in common. Activations have any shape."""

    name: str
    operations: tuple[Operation, ...]

    @cached_property
    def count(self) -> int:
        """Of its operations, and the number of its output among the values."""
        return len(self.operations)

    @cached_property
    def tail(self) -> OutputActivation | None:
        last = self.operations[-1]
        return last if isinstance(last, OutputActivation) else None

    @cached_property
    def signature(self) -> Hashable:
        """Stages of equal signature cost the same on equal inputs. Of the stage as it is now: see `TracedChain`."""
        return tuple((operation.name, operation.signature, operation.operands) for operation in self.operations)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Batch norms whose statistics may be all processes', in the order in which the forward needs them."""
        return tuple(operation.norm for operation in self.operations if operation.norm is not None)

    def parameters(self) -> Iterator[Tensor]:
        for operation in self.operations:
            yield from operation.parameters()

    def trains(self) -> tuple[bool, ...]:
        """By operation: whether a parameter of it is trained."""
        return tuple(any(one.requires_grad for one in operation.parameters()) for operation in self.operations)

    # -- policies ------------------------------------------------------------------------------------------------------

    @cached_property
    def read(self) -> frozenset[str]:
        """What SAVE_ALL keeps: graphs, and results that the backward of others reads."""
        return frozenset(
            operation.name for k, operation in enumerate(self.operations) if self._keepable(k) and self.wanted(k)
        )

    def wanted(self, k: int) -> bool:
        """Whether the backward of another operation reads the result of the k-th, or its own needs its graph. Light
        graphs are always kept."""
        return (self.operations[k].graphed and not self.operations[k].light) or k + 1 in self._wanted

    @cached_property
    def _wanted(self) -> frozenset[int]:
        read = {value for k, one in enumerate(self.operations) if not one.graphed for value in self._reads(k)}
        return frozenset(self._behind_views(read))

    def _keepable(self, k: int) -> bool:
        operation = self.operations[k]
        return not (operation.view or (self.tail is not None and k + 1 == len(self.operations)))

    def _behind_views(self, values: Iterable[int]) -> set[int]:
        """The values themselves, or what they are views of."""
        found = set(values)
        for k in reversed(range(len(self.operations))):
            if self.operations[k].view and k + 1 in found:
                found.update(self.operations[k].operands)
        return found

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of everything that can be kept: beside those what graphs are made of, if they are made again, and the
        dear ones on the way to anything."""
        read = {value for k, one in enumerate(self.operations) if not one.light for value in self._reads(k)}
        read = self._behind_views(read)
        more = (
            one.name
            for k, one in enumerate(self.operations)
            if self._keepable(k) and (k + 1 in read or (one.dear and k in self._again))
        )
        return self.read.union(more)

    @cached_property
    def _again(self) -> set[int]:
        """Operations that the backward would have to run again if nothing were kept."""
        compiler = self._compiler(True, (True,) * len(self.operations))
        return compiler.computed_again(Kept(graphs=compiler.graphs(())))

    @cached_property
    def dear(self) -> frozenset[str]:
        """What LEAN keeps: the results of dear operations that the backward would have to make again."""
        return frozenset(
            operation.name
            for k, operation in enumerate(self.operations)
            if operation.dear and operation.name in self.tensors and (k in self._again or operation.graphed)
        )

    def kept(self, policy: BlockPolicy | None) -> frozenset[str]:
        """Names of what a policy keeps."""
        if policy is None or policy.fused:
            return frozenset()
        if policy.kind is PolicyKind.SAVE_ALL:
            return self.read
        return self.dear if policy.kind is PolicyKind.LEAN else policy.kept

    def check(self, policy: BlockPolicy, hosts: Iterable[Host] = ()) -> None:
        """Raises ValueError if the stage does not know the policy, or has not what is to wait on the host."""
        unknown = sorted(self.kept(policy) - self.tensors)
        if unknown:
            raise ValueError(
                f"stage {self.name} has no {', '.join(unknown)}: it has {', '.join(sorted(self.tensors)) or 'nothing'}"
            )

        mine = {operation.name for operation in self.operations} | {OUTPUT, GRADS}
        if lost := sorted(frozenset().union(*(host.names for host in hosts)) - mine):
            raise ValueError(f"stage {self.name} has no {', '.join(lost)} that could wait on the host")

    def movable(self, policy: BlockPolicy, memo: StagePass) -> dict[str, int]:
        """What of the policy's may wait on the host, by name: the number of a kept value, `output` its own; `input`
        says that the memory of the input is free when the stage does not hold it."""
        compiler = self._compiler(memo.need_input, memo.trains)
        names = {0: "input", self.count: OUTPUT}
        alone = compiler.alone(self._keeps(compiler, policy))
        return {names.get(value) or self.operations[value - 1].name: value for value in sorted(alone)}

    # -- programs ------------------------------------------------------------------------------------------------------

    @cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    def _compiler(self, need_input: bool, trains: tuple[bool, ...]) -> Compiler:
        key = (need_input, trains)
        if key not in self._known:
            self._known[key] = Compiler(self.operations, need_input, trains, self.tail is not None)
        found: Compiler = self._known[key]
        return found

    def _keeps(self, compiler: Compiler, policy: BlockPolicy | None) -> Kept:
        if policy is None or policy.fused:
            return Kept()
        names = self.kept(policy)
        values = frozenset(k + 1 for k, operation in enumerate(self.operations) if operation.name in names)
        graphs = compiler.graphs(values)
        # What autograd alone needs is in its graph; of the others it is the tensor.
        read = {value for k in range(len(self.operations)) if k not in graphs for value in self._reads(k)}
        read = self._behind_views(read)
        kept = Kept(frozenset(v for v in values if v - 1 not in graphs or v in read), graphs)
        return kept if all(compiler.needs[1:]) else compiler.useful(kept)

    def _reads(self, k: int) -> list[int]:
        operation = self.operations[k]
        own = [k + 1] if operation.reads_output else []
        return own + [operation.operands[at] for at in operation.reads]

    def _program(self, what: str, policy: BlockPolicy | None, memo: StagePass, owned: bool = True) -> Any:
        key = (what, policy, memo.need_input, memo.trains, owned)
        if key not in self._known:
            compiler = self._compiler(memo.need_input, memo.trains)
            kept = self._keeps(compiler, policy)
            if what == "restore":
                self._known[key] = compiler.restore(kept)[0]
            elif what == "backward":
                if policy is not None and policy.drop_output:
                    kept = compiler.restore(kept)[1]
                self._known[key] = compiler.backward(kept, owned)
            else:
                self._known[key] = compiler.forward(kept, what == "forward"), self.count in kept.values
        return self._known[key]

    def plain(self, x: Any, state: PassState) -> Any:
        """The output as the model's own modules compute it, for autograd to record."""
        values = [x]
        for operation in self.operations:
            values.append(operation.plain([values[at] for at in operation.operands], state))
        return values[-1]

    # -- running -------------------------------------------------------------------------------------------------------

    def _room(self, x: Any) -> Saved:
        room: Saved = [None] * (2 * self.count + 1)
        room[0] = x
        return room

    def forward(self, box: Box, policy: BlockPolicy | None, memo: StagePass, want_output: bool = True) -> Forwarded:
        """Output and kept tensors; policy None saves nothing. Without `want_output` only what is kept is computed."""
        steps, keeps_output = self._program("forward" if want_output else "again", policy, memo)
        room = self._room(box.pop())
        self._follow(steps, room, memo)
        room[0] = None
        y = None
        if want_output:
            y = room[self.count]
            if not keeps_output:
                room[self.count] = None
        return y, room

    def restore_reads_input(self, policy: BlockPolicy, memo: StagePass) -> bool:
        """Whether the output cannot be made again of the kept tensors alone."""
        return any(0 in step.uses(self.operations) for step in self._program("restore", policy, memo))

    def restore(self, saved: Saved, x: Tensor | None, policy: BlockPolicy, memo: StagePass) -> Any:
        """The output again, from the kept tensors and, where it is read, the input; may add to `saved` what the
        backward needs too."""
        saved[0] = x
        self._follow(self._program("restore", policy, memo), saved, memo)
        y, saved[self.count], saved[0] = saved[self.count], None, None
        return y

    def backward(
        self, grad: Box, saved: Saved, x: Tensor, policy: BlockPolicy, memo: StagePass, owned: bool = True
    ) -> tuple[Tensor | None, bool]:
        """Adds the parameters' gradients to `.grad`; returns the input's, or None, and whether it may be written
        into. `owned`: whether the incoming one may."""
        steps, owned = self._program("backward", policy, memo, owned)
        if not saved:
            saved = self._room(None)
        saved[0] = x
        del x
        grads: list[Any] = [None] * (self.count + 1)
        tail = self.tail
        grads[self.count if tail is None else tail.operands[0]] = grad.pop()
        self._follow(steps, saved, memo, grads)
        return grads[0], owned

    def _follow(self, steps: Sequence[Step], room: Saved, memo: StagePass, grads: list[Any] | None = None) -> None:
        state, operations = memo.state, self.operations
        graphs = len(operations) + 1
        for step in steps:
            k = step.operation
            operation = operations[k]
            if not step.backward:
                operands = [room[value] for value in operation.operands]
                if step.graph:
                    room[k + 1], room[graphs + k] = operation.with_graph(operands, state, step.needed)
                elif step.recorded:
                    room[k + 1] = operation.with_graph(operands, state, step.needed)[0]
                else:
                    room[k + 1] = operation.forward(operands, state, step.into)
                del operands
                for value in step.frees:
                    room[value] = None
                continue
            assert grads is not None
            self._step_back(step, operation, room, state, grads)

    def _step_back(self, step: Step, operation: Operation, room: Saved, state: PassState, grads: list[Any]) -> None:
        grad = grads[step.operation + 1]
        grads[step.operation + 1] = None
        if grad is None:  # nobody's use of it gave one
            for value in step.frees:
                room[value] = None
            return
        operands = [None if value is None else room[value] for value in step.reads]
        output = None if step.output is None else room[step.output]
        if step.spent or operation.sums:
            more: dict[str, Any] = {"spent": True} if step.spent else {}
            if operation.sums:
                more["so_far"] = [grads[value] for value in operation.operands]
            found = operation.backward(grad, operands, output, state, step.needed, step.owned, **more)
            del more
        else:
            found = operation.backward(grad, operands, output, state, step.needed, step.owned)
        del grad, operands, output
        for value in step.frees:
            room[value] = None
        mine, parameters = found
        del found
        for parameter, one in parameters:
            state.add_gradient(parameter, one)
        if parameters:
            del one
        del parameters
        mine = list(mine)
        for position, value in enumerate(operation.operands):
            new, mine[position] = mine[position], None
            if new is None or not step.needed[position]:
                continue
            old = grads[value]
            summed = old is None or operation.sums
            grads[value] = new if summed else add_gradients(old, new, step.sums[position])


def add_gradients(old: Any, new: Any, in_place: bool) -> Any:
    """Of one value, or of the tensors in one that is a tuple."""
    if isinstance(old, list):
        return [b if a is None else a if b is None else a + b for a, b in zip(old, new, strict=True)]
    if in_place and old.dtype == new.dtype:
        return old.add_(new)
    return old + new
