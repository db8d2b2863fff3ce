"""The doctor on a card: one real kernel, and torch's card found again in the driver's list."""

from __future__ import annotations

import pytest
import torch

from lowmem.config.schema import Config, flatten
from lowmem.doctor import Status, can_start, examine, gather
from lowmem.doctor.probe import ask, largest_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = Config.model_validate({"data": {"source": "shapes"}, "train": {"device": "cuda"}})


def test_kernels_agree_with_the_cpu() -> None:
    assert largest_error("cuda") < 1e-3


def test_a_card_that_works() -> None:
    facts = gather(CONFIG)
    assert facts.device_uuid is not None
    assert facts.capability == torch.cuda.get_device_capability(0)
    findings = examine(facts)
    assert can_start(findings), findings
    assert {finding.name: finding.status for finding in findings}["kernel"] == Status.OK


def test_a_hidden_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = gather(CONFIG)
    assert not can_start(examine(facts))
    assert any(finding.mend == "unset CUDA_VISIBLE_DEVICES" for finding in examine(facts))


def test_refused_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "nonsense:1")
    assert "nonsense" in str(ask(flatten(CONFIG), ["allocator"])["allocator"])
