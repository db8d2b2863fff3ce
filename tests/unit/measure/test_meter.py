"""The meter on this machine's CPU for real, and what it makes of a card's three sources, scripted."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch

from lowmem.core.units import GIB, MIB
from lowmem.measure import Meter, Snapshot, cuda
from lowmem.measure import meter as meters
from lowmem.measure.cuda import describe, free_and_total_bytes
from lowmem.measure.nvml import DriverReport, read_driver
from tests.unit.measure.scripted import Card, ScriptedNvml

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
UUID = Card().uuid
ME = 4711
ALLOCATOR = Snapshot(
    peak_allocated_bytes=1900 * MIB,
    peak_reserved_bytes=2000 * MIB,
    allocated_bytes=1500 * MIB,
    reserved_bytes=1800 * MIB,
    alloc_retries=2,
    ooms=1,
)


# -- the CPU -----------------------------------------------------------------------------------------------------------


@linux
def test_two_hundred_megabytes_are_seen_coming_and_going() -> None:
    meter = Meter("cpu")
    meter.reset()
    before = meter.read()
    held = torch.ones(200 * MIB, dtype=torch.uint8)
    during = meter.read()
    del held
    after = meter.read()
    assert before.process_bytes
    assert during.process_bytes
    assert after.process_bytes
    assert before.device_used_bytes
    assert during.process_bytes - before.process_bytes == pytest.approx(200 * MIB, abs=16 * MIB)
    assert during.process_bytes - after.process_bytes == pytest.approx(200 * MIB, abs=16 * MIB)
    assert after.device_used_bytes == pytest.approx(during.process_bytes, abs=16 * MIB)  # the peak stays
    meter.reset()
    assert meter.read().device_used_bytes == pytest.approx(after.process_bytes, abs=16 * MIB)


@linux
def test_the_machines_memory() -> None:
    with closing(Meter("cpu")) as meter:
        snapshot = meter.read()
    assert snapshot.device_total_bytes
    assert snapshot.device_free_bytes
    assert snapshot.process_bytes
    assert snapshot.process_bytes < snapshot.device_total_bytes
    assert snapshot.device_free_bytes < snapshot.device_total_bytes
    assert (snapshot.device_source, snapshot.missing) == ("process", ())
    assert snapshot.peak_allocated_bytes is snapshot.context_bytes is snapshot.alloc_retries is None


def test_without_proc_the_peak_is_the_whole_processs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STATUS", "MACHINE", "_CLEAR"):
        monkeypatch.setattr(meters, name, tmp_path / "none" / name)
    meter = Meter("cpu")
    meter.reset()
    snapshot = meter.read()
    assert snapshot.process_bytes is snapshot.device_total_bytes is snapshot.device_free_bytes is None
    assert "no /proc" in snapshot.missing[0]
    if sys.platform == "win32":
        assert snapshot.device_used_bytes is None
        assert snapshot.device_source == "none"
    else:
        assert snapshot.device_used_bytes is not None
        assert snapshot.device_used_bytes > 50 * MIB
        assert "not since the last reset" in snapshot.missing[1]


@linux
def test_a_peak_that_cannot_be_restarted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_CLEAR", tmp_path / "none" / "clear_refs")
    meter = Meter("cpu")
    assert meter.read().missing == ()
    meter.reset()
    snapshot = meter.read()
    assert snapshot.missing == ("the resident peak is the whole process's, not since the last reset",)
    assert snapshot.process_bytes is not None


def test_the_meter_of_the_cpu_asks_no_driver() -> None:
    probe = (
        "import sys, lowmem.measure as m\n"
        "m.Meter('cpu').read()\n"
        "assert not {'pynvml', 'torch'} & set(sys.modules), 'asked'\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- a card ------------------------------------------------------------------------------------------------------------


def _no_runtime() -> None:
    raise AssertionError("the CUDA runtime is asked though the driver answered")


def _describe(report: DriverReport, **changed: Any) -> Snapshot:
    given: dict[str, Any] = {"uuid": UUID, "pid": ME, "before": None, "runtime": _no_runtime}
    return describe(ALLOCATOR, report, **{**given, **changed})


def _gtx_1060(used: int, **figures: Any) -> Card:
    """`used`: MiB that programs hold; 78 more are the driver's."""
    return Card(free=(6144 - 78 - used) * MIB, **figures)


def test_an_emulated_gtx_1060_on_linux_is_told_whole() -> None:
    card = _gtx_1060(2500, compute=[(ME, 2110 * MIB)], graphics=[(900, 380 * MIB)])
    snapshot = _describe(read_driver(ScriptedNvml(cards=[card], names={900: "Xorg", ME: "python"})))
    assert (snapshot.peak_allocated_bytes, snapshot.peak_reserved_bytes) == (1900 * MIB, 2000 * MIB)
    assert (snapshot.allocated_bytes, snapshot.reserved_bytes) == (1500 * MIB, 1800 * MIB)
    assert (snapshot.alloc_retries, snapshot.ooms) == (2, 1)
    assert snapshot.process_bytes == 2110 * MIB
    assert snapshot.context_bytes == 310 * MIB
    assert snapshot.others_bytes == 390 * MIB
    assert snapshot.device_total_bytes == 6 * GIB
    assert snapshot.driver_reserved_bytes == 78 * MIB
    assert [process.name for process in snapshot.processes] == ["python", "Xorg"]
    assert (snapshot.device_source, snapshot.missing) == ("nvml", ())
    # Where the card's memory goes, to the last byte.
    parts = (
        snapshot.reserved_bytes, snapshot.context_bytes, snapshot.others_bytes, snapshot.driver_reserved_bytes,
        snapshot.device_free_bytes,
    )  # fmt: skip
    assert sum(part for part in parts if part is not None) == snapshot.device_total_bytes


