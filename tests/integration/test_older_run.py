"""A run that lowmem at commit 8033727 planned, began and stopped in the middle of its second epoch goes on, and what
reads a run reads it. `fixtures/planned-8033727` was made there by

    lowmem train --arch res20 --width 2 --data shapes --epochs 2 --batch 32 --vram 2400K --set data.train_subset=320 \\
        --set data.test_subset=64 --set train.log_every_steps=1 --set checkpoint.every_steps=5 --set train.max_steps=13
"""

from __future__ import annotations

import csv
import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from torch import nn

import lowmem
from lowmem.cli.main import _run
from lowmem.core.errors import CorruptCheckpoint
from lowmem.lifecycle import execute
from lowmem.runs.view import recorded_settings
from tests.conftest import assert_same_tensors, environment

STEPS_PER_EPOCH = 10


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).with_name("fixtures") / "planned-8033727", tmp_path / "older"))


def epochs_of(run: Path) -> list[str]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [row["epoch"] for row in csv.DictReader(file)]


def plan_of(run: Path) -> dict[str, object]:
    plan: dict[str, object] = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    return plan


def test_it_goes_on_to_its_end_as_it_computed(older: Path, tmp_path: Path) -> None:
    """Its plan names tensors as that version did: the same computation is planned again, within the same budget; and
    under any budget the bits are the same."""
    planned = plan_of(older)
    assert "KEEP{z1,a1}" in planned["blocks"].values()  # type: ignore[attr-defined]
    memory = recorded_settings(older).config.memory
    assert (memory.vram, memory.tensors) == (None, 2400 << 10)  # on the CPU it bounded tensors alone
    other = Path(shutil.copytree(older, tmp_path / "other"))
    outcome = lowmem.resume_training(older, {"train.max_steps": None})
    assert outcome.finished
    assert outcome.state.step == 2 * STEPS_PER_EPOCH
    assert epochs_of(older) == ["1", "2"]
    again = plan_of(older)
    same = ("budget_bytes", "batch", "micro_batch", "accumulation", "precision", "memory_format", "exact")
    assert {name: again[name] for name in same} == {name: planned[name] for name in same}
    assert list(again["blocks"]) == list(planned["blocks"])  # type: ignore[call-overload]
    events = [json.loads(line) for line in (older / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert next(event for event in events if event["event"] == "resume")["step"] == 13
    (replan,) = [event for event in events if event["event"] == "replan"]
    assert "an older version's (stage layer2.0 has no a1, z1" in replan["why"]
    lowmem.resume_training(other, {"train.max_steps": None, "memory.tensors": "20M"})
    assert_same_tensors(older / "weights/last.safetensors", other / "weights/last.safetensors")


@pytest.mark.slow  # the quick one, of a start, is in test_preflight.py
def test_a_resume_imports_nothing_in_the_middle_of_a_step(older: Path) -> None:
    """torch._dynamo takes over a second, which would count as training (torch 2.14)."""
    probe = (
        "import sys, lowmem\n"
        f"lowmem.resume_training({str(older)!r}, {{'train.max_steps': 15}})\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr


def test_nothing_of_a_run_is_left_when_it_has_ended(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its card's memory is free for another one at once, not with the next collection of garbage."""
    networks: list[weakref.ref[nn.Module]] = []
    make = execute.network_of
    monkeypatch.setattr(execute, "network_of", lambda *given, **named: _remembered(make(*given, **named), networks))
    gc.collect()
    gc.disable()
    try:
        lowmem.resume_training(older, {"train.max_steps": 15})
        assert [network() for network in networks] == [None]
    finally:
        gc.enable()


def _remembered(network: nn.Module, networks: list[weakref.ref[nn.Module]]) -> nn.Module:
    networks.append(weakref.ref(network))
    return network


def test_a_fork_of_it_keeps_what_it_computes(older: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    lowmem.fork_run(older, at="step:13", changes={"optim.lr": 0.01, "train.max_steps": None}, out=tmp_path / "fork")
    assert epochs_of(tmp_path / "fork") == ["1", "2"]
    for name in ("budget_bytes", "batch", "micro_batch", "precision", "memory_format"):
        assert plan_of(tmp_path / "fork")[name] == plan_of(older)[name]
    assert {path: path.read_bytes() for path in before} == before


def test_whatever_reads_a_run_reads_it(
    older: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(older.parent)
    said = {}
    for command in (["verify", "older"], ["ls", "."], ["report", "older"]):
        code, told = _run(command), capsys.readouterr()
        assert code == 0, told.out + told.err
        said[command[0]] = told.out
    assert "step-00000013" in said["verify"]
    assert "older" in said["ls"]
    assert "older" in (older / "report" / "report.md").read_text(encoding="utf-8")


def test_edited_it_is_refused_and_its_checkpoints_stay(older: Path) -> None:
    """It did not record with which settings they were made."""
    config, saved = older / "config.yaml", sorted(path.name for path in (older / "checkpoints").iterdir())
    config.write_text(config.read_text(encoding="utf-8").replace("lr: 0.1 ", "lr: 0.2 "), encoding="utf-8")
    with pytest.raises(CorruptCheckpoint, match=r"other settings than config.yaml has now: put back") as caught:
        lowmem.resume_training(older, {"train.max_steps": None})
    assert "damaged" not in str(caught.value)
    assert sorted(path.name for path in (older / "checkpoints").iterdir()) == saved
    assert _run(["verify", str(older)]) == 7
