"""Whether a planned network computes what it computes by itself: one forward of each, compared.

`torch.fx` follows a forward with stand-ins for tensors. Most of what it cannot follow it refuses; what asks a tensor
for its type, and a few things more, it takes for something else without a word. Hence the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowmem.core.errors import PreflightError, first_line
from lowmem.measure.outline import is_outline
from lowmem.remat.executor import Run
from lowmem.remat.module import Named, decompose, untouched
from lowmem.remat.operation import PassState
from lowmem.remat.stage import Stage
from lowmem.remat.starting_point import Generators

_PICTURES = 2
_CLOSE = 1e-2  # of the largest value, where not the CPU computes: kernels may be others at other addresses


def check_same_forward(model: nn.Module, image_shape: tuple[int, ...], named: Named | None = None) -> None:
    """Runs a training forward on two random pictures [C, H, W], by itself and as planned. Nothing of the model is
    changed afterwards; its hooks run. Does nothing for a model without values (`meta`). `named`: the stages that the
    user has named.

    Raises PreflightError if the outputs or buffers differ, with the first stage where they do; if the network itself
    cannot compute such pictures; ValueError if it is none that can be planned (NotTraceable)."""
    model = untouched(model)
    tensors = [*model.parameters(), *model.buffers()]
    like = next((one for one in tensors if one.is_floating_point()), None)
    if any(one.is_meta or is_outline(one) for one in tensors):
        return
    device, dtype = (torch.device("cpu"), torch.float32) if like is None else (like.device, like.dtype)
    drawn = torch.randn(_PICTURES, *image_shape, generator=torch.Generator().manual_seed(0))
    x = drawn.to(device=device, dtype=dtype)
    with torch.no_grad(), _kept(model) as begin:
        model.train()
        stages = decompose(model, named)
        begin()
        try:
            wanted = _with_buffers(model(x), model)
        except Exception as error:
            raise PreflightError(
                f"the network itself fails on pictures of {list(image_shape)} in training "
                f"({first_line(error)}): plan it for the image_shape it is made for"
            ) from error
        begin()
        found = _with_buffers(Run(stages, None, False).fast([x], 0, len(stages) - 1), model)
        if all(_same(one, other) for one, other in zip(wanted, found, strict=True)):
            return
        begin()
        where = _first_different(model, stages, x, begin)
    raise PreflightError(
        f"planned, the network computes something else than by itself, from stage {where} on: its forward does what "
        "torch.fx does not follow, as isinstance(x, Tensor) does; write that part without, or plan it by "
        "stages=[...], whose modules run as they are"
    )


def _with_buffers(y: object, model: nn.Module) -> list[Tensor]:
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns a {type(y).__name__}, not one tensor")
    return [y, *(one.clone() for one in model.buffers())]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.device.type == "cpu":
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    scale = one.double().abs().amax() if one.numel() else 0
    return bool(torch.allclose(one.double(), other.double(), rtol=0, atol=float(_CLOSE * scale), equal_nan=True))


def _first_different(model: nn.Module, stages: tuple[Stage, ...], x: Tensor, begin: Callable[[], None]) -> str:
    """The stage in whose turn a layer with weights first hears something else than in the model's own forward."""
    calls: list[tuple[nn.Module, Tensor]] = []
    layers = [one for one in model.modules() if one._parameters and not any(one.children())]
    hooks = [layer.register_forward_pre_hook(lambda m, args: calls.append((m, args[0].clone()))) for layer in layers]
    try:
        model(x)
        wanted, state, value = list(calls), PassState(), x
        calls.clear()
        begin()
        for stage in stages:
            value = stage.plain(value, state)
            for at, (layer, heard) in enumerate(calls):
                if at >= len(wanted) or wanted[at][0] is not layer or not _same(wanted[at][1], heard):
                    return stage.name
    finally:
        for hook in hooks:
            hook.remove()
    return stages[-1].name


@contextmanager
def _kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Flags, buffers and generators are afterwards what they were; what comes back puts them back in between."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, tensor, tensor.clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    generators = Generators([one for one in model.parameters() if one.device.type != "cpu"][:1])

    def begin() -> None:
        generators.put_back()
        for owner, name, tensor, copy in buffers:
            owner[name] = tensor.copy_(copy)

    try:
        yield begin
    finally:
        begin()
        for module, training in flags:
            module.training = training
