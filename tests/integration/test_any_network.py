"""A network of one's own as a newcomer trains it, typed as commands: from a file, on pictures in a folder, in less
than half of the memory that plain PyTorch takes; stopped and killed in mid-epoch, gone on with, the same run bit
for bit. The slow one: torchvision's ResNet-18 on photographs at 128x128."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowmem.cli.main import _run
from lowmem.core.reading import read_json
from lowmem.runs.view import read_run
from tests.conftest import assert_same_run, environment
from tests.pictures import photographs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

class Net(nn.Module):
    def __init__(self, num_classes=1000, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6(inplace=True))
        self.layer1 = nn.Sequential(*(Block(width, width, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(self.dropout(self.pool(x).flatten(1)))
"""


def interrupted(words: Sequence[str], run: Path, steps: int, name: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, which gets the signal once the run has so many steps."""
    command = [sys.executable, "-m", "lowmem", *words]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, file = time.monotonic() + 200, run / "steps.csv"
    while not (file.is_file() and len(file.read_text().splitlines()) > steps):
        assert time.monotonic() < deadline, "the run did not get going"
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def trains_through_everything(words: Sequence[str], steps: int, tmp_path: Path) -> Path:
    """Trained in one go, and stopped by Ctrl-C and killed, each in the middle of an epoch of `steps`; returns the
    latter."""
    train = ["train", *words, "--epochs", "2", "--device", "cpu", "--precision", "fp32"]
    train += ["--set", "train.log_every_steps=1", "--set", "checkpoint.every_steps=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert _run([*train, "--out", str(whole)]) == 0
    stopped = interrupted([*train, "--out", str(run)], run, steps // 2, "SIGINT")
    assert stopped.returncode == 130, stopped.stderr
    assert f"lowmem resume {run}" in stopped.stderr
    killed = interrupted(["resume", str(run)], run, steps + steps // 2, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert _run(["verify", str(run)]) == 0
    assert _run(["resume", str(run)]) == 0
    assert_same_run(whole, run)
    assert [event.detail for event in read_run(run).events if event.kind == "replan"] == []  # as it was planned
    return run


def test_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, pictures = np.random.default_rng(0), tmp_path / "pets"
    for part, count in (("train", 24), ("test", 6)):
        for name, level in (("bright", 128), ("dark", 0)):
            (pictures / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level, level + 128, (80, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(pictures / part / name / f"{number}.png")
    (tmp_path / "my_net.py").write_text(NET)
    words = ["--model", f"{tmp_path / 'my_net.py'}:Net", "--model-args", "width=6", "--image-size", "64"]
    words += ["--batch", "6", "--data", f"folder:{pictures}", "--set", f"data.cache={tmp_path / 'cache'}"]
    run = trains_through_everything([*words, "--tensors", "5500K"], 8, tmp_path)
    plan = read_json(run / "plan.json", 1 << 20)
    (plain,) = [one["peak_bytes"] for one in plan["candidates"] if one["what"].startswith("plain")]
    assert plan["predicted"]["peak_allocated_bytes"] <= plan["budget_bytes"] < plain / 2
    assert {"layer1.0", "layer2.1"} <= set(plan["blocks"])
    capsys.readouterr()
    assert _run(["watch", "--once", str(run)]) == 0
    assert "my_net.py:Net (width=6) on folder pets at 64x64, batch 6, fp32, cpu" in capsys.readouterr().out
    assert _run(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert "my_net-Net" in said
    assert "homework" not in said.lower()
    assert _run(["ls", "--json", str(tmp_path)]) == 0
    assert {one["spec"] for one in json.loads(capsys.readouterr().out)} == {f"{tmp_path / 'my_net.py'}:Net"}


@pytest.mark.slow
def test_resnet18_on_photographs(tmp_path: Path) -> None:
    enlarged(tmp_path / "pictures", {"train": 20, "test": 5})
    words = ["--model", "torchvision:resnet18", "--image-size", "128", "--batch", "16", "--tensors", "185M"]
    words += ["--data", f"folder:{tmp_path / 'pictures'}", "--set", f"data.cache={tmp_path / 'cache'}"]
    run = trains_through_everything(words, 13, tmp_path)
    peaks = [event.detail["measured_peak_bytes"] for event in read_run(run).events if event.kind == "measured"]
    assert peaks
    assert max(int(str(peak)) for peak in peaks) <= 185 << 20  # of every process that trained it


def enlarged(folder: Path, most: dict[str, int]) -> None:
    """So many of each class, at 160x160."""
    for part, kind, name, data in photographs(most):
        (folder / part / kind).mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture.resize((160, 160), Image.Resampling.BICUBIC).save(folder / part / kind / name, quality=92)
