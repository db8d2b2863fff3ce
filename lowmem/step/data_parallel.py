"""A training step of several processes: each its slice of the effective batch, one sum of gradients, one verdict.

Between the backward pass and the update the processes agree, in one small message, on whether the step held everywhere,
and on what only one of them may know: a signal, a save that is due, memory that runs short. So a step is made by all or
by none: where one runs out of memory, the others undo theirs too, and all do it again.

A process that failed sends zeros for the sums it still owes, so that nobody hangs; with batch norm over all processes
(`sync_bn`) for the statistics too, whose sizes and order depend on the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowmem.core.errors import PeerFailed, PreflightError
from lowmem.distributed.group import Group, Split
from lowmem.distributed.reducer import Reducer
from lowmem.remat import PlannedModule
from lowmem.remat.operation import has_hooks
from lowmem.remat.stage import Stage


class DataParallelStep:
    """What `TrainStep` does with the other processes, for a network that the executor runs."""

    def __init__(self, run: PlannedModule, group: Group, split: Split, device: str, *, sync_bn: bool) -> None:
        """Raises PreflightError for a parameter with hooks."""
        self.group, self.split = group, split
        self._device = device
        if hooked := next((name for name, one in run.named_parameters() if has_hooks(one)), None):
            raise PreflightError(
                f"{hooked} has a hook on its gradient, which autograd would run on each process's own and not on their "
                "sum: take it out, or train in one process"
            )
        seen: set[int] = set()  # what several stages use is complete with the first of them
        stages = [
            [one for one in stage.parameters() if not (id(one) in seen or seen.add(id(one)))]  # type: ignore[func-returns-value]
            for stage in run.lowmem.stages
        ]
        # A frozen batch norm's do not move: a mean of equal ones may have another rounding.
        moving = {id(one): one for part in run.modules() if part.training for one in part.buffers(recurse=False)}
        self._reducer = Reducer(stages, [] if sync_bn else list(moving.values()), group.start_total)
        self._norm_sizes = _norm_sums(run.lowmem.stages) if sync_bn else []
        run.lowmem.stage_done = self._reducer.stage_done
        run.lowmem.total = self.norm_total if sync_bn else None
        self.verdict: Callable[[], int] = int  # of this process on the run, a greater number for a stronger one
        self.agreed = 0  # the strongest verdict of all processes in the last step
        self.begin(0)

    def begin(self, size: int) -> tuple[int, int]:
        """A step of `size` pictures begins. Returns this process's slice of them."""
        self._size, self._norm_calls = size, 0
        self._reduced = self._summed = False
        return self.split.part(size)

    def cut(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """This process's slice in micro-batches. With statistics over all processes as many of them everywhere, some
        perhaps empty; else none for an empty slice."""
        if self._norm_sizes:
            pieces = self.split.pieces(self._size)
            return list(zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True))
        micro = self.split.micro_batches[self.group.rank]
        return list(zip(images.split(micro), labels.split(micro), strict=True)) if len(labels) else []

    def norm_total(self, tensor: Tensor) -> None:
        """The executor's sum over all processes of a batch norm's figures."""
        expected = self._norm_sizes[self._norm_calls % len(self._norm_sizes)]
        assert tensor.numel() == expected, "batch norms are not in the network's order"
        self._norm_calls += 1
        self.group.total(tensor)

    def last_pass(self) -> None:
        """Before the last micro-batch, or where there is none: gradients are complete, stage by stage, from here on."""
        self._reducer.arm()

    def finish(self, totals: Tensor) -> None:
        """Waits for the sums of the gradients, and makes `totals` (of the losses, of wrong predictions) everyone's."""
        first, past = self.split.part(self._size)
        self._reducer.finish((past - first) / self._size)
        self._reduced = True
        self.group.start_total(totals)()
        self._summed = True

    def agree(self) -> None:
        """Whether all have made it, when nothing is left to do but the update. Raises PeerFailed."""
        if any(self._vote(failed=False)):
            raise PeerFailed("another process could not make this step")

    def fail(self) -> None:
        """Of a process whose own step failed and was undone: zeros for what it owes the others, and its vote."""
        sums = len(self._norm_sizes)
        for call in range(self._norm_calls, self.split.pieces(self._size) * sums):
            self.group.total(self._zeros(self._norm_sizes[call % sums]))
        if not self._reduced:
            self._reducer.give_up()
        if not self._summed:
            self.group.start_total(self._zeros(2))()
        self._vote(failed=True)

    def _zeros(self, elements: int) -> Tensor:
        return torch.zeros(elements, dtype=torch.float64, device=self._device)

    def _vote(self, *, failed: bool) -> list[int]:
        votes = [0] * self.group.size
        votes[self.group.rank] = int(failed)
        self.agreed, *votes = self.group.most([self.verdict(), *votes])
        return votes


def _norm_sums(stages: Sequence[Stage]) -> list[int]:
    """Elements of every sum that a pass makes for its batch norms, forward and backward: sum, sum of squares, count; of
    the gradient, and of it with the normalised input. Those in evaluation mode make none, and there is none in the
    backward where no gradient of the input is needed."""
    forward, backward, need_input = list[int](), list[int](), False
    for stage in stages:
        needs = [need_input]
        for operation, trained in zip(stage.operations, stage.trains(), strict=True):
            needed = any(needs[value] for value in operation.operands)
            needs.append(needed or trained)
            norm = operation.norm
            if norm is not None and (norm.training or norm.running_mean is None):
                forward.append(2 * norm.num_features + 1)
                backward += [2 * norm.num_features] if needed else []
        need_input = needs[-1]
    return [*forward, *backward[::-1]]


@torch.no_grad()
def are_alike(group: Group, model: nn.Module) -> bool:
    """Whether the processes' parameters and running statistics are the same bits: sums over them would mean nothing
    else. Costs one pass over them."""
    if group.alone:
        return True
    flat = (tensor.contiguous().flatten() for tensor in model.state_dict().values() if tensor.is_floating_point())
    words = (one.view(torch.int32 if one.element_size() == 4 else torch.int16) for one in flat)
    everyone = group.gather(torch.stack([one.sum(dtype=torch.int64) for one in words]).tolist())
    return all(one == everyone[0] for one in everyone)
