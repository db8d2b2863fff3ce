"""`lowmem doctor` as a process, on the machine the tests run on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import _run
from lowmem.cli.show import finding_lines, summary
from lowmem.doctor import Finding, Status
from tests.unit.doctor.scripted import NO_CARD, healthy

Command = Callable[..., "subprocess.CompletedProcess[str]"]
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@no_card
def test_a_machine_without_a_card_can_train(lowmem_command: Command, tmp_path: Path) -> None:
    done = lowmem_command("doctor", "--data", "shapes")
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.splitlines()
    assert len(shown) <= 24
    driver = next(line for line in shown if line.split()[1] == "driver")
    assert driver.startswith("note")
    assert "NVIDIA driver" in driver
    assert any(line.startswith("ok") and line.split()[1] == "data" for line in shown)
    assert shown[-1] == "training can start on the CPU"
    assert list(tmp_path.iterdir()) == []  # it only looks


@no_card
def test_cuda_without_a_card_and_data_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["doctor", "--data", "folder:nowhere", "--device", "cuda", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert shown["can_start"] is False
    failed = {finding["name"]: finding for finding in shown["findings"] if finding["status"] == "fail"}
    assert set(failed) == {"driver", "data"}
    assert "--device cpu" in failed["driver"]["mend"]
    assert "train/<class>/" in failed["data"]["mend"]


def test_wrong_usage_is_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    code = _run(["doctor", "--arch", "res21"])
    assert (code, "choose one of res20" in capsys.readouterr().err) == (2, True)


def test_lines_are_aligned_and_commands_whole() -> None:
    findings = [
        Finding("torch", Status.OK, "2.15.0"),
        Finding("build", Status.FAIL, "no kernels", 'pip install "torch==2.7.1" "torchvision==0.22.1"'),
        Finding("memory format", Status.WARNING, "slow"),
    ]
    assert finding_lines(findings) == [
        "ok       torch          2.15.0",
        "fail     build          no kernels",
        '                        > pip install "torch==2.7.1" "torchvision==0.22.1"',
        "warning  memory format  slow",
    ]


def test_the_last_line() -> None:
    fail, warning = Finding("a", Status.FAIL, "x"), Finding("b", Status.WARNING, "y")
    assert summary(healthy(), [fail, fail, warning]) == "training cannot start: 2 failures, with 1 warning"
    assert summary(healthy(), [fail]) == "training cannot start: 1 failure"
    assert summary(healthy(), [warning, warning]) == "training can start on the card, with 2 warnings"
    assert summary(NO_CARD, []) == "training can start on the CPU"
    assert summary(healthy(execution={}), []) == "training can start"
