"""What the driver's library says, and how little may be left of it."""

from __future__ import annotations

import sys
from contextlib import closing

import pynvml
import pytest

from lowmem.core.units import MIB
from lowmem.measure.nvml import CardLoad, DeviceProcess, Driver, DriverDevice, Link, read_driver, throttled_by
from tests.unit.measure.scripted import NOT_AVAILABLE, Card, ScriptedNvml

DESKTOP = ScriptedNvml(
    cards=[
        Card(
            compute=[(4242, 300 * MIB), (1234, 100 * MIB)],
            graphics=[(900, 120 * MIB), (1234, 110 * MIB)],
        )
    ],
    names={900: "/usr/lib/xorg/Xorg", 1234: "/home/ann/bin/firefox -contentproc -childID 7", 4242: b"python3"},
)


def test_a_gtx_1060_with_a_desktop() -> None:
    report = read_driver(DESKTOP)
    assert (report.missing, report.driver_version, report.cuda_version) == (None, "535.183.01", (12, 2))
    (device,) = report.devices
    assert (device.name, device.capability, device.display_active) == ("NVIDIA GeForce GTX 1060 6GB", (6, 1), True)
    assert (device.total_bytes, device.free_bytes, device.reserved_bytes) == (6144 * MIB, 5500 * MIB, 78 * MIB)
    assert device.used_bytes == (6144 - 5500 - 78) * MIB
    assert device.link == Link(generation=1, lanes=16, most_generation=3, most_lanes=16)
    assert device.processes == (  # biggest first; the one in both lists once, with the larger figure; no user's folder
        DeviceProcess(pid=4242, name="python3", used_bytes=300 * MIB),
        DeviceProcess(pid=900, name="Xorg", used_bytes=120 * MIB, graphics=True),
        DeviceProcess(pid=1234, name="firefox", used_bytes=110 * MIB, graphics=True),
    )
    assert DESKTOP.opened == DESKTOP.closed == 1


@pytest.mark.parametrize("reserved_is_used", [False, True])
def test_free_used_and_reserved_are_the_total_whatever_the_driver_counts_as_used(reserved_is_used: bool) -> None:
    (device,) = read_driver(ScriptedNvml(cards=[Card(reserved_is_used=reserved_is_used)])).devices
    assert device.free_bytes is not None
    assert device.used_bytes is not None
    assert device.reserved_bytes == 78 * MIB
    assert device.free_bytes + device.used_bytes + device.reserved_bytes == device.total_bytes


def test_windows_lists_processes_without_their_bytes() -> None:
    library = ScriptedNvml(
        cards=[Card(compute=[(8, None), (9, NOT_AVAILABLE)], graphics=[(8, None)])],
        names={8: r"C:\Users\Ann\AppData\Local\Discord\Discord.exe", 9: r"C:\Program Files\Python311\python.exe"},
    )
    assert read_driver(library).devices[0].processes == (
        DeviceProcess(pid=8, name="Discord.exe", graphics=True),
        DeviceProcess(pid=9, name="python.exe"),
    )


def test_a_laptop_that_tells_little() -> None:
    refused, unsupported = pynvml.NVMLError_NoPermission(), pynvml.NVMLError_NotSupported()
    laptop = Card(
        name=b"GeForce GTX 1060", display=unsupported, link=(unsupported, unsupported, 3, unsupported),
        compute=[(77, 40 * MIB)], graphics=refused,
    )  # fmt: skip
    (device,) = read_driver(ScriptedNvml(cards=[laptop], names={77: refused}, driver=refused, cuda=refused)).devices
    assert device.name == "GeForce GTX 1060"
    assert device.display_active is None
    assert device.link == Link(most_generation=3)
    assert device.processes == (DeviceProcess(pid=77, used_bytes=40 * MIB),)
    nothing = Card(**dict.fromkeys(("uuid", "name", "capability", "total", "free", "link", "display"), unsupported))
    nothing.compute = nothing.graphics = refused
    report = read_driver(ScriptedNvml(cards=[nothing]))
    assert report.devices == (DriverDevice(index=0),)
    assert report.missing is None


