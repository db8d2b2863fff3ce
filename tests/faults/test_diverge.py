"""Losses that break, in real runs: a poisoned batch, learning rates at which the net explodes."""

from __future__ import annotations

import csv
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.cli.main import main
from lowmem.config.settings import Settings
from lowmem.core.errors import Diverged, ExitCode, Interrupted
from lowmem.data import TrainBatches
from lowmem.lifecycle import resume_training, run_training
from lowmem.runs import checkpoint as checkpoints
from lowmem.step.train_step import TrainStep
from tests.conftest import assert_same_run
from tests.faults.injection import events
from tests.tiny import arguments, tiny

OWN = ("model.width=4", "train.batch=16", "data.train_subset=160")  # ten steps an epoch


def settings(*sets: str) -> Settings:
    return tiny(*OWN, *sets)


@contextmanager
def poisoned(at: tuple[int, int], times: int = 1, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The pictures of one (epoch, step) are no numbers, the first `times` times that they are asked for; and `then`."""
    fetch, left = TrainBatches.batch, [times]

    def batch(self: TrainBatches, epoch: int, step: int, **formats: Any) -> tuple[Tensor, Tensor]:
        images, labels = fetch(self, epoch, step, **formats)
        if (epoch, step) == at and left[0]:
            left[0] -= 1
            images = images * math.nan
            then()
        return images, labels

    TrainBatches.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainBatches.batch = fetch  # type: ignore[method-assign]


@contextmanager
def killed(at: tuple[int, int]) -> Iterator[None]:
    """The process ends, saving nothing, when it asks for the pictures of this (epoch, step)."""
    fetch = TrainBatches.batch

    def batch(self: TrainBatches, epoch: int, step: int, **formats: Any) -> tuple[Tensor, Tensor]:
        if (epoch, step) == at:
            raise ConnectionAbortedError
        return fetch(self, epoch, step, **formats)

    TrainBatches.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainBatches.batch = fetch  # type: ignore[method-assign]


def rows(path: Path, name: str) -> list[dict[str, str]]:
    with open(path / name, newline="") as file:
        return list(csv.DictReader(file))


def assert_all_finite(path: Path) -> None:
    for one in checkpoints.checkpoint_folders(path / "checkpoints"):
        saved = checkpoints.load(one)
        assert all(bool(torch.isfinite(t).all()) for t in (*saved.model.values(), *saved.optimizer.values()))
    assert all(math.isfinite(float(row["loss"])) for row in rows(path, "steps.csv"))
    assert all(math.isfinite(float(row["train_loss"])) for row in rows(path, "metrics.csv"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(settings(), tmp_path_factory.mktemp("clean") / "run").path


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NaN in step 14, where step 10 is saved."""
    with poisoned((1, 3)):
        return run_training(settings(), tmp_path_factory.mktemp("rolled") / "run").path


def test_it_goes_back_and_on_at_half_the_rate(rolled_back: Path, clean: Path) -> None:
    (event,) = events(rolled_back, "rollback")
    assert event["what"] == "the training loss is nan"
    assert (event["step"], event["checkpoint"], event["rollbacks"]) == (14, "step-00000010", 1)
    assert event["lr_scale"] == 0.5
    ours, theirs = rows(rolled_back, "metrics.csv"), rows(clean, "metrics.csv")
    assert ours[0]["train_loss"] == theirs[0]["train_loss"]
    assert [float(one["lr"]) / float(other["lr"]) for one, other in zip(ours, theirs, strict=True)] == [1, 0.5, 0.5]
    for name in ("steps.csv", "gradients.csv"):
        assert [row["step"] for row in rows(rolled_back, name)] == [str(step) for step in range(1, 31)]
    assert_all_finite(rolled_back)


def test_a_resume_after_it_is_exact(rolled_back: Path, tmp_path: Path) -> None:
    """Stopped in the epoch in which it went back, and in the next."""
    path = tmp_path / "run"
    with poisoned((1, 3)):
        assert not run_training(settings("train.max_steps=16"), path).finished
    resume_training(path, settings("train.max_steps=23"))
    resume_training(path, settings())
    assert_same_run(path, rolled_back)


@pytest.mark.slow
def test_killed_right_after_it(rolled_back: Path, tmp_path: Path) -> None:
    """Nothing was saved since it went back but that: the rate is not forgotten."""
    path = tmp_path / "run"
    with poisoned((1, 3)), killed((1, 5)), pytest.raises(ConnectionAbortedError):
        run_training(settings(), path)
    assert checkpoints.checkpoint_folders(path / "checkpoints")[0].name == "step-00000010"
    resume_training(path, settings())
    assert_same_run(path, rolled_back)


@pytest.mark.slow
def test_it_goes_back_to_where_the_run_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_training(settings("train.max_steps=11"), path)
    with poisoned((1, 3)):
        resume_training(path, settings())
    (event,) = events(path, "rollback")
    assert event["checkpoint"] == "step-00000011"
    lr = [float(row["lr"]) for row in rows(path, "steps.csv")]
    assert (lr[10], lr[11]) == (2 * lr[12], lr[12])
    assert_all_finite(path)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_stopping_leaves_the_last_finite_state(every: int, clean: Path, tmp_path: Path) -> None:
    """Whatever saves in between: what is saved is sound, and a resume from it is the run without poison."""
    path = tmp_path / "run"
    asked = settings("train.on_nan=stop", "checkpoint.every_steps=1", f"train.log_every_steps={every}")
    with poisoned((1, 3)), pytest.raises(Diverged, match=r"nan at step 14 \(epoch 2\).*lowmem fork") as raised:
        run_training(asked, path)
    assert raised.value.exit_code is ExitCode.DIVERGED
    assert ExitCode.DIVERGED == 6
    assert checkpoints.checkpoint_folders(path / "checkpoints")[0].name == "step-00000013"
    assert [event["step"] for event in events(path, "diverged")] == [14]
    resume_training(path, settings("checkpoint.every_steps=1", "train.log_every_steps=1"))
    last = [checkpoints.load(checkpoints.checkpoint_folders(one / "checkpoints")[0]) for one in (path, clean)]
    assert all(torch.equal(last[0].model[name], tensor) for name, tensor in last[1].model.items())
    assert all(torch.equal(last[0].optimizer[name], tensor) for name, tensor in last[1].optimizer.items())


def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path: Path) -> None:
    """The weights broke in an update whose loss was finite, and were saved: found at the next step's loss."""
    path = tmp_path / "run"
    run_training(settings("train.max_steps=12"), path)
    newest = checkpoints.load(checkpoints.checkpoint_folders(path / "checkpoints")[0])
    tensors = {**newest.model, "conv1.weight": newest.model["conv1.weight"] * math.inf}
    checkpoints.save(path / "checkpoints", checkpoints.Checkpoint(12, tensors, newest.optimizer, newest.state), keep=2)
    resume_training(path, settings())
    (event,) = events(path, "rollback")
    assert (event["step"], event["checkpoint"]) == (13, "step-00000010")
    assert (path / "checkpoints/damaged-step-00000012").is_dir()
    assert_all_finite(path)


