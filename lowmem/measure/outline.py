"""Tensors without data: shape, strides, offset, dtype, and a storage that is counted but not there.

An `Outline` says it is on the CPU, so autograd, autocast and whatever looks at a tensor take the CPU's ways. Its
storage is a Python object that its views share; CPython drops it with the last of them, autograd's saved tensors
included, and whoever counts it is told at that moment. What operations do to outlines: `lowmem.simulate.effects`.

Known limitations: an outline has no address, no values, and no storage in torch's sense (`untyped_storage()` of two
views are two); pickling and deep copies are refused by torch.
"""

from __future__ import annotations

from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_make = torch.Tensor._make_wrapper_subclass


class Geometry:
    """All that an outline is beside its storage. Equal ones are one object (see `geometry`), which is its own hash."""

    __slots__ = ("dtype", "nbytes", "offset", "shape", "storage_bytes", "strides")

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: torch.dtype) -> None:
        self.shape, self.strides, self.offset, self.dtype = shape, strides, offset, dtype
        elements = prod(shape)
        self.nbytes = elements * dtype.itemsize  # of the elements
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        self.storage_bytes = (last + 1) * dtype.itemsize if elements else 0  # the least that holds them


_known: dict[tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype], Geometry] = {}


def geometry(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: torch.dtype) -> Geometry:
    """The one object for these; offset and strides in elements."""
    key = (shape, strides, offset, dtype)
    found = _known.get(key)
    if found is None:
        found = _known[key] = Geometry(*key)
    return found


def geometry_of(tensor: Tensor) -> Geometry:
    """Of any strided tensor, real ones too."""
    return geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


class OutlineCounter(Protocol):
    def outline_gone(self, storage: OutlineStorage) -> None:
        """The last tensor in it is gone."""


class OutlineStorage:
    """`number` is its counter's; None while nobody counts it."""

    __slots__ = ("counter", "nbytes", "number")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.number = 0
        self.counter: OutlineCounter | None = None

    def __del__(self) -> None:
        if self.counter is not None:
            self.counter.outline_gone(self)


class Outline(Tensor):
    """A tensor without data. Made by `outline`."""

    _geometry: Geometry
    _outline_storage: OutlineStorage

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} on tensors without data, outside of an OutlineMode")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Outline({list(self._geometry.shape)}, {self._geometry.dtype})"


def outline(what: Geometry, storage: OutlineStorage) -> Outline:
    """An outline in a storage, which may be others' too."""
    made: Outline = _make(Outline, what.shape, what.strides, what.offset, dtype=what.dtype, device=_CPU)
    made._geometry = what
    made._outline_storage = storage
    return made


def is_outline(tensor: Tensor) -> bool:
    return type(tensor) is Outline
