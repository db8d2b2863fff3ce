"""What a stage is made of: operations, and what they may know of the pass they run in.

An operation takes the values of a stage (0: its input; k: the result of its k-th operation) and makes one more. Some
have kernels of their own, called as autograd calls them, so that on a CPU the bits are the same (invariant 1): they say
what their backward reads, and may write their result into an operand that nobody needs any more. Every other one runs
under autograd by itself (`autograd_operation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Norm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

Total: TypeAlias = Callable[[Tensor], None]
"""Sums a contiguous float64 vector over all processes, in place; returns when the tensor may be used."""


class Gradients(NamedTuple):
    """Of an operation's operands, by position, None where nobody needs one; and of its parameters."""

    operands: Sequence[Any]
    parameters: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass(eq=False)
class PassState:
    """One forward pass of the chain and the backward that belongs to it, as its operations see it."""

    low: torch.dtype | None = None  # what autocast casts to
    library_norm: bool = False  # see `lowmem.remat.batch_norm`
    total: Total | None = None  # None: batch statistics are this process's own
    notes: dict[Operation, Any] = field(default_factory=dict)  # what an operation remembers; there: it has run before
    scalars: dict[str, Any] = field(default_factory=dict)  # numbers that follow from shapes, by name
    # Parameters that several operations use: their gradients are summed before they are accumulated, as autograd does.
    uses: dict[int, int] = field(default_factory=dict)  # by identity: how many gradients are still to come
    sums: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Gradients that autograd is given, to do with them what it does: by the parameter's identity. All of them if
    # somebody asked for some (`torch.autograd.grad`); else those of parameters that are made of others, or have hooks.
    asked: bool = False
    returned: dict[int, Tensor] = field(default_factory=dict)
    cast_once: bool = True  # autocast's cache is on

    def add_gradient(self, parameter: Tensor, grad: Tensor) -> None:
        """Of one use of a parameter. Those of one dtype are summed in it: autocast casts a parameter once."""
        key = id(parameter)
        if key not in self.uses:
            self._deliver(parameter, grad)
            return
        if not self.cast_once:
            grad = grad.to(parameter.dtype)
        known = self.sums.pop((key, grad.dtype), None)
        self.sums[key, grad.dtype] = parameter, grad if known is None else known[1] + grad
        self.uses[key] -= 1
        if not self.uses[key]:
            self._summed(key)

    def finish(self) -> None:
        """Of parameters some of whose uses no gradient reached."""
        while self.sums:
            self._summed(next(iter(self.sums))[0])

    def _summed(self, key: int) -> None:
        """The sum over the dtypes."""
        found = [self.sums.pop(each) for each in list(self.sums) if each[0] == key]
        parameter, total = found[0][0], found[0][1].to(found[0][0].dtype)
        for _, grad in found[1:]:
            total = total + grad.to(parameter.dtype)
        self._deliver(parameter, total)

    def _deliver(self, parameter: Tensor, grad: Tensor) -> None:
        if self.asked or has_hooks(parameter) or not parameter.is_leaf:
            self.returned[id(parameter)] = grad.to(parameter.dtype)
        else:
            accumulate(parameter, grad)


