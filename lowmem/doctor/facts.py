"""What is known of the machine and of the run that is wanted (`Facts`), gathered once: metadata, the driver, torch
through the probe, the disk; and what a check says of it (`Finding`).

Every fact may be unknown: None, or empty. A check that lacks its facts says so or says nothing; it never guesses and
never fails. Gathering never raises for what it finds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

import lowmem
from lowmem.config.cards import Card, find_card
from lowmem.config.schema import Config, flatten
from lowmem.core.errors import LowmemError
from lowmem.doctor.probe import STAGES, ask
from lowmem.measure.host import free_host_bytes
from lowmem.measure.nvml import DriverDevice, read_driver
from lowmem.measure.processor import busy_cores, usable_cores
from lowmem.measure.usable import CardFacts

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


class Status(StrEnum):
    """`fail`: training cannot start. `warning`: it starts, and something is wrong. `note`: good to know."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One check's result. `mend`: the exact command or setting, None if there is nothing to mend or no command does."""

    name: str
    status: Status
    finding: str
    mend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts(CardFacts):
    """Everything the checks look at. What is asked for stands first, what was found after it."""

    # the run
    device_asked: str | None = None  # auto, cpu, cuda
    precision_asked: str | None = None
    network: str | None = None  # in words
    out: Path | None = None

    # the machine
    wsl: bool | None = None
    python_version: str | None = None
    lowmem_version: str | None = None
    cores: int | None = None  # that this process may use
    cpu_share: float | None = None  # CPUs a container may use, None without a limit
    busy_cores: float | None = None  # of `cores`, with other programs
    host_free_bytes: int | None = None

    # packages, by their metadata: nothing is imported for these
    torchvision_version: str | None = None
    torchvision_wants: str | None = None  # its requirement on torch, like `torch==2.7.1`
    unmet: tuple[str, ...] = ()  # what lowmem requires and is missing or too old, like `rich>=13.7`

    # torch, asked in a process of its own
    threads: int | None = None
    allocator_trouble: str | None = None  # torch's own words about the allocator settings in the environment
    torchvision_works: bool | None = None
    kernel_works: bool | None = None
    execution: Mapping[str, str] = field(default_factory=dict)  # train's device, precision, memory_format
    troubles: Mapping[str, str] = field(default_factory=dict)  # stage of the probe -> why it failed, in a line

    # the driver and the card
    profile: Card | None = None

    # disk and data
    disk_folder: Path = field(default_factory=Path)  # the nearest folder above `out` that exists
    disk_free_bytes: int | None = None
    disk_needed_bytes: int | None = None
    disk_trouble: str | None = None
    out_taken: bool | None = None  # `out` exists and is not empty
    data_there: bool | None = None
    data_words: str | None = None
    data_warnings: Sequence[str] = ()
    data_host_answers: bool | None = None  # the host from which it would be downloaded

    @property
    def used_card(self) -> DriverDevice | None:
        """The same; None where the run is asked to be on the CPU."""
        return None if self.device_asked == "cpu" else self.card

    @property
    def is_16xx(self) -> bool:
        """Cards without tensor cores that have the capability of the 20xx: told apart by name alone."""
        return self.capability == (7, 5) and self.card is not None and "GTX 16" in (self.card.name or "")

    @property
    def wants_card(self) -> bool:
        """Whether a card matters for the run: not with --device cpu, nor under auto where there is none."""
        return self.device_asked == "cuda" or self.used_card is not None

    @property
    def without_card(self) -> Status:
        """How bad it is that CUDA cannot be used: `--device auto` trains on the CPU instead."""
        return Status.FAIL if self.device_asked == "cuda" else Status.WARNING

    @property
    def on_card(self) -> Status:
        """How bad a fault is that torch itself does not notice until the first kernel."""
        return self.without_card if self.cuda_available is False or self.lacks_kernels else Status.FAIL


def requirement(text: str | None) -> Requirement | None:
    """None for an unknown requirement and for text that is none."""
    try:
        return Requirement(text) if text is not None else None
    except InvalidRequirement:
        return None


