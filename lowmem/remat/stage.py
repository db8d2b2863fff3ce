"""What the executor asks of a stage of the chain, and the stage that any module makes.

Tensors are handed over in a one-element list ("box") wherever the callee should be able to free them: it pops the
tensor, and nobody else holds it. Activations are [N, C, H, W]; a gradient handed to `backward` has already gone through
the stage's final ReLU, if there is one: the ReLU's result is at hand as the next stage's input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from lowmem.measure.outline import is_outline
from lowmem.plan.policy import BlockPolicy, PolicyKind
from lowmem.remat.batch_norm import NormStats, Total

Box: TypeAlias = list[Tensor]
Saved: TypeAlias = dict[str, Tensor]
Forwarded: TypeAlias = tuple[Tensor | None, Saved]


@dataclass
class StagePass:
    """What a stage remembers through one forward pass and the recomputations that belong to it."""

    low: torch.dtype | None  # of autocast
    library_norm: bool = False  # see `lowmem.remat.batch_norm`
    total: Total | None = None  # likewise; None: batch statistics are this process's own
    need_input: bool = False  # the gradient of the input is asked for
    first: bool = True  # nothing has run yet, so that buffers have to be moved (invariant 2)
    norms: dict[int, NormStats] = field(default_factory=dict)  # by convolution: 1, 2, …, 0 for the projection's
    rng: list[Any] | None = None  # generator states before the first run, for stages that draw random numbers


class Stage(Protocol):
    """One link of the chain: a stem, a block, a head, any module."""

    name: str  # dotted path in the model, or `stem` and `head`
    relu_output: bool = False  # whether the output is a ReLU's, so that `backward` wants the gradient before it

    @property
    def signature(self) -> Hashable:
        """Stages of equal signature cost the same on equal inputs."""

    @property
    def norms(self) -> Sequence[nn.BatchNorm2d]:
        """Those whose statistics may be all processes', in the order in which the forward needs them."""
        return ()

    def parameters(self) -> Iterator[Tensor]: ...

    def check(self, policy: BlockPolicy) -> None:
        """Raises ValueError if the stage does not know the policy."""

    def forward(self, box: Box, policy: BlockPolicy | None, memo: StagePass, want_output: bool = True) -> Forwarded:
        """Output and kept tensors; policy None saves nothing. Without `want_output` only what is kept is computed."""

    def restore(self, saved: Saved, x: Tensor, memo: StagePass) -> Tensor:
        """The output again, from the input and the kept tensors; may add to `saved` what the backward needs too."""

    def backward(self, grad: Box, saved: Saved, x: Tensor, memo: StagePass) -> Tensor | None:
        """Adds the parameters' gradients to `.grad`; returns the input's (a tensor of its own), or None."""


@dataclass(frozen=True)
class OpaqueStage(Stage):
    """A stage that is not of the family: kept whole, with the graph autograd makes of it (SAVE_ALL), or run again from
    its input (KEEP{}, FUSED), with the same random numbers and no buffer moved.

    `function` maps one tensor to one tensor, which it must not change in place, and uses the parameters and buffers of
    `module` only. Batch norm inside it knows nothing of other processes: where statistics are to be theirs too, running
    it raises ValueError.
    """

    name: str
    module: nn.Module
    function: Callable[[Tensor], Tensor]

    @property
    def signature(self) -> Hashable:
        return "opaque", self.name

    def parameters(self) -> Iterator[Tensor]:
        yield from self.module.parameters()

    def check(self, policy: BlockPolicy) -> None:
        if policy.kind is PolicyKind.LEAN or policy.kept or policy.drop_output:
            raise ValueError(f"stage {self.name} is not a block of the family: SAVE_ALL or KEEP{{}}, not {policy}")

    def forward(self, box: Box, policy: BlockPolicy | None, memo: StagePass, want_output: bool = True) -> Forwarded:
        x = box.pop()
        if policy is not None and policy.kind is PolicyKind.SAVE_ALL:
            saved = self._with_graph(x, memo)
            return saved["y"].detach(), saved
        if not want_output:
            return None, {}
        with torch.no_grad():
            return self._run(x, memo), {}

    def restore(self, saved: Saved, x: Tensor, memo: StagePass) -> Tensor:
        raise ValueError(f"stage {self.name} cannot drop its output")

    def backward(self, grad: Box, saved: Saved, x: Tensor, memo: StagePass) -> Tensor | None:
        if not saved:
            saved = self._with_graph(x, memo)
        leaf, y = saved["x"], saved["y"]
        saved.clear()
        if y.requires_grad:
            with torch.autograd.set_multithreading_enabled(False):  # as the whole backward pass: see `TrainStep`
                torch.autograd.backward(y, grad.pop())
        return leaf.grad

    def _with_graph(self, x: Tensor, memo: StagePass) -> Saved:
        leaf = x.detach().requires_grad_(memo.need_input)
        with torch.enable_grad():
            return {"x": leaf, "y": self._run(leaf, memo)}

    def _run(self, x: Tensor, memo: StagePass) -> Tensor:
        version = x._version
        # Without the cache: it would hold the cast parameters for as long as the outer autocast lasts.
        with torch.autocast(x.device.type, memo.low, enabled=memo.low is not None, cache_enabled=False):
            if memo.first:
                memo.first = False
                if memo.total is not None:
                    self._check_no_statistics()
                memo.rng = None if is_outline(x) else [torch.get_rng_state(), *get_device_states(x)]
                y = self.function(x)
            else:
                cpu, devices, states = memo.rng or (None, [], [])
                with torch.random.fork_rng(devices, enabled=cpu is not None), _buffers_kept(self.module):
                    if cpu is not None:  # the generators as they were before the stage first ran
                        torch.set_rng_state(cpu)
                        set_device_states(devices, states)
                    y = self.function(x)
        if x._version != version:
            raise ValueError(f"stage {self.name} changes its input in place: the input is needed again; make it a copy")
        return y

    def _check_no_statistics(self) -> None:
        for name, module in self.module.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"batch norm {name or self.name} in stage {self.name} is not part of a block of the family: its "
                    "statistics cannot be those of all processes; put it into evaluation mode or leave out --sync-bn"
                )


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever moves the buffers moves copies. Restoring their values instead would upset autograd, which
    has saved them."""
    originals = [(child._buffers, *item) for child in module.modules() for item in child._buffers.items()]
    for buffers, name, tensor in originals:
        buffers[name] = None if tensor is None else tensor.clone()
    try:
        yield
    finally:
        for buffers, name, tensor in originals:
            buffers[name] = tensor
