"""Checks of the card (which one, its free memory, its link, what its kind is known to do wrong) and of the run that is
wanted (settings in the environment, processor, disk, data, and what `train` refuses)."""

from __future__ import annotations

import difflib
import math
import re

from packaging.version import Version

from lowmem.config.cards import host_bytes_per_second
from lowmem.core.units import GIB, counted, format_size
from lowmem.doctor.facts import Facts, Finding, Status, split_way_out
from lowmem.measure import who_holds
from lowmem.measure.usable import version

_BUSY_CORES = 0.5  # less is what a desktop does
_NARROW_LANES = 4  # a riser or a wrong slot; x8 costs nothing that can be measured here
_WEAK_LINK = 3.0  # GB/s
_SMALL_BYTES = 12 * GIB  # a card on which fragmentation decides what fits

# What the caching allocator reads in the oldest and the newest torch that lowmem runs on.
ALLOCATOR_KEYS = (
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "pinned_num_register_threads",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
    "roundup_power2_divisions",
)
_OLD_NAME, _NEW_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_NEW_NAME_SINCE = Version("2.9")


def visible(facts: Facts) -> Finding | None:
    """Whether torch sees the card that the driver sees."""
    if not facts.driver.devices or facts.device_asked == "cpu":
        return None
    if (hidden := facts.obstacles().get("visible")) is not None:
        return Finding("visible", facts.without_card, hidden.why, hidden.mend)
    if trouble := facts.troubles.get("cuda"):
        return Finding("visible", facts.without_card, f"torch fails to look for cards: {trouble}")
    return None


def card(facts: Facts) -> Finding | None:
    device = facts.used_card
    if device is None:
        return None
    which = device.name or "a card without a name"
    which += f", {format_size(device.total_bytes)}" if device.total_bytes is not None else ""
    others = len(facts.driver.devices) - 1
    which += f" ({others} more not used)" if others > 0 else ""
    if facts.profile is not None:
        return Finding("card", Status.OK, f"{which}; profile {facts.profile.name}")
    words = f"{which}; no profile of this card, its speed is measured or assumed"
    return Finding("card", Status.NOTE, words, "give --card FILE.yaml, written like those in profiles/cards")


def memory(facts: Facts) -> Finding | None:
    device = facts.used_card
    if device is None or device.free_bytes is None or not device.total_bytes:
        return None
    words = f"{format_size(device.free_bytes)} of {format_size(device.total_bytes)} free"
    if device.uuid and (holders := who_holds(facts.driver, device.uuid)):
        words += f"; held by {', '.join(holders)}"
    taken = 1 - device.free_bytes / device.total_bytes
    if taken > 0.5:
        return Finding("memory", Status.WARNING, words, "close what holds it: nvidia-smi lists the processes")
    if taken > 0.15:
        return Finding("memory", Status.NOTE, words, "close what holds it before a tight run")
    return Finding("memory", Status.OK, words)


def display(facts: Facts) -> Finding | None:
    if facts.used_card is None or not facts.used_card.display_active:
        return None
    words = "a display is attached to the card: the desktop takes some hundred MiB of it, more with a browser"
    return Finding("display", Status.NOTE, words, "plug the screen into the board's graphics, or log out and use ssh")


def link(facts: Facts) -> Finding | None:
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


def host_memory(facts: Facts) -> Finding | None:
    """What tensors could wait in (`memory.host`), and how fast they would get there."""
    if facts.used_card is None or facts.host_free_bytes is None:
        return None
    words, pcie = f"{format_size(facts.host_free_bytes)} free", facts.used_card.link
    # As many lanes as there are now; an idle card slows them down.
    lanes = pcie and (pcie.lanes or pcie.most_lanes)
    generation = pcie and (pcie.most_generation or pcie.generation)
    rate = host_bytes_per_second(generation, lanes) if generation and lanes else None
    if rate is None:
        return Finding("host memory", Status.OK, words)
    words += f"; the link attains about {rate / 1e9:.1f} GB/s each way"
    if round(rate / 1e9, 1) < _WEAK_LINK:
        return Finding("host memory", Status.NOTE, f"{words}: plans will hardly use memory.host")
    return Finding("host memory", Status.OK, words)


def precision(facts: Facts) -> Finding | None:
    if facts.used_card is None or facts.capability is None:
        return None
    if facts.capability[0] < 7:
        words = "no fast fp16 (1/64 of fp32 on 10xx): --precision amp saves memory, not time; no bf16"
        return Finding("precision", Status.NOTE, words)
    if facts.is_16xx:
        words = "GTX 16xx: no tensor cores, and fp16 convolutions are known to give NaN (pytorch#58123)"
        if facts.precision_asked == "amp":
            return Finding("precision", Status.WARNING, words, "--precision fp32")
        return Finding("precision", Status.NOTE, words)
    if facts.capability[0] < 8:
        return Finding("precision", Status.OK, "fp16 on tensor cores; bf16 would be emulated and is refused")
    return Finding("precision", Status.OK, "fp16 and bf16 on tensor cores")


