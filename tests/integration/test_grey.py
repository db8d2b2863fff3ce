"""Runs on pictures of one channel: resumed bit for bit, planned for theirs, of the family and of a file's network; and
how networks are told of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import lowmem
from lowmem.choose.execution import request_of, resolve_execution
from lowmem.choose.planning import choose
from lowmem.cli.main import _run
from lowmem.config.schema import ModelConfig
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import PreflightError, UsageError
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.models import check_network, hashes_of, make_network, network_of
from lowmem.runs.view import read_run
from lowmem.runs.weights import read_weights
from lowmem.simulate import simulate_step
from lowmem.trial.plan_trial import trial_of
from lowmem.trial.worker import work
from tests.conftest import assert_same_run
from tests.exact.test_torchvision import RATES, counted_peak_bytes
from tests.tiny import Heard, sets

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels=3, width=16):
        super().__init__(nn.Conv2d(in_channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def chans(in_chans, num_classes):
    return Net(num_classes, in_chans)

def grey(num_classes):
    return Net(num_classes, 1)

def colour(num_classes):
    return Net(num_classes)

def others(num_classes, **others):
    return Net(num_classes, **others)
"""
BUDGETS = {"res20": "3M", "cnn20": "3M", "own": "1100K"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_net.py").write_text(NET)
    return tmp_path / "my_net.py"


def settings(arch: str, file: Path, *changes: str) -> Settings:
    """Six steps, three an epoch, with checkpoints within."""
    network = [f"model.spec={file}:Net"] if arch == "own" else [f"model.arch={arch}", "model.width=4"]
    base = [one for one in sets("train.epochs=2") if not one.startswith("model.")]
    return gather(sets=[*base, *network, "data.channels=1", "checkpoint.every_steps=2", *changes])


@pytest.mark.parametrize("arch", BUDGETS)
def test_a_planned_run_is_resumed_in_mid_epoch_bit_for_bit(arch: str, file: Path, tmp_path: Path) -> None:
    planned = f"memory.tensors={BUDGETS[arch]}"
    run_training(settings(arch, file, planned), tmp_path / "whole", Heard())
    run_training(settings(arch, file, planned, "train.max_steps=4"), tmp_path / "run", Heard())
    assert resume_training(tmp_path / "run", {"train.max_steps": None}).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    events = read_run(tmp_path / "whole").events
    assert not [event for event in events if event.kind == "replan"]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    (plain,) = [one["peak_bytes"] for one in plan["candidates"] if one["what"].startswith("plain")]
    (peak,) = [event.detail["measured_peak_bytes"] for event in events if event.kind == "measured"]
    assert 0.95 * plan["predicted"]["peak_allocated_bytes"] < int(str(peak)) <= plan["budget_bytes"] < plain


@pytest.mark.parametrize("arch", ["res20", "own"])
def test_its_weights_say_so_and_are_loaded(arch: str, file: Path, tmp_path: Path) -> None:
    run_training(settings(arch, file, "train.epochs=1"), tmp_path / "run", Heard())
    shapes, info = read_weights(tmp_path / "run" / "weights" / "last.safetensors")
    assert shapes["0.weight" if arch == "own" else "conv1.weight"][1] == 1
    assert len(info.mean or ()) == len(info.std or ()) == 1
    assert json.loads((tmp_path / "run" / "env.json").read_text())["mean"] == list(info.mean or ())
    assert _run(["verify", str(tmp_path / "run")]) == 0
    loaded, images = lowmem.load_run(tmp_path / "run"), torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    assert info.mean is not None
    assert info.std is not None
    by_hand = (images / 255 - info.mean[0]) / info.std[0]
    assert torch.allclose(loaded.prepare(images), by_hand, atol=1e-5)
    assert loaded.model(loaded.prepare(images)).shape == (4, 10)
    assert _run(["evaluate", str(tmp_path / "run")]) == 0  # its figures are those of training, which is checked there
    assert (tmp_path / "run" / "evaluate" / "worst.png").stat().st_size > 5000
    Image.fromarray(torch.arange(256, dtype=torch.uint8).view(16, 16).numpy()).save(tmp_path / "grey.png")
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    assert _run(["predict", str(tmp_path / "run"), str(tmp_path / "grey.png"), str(tmp_path / "red.png")]) == 0
    with pytest.raises(UsageError, match=r"a tensor of them is uint8 \[N, 1, H, W\]"):
        loaded.prepare(images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(("arch", "layout"), [("res20", "contiguous"), ("own", "contiguous"), ("own", "channels-last")])
def test_bytes_are_counted_as_predicted(arch: str, layout: str, file: Path) -> None:
    changes = (f"memory.tensors={BUDGETS[arch]}", f"train.memory_format={layout}")
    config = resolve_execution(settings(arch, file, *changes), planned=True).config
    request = request_of(config, 10, 60)
    assert request.image_shape == (1, 32, 32)
    choice = choose(request)
    plan, predicted = choice.plan, choice.plan.predicted.peak_allocated_bytes
    assert predicted is not None
    trial = replace(trial_of(config, plan, choice.budget, 10, 60), steps=1, warmup=1, eval_batch=20)
    assert 0.95 * predicted < work(asdict(trial))["peak_allocated_bytes"] <= predicted
    if layout == "channels-last":
        return
    estimate = simulate_step(request.shape("fp32", plan.batch), plan.schedule, RATES).estimate
    assert counted_peak_bytes(network_of(config, seed=0), plan, 32, channels=1) == estimate.peak_tensor_bytes


def test_a_fork_keeps_the_channels(file: Path, tmp_path: Path) -> None:
    run_training(settings("res20", file, "train.max_steps=3"), tmp_path / "run", Heard())
    with pytest.raises(UsageError, match=r"data\.channels cannot become 3 in a fork: the weights are for 1 only"):
        fork_run(tmp_path / "run", at="last", changes={"data.channels": 3}, out=tmp_path / "fork")
    with pytest.raises(UsageError, match=r"data\.channels is 1 in .* on resume.*train another network with `lowmem tr"):
        resume_training(tmp_path / "run", {"data.channels": 3})


@pytest.mark.parametrize(
    ("name", "channels", "given"),
    [
        ("Net", 1, {}), ("Net", 3, {}), ("chans", 1, {}), ("chans", 3, {}), ("grey", 1, {}), ("colour", 3, {}),
        ("others", 3, {}), ("others", 1, {"in_channels": 1}), ("Net", 1, {"in_channels": 1}),
    ],
)  # fmt: skip
def test_a_network_is_told_the_channels_where_it_takes_them(
    file: Path, name: str, channels: int, given: dict[str, object]
) -> None:
    model = ModelConfig(spec=f"{file}:{name}", args=given)
    assert hashes_of(model, channels).keys() == {"my_net.py"}
    check_network(model, 10, (channels, 32, 32))
    assert make_network(model, 10, channels=channels, seed=0)(torch.zeros(2, channels, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "channels", "given", "has"),
    [
        ("colour", 1, {}, "3 channels"), ("others", 1, {}, "3 channels"), ("grey", 3, {}, "1 channel"),
        ("Net", 1, {"in_channels": 3}, "3 channels"),
    ],
)  # fmt: skip
def test_a_network_for_others_is_refused(
    file: Path, name: str, channels: int, given: dict[str, object], has: str
) -> None:
    model = ModelConfig(spec=f"{file}:{name}", args=given)
    with pytest.raises(PreflightError, match=f"takes pictures of {has}, and these have {channels}: let its first"):
        check_network(model, 10, (channels, 32, 32))


def test_torchvision_s_take_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "torchvision:resnet18", "--data", "shapes", "--set", "data.channels=1", "--device", "cpu"]
    assert _run(["train", *words, "--out", str(tmp_path / "run")]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "torchvision:resnet18 takes pictures of 3 channels, and these have 1: let its first convolution" in said
    assert "set data.channels (3: RGB, 1: grey)" in said
    assert not (tmp_path / "run").exists()


def test_what_is_told_of_a_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(settings("res20", file, "train.epochs=1"), tmp_path / "run", Heard())
    assert _run(["watch", "--once", str(tmp_path / "run")]) == 0
    assert "on shapes at 32x32 in grey" in capsys.readouterr().out
    assert _run(["report", str(tmp_path / "run")]) == 0
    assert "pictures seen as grey instead of in colour" in (tmp_path / "run" / "report" / "report.md").read_text()
