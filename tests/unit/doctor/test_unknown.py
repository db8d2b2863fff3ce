"""Any of the facts may be unknown: no check fails for it, and none takes the unknown for a fault."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.doctor import Facts, Status, can_start, examine
from lowmem.measure.nvml import DriverDevice
from tests.unit.doctor.scripted import GTX1060, GTX1660, NO_CARD, RTX3060, healthy, with_card

NAMES = [field.name for field in fields(Facts)]
CARD_NAMES = [field.name for field in fields(DriverDevice) if field.name != "index"]
REPORT_NAMES = ["driver_version", "cuda_version"]

MACHINES = {
    "healthy": healthy(),
    "no card": NO_CARD,
    "wrong build": with_card(GTX1060, "gtx1060-6g", kernel_works=False, troubles={"kernel": "no kernel image"}),
    "old driver": with_card(RTX3060, cuda_version=(11, 4), cuda_available=False, device_asked="cuda"),
    "windows": with_card(GTX1660, "gtx1660ti", system="Windows", environment={"CUDA_VISIBLE_DEVICES": ""}),
    "broken": healthy(
        torch_works=False,
        torchvision_works=False,
        allocator_trouble="ValueError",
        environment={"PYTORCH_CUDA_ALLOC_CONF": "x:1,y", "CUDA_LAUNCH_BLOCKING": "1"},
        troubles={"torch": "ImportError: x", "data": "a: b", "execution": "c: d"},
        unmet=("rich>=13.7",),
        disk_trouble="full",
        cpu_share=1.5,
    ),
}


def without(facts: Facts, names: set[str], card: set[str], report: set[str]) -> Facts:
    """The facts with some of them, of the card's and of the driver's unknown."""
    changes: dict[str, Any] = {name: getattr(Facts(), name) for name in names}
    if "driver" not in names:
        devices = tuple(replace(device, **dict.fromkeys(card)) for device in facts.driver.devices)
        changes["driver"] = replace(facts.driver, devices=devices, **dict.fromkeys(report))
    return replace(facts, **changes)


@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_unknown_facts(machine: str, data: st.DataObject) -> None:
    facts = without(
        MACHINES[machine],
        data.draw(st.sets(st.sampled_from(NAMES))),
        data.draw(st.sets(st.sampled_from(CARD_NAMES))),
        data.draw(st.sets(st.sampled_from(REPORT_NAMES))),
    )
    findings = examine(facts)
    for finding in findings:
        assert finding.name
        assert finding.finding
        assert "None" not in finding.finding + (finding.mend or "")
        assert "\n" not in finding.finding
    # With fewer facts there may be fewer faults, but none that were not there.
    if machine in {"healthy", "no card"} and not names_that_are_faults(facts):
        assert can_start(findings), findings


def names_that_are_faults(facts: Facts) -> bool:
    """What is a finding by itself when it is missing: a torch that works and has no CUDA."""
    return facts.torch_version is None or facts.torchvision_version is None or facts.torch_cuda is None


def test_nothing_known_at_all() -> None:
    assert [(finding.name, finding.status) for finding in examine(Facts())] == [("driver", Status.OK)]


@pytest.mark.parametrize("name", NAMES)
def test_each_fact_alone(name: str) -> None:
    for facts in MACHINES.values():
        examine(Facts(**{name: getattr(facts, name)}))
