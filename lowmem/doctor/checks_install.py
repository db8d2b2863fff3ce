"""Checks of what is installed: Python, torch and its pair, torch's build against the card, the driver, one kernel.

First which build of torch runs on which card, and the command that installs it. The builds are those of the package
index (releases, CUDA versions and architectures as read off the packages, November 2026). On Windows the index holds
torch without CUDA; the CUDA builds come from PyTorch's own index, as older ones do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from packaging.version import Version

from lowmem.doctor.facts import Facts, Finding, Status, requirement, split_way_out, version

_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)")  # a suffix (`90a`) is for one chip only and does not match

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


def same_torch(torch_version: str) -> str:
    """The pip command that keeps torch as it is (`2.7.1+cu126` says that it is of PyTorch's own index) and lets pip
    find the torchvision that belongs to it."""
    public, _, local = torch_version.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{local}" if re.fullmatch(r"cu\d+|cpu", local) else ""
    return f'pip install "torch=={public}" torchvision{index}'


_PASCAL = (6, 9)
# The oldest driver branch for a CUDA major version (NVIDIA's compatibility table; within it minor versions fit).
_DRIVER_BRANCH = {12: "R525", 13: "R580"}


def python(facts: Facts) -> Finding | None:
    words = f"Python {facts.python_version or '?'}, lowmem {facts.lowmem_version or '?'}"
    # torch and its pair have a check of their own, with a better answer than "upgrade".
    unmet = [text for text in facts.unmet if not text.lower().startswith("torch")]
    if unmet:
        words += f"; missing or too old: {', '.join(unmet)}"
        mend = " ".join(["pip install", *(f'"{text.partition(";")[0].strip()}"' for text in unmet)])
        return Finding("python", Status.FAIL, words, mend)
    if facts.python_version is None and facts.lowmem_version is None:
        return None
    return Finding("python", Status.OK, words)


def torch(facts: Facts) -> Finding | None:
    if facts.torch_version is None and not facts.torch_works:
        unknown = facts.torch_works is None
        return None if unknown else Finding("torch", Status.FAIL, "torch is not installed", _fitting(facts))
    found = version(facts.torch_version)
    if facts.torch_works is False:
        why = facts.troubles.get("torch", "no reason given")
        mend = f'pip install --force-reinstall "torch=={found.public}"' if found else _fitting(facts)
        return Finding("torch", Status.FAIL, f"torch {facts.torch_version} cannot be imported: {why}", mend)
    built = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    words = f"{facts.torch_version or 'version unknown'}" + (f", {built}" if facts.torch_works else "")
    if found is not None and found < Version("2.7.1"):
        return Finding("torch", Status.WARNING, f"{words}; lowmem needs 2.7.1 or newer", _fitting(facts))
    return Finding("torch", Status.OK, words)


def torchvision(facts: Facts) -> Finding | None:
    """Whether torch and torchvision belong together: by torchvision's own metadata, then by using it."""
    if facts.torch_works is False:  # nothing can be said of it before torch works
        return None
    # One command for both, where torch has to be replaced anyway.
    replaced = _lacks_kernels(facts) or facts.driver_too_old
    mend = _fitting(facts) if replaced or facts.torch_version is None else same_torch(facts.torch_version)
    if facts.torchvision_version is None:
        if facts.torchvision_works is False:
            return Finding("torchvision", Status.FAIL, "torchvision is not installed", mend)
        return None
    pair = f"torchvision {facts.torchvision_version} with torch {facts.torch_version or '?'}"
    wanted, have = requirement(facts.torchvision_wants), version(facts.torch_version)
    # Without the local part: 2.7.1+cu126 is a 2.7.1.
    if wanted is not None and have is not None and not wanted.specifier.contains(have.public, prereleases=True):
        # pip refuses to make such a pair, other installers do not. Some work all the same, most fail at import.
        status = Status.WARNING if facts.torchvision_works else Status.FAIL
        return Finding("torchvision", status, f"{pair}, but it asks for {wanted}", mend)
    if facts.torchvision_works is False:
        why = facts.troubles.get("torchvision", "no reason given")
        found = version(facts.torchvision_version)
        again = f'pip install --force-reinstall --no-deps "torchvision=={found.public}"' if found else mend
        return Finding("torchvision", Status.FAIL, f"{pair} cannot be imported: {why}", again)
    return Finding("torchvision", Status.OK, f"{facts.torchvision_version}, belongs to this torch")


def build(facts: Facts) -> Finding | None:
    if facts.used_card is None or not facts.torch_works:
        return None
    name = facts.used_card.name or "the card"
    if facts.torch_cuda is None:
        words = f"torch {facts.torch_version or ''} is built without CUDA and cannot use the {name}"
        return Finding("build", facts.without_card, " ".join(words.split()), _fitting(facts, again=True))
    if facts.capability is None or not facts.arch_list:
        return None
    dotted = ".".join(map(str, facts.capability))
    if not _lacks_kernels(facts):
        return Finding("build", Status.OK, f"has kernels for the {name} (compute capability {dotted})")
    words = (
        f"torch {facts.torch_version or '?'} has no kernels for the {name} (compute capability {dotted}): "
        f"it is built for {' '.join(facts.arch_list)}"
    )
    mend = _fitting(facts)
    if mend is None:
        newer = install_command(facts.capability, system=facts.system) is not None
        why = "a release that has them needs a newer driver" if newer else "no release that lowmem runs on has them"
        words, mend = f"{words}; {why}", "lowmem train --device cpu"
    return Finding("build", facts.on_card, words, mend)


def _lacks_kernels(facts: Facts) -> bool:
    """Whether torch's build is known not to run on the card."""
    archs, capability = facts.arch_list, facts.capability
    return bool(archs) and capability is not None and not runs_on(archs, capability)


def _fitting(facts: Facts, *, again: bool = False) -> str | None:
    """The command for the torch that runs on this card, or the newest one where there is no card."""
    return install_command(facts.capability, system=facts.system, driver_cuda=facts.driver.cuda_version, again=again)


def driver(facts: Facts) -> Finding | None:
    if facts.device_asked == "cpu":
        return None
    if facts.driver.missing is not None:
        what, way_out = split_way_out(facts.driver.missing)
        if facts.device_asked == "cuda":
            cpu = "lowmem train --device cpu"
            return Finding("driver", Status.FAIL, what, f"{way_out}; or {cpu}" if way_out else cpu)
        mend = way_out and f"with a card: {way_out}"
        return Finding("driver", Status.NOTE, f"{what}; training on the CPU works", mend)
    runs = facts.driver.cuda_version
    words = f"{facts.driver.driver_version or 'version unknown'}" + (f", runs CUDA {runs[0]}.{runs[1]}" if runs else "")
    if facts.driver_too_old:
        # Another torch, if one runs under this driver; else a newer driver, which no command installs everywhere.
        cuda_major = int((facts.torch_cuda or "0").partition(".")[0])
        needed = _DRIVER_BRANCH.get(cuda_major, "newest")
        torch_words = " ".join(f"torch {facts.torch_version or ''} needs CUDA {cuda_major}".split())
        words += f"; {torch_words}, a driver of branch {needed} or newer"
        mend = _fitting(facts) or f"install NVIDIA's driver of branch {needed}"
        return Finding("driver", facts.without_card, words, mend)
    if facts.card is not None and facts.card.trouble is not None:
        words += f"; it says of the card: {facts.card.trouble}"
        return Finding("driver", facts.without_card, words, "nvidia-smi")
    old_card = facts.capability is not None and facts.capability <= _PASCAL
    branch = version(facts.driver.driver_version)
    if old_card and branch is not None and branch.major >= 580:
        return Finding("driver", Status.OK, f"{words}; R580 is the last branch for this card: do not go beyond")
    return Finding("driver", Status.OK, words)


def kernel(facts: Facts) -> Finding | None:
    if facts.kernel_works is None or facts.device_asked == "cpu":
        return None
    if facts.kernel_works:
        return Finding("kernel", Status.OK, "a matrix product, a convolution and its gradients ran on the card")
    why = facts.troubles.get("kernel", "no reason given")
    mend: str | None = "nvidia-smi, then restart the machine if it shows an error"
    if "no kernel image" in why:
        mend = _fitting(facts)
    elif "out of memory" in why.lower():
        mend = "free memory of the card: nvidia-smi lists who holds it"
    return Finding("kernel", facts.on_card, f"a small convolution fails on the card: {why}", mend)
