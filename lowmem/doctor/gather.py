"""Gathers the facts once: metadata, the driver, torch through the probe, the disk. Never raises for what it finds.

The only network traffic is one connection, opened and closed, to the host the pictures would be downloaded from.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement

import lowmem
from lowmem.config.cards import Card, find_card
from lowmem.config.schema import Config, flatten
from lowmem.core.errors import LowmemError
from lowmem.core.units import format_size
from lowmem.doctor.asking import Answers, ask
from lowmem.doctor.facts import Facts
from lowmem.doctor.probe import STAGES
from lowmem.measure.nvml import DriverReport, read_driver
from lowmem.runs.setup import kept_epochs, run_bytes

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDNN_CONV_WSCAP_DBG",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT",
)
_CONNECT_SECONDS = 3.0

Asker = Callable[[Mapping[str, object], Sequence[str]], Answers]


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
    found: dict[str, Any] = {
        "device_asked": config.train.device,
        "precision_asked": config.train.precision,
        "network": f"{model.arch} ({model.block}, width {model.width})",
        "data_asked": config.data.source,
        "out": out,
        "environment": {name: environment[name] for name in VARIABLES if name in environment},
        "driver": report,
        **_machine(),
        **_packages(answers),
        **_of_torch(answers),
        **_data(answers.results.get("data")),
        **_disk(out, answers.results.get("network"), config),
    }
    facts = Facts(**found)
    profile = _profile(facts)
    return facts if profile is None else Facts(**found, profile=profile)


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system() or None,
        "wsl": "microsoft" in platform.release().lower(),
        "python_version": platform.python_version(),
        "lowmem_version": lowmem.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_share": _cpu_share(Path("/sys/fs/cgroup")),
    }


def _cpu_share(root: Path) -> float | None:
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
    wants = next((text for text in _requires("torchvision") if _named(text) == "torch"), None)
    return {
        **{f"{package}_version": _used_version(package, answers) for package in ("torch", "torchvision")},
        "torchvision_wants": wants,
        "unmet": tuple(sorted(text for text in _requires("lowmem") if _unmet(text))),
    }


def _used_version(package: str, answers: Answers) -> str | None:
    """As installed; as imported, should that be another (a folder of that name on the path).

    What is installed tells better where it is from: wheels of the package index call themselves `2.7.1+cu126` inside.
    """
    installed, imported = _version(package), answers.results.get(package, {}).get("version")
    if installed is None or imported is None:
        return installed or imported
    return installed if installed.partition("+")[0] == imported.partition("+")[0] else imported


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requires(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _named(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


def _unmet(text: str) -> bool:
    """Whether a requirement that holds on this machine is not met; optional extras do not count."""
    try:
        wanted = Requirement(text)
    except InvalidRequirement:
        return False
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return False
    there = _version(wanted.name)
    return there is None or not wanted.specifier.contains(there, prereleases=True)


def _of_torch(answers: Answers) -> dict[str, Any]:
    """What the probe's stages found, under the names of the facts; unknown is None."""
    results, troubles = answers.results, answers.troubles
    build, cuda = results.get("torch", {}), results.get("cuda", {})

    def works(stage: str) -> bool | None:
        return True if stage in results else False if stage in troubles else None

    kernel = works("kernel")
    troubles = dict(troubles)
    if kernel and not results["kernel"].get("right"):
        kernel = False
        troubles["kernel"] = f"wrong results, off by up to {results['kernel'].get('largest_error'):g}"
    return {
        "torch_works": works("torch"),
        "torch_cuda": build.get("cuda"),
        "arch_list": tuple(build["archs"]) if build.get("archs") is not None else None,
        "threads": build.get("threads"),
        "allocator_trouble": results.get("allocator", {}).get("refused"),
        "torchvision_works": works("torchvision"),
        "cuda_available": cuda.get("available"),
        "device_uuid": cuda.get("uuid"),
        # Without a card there is nothing for a kernel to run on, and its failure says nothing new.
        "kernel_works": kernel if cuda.get("available") is not False else None,
        "execution": results.get("execution"),
        "troubles": troubles,
    }


def _data(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {}
    words, url = found["words"], found.get("url")
    if url is None:
        return {"data_there": found["there"], "data_words": words}
    parts = urlsplit(url)
    return {
        "data_there": found["there"],
        "data_words": f"{words}: {format_size(found['download_bytes'])} would be downloaded from {parts.hostname}",
        "data_host": parts.hostname,
        "data_host_answers": _answers(parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)),
    }


def _answers(host: str, port: int) -> bool | None:
    """Whether a connection can be opened; None behind a proxy, and if the answer takes too long."""
    if urllib.request.getproxies():
        return None
    answer: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            answer.append(True)
        except OSError:
            answer.append(False)

    # Looking up the name knows no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return answer[0] if answer else None


def _disk(out: Path, sizes: Mapping[str, Any] | None, config: Config) -> dict[str, Any]:
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found: dict[str, Any] = {"disk_folder": folder, "out_taken": out.is_dir() and any(out.iterdir())}
    if sizes is not None:
        found["disk_needed_bytes"] = run_bytes(
            # Parameters and buffers, and momentum, which is as large as the parameters.
            checkpoint_bytes=sizes["state_bytes"] + sizes["parameter_bytes"],
            parameter_bytes=sizes["parameter_bytes"],
            keep=config.checkpoint.keep,
            kept_epochs=kept_epochs(epochs=config.train.epochs, keep_every=config.checkpoint.keep_every),
        )
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
