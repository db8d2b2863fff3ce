"""Gathers the facts once: metadata, the driver, torch through the probe, the disk. Never raises for what it finds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

import lowmem
from lowmem import isolate
from lowmem.config.cards import Card, find_card
from lowmem.config.schema import Config, flatten
from lowmem.core.errors import LowmemError
from lowmem.doctor.facts import Facts
from lowmem.doctor.probe import STAGES
from lowmem.measure.nvml import DriverReport, read_driver

VARIABLES = (  # in the order in which they are told
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_LAUNCH_BLOCKING",
    "CUDNN_CONV_WSCAP_DBG",
    "CUDA_MODULE_LOADING",
    "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_PROBE_SECONDS = 120.0  # the first use of a card by a new build may compile for a minute


@dataclass(frozen=True)
class Answers:
    """What each stage of the probe found, and why the others did not: an exception, the end of the process, or the
    time."""

    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)


Asker = Callable[[Mapping[str, object], Sequence[str]], Answers]


def ask(values: Mapping[str, object], stages: Sequence[str], *, timeout_seconds: float = _PROBE_SECONDS) -> Answers:
    """Runs the stages in one process; if it dies in one, the rest in another. Never raises.

    `values`: dotted name -> setting. Without torch none of the later stages is tried.
    """
    results: dict[str, Mapping[str, Any]] = {}
    troubles: dict[str, str] = {}
    left = list(stages)
    while left and "torch" not in troubles:
        asked = {"values": values, "stages": left}
        outcome = isolate.run("lowmem.doctor.probe:probe", asked, timeout_seconds=timeout_seconds)
        for part in outcome.parts:
            results |= part.get("results", {})
            troubles |= part.get("troubles", {})
        begun = [part["begins"] for part in outcome.parts if "begins" in part]
        for stage in begun or left[:1]:
            if stage not in results and stage not in troubles:
                troubles[stage] = _how_it_ended(outcome, timeout_seconds)
        if not begun:  # it did not even start: it will not start again either
            break
        left = [stage for stage in left if stage not in begun]
    return Answers(results, troubles)


def _how_it_ended(outcome: isolate.CallResult, timeout_seconds: float) -> str:
    if outcome.ended == "too long":
        return f"no answer within {timeout_seconds:g} seconds"
    if outcome.code is None:
        return f"the process {outcome.words}"
    ended = f"was killed by signal {-outcome.code}" if outcome.code < 0 else f"ended with code {outcome.code}"
    return f"the process {ended}: {outcome.words}" if outcome.words else f"the process {ended}"


def gather(
    config: Config,
    out: Path | None = None,
    *,
    driver: Callable[[], DriverReport] = read_driver,
    asker: Asker = ask,
    environment: Mapping[str, str] = os.environ,
) -> Facts:
    """The facts for a run of `config` into `out` (default `runs/<arch>`).

    `driver`, `asker`, `environment`: where the driver's account, the probe's answers and the variables come from.
    """
    model = config.model
    out = Path("runs") / model.arch if out is None else out
    report = driver()  # before the probe, which takes memory of the card itself
    skipped = {"cuda", "kernel"} if config.train.device == "cpu" else set()
    answers = asker(flatten(config), [stage for stage in STAGES if stage not in skipped])
    known: dict[str, Any] = {
        "device_asked": config.train.device,
        "precision_asked": config.train.precision,
        "network": f"{model.arch} ({model.block}, width {model.width})",
        "out": out,
        "environment": {name: environment[name] for name in VARIABLES if name in environment},
        "driver": report,
        **_machine(),
        **_disk(out),
    }
    for found in answers.results.values():
        known |= found
    facts = Facts(**known | _packages(answers) | _what_works(answers))
    return replace(facts, profile=_profile(facts))


def _what_works(answers: Answers) -> dict[str, Any]:
    def works(stage: str) -> bool | None:
        return True if stage in answers.results else False if stage in answers.troubles else None

    no_card = answers.results.get("cuda", {}).get("cuda_available") is False
    return {
        "torch_works": works("torch"),
        "torchvision_works": works("torchvision"),
        # Without a card there is nothing for a kernel to run on, and its failure says nothing new.
        "kernel_works": None if no_card else works("kernel"),
        "troubles": answers.troubles,
    }


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system() or None,
        "wsl": "microsoft" in platform.release().lower(),
        "python_version": platform.python_version(),
        "lowmem_version": lowmem.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_share": cpu_share(Path("/sys/fs/cgroup")),
    }


def cpu_share(root: Path) -> float | None:
    """The CPUs that the container's limit comes to (control groups version 2, then 1)."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()[:2]
    except (OSError, ValueError):
        try:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except (OSError, ValueError):
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None


def _packages(answers: Answers) -> dict[str, Any]:
    of_torch = re.compile(r"\s*torch(?![A-Za-z0-9._-])", re.IGNORECASE)
    return {
        **{f"{package}_version": _used_version(package, answers) for package in ("torch", "torchvision")},
        "torchvision_wants": next((text for text in _requires("torchvision") if of_torch.match(text)), None),
        "unmet": tuple(sorted(text for text in _requires("lowmem") if is_unmet(text))),
    }


def _used_version(package: str, answers: Answers) -> str | None:
    """As installed; as imported, should that be another (a folder of that name on the path).

    What is installed tells better where it is from: wheels of the package index call themselves `2.7.1+cu126` inside.
    """
    installed, imported = _version(package), answers.results.get(package, {}).get(f"{package}_version")
    if installed is None or imported is None:
        return installed or imported
    return installed if installed.partition("+")[0] == imported.partition("+")[0] else imported


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(package: str) -> str | None:
    return found.version if (found := _distribution(package)) is not None else None


def _requires(package: str) -> list[str]:
    return (found.requires or []) if (found := _distribution(package)) is not None else []


def is_unmet(text: str) -> bool:
    """Whether a requirement that holds on this machine is not met; optional extras do not count."""
    try:
        wanted = Requirement(text)
    except InvalidRequirement:
        return False
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return False
    there = _version(wanted.name)
    return there is None or not wanted.specifier.contains(there, prereleases=True)


def _disk(out: Path) -> dict[str, Any]:
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found: dict[str, Any] = {"disk_folder": folder, "out_taken": out.is_dir() and any(out.iterdir())}
    try:
        found["disk_free_bytes"] = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"lowmem")
    except OSError as error:
        found["disk_trouble"] = error.strerror or str(error)
    return found


def _profile(facts: Facts) -> Card | None:
    card = facts.card
    if card is None or card.name is None or card.total_bytes is None:
        return None
    try:
        return find_card(card.name, card.total_bytes)
    except LowmemError:
        return None
