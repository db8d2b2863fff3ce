"""Whether torch can use the card that the driver tells of; if not why, and the command that mends it. No torch here.

First which build of torch runs on which card, and the command that installs it. The builds are those of the package
index (releases, CUDA versions and architectures as read off the packages, November 2026). On Windows the index holds
torch without CUDA; the CUDA builds come from PyTorch's own index, as older ones do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from packaging.version import InvalidVersion, Version

from lowmem.measure.nvml import DriverDevice, DriverReport

_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)")  # a suffix (`90a`) is for one chip only and does not match
# The oldest driver branch for a CUDA major version (NVIDIA's compatibility table; within it minor versions fit).
_DRIVER_BRANCH = {12: "R525", 13: "R580"}

Capability = tuple[int, int]


class Build(NamedTuple):
    """A release that ran on cards later ones no longer do. `folder`: of PyTorch's own index, by CUDA version."""

    packages: str
    folder: str
    archs: str


# Newest first. 2.10 is the last with CUDA 12.8, so with sm_70; 2.7.1 the last with sm_50 and sm_60.
BUILDS = (
    Build("torch torchvision", "cu130", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"),
    Build('"torch==2.10.0" "torchvision==0.25.0"', "cu128", "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"),
    Build('"torch==2.7.1" "torchvision==0.22.1"', "cu126", "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"),
)


def runs_on(archs: Iterable[str], capability: Capability) -> bool:
    """Whether a build has kernels for a card: binaries of the same major and no later minor number (`sm_60` runs on
    6.1), or PTX no later than the card (`compute_XY`)."""
    matches = [match for arch in archs if (match := _ARCH.fullmatch(arch))]
    made_for = [(match[1], (int(match[2]), int(match[3]))) for match in matches]
    return any(least <= capability and (kind == "compute" or least[0] == capability[0]) for kind, least in made_for)


def install_command(
    capability: Capability | None, *, system: str | None, driver_cuda: Capability | None = None, again: bool = False
) -> str | None:
    """The pip command for the newest torch that runs on the card (on an unknown one any does) and under the driver;
    None if no release does. `again`: the right version may be installed already, as a build without CUDA."""
    for build in BUILDS:
        fits_card = capability is None or runs_on(build.archs.split(), capability)
        if fits_card and (driver_cuda is None or driver_cuda[0] >= int(build.folder[2:4])):
            newest = "--upgrade " if build is BUILDS[0] else ""
            index = f" --index-url https://download.pytorch.org/whl/{build.folder}" if system == "Windows" else ""
            return f"pip install {'--force-reinstall ' if again else newest}{build.packages}{index}"
    return None


def version(text: str | None) -> Version | None:
    """None for an unknown version and for text that is none."""
    try:
        return Version(text) if text is not None else None
    except InvalidVersion:
        return None


class Obstacle(NamedTuple):
    """Why torch cannot use the card, and the command that mends it, if one does."""

    why: str
    mend: str | None

    def __str__(self) -> str:
        return self.why if self.mend is None else f"{self.why}: {self.mend}"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The cards, the driver, and the torch that is to use them. Unknown is None, or empty."""

    system: str | None = None  # as platform.system(): Linux, Windows, Darwin
    environment: Mapping[str, str] = field(default_factory=dict)
    torch_version: str | None = None
    torch_works: bool | None = None
    torch_cuda: str | None = None  # the CUDA it is built for; None with torch_works: built without
    arch_list: Sequence[str] = ()
    cuda_available: bool | None = None
    device_uuid: str | None = None  # of the card that torch would use
    driver: DriverReport = field(default_factory=DriverReport)

    def set_command(self, name: str, value: str | None) -> str:
        """The shell's command that sets a variable, or with None unsets it."""
        if self.system == "Windows":
            return f"set {name}={value or ''}"
        return f"unset {name}" if value is None else f"export {name}={value}"

    @property
    def card(self) -> DriverDevice | None:
        """The card a run would use, as the driver sees it: torch's by UUID, else the only one, else the first."""
        devices = self.driver.devices
        if devices and self.device_uuid is not None:
            return self.driver.device(self.device_uuid)
        return devices[0] if devices else None

    @property
    def capability(self) -> Capability | None:
        return self.card.capability if self.card is not None else None

    @property
    def driver_too_old(self) -> bool:
        """Whether the driver runs an older major version of CUDA than torch is built for (minor ones fit together)."""
        runs, built = self.driver.cuda_version, version(self.torch_cuda)
        return runs is not None and built is not None and runs[0] < built.major

    @property
    def lacks_kernels(self) -> bool:
        """Whether torch's build is known not to run on the card; where torch does not say which it is, on any."""
        cards = self.driver.devices if self.device_uuid is None else (self.card,)
        known = [card.capability for card in cards if card is not None and card.capability is not None]
        judged = self.torch_cuda is not None and bool(self.arch_list) and 0 < len(known) == len(cards)
        return judged and not any(runs_on(self.arch_list, capability) for capability in known)

    def fitting(self, *, again: bool = False) -> str | None:
        """The command for the torch that runs on this card, or the newest one where there is no card."""
        return install_command(self.capability, system=self.system, driver_cuda=self.driver.cuda_version, again=again)

    def obstacles(self) -> dict[str, Obstacle]:
        """Whatever keeps torch from using a card, though a card or at least a driver is there: by the name of the
        doctor's check that tells it, the first to be mended first."""
        found: dict[str, Obstacle] = {}
        if self.driver.missing is not None:
            return {"driver": Obstacle(self.driver.missing, None)} if self.driver.installed else {}
        if self.driver_too_old:
            found["driver"] = self._driver_too_old()
        elif self.card is not None and self.card.trouble is not None:
            found["driver"] = Obstacle(f"the driver says of the card: {self.card.trouble}", "nvidia-smi")
        if self.driver.devices and (hidden := self._hidden()) is not None:
            found["visible"] = hidden
        if self.card is not None and self.torch_works and (unfit := self._unfit(self.card)) is not None:
            found["build"] = unfit
        # Without CUDA in it, or for a newer driver: said already.
        blind = self.cuda_available is False and self.torch_cuda is not None and not self.driver_too_old
        if self.driver.devices and blind and "visible" not in found:
            shown = self.environment.get("CUDA_VISIBLE_DEVICES")
            words = "the driver lists a card, but torch finds none"
            words += f" (CUDA_VISIBLE_DEVICES={shown})" if shown is not None else ""
            found["visible"] = Obstacle(words, 'python -c "import torch; torch.cuda.init()" says why')
        return found

    def _driver_too_old(self) -> Obstacle:
        """Another torch, if one runs under this driver; else a newer driver, which no command installs everywhere."""
        major, runs = int((self.torch_cuda or "0").partition(".")[0]), self.driver.cuda_version or (0, 0)
        needed = _DRIVER_BRANCH.get(major, "newest")
        words = f"the driver {self.driver.driver_version or ''} runs CUDA {runs[0]}.{runs[1]}; torch "
        words += f"{self.torch_version or ''} needs CUDA {major}, a driver of branch {needed} or newer"
        return Obstacle(" ".join(words.split()), self.fitting() or f"install NVIDIA's driver of branch {needed}")

    def _hidden(self) -> Obstacle | None:
        shown = self.environment.get("CUDA_VISIBLE_DEVICES")
        # CUDA reads entries up to the first that is no card: an empty first one, or `-1`, hides every card.
        if shown is None or re.match(r"\s*\+*\d+\s*(,|$)|GPU-|MIG-", shown):
            return None
        words = f"CUDA_VISIBLE_DEVICES={shown!r} hides every card"
        return Obstacle(words, self.set_command("CUDA_VISIBLE_DEVICES", None))

    def _unfit(self, card: DriverDevice) -> Obstacle | None:
        name, which = card.name or "the card", f"torch {self.torch_version or ''}".strip()
        if self.torch_cuda is None:
            if self.cuda_available:  # another maker's
                return None
            return Obstacle(f"{which} is built without CUDA and cannot use the {name}", self.fitting(again=True))
        if not self.lacks_kernels or card.capability is None:
            return None
        dotted = ".".join(map(str, card.capability))
        words = f"{which} has no kernels for the {name} (compute capability {dotted})"
        words += f", it is built for {' '.join(self.arch_list)}"
        if (mend := self.fitting()) is not None:
            return Obstacle(words, mend)
        newer = install_command(card.capability, system=self.system) is not None
        why = "a release that has them needs a newer driver" if newer else "no release that lowmem runs on has them"
        return Obstacle(f"{words}; {why}", None)
