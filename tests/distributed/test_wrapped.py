"""A planned module inside DistributedDataParallel: two processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lowmem.plan.policy import LEAN, uniform
from lowmem.remat import apply_plan, decompose
from tests.exact.habits import Net, made, pictures


def _network() -> nn.Module:
    """With a block that runs as a whole, and a parameter whose hook changes its gradient."""
    net = made(lambda: Net(dropout=0.0))
    net.blocks[0].register_forward_hook(lambda *_: None)
    net.blocks[1].conv1.weight.register_hook(lambda grad: grad * 2)
    return net


def _train(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    gradients: list[Any] = []
    for planned in (False, True):
        net = _network()
        module = apply_plan(net, uniform([LEAN] * len(decompose(net)))) if planned else net
        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=planned)
        for step in range(3):
            x, labels = pictures(seed=rank + 10 * step)
            if step == 0:
                with wrapped.no_sync():
                    F.cross_entropy(wrapped(x), labels).backward()
            else:
                F.cross_entropy(wrapped(x), labels).backward()
        gradients.append({name: one.grad.clone() for name, one in net.named_parameters()})
    torch.save(gradients, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for plain, planned in (first, second):
        assert [name for name in plain if not torch.equal(plain[name], planned[name])] == []
    assert [name for name in first[1] if not torch.equal(first[1][name], second[1][name])] == []
