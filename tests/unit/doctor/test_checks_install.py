from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem.doctor import Status, can_start, examine
from lowmem.doctor import checks_install as checks
from lowmem.doctor.checks_install import same_torch
from lowmem.measure.nvml import DriverReport
from tests.unit.doctor.scripted import GTX1060, NO_CARD, RTX3060, TORCH_2_7, healthy, said, with_card
from tests.unit.measure.test_usable import NEWEST, PASCAL, VOLTA


def test_a_healthy_machine_is_all_ok_but_for_hints() -> None:
    findings = examine(healthy())
    assert can_start(findings)
    assert not [finding for finding in findings if finding.status in {Status.WARNING, Status.FAIL}]
    assert {"python", "torch", "torchvision", "driver", "card", "build", "kernel", "memory", "disk", "data"} <= {
        finding.name for finding in findings
    }
    # One screen, the mends included.
    assert sum(1 + (finding.mend is not None) for finding in findings) + 1 <= 24


def test_python_and_what_lowmem_requires() -> None:
    found = said(checks.python, healthy())
    assert (found.status, found.finding) == (Status.OK, "Python 3.11.7, lowmem 0.1.0")
    found = said(checks.python, healthy(unmet=("rich>=13.7", "torch>=2.7.1")))
    assert (found.status, found.mend) == (Status.FAIL, 'pip install "rich>=13.7"')


def test_torch_that_cannot_be_imported() -> None:
    found = said(checks.torch, healthy(torch_works=False, troubles={"torch": "ImportError: libcudart.so.13"}))
    assert found.status == Status.FAIL
    assert "ImportError: libcudart.so.13" in found.finding
    assert found.mend == 'pip install --force-reinstall "torch==2.15.0"'


def test_torch_that_is_not_there() -> None:
    found = said(checks.torch, healthy(torch_version=None, torch_works=False))
    assert (found.status, found.mend) == (Status.FAIL, NEWEST)
    found = said(checks.torch, with_card(GTX1060, torch_version=None, torch_works=False))
    assert found.mend == PASCAL


def test_torch_older_than_lowmem_supports() -> None:
    found = said(checks.torch, healthy(torch_version="2.6.0", torch_cuda="12.4"))
    assert found.status == Status.WARNING
    found = said(checks.torch, healthy(torch_version="2.7.1+cu126", torch_cuda="12.6"))
    assert (found.status, found.finding) == (Status.OK, "2.7.1+cu126, built for CUDA 12.6")


@pytest.mark.parametrize(
    ("torch", "wants", "works", "status"),
    [
        ("2.15.0", "torch (>=2.14.0)", True, Status.OK),
        ("2.7.1+cu126", "torch==2.7.1", True, Status.OK),
        ("2.8.0", "torch==2.7.1", False, Status.FAIL),
        ("2.8.0", "torch==2.7.1", True, Status.WARNING),
        ("2.13.0", "torch (>=2.14.0)", False, Status.FAIL),
        ("2.15.0", "no requirement !!", True, Status.OK),
        ("2.15.0", None, True, Status.OK),
    ],
)
def test_the_pair(torch: str, wants: str | None, works: bool, status: Status) -> None:
    found = said(checks.torchvision, healthy(torch_version=torch, torchvision_wants=wants, torchvision_works=works))
    assert found.status == status
    if status != Status.OK:
        public = torch.partition("+")[0]
        assert found.mend is not None
        assert found.mend.startswith(f'pip install "torch=={public}" torchvision')


def test_a_fitting_torchvision_that_fails_all_the_same() -> None:
    why = "RuntimeError: operator torchvision::nms does not exist"
    found = said(checks.torchvision, healthy(torchvision_works=False, troubles={"torchvision": why}))
    assert (found.status, why in found.finding) == (Status.FAIL, True)
    assert found.mend == 'pip install --force-reinstall --no-deps "torchvision==0.29.2"'


def test_no_torchvision() -> None:
    found = said(checks.torchvision, healthy(torchvision_version=None, torchvision_works=False))
    assert (found.status, found.mend) == (Status.FAIL, 'pip install "torch==2.15.0" torchvision')


def test_torchvision_is_not_judged_without_torch() -> None:
    assert checks.torchvision(healthy(torch_works=False, torchvision_works=None)) is None


def test_one_command_where_torch_has_to_be_replaced_anyway() -> None:
    facts = with_card(GTX1060, device_asked="cuda", torchvision_wants="torch==2.7.1", torchvision_works=False)
    for check in (checks.build, checks.torchvision):
        found = said(check, facts)
        assert (found.status, found.mend) == (Status.FAIL, PASCAL)


def test_a_build_with_kernels() -> None:
    found = said(checks.build, healthy())
    assert found.status == Status.OK
    found = said(checks.build, with_card(GTX1060, arch_list=TORCH_2_7))
    assert (found.status, "6.1" in found.finding) == (Status.OK, True)