@pytest.mark.parametrize("value", [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])
def test_the_last_update_of_an_epoch(value: float, tmp_path: Path) -> None:
    """The weights break when no loss of the epoch is left to show it: the evaluation does, and nothing is exported."""
    call, left = TrainStep.__call__, [21]  # the preflight's trial step is the first

    def step(self: TrainStep, *arguments: Any) -> Tensor:
        totals = call(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            self.model.state_dict()["conv1.weight"].fill_(value)
        return totals

    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", step)
        run_training(settings(), path)
    (event,) = events(path, "rollback")
    assert (event["step"], event["checkpoint"]) == (20, "step-00000010")
    assert [row["epoch"] for row in rows(path, "metrics.csv")] == ["1", "2", "3"]
    assert_all_finite(path)


def test_poison_that_stays_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with poisoned((1, 3), times=9), pytest.raises(Diverged, match="going back 3 times did not help"):
        run_training(settings(), path)
    assert [event["lr_scale"] for event in events(path, "rollback")] == [0.5, 0.25, 0.125]
    assert checkpoints.load(checkpoints.checkpoint_folders(path / "checkpoints")[0]).state["run"]["lr_scale"] == 0.125
    # What is saved is sound; the rows after it are what happened, and a resume cuts them off.
    assert rows(path, "steps.csv")[-1]["loss"] == "nan"


def test_a_loss_far_above_chance_for_long(tmp_path: Path) -> None:
    """Finite, but in the hundreds and thousands: a bias that has exploded, which does not come back at this rate. How
    far above it is from row to row depends on the processor's rounding."""
    path = tmp_path / "run"
    sets = ("train.log_every_steps=10", "data.train_subset=480", "train.batch=4", "train.epochs=2")
    run_training(settings("train.max_steps=5", *sets), path)
    newest = checkpoints.load(checkpoints.checkpoint_folders(path / "checkpoints")[0])
    tensors = {**newest.model, "linear.bias": torch.tensor([1e5, *[0.0] * 9])}
    checkpoints.save(path / "checkpoints", checkpoints.Checkpoint(5, tensors, newest.optimizer, newest.state), keep=2)
    with pytest.raises(Diverged, match=r"the training loss has been above 11\.5 for 100 steps at step 100"):
        resume_training(path, settings("train.on_nan=stop", *sets))
    assert checkpoints.checkpoint_folders(path / "checkpoints")[0].name == "step-00000005"
    losses = [float(row["loss"]) for row in rows(path, "steps.csv")]
    assert all(11.5 < loss < math.inf for loss in losses)
    assert max(losses) > 1000


def test_a_broken_loss_is_undone_before_the_run_is_left(tmp_path: Path) -> None:
    """By train.max_steps, and by a signal in the very step that breaks it, in steps whose losses nobody has fetched."""
    path, sets = tmp_path / "asked", ("train.log_every_steps=5", "checkpoint.every_steps=4")
    with poisoned((1, 2)):
        run_training(settings("train.max_steps=13", *sets), path)
    (event,) = events(path, "rollback")
    assert (event["step"], event["checkpoint"]) == (13, "step-00000012")
    assert [event["step"] for event in events(path, "stop")] == [13]
    assert_all_finite(path)
    path = tmp_path / "signalled"
    with (
        poisoned((1, 2), then=lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(Interrupted, match="SIGTERM"),
    ):
        run_training(settings(*sets), path)
    (event,) = events(path, "rollback")
    assert (event["step"], event["checkpoint"]) == (13, "step-00000012")
    assert [event["step"] for event in events(path, "signal")] == [13]
    assert_all_finite(path)


def test_a_rate_that_breaks_the_net(tmp_path: Path) -> None:
    """lr 1e6: no number in the first epoch, at half of it neither, and so on; the run is left as it began."""
    path = tmp_path / "run"
    with pytest.raises(Diverged, match=r"training loss is nan .* going back 3 times did not help"):
        run_training(settings("optim.lr=1e6"), path)
    assert [event["lr_scale"] for event in events(path, "rollback")] == [0.5, 0.25, 0.125]
    (first,) = checkpoints.checkpoint_folders(path / "checkpoints")
    assert first.name == "step-00000000"
    assert checkpoints.load(first).state["run"]["lr_scale"] == 0.125


def test_the_command_leaves_with_code_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", *arguments(*OWN, "optim.lr=1e6"), "--on-nan", "stop", "--out", str(tmp_path / "run")])
    assert left.value.code == 6
    said = capsys.readouterr().err
    assert "the training loss is nan" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(("flag", "said"), [("--on-nan", "rollback or stop"), ("--on-stuck", "warn or stop")])
def test_other_words_are_refused(flag: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", flag, "ignore"])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
