"""Which build of torch runs on which card, and the command that installs it.

The builds are those of the package index (releases, CUDA versions and architectures as read off the packages, November
2026). On Windows the index holds torch without CUDA; the CUDA builds come from PyTorch's own index, as older ones do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)")  # a suffix (`90a`) is for one chip only and does not match

Capability = tuple[int, int]


@dataclass(frozen=True)
class Build:
    """A release that ran on cards later ones no longer do. `index`: the folder of PyTorch's own index."""

    packages: str
    cuda_major: int
    archs: tuple[str, ...]
    index: str


# Newest first. 2.10 is the last with CUDA 12.8, so with sm_70; 2.7.1 the last with sm_50 and sm_60.
BUILDS = (
    Build("torch torchvision", 13, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), "cu130"),
    Build(
        '"torch==2.10.0" "torchvision==0.25.0"',
        12,
        ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
        "cu128",
    ),
    Build(
        '"torch==2.7.1" "torchvision==0.22.1"',
        12,
        ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
        "cu126",
    ),
)


def runs_on(archs: Iterable[str], capability: Capability) -> bool:
    """Whether a build has kernels for a card: binaries of the same major and no later minor number (`sm_60` runs on
    6.1), or PTX no later than the card (`compute_XY`)."""
    for arch in archs:
        if match := _ARCH.fullmatch(arch):
            made_for = (int(match[2]), int(match[3]))
            same_major = made_for[0] == capability[0]
            if made_for <= capability and (match[1] == "compute" or same_major):
                return True
    return False


def install_command(
    capability: Capability | None, *, system: str | None, driver_cuda: Capability | None = None, again: bool = False
) -> str | None:
    """The pip command for the newest torch that runs on the card and under the driver; None if no release does.

    `capability` unknown: the newest release is assumed to do. `again`: the right version may be installed already, as
    a build without CUDA.
    """
    for build in BUILDS:
        fits_card = capability is None or runs_on(build.archs, capability)
        if fits_card and (driver_cuda is None or driver_cuda[0] >= build.cuda_major):
            newest = "--upgrade " if build is BUILDS[0] else ""
            index = f" --index-url https://download.pytorch.org/whl/{build.index}" if system == "Windows" else ""
            return f"pip install {'--force-reinstall ' if again else newest}{build.packages}{index}"
    return None


def same_torch(torch_version: str) -> str:
    """The pip command that keeps torch as it is and lets pip find the torchvision that belongs to it.

    Builds of PyTorch's own index carry where they are from: `2.7.1+cu126`.
    """
    public, _, local = torch_version.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{local}" if re.fullmatch(r"cu\d+|cpu", local) else ""
    return f'pip install "torch=={public}" torchvision{index}'


def version(text: str | None) -> Version | None:
    """None for an unknown version and for text that is none."""
    try:
        return Version(text) if text is not None else None
    except InvalidVersion:
        return None
