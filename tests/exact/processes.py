"""Several "processes" as threads of this one, each with a slice of a batch and a model of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.remat.batch_norm import norm_backward, norm_first
from lowmem.remat.operation import accumulate


class Processes:
    """A `total` for each thread, which really sums; `calls` has the lengths of what each has summed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.given: list[Tensor | None] = [None] * count
        self.calls: list[list[int]] = [[] for _ in range(count)]

    def total(self, rank: int) -> Callable[[Tensor], None]:
        def sum_up(values: Tensor) -> None:
            assert values.dtype == torch.float64
            assert values.dim() == 1
            assert values.is_contiguous()
            self.calls[rank].append(len(values))
            self.given[rank] = values.clone()
            self.barrier.wait()
            result = torch.stack([one for one in self.given if one is not None]).sum(0)
            self.barrier.wait()
            values.copy_(result)

        return sum_up

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()  # the others shall not wait for this one
                raise

        with ThreadPoolExecutor(self.count) as pool:
            tasks = [pool.submit(guarded, rank) for rank in range(self.count)]
        failures = [error for task in tasks if (error := task.exception())]
        for error in failures:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [task.result() for task in tasks]


def slices_of(sizes: Sequence[int]) -> Iterator[slice]:
    """One after the other."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def relative_error(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest relative error of any tensor, by norms."""
    errors = {
        name: float((found[name].double() - one.double()).norm() / one.double().norm().clamp_min(1e-30))
        for name, one in wanted.items()
    }
    return max(errors.values())


def error_of_one_norm(device: str, dtype: torch.dtype, memory_format: Any) -> float:
    """Of a batch norm over three slices (one is empty), forward, backward and statistics, against autograd in float64
    on the CPU from the same rounded numbers."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(16).to(torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.uniform_(bn.weight)
    nn.init.uniform_(bn.bias)
    z = (
        (torch.randn(8, 16, 6, 6) * 2 + 3 * torch.rand(8, 1, 1, 1) - 1)
        .to(dtype)
        .contiguous(memory_format=memory_format)
    )
    grad = (z * 0.3 + torch.randn_like(z) + 0.2).contiguous(memory_format=memory_format)
    exact, leaf = copy.deepcopy(bn).double(), z.double().requires_grad_()
    y = exact(leaf)
    y.backward(grad.double())
    sizes = (3, 0, 5)
    processes, cuts = Processes(len(sizes)), list(slices_of(sizes))

    @torch.no_grad()
    def work(rank: int) -> tuple[nn.BatchNorm2d, Tensor, Tensor]:
        mine, total = copy.deepcopy(bn).to(device), processes.total(rank)
        share = z[cuts[rank]].to(device, copy=True)
        out, stats = norm_first(mine, share, False, total=total)
        found = norm_backward(mine, grad[cuts[rank]].to(device), share, stats, True, total, spent=True)
        grad_z = found.operands[0]
        for parameter, one in found.parameters:
            accumulate(parameter, one)
        assert out.dtype == grad_z.dtype == dtype
        return mine.cpu(), out.cpu(), grad_z.cpu()

    norms, outs, grads = zip(*processes.run(work), strict=True)
    assert leaf.grad is not None
    wanted = {"output": y.detach(), "gradient": leaf.grad, **dict(exact.named_buffers())}
    found = {"output": torch.cat(outs), "gradient": torch.cat(grads), **dict(norms[0].named_buffers())}
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        wanted[name] = parameter.grad
        found[name] = torch.stack([norm.get_parameter(name).grad for norm in norms]).sum(0)
    return relative_error(wanted, found)
