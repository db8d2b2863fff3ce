"""Checks of what is installed: Python, torch and its pair, torch's build against the card, the driver, one kernel."""

from __future__ import annotations

import re

from packaging.version import Version

from lowmem.doctor.facts import Facts, Finding, Status, requirement, split_way_out
from lowmem.measure.usable import version


def same_torch(torch_version: str) -> str:
    """The pip command that keeps torch as it is (`2.7.1+cu126` says that it is of PyTorch's own index) and lets pip
    find the torchvision that belongs to it."""
    public, _, local = torch_version.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{local}" if re.fullmatch(r"cu\d+|cpu", local) else ""
    return f'pip install "torch=={public}" torchvision{index}'


_PASCAL = (6, 9)


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
        return None if unknown else Finding("torch", Status.FAIL, "torch is not installed", facts.fitting())
    found = version(facts.torch_version)
    if facts.torch_works is False:
        why = facts.troubles.get("torch", "no reason given")
        mend = f'pip install --force-reinstall "torch=={found.public}"' if found else facts.fitting()
        return Finding("torch", Status.FAIL, f"torch {facts.torch_version} cannot be imported: {why}", mend)
    built = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    words = f"{facts.torch_version or 'version unknown'}" + (f", {built}" if facts.torch_works else "")
    if found is not None and found < Version("2.7.1"):
        return Finding("torch", Status.WARNING, f"{words}; lowmem needs 2.7.1 or newer", facts.fitting())
    return Finding("torch", Status.OK, words)


def torchvision(facts: Facts) -> Finding | None:
    """Whether torch and torchvision belong together: by torchvision's own metadata, then by using it."""
    if facts.torch_works is False:  # nothing can be said of it before torch works
        return None
    # One command for both, where torch has to be replaced anyway.
    replaced = facts.lacks_kernels or facts.driver_too_old
    mend = facts.fitting() if replaced or facts.torch_version is None else same_torch(facts.torch_version)
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
    if (unfit := facts.obstacles().get("build")) is not None:
        return Finding("build", facts.without_card, unfit.why, unfit.mend or "lowmem train --device cpu")
    if facts.torch_cuda is None or facts.capability is None or not facts.arch_list:
        return None
    dotted = ".".join(map(str, facts.capability))
    name = facts.used_card.name or "the card"
    return Finding("build", Status.OK, f"has kernels for the {name} (compute capability {dotted})")


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
    if (trouble := facts.obstacles().get("driver")) is not None:
        return Finding("driver", facts.without_card, trouble.why, trouble.mend)
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
        mend = facts.fitting()
    elif "out of memory" in why.lower():
        mend = "free memory of the card: nvidia-smi lists who holds it"
    return Finding("kernel", facts.on_card, f"a small convolution fails on the card: {why}", mend)
