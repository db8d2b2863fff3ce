"""Profiles of graphics cards: what a plan needs to know of a card that is not there.

`profiles/cards/*.yaml` hold datasheet figures, written as people read them; `Card` holds bytes and rates per second.
Two of the entries are experience, not datasheet: `context` (what a CUDA process takes before its first tensor: 250-400
MiB with kernels loaded lazily, more on old cards) and `usable` (the share of the memory that one process can have: on
Windows the driver keeps about a fifth, on Linux a desktop takes some hundred MiB). On a real card both are measured.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from lowmem.config.catalogue import either
from lowmem.config.sections import CardMemory, Section, Size
from lowmem.config.settings import read_yaml
from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.reading import profile_names, profiles_folder, shorten

# bytes per second and lane in one direction, by generation, after line coding (PCI-SIG)
_LANE_BYTES_PER_SECOND = {"3.0": 0.985e9, "4.0": 1.969e9, "5.0": 3.938e9}
_OLDER_LANES = {"1.0": 0.25e9, "2.0": 0.5e9}  # of boards, that newer cards stand in
_LINK_SHARE = 12 / 15.76


def host_bytes_per_second(generation: int, lanes: int) -> float | None:
    """What a copy from or to pinned memory attains, each way: 12 GB/s of 3.0 x16's 15.8; None: unknown generation."""
    lane = {**_OLDER_LANES, **_LANE_BYTES_PER_SECOND}.get(f"{generation}.0")
    return None if lane is None else _LINK_SHARE * lane * lanes


def _known_link(value: str) -> str:
    if value.partition("x")[0] not in _LANE_BYTES_PER_SECOND:
        raise ValueError(f"PCIe {value!r} is unknown: write one of {', '.join(_LANE_BYTES_PER_SECOND)} and the lanes")
    return value


Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1e6)]


class UsableShare(Section):
    """Share of the card's memory that one process can have, the context included."""

    linux: Share
    linux_display: Share
    windows: Share


class Card(Section):
    """A card. Its file says the same in the units of datasheets."""

    name: Annotated[str, Field(min_length=1)]
    memory_bytes: CardMemory = Field(alias="memory")
    capability: Annotated[str, Field(pattern=r"^[0-9]{1,3}\.[0-9]$", coerce_numbers_to_str=True)]  # 6.1 in YAML
    bandwidth_bytes_per_second: Annotated[Rate, AfterValidator(lambda gb: gb * 1e9)] = Field(
        alias="bandwidth_gb_per_second"
    )
    fp32_flops_per_second: Annotated[Rate, AfterValidator(lambda tera: tera * 1e12)] = Field(alias="fp32_tflops")
    fp16: Literal["none", "1/64", "2:1", "tensor-cores"]  # arithmetic in halves, to that in fp32
    pcie: Annotated[str, Field(pattern=r"^[0-9]\.0x(1|2|4|8|16)$"), AfterValidator(_known_link)]
    context_bytes: Size = Field(alias="context")
    usable: UsableShare

    @property
    def tensor_cores(self) -> bool:
        return self.fp16 == "tensor-cores"

    @property
    def amp_flops_per_second(self) -> float:
        """Mixed precision: on tensor cores with fp32 sums eight times fp32 on a V100, four times on 20xx and twice on
        later ones (the makers' architecture papers); elsewhere halves are stored and fp32 is computed."""
        if not self.tensor_cores:
            return self.fp32_flops_per_second
        return self.fp32_flops_per_second * {"7.0": 8, "7.5": 4}.get(self.capability, 2)

    @property
    def pcie_lane_bytes_per_second(self) -> float:
        """In one direction."""
        return _LANE_BYTES_PER_SECOND[self.pcie.partition("x")[0]]

    @property
    def host_bytes_per_second(self) -> float:
        """What a copy from or to pinned memory attains, each way."""
        rate = host_bytes_per_second(int(self.pcie.partition(".")[0]), self.pcie_lanes)
        assert rate is not None, "the generation was looked up when the file was read"
        return rate

    @property
    def pcie_lanes(self) -> int:
        return int(self.pcie.partition("x")[2])

    @property
    def capability_pair(self) -> tuple[int, int]:
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor)


def has_tensor_cores(name: str, capability: tuple[int, int]) -> bool:
    """Of a card as its driver calls it: from capability 7.0 on. The GTX 16xx has 7.5 without: told by its name."""
    return capability >= (7, 0) and "GTX 16" not in name


def refuse_bf16(precision: str, name: str, capability: tuple[int, int]) -> None:
    """Raises PreflightError if that precision is asked for and the card only emulates it."""
    if precision == "bf16" and capability < (8, 0):
        raise PreflightError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and bf16 begins with 8.0 (RTX 30xx): use "
            "--precision amp, which is fp16 there, or fp32"
        )


def load_card(name: str) -> Card:
    """A shipped profile by name (`gtx1060-6g`; `GTX 1060 6G` and, for a GTX 970, `970` are taken too) or the user's own
    by path (`*.yaml`). Raises UsageError for an unknown card, with the nearest names, and for a file that is no
    profile."""
    path = Path(name)
    if not name.endswith((".yaml", ".yml")):
        by_key, key = {_key(known): known for known in profile_names("cards")}, _key(name)
        known = next((by_key[full] for full in (key, f"gtx{key}", f"rtx{key}") if full in by_key), None)
        if known is None:
            near = [match for match in by_key if key and (key in match or match in key)]
            near = near or get_close_matches(key[:100], by_key, n=3, cutoff=0.6)
            hint = f"did you mean {either([by_key[match] for match in near])}?" if near else "`lowmem cards` lists them"
            raise UsageError(f"unknown card {shorten(name)!r}: {hint} (or give the path of a .yaml file)")
        path = profiles_folder("cards") / f"{known}.yaml"
    elif not os.path.isfile(path):
        raise UsageError(f"there is no card profile {shorten(name)}")
    try:
        return Card.model_validate(read_yaml(path, "give --card the path of a card profile")[0])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"{path} is no card profile: {shorten(where)}: {shorten(first['msg'])}") from None


def find_card(device_name: str, memory_bytes: int) -> Card | None:
    """The profile of a card as its driver calls it (`NVIDIA GeForce GTX 1060 6GB`), by name and, where several have it,
    by memory; None if there is none."""
    base = _key(re.sub(r"\d+\s*gb?\b", " ", device_name.lower()))
    for card in map(load_card, profile_names("cards")):
        near = abs(card.memory_bytes - memory_bytes) < 0.1 * card.memory_bytes
        if near and _key(re.sub(r" \d+G$", "", card.name)) == base:
            return card
    return None


def _key(name: str) -> str:
    """`GTX 1060 6G`, `gtx1060-6g` and `NVIDIA GeForce GTX 1060 6GB` are the same."""
    plain = re.sub(r"nvidia|geforce|\bgpu\b|(?<=\dg)b\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)
