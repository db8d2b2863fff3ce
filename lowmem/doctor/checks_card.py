"""Checks of the card: which one, its free memory, its link, and what cards of its kind are known to do wrong."""

from __future__ import annotations

from lowmem.core.units import format_size
from lowmem.doctor.facts import Facts, Finding, Status, version
from lowmem.measure import who_holds

_NARROW_LANES = 4  # a riser or a wrong slot; x8 costs nothing that can be measured here


def visible(facts: Facts) -> Finding | None:
    """Whether torch sees the card that the driver sees."""
    if facts.driver is None or not facts.driver.devices or facts.device_asked == "cpu":
        return None
    shown = facts.variable("CUDA_VISIBLE_DEVICES")
    if facts.hidden:
        words = f"CUDA_VISIBLE_DEVICES={shown!r} hides every card"
        words += "" if facts.device_asked == "cuda" else ": training would run on the CPU"
        return Finding("visible", facts.without_card, words, facts.set_command("CUDA_VISIBLE_DEVICES", None))
    # Without CUDA in it, or for a newer driver: said by the checks of build and driver.
    if facts.cuda_available is False and facts.torch_cuda is not None and not facts.driver_too_old:
        words = "the driver lists a card, but torch finds none"
        words += f" (CUDA_VISIBLE_DEVICES={shown})" if shown is not None else ""
        return Finding("visible", facts.without_card, words, 'python -c "import torch; torch.cuda.init()" says why')
    if facts.trouble("cuda") is not None:
        return Finding("visible", facts.without_card, f"torch fails to look for cards: {facts.trouble('cuda')}")
    return None


def card(facts: Facts) -> Finding | None:
    """Which card, and the profile that plans for it."""
    device = facts.used_card
    if device is None:
        return None
    size = f", {format_size(device.total_bytes)}" if device.total_bytes is not None else ""
    others = len(facts.driver.devices) - 1 if facts.driver is not None else 0
    which = f"{device.name or 'a card without a name'}{size}" + (f" ({others} more not used)" if others > 0 else "")
    if facts.profile is not None:
        return Finding("card", Status.OK, f"{which}; profile {facts.profile.name}")
    words = f"{which}; no profile of this card, its speed is measured or assumed"
    return Finding("card", Status.NOTE, words, "give --card FILE.yaml, written like those in profiles/cards")


def memory(facts: Facts) -> Finding | None:
    """What is free on the card and who holds the rest."""
    device = facts.used_card
    if device is None or device.free_bytes is None or not device.total_bytes:
        return None
    words = f"{format_size(device.free_bytes)} of {format_size(device.total_bytes)} free"
    holders = who_holds(facts.driver, device.uuid) if facts.driver is not None and device.uuid else []
    if holders:
        words += f"; held by {', '.join(holders)}"
    taken = 1 - device.free_bytes / device.total_bytes
    if taken > 0.5:
        return Finding("memory", Status.WARNING, words, "close what holds it: nvidia-smi lists the processes")
    if taken > 0.15:
        return Finding("memory", Status.NOTE, words, "close what holds it before a tight run")
    return Finding("memory", Status.OK, words)


def display(facts: Facts) -> Finding | None:
    """A desktop on the card takes memory of it."""
    if facts.used_card is None or not facts.used_card.display_active:
        return None
    words = "a display is attached to the card: the desktop takes some hundred MiB of it, more with a browser"
    return Finding("display", Status.NOTE, words, "plug the screen into the board's graphics, or log out and use ssh")


def link(facts: Facts) -> Finding | None:
    """The PCIe link: a riser or a wrong slot narrows it."""
    pcie = facts.used_card.link if facts.used_card is not None else None
    if pcie is None:
        return None
    lanes = pcie.lanes or pcie.most_lanes
    wanted = int(facts.profile.pcie.partition("x")[2]) if facts.profile is not None else pcie.most_lanes
    if lanes is None or wanted is None:
        return None
    if lanes <= _NARROW_LANES < wanted:
        words = f"PCIe x{lanes}, the card can x{wanted}: uploads are slow (training holds its pictures on the card)"
        return Finding("link", Status.NOTE, words, "the full-length slot next to the processor, without a riser cable")
    speed = f" {pcie.generation}.0" if pcie.generation else ""
    slow = (pcie.generation or 0) < (pcie.most_generation or 0)
    rest = "; an idle card slows its link down" if slow else ""
    return Finding("link", Status.OK, f"PCIe{speed} x{lanes} of x{wanted}{rest}")


def halves(facts: Facts) -> Finding | None:
    """What mixed precision does on cards without tensor cores."""
    if facts.used_card is None or facts.capability is None:
        return None
    if facts.capability[0] < 7:
        words = "no fast fp16 (1/64 of fp32 on 10xx): --precision amp saves memory, not time; no bf16"
        return Finding("precision", Status.NOTE, words)
    if _is_16xx(facts):
        words = "GTX 16xx: no tensor cores, and fp16 convolutions are known to give NaN (pytorch#58123)"
        if facts.precision_asked == "amp":
            return Finding("precision", Status.WARNING, words, "--precision fp32")
        return Finding("precision", Status.NOTE, words)
    if facts.capability[0] < 8:
        return Finding("precision", Status.OK, "fp16 on tensor cores; bf16 would be emulated and is not used")
    return Finding("precision", Status.OK, "fp16 and bf16 on tensor cores")


def _is_16xx(facts: Facts) -> bool:
    """They have the capability of the 20xx, told apart by name alone."""
    return facts.capability == (7, 5) and facts.card is not None and "GTX 16" in (facts.card.name or "")


def channels_last(facts: Facts) -> Finding | None:
    """Channels-last helps tensor cores and can be far slower without them."""
    execution = facts.execution or {}
    if execution.get("device") != "cuda" or execution.get("memory_format") != "channels-last":
        return None
    if facts.capability is None or (facts.capability >= (7, 0) and not _is_16xx(facts)):
        return None
    words = "channels-last without tensor cores can be far slower (a GTX 1650 in fp16: to a twentieth)"
    return Finding("memory format", Status.WARNING, words, "--memory-format contiguous")


def spill(facts: Facts) -> Finding | None:
    """Windows and WSL2 have rules of their own for a card's memory."""
    if facts.used_card is None:
        return None
    if facts.system == "Windows":
        branch = version(facts.driver.driver_version) if facts.driver is not None else None
        from_536 = branch is None or branch >= (version("536.40") or branch)
        words = "Windows: about 81 % of the card is usable"
        if not from_536:
            return Finding("windows", Status.NOTE, words)
        words += ", and near the limit the driver moves memory to the host without a word: steps get far slower"
        mend = "NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
        return Finding("windows", Status.NOTE, words, mend)
    if facts.wsl:
        return Finding("wsl", Status.NOTE, "WSL2: pinned host memory may be refused; who holds the card is not told")
    return None
