"""Checks of the run that is wanted: settings in the environment, processor, disk, data, and what `train` refuses."""

from __future__ import annotations

import difflib
import math
import re

from lowmem.core.units import GIB, format_size
from lowmem.doctor.facts import Facts, Finding, Status, version

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
_NEW_NAME_SINCE = "2.9"


def parse_allocator(text: str) -> dict[str, str]:
    """`key:value,key:[a:b,c:d]` -> its pairs, a key without a value having an empty one."""
    pairs = {}
    for part in re.split(r",(?![^\[]*\])", text):
        key, _, value = part.partition(":")
        if part.strip():
            pairs[key.strip()] = value.strip()
    return pairs


def allocator(facts: Facts) -> Finding | None:
    """The caching allocator's settings: torch's own judgement of them, then what they do here."""
    if facts.environment is None or not facts.wants_card:
        return None
    name = _OLD_NAME if _OLD_NAME in facts.environment else _NEW_NAME
    given = facts.variable(name)
    if not given:
        return _no_allocator_settings(facts)
    words = f"{name}={given}"
    pairs = parse_allocator(given)
    unset = facts.set_command(name, None)
    if facts.allocator_trouble is not None or any(not value for value in pairs.values()):
        why = facts.allocator_trouble or "a key has no value"
        return Finding("allocator", facts.on_card, f"{words} is refused by torch: {why}", _nearest(facts, name, pairs))
    since, here = version(_NEW_NAME_SINCE), version(facts.torch_version)
    if name == _NEW_NAME and since is not None and here is not None and here < since:
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


def _no_allocator_settings(facts: Facts) -> Finding | None:
    if facts.card is None:
        return None
    if facts.system == "Linux" and (facts.card.total_bytes or 0) <= _SMALL_BYTES:
        words = "default settings; expandable segments waste less of a small card to fragmentation"
        return Finding("allocator", Status.NOTE, words, facts.set_command(_OLD_NAME, "expandable_segments:True"))
    return Finding("allocator", Status.OK, "default settings")


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
    if facts.environment is None or not facts.wants_card:
        return None
    said = []
    for name, given in facts.environment.items():
        if (effect := _effect(name, given)) is not None:
            said.append(Finding("environment", effect[0], effect[1], facts.set_command(name, effect[2])))
    if not said:
        return None
    gravest = max(said, key=lambda finding: finding.status == Status.WARNING)
    more = [finding.finding.partition(":")[0] for finding in said if finding is not gravest]
    words = gravest.finding + (f" (also: {', '.join(more)})" if more else "")
    return Finding(gravest.name, gravest.status, words, gravest.mend)


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
    """Threads against the cores there are: more of them wait for each other."""
    if facts.cores is None:
        return None
    limited = facts.cpu_share is not None and facts.cpu_share < facts.cores
    usable = max(1, math.floor(facts.cpu_share)) if limited and facts.cpu_share is not None else facts.cores
    there = f"{facts.cores} core{'s' * (facts.cores != 1)}"
    if limited:
        there += f", limited to {facts.cpu_share:g} by the container"
    if facts.threads is None:
        return Finding("processor", Status.OK, there)
    words = f"{there}, torch uses {facts.threads} thread{'s' * (facts.threads != 1)}"
    if facts.threads > usable:
        return Finding("processor", Status.WARNING, words, facts.set_command("OMP_NUM_THREADS", str(usable)))
    on_cpu = (facts.execution or {}).get("device") == "cpu"
    if on_cpu and facts.threads == 1 and usable > 1 and facts.variable("OMP_NUM_THREADS") is not None:
        return Finding("processor", Status.NOTE, words, facts.set_command("OMP_NUM_THREADS", str(usable)))
    return Finding("processor", Status.OK, words)


def disk(facts: Facts) -> Finding | None:
    """Room for the run, and whether its folder can be written."""
    where = facts.disk_folder
    if where is None:
        return None
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
        mend = f"lowmem resume {facts.out}"
        return Finding("disk", Status.NOTE, f"{words}; {facts.out} is taken: `lowmem train` would refuse it", mend)
    return Finding("disk", Status.OK, words)


def data(facts: Facts) -> Finding | None:
    """Whether the pictures are there, or can be had."""
    trouble = facts.trouble("data")
    if trouble is not None:
        if facts.torchvision_works is False:
            return Finding("data", Status.NOTE, "not checked: torchvision does not work")
        return Finding("data", Status.FAIL, *_way_out(trouble))
    if facts.data_words is None:
        return None
    if facts.data_there:
        return Finding("data", Status.OK, facts.data_words)
    if facts.data_host_answers is False:
        words = f"{facts.data_words}, which cannot be reached from here"
        return Finding("data", Status.FAIL, words, "--data folder:PATH, or --data shapes, which needs no files")
    return Finding("data", Status.NOTE, facts.data_words)


def refusal(facts: Facts) -> Finding | None:
    """What `lowmem train` refuses to start with: asked of the same code."""
    trouble = facts.trouble("execution")
    if trouble is None or facts.torch_works is False:
        return None
    if facts.device_asked == "cuda" and facts.cuda_available is False and facts.driver is not None:
        return None  # the driver, the build or CUDA_VISIBLE_DEVICES: their checks say which
    return Finding("settings", Status.FAIL, *_way_out(trouble))


def _way_out(trouble: str) -> tuple[str, str | None]:
    """(finding, mend) of a sentence of lowmem's own, `what is wrong: the way out`; another error has no way out."""
    words, colon, way_out = trouble.rpartition(": ")
    if not colon or re.match(r"\w*(Error|Exception|Interrupt): |the process ", trouble):
        return trouble, None
    return words, way_out