@pytest.mark.parametrize(
    ("capability", "arch_list", "mend"),
    [
        ((6, 1), None, PASCAL),
        ((5, 0), None, PASCAL),
        ((7, 0), None, VOLTA),
        ((12, 0), TORCH_2_7, NEWEST),
        ((3, 7), None, "lowmem train --device cpu"),
    ],
)
def test_a_build_without_kernels(capability: tuple[int, int], arch_list: tuple[str, ...] | None, mend: str) -> None:
    facts = with_card(replace(RTX3060, capability=capability))
    facts = facts if arch_list is None else replace(facts, arch_list=arch_list)
    for asked, status in (("auto", Status.WARNING), ("cuda", Status.FAIL)):  # `auto` trains on the CPU
        found = said(checks.build, replace(facts, device_asked=asked))
        assert (found.status, found.mend) == (status, mend)
        assert f"compute capability {capability[0]}.{capability[1]}" in found.finding


def test_a_build_without_cuda_is_a_failure_only_if_cuda_is_asked_for() -> None:
    for asked, status in (("auto", Status.WARNING), ("cuda", Status.FAIL)):
        facts = with_card(GTX1060, torch_cuda=None, arch_list=(), cuda_available=False, device_asked=asked)
        found = said(checks.build, facts)
        assert (found.status, found.mend) == (status, f"pip install --force-reinstall {PASCAL[len('pip install ') :]}")
    assert checks.build(replace(facts, device_asked="cpu")) is None


def test_no_driver() -> None:
    for asked, status in (("auto", Status.NOTE), ("cuda", Status.FAIL)):
        found = said(checks.driver, replace(NO_CARD, device_asked=asked))
        assert (found.status, "no NVIDIA driver" in found.finding) == (status, True)
        assert "install the driver" in (found.mend or "")
    assert checks.driver(replace(NO_CARD, device_asked="cpu")) is None


@pytest.mark.parametrize(
    ("card", "cuda", "torch_cuda", "mend"),
    [
        # A driver for CUDA 12 under torch for 13: another torch costs less than another driver.
        (RTX3060, (12, 4), "13.2", VOLTA),
        (GTX1060, (12, 2), "13.2", PASCAL),
        (RTX3060, (11, 4), "12.6", "install NVIDIA's driver of branch R525"),
        (RTX3060, (11, 4), "13.0", "install NVIDIA's driver of branch R580"),
    ],
)
def test_a_driver_too_old(card: object, cuda: tuple[int, int], torch_cuda: str, mend: str) -> None:
    facts = with_card(card, cuda_version=cuda, torch_cuda=torch_cuda, cuda_available=False)  # type: ignore[arg-type]
    found = said(checks.driver, facts)
    assert (found.status, found.mend) == (Status.WARNING, mend)
    found = said(checks.driver, replace(facts, device_asked="cuda"))
    assert found.status == Status.FAIL


@pytest.mark.parametrize(
    ("cuda", "torch_cuda"), [((13, 0), "13.2"), ((12, 2), "12.8"), ((13, 0), "12.6"), (None, "13.2")]
)
def test_a_driver_new_enough(cuda: tuple[int, int] | None, torch_cuda: str) -> None:
    """Within a major version of CUDA any driver will do."""
    found = said(checks.driver, with_card(RTX3060, cuda_version=cuda, torch_cuda=torch_cuda))
    assert (found.status, found.mend) == (Status.OK, None)


def test_the_last_driver_branch_of_a_pascal_card() -> None:
    found = said(checks.driver, with_card(GTX1060, driver_version="580.65.06"))
    assert "R580 is the last branch" in found.finding
    for facts in (with_card(RTX3060), with_card(GTX1060, driver_version="535.183.01")):
        found = said(checks.driver, facts)
        assert "R580" not in found.finding


def test_a_card_that_fell_off_the_bus() -> None:
    found = said(checks.driver, with_card(replace(RTX3060, trouble="GPU is lost", uuid=None), device_uuid=None))
    assert "GPU is lost" in found.finding
    assert found.status == Status.WARNING


def test_kernels() -> None:
    found = said(checks.kernel, healthy())
    assert found.status == Status.OK
    assert checks.kernel(healthy(kernel_works=None)) is None


@pytest.mark.parametrize(
    ("why", "mend"),
    [
        ("AcceleratorError: CUDA error: no kernel image is available for execution on the device", PASCAL),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB", "free memory"),
        ("the process was killed by signal 11", "nvidia-smi"),
    ],
)
def test_a_kernel_that_fails(why: str, mend: str) -> None:
    found = said(checks.kernel, with_card(GTX1060, device_asked="cuda", kernel_works=False, troubles={"kernel": why}))
    assert (found.status, why in found.finding) == (Status.FAIL, True)
    assert (found.mend or "").startswith(mend)


def test_a_driver_that_lists_no_card() -> None:
    report = DriverReport(driver_version="580.65", missing="the NVIDIA driver answers, but lists no card")
    found = said(checks.driver, replace(NO_CARD, driver=report))
    assert (found.status, found.mend) == (Status.NOTE, None)


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
