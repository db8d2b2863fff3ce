"""Free host memory, by the machine's and the container's own files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowmem.core.units import GIB, MIB
from lowmem.measure.host import free_host_bytes

V2 = {"memory.max": "4294967296\n", "memory.current": "3221225472\n"}
V1 = {f"memory/memory.{name}": text for name, text in (("limit_in_bytes", "2147483648\n"), ("usage_in_bytes", "1\n"))}


def machine(folder: Path, available: str = "MemAvailable:    8388608 kB\n") -> Path:
    file = folder / "meminfo"
    file.write_text(f"MemTotal:       16777216 kB\nMemFree:         1048576 kB\n{available}HugePages_Total:       0\n")
    return file


def container(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "cgroup"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GIB),
        (V2, 1 * GIB),
        ({**V2, "memory.max": "max\n"}, 8 * GIB),
        ({**V2, "memory.max": "1099511627776\n"}, 8 * GIB),  # more than the machine has
        ({**V2, "memory.current": "4294967297\n"}, 0),
        # Files that were read stay in the container's memory until somebody needs it.
        ({**V2, "memory.stat": "anon 5\ninactive_file 1073741824\nactive_file 7\n"}, 2 * GIB),
        ({**V2, "memory.stat": "workingset_inactive_file 1073741824\n"}, 1 * GIB),
        (V1, 2 * GIB - 1),
        ({**V1, "memory/memory.stat": "inactive_file 3\ntotal_inactive_file 1\n"}, 2 * GIB),
    ],
)
def test_the_least_of_machine_and_container(files: dict[str, str], free: int, tmp_path: Path) -> None:
    assert free_host_bytes(machine(tmp_path), container(tmp_path, files)) == free


def test_where_nobody_tells(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert free_host_bytes(nothing, nothing) is None
    assert free_host_bytes(machine(tmp_path, available=""), nothing) is None
    assert free_host_bytes(nothing, container(tmp_path, V2)) == 1 * GIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_this_machine() -> None:
    free = free_host_bytes()
    assert free is not None
    assert free > 64 * MIB