def memory_format(facts: Facts) -> Finding | None:
    if facts.execution.get("device") != "cuda" or facts.execution.get("memory_format") != "channels-last":
        return None
    if facts.capability is None or (facts.capability >= (7, 0) and not facts.is_16xx):
        return None
    words = "channels-last without tensor cores can be far slower (a GTX 1650 in fp16: to a twentieth)"
    return Finding("memory format", Status.WARNING, words, "--memory-format contiguous")


def spill(facts: Facts) -> Finding | None:
    if facts.used_card is None:
        return None
    if facts.system == "Windows":
        branch = version(facts.driver.driver_version)
        words = "Windows: about 81 % of the card is usable"
        if branch is not None and branch < Version("536.40"):
            return Finding("windows", Status.NOTE, words)
        words += ", and near the limit the driver moves memory to the host without a word: steps get far slower"
        mend = "NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
        return Finding("windows", Status.NOTE, words, mend)
    if facts.wsl:
        return Finding("wsl", Status.NOTE, "WSL2: pinned host memory may be refused; who holds the card is not told")
    return None


def parse_allocator(text: str) -> dict[str, str]:
    """`key:value,key:[a:b,c:d]` -> its pairs, a key without a value having an empty one."""
    parts = (part.partition(":") for part in re.split(r",(?![^\[]*\])", text) if part.strip())
    return {key.strip(): value.strip() for key, _, value in parts}


def allocator(facts: Facts) -> Finding | None:
    """The caching allocator's settings: torch's own judgement of them, then what they do here."""
    if not facts.wants_card:
        return None
    name = _OLD_NAME if _OLD_NAME in facts.environment else _NEW_NAME
    given = facts.environment.get(name)
    if not given:
        if facts.card is None:
            return None
        if facts.system == "Linux" and (facts.card.total_bytes or 0) <= _SMALL_BYTES:
            words = "default settings; expandable segments waste less of a small card to fragmentation"
            return Finding("allocator", Status.NOTE, words, facts.set_command(_OLD_NAME, "expandable_segments:True"))
        return Finding("allocator", Status.OK, "default settings")
    words = f"{name}={given}"
    pairs = parse_allocator(given)
    unset = facts.set_command(name, None)
    if facts.allocator_trouble is not None or any(not value for value in pairs.values()):
        why = facts.allocator_trouble or "a key has no value"
        return Finding("allocator", facts.on_card, f"{words} is refused by torch: {why}", _nearest(facts, name, pairs))
    here = version(facts.torch_version)
    if name == _NEW_NAME and here is not None and here < _NEW_NAME_SINCE:
        words += f" is not read by torch {facts.torch_version}"
        return Finding("allocator", Status.WARNING, words, facts.set_command(_OLD_NAME, given))
    if pairs.get("backend") == "cudaMallocAsync":
        words += ": another allocator than the one that plans are made for: predictions do not hold"
        return Finding("allocator", Status.WARNING, words, unset)
    if pairs.get("expandable_segments") == "True" and facts.system == "Windows":
        return Finding("allocator", Status.NOTE, f"{words}: expandable segments have no effect on Windows", unset)
    unknown = sorted(set(pairs) - set(ALLOCATOR_KEYS))
    if unknown and facts.torch_works is not True:
        return Finding("allocator", Status.WARNING, f"{words}: unknown {unknown[0]!r}", _nearest(facts, name, pairs))
    return Finding("allocator", Status.OK, words)


def _nearest(facts: Facts, name: str, pairs: dict[str, str]) -> str:
    """The same setting with what is surely meant: a key misspelt, True and False in the wrong case."""
    meant = {}
    for key, value in pairs.items():
        close = [key] if key in ALLOCATOR_KEYS else difflib.get_close_matches(key, ALLOCATOR_KEYS, n=1, cutoff=0.7)
        if close and value:
            meant[close[0]] = value.capitalize() if value.lower() in {"true", "false"} else value
    if not meant or meant == pairs:
        return facts.set_command(name, None)
    return facts.set_command(name, ",".join(f"{key}:{value}" for key, value in meant.items()))


def variables(facts: Facts) -> Finding | None:
    """Other variables that change memory or speed; the gravest is told."""
    if not facts.wants_card:
        return None
    effects = [(name, *effect) for name, given in facts.environment.items() if (effect := _effect(name, given))]
    if not effects:
        return None
    gravest = max(effects, key=lambda effect: effect[1] == Status.WARNING)
    name, status, words, mend = gravest
    if more := [effect[2].partition(":")[0] for effect in effects if effect is not gravest]:
        words += f" (also: {', '.join(more)})"
    return Finding("environment", status, words, facts.set_command(name, mend))


