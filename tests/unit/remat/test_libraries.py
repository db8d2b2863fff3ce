"""What CUDA's libraries are told: in processes of their own, since it is a process that is told. No card is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from lowmem.core.units import KIB, MIB
from lowmem.remat.libraries import blas_workspace_bytes, convolutions_in_tf32

PASCAL, AMPERE, HOPPER = (6, 1), (8, 6), (9, 0)
REPORT = """
import json, os, sys, torch
from lowmem.remat.libraries import Numerics, convolutions_in_tf32, prepare_libraries
{before}
prepare_libraries(Numerics({numerics}))
cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
print(json.dumps(dict(
    deterministic=cudnn.deterministic, benchmark=cudnn.benchmark, tf32=convolutions_in_tf32((8, 6)),
    older=[cudnn.allow_tf32, matmul.allow_tf32], blas=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    cap=os.environ.get("CUDNN_CONV_WSCAP_DBG"),
)))
"""


def _told(numerics: str, before: str = "", **variables: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUBLAS_", "CUDNN_"))}
    command = [sys.executable, "-c", REPORT.format(numerics=numerics, before=before)]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_deterministic_kernels_are_asked_for() -> None:
    found = _told("", before="torch.backends.cudnn.benchmark = True")
    assert (found["deterministic"], found["benchmark"], found["blas"]) == (True, False, ":16:8")
    assert found["older"] == [True, False]  # as torch has it
    assert (found["tf32"], found["cap"]) == (True, "256")


def test_what_the_user_has_set_stays() -> None:
    found = _told("", CUBLAS_WORKSPACE_CONFIG=":4096:8", CUDNN_CONV_WSCAP_DBG="64")
    assert (found["blas"], found["cap"]) == (":4096:8", "64")


def test_without_them_torch_chooses_as_it_is_set() -> None:
    found = _told("deterministic=False", before="torch.backends.cudnn.benchmark = True")
    assert (found["deterministic"], found["benchmark"], found["blas"]) == (False, True, None)


@pytest.mark.parametrize("before", ["", "torch.backends.cudnn.allow_tf32 = True"])
def test_no_tf32(before: str) -> None:
    """By torch's older switches and the newer ones alike, and both can still be read."""
    found = _told("tf32='never'", before=before)
    assert (found["tf32"], found["older"]) == (False, [False, False])


def test_what_was_set_here_is_not_handed_on_to_other_kernels() -> None:
    """But what the user has set is."""
    hand_on = (
        "import os\nfrom lowmem.remat.libraries import Numerics, environment_for, prepare_libraries\n"
        "prepare_libraries(Numerics())\n"
        "print([environment_for(Numerics(kind)).get('CUBLAS_WORKSPACE_CONFIG') for kind in (True, False)])\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CUBLAS_")}
    for given, wanted in (({}, "[':16:8', None]"), ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, "[':4096:8', ':4096:8']")):
        done = subprocess.run(
            [sys.executable, "-c", hand_on], env={**clean, **given}, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == wanted, done.stderr


def test_cards_before_ampere_have_no_tf32() -> None:
    assert not convolutions_in_tf32(PASCAL)
    assert not convolutions_in_tf32(AMPERE, "never")


@pytest.mark.parametrize(
    ("capability", "deterministic", "variable", "wanted"),
    [
        (PASCAL, True, None, 128 * KIB),
        (PASCAL, False, None, 8_519_680),  # pytorch/pytorch#95668
        (HOPPER, False, None, 32 * MIB),
        (HOPPER, True, ":4096:8", 32 * MIB),
        (PASCAL, False, ":1024:2:64:3", (2048 + 192) * KIB),
        (PASCAL, True, "nonsense", 128 * KIB),
    ],
)
def test_what_cublas_takes(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], deterministic: bool, variable: str | None, wanted: int
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", variable)
    assert blas_workspace_bytes(capability, deterministic=deterministic) == wanted + MIB
