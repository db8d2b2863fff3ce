"""Gathering: real where it can be, and a GTX 1060 from its scripted driver to the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lowmem import doctor
from lowmem.cli.show import show_doctor
from lowmem.config.schema import Config
from lowmem.core.errors import ExitCode
from lowmem.doctor import Facts, Status, examine, facts, gather
from lowmem.doctor.facts import cpu_share, is_unmet
from lowmem.doctor.probe import Answers
from lowmem.measure.nvml import DriverReport, read_driver
from tests.unit.doctor.scripted import TORCH_2_7, TORCH_2_15
from tests.unit.measure.scripted import Card, ScriptedNvml

NO_KERNEL = "AcceleratorError: CUDA error: no kernel image is available for execution on the device"


def config(**train: Any) -> Config:
    return Config.model_validate({"data": {"source": "shapes"}, "train": train})


def probe(
    version: str, cuda: str | None, archs: Sequence[str], *, kernel: bool, available: bool = True
) -> Callable[[Mapping[str, object], Sequence[str]], Answers]:
    """What the probe would answer on the machine of the card."""

    def asker(values: Mapping[str, object], stages: Sequence[str]) -> Answers:
        build = {"torch_version": version, "torch_cuda": cuda, "arch_list": list(archs), "threads": 1}
        results: Answers = {
            "torch": build,
            "allocator": {},
            "network": {"disk_needed_bytes": 174_000_000},
            "torchvision": {"torchvision_version": "0.29.2"},
            "data": {"data_there": True, "data_words": "shapes are drawn, no files needed"},
            "cuda": {"cuda_available": available, "device_uuid": "11111111-2222-3333-4444-555555555555"},
            "execution": {"execution": {"device": "cuda", "precision": "fp32", "memory_format": "contiguous"}},
            "kernel": {} if kernel else NO_KERNEL,
        }
        return {k: v for k, v in results.items() if k in stages}

    return asker


def gtx1060(driver: str = "580.65.06", cuda: int = 13000) -> Callable[[], DriverReport]:
    library = ScriptedNvml(
        [Card(compute=[(4242, 600 * 2**20)])], names={4242: "/usr/bin/python3"}, driver=driver, cuda=cuda
    )
    return lambda: read_driver(library)


def gathered(
    wanted: Config,
    out: Path | None,
    *,
    driver: Callable[[], DriverReport] = DriverReport,
    asker: Callable[..., Answers] = lambda values, stages: {},
    environment: Mapping[str, str] = {},
) -> Facts:
    """On a machine whose driver, probe and environment are these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "read_driver", driver)
        patch.setattr(facts, "ask", asker)
        for name in facts.VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return gather(wanted, out)


def test_a_gtx_1060_with_torch_2_15(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = probe("2.15.0", "13.2", TORCH_2_15, kernel=False)

    def scripted(wanted: Config, out: Path | None) -> Any:
        return gathered(wanted, out, driver=gtx1060(), asker=asker)

    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(doctor, "gather", scripted)
    code = show_doctor(config(device="cuda"), tmp_path / "run", True)
    assert code == ExitCode.PREFLIGHT == 3
    shown = json.loads(capsys.readouterr().out)
    assert shown["can_start"] is False
    build = next(finding for finding in shown["findings"] if finding["name"] == "build")
    assert build["status"] == "fail"
    assert build["mend"] == 'pip install "torch==2.7.1" "torchvision==0.22.1"'
    assert "GTX 1060 6GB (compute capability 6.1)" in build["finding"]
    kernel = next(finding for finding in shown["findings"] if finding["name"] == "kernel")
    assert (kernel["status"], kernel["mend"]) == ("fail", build["mend"])
    # The same for people, and the command in one piece.
    assert show_doctor(config(device="cuda"), tmp_path / "run", False) == 3
    text = capsys.readouterr().out
    assert '> pip install "torch==2.7.1" "torchvision==0.22.1"\n' in text
    assert text.splitlines()[-1].startswith("training cannot start: 2 failures")
    assert "python3 (pid 4242): 600 MiB" in text
    # Without being asked for the card training starts on the CPU.
    assert show_doctor(config(), tmp_path / "run", False) == 0
    assert '> pip install "torch==2.7.1" "torchvision==0.22.1"\n' in capsys.readouterr().out


def test_a_gtx_1060_with_torch_2_7(tmp_path: Path) -> None:
    asker = probe("2.7.1+cu126", "12.6", TORCH_2_7, kernel=True)
    found = gathered(config(), tmp_path, driver=gtx1060("535.183.01", 12020), asker=asker)
    assert found.profile is not None
    assert found.profile.name == "GTX 1060 6G"
    findings = {finding.name: finding for finding in examine(found)}
    for name in ("build", "driver", "kernel", "card"):
        assert findings[name].status == Status.OK, findings[name]


def test_an_old_driver_under_a_new_torch_gets_the_same_command(tmp_path: Path) -> None:
    asker = probe("2.15.0", "13.2", TORCH_2_15, kernel=False, available=False)
    found = gathered(config(), tmp_path, driver=gtx1060("535.183.01", 12020), asker=asker)
    findings = {finding.name: finding for finding in examine(found)}
    mends = {findings[name].mend for name in ("driver", "build")}
    assert len(mends) == 1
    assert "torch==2.7.1" in str(mends)
    assert "kernel" not in findings  # torch finds no card: there was nothing to run it on


def test_on_the_cpu_no_card_is_touched(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def asker(values: Mapping[str, object], stages: Sequence[str]) -> Answers:
        asked.append(stages)
        return {}

    gathered(config(device="cpu"), tmp_path, asker=asker)
    assert not {"cuda", "kernel"} & set(asked[0])
    gathered(config(), tmp_path, asker=asker)
    assert {"cuda", "kernel"} <= set(asked[1])


def test_only_known_variables_are_taken(tmp_path: Path) -> None:
    known = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_CUDA_ALLOC_CONF": "x:1"}
    found = gathered(config(), tmp_path, environment={**known, "HF_TOKEN": "secret"})
    assert found.environment == known


def _disk_facts(out: Path) -> Any:
    asker = probe("2.7.1", "12.6", TORCH_2_7, kernel=True)
    return gathered(config(), out, asker=asker)


def test_the_disk(tmp_path: Path) -> None:
    found = _disk_facts(tmp_path / "not" / "yet" / "there")
    assert (found.disk_folder, found.disk_trouble, found.out_taken) == (tmp_path, None, False)
    assert found.disk_needed_bytes == 174_000_000
    assert found.disk_free_bytes is not None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = _disk_facts(tmp_path / "file" / "run")
    assert found.disk_trouble is not None
    (tmp_path / "run").mkdir()
    assert _disk_facts(tmp_path / "run").out_taken is False
    (tmp_path / "run" / "config.yaml").write_text("")
    assert _disk_facts(tmp_path / "run").out_taken is True


def test_cpu_limits_of_a_container(tmp_path: Path) -> None:
    assert cpu_share(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_share(tmp_path) == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_share(tmp_path) is None
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert cpu_share(tmp_path) == 2.0
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_share(tmp_path) is None


@pytest.mark.parametrize(
    ("requirement", "unmet"),
    [
        ("pytest>=1.0", False),
        ("pytest>=1000", True),
        ("no-such-package-of-anybody", True),
        ("no-such-package-of-anybody; extra == 'test'", False),
        ("no-such-package-of-anybody; python_version < '3'", False),
        ("this is !! no requirement", False),
    ],
)
def test_requirements(requirement: str, unmet: bool) -> None:
    assert is_unmet(requirement) is unmet
