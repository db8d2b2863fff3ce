from __future__ import annotations

import pytest

from lowmem.config.cards import card_names, load_card
from lowmem.doctor.builds import BUILDS, Capability, install_command, runs_on, same_torch

PASCAL = 'pip install "torch==2.7.1" "torchvision==0.22.1"'
VOLTA = 'pip install "torch==2.10.0" "torchvision==0.25.0"'
NEWEST = "pip install --upgrade torch torchvision"


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["sm_60"], (6, 1), True),  # binaries of the same major, no later minor
        (["sm_61"], (6, 0), False),
        (["sm_60"], (7, 0), False),
        (["sm_75"], (7, 0), False),
        (["sm_86"], (8, 9), True),
        (["sm_90a"], (9, 0), False),  # for one chip only
        (["sm_100"], (10, 3), True),
        (["sm_120"], (12, 0), True),
        (["sm_120"], (10, 0), False),
        (["compute_60"], (8, 6), True),  # PTX is compiled on the machine
        (["compute_90"], (8, 6), False),
        (["compute_90a"], (10, 0), False),
        ([], (8, 6), False),
        (["gfx906"], (9, 0), False),
    ],
)
def test_runs_on(archs: list[str], capability: Capability, expected: bool) -> None:
    assert runs_on(archs, capability) is expected


@pytest.mark.parametrize(
    ("capability", "driver_cuda", "expected"),
    [
        ((6, 1), (13, 0), PASCAL),
        ((6, 1), (12, 2), PASCAL),
        ((5, 0), None, PASCAL),
        ((7, 0), (13, 0), VOLTA),
        ((7, 5), (13, 0), NEWEST),
        ((7, 5), (12, 4), VOLTA),  # a driver for CUDA 12 only
        ((12, 0), (13, 0), NEWEST),
        ((12, 0), (12, 8), VOLTA),
        ((8, 6), None, NEWEST),
        (None, None, NEWEST),
        ((3, 5), (13, 0), None),  # Kepler
        ((6, 1), (11, 4), None),
    ],
)
def test_install_command(capability: Capability | None, driver_cuda: Capability | None, expected: str | None) -> None:
    assert install_command(capability, system="Linux", driver_cuda=driver_cuda) == expected


def test_on_windows_the_cuda_builds_come_from_pytorchs_own_index() -> None:
    command = install_command((6, 1), system="Windows")
    assert command == f"{PASCAL} --index-url https://download.pytorch.org/whl/cu126"


def test_the_same_version_without_cuda_has_to_be_replaced() -> None:
    command = install_command((8, 6), system="Linux", again=True)
    assert command == "pip install --force-reinstall torch torchvision"


def test_every_card_of_the_profiles_has_a_build() -> None:
    assert card_names()
    for name in card_names():
        assert install_command(load_card(name).capability_pair, system="Linux") is not None, name
    assert [build.cuda_major for build in BUILDS] == sorted((build.cuda_major for build in BUILDS), reverse=True)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.9.1", 'pip install "torch==2.9.1" torchvision'),
        ("2.9.1+cu126", 'pip install "torch==2.9.1" torchvision --index-url https://download.pytorch.org/whl/cu126'),
        ("2.9.1+cpu", 'pip install "torch==2.9.1" torchvision --index-url https://download.pytorch.org/whl/cpu'),
        ("2.9.1+local.build", 'pip install "torch==2.9.1" torchvision'),
    ],
)
def test_the_pair_of_an_installed_torch(version: str, expected: str) -> None:
    assert same_torch(version) == expected
