"""The runs of the job: which networks, in which order, in which folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.core.errors import UsageError


@dataclass(frozen=True)
class Member:
    """A run of the job. `name` is that of its folder."""

    name: str
    arch: str
    block: str


# The cheapest first: what is wrong with the machine or the settings shows within the first hours.
REPORTED = tuple(Member(name, name, "basic") for name in ("res20", "cnn20", "res56", "cnn56", "res110", "cnn110"))
# Those that the report names and its author's card was too small for.
BOTTLENECK = tuple(Member(f"{arch}-bottleneck", arch, "bottleneck") for arch in ("res56", "res110"))
ALL = REPORTED + BOTTLENECK


def select(only: str | None, block: str | None) -> tuple[Member, ...]:
    """The runs asked for, in the job's order. `only`: names with commas between; `block`: `bottleneck` adds two.

    Raises UsageError for a name or a block that there is not.
    """
    if block not in (None, "basic", "bottleneck"):
        raise UsageError(
            f"there are no {block!r} blocks: --block bottleneck adds {_listed(BOTTLENECK)} to the six runs"
        )
    if only is None:
        return ALL if block == "bottleneck" else REPORTED
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {member.name for member in ALL}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = f"the job has no run {unknown[0]!r}" if unknown else "--only names no run"
        raise UsageError(f"{wrong}: its runs are {_listed(ALL)}, like --only res20,cnn20")
    chosen = [*names, *(member.name for member in BOTTLENECK if block == "bottleneck")]
    return tuple(member for member in ALL if member.name in chosen)


def _listed(members: Sequence[Member]) -> str:
    return ", ".join(member.name for member in members)
