"""On paper: what several cards, or two machines, would give for Bottleneck-110. Predicted, nothing of it measured.

    python benchmarks/scaling_paper.py

Each process has its own card and its part of the batch; gradients are summed by a ring all-reduce while the backward
goes on. Bytes are simulated and times those of the card's datasheet (a roofline), as `lowmem plan --card` says them;
links have the attainable rates that `scaling_model.py` gives with their sources and with what is left out there,
all of which would make it slower. A step's all-reduce takes as long whatever the batch: it pays where the backward of a
process's part of the batch takes longer than that. Compared with one process on the same card with the whole batch,
under the plan that fits there. "On 16 lanes": a desktop, whose cards divide what its processor has and exchange through
its memory; "with 16 lanes each": a host of two processors, without peer-to-peer between cards either. Batch norm takes
its statistics from a process's own pictures.

Writes `results/scaling_paper.json` and `.md` beside this file; some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conditions import RESULTS, conditions, sentence, table, write
from scaling_model import ETHERNET_1G, ETHERNET_10G, Link, Scaled, Scaling, desktop_link, server_link

from lowmem.choose.execution import request_of
from lowmem.config.cards import Card, load_card
from lowmem.config.settings import gather
from lowmem.core.units import MIB

# network, block, card, precision, batches; 128 is the recipe's, larger ones are another recipe
CASES = (
    ("res110", "bottleneck", "gtx1060-6g", "fp32", (128, 256, 512)),
    ("res110", "bottleneck", "rtx3060-12g", "amp", (128, 512)),
    ("res110", "basic", "gtx1060-6g", "fp32", (128,)),
)
WORTH = 0.75  # of what as many cards would give if nothing were lost: below, they are hardly worth their price


def ways(card: Card) -> Iterator[tuple[str, int, Link | None]]:
    """(in words, processes, link)."""
    lane, lanes = card.pcie_lane_bytes_per_second, card.pcie_lanes
    yield "1 card", 1, None
    yield "2 cards on 16 lanes", 2, desktop_link(lane, lanes, 2)
    yield "8 cards on 16 lanes", 8, desktop_link(lane, lanes, 8)
    yield f"8 cards with {lanes} lanes each", 8, server_link(lane, lanes, 8)
    yield "2 machines, 10 Gbit/s", 2, ETHERNET_10G
    yield "2 machines, 1 Gbit/s", 2, ETHERNET_1G


def scaling(arch: str, block: str, card: str, precision: str, batch: int) -> Scaling:
    flags = {
        "model.arch": arch,
        "model.block": block,
        "memory.card": card,
        "train.precision": precision,
        "train.batch": batch,
    }
    return Scaling(request_of(gather(flags=flags).config))


def record_of(way: str, one: Scaled) -> dict[str, Any]:
    link = one.link
    return {
        "way": way,
        "processes": one.processes,
        "local_batch": one.local_batch,
        "link_bytes_per_second": None if link is None else link.bytes_per_second,
        "link_latency_seconds": None if link is None else link.latency_seconds,
        "messages": one.exchange.messages,
        "message_bytes": one.exchange.size_bytes,
        "communication_seconds": one.exchange.communication_seconds,
        "exposed_seconds": one.exchange.exposed_seconds,
        "exposed_share_of_communication": one.exchange.exposed_share,
        "exposed_share_of_step": one.exposed_share,
        "overhead": one.overhead,
        "step_seconds": one.step_seconds,
        "images_per_second": one.images_per_second,
        "speedup": one.speedup,
        "peak_allocated_bytes": one.peak_allocated_bytes,
    }


def row(record: dict[str, Any]) -> list[str]:
    speedup = record["speedup"]
    return [
        record["way"],
        str(record["local_batch"]),
        f"{record['peak_allocated_bytes'] / MIB:,.0f}",
        f"{round(record['overhead'], 3) + 0.0:+.1%}",  # no -0.0 %
        f"{record['step_seconds'] * 1000:,.0f}",
        f"{record['communication_seconds'] * 1000:,.0f}",
        f"{record['exposed_seconds'] * 1000:,.0f} ({record['exposed_share_of_step']:.0%})",
        f"{record['images_per_second']:,.0f}",
        "–" if speedup is None else f"{speedup:.2f}",
    ]


HEADER = (
    "",
    "batch of each",
    "peak tensors of each, MiB",
    "cost of its plan",
    "step, ms",
    "all-reduce, ms",
    "of it waited for, ms (of the step)",
    "pictures/s",
    "times one card",
)


def title(case: dict[str, Any]) -> str:
    return f"{case['arch']} {case['block']}, batch {case['batch']}, {case['card']}, {case['precision']}"


def verdict(cases: Sequence[dict[str, Any]]) -> str:
    """When it does not pay, in a sentence, and when it hardly does, in another."""
    slower: dict[str, list[str]] = {}
    less: dict[str, list[str]] = {}
    for case in cases:
        for record in case["ways"]:
            speedup, processes = record["speedup"], record["processes"]
            if speedup is None or speedup >= WORTH * processes:
                continue
            found = slower if speedup < 1 else less
            said = f"{case['card']} with {case['arch']} {case['block']} at {case['batch']} ({speedup:.2f})"
            found.setdefault(record["way"], []).append(said)
    return (
        f"**It does not pay**, being slower than one card (in brackets: times one card), for {_listed(slower)}.\n\n"
        f"It gives less than {WORTH:.0%} of what as many cards could for {_listed(less)}."
    )


def _listed(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{way}, of {', '.join(said)}" for way, said in found.items()) or "none of these"


def needed(case: dict[str, Any]) -> list[str]:
    def megabits(value: float | None) -> str:
        return "–" if value is None else f"{value * 8 / 1e6:,.0f}"

    return [title(case), megabits(case["break_even_bytes_per_second"]), megabits(case["worth_bytes_per_second"])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    found, cases, parts = conditions(), [], []
    for arch, block, card, precision, batches in CASES:
        for batch in batches:
            several = scaling(arch, block, card, precision, batch)
            records = [record_of(way, several.predict(n, link)) for way, n, link in ways(load_card(card))]
            latency = ETHERNET_1G.latency_seconds
            case = {
                "arch": arch,
                "block": block,
                "card": card,
                "precision": precision,
                "batch": batch,
                "ways": records,
                "break_even_bytes_per_second": several.break_even(2, latency),
                "worth_bytes_per_second": several.break_even(2, latency, 2 * WORTH),
            }
            cases.append(case)
            parts.append(f"{title(case)}:\n\n{table(HEADER, [row(record) for record in records])}")
            print(parts[-1], flush=True)
    header = ("two machines", "Mbit/s to be as fast as one card", f"Mbit/s to be {2 * WORTH} times as fast")
    text = "\n".join(
        [
            "# On paper: predicted, nothing of it measured\n",
            f"{sentence(found)}.\n",
            f"{__doc__.split(chr(10) * 2)[2]}\n",
            f"{verdict(cases)}\n",
            "What the link of each machine has to reach, in each direction:\n",
            table(header, [needed(case) for case in cases]),
            *parts,
        ]
    )
    write(asked.out, "scaling_paper", {**found, "predicted_only": True, "cases": cases}, text)
    print(verdict(cases))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
