"""Layer norm and group norm, by the kernels that autograd itself calls. Mean and inverse standard deviation of the last
run are remembered: one that runs again finds the same.

On CUDA autocast runs both in float32; on a CPU in what comes, and the kernels take a low operand with float32
parameters.

Known not to be optimal: neither works in place, and a repetition computes mean and deviation again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.remat.autograd_operation import Attribute
from lowmem.remat.operation import Gradients, Operation, PassState, memory_format_of, of_tensor, trainable

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class LayerNorm(Operation):
    """Of [..., *extent]. `extent`, `weight`, `bias`, `eps`: a value, or where it is looked up when it is used."""

    name: str
    operands: tuple[int, ...]
    extent: Any
    weight: Any
    bias: Any
    eps: Any
    reads = (0,)

    @property
    def signature(self) -> Hashable:
        return type(self).__name__, _value(self.extent), _value(self.eps), *map(of_tensor, self._affine())

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return _value(self.weight), _value(self.bias)

    def parameters(self) -> Iterator[Tensor]:
        return (one for one in self._affine() if one is not None)

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Tensor:
        y, *state.notes[self] = self._kernel(*self._cast(operands[0], state))
        return y

    def plain(self, operands: Sequence[Any], state: PassState) -> Tensor:
        return self._kernel(*self._cast(operands[0], state))[0]

    def _cast(self, x: Tensor, state: PassState) -> list[Any]:
        """Operand and parameters as autocast has them."""
        given = x, *self._affine()
        as_they_are = state.low is None or x.device.type == "cpu"
        return [one if as_they_are or one is None else one.float() for one in given]

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        affine = self._affine()
        mask = [needed[0], *map(trainable, affine)]
        mean, invstd = state.notes[self]
        x, weight, bias = self._cast(operands[0], state)
        grad_x, *grads = self._kernel_backward(grad, x, weight, bias, mean, invstd, mask)
        parameters = [
            (mine, one)
            for mine, one, wanted in zip(affine, grads, mask[1:], strict=True)
            if mine is not None and wanted
        ]
        return Gradients([grad_x.to(operands[0].dtype) if needed[0] else None], parameters)

    def _kernel(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Result, mean and inverse standard deviation."""
        return _aten.native_layer_norm(x, _value(self.extent), weight, bias, _value(self.eps))

    def _kernel_backward(
        self, grad: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, invstd: Tensor, mask: list[bool]
    ) -> Any:
        return _aten.native_layer_norm_backward(grad, x, _value(self.extent), mean, invstd, weight, bias, mask)


class GroupNorm(LayerNorm):
    """Of [N, C, ...]; `extent`: the number of groups."""

    def _kernel(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return _aten.native_group_norm(_laid_out(x, x), weight, bias, *self._sizes(x), _value(self.eps))

    def _kernel_backward(
        self, grad: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, invstd: Tensor, mask: list[bool]
    ) -> Any:
        laid_out = _laid_out(grad, x), _laid_out(x, x)
        return _aten.native_group_norm_backward(*laid_out, mean, invstd, weight, *self._sizes(x), mask)

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        count, channels = x.shape[:2]
        return count, channels, math.prod(x.shape[2:]), _value(self.extent)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """As the library's group norm wants it: on a CPU channels-last stays what it is."""
    if like.device.type != "cpu":
        return tensor.contiguous()
    return tensor.contiguous(memory_format=memory_format_of(like.shape, like.stride()))


def _value(given: Any) -> Any:
    return given.value() if isinstance(given, Attribute) else given
