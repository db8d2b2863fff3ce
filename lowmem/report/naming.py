"""What the runs of a report are called: in tables, at the ends of curves, in file names; and which belong together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.networks import ARCHITECTURES, resolve_block
from lowmem.config.schema import ModelConfig
from lowmem.core.reading import shorten
from lowmem.report.style import LineStyle, network_style
from lowmem.runs.view import RunView

LONGEST_NAME = 18  # characters at the end of a curve; longer names would take the room of the curves


@dataclass(frozen=True)
class NamedRun:
    """A run, and how it is told from the others of its report."""

    history: RunView
    network: str
    name: str  # the folder's, in tables and headings
    label: str  # short, at the end of a curve
    file_name: str  # a part of file names, no two the same on any system
    style: LineStyle  # the network's, the runs of one network getting thinner in turn


def common_classes(runs: Sequence[NamedRun]) -> int | None:
    """The number of classes if all runs that know it agree: there is one chance level or none."""
    known = {run.history.classes for run in runs if run.history.classes is not None}
    return known.pop() if len(known) == 1 else None


def network_name(model: ModelConfig) -> str:
    """`Res110`, `CNN56`; with the block if it is not the published one: `Res110-bottleneck`."""
    if model.spec is not None:
        return model.name
    name = model.arch.replace("res", "Res").replace("cnn", "CNN")
    return name if model.block == resolve_block(model.arch, None) else f"{name}-{model.block}"


def in_order(histories: Sequence[RunView]) -> list[RunView]:
    """As the published table: residual nets by depth, then plain nets, then all others by name; runs of one network by
    name."""

    def place(run: RunView) -> tuple[int, str]:
        model = run.config.model
        return (ARCHITECTURES.index(model.arch), "") if model.spec is None else (len(ARCHITECTURES), model.name)

    by_name = sorted(histories, key=lambda run: (run.config.model.block, run.name, str(run.path)))
    return sorted(by_name, key=place)


def name_runs(histories: Sequence[RunView]) -> list[NamedRun]:
    """In the order given. A name is the folder's; with the folder above where two runs have the same, with a count
    where that is the same too. A label is the network's name, and the run's where a network has several runs."""
    names = [history.name for history in histories]
    names = [
        f"{shorten(history.path.resolve().parent.name)}/{name}" if names.count(name) > 1 else name
        for name, history in zip(names, histories, strict=True)
    ]
    networks = [network_name(history.config.model) for history in histories]
    same_name, same_file, same_network = Counter[str](), Counter[str](), Counter[str]()
    runs = []
    for history, folder, network in zip(histories, names, networks, strict=True):
        same_name[folder] += 1
        name = f"{folder} ({same_name[folder]})" if names.count(folder) > 1 else folder
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "run"
        same_file[slug.lower()] += 1
        file_name = slug if same_file[slug.lower()] == 1 else f"{slug}-{same_file[slug.lower()]}"
        label = network
        if networks.count(network) > 1:
            # `res20-seed3` of Res20 -> `seed3`: the label says the network already.
            rest = name[len(network) :].lstrip("-_ ")
            said_already = name.lower().startswith(network.lower()) and not rest[:1].isdigit()
            label = f"{network} {shorten_middle(rest if said_already else name)}".rstrip()
        style = network_style(history.config.model, same_network[network])
        same_network[network] += 1
        runs.append(NamedRun(history, network, name, label, file_name, style))
    return runs


def shorten_middle(name: str) -> str:
    """Take out the middle: the ends of run names are what differs (`res20-…-seed3`)."""
    tail = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1 - tail]}…{name[-tail:]}"


def find_pairs(runs: Sequence[NamedRun]) -> dict[str, list[NamedRun]]:
    """Runs with a curve by depth, `110`, and block where it is not the usual one, `110-bottleneck`; only where both a
    residual and a plain net have one."""
    groups: dict[str, list[NamedRun]] = {}
    for run in runs:
        if run.history.epochs and run.history.config.model.spec is None:
            groups.setdefault(run.network[3:], []).append(run)
    return {
        name: groups[name]
        for name in sorted(groups, key=lambda name: (int(name.partition("-")[0]), name))
        if {run.network[:3] for run in groups[name]} == {"Res", "CNN"}
    }