def test_windows_tells_the_context_by_how_much_fuller_the_card_got() -> None:
    before = read_driver(ScriptedNvml(cards=[_gtx_1060(700)]))
    after = read_driver(ScriptedNvml(cards=[_gtx_1060(700 + 280 + 1800, compute=[(ME, None)])]))
    snapshot = _describe(after, before=before)
    assert snapshot.process_bytes is None
    assert (snapshot.context_bytes, snapshot.others_bytes) == (280 * MIB, 700 * MIB)
    assert "how much fuller" in snapshot.missing[0]
    late = _describe(after)  # a meter made after CUDA was first used
    assert late.context_bytes is late.others_bytes is None
    assert late.device_used_bytes == 2780 * MIB
    assert "unknown" in late.missing[0]


def test_the_source_opens_the_driver_once_and_asks_it_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ScriptedNvml(cards=[_gtx_1060(700)])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    # Only what asks a real card is replaced.
    monkeypatch.setattr(cuda, "read_allocator", lambda: ALLOCATOR)
    monkeypatch.setattr(cuda, "device_uuid", lambda: UUID)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with closing(Meter("cuda")) as meter:
        library.cards = [_gtx_1060(700 + 280 + 1800)]
        snapshot = meter.read()
        assert snapshot == meter.read()
        assert (library.opened, library.closed) == (1, 0)
    assert snapshot.context_bytes == 280 * MIB
    assert library.closed == 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    library.cards = [_gtx_1060(700)]
    late = Meter("cuda")
    library.cards = [_gtx_1060(700 + 280 + 1800)]
    assert late.read().context_bytes is None


def test_others_giving_back_more_than_we_took_is_unknown_not_negative() -> None:
    before = read_driver(ScriptedNvml(cards=[_gtx_1060(3000)]))
    after = read_driver(ScriptedNvml(cards=[_gtx_1060(2500)]))
    assert _describe(after, before=before).context_bytes is None


def test_an_old_driver_without_reserved_memory() -> None:
    card = _gtx_1060(2500, compute=[(ME, 2110 * MIB)])
    snapshot = _describe(read_driver(ScriptedNvml(cards=[card], v2=False)))
    assert snapshot.driver_reserved_bytes is None
    assert snapshot.device_used_bytes == 2578 * MIB  # the reserved memory cannot be told apart
    assert snapshot.context_bytes == 310 * MIB


def test_without_the_driver_the_cuda_runtime_is_asked() -> None:
    report = read_driver(ScriptedNvml(init=pynvml.NVMLError_LibraryNotFound()))
    snapshot = _describe(report, runtime=lambda: (3000 * MIB, 6070 * MIB))
    assert snapshot.device_source == "cuda runtime"
    assert (snapshot.device_used_bytes, snapshot.device_total_bytes) == (3070 * MIB, 6070 * MIB)
    assert snapshot.device_free_bytes == 3000 * MIB
    assert snapshot.context_bytes is snapshot.process_bytes is snapshot.others_bytes is None
    assert snapshot.driver_reserved_bytes is None
    assert snapshot.allocated_bytes == 1500 * MIB
    (sentence,) = snapshot.missing
    assert "install the driver" in sentence
    assert "CUDA runtime tells" in sentence


def test_without_both_the_allocator_is_left() -> None:
    report = read_driver(ScriptedNvml(init=pynvml.NVMLError_DriverNotLoaded()))
    snapshot = _describe(report, runtime=lambda: None)
    assert snapshot.device_source == "none"
    assert snapshot.device_used_bytes is snapshot.device_total_bytes is None
    assert snapshot.peak_reserved_bytes == 2000 * MIB
    assert len(snapshot.missing) == 2


@pytest.mark.parametrize(
    ("cards", "uuid", "words"),
    [
        ([Card(handle=pynvml.NVMLError_GpuIsLost())], None, "GPU is lost"),
        ([Card(handle=pynvml.NVMLError_GpuIsLost()), Card(uuid="GPU-2")], UUID, "(card 0: GPU is lost)"),
        ([Card(total=pynvml.NVMLError_NotSupported())], UUID, "not supported"),
        ([Card(), Card(uuid="GPU-2")], None, "several cards"),
        ([Card()], "GPU-of-a-slice", "does not list the card GPU-of-a-slice"),
    ],
)
def test_a_card_the_driver_cannot_tell_is_named(cards: list[Card], uuid: str | None, words: str) -> None:
    snapshot = _describe(read_driver(ScriptedNvml(cards=cards)), uuid=uuid, runtime=lambda: (1, 2))
    assert snapshot.device_source == "cuda runtime"
    assert words in snapshot.missing[0]


def test_the_right_one_of_two_cards_whatever_their_order() -> None:
    library = ScriptedNvml(cards=[Card(uuid="GPU-aa", total=8 * GIB), Card(uuid="GPU-bb", total=12 * GIB)])
    report = read_driver(library)
    assert _describe(report, uuid="GPU-BB").device_total_bytes == 12 * GIB
    assert _describe(report, uuid="aa").device_total_bytes == 8 * GIB
    assert report.device(None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_runtime_does_not_answer() -> None:
    assert free_and_total_bytes() is None
