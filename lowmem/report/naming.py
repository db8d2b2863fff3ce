"""Names by which runs are told apart: in the table, and short ones at the ends of curves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lowmem.core.reading import shorten as one_line
from lowmem.report.palette import network_name
from lowmem.runs.view import RunView

LONGEST_NAME = 18  # characters at the end of a curve; longer names would take the room of the curves


def run_names(histories: Sequence[RunView]) -> list[str]:
    """The folders' names; with the folder above where two runs have the same, with a count where that is the
    same too.
    """
    names = [history.name for history in histories]
    names = [
        f"{one_line(history.path.resolve().parent.name)}/{name}" if names.count(name) > 1 else name
        for name, history in zip(names, histories, strict=True)
    ]
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return found


def curve_labels(histories: Sequence[RunView]) -> list[str]:
    """The network's name, and the run's where a network has several runs (seeds, widths)."""
    networks = [network_name(history.config.model) for history in histories]
    return [
        f"{network} {shorten(_without(network, name))}".rstrip() if networks.count(network) > 1 else network
        for network, name in zip(networks, run_names(histories), strict=True)
    ]


def file_names(histories: Sequence[RunView]) -> list[str]:
    """The runs' names as parts of file names, no two the same on any system."""
    slugs = [re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "run" for name in run_names(histories)]
    seen: Counter[str] = Counter()
    found = []
    for slug in slugs:
        seen[slug.lower()] += 1
        found.append(slug if seen[slug.lower()] == 1 else f"{slug}-{seen[slug.lower()]}")
    return found


def _without(network: str, name: str) -> str:
    """`res20-seed3` of Res20 -> `seed3`: the label says the network already."""
    rest = name[len(network) :].lstrip("-_ ")
    return rest if name.lower().startswith(network.lower()) and not rest[:1].isdigit() else name


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """Take out the middle: the ends of run names are what differs (`res20-…-seed3`)."""
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"
