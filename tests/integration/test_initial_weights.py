"""Runs that begin with weights of others, some of them frozen: from a run with other classes, from a file, from
torchvision's cache; resumed and forked without the file, and by two processes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem.cli.main import _run
from lowmem.config.schema import ModelConfig
from lowmem.config.settings import from_yaml
from lowmem.core.errors import PreflightError, UsageError
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.models import make_network
from lowmem.runs import checkpoint as checkpoints
from tests import pictures
from tests.conftest import assert_same_run
from tests.distributed.torchrun import torchrun
from tests.tiny import Heard, arguments, make_run, tiny

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, width=4):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.features = nn.Sequential(first, nn.Conv2d(width, width, 3))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))
"""
FROZEN = ("conv1", "bn1", "layer1*", "layer2.1.bn1")


def _begin(run: Path) -> dict[str, Tensor]:
    """Of the checkpoint before the first step."""
    return dict(checkpoints.load(run / "checkpoints" / checkpoints.folder_name(0)).model)


def _newest(run: Path) -> dict[str, Tensor]:
    return dict(checkpoints.load(checkpoints.checkpoint_folders(run / "checkpoints")[0]).model)


def _event(run: Path, name: str) -> dict[str, Any]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    (found,) = [event for event in map(json.loads, lines) if event["event"] == name]
    return dict(found)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten classes."""
    return make_run(tmp_path_factory.mktemp("parent") / "run")


@pytest.fixture
def pets(tmp_path: Path) -> tuple[str, ...]:
    """Settings of pictures of two classes."""
    folder = pictures.pets(tmp_path, size=(32, 32))
    cache = f"data.cache={tmp_path / 'cache'}"
    subsets = ("data.train_subset=null", "data.test_subset=null", "train.batch=4", "train.epochs=1")
    return f"data.source=folder:{folder}", cache, *subsets


def test_the_best_of_a_run_with_other_classes(parent: Path, pets: tuple[str, ...], tmp_path: Path) -> None:
    run, heard = tmp_path / "run", Heard()
    frozen = f"train.freeze=[{', '.join(FROZEN)}]"
    settings = tiny(*pets, f"train.init={parent}", frozen, "checkpoint.keep=9", "train.memory_format=contiguous")
    run_training(settings, run, heard)
    best = parent / "weights" / "best.safetensors"
    given, begin, end = load_file(best), _begin(run), _newest(run)
    new = make_network(ModelConfig(arch="res20", width=2), 2, seed=0).state_dict()
    assert begin.keys() == given.keys()
    for name, tensor in begin.items():
        assert torch.equal(tensor, new[name] if name.startswith("linear") else given[name]), name
    moved = {name for name in begin if not torch.equal(begin[name], end[name])}
    stays = ("conv1", "bn1", "layer1", "layer2.1.bn1")
    assert moved == {name for name in begin if not name.startswith(stays)}
    at = heard.notes.index(f"initial weights: {parent} (best.safetensors, SHA-256 {_sha256(best)[:12]})")
    assert [line.split() for line in heard.notes[at + 1 : at + 3]] == [
        ["loaded", "132", "conv1,", "bn1,", "layer1,", "layer2,", "layer3,", "layer4"],
        ["of", "another", "shape", "there:", "new", "2", "linear"],
    ]
    assert from_yaml(run / "config.yaml").config.train.init_sha256 == _sha256(best)
    assert _event(run, "initial weights")["new"] == ["linear.weight", "linear.bias"]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of the tiny network's weights, as if DataParallel had trained them."""
    tensors = make_network(ModelConfig(arch="res20", width=2), seed=5).state_dict()
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def _settings(weights: Path, *changes: str) -> tuple[str, ...]:
    frozen = f"train.freeze=[{', '.join(FROZEN)}]"
    return f"train.init={weights}", frozen, "optim.ema=0.9", "checkpoint.keep=9", "train.epochs=2", *changes


