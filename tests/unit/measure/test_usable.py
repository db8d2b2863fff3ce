"""Which build of torch runs on which card, and what keeps torch from using one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pynvml
import pytest

from lowmem.config.cards import load_card
from lowmem.core.reading import profile_names
from lowmem.measure.nvml import DriverReport, read_driver
from lowmem.measure.usable import BUILDS, Capability, CardFacts, install_command, runs_on
from tests.unit.measure.scripted import Card, ScriptedNvml

ROOT = Path(__file__).parents[3]
PASCAL = 'pip install "torch==2.7.1" "torchvision==0.22.1"'
VOLTA = 'pip install "torch==2.10.0" "torchvision==0.25.0"'
NEWEST = "pip install --upgrade torch torchvision"
NEW_ARCHS, OLD_ARCHS = BUILDS[0].archs.split(), BUILDS[-1].archs.split()
RTX = Card(name="NVIDIA GeForce RTX 3060", capability=(8, 6))
NEW_DRIVER: dict[str, Any] = {"driver": "580.65.06", "cuda": 13000}


def card_facts(library: ScriptedNvml, **changes: Any) -> CardFacts:
    """Torch 2.15 for CUDA 13 on Linux, which finds no card, beside that driver."""
    usual = {"system": "Linux", "torch_version": "2.15.0", "torch_works": True, "torch_cuda": "13.2"}
    usual |= {"arch_list": NEW_ARCHS, "cuda_available": False}
    return CardFacts(driver=read_driver(library), **usual | changes)


@pytest.mark.parametrize(
    ("facts", "check", "why", "mend"),
    [
        (
            card_facts(ScriptedNvml([Card()], **NEW_DRIVER), torch_cuda=None, arch_list=()),
            *("build", "torch 2.15.0 is built without CUDA and cannot use the NVIDIA GeForce GTX 1060 6GB"),
            PASCAL.replace("install", "install --force-reinstall"),
        ),
        (
            card_facts(ScriptedNvml([Card()], **NEW_DRIVER), cuda_available=True),
            *("build", "no kernels for the NVIDIA GeForce GTX 1060 6GB (compute capability 6.1)", PASCAL),
        ),
        (
            card_facts(ScriptedNvml([RTX])),
            *("driver", "the driver 535.183.01 runs CUDA 12.2; torch 2.15.0 needs CUDA 13, a driver of branch R580"),
            VOLTA,
        ),
        (
            card_facts(ScriptedNvml([RTX], **NEW_DRIVER), environment={"CUDA_VISIBLE_DEVICES": ""}),
            *("visible", "CUDA_VISIBLE_DEVICES='' hides every card", "unset CUDA_VISIBLE_DEVICES"),
        ),
        (
            card_facts(ScriptedNvml([RTX], **NEW_DRIVER)),
            *("visible", "the driver lists a card, but torch finds none", "torch.cuda.init()"),
        ),
        (
            card_facts(ScriptedNvml([Card(handle=pynvml.NVMLError_GpuIsLost())], **NEW_DRIVER)),
            "driver",
            "GPU is lost",
            None,
        ),
        (card_facts(ScriptedNvml(init=pynvml.NVMLError_DriverNotLoaded())), "driver", "not running: restart", None),
        (card_facts(ScriptedNvml([])), "driver", "lists no card", None),
    ],
)
def test_what_keeps_torch_from_a_card(facts: CardFacts, check: str, why: str, mend: str | None) -> None:
    obstacle = facts.obstacles()[check]
    assert why in obstacle.why
    assert mend is None or (obstacle.mend or "").startswith(mend) or mend in (obstacle.mend or "")


@pytest.mark.parametrize(
    "facts",
    [
        card_facts(ScriptedNvml(init=pynvml.NVMLError_LibraryNotFound())),  # no driver, no card: nothing to say
        card_facts(ScriptedNvml([RTX], **NEW_DRIVER), cuda_available=True),
        card_facts(ScriptedNvml([Card()]), torch_cuda="12.6", arch_list=OLD_ARCHS, cuda_available=True),
        # Which of the two torch takes is unknown, and one can be used.
        card_facts(ScriptedNvml([Card(), RTX], **NEW_DRIVER), cuda_available=True),
        # Another maker's build.
        card_facts(ScriptedNvml([RTX], **NEW_DRIVER), torch_cuda=None, arch_list=["gfx90a"], cuda_available=True),
        CardFacts(driver=DriverReport()),
    ],
)
def test_where_nothing_does(facts: CardFacts) -> None:
    assert facts.obstacles() == {}


# -- which build runs where --------------------------------------------------------------------------------------------


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


def test_the_extra_for_old_cards_is_the_build_that_runs_on_them() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert " ".join(f'"{one}"' for one in extras["pascal"]) == BUILDS[-1].packages
    assert '`pip install -e ".[pascal]"`' in (ROOT / "README.md").read_text(encoding="utf-8")


def test_on_windows_the_cuda_builds_come_from_pytorchs_own_index() -> None:
    command = install_command((6, 1), system="Windows")
    assert command == f"{PASCAL} --index-url https://download.pytorch.org/whl/cu126"


def test_the_same_version_without_cuda_has_to_be_replaced() -> None:
    command = install_command((8, 6), system="Linux", again=True)
    assert command == "pip install --force-reinstall torch torchvision"


def test_every_card_of_the_profiles_has_a_build() -> None:
    assert profile_names("cards")
    for name in profile_names("cards"):
        assert install_command(load_card(name).capability_pair, system="Linux") is not None, name
    folders = [build.folder for build in BUILDS]
    assert folders == sorted(folders, reverse=True)
