"""Who holds the memory, in words."""

from __future__ import annotations

import os

from lowmem.core.units import MIB
from lowmem.measure import Meter, Snapshot, read_driver, who_holds
from lowmem.measure.nvml import DeviceProcess, DriverReport
from tests.unit.measure.scripted import Card, ScriptedNvml

UUID = "GPU-11111111-2222-3333-4444-555555555555"
ME = os.getpid()


def _report(card: Card, **names: str) -> DriverReport:
    return read_driver(ScriptedNvml(cards=[card, Card(uuid="GPU-2")], names={int(k[3:]): v for k, v in names.items()}))


def test_the_biggest_first_and_this_process_by_that_name() -> None:
    card = Card(free=(6144 - 78 - 712) * MIB, compute=[(7, 100 * MIB), (ME, 200 * MIB)], graphics=[(1234, 412 * MIB)])
    assert who_holds(_report(card, pid1234="/usr/lib/firefox/firefox"), UUID) == [
        "firefox (pid 1234): 412 MiB",
        f"this process (pid {ME}): 200 MiB",
        "pid 7: 100 MiB",
    ]


def test_the_small_ones_are_summed_and_what_nobody_owns_is_said() -> None:
    card = Card(free=(6144 - 78 - 280 - 210) * MIB, graphics=[(pid, pid * 10 * MIB) for pid in range(1, 8)])
    assert who_holds(_report(card), UUID.removeprefix("GPU-")) == [
        *(f"pid {pid}: {pid * 10} MiB" for pid in (7, 6, 5, 4, 3)),
        "… and 2 more: 30 MiB",
        "unknown holders: 210 MiB (the driver does not name them)",
    ]


def test_the_drivers_own_crumbs_are_no_holder() -> None:
    assert who_holds(_report(Card(free=(6144 - 78 - 20) * MIB)), UUID) == []


def test_windows_names_them_without_their_bytes() -> None:
    card = Card(free=(6144 - 78 - 900) * MIB, graphics=[(8, None), (9, None)])
    assert who_holds(_report(card, pid8="Discord.exe"), UUID) == [
        "Discord.exe (pid 8), pid 9: 900 MiB together (the driver does not tell who how much)"
    ]


def test_of_several_cards_one_has_to_be_named() -> None:
    report = _report(Card(graphics=[(7, 100 * MIB)]))
    assert who_holds(report) == who_holds(report, "GPU-9") == []
    alone = DriverReport(devices=report.devices[:1])
    assert who_holds(alone) == who_holds(report, UUID) != []


def test_a_snapshot_knows_of_itself_what_the_driver_does_not_tell() -> None:
    windows = Snapshot(
        reserved_bytes=2000 * MIB, device_used_bytes=3000 * MIB, device_source="nvml",
        processes=(DeviceProcess(pid=ME), DeviceProcess(pid=8, name="Discord.exe", graphics=True)),
    )  # fmt: skip
    assert who_holds(windows) == [
        f"this process (pid {ME}): 2,000 MiB",
        "Discord.exe (pid 8) and this process's CUDA context: 1,000 MiB together "
        "(the driver does not tell who how much)",
    ]
    with_context = Snapshot(
        reserved_bytes=2000 * MIB, context_bytes=300 * MIB, device_used_bytes=3000 * MIB, device_source="nvml"
    )
    assert who_holds(with_context) == [
        f"this process (pid {ME}): 2,300 MiB",
        "unknown holders: 700 MiB (the driver does not name them)",
    ]


def test_nothing_known_is_no_line() -> None:
    assert who_holds(Snapshot()) == who_holds(DriverReport(missing="no driver")) == []
    assert who_holds(Meter("cpu").read()) == []
