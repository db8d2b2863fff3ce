"""How OpenMP's threads wait: said by the library itself, when torch loads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ("--set", "data.train_subset=20", "--set", "data.test_subset=10", "--dry-run")
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [
        ({}, "PASSIVE", "1000"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None, marks=pytest.mark.slow),
        pytest.param({"GOMP_SPINCOUNT": "7"}, None, "7", marks=pytest.mark.slow),
    ],
)
def test_threads_wait_asleep_unless_said_otherwise(
    tmp_path: Path, given: dict[str, str], policy: str | None, spins: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    ended = subprocess.run(
        [*(sys.executable, "-m", "lowmem", "train", "--arch", "res20", "--width", "2", "--data", "shapes"), *SMALL],
        cwd=tmp_path,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **given},
        capture_output=True,
        text=True,
    )
    assert "OMP_NUM_THREADS" in ended.stderr, ended.stderr  # torch was loaded
    assert policy is None or f"OMP_WAIT_POLICY = '{policy}'" in ended.stderr
    assert spins is None or f"GOMP_SPINCOUNT = '{spins}'" in ended.stderr