def test_an_old_driver_has_neither_the_second_memory_call_nor_the_third_list() -> None:
    old = ScriptedNvml(cards=[Card(compute=[(5, 10 * MIB)])], names={5: "python"}, v2=False, v3_processes=False)
    (device,) = read_driver(old).devices
    assert device.reserved_bytes is None
    assert device.used_bytes == (6144 - 5500) * MIB
    assert device.processes == (DeviceProcess(pid=5, name="python", used_bytes=10 * MIB),)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (pynvml.NVMLError_LibraryNotFound(), "install the driver"),
        (pynvml.NVMLError_DriverNotLoaded(), "modprobe nvidia"),
        (pynvml.NVMLError_NoPermission(), "insufficient permissions"),
        (pynvml.NVMLError_LibRmVersionMismatch(), "restart the machine"),
        (pynvml.NVMLError_Unknown(), "Unknown Error"),
    ],
)
def test_a_driver_that_does_not_answer_says_why(error: Exception, words: str) -> None:
    report = read_driver(ScriptedNvml(init=error))
    assert report.missing is not None
    assert words in report.missing
    assert report.devices == ()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what Python itself does for a module that must not be found
    assert "pip install nvidia-ml-py" in (read_driver().missing or "")


def test_a_driver_without_cards() -> None:
    report = read_driver(ScriptedNvml())
    assert report.missing == "the NVIDIA driver answers, but lists no card"
    assert report.driver_version == "535.183.01"


def test_cards_are_found_by_uuid_not_by_order() -> None:
    small, big = Card(uuid="GPU-aaaa"), Card(uuid=b"GPU-BBBB", name="NVIDIA GeForce RTX 3060", total=12288 * MIB)
    report = read_driver(ScriptedNvml(cards=[small, big]))
    # With CUDA_VISIBLE_DEVICES=1,0 torch's device 0 is the driver's 1; torch writes the UUID without "GPU-".
    found = report.device("bbbb")
    assert found is not None
    assert (found.index, found.name) == (1, "NVIDIA GeForce RTX 3060")
    assert report.device("GPU-aaaa") is report.devices[0]
    assert report.device("GPU-cccc") is None


def test_a_lost_card_does_not_hide_the_others() -> None:
    report = read_driver(ScriptedNvml(cards=[Card(handle=pynvml.NVMLError_GpuIsLost()), Card()]))
    assert report.devices[0] == DriverDevice(index=0, trouble="GPU is lost")
    assert report.devices[1].total_bytes == 6144 * MIB


def test_the_library_stays_open_between_readings() -> None:
    library = ScriptedNvml(cards=[Card()])
    driver = Driver(library)
    assert driver.read() == driver.read()
    assert (library.opened, library.closed) == (1, 0)
    driver.close()
    driver.close()
    assert library.closed == 1
    assert "closed" in (driver.read().missing or "")


def test_how_a_card_works() -> None:
    hot = Card(uuid="GPU-bb", temperature=84, clock=1404, throttle=0x64, power=118_250)
    with closing(Driver(ScriptedNvml(cards=[Card(uuid="GPU-aa"), hot]))) as driver:
        assert driver.load("GPU-bb") == CardLoad(
            temperature_c=84, power_watts=118.25, clock_mhz=1404, most_clock_mhz=1911, utilization_pct=97,
            throttle_reasons=0x64,
        )  # fmt: skip
        assert driver.load("GPU-cc") is None
        hot.set_clock, hot.power, hot.utilization, hot.throttle, hot.temperature = 1733, *[None] * 4
        assert driver.load("GPU-bb") == CardLoad(clock_mhz=1404, most_clock_mhz=1733)
    assert driver.load("GPU-bb") is None, "it was closed"
    assert Driver(ScriptedNvml(init=pynvml.NVMLError_DriverNotLoaded())).load("GPU-aa") is None
    assert throttled_by(0x64) == ["power limit", "heat", "heat (hardware)"]
    assert throttled_by(0x1 | 0x2 | 0x100) == throttled_by(None) == [], "idle, or as somebody has set it"


def test_one_card_alone_is_asked_when_only_one_is_wanted() -> None:
    library = ScriptedNvml(cards=[Card(uuid="GPU-aa"), Card(uuid="GPU-bb"), Card(handle=pynvml.NVMLError_GpuIsLost())])
    with closing(Driver(library)) as driver:
        assert driver.read("BB").devices == (driver.read().devices[1], DriverDevice(index=2, trouble="GPU is lost"))
        assert len(driver.read("GPU-cc").devices) == 1


def test_a_forgotten_driver_closes_itself() -> None:
    library = ScriptedNvml(cards=[Card()])
    Driver(library).read()
    assert library.closed == 1


def test_the_real_library_on_this_machine() -> None:
    """With a driver it lists cards, without one it says so: never both, never neither."""
    report = read_driver()
    assert (report.missing is None) == bool(report.devices)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        assert "no NVIDIA driver here" in (report.missing or "")
    else:
        pynvml.nvmlShutdown()


def test_the_script_has_the_names_of_the_real_package() -> None:
    """A misspelt function would only ever be a figure that is missing."""
    assert [name for name in dir(ScriptedNvml) if name.startswith("nvml") and not hasattr(pynvml, name)] == []