def split_way_out(sentence: str) -> tuple[str, str | None]:
    """(finding, mend) of a sentence of lowmem's own, `what is wrong (why: so): the way out`, at its last colon outside
    of parentheses; another error has no way out."""
    if re.match(r"\w*(Error|Exception|Interrupt): |the process ", sentence):
        return sentence, None
    if sentence.count("(") == sentence.count(")"):  # else one of them is a path's, and tells nothing
        match = re.fullmatch(r"((?:\([^)]*\)|[^(])*): ((?:\([^)]*\)|[^(])*)", sentence)
        return (match[1], match[2]) if match is not None else (sentence, None)
    finding, colon, mend = sentence.rpartition(": ")
    return (finding, mend) if colon else (sentence, None)


def gather(config: Config, out: Path | None = None) -> Facts:
    """The facts for a run of `config` into `out` (default `runs/NETWORK`)."""
    model = config.model
    out = Path("runs") / model.name if out is None else out
    report = read_driver()  # before the probe, which takes memory of the card itself
    busy = busy_cores()  # and keeps a core busy
    skipped = {"cuda", "kernel"} if config.train.device == "cpu" else set()
    answers = ask(flatten(config), [stage for stage in STAGES if stage not in skipped])
    troubles = {stage: words for stage, words in answers.items() if isinstance(words, str)}
    probed = {name: value for found in answers.values() if isinstance(found, dict) for name, value in found.items()}
    works = {stage: stage not in troubles for stage in answers}
    if probed.get("cuda_available") is False:  # there is nothing for a kernel to run on: its failure says nothing new
        works.pop("kernel", None)
    known: dict[str, Any] = {
        "device_asked": config.train.device,
        "precision_asked": config.train.precision,
        "network": model.words,
        "out": out,
        "system": platform.system() or None,
        "wsl": "microsoft" in platform.release().lower(),
        "python_version": platform.python_version(),
        "lowmem_version": lowmem.__version__,
        "cores": usable_cores(),
        "busy_cores": busy,
        "host_free_bytes": free_host_bytes(),
        "cpu_share": cpu_share(Path("/sys/fs/cgroup")),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "driver": report,
        "troubles": troubles,
        **{f"{stage}_works": works.get(stage) for stage in ("torch", "torchvision", "kernel")},
    }
    facts = Facts(**known | _disk(out) | probed | _packages(probed))
    card = facts.card
    if card is not None and card.name is not None and card.total_bytes is not None:
        with suppress(LowmemError):
            return replace(facts, profile=find_card(card.name, card.total_bytes))
    return facts


def cpu_share(root: Path) -> float | None:
    """The CPUs that the container's limit comes to (control groups version 2, then 1)."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError, ZeroDivisionError):  # not there, or "max"
            quota, period = map(int, " ".join((root / name).read_text(encoding="ascii") for name in names).split()[:2])
            return quota / period if quota > 0 else None
    return None


def _packages(probed: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("torch_version", "torchvision_version"):
        installed, imported = _installed(name.removesuffix("_version"))[0], probed.get(name)
        # What is installed tells better where it is from (wheels of the package index call themselves `2.7.1+cu126`
        # inside), unless another is imported: a folder of that name on the path.
        same = imported is None or (installed or "").partition("+")[0] == imported.partition("+")[0]
        found[name] = installed if same else imported
    wants = map(requirement, _installed("torchvision")[1])
    found["torchvision_wants"] = next((str(one) for one in wants if one and one.name.lower() == "torch"), None)
    found["unmet"] = tuple(sorted(text for text in _installed("lowmem")[1] if is_unmet(text)))
    return found


def _installed(package: str) -> tuple[str | None, list[str]]:
    """Version and requirements by the package's metadata."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None, []
    return found.version, found.requires or []


def is_unmet(text: str) -> bool:
    """Whether a requirement that holds on this machine is not met; optional extras do not count."""
    wanted = requirement(text)
    if wanted is None or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
        return False
    there, _ = _installed(wanted.name)
    return there is None or not wanted.specifier.contains(there, prereleases=True)


def _disk(out: Path) -> dict[str, Any]:
    place = out.absolute()
    folder = next((one for one in (place, *place.parents) if one.exists()), Path(place.anchor))
    found: dict[str, Any] = {"disk_folder": folder, "out_taken": out.is_dir() and any(out.iterdir())}
    try:
        found["disk_free_bytes"] = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"lowmem")
    except OSError as error:
        found["disk_trouble"] = error.strerror or str(error)
    return found
