from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem.core.units import GIB
from lowmem.doctor import Status
from lowmem.doctor import checks_run as checks
from lowmem.measure.nvml import DeviceProcess, DriverReport, Link
from tests.unit.doctor.scripted import GTX1060, GTX1660, HEALTHY, RTX3060, healthy, said, with_card

CARD_CHECKS = (
    checks.visible,
    checks.card,
    checks.memory,
    checks.display,
    checks.link,
    checks.host_memory,
    checks.precision,
    checks.memory_format,
    checks.spill,
)


def test_on_the_cpu_nothing_is_said_of_cards() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    cpu = {"device": "cpu", "memory_format": "channels-last"}
    card = replace(GTX1660, display_active=True)
    facts = with_card(card, device_asked="cpu", environment=hidden, execution=cpu, system="Windows")
    assert [check(facts) for check in CARD_CHECKS] == [None] * len(CARD_CHECKS)


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles", "-1,0", " "])
def test_hidden_cards(value: str) -> None:
    for asked, status in (("auto", Status.WARNING), ("cuda", Status.FAIL)):
        facts = healthy(environment={"CUDA_VISIBLE_DEVICES": value}, cuda_available=False, device_asked=asked)
        found = said(checks.visible, facts)
        assert (found.status, found.mend) == (status, "unset CUDA_VISIBLE_DEVICES")
    found = said(checks.visible, replace(facts, system="Windows"))
    assert found.mend == "set CUDA_VISIBLE_DEVICES="


@pytest.mark.parametrize("value", [None, "0", "1,0", "GPU-aaaa", "MIG-1", " 0"])
def test_cards_that_are_not_hidden(value: str | None) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert checks.visible(healthy(environment=environment)) is None


def test_a_card_that_torch_does_not_find() -> None:
    found = said(checks.visible, healthy(cuda_available=False, environment={"CUDA_VISIBLE_DEVICES": "7"}))
    assert found.status == Status.WARNING
    assert "CUDA_VISIBLE_DEVICES=7" in found.finding
    # Other checks say why.
    assert checks.visible(healthy(cuda_available=False, torch_cuda=None)) is None
    assert checks.visible(with_card(RTX3060, cuda_available=False, cuda_version=(12, 0))) is None


def test_a_torch_that_dies_looking_for_cards() -> None:
    found = said(checks.visible, healthy(cuda_available=None, troubles={"cuda": "the process was killed by signal 11"}))
    assert "signal 11" in found.finding


def test_the_profile() -> None:
    found = said(checks.card, healthy())
    assert (found.status, "profile RTX 3060 12G" in found.finding) == (Status.OK, True)
    found = said(checks.card, with_card(replace(RTX3060, name="NVIDIA H200")))
    assert (found.status, "no profile" in found.finding) == (Status.NOTE, True)
    assert "--card FILE.yaml" in (found.mend or "")


def test_torchs_card_is_found_by_its_uuid() -> None:
    second = replace(GTX1060, index=1, uuid="GPU-bbbb")
    report = DriverReport(driver_version="580.1", cuda_version=(13, 0), devices=(RTX3060, second))
    facts = healthy(driver=report, device_uuid="BBBB", profile=None)
    assert facts.card == second
    found = said(checks.card, facts)
    assert "GTX 1060 6GB, 6,144 MiB (1 more not used)" in found.finding
    assert replace(facts, device_uuid="cccc").card is None


@pytest.mark.parametrize(
    ("free", "status"),
    [
        (12 * GIB, Status.OK),
        (11 * GIB, Status.OK),
        (9 * GIB, Status.NOTE),
        (5 * GIB, Status.WARNING),
        (0, Status.WARNING),
    ],
)
def test_free_memory(free: int, status: Status) -> None:
    holder = DeviceProcess(pid=4242, name="python3", used_bytes=12 * GIB - free)
    found = said(
        checks.memory,
        with_card(replace(RTX3060, free_bytes=free, used_bytes=12 * GIB - free, reserved_bytes=0, processes=(holder,))),
    )
    assert (found.status, "12.0 GiB free" in found.finding) == (status, True)
    assert "python3 (pid 4242)" in found.finding
    assert (found.mend is not None) == (status != Status.OK)


def test_a_display_takes_memory() -> None:
    found = said(checks.display, with_card(replace(GTX1060, display_active=True)))
    assert found.status == Status.NOTE
    for active in (False, None):
        assert checks.display(with_card(replace(GTX1060, display_active=active))) is None


