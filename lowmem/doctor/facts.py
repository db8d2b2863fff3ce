"""What is known of the machine and of the run that is wanted (`Facts`), and what a check says of it (`Finding`).

Every fact may be unknown: None. A check that lacks its facts says so or says nothing; it never guesses and never fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from packaging.version import InvalidVersion, Version

from lowmem.config.cards import Card
from lowmem.measure.nvml import DriverDevice, DriverReport


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

    def to_json(self) -> dict[str, str | None]:
        return {key: None if value is None else str(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything the checks look at, gathered once. What is asked for stands first, what was found after it."""

    # the run
    device_asked: str | None = None  # auto, cpu, cuda
    precision_asked: str | None = None
    network: str | None = None  # in words
    out: Path | None = None

    # the machine
    system: str | None = None  # as platform.system(): Linux, Windows, Darwin
    wsl: bool | None = None
    python_version: str | None = None
    lowmem_version: str | None = None
    cores: int | None = None  # that this process may use
    cpu_share: float | None = None  # CPUs a container may use, None without a limit
    environment: Mapping[str, str] | None = None  # only the variables that torch and the driver listen to

    # packages, by their metadata: nothing is imported for these
    torch_version: str | None = None
    torchvision_version: str | None = None
    torchvision_wants: str | None = None  # its requirement on torch, like `torch==2.7.1`
    unmet: tuple[str, ...] | None = None  # what lowmem requires and is missing or too old, like `rich>=13.7`

    # torch, asked in a process of its own
    torch_works: bool | None = None
    torch_cuda: str | None = None  # the CUDA it is built for; None with torch_works: built without
    arch_list: Sequence[str] | None = None
    threads: int | None = None
    cuda_available: bool | None = None
    allocator_trouble: str | None = None  # torch's own words about the allocator settings in the environment
    torchvision_works: bool | None = None
    kernel_works: bool | None = None
    device_uuid: str | None = None  # of the card that torch would use
    execution: Mapping[str, str] | None = None  # device, precision, memory_format as `train` would resolve them
    troubles: Mapping[str, str] | None = None  # stage of the probe -> why it failed, in a line

    # the driver and the card
    driver: DriverReport | None = None
    profile: Card | None = None

    # disk and data
    disk_folder: Path | None = None  # the nearest folder above `out` that exists
    disk_free_bytes: int | None = None
    disk_needed_bytes: int | None = None
    disk_trouble: str | None = None
    out_taken: bool | None = None  # `out` exists and is not empty
    data_there: bool | None = None
    data_words: str | None = None
    data_host_answers: bool | None = None  # the host from which it would be downloaded

    def trouble(self, stage: str) -> str | None:
        """Why a stage of the probe failed; None if it did not, or was not asked."""
        return (self.troubles or {}).get(stage)

    def variable(self, name: str) -> str | None:
        return (self.environment or {}).get(name)

    def set_command(self, name: str, value: str | None) -> str:
        """The shell's command that sets a variable, or with None unsets it."""
        if self.system == "Windows":
            return f"set {name}={value or ''}"
        return f"unset {name}" if value is None else f"export {name}={value}"

    @property
    def card(self) -> DriverDevice | None:
        """The card a run would use, as the driver sees it: torch's by UUID, else the only one, else the first."""
        if self.driver is None or not self.driver.devices:
            return None
        if self.device_uuid is not None:
            return self.driver.device(self.device_uuid)
        return self.driver.devices[0]

    @property
    def used_card(self) -> DriverDevice | None:
        """The same; None where the run is asked to be on the CPU."""
        return None if self.device_asked == "cpu" else self.card

    @property
    def capability(self) -> tuple[int, int] | None:
        return self.card.capability if self.card is not None else None

    @property
    def driver_too_old(self) -> bool:
        """Whether the driver runs an older major version of CUDA than torch is built for (minor ones fit together)."""
        runs, built = self.driver.cuda_version if self.driver is not None else None, version(self.torch_cuda)
        return runs is not None and built is not None and runs[0] < built.major

    @property
    def hidden(self) -> bool:
        """Whether CUDA_VISIBLE_DEVICES hides every card: empty, or its first entry is no card (`-1`)."""
        value = self.variable("CUDA_VISIBLE_DEVICES")
        if value is None or value.startswith(("GPU-", "MIG-")):
            return False
        # CUDA reads entries up to the first that is no index.
        first = value.split(",")[0].strip()
        return not first.lstrip("+").isdigit()

    @property
    def wants_card(self) -> bool:
        """Whether a card matters for the run: not with --device cpu, nor under auto where there is none."""
        if self.device_asked == "cpu":
            return False
        return self.device_asked == "cuda" or self.card is not None

    @property
    def without_card(self) -> Status:
        """How bad it is that CUDA cannot be used: `--device auto` trains on the CPU instead."""
        return Status.FAIL if self.device_asked == "cuda" else Status.WARNING

    @property
    def on_card(self) -> Status:
        """How bad a fault is that torch itself does not notice until the first kernel."""
        return self.without_card if self.cuda_available is False else Status.FAIL


def version(text: str | None) -> Version | None:
    """None for an unknown version and for text that is none."""
    try:
        return Version(text) if text is not None else None
    except InvalidVersion:
        return None
