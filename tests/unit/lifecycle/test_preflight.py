"""The trial step before the first one: it leaves no bit changed, takes a smaller plan if it must, and says what the run
will take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.choose.decide import DataSize, decide
from lowmem.config.settings import Settings, to_yaml
from lowmem.data import load
from lowmem.lifecycle.preflight import StepTrial, _time_line, try_step
from lowmem.plan.record import Plan
from lowmem.runs.store import RunFolder
from lowmem.step.train_step import Score
from lowmem.train.loop import Trainer
from tests.faults.injection import Scarce, events, make_trainer, recorded_plan
from tests.tiny import tiny


def _settings(*sets: str) -> Settings:
    return tiny(
        "data.train_subset=120", "data.test_subset=50", "train.batch=50", "train.epochs=2",
        "train.memory_format=contiguous", *sets,
    )  # fmt: skip


def _trainer(settings: Settings, plan: Plan | None = None) -> Trainer:
    return make_trainer(settings, load(settings.config.data, settings.config.seed), plan)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """With at least two smaller ones below it."""
    plan = decide(_settings("memory.tensors=6M"), DataSize(10, 120)).plan
    assert plan is not None
    assert len(plan.ladder) >= 2
    return plan


@contextmanager
def _folder(path: Path, settings: Settings) -> Iterator[RunFolder]:
    with RunFolder.create(path, to_yaml(settings), {}) as folder:
        yield folder


def _bits(trainer: Trainer) -> dict[str, Any]:
    """Everything that a step may change."""
    optimizer = trainer.optimizer
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {
        "model": {name: _frozen(tensor) for name, tensor in trainer.model.state_dict().items()},
        "slots": {
            names[parameter]: {slot: _frozen(value) for slot, value in own.items()}
            for parameter, own in optimizer.state.items()
        },
        "rates": [group["lr"] for group in optimizer.param_groups],
        "scaler": trainer.step.scaler.state_dict(),
        "notes": [hasattr(optimizer, note) for note in ("grad_scale", "found_inf")],
        "gradients": [parameter.grad for parameter in trainer.model.parameters()],
        "state": vars(trainer.state).copy(),
        "training": [module.training for module in trainer.model.modules()],
    }


def _frozen(value: object) -> object:
    return (value.stride(), value.numpy().tobytes()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("optim.momentum=0.0",),
        ("train.memory_format=channels-last", "model.width=16", "optim.nesterov=true"),
        ("memory.tensors=6M",),
        ("train.precision=amp",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_step_is_undone_to_the_last_bit(
    tmp_path: Path, plan: Plan, sets: tuple[str, ...], steps_before: int
) -> None:
    settings = _settings(*sets)
    trainer = _trainer(settings, plan if settings.config.memory.tensors is not None else None)
    # fp16 needs a card, its scaler does not; with every step the scale doubles.
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step in range(steps_before):
        trainer.step(*trainer.batches.batch(0, step), 0.05)
    trainer.state.step_in_epoch = trainer.state.step = steps_before
    before = _bits(trainer)
    with _folder(tmp_path / "run", settings) as folder:
        tried = try_step(trainer, folder)
    assert _bits(trainer) == before
    assert (tried.step.count, tried.evaluation.count) == (20 if steps_before else 50, 50)
    assert tried.step_seconds > 0 < tried.evaluation_seconds


# -- out of memory -----------------------------------------------------------------------------------------------------


def _scarce(trainer: Trainer, scarce: Scarce, failures: int) -> None:
    """Armed whenever a batch is fetched, until it has failed so often."""
    fetch = trainer.batches.batch

    def batch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if scarce.failures < failures:
            scarce.arm()
        return fetch(*args, **kwargs)

    trainer.batches.batch = batch  # type: ignore[method-assign]


@pytest.mark.parametrize("in_update", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_out_of_memory_takes_the_next_plan(tmp_path: Path, plan: Plan, in_update: bool) -> None:
    settings = _settings("memory.tensors=6M")
    trainer = _trainer(settings, plan)
    before = _bits(trainer)
    scarce = Scarce(set() if in_update else {30})
    scarce.fail_update = in_update
    _scarce(trainer, scarce, failures=2)
    with _folder(tmp_path / "run", settings) as folder, scarce:
        try_step(trainer, folder)
    assert scarce.failures == 2
    assert _bits(trainer) == before
    assert trainer.plan is not None
    assert trainer.plan.budget_bytes == plan.ladder[1].budget_bytes
    assert recorded_plan(tmp_path / "run").to_json() == trainer.plan.to_json()
    assert [event["phase"] for event in events(tmp_path / "run", "out-of-memory")] == [
        "update" if in_update else "forward"
    ] * 2


def test_an_evaluation_that_does_not_fit_is_tried_with_half_the_batch(tmp_path: Path) -> None:
    settings = _settings()
    trainer = _trainer(settings)
    scarce, fetch = Scarce({10}), trainer.dataset.test.take

    def take(*args: Any) -> Any:
        if scarce.failures < 1:
            scarce.arm()
        return fetch(*args)

    object.__setattr__(trainer.dataset.test, "take", take)
    with _folder(tmp_path / "run", settings) as folder, scarce:
        tried = try_step(trainer, folder)
    assert (scarce.failures, tried.evaluation.count) == (1, 25)


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_the_time_is_steps_evaluations_and_saves() -> None:
    trainer = _trainer(_settings("train.epochs=100", "data.val_split=20"))  # 100 pictures: 2 steps of 50 an epoch
    tried = StepTrial(6.0, Score(100.0, 40.0, 50), 3.0, Score(10.0, 5.0, 10), ("w",), (1.0,))
    # Evaluation: 3 s for 10 pictures, there are 50 and 20 held back: 21 s.
    assert _time_line(trainer, tried, 3.0).startswith("time: about 1:00:00 for 100 epochs of 2 steps: 6.000 s")
    trainer.state.epoch, trainer.state.step, trainer.state.step_in_epoch = 98, 197, 1
    assert _time_line(trainer, tried, 3.0).startswith("time: about 1:06 for 2 epochs")


def test_the_time_until_max_steps() -> None:
    trainer = _trainer(_settings("train.max_steps=3"))
    tried = StepTrial(10.0, Score(100.0, 40.0, 50), 5.0, Score(50.0, 25.0, 50), ("w",), (1.0,))
    # 120 pictures at 0.2 s are the three steps of the first epoch, which is evaluated and saved.
    assert _time_line(trainer, tried, 1.0).startswith("time: about 0:30 for 3 steps (train.max_steps)")
