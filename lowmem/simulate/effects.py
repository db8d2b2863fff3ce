"""What an operation does to tensors without data: found once, then looked up.

The effect of a call hangs on the operation, on the geometry of the tensors it is given and on its other arguments, and
on nothing else: which results are new, which lie in an argument's storage, which are an argument itself. It is kept for
the process; one that is not known is found on `meta` stand-ins, by `lowmem.simulate.meta_kernels`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.measure.outline import Geometry, Outline, OutlineStorage, geometry, geometry_of, outline
from lowmem.measure.tensors import tensors_among
from lowmem.simulate import meta_kernels

_NEW = -1  # as the source of a result
_VALUE = -2
_Result = tuple[int, bool, Any, int]  # source, is it the source itself, geometry (or value), bytes of a new storage


class Effect:
    """The results in order; `many`: in what they come, None for one result alone. `facts`: whatever the caller wants to
    remember of such a call."""

    __slots__ = ("facts", "many", "results")

    def __init__(self, results: Sequence[_Result], many: Callable[[Iterable[Any]], Any] | None) -> None:
        self.results = tuple(results)
        self.many = many
        self.facts: Any = None

    def apply(self, tensors: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """The call's result, and the tensors in it."""
        made: list[Tensor] = []
        values: list[Any] = []
        for source, itself, what, new_bytes in self.results:
            if source == _VALUE:
                values.append(what)
                continue
            if source == _NEW:
                tensor: Tensor = outline(what, OutlineStorage(new_bytes))
            elif itself:
                tensor = tensors[source]
                if what is not None:
                    _move(tensor, what)
            else:
                tensor = _alias(tensors[source] if source < len(tensors) else made[source - len(tensors)], what)
            made.append(tensor)
            values.append(tensor)
        return (values[0] if self.many is None else self.many(values)), made


def _move(tensor: Tensor, what: Geometry) -> None:
    """Gives the tensor itself another shape, strides or offset."""
    with torch._C._DisableTorchDispatch():
        tensor.as_strided_(what.shape, what.strides, what.offset)
    if isinstance(tensor, Outline):
        tensor._geometry = what


def _alias(base: Tensor, what: Geometry) -> Tensor:
    if type(base) is Outline:
        return outline(what, base._outline_storage)
    assert base.dtype is what.dtype, "a view of a real tensor as another type, together with one that has no data"
    return base.as_strided(what.shape, what.strides, what.offset)


class OutlineMode(TorchDispatchMode):
    """What is made inside it has no data, and what has none is not computed. Tensors from outside are real, and what
    is asked of them alone is done; so are scalars of whole numbers that are made inside: counters, which code reads
    (`float(bn.num_batches_tracked)`)."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        effect, tensors = effect_of(func, args, kwargs)
        return func(*args, **kwargs) if effect is None else effect.apply(tensors)[0]

    def __enter__(self) -> OutlineMode:
        _modes.append(self)
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        _modes.remove(self)
        super().__exit__(*failure)


# Without what the library wraps it in for torch.compile: see `lowmem.measure.tensors`.
OutlineMode.__torch_dispatch__ = inspect.unwrap(OutlineMode.__torch_dispatch__)  # type: ignore[method-assign]

_modes: list[OutlineMode] = []  # that are entered
_effects: dict[tuple[Any, ...], Effect] = {}


def effect_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Effect | None, list[Tensor]]:
    """The effect of a call on the tensors among its arguments, which come with it. None where they are all real: it is
    to be computed. Raises PreflightError for what only values could tell."""
    parts: list[Any] = [func, torch.get_default_dtype()]
    tensors: list[Tensor] = []
    known = _gather(args, parts, tensors)
    for name in kwargs:
        parts.append(name)
        known |= _gather((kwargs[name],), parts, tensors)
    if not known and (tensors or not _modes or _is_real(func, args, kwargs)):
        return None, tensors
    key = tuple(parts)
    effect = _effects.get(key)
    if effect is None:
        effect = _effects[key] = _find(func, args, kwargs, tensors)
    return effect, tensors


def _gather(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Adds what tells these arguments from others, and the tensors; returns whether one has no data."""
    known = False
    for value in values:
        kind = type(value)
        if kind is Outline:
            known = True
            parts.append(value._geometry)
            tensors.append(value)
        elif kind is list or kind is tuple:
            if value and type(value[0]) in (int, bool):
                parts.append(tuple(value))
            else:
                parts.append(len(value))
                known |= _gather(value, parts, tensors)
        elif isinstance(value, Tensor):
            parts.append(geometry_of(value))
            tensors.append(value)
        else:
            if kind is float or kind is bool:  # 1.0 and True equal 1
                parts.append(kind)
            parts.append(value)
    return known


