"""How the card works while it trains, by what its driver tells whenever steps are logged: for metrics.csv and `watch`,
and a warning, once, where heat or its power limit slow it down."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import reduce
from operator import or_

from lowmem.measure.nvml import CardLoad, throttled_by

_COSTS = 0.10  # of the speed, from which on it is worth a warning
_LEAST_LOOKS, _MOST_LOOKS = 10, 50  # the last ones: a card that begins to work may be held back for a moment
_COOL = "cool it better (dust, fans, the air in the case), or lower its power limit a little"
_FEED = (
    "on a laptop plug it in and choose its performance mode; else raise the limit, where the card allows it, like "
    "`nvidia-smi -pl WATTS` as an administrator"
)


class CardWatch:
    """Looks at the card's load, epoch by epoch."""

    def __init__(self) -> None:
        self._loads: list[CardLoad] = []  # of this epoch
        self._recent: deque[CardLoad] = deque(maxlen=_MOST_LOOKS)
        self._warned = False

    def begin_epoch(self) -> None:
        self._loads.clear()

    def look(self, load: CardLoad | None) -> None:
        """Takes one in; None where nobody tells."""
        if load is not None:
            self._loads.append(load)
            self._recent.append(load)

    def columns(self) -> dict[str, float | None]:
        """Of metrics.csv; none where nothing was told."""
        if not self._loads:
            return {}
        bits = [load.throttle_reasons for load in self._loads if load.throttle_reasons is not None]
        temperatures = [load.temperature_c for load in self._loads if load.temperature_c is not None]
        return {
            "gpu_temperature_c": max(temperatures, default=None),
            "gpu_power_watts": _mean(load.power_watts for load in self._loads),
            "gpu_clock_mhz": _mean(load.clock_mhz for load in self._loads),
            "gpu_utilization_pct": _mean(load.utilization_pct for load in self._loads),
            "gpu_throttled_pct": _mean(100 * bool(throttled_by(each)) for each in bits),
            "gpu_throttle_reasons": reduce(or_, bits) if bits else None,
        }

    def throttled(self) -> str | None:
        """A warning, once, if being held back costs much: by how far the clock is then below what it could be."""
        looks, held = len(self._recent), [load for load in self._recent if _cost(load) > 0]
        cost = sum(map(_cost, held)) / max(1, looks)
        if self._warned or looks < _LEAST_LOOKS or cost <= _COSTS:
            return None
        self._warned = True
        why = ", ".join(throttled_by(reduce(or_, [load.throttle_reasons or 0 for load in held])))
        return (
            f"the card is held back ({why}) {len(held) / looks:.0%} of the time, which costs about {cost:.0%} of the "
            f"speed: {_COOL if 'heat' in why else _FEED}"
        )


def _mean(figures: Iterable[float | None]) -> float | None:
    """Of those that are told."""
    known = [figure for figure in figures if figure is not None]
    return round(sum(known) / len(known), 1) if known else None


def _cost(load: CardLoad) -> float:
    """The share of its speed that a card is held back by; 0 where that is not known."""
    clock, most = load.clock_mhz, load.most_clock_mhz
    return max(0.0, 1 - clock / most) if throttled_by(load.throttle_reasons) and clock and most else 0.0
