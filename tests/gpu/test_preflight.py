"""The trial step before a run, undone on the card, with the scaler that only fp16 has. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem.choose.decide import Decision
from lowmem.choose.execution import resolve_execution
from lowmem.config.schema import OptimConfig
from lowmem.config.settings import gather, to_yaml
from lowmem.data import load
from lowmem.distributed.group import Group, Split
from lowmem.lifecycle.execute import make_trainer
from lowmem.lifecycle.preflight import try_step
from lowmem.models import build
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import make_optimizer, optimizer_tensors
from lowmem.train.observer import Observer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
@pytest.mark.parametrize("optim", [(), ("optim.kind=adamw", "optim.clip_norm=0.5", "optim.ema=0.9")])
def test_the_step_is_undone_to_the_last_bit(
    tmp_path: Path, precision: str, memory_format: str, optim: tuple[str, ...]
) -> None:
    flags = {"model.arch": "res20", "model.width": 16, "data.source": "shapes", "train.device": "cuda"}
    flags |= {"train.precision": precision, "train.memory_format": memory_format}
    settings = resolve_execution(gather(flags=flags, sets=["data.train_subset=500", "data.test_subset=100", *optim]))
    dataset = load(settings.config.data, 0)
    group = Group()
    decided = Decision(settings, None, Split((settings.config.train.batch,)))
    trainer = make_trainer(group, decided, dataset, Observer(), tmp_path / "run")
    trainer.step(*trainer.batches.batch(0, 0, memory_format=trainer.execution.torch_memory_format), 0.05)

    def state() -> list[torch.Tensor]:
        kept = optimizer_tensors(trainer.optimizer)
        return [tensor.cpu().clone() for tensor in (*trainer.model.state_dict().values(), *kept)]

    before, scaler = state(), trainer.step.scaler.state_dict()
    with RunFolder.create(tmp_path / "run", to_yaml(settings), {}) as folder:
        tried = try_step(trainer, folder)
    assert all(torch.equal(left, right) for left, right in zip(state(), before, strict=True))
    assert trainer.step.scaler.state_dict() == scaler
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert tried.step_seconds > 0


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(kind="adamw", decay_norms=False, ema=0.9)])
def test_the_update_allocates_nothing_from_the_first_on(optim: OptimConfig) -> None:
    """A step that runs out of memory does so before it."""
    model = build("res20", width=16).cuda()
    optimizer = make_optimizer(model, optim, "cuda")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() == before