@pytest.mark.parametrize(
    ("link", "profile", "status", "says"),
    [
        (
            Link(generation=3, lanes=16, most_generation=3, most_lanes=16),
            "gtx1060-6g",
            Status.OK,
            "PCIe 3.0 x16 of x16",
        ),
        (
            Link(generation=1, lanes=16, most_generation=3, most_lanes=16),
            "gtx1060-6g",
            Status.OK,
            "slows its link down",
        ),
        (
            Link(generation=1, lanes=1, most_generation=3, most_lanes=1),
            "gtx1060-6g",
            Status.NOTE,
            "PCIe x1, the card can x16",
        ),
        (Link(lanes=4, most_lanes=16), None, Status.NOTE, "PCIe x4, the card can x16"),
        (Link(lanes=8, most_lanes=8), "gtx1060-6g", Status.OK, "PCIe x8 of x16"),
        (Link(lanes=8, most_lanes=8), "rtx4060", Status.OK, "PCIe x8 of x8"),
        (Link(lanes=4, most_lanes=4), None, Status.OK, "PCIe x4 of x4"),
    ],
)
def test_the_link(link: Link, profile: str | None, status: Status, says: str) -> None:
    found = said(checks.link, with_card(replace(GTX1060, link=link), profile))
    assert (found.status, says in found.finding) == (status, True), found.finding
    assert (found.mend is not None) == (status == Status.NOTE)


@pytest.mark.parametrize(
    ("link", "status", "says"),
    [
        # An idle card has slowed its link down.
        (Link(generation=1, lanes=16, most_generation=3, most_lanes=16), Status.OK, "12.0 GB/s each way"),
        (Link(generation=4, lanes=8, most_generation=4, most_lanes=8), Status.OK, "12.0 GB/s each way"),
        (Link(generation=3, lanes=4, most_generation=3, most_lanes=16), Status.OK, "3.0 GB/s each way"),
        (
            Link(lanes=1, most_generation=3, most_lanes=16),
            Status.NOTE,
            "0.8 GB/s each way: plans will hardly use memory.host",
        ),
        (Link(most_generation=2, most_lanes=4), Status.NOTE, "1.5 GB/s each way: plans will hardly use memory.host"),
        (Link(most_generation=9, most_lanes=4), Status.OK, None),
        (None, Status.OK, None),
    ],
)
def test_host_memory(link: Link | None, status: Status, says: str | None) -> None:
    found = said(checks.host_memory, with_card(replace(GTX1060, link=link), "gtx1060-6g"))
    words = "12.0 GiB free" + (f"; the link attains about {says}" if says else "")
    assert (found.status, found.finding) == (status, words)
    assert checks.host_memory(with_card(replace(GTX1060, link=link), host_free_bytes=None)) is None


def test_a_link_that_is_not_told() -> None:
    assert checks.link(with_card(replace(GTX1060, link=None))) is None
    assert checks.link(with_card(replace(GTX1060, link=Link(generation=3)))) is None


def test_halves_on_a_pascal_card_save_memory_only() -> None:
    found = said(checks.precision, with_card(GTX1060))
    assert found.status == Status.NOTE
    assert "saves memory, not time" in found.finding


def test_halves_on_a_gtx_16_give_nan() -> None:
    found = said(checks.precision, with_card(GTX1660))
    assert (found.status, found.mend) == (Status.NOTE, None)
    found = said(checks.precision, with_card(GTX1660, precision_asked="amp"))
    assert (found.status, found.mend) == (Status.WARNING, "--precision fp32")


def test_halves_on_tensor_cores() -> None:
    turing = replace(GTX1660, name="NVIDIA GeForce RTX 2060")  # of the same capability as the 16xx
    for card, says in ((turing, "bf16 would be emulated"), (RTX3060, "fp16 and bf16")):
        found = said(checks.precision, with_card(card))
        assert (found.status, says in found.finding) == (Status.OK, True)


def test_channels_last_needs_tensor_cores() -> None:
    assert checks.memory_format(healthy()) is None
    for card in (GTX1060, GTX1660):
        found = said(checks.memory_format, with_card(card))
        assert (found.status, found.mend) == (Status.WARNING, "--memory-format contiguous")
    execution = {**HEALTHY.execution, "memory_format": "contiguous"}
    assert checks.memory_format(with_card(GTX1060, execution=execution)) is None


@pytest.mark.parametrize(("driver", "spills"), [("536.40", True), ("560.94", True), ("531.79", False), (None, True)])
def test_windows_spills_to_host_memory(driver: str | None, spills: bool) -> None:
    found = said(checks.spill, with_card(GTX1060, system="Windows", driver_version=driver))
    assert (found.status, "81 %" in found.finding) == (Status.NOTE, True)
    assert ("Prefer No Sysmem Fallback" in (found.mend or "")) == spills


def test_wsl_and_plain_linux() -> None:
    found = said(checks.spill, healthy(wsl=True))
    assert (found.name, "pinned" in found.finding) == ("wsl", True)
    assert checks.spill(healthy()) is None
