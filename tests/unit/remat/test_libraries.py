"""What CUDA's libraries are told: in processes of their own, since it is a process that is told. No card is needed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
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
    found: dict[str, Any] = json.loads(_said(REPORT.format(numerics=numerics, before=before), **variables))
    return found


def _said(program: str, **variables: str) -> str:
    """What a program prints that knows these variables only. Where it can be, its process is forked from one that has
    imported this module and has done nothing else: it need not import torch again."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_say, args=(there, program, variables))  # type: ignore[attr-defined]
    process.start()
    there.close()
    assert here.poll(120)
    said: str = here.recv()
    process.join()
    assert process.exitcode == 0
    return said


def _say(to: Connection, program: str, variables: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith(("CUBLAS_", "CUDNN_"))]:
        del os.environ[name]
    os.environ.update(variables)
    with redirect_stdout(io.StringIO()) as said:
        exec(program, {})
    to.send(said.getvalue())


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
    for given, wanted in (({}, "[':16:8', None]"), ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, "[':4096:8', ':4096:8']")):
        assert _said(hand_on, **given).strip() == wanted


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
