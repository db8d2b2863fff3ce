"""Shapes, strides and dtypes of results without data: those of torch's own simulation, and those of real tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lowmem.core.errors import PreflightError
from lowmem.measure.outline import Outline
from lowmem.simulate import OutlineMode
from tests.unit.simulate.operations import OPERATIONS, Make

_Seen = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]


def _seen(result: Any) -> list[_Seen | None]:
    """What can be compared; strides of dimensions that have one element say nothing."""
    found: list[_Seen | None] = []
    for one in result if isinstance(result, (list, tuple)) else [result]:
        if isinstance(one, Tensor):
            strides = tuple(step if size > 1 else 0 for size, step in zip(one.shape, one.stride(), strict=True))
            found.append((tuple(one.shape), strides if one.numel() else (), int(one.storage_offset()), one.dtype))
        else:
            found.append(None)
    return found


def _make(format_: torch.memory_format, low: torch.dtype) -> Make:
    """Pictures in a memory format, others as they come."""

    def make(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is torch.int64:
            return torch.zeros(shape, dtype=dtype)
        made = torch.rand(shape).to(dtype or low)
        return made.contiguous(memory_format=format_) if len(shape) == 4 else made

    return make


FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
LOWS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_results_are_laid_out_as_real_ones(name: str) -> None:
    for format_, low in product(FORMATS.values(), LOWS.values()):
        with torch.random.fork_rng(), torch.no_grad():
            real = OPERATIONS[name](_make(format_, low))
            with OutlineMode():
                outlined = OPERATIONS[name](_make(format_, low))
            with FakeTensorMode():
                fake = OPERATIONS[name](_make(format_, low))
        made = [one for one in (outlined if isinstance(outlined, (list, tuple)) else [outlined]) if one is not None]
        assert made
        assert all(type(one) is Outline for one in made)
        assert _seen(outlined) == _seen(real), f"{name}, {format_}, {low}: not as real ones"
        if name not in FAKE_DIFFERS:
            assert _seen(outlined) == _seen(fake), f"{name}, {format_}, {low}: not as FakeTensorMode's"


# Where torch's simulation is not what real tensors do.
FAKE_DIFFERS = {
    "batch norm": "it has statistics in the input's dtype, kernels have the weight's",
    "batch norm in evaluation": "likewise",
    "group norm": "likewise",
    "group norm of one dtype": "it makes channels-last pictures contiguous",
    "roll": "likewise",
}


def test_shapes_that_do_not_fit_are_refused() -> None:
    calls: list[Callable[[], object]] = [
        lambda: torch.empty(2, 3) + torch.empty(2, 4),
        lambda: torch.empty(2, 3) @ torch.empty(2, 4),
        lambda: F.conv2d(torch.empty(1, 3, 8, 8), torch.empty(4, 5, 3, 3)),
        lambda: torch.empty(2, 3).view(7),
    ]
    with OutlineMode():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()


@pytest.mark.parametrize(
    "ask", [lambda x: float(x.sum()), lambda x: bool((x > 0).all()), lambda x: x.nonzero(), lambda x: x[x > 0]]
)
def test_what_hangs_on_values_is_refused(ask: Callable[[Tensor], object]) -> None:
    with OutlineMode(), pytest.raises(PreflightError, match="cannot be planned"):
        ask(torch.empty(2, 3))


def test_the_line_that_asks_for_values_is_named() -> None:
    def asks(x: Tensor) -> Tensor:
        return x * 2 if F.relu(x).sum() > 0 else x

    said = r"^test_meta_kernels.py, line \d+ \(`return x \* 2 if F.relu\(x\).sum\(\) > 0 else x`\): aten"
    with OutlineMode(), pytest.raises(PreflightError, match=said):
        asks(torch.empty(2, 3))


def test_a_simulated_step_imports_nothing_heavy() -> None:
    """Beyond what the library itself does for tracing and for a backward (torch 2.7 imports sympy there)."""
    probe = (
        "import sys, torch, torch.fx\n"
        "one = torch.ones(1, requires_grad=True)\n"
        "torch.autograd.backward(one * 1, torch.ones(1))\n"
        "library = set(sys.modules)\n"
        "from lowmem.simulate import trace_steps\n"
        "from tests.unit.simulate.loops import Setup\n"
        "assert trace_steps(Setup().build).flops() > 0\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'torch.utils.flop_counter'}\n"
        "found = heavy & set(sys.modules) - library\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