class Operation:
    """One operation of a stage. `name` is unique there.

    `dear`: its result is worth keeping, as making it again takes long. `view`: the result is (or may be) its first
    operand's memory under another shape. `in_place`: positions of operands that the result may be written into.
    `reads`: positions of operands, `reads_output`: whether the result, that the backward needs. `shares`: positions
    whose gradient is, or is a view of, the one that comes in; all others are new tensors. `uses_up`: the position of an
    operand that the backward can make use of as room for its own; where nobody needs it any more, it is called with
    `spent=True`.

    `graphed`: in the forward it can make something for its backward to use in place of all that it reads
    (`with_graph`): autograd's graph, if it runs `under_autograd`, or a pool's indices. `light`: that keeps no tensor of
    any size, so that it is always kept. `sums`: it may use an operand several times, so that its backward itself adds
    to the gradient that the operand has from later uses: autograd's sums are one by one. `exposed`: its operands and
    result may be memory that others have (a parameter's, a buffer's, what a hook has seen): never written in place.
    """

    name: str
    operands: tuple[int, ...]
    dear = view = light = graphed = under_autograd = sums = exposed = reads_output = False
    in_place: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    uses_up: int | None = None
    norm: Norm | None = None  # a batch norm whose statistics may be all processes'

    @property
    def signature(self) -> Hashable:
        """Operations of equal signature cost the same on equal operands."""
        raise NotImplementedError

    def parameters(self) -> Iterator[Tensor]:
        return iter(())

    def forward(self, operands: Sequence[Any], state: PassState, into: int | None = None) -> Any:
        """The result; written into the operand at position `into`, if that is possible, when it is not None. The first
        run of a pass moves buffers and draws random numbers; later ones have the same bits and move nothing."""
        raise NotImplementedError

    def with_graph(self, operands: Sequence[Any], state: PassState, needed: Sequence[bool]) -> tuple[Any, Any]:
        """The result, and what its backward takes as `output` in place of operands and result. `needed`: the operands
        whose gradients are wanted."""
        raise NotImplementedError

    def plain(self, operands: Sequence[Any], state: PassState) -> Any:
        """The result as the model's own modules compute it, for autograd to record."""
        raise NotImplementedError

    def backward(
        self, grad: Any, operands: Sequence[Any], output: Any, state: PassState, needed: Sequence[bool], owned: bool
    ) -> Gradients:
        """From the gradient of the result, which may be written into if it is `owned`. Of operands and result those are
        there that `reads` and `reads_output` name."""
        raise NotImplementedError


def trainable(*parameters: Tensor | None) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


def dense(tensor: Tensor) -> bool:
    """Whether the result of an elementwise function of it, a new tensor, has its strides: then it may as well take its
    place. A slice's has not; nor has that of one pixel's, [N, C, 1, 1], in channels-last: the library takes it for
    contiguous, and by strides of no extent a convolution after it chooses its kernel."""
    return dense_strides(tensor.shape, tensor.stride())


@lru_cache(maxsize=4096)
def dense_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    orders: list[Sequence[int]] = [range(len(shape))]
    if len(shape) in _CHANNELS_LAST:
        orders.append(_CHANNELS_LAST[len(shape)])
    for order in orders:
        layout = _laid_out(shape, order)
        if all(mine == other for mine, other, size in zip(stride, layout, shape, strict=True) if size != 1):
            return stride == layout
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


_CHANNELS_LAST: dict[int, Sequence[int]] = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}  # dimensions, outermost first


def _laid_out(shape: tuple[int, ...], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a new tensor whose dimensions lie in that order."""
    strides, step = [0] * len(shape), 1
    for at in reversed(order):
        strides[at] = step
        step *= max(1, shape[at])
    return tuple(strides)


@lru_cache(maxsize=4096)
def memory_format_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.memory_format:
    """What the library takes it for (`suggest_memory_format`), and lays out results of batch norm and pooling by."""
    order = _CHANNELS_LAST.get(len(shape))
    if order is None or stride[1] == 0 or 0 in shape:
        return torch.contiguous_format
    least = 0
    for at in reversed(order):
        if stride[at] < least or (at == 0 and least == stride[1]):
            return torch.contiguous_format
        least = stride[at] * max(1, shape[at])
    return torch.channels_last if len(shape) == 4 else torch.channels_last_3d


def in_format(tensor: Tensor) -> bool:
    """Whether its strides are those of a new tensor in its memory format."""
    shape, stride = tensor.shape, tensor.stride()
    last = memory_format_of(shape, stride) != torch.contiguous_format
    return stride == _laid_out(shape, _CHANNELS_LAST[len(shape)] if last else range(len(shape)))


def of_tensor(tensor: Tensor | None) -> Hashable:
    """What kernels are chosen by, as a part of a signature."""
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), str(tensor.dtype))


def accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Adds to `.grad` in place, or becomes it, in the parameter's dtype and memory layout."""
    if grad.dtype != parameter.dtype:
        grad = grad.to(parameter.dtype)
    there, mine, wanted = parameter.grad, grad.stride(), parameter.stride()
    if there is not None:
        there.add_(grad)
    elif mine == wanted or all(a == b for size, a, b in zip(grad.shape, mine, wanted, strict=True) if size > 1):
        parameter.grad = grad  # by autograd's own rule for taking it as it is
    else:
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def has_hooks(parameter: Tensor) -> bool:
    """On its gradient, or on `.grad` when that is complete. Autograd runs both, the latter also where it is given no
    gradient: whoever added to `.grad` and ran them would run them twice."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
