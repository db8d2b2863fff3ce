"""What is asked of a card before it is planned for, as far as a processor tells."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from lowmem.calibrate import device
from lowmem.calibrate.device import DeviceFacts, ask_device, describe_card, warm_up
from lowmem.choose.execution import _tf32
from lowmem.config.cards import load_card
from lowmem.config.schema import Config
from lowmem.remat.libraries import Numerics

FACTS = DeviceFacts(
    name="GTX 1060",
    capability=(6, 1),
    driver="580",
    cudnn="90701",
    total_bytes=6 << 30,
    free_bytes=5 << 30,
    context_bytes=None,
    blas_workspace_bytes=1 << 20,
    link=(3, 16),
)


def test_the_steps_that_load_the_kernels_run() -> None:
    """On CUDA nothing can be planned if they do not."""
    before = torch.are_deterministic_algorithms_enabled(), torch._C._is_multithreading_enabled()
    warm_up("cpu")
    assert (torch.are_deterministic_algorithms_enabled(), torch._C._is_multithreading_enabled()) == before


def test_facts_come_through_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "ask", lambda function, numerics: json.loads(json.dumps(asdict(FACTS))))
    assert ask_device(Numerics()) == FACTS


def test_figures_of_other_kernels_are_kept_apart() -> None:
    """Deterministic kernels, and TF32, have other workspaces and other seconds."""
    kinds = [Numerics(), Numerics(deterministic=False), Numerics(tf32="never")]
    names = {FACTS.identity(kind).file_name for kind in kinds}
    assert len(names) == len(kinds)
    assert FACTS.identity(Numerics()) == replace(FACTS, free_bytes=1).identity(Numerics())


def test_tf32_is_told_where_the_card_is_known() -> None:
    on_cuda = Config.model_validate({"train": {"device": "cuda"}})
    strict = Config.model_validate({"train": {"device": "cuda", "tf32": "never"}})
    ampere, pascal = load_card("rtx3060-12g"), load_card("gtx1060-6g")
    assert (_tf32(on_cuda, ampere), _tf32(on_cuda, pascal), _tf32(on_cuda, None)) == (True, False, None)
    assert (_tf32(strict, ampere), _tf32(strict, None)) == (False, False)
    assert _tf32(Config.model_validate({"train": {"device": "cpu"}}), None) is False


def test_a_card_without_a_profile_is_described() -> None:
    h200 = replace(FACTS, name="NVIDIA H200", total_bytes=139 << 30, capability=(9, 0), link=(5, 16))
    card = describe_card(replace(h200, context_bytes=500 << 20), (4.0e12, 50e12, 700e12), 1 << 28)
    assert card.tensor_cores
    assert card.bandwidth_bytes_per_second == 4.0e12
    assert (card.pcie, card.context_bytes) == ("5.0x16", 500 << 20)
    laptop = replace(FACTS, name="GTX 1660 Laptop", capability=(7, 5), link=(None, 3))
    old = describe_card(laptop, (2e11, 4e12, 8e12), 1 << 28)
    assert (old.fp16, old.pcie, old.context_bytes) == ("2:1", "3.0x16", 1 << 28)
