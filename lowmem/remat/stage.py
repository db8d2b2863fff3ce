"""What the executor asks of a stage of the chain.

Tensors are handed over in a one-element list ("box") wherever the callee should be able to free them: it
pops the tensor, and nobody else holds it. Activations are [N, C, H, W]; a gradient handed to `backward`
has already gone through the stage's final ReLU, if there is one (`relu_output`), because the ReLU's
result, the next stage's input, is at hand there and need not be kept for this stage.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lowmem.plan.policy import BlockPolicy
from lowmem.remat.kernels import NormStats
from lowmem.remat.sync_batch_norm import Total

Box: TypeAlias = list[Tensor]
Saved: TypeAlias = dict[str, Tensor]


@dataclass
class StagePass:
    """What a stage remembers through one forward pass and the recomputations that belong to it.

    `low`: the dtype of autocast, or None. `library_norm`: see `lowmem.remat.kernels`. `total`: see
    `lowmem.remat.sync_batch_norm`; None: batch statistics are this process's own. `norms`: batch
    statistics by convolution (`"1"`, …, `"s"`). `rng`: generator states before the first run, for stages
    that draw random numbers. `first`: nothing has run yet, so that buffers have to be moved (invariant
    2).
    """

    low: torch.dtype | None
    library_norm: bool = False
    total: Total | None = None
    first: bool = True
    norms: dict[str, NormStats] = field(default_factory=dict)
    rng: list[Any] | None = None


class Stage(Protocol):
    """One link of the chain: a stem, a block, a head, any module."""

    @property
    def name(self) -> str:
        """Dotted path in the model, or `stem` and `head`."""

    @property
    def relu_output(self) -> bool:
        """Whether the output is a ReLU's, so that `backward` wants the gradient before it."""

    @property
    def signature(self) -> Hashable:
        """Stages of equal signature cost the same on equal inputs."""

    def parameters(self) -> Iterator[Tensor]: ...

    def check(self, policy: BlockPolicy) -> None:
        """Raises ValueError if the stage does not know the policy."""

    def forward(
        self,
        box: Box,
        policy: BlockPolicy | None,
        memo: StagePass,
        *,
        need_input: bool,
        want_output: bool = True,
    ) -> tuple[Tensor | None, Saved]:
        """Output and kept tensors; policy None saves nothing. Without `want_output` only what is kept is
        computed."""

    def restore(self, saved: Saved, x: Tensor, memo: StagePass) -> Tensor:
        """The output again, from the input and the kept tensors; may add to `saved` what the backward
        needs too."""

    def backward(self, grad: Box, saved: Saved, x: Tensor, memo: StagePass, *, need_input: bool) -> Tensor | None:
        """Adds the parameters' gradients to `.grad`; returns the input's (a tensor of its own), or None."""