def _is_real(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call without tensors is: it makes a counter, or something for a device that has no data anyhow, or no
    tensor at all."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if not _makes_tensors(func):
        return True
    if device is not None and torch.device(device).type == "meta":
        return True
    whole = dtype is not None and not dtype.is_floating_point
    return whole and bool(args) and isinstance(args[0], (list, tuple)) and not args[0]


@cache
def _makes_tensors(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _find(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Effect:
    if torch.Tag.data_dependent_output in func.tags:
        raise meta_kernels.needs_values(func)
    moves = torch.Tag.inplace_view in func.tags  # changes shape, strides or offset of what it is given
    written = _written_positions(func, args, kwargs)
    if written is not None and not moves:
        if not written:
            return Effect([(_VALUE, False, None, 0)], None)
        return Effect([(position, True, None, 0) for position in written], tuple if len(written) > 1 else None)
    stand_ins = [_stand_in(tensor) for tensor in tensors]
    order = iter(stand_ins)
    swapped_args = _swap(args, order)
    swapped_kwargs = {name: _swap(value, order) for name, value in kwargs.items()}
    if swapped_kwargs.get("device") is not None:
        swapped_kwargs["device"] = torch.device("meta")
    if moves:
        with torch._C._DisableTorchDispatch():
            return _compare(func(*swapped_args, **swapped_kwargs), stand_ins)
    return _compare(meta_kernels.run(func, swapped_args, swapped_kwargs), stand_ins)


def _written_positions(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """Which of the tensors among the arguments the call returns as they are; None if it returns anything else. Of an
    operation in place, or one that is told where to write: what it is given is taken to have the right size."""
    schema = func._schema
    if not schema.is_mutable or any(one.alias_info is None or not one.alias_info.is_write for one in schema.returns):
        return None
    places: dict[str, int] = {}  # of an argument's first tensor
    count = 0
    names = [argument.name for argument in schema.arguments]
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        places[name] = count
        count += len(tensors_among((value,)))
    writes = {frozenset(one.alias_info.before_set): one.name for one in schema.arguments if one.alias_info is not None}
    return [places[writes[frozenset(returned.alias_info.before_set)]] for returned in schema.returns]


def _stand_in(tensor: Tensor) -> Tensor:
    """As large a storage as the tensor's own, of its own for every argument: results tell by it where they lie."""
    what = geometry_of(tensor)
    own = tensor._outline_storage.nbytes if isinstance(tensor, Outline) else tensor.untyped_storage().nbytes()
    base = torch.empty(max(own, what.storage_bytes) // what.dtype.itemsize, dtype=what.dtype, device="meta")
    return base.as_strided(what.shape, what.strides, what.offset)


def _swap(value: Any, order: Any) -> Any:
    if isinstance(value, Tensor):
        return next(order)
    if isinstance(value, (list, tuple)):
        return type(value)([_swap(one, order) for one in value])
    return value


def _compare(result: Any, stand_ins: list[Tensor]) -> Effect:
    """The effect that has this result on the stand-ins."""
    many = type(result) if isinstance(result, (list, tuple)) else None
    homes = {stand_in.untyped_storage()._cdata: k for k, stand_in in enumerate(stand_ins)}
    results: list[_Result] = []
    count = len(stand_ins)
    for one in result if many else [result]:
        if not isinstance(one, Tensor):
            results.append((_VALUE, False, one, 0))
            continue
        storage = one.untyped_storage()
        what = geometry(tuple(one.shape), one.stride(), int(one.storage_offset()), one.dtype)
        home = homes.get(storage._cdata, _NEW)
        itself = 0 <= home < len(stand_ins) and one is stand_ins[home]
        results.append((home, itself, what, storage.nbytes()))
        homes.setdefault(storage._cdata, count)
        count += 1
    return Effect(results, many)
