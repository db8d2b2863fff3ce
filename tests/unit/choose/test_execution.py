"""Where a run ends up on the CPU although there is a card, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.choose import execution
from lowmem.choose.execution import require_device, resolve_execution, why_on_cpu
from lowmem.config.settings import gather
from lowmem.core.errors import PreflightError
from lowmem.lifecycle import run_training
from lowmem.measure.nvml import read_driver
from lowmem.train.observer import Observer
from tests.unit.measure.scripted import Card, ScriptedNvml
from tests.unit.measure.test_usable import NEW_ARCHS, NEW_DRIVER, PASCAL, RTX

NO_KERNELS = "no kernels for the NVIDIA GeForce GTX 1060 6GB"
HIDDEN = "CUDA_VISIBLE_DEVICES='' hides every card"


def machine(patch: pytest.MonkeyPatch, library: ScriptedNvml, *, available: bool = False, **build: Any) -> None:
    """This one, had it that driver, and torch 2.15 for CUDA 13."""
    built = {"torch_version": "2.15.0", "torch_cuda": "13.2", "arch_list": NEW_ARCHS, **build}
    patch.setattr(execution, "read_driver", lambda: read_driver(library))
    patch.setattr(execution, "torch_build", lambda: built)
    patch.setattr(torch.cuda, "is_available", lambda: available)
    patch.setattr("platform.system", lambda: "Linux")
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_card_too_old_for_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ScriptedNvml([Card()], **NEW_DRIVER), available=True)
    settings = resolve_execution(gather(flags={}))
    assert settings.config.train.device == "cpu"
    said = why_on_cpu(settings) or ""
    assert NO_KERNELS in said
    assert f"{PASCAL} (`lowmem doctor`" in said
    with pytest.raises(
        PreflightError, match=f"device cuda was asked for, but .*{NO_KERNELS}.*torch==2.7.1.*device cpu"
    ):
        resolve_execution(gather(flags={"train.device": "cuda"}))


def test_no_card_and_a_card_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ScriptedNvml([RTX], **NEW_DRIVER), available=True)
    require_device("cuda")
    monkeypatch.setattr(execution, "read_driver", lambda: read_driver(ScriptedNvml([Card()], **NEW_DRIVER)))
    assert why_on_cpu(resolve_execution(gather(flags={"train.device": "cpu"}))) is None
    monkeypatch.undo()
    if not torch.cuda.is_available() and not read_driver().installed:
        settings = resolve_execution(gather(flags={}))
        assert (settings.sources["train.device"], why_on_cpu(settings)) == ("auto: no CUDA device", None)


class First(Observer):
    """What a run says, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.said.append(f"warning: {text}")


def test_a_run_says_first_why_it_is_not_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ScriptedNvml([RTX], **NEW_DRIVER))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = {"model.arch": "res20", "model.width": 2, "data.source": "shapes", "data.train_subset": 20}
    shown = First()
    run_training(gather(flags=flags | {"data.test_subset": 10}), tmp_path / "run", shown, dry_run=True)
    first = f"warning: this trains on the CPU: {HIDDEN}: unset CUDA_VISIBLE_DEVICES (`lowmem doctor` says more)"
    assert shown.said[0] == first
    assert sum(HIDDEN in line for line in shown.said) == 1