@pytest.mark.parametrize("budget", ["memory.tensors=null", "memory.tensors=1300K"])
def test_a_run_does_not_need_the_file_again(weights: Path, tmp_path: Path, budget: str) -> None:
    """Resumed in the middle of an epoch it is the run that was never stopped; a fork goes on from it too."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_training(tiny(*_settings(weights, budget)), whole)
    begin = _begin(whole)
    assert all(torch.equal(begin[name.removeprefix("module.")], one) for name, one in load_file(weights).items())
    saved = checkpoints.load(whole / "checkpoints" / checkpoints.folder_name(0)).optimizer
    means = {key.removeprefix("ema/"): one for key, one in saved.items() if key.startswith("ema/")}
    assert means
    assert all(torch.equal(begin[name], mean) for name, mean in means.items()), "means begin with what was loaded"
    run_training(tiny(*_settings(weights, budget, "train.max_steps=4")), run)
    weights.unlink()
    resume_training(run, {"train.max_steps": None})
    assert_same_run(run, whole)
    thawed = tmp_path / "thawed"
    fork_run(whole, at="last", changes={"train.freeze": [], "train.epochs": 3}, out=thawed)
    moved = {name for name, tensor in _newest(thawed).items() if not torch.equal(tensor, begin[name])}
    assert moved == begin.keys()
    with pytest.raises(UsageError, match=r"train\.init decides how a run is begun, and cannot be changed in a fork"):
        fork_run(whole, at="last", changes={"train.init": str(whole)}, out=tmp_path / "other")


def test_settings_that_are_repeated_want_the_same_file(weights: Path, tmp_path: Path) -> None:
    run_training(tiny(*_settings(weights, "train.max_steps=1")), tmp_path / "run")
    said = f"train.init_sha256={_sha256(weights)}"
    run_training(tiny(*_settings(weights, "train.max_steps=1", said)), tmp_path / "again")
    assert (tmp_path / "again/steps.csv").read_text() == (tmp_path / "run/steps.csv").read_text()
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(PreflightError, match="is not what was recorded"):
        run_training(tiny(*_settings(weights, said)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("sync_bn", [False, True])
def test_two_processes_have_the_same_bits(weights: Path, tmp_path: Path, sync_bn: bool) -> None:
    """The file is where rank 0 is; a budget, so that stages run under a plan."""
    plan = () if sync_bn else ("memory.tensors=1300K",)
    settings = _settings(weights, f"train.sync_bn={str(sync_bn).lower()}", *plan)
    code, output = torchrun(tmp_path, 2, "tests.integration.test_initial_weights", str(tmp_path), *settings)
    assert code == 0, output
    assert output.count("which was taken off") == 1, "rank 0 alone talks"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    begin, end = _begin(tmp_path / "whole"), _newest(tmp_path / "whole")
    assert all(torch.equal(begin[name.removeprefix("module.")], one) for name, one in load_file(weights).items())
    stays = {name for name in begin if torch.equal(begin[name], end[name])}
    assert stays == {name for name in begin if name.startswith(("conv1", "bn1", "layer1", "layer2.1.bn1"))}


def in_several_processes(folder: Path, settings: list[str]) -> None:
    """What each of them does: the run at once, and stopped and resumed."""
    run_training(tiny(*settings), folder / "whole", _Printing())
    run_training(tiny(*settings, "train.max_steps=4"), folder / "run")
    resume_training(folder / "run", {"train.max_steps": None})


class _Printing(Heard):
    def note(self, text: str) -> None:
        print(text, flush=True)


# -- as commands, other networks ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """A cache of torch hub, of which torchvision's file of ResNet-18 is another's weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    torch.hub.set_dir(before)


def test_torchvisions_with_another_head(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = make_network(ModelConfig(spec="torchvision:resnet18"), 20, seed=3).state_dict()
    torch.save(given, hub)
    spec = ("--model", "torchvision:resnet18", "--init", "torchvision")
    words = [word for word in _typed() if "model." not in word]
    freeze = [word for pattern in ("conv1", "bn1", "layer[1-3]*") for word in ("--freeze", pattern)]
    out, small = str(tmp_path / "run"), ("--batch", "4", "--tensors", "150M", "--set", "train.max_steps=1")
    assert _run(["train", *words, *spec, *freeze, *small, "--out", out, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr()
    assert "of another shape there: new    2  fc" in said.out + said.err
    assert "stem to layer3.1, 7 of 10 stages, keep nothing" in said.out + said.err
    assert _run(["train", *words, *spec, *freeze, *small, "--out", out]) == 0
    begin, end = _begin(tmp_path / "run"), _newest(tmp_path / "run")
    for name, tensor in begin.items():
        assert name.startswith("fc") or torch.equal(tensor, given[name])
        assert torch.equal(tensor, end[name]) == name.startswith(("conv1", "bn1", "layer1", "layer2", "layer3")), name


def _typed() -> list[str]:
    """The tiny run's words in pairs, one for each setting."""
    found = arguments()
    return [f"--set={found[at + 1]}" for at in range(0, len(found), 2)]


def test_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET)
    spec = f"{tmp_path / 'net.py'}:Net"
    given = make_network(ModelConfig(spec=spec), 10, seed=8).state_dict()
    torch.save({"state_dict": given, "epoch": 3}, tmp_path / "mine.pth")
    words = [word for word in _typed() if "model." not in word]
    for flags, code, text in (
        (("--init", str(tmp_path / "mine.pth"), "--freeze", "features.*", "--set", "checkpoint.keep=9"), 0, ""),
        (("--init", str(tmp_path / "gone.pth")), 3, "gone.pth cannot be read (No such file or directory)"),
        (("--init", str(tmp_path)), 2, "is no run folder"),
        (("--freeze", "feature.*"), 2, "did you mean features"),
        (("--freeze", "features", "--freeze", "head"), 2, "freezes every parameter"),
        (("--init", "torchvision"), 2, "--init torchvision takes the library's weights of its own network"),
    ):
        run = tmp_path / f"run{code}{len(text)}"
        assert _run(["train", *words, "--model", spec, *flags, "--out", str(run)]) == code, flags
        said = capsys.readouterr()
        assert code == 0 or text in said.out + said.err
        assert run.exists() == (code == 0)
        if code == 0:
            begin, end = _begin(run), _newest(run)
            assert all(torch.equal(tensor, given[name]) for name, tensor in begin.items())
            assert {name for name in end if not torch.equal(end[name], given[name])} == {"head.weight", "head.bias"}


def test_plan_takes_what_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--arch", "res20", "--width", "8", "--batch", "32", "--tensors", "40M"]
    assert _run([*words, "--freeze", "conv1", "--freeze", "bn1", "--freeze", "layer[12]*"]) == 0
    said = capsys.readouterr().out
    assert "stem to layer2.1, 5 of 11 stages, keep nothing: the backward pass does not come there." in said
    rows = {line[2:38].strip(): line.split()[-2] for line in said.splitlines() if line.endswith("MiB")}
    assert int(rows["plain PyTorch, with nothing frozen"]) > 2 * int(rows["plain PyTorch, for comparison"])


if __name__ == "__main__":
    in_several_processes(Path(sys.argv[1]), sys.argv[2:])
