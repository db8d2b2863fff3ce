"""What is kept of a card's figures, and that nothing else passes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.account import RESULTS
from benchmarks.gpu.collect import collect
from lowmem.core.errors import UsageError
from lowmem.core.units import GIB, MIB

ENVIRONMENT = {
    "card": "NVIDIA GeForce GTX 1060 6GB",
    "card_bytes": 6 * GIB,
    "driver": "580.1",
    "torch": "2.7.1",
    "cuda": "12.6",
    "cudnn": 90501,
    "python": "3.12.3",
    "cpu": "a processor",
}


def _account(part: str, device: str = "cuda", **changes: Any) -> dict[str, Any]:
    row = {"name": "a question", "refused": None, "found": {"bitwise": True, "bytes": 3}, "met": True, "seconds": 1.0}
    account = {"part": part, "device": device, "skipped": None, "finished": True, "rows": [row], "outcome": "done"}
    return account | {"seconds": 12.0, "date": "2026-12-01", "environment": ENVIRONMENT} | changes


def _results(folder: Path, *accounts: dict[str, Any]) -> Path:
    folder.mkdir()
    record = {"parts": {one["part"]: one for one in accounts}, "prepared": {"revision": "abc123"}}
    (folder / RESULTS).write_text(json.dumps(record))
    return folder


def _trained(folder: Path, network: str, device: str = "cuda") -> None:
    record = {"network": network, "device": device, "environment": ENVIRONMENT, "epochs": 12, "epochs_done": 12}
    record |= {"test_error_pct": 9.5, "least_test_error_pct": 9.25, "train_seconds": 300.0, "images_per_second": 9e3}
    (folder / f"train-{network}.json").write_text(json.dumps(record))


def test_a_cards_results_are_kept_with_their_conditions(tmp_path: Path) -> None:
    measured = {"peak_allocated_bytes": 110 * MIB, "peak_reserved_bytes": 120 * MIB, "step_seconds": 0.25}
    predicted = {"peak_allocated_bytes": 100 * MIB, "peak_reserved_bytes": 130 * MIB}
    found = {"measured": measured, "predicted": predicted, "vram_bytes": 3 * GIB, "overhead": 0.125}
    row = {"name": "planned", "refused": None, "found": found, "met": False, "seconds": 9.0}
    out = collect([_results(tmp_path / "one", _account("facts"), _account("memory", rows=[row]))], tmp_path / "kept")
    assert out == tmp_path / "kept/gpu-nvidia-geforce-gtx-1060-6gb"
    text = (out / "results.md").read_text()
    for said in ("GTX 1060", "driver 580.1", "torch 2.7.1, CUDA 12.6, cuDNN 90501", "revision abc123", "2026-12-01"):
        assert said in text
    assert "| planned | 3,072 MiB (emulated) | 110 (100) | 120 (130) | 250.0 | +12.5% | **no** |" in text
    assert "- memory: planned: not as promised" in text
    assert "| tests | did not run |" in text
    record = json.loads((out / RESULTS).read_text())
    assert record["card"] == ENVIRONMENT["card"]
    assert record["parts"]["facts"]["rows"][0]["found"] == {"bitwise": True, "bytes": 3}


def test_later_turns_join_what_is_kept(tmp_path: Path) -> None:
    collect([_results(tmp_path / "one", _account("facts"), _account("gradients"))], tmp_path / "kept")
    second = _results(tmp_path / "two", _account("gradients", outcome="took longer than 60 s"))
    _trained(second, "res20")
    out = collect([second], tmp_path / "kept")
    record = json.loads((out / RESULTS).read_text())
    assert list(record["parts"]) == ["facts", "gradients"]
    assert record["parts"]["gradients"]["outcome"] == "took longer than 60 s"
    text = (out / "results.md").read_text()
    assert "| res20 | 12 of 12 | 9.50 | 9.25 | 300 | 9,000 |" in text
    assert "- gradients: took longer than 60 s" in text


@pytest.mark.parametrize("part", ["facts", "gradients"])
def test_a_rehearsal_is_never_a_cards_result(tmp_path: Path, part: str) -> None:
    rehearsed = _account(part, device="cpu", environment={**ENVIRONMENT, "card": None})
    with pytest.raises(UsageError, match="rehearsal"):
        collect([_results(tmp_path / "one", _account("resume"), rehearsed)], tmp_path / "kept")
    forged = _account(part, environment={**ENVIRONMENT, "card": None})
    with pytest.raises(UsageError, match="rehearsal"):
        collect([_results(tmp_path / "two", forged)], tmp_path / "kept")
    third = _results(tmp_path / "three", _account("facts"))
    _trained(third, "res20", device="cpu")
    with pytest.raises(UsageError, match="rehearsal"):
        collect([third], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_different_cards_and_nothing_are_refused(tmp_path: Path) -> None:
    other = _account("memory", environment={**ENVIRONMENT, "card": "NVIDIA H100"})
    with pytest.raises(UsageError, match="different cards"):
        collect([_results(tmp_path / "one", _account("facts"), other)], tmp_path / "kept")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no results"):
        collect([tmp_path / "empty"], tmp_path / "kept")
