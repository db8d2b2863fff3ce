"""What a job is made for, on a card or in a rehearsal, and the plans of its networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.job import PARTS
from lowmem.choose.execution import request_of
from lowmem.choose.planning import choose
from lowmem.choose.request import Choice
from lowmem.config.settings import gather
from lowmem.core.units import GIB, format_size

CARD = "gtx1060-6g"  # whose memory is emulated
_HOST = {"cuda": "8G", "cpu": "256M"}  # memory.host; a rehearsal's is this machine's
LIBRARY, NATIVE = "library", "native"  # batch norm's kernels


@dataclass(frozen=True)
class Network:
    name: str
    arch: str
    block: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the job is made for. `networks`: those whose gradients are compared, the last one is the one that
    everything else is done with. `budgets`: bytes of a card's memory; on the CPU shares of what the untouched step's
    tensors take. `busy_batch`: at which the card is busy. `pictures`: training pictures held on the card."""

    device: str
    networks: tuple[Network, ...]
    width: int
    batch: int
    busy_batch: int
    budgets: tuple[float, ...]  # the larger first
    pictures: int
    steps: int
    resume_steps: int
    suite_minutes: float | None = None  # of the acceptance suite; None: what its part has
    limits: Mapping[str, float | None] = field(default_factory=dict)  # part -> seconds, where they are not a card's
    brief: bool = False  # one question of each kind

    @property
    def main(self) -> Network:
        return self.networks[-1]


_RES56 = Network("Bottleneck-56", "res56", "bottleneck")
_RES110 = Network("Bottleneck-110", "res110", "bottleneck")
ON_CARD = Scale(
    device="cuda",
    networks=(Network("Res56", "res56", "basic"), _RES110),
    width=64,
    batch=128,
    busy_batch=512,
    budgets=(6 * GIB, 3 * GIB),
    pictures=50_000,
    steps=5,
    resume_steps=40,
)
# No limits to speak of: a machine that rehearses may be busy.
_LIMITS = {part.name: 600.0 for part in PARTS}
_SMALL: dict[str, Any] = {"device": "cpu", "width": 4, "batch": 16, "busy_batch": 32, "budgets": (0.8, 0.65)}
_SMALL |= {"pictures": 0, "steps": 2, "limits": _LIMITS}
_RES20 = Network("Res20", "res20", "basic")
QUICK = Scale(networks=(_RES20,), resume_steps=4, suite_minutes=1.0, brief=True, **_SMALL)
WHOLE = Scale(networks=(_RES20, _RES56), resume_steps=8, suite_minutes=2.5, **_SMALL)


class Plans:
    """Choices, each made once."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._known: dict[object, Choice] = {}

    def __call__(
        self,
        network: Network,
        budget: float,
        batch: int | None = None,
        norms: str = LIBRARY,
        amp: bool = False,
        host: bool = False,
    ) -> Choice:
        """`host`: with host memory. Raises Infeasible."""
        batch = batch or self.scale.batch
        key = (network, budget, batch, norms, amp, host)
        if key not in self._known:
            self._known[key] = self._choose(network, self._bytes(network, budget, batch), batch, norms, amp, host)
        return self._known[key]

    def _bytes(self, network: Network, budget: float, batch: int) -> int:
        if self.scale.device == "cuda":
            return int(budget)
        if (network, batch) not in self._known:
            self._known[network, batch] = self._choose(network, 1 << 40, batch, LIBRARY, False)
        return int(budget * self._known[network, batch].plain.estimate.peak_allocated_bytes)

    def _choose(self, network: Network, size: int, batch: int, norms: str, amp: bool, host: bool = False) -> Choice:
        scale = self.scale
        flags = {
            "model.arch": network.arch,
            "model.block": network.block,
            "model.width": scale.width,
            "train.batch": batch,
            "train.precision": "amp" if amp else "fp32",
            "train.memory_format": "channels-last" if amp else "contiguous",
            "train.device": "cpu",  # this machine's: the card plans for itself
            **({"memory.vram": size, "memory.card": CARD} if scale.device == "cuda" else {"memory.tensors": size}),
        }
        sets = ["memory.allow_accumulation=false"]
        if host:
            sets.append(f"memory.host={_HOST[scale.device]}")
        if norms == NATIVE:
            sets.append("train.batch_norm=native")
        print(f"planning {network.name}, batch {batch}, {format_size(size)}", flush=True)
        return choose(request_of(gather(flags=flags, sets=sets).config, 10, scale.pictures))