def _effect(name: str, given: str) -> tuple[Status, str, str | None] | None:
    """How grave it is that a variable is set so, what that does, and the value that mends it (None: unset)."""
    number = int(given) if re.fullmatch(r"\s*[+-]?\d+\s*", given) else None
    shown = f"{name}={given}"
    match name:
        case "PYTORCH_NO_CUDA_MEMORY_CACHING":  # any value counts, an empty one too
            words = f"{name}: no caching allocator, every tensor waits for the driver, and no budget holds"
            return Status.WARNING, words, None
        case "CUDA_LAUNCH_BLOCKING" if given not in {"", "0"}:
            return Status.WARNING, f"{shown}: every kernel is waited for, training is slower", None
        case "CUDNN_CONV_WSCAP_DBG" if not given.strip().isdigit():
            return Status.WARNING, f"{shown}: is no number of MiB", None
        case "CUDNN_CONV_WSCAP_DBG":
            words = f"{shown}: convolutions get at most {given.strip()} MiB of workspace, some will be slower"
            return Status.NOTE, words, None
        case "CUDA_MODULE_LOADING" if given.upper() == "EAGER":
            words = f"{name}=EAGER: every kernel is loaded at the start, which takes some hundred MiB more of the card"
            return Status.WARNING, words, "LAZY"
        case "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT" if number is not None and number < 0:
            words = f"{shown}: convolutions are planned anew at every call, training is far slower"
            return Status.WARNING, words, "1000"
        case "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT" if number is not None and not 0 < number < 10_000:
            return Status.NOTE, f"{shown}: the plans of convolutions may take 2 GiB of host memory or more", "1000"
    return None


def processor(facts: Facts) -> Finding | None:
    """Threads against the cores there are, less those that other programs keep busy."""
    if facts.cores is None:
        return None
    usable, there = facts.cores, counted(facts.cores, "core")
    if facts.cpu_share is not None and facts.cpu_share < facts.cores:
        usable = max(1, math.floor(facts.cpu_share))
        there += f", limited to {facts.cpu_share:g} by the container"
    words = there
    if facts.threads is not None:
        words += f", torch uses {counted(facts.threads, 'thread')}"
    busy = facts.busy_cores if facts.busy_cores is not None and facts.busy_cores >= _BUSY_CORES else 0.0
    words += f"; other programs keep {busy:.1f} cores busy" if busy else ""
    free = max(1, min(usable, round(facts.cores - busy)))
    mend = facts.set_command("OMP_NUM_THREADS", str(free))
    if facts.threads is not None and facts.threads > usable:
        return Finding("processor", Status.WARNING, words, mend)
    on_cpu = facts.execution.get("device") == "cpu"
    one_asked = facts.threads == 1 and facts.environment.get("OMP_NUM_THREADS") is not None
    if on_cpu and one_asked and free > 1:
        return Finding("processor", Status.NOTE, words, mend)
    if on_cpu and busy and (facts.threads or 1) > facts.cores - busy:
        return Finding("processor", Status.NOTE, f"{words}: steps take longer beside them")
    return Finding("processor", Status.OK, words)


def disk(facts: Facts) -> Finding | None:
    where = facts.disk_folder
    if facts.disk_trouble is not None:
        return Finding("disk", Status.FAIL, f"{where} cannot be written: {facts.disk_trouble}", "choose another --out")
    free, needed = facts.disk_free_bytes, facts.disk_needed_bytes
    if free is None:
        return None
    words = f"{format_size(free)} free in {where}"
    if needed is None:
        return Finding("disk", Status.OK, words)
    words += f"; a run of {facts.network or 'the network'} takes {format_size(needed)}"
    if free < needed:
        return Finding("disk", Status.FAIL, words, "free some space, or choose another --out")
    if facts.out_taken:
        taken = f"{facts.out} is taken: `lowmem train` would refuse it, another --out or `lowmem resume` would not"
        return Finding("disk", Status.NOTE, f"{words}; {taken}")
    return Finding("disk", Status.OK, words)


def data(facts: Facts) -> Finding | None:
    if trouble := facts.troubles.get("data"):
        if facts.torchvision_works is False:
            return Finding("data", Status.NOTE, "not checked: torchvision does not work")
        return Finding("data", Status.FAIL, *split_way_out(trouble))
    if facts.data_words is None:
        return None
    if facts.data_there:
        status = Status.WARNING if facts.data_warnings else Status.OK
        return Finding("data", status, "; ".join((*facts.data_warnings, facts.data_words)))
    if facts.data_host_answers is False:
        words = f"{facts.data_words}, which cannot be reached from here"
        return Finding("data", Status.FAIL, words, "--data folder:PATH, or --data shapes, which needs no files")
    return Finding("data", Status.NOTE, facts.data_words)


def refusal(facts: Facts) -> Finding | None:
    """What `lowmem train` refuses to start with: asked of the same code."""
    trouble = facts.troubles.get("execution")
    if trouble is None or facts.torch_works is False:
        return None
    if facts.device_asked == "cuda" and (facts.cuda_available is False or facts.lacks_kernels):
        return None  # the driver, the build or CUDA_VISIBLE_DEVICES: their checks say which
    return Finding("settings", Status.FAIL, *split_way_out(trouble))
