"""Runs on pictures of another size than 32: trained, resumed bit for bit, forked to another size, planned for theirs;
and a network on pictures that are cut from the disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from lowmem.choose.execution import budget_of, request_of, resolve_execution
from lowmem.choose.planning import choose
from lowmem.cli.main import _run
from lowmem.config.schema import Config, nest
from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
from lowmem.core.units import MIB
from lowmem.data import load
from lowmem.data.pictures import MOST_HELD_BYTES, MappedPictures
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.step.undo import Undo
from lowmem.train.observer import Observer
from lowmem.train.replica import Replica
from lowmem.trial.plan_trial import trial_of
from lowmem.trial.worker import work
from tests.conftest import assert_same_run
from tests.tiny import Heard, tiny


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, bright and dark: twelve training and four test pictures, 100 by 90."""
    root = tmp_path_factory.mktemp("data") / "pets"
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name, level in (("bright", 128), ("dark", 0)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level, level + 128, (90, 100, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def of_pets(pets: Path, size: int, *changes: str) -> list[str]:
    return [
        f"data.source=folder:{pets}", f"data.cache={pets.parent / 'cache'}", f"data.image_size={size}",
        "data.train_subset=null", "data.test_subset=null", "train.batch=5", "train.epochs=2", *changes,
    ]  # fmt: skip


def test_a_run_is_resumed_bit_for_bit_and_says_its_size(pets: Path, tmp_path: Path) -> None:
    run_training(tiny(*of_pets(pets, 48, "train.epochs=1")), tmp_path / "whole")
    run_training(tiny(*of_pets(pets, 48, "train.epochs=1", "train.max_steps=2")), tmp_path / "run")
    assert resume_training(tmp_path / "run", {"train.max_steps": None}).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "env.json").read_text())["image_size"] == 48
    with safe_open(tmp_path / "run" / "weights" / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lowmem"])["image_size"] == 48


def test_the_size_is_changed_by_a_fork_and_not_by_a_resume(pets: Path, tmp_path: Path) -> None:
    run_training(tiny(*of_pets(pets, 32, "train.epochs=1")), tmp_path / "run")
    with pytest.raises(UsageError, match=r"data\.image_size"):
        resume_training(tmp_path / "run", {"data.image_size": 48})
    heard = Heard()
    changes = {"data.image_size": 48, "train.epochs": 2}
    assert fork_run(tmp_path / "run", at="last", changes=changes, out=tmp_path / "fork", observer=heard).finished
    assert "data.image_size: 32 -> 48" in heard.notes
    with pytest.raises(UsageError, match="res20 takes no pictures of 64x64"):
        fork_run(tmp_path / "run", at="last", changes={**changes, "data.image_size": 64}, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_size_that_the_network_does_not_take_is_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in (["train", "--data", "shapes", "--out", str(tmp_path / "run")], ["plan", "--tensors", "2G"]):
        assert _run([*command, "--arch", "res20", "--image-size", "224"]) == 2
        said = capsys.readouterr().err
        assert "res20 takes no pictures of 224x224" in said
        assert "give another --image-size, like 32, or another network" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


def test_a_plan_is_for_the_size() -> None:
    """And real steps take what it says."""
    settings = tiny("data.image_size=48", "memory.tensors=64M", "train.memory_format=contiguous")
    config = resolve_execution(settings, planned=True).config
    choice = choose(request_of(config, 10, 60))
    trial = replace(trial_of(config, choice.plan, choice.budget, 10, 60), steps=1, warmup=1, eval_batch=None)
    predicted = choice.plan.predicted.peak_allocated_bytes
    assert predicted is not None
    # On the CPU tensors are counted as they are, in the plan rounded as on a card. At 32 it would be half of it.
    assert 0.95 * predicted < work(asdict(trial))["peak_allocated_bytes"] <= predicted


def test_pictures_on_a_card_are_counted_by_their_size() -> None:
    def counted(source: str, size: int, count: int) -> int:
        flat = {"data.source": source, "data.image_size": size, "memory.vram": "6G", "memory.card": "gtx1060-6g"}
        return budget_of(Config.model_validate(nest(flat)), count)[0].pictures_bytes

    assert counted("cifar10", 32, 50_000) == 50_000 * 3 * 32 * 32
    assert counted("cifar10", 48, 50_000) == 50_000 * 3 * 32 * 32  # enlarged as a batch
    assert counted("folder:x", 48, 1000) == 1000 * 3 * 48 * 48
    assert counted("folder:x", 48, 1_000_000) == 0  # copied, a batch at a time
    assert counted("folder:x", 224, 1000) == 0  # from the disk
    most = MOST_HELD_BYTES // (3 * 32 * 32)
    assert counted("folder:x", 32, most) == most * 3 * 32 * 32
    assert counted("folder:x", 32, most + 1) == 0
    flat = {"data.image_size": 48, "memory.tensors": 256 * MIB}
    assert request_of(Config.model_validate(nest(flat))).image_shape == (3, 48, 48)


# -- from the disk -----------------------------------------------------------------------------------------------------


def replica_of(config: Config) -> Replica:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 2))
    return Replica(config, model, load(config.data, config.seed), Observer())


def trained(replica: Replica, steps: range) -> list[Tensor]:
    undo, losses = Undo(replica.step, replica.model), []
    for step in steps:
        epoch, within = divmod(step, replica.batches.steps_per_epoch)
        images, labels, size, _ = replica.next_batch(epoch, within)
        assert tuple(images.shape) == (len(labels), 3, 64, 64)
        losses.append(undo.attempt(lambda: replica.step(images, labels, 0.1, None, size)))  # noqa: B023 (called at once)
        replica.state.step += 1
    return losses  # type: ignore[return-value]


def test_a_network_trains_on_pictures_from_the_disk_and_goes_on_bit_for_bit(pets: Path) -> None:
    settings = resolve_execution(gather(sets=[*of_pets(pets, 64), "train.device=cpu", "train.precision=fp32"]))
    whole = replica_of(settings.config)
    assert isinstance(whole.dataset.train, MappedPictures)
    losses = trained(whole, range(6))
    assert len({float(loss[0]) for loss in losses}) == 6
    part = replica_of(settings.config)
    trained(part, range(4))
    saved = part.checkpoint()
    again = replica_of(settings.config)
    again.state = again.restore(saved)
    assert all(torch.equal(a, b) for a, b in zip(losses[4:], trained(again, range(4, 6)), strict=True))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    score, same = (one.evaluate(one.dataset.test, 3) for one in (whole, again))
    assert score is not None
    assert score == same
    assert score.count == 4
