"""Memory trouble that raises no error: the allocator thrashing, and host memory standing in for the card's (Windows).

Both show in the step time, but step time alone proves nothing (another program may use the card): thrashing takes
allocator retries beside it, spilling a card that is nearly full. What is looked at is one interval of steps, against
the run's own first ones; nothing of it is absolute.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

FIRST = 3  # intervals to learn from, after the start and after each change of plan
IN_A_ROW = 2  # one slow interval is an accident
THRASHING_SLOWDOWN = 1.5
SPILL_SLOWDOWN = 3.0  # over PCIe it is more; other programs seldom take two thirds of a card
NEARLY_FULL_SHARE = 0.05  # of the card free
_REMEMBERED = 500  # intervals


@dataclass(frozen=True)
class Reading:
    """`alloc_retries`: since the start of the process; `free_bytes` and `total_bytes` of the card."""

    alloc_retries: int
    free_bytes: int
    total_bytes: int


class Pressure:
    """Told of every interval of steps, says when the plan should give way to a smaller one.

    `read`: the figures of the device, None where it has none (the CPU: then it never says anything). `spills`: whether
    the driver puts host memory in the place of the card's instead of failing, as on Windows.
    """

    def __init__(self, read: Callable[[], Reading | None], *, spills: bool = sys.platform == "win32") -> None:
        self._read = read
        self._spills = spills
        self._retries: int | None = None
        self._retries_told = 0
        began = read()
        self._retries_before = 0 if began is None else began.alloc_retries
        self.plan_changed()

    def plan_changed(self) -> None:
        """Another plan has another step time: everything is learned anew, which takes long enough that one bad spell
        cannot run down the whole ladder."""
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual_retries = 0.0  # a step, the most of the first intervals
        self._suspicious = 0

    def retries(self) -> int | None:
        """The allocator's retries since this was made, whenever their number has doubled since it was last told here:
        the first is told at once, and thousands in a dozen times. None: nothing to tell."""
        reading = self._read()
        if reading is None:
            return None
        count = reading.alloc_retries - self._retries_before
        if count < max(1, 2 * self._retries_told):
            return None
        self._retries_told = count
        return count

    def interval(self, steps: int, seconds: float) -> str | None:
        """What is wrong, in words, after `steps` steps took `seconds` of training; None: nothing."""
        reading = self._read()
        if reading is None or steps < 1:
            return None
        before, self._retries = self._retries, reading.alloc_retries
        retries = (reading.alloc_retries - before) / steps if before is not None else 0.0
        step_seconds = seconds / steps
        if len(self._seconds) < FIRST:
            self._seconds.append(step_seconds)
            self._usual_retries = max(self._usual_retries, retries)
            return None
        slowdown = step_seconds / max(median(self._seconds), 1e-9)
        found = self._judge(reading, retries, slowdown)
        if found is None:
            self._seconds.append(step_seconds)
            self._suspicious = 0
            return None
        self._suspicious += 1
        return found if self._suspicious >= IN_A_ROW else None

    def _judge(self, reading: Reading, retries: float, slowdown: float) -> str | None:
        if retries > self._usual_retries and slowdown >= THRASHING_SLOWDOWN:
            return (
                f"the allocator empties its cache {retries:.2f} times a step ({self._usual_retries:.2f} at first), and "
                f"a step takes {slowdown:.1f} times as long as usual"
            )
        full = reading.free_bytes < NEARLY_FULL_SHARE * reading.total_bytes
        if self._spills and full and slowdown >= SPILL_SLOWDOWN:
            return (
                f"a step takes {slowdown:.1f} times as long as usual on a card that is full: the driver seems to use "
                "host memory in its place"
            )
        return None
