"""What fits on cards of 4, 6, 8 and 12 GB and at which cost, as `lowmem plan` says it.

    python benchmarks/what_fits.py

Each cell is a `lowmem plan --arch … --batch … --card … --vram … --json` of its own, with accumulation refused (it is
another computation). Nothing runs on a card: bytes are simulated, times are those of the card's datasheet (a roofline),
what others use, the context and the workspace are the profile's assumptions. Overhead is over plain PyTorch in the same
precision, as if it fitted.

Writes `results/what_fits.json` and `.md` beside this file; some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conditions import RESULTS, conditions, sentence, table, write

CARDS = {"gtx1050ti": "4G", "gtx1060-6g": "6G", "gtx1070": "8G", "rtx3060-12g": "12G"}
NETS = (
    ("res110", "bottleneck", 128),
    ("res110", "bottleneck", 256),
    ("res110", "bottleneck", 512),
    ("res110", "bottleneck", 1024),
    ("res101", "bottleneck", 512),
    ("res110", "basic", 512),
)
PLAIN = "fits as it is"


def ask(arch: str, block: str, batch: int, card: str, vram: str) -> dict[str, Any]:
    """The plan as `--json` prints it, or {"refused": the line that refuses it}."""
    flags = ["--arch", arch, "--block", block, "--batch", str(batch), "--card", card, "--vram", vram]
    command = [sys.executable, "-m", "lowmem", "plan", *flags, "--set", "memory.allow_accumulation=false", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 4:
        return {"refused": done.stderr.strip()}
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} left with {done.returncode}: {done.stderr}")
    return dict(json.loads(done.stdout))


def cell(plan: dict[str, Any]) -> str:
    """Precision, if it is not fp32, and cost."""
    if "refused" in plan:
        return "no"
    predicted = plan["predicted"]
    cost = PLAIN if predicted["extra_flops"] == 0 else f"{predicted['overhead']:+.1%}"
    return cost if plan["precision"] == "fp32" else f"{cost} (AMP)"


def plain_mib(plan: dict[str, Any]) -> float | None:
    """Tensors of plain PyTorch's step in fp32, from the first candidate that the plan names."""
    for one in plan.get("candidates", ()):
        if one["what"].startswith("plain autograd, fp32") and one["peak_bytes"]:
            return float(one["peak_bytes"]) / 2**20
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    found, rows, record = conditions(), [], []
    for arch, block, batch in NETS:
        plans = {card: ask(arch, block, batch, card, vram) for card, vram in CARDS.items()}
        plain = next((mib for plan in plans.values() if (mib := plain_mib(plan)) is not None), None)
        rows.append(
            [
                f"{arch} {block}, {batch}",
                "–" if plain is None else f"{plain:,.0f}",
                *(cell(plan) for plan in plans.values()),
            ]
        )
        record += [
            {
                "arch": arch,
                "block": block,
                "batch": batch,
                "card": card,
                "vram": CARDS[card],
                "cell": cell(plan),
                **plan,
            }
            for card, plan in plans.items()
        ]
        print(" | ".join(rows[-1]), flush=True)
    header = ("network, batch", "plain's tensors, MiB", *(f"{vram}B ({card})" for card, vram in CARDS.items()))
    for one in record:
        one.pop("schedule", None)
        one.pop("ladder", None)
    text = f"{sentence(found)}.\n\n{__doc__.split(chr(10) * 2)[2]}\n\n{table(header, rows)}"
    write(asked.out, "what_fits", {**found, "plans": record}, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
