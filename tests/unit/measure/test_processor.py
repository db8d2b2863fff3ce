from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.measure import processor
from lowmem.measure.processor import busy_cores, usable_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")


def stat(path: Path, *cores: str) -> None:
    """The system's account of a core each, between the sums of all and what else is there."""
    lines = [f"cpu{core} {ticks}" for core, ticks in zip(sorted(os.sched_getaffinity(0)), cores, strict=False)]
    path.write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 0 0", *lines, "intr 12", ""]))


def test_busy_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stat"
    monkeypatch.setattr(processor, "_STAT", path)
    assert busy_cores(0) is None  # another system
    # user nice system idle iowait irq softirq steal guest guest_nice
    stat(path, "100 0 50 1000 10 0 0 0 0 0")
    monkeypatch.setattr("time.sleep", lambda _: stat(path, "115 0 54 1006 14 0 0 1 15 0"))
    assert busy_cores(1) == pytest.approx(20 / 30)  # waiting for a disk is not being busy
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert busy_cores(1) is None  # no time has passed


def test_a_spinning_process_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        try:
            assert max(busy_cores() or 0.0 for _ in range(5)) > 0.3
        finally:
            spinning.kill()
    assert 0 < (usable_cores() or 0) <= (os.cpu_count() or 1)
