"""Batch norm over several processes on CUDA's kernels: slices of a batch equal the whole batch, one slice is empty.

The "processes" are threads that share the card's stream. They call the executor's `Run` themselves: under autograd all
backwards of a card would run in one thread, which cannot wait for itself.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.resnet import BasicBlock, Bottleneck
from lowmem.plan.policy import LEAN, SAVE_ALL, keep
from lowmem.remat import decompose
from lowmem.remat.batch_norm import norm_again, norm_first
from lowmem.remat.executor import Run
from tests.exact.compare import FORMAT_NAMES, FORMATS, small_net
from tests.exact.processes import Processes, error_of_one_norm, relative_error, slices_of
from tests.exact.schedules import segments, uniform

DEVICE = "cuda"
SIZES = (2, 0, 3)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
by_format = pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_NAMES)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
    ids=str,
)
@by_format
def test_one_norm(memory_format: Any, dtype: torch.dtype, tolerance: float) -> None:
    assert error_of_one_norm(DEVICE, dtype, memory_format) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_format
@torch.no_grad()
def test_recomputations_have_the_same_bits(memory_format: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(16).to(DEVICE)
    z = (torch.randn(4, 16, 5, 5) * 3 + 2).to(DEVICE, dtype).contiguous(memory_format=memory_format)
    first, stats = norm_first(bn, z.clone(), True, total=lambda values: None)
    for in_place in (False, True):
        assert torch.equal(norm_again(bn, z.clone(), stats, in_place), first)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("schedule", ["lean", "keep", "save-all", "segments"])
@by_format
def test_slices_equal_the_whole_batch(block: Any, schedule: str, memory_format: Any) -> None:
    model = small_net(block).double().to(DEVICE).to(memory_format=memory_format)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(SIZES), 3, 32, 32, generator=generator, dtype=torch.float64)
    x = x.to(DEVICE).contiguous(memory_format=memory_format)
    labels = torch.randint(10, (len(x),), generator=generator).to(DEVICE)
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), labels).backward()
    processes, cuts = Processes(len(SIZES)), list(slices_of(SIZES))

    @torch.no_grad()
    def work(rank: int) -> nn.Module:
        mine = copy.deepcopy(model)
        stages = decompose(mine)
        policy = {"lean": LEAN, "keep": keep("conv2"), "save-all": SAVE_ALL, "segments": LEAN}[schedule]
        plan = segments(stages, 3, policy) if schedule == "segments" else uniform(stages, policy)
        run = Run(stages, None, False, total=processes.total(rank))
        logits, run.entries = run.forward(plan, [x[cuts[rank]].contiguous(memory_format=memory_format)])
        assert logits is not None
        run.backward(run.entries, [_grad(logits, labels[cuts[rank]], len(x))])
        return mine

    models = processes.run(work)
    wanted, found = dict(plain.named_buffers()), dict(models[0].named_buffers())
    for name, buffer in found.items():
        assert all(torch.equal(buffer, other.get_buffer(name)) for other in models), name
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        wanted[name] = parameter.grad
        found[name] = torch.stack([other.get_parameter(name).grad for other in models]).sum(0)
    assert relative_error(wanted, found) < 1e-11


def _grad(logits: Tensor, labels: Tensor, whole: int) -> Tensor:
    """The mean cross-entropy's, over the whole batch."""
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / whole
