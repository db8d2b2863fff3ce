"""The largest batch that holds, in few tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Search:
    """Where a search stands: `holds` is the largest batch that did, `fails` the smallest that did not (None: not found
    yet), `tried` all in order."""

    holds: int | None = None
    fails: int | None = None
    tried: list[tuple[int, bool]] = field(default_factory=list)

    def note(self, batch: int, held: bool) -> None:
        self.tried.append((batch, held))
        if held:
            self.holds = max(batch, self.holds or 0)
        else:
            self.fails = min(batch, self.fails or batch)


def largest(holds: Callable[[int], bool | None], guess: int, unit: int, most: int) -> Search:
    """The largest multiple of `unit` that `holds`, from a guess: doubling steps away from it until both a batch that
    holds and one that does not are known, then bisection until they are neighbours. `most` tries at most; `holds`
    answers None when there is no time left for one."""
    search = Search()
    at = max(unit, guess // unit * unit)
    step = max(unit, at // 32 // unit * unit)
    while len(search.tried) < most:
        held = holds(at)
        if held is None:
            break
        search.note(at, held)
        if search.holds is not None and search.fails is not None:
            if search.fails - search.holds <= unit:
                break
            at = (search.holds + search.fails) // 2 // unit * unit
        elif held:
            at, step = at + step, 2 * step
        elif at == unit:
            break
        else:
            at, step = max(unit, at - step), 2 * step
    return search
