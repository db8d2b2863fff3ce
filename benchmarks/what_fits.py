"""The largest exact batch on cards of 4, 6, 8 and 12 GB: plain PyTorch's and a planned step's, for networks at 224².

    python benchmarks/what_fits.py [--only NAME] [--precision fp32]

Nothing runs on a card: the whole training step (SGD with momentum) is simulated with the caching allocator of a card of
that size; what others use, the context and the workspaces are the profile's assumptions, as `lowmem plan` takes them.
Batches are searched to within a sixteenth; accumulation is not used (it is another computation). The share is what the
planned step takes longer than a plain one of the same batch would, by the card's datasheet (a roofline).

Writes `results/what_fits.json` and `.md` beside this file, after each network; some minutes a network on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from conditions import RESULTS, conditions, sentence, table, write
from torch import nn

from lowmem.choose.planning import Request, choose
from lowmem.choose.request import card_rates, of_card
from lowmem.config.cards import load_card
from lowmem.core.errors import Infeasible
from lowmem.core.units import LEAST_CARD_BYTES, parse_memory
from lowmem.simulate import simulate_step

CARDS = {"gtx1050ti": "4G", "gtx1060-6g": "6G", "gtx1070": "8G", "rtx3060-12g": "12G"}
NETS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vit_b_16", "densenet121")
SIZE = 224
FINE = 16  # batches are searched to within this part
_MOST = 4096


@dataclass(frozen=True, kw_only=True)
class Fits:
    """Pictures of the largest step, None if not one; the planned one's time over a plain step's, as a share."""

    plain: int | None
    planned: int | None
    overhead: float | None


def largest(fits: Callable[[int], bool], start: int) -> int | None:
    """The largest batch that fits, to within a part in FINE below it; the search begins at `start`."""
    low, high = 0, _MOST + 1  # fits, does not
    batch = max(1, min(start, _MOST))
    while high - low > max(1, low // FINE):
        if fits(batch):
            low = batch
            batch = min(2 * low, (low + high) // 2)
        else:
            high = batch
            batch = (low + high) // 2
    return low or None


def on_card(model: nn.Module, card_name: str, memory: str, precision: str, start: int) -> Fits:
    """`start`: about the largest plain batch."""
    card = load_card(card_name)
    budget, rates = of_card(card, parse_memory(memory, LEAST_CARD_BYTES)), card_rates(card)
    overheads: dict[int, float | None] = {}

    def request(batch: int) -> Request:
        return Request(
            model=model,
            batch=batch,
            budget=budget,
            rates=rates,
            modes={precision: "contiguous"},
            allow_accumulation=False,
            image_shape=(3, SIZE, SIZE),
            batch_norm="library",
        )

    def plain(batch: int) -> bool:
        taken = simulate_step(request(batch).shape(precision, batch), None, rates(precision), budget.tensor_bytes)
        return taken.fits and taken.estimate.peak_allocated_bytes <= budget.tensor_bytes

    def planned(batch: int) -> bool:
        try:
            overheads[batch] = choose(request(batch)).plan.predicted.overhead
        except Infeasible:
            return False
        return True

    most = largest(plain, start)
    found = largest(planned, 4 * (most or 1))
    return Fits(plain=most, planned=found, overhead=None if found is None else overheads[found])


def cell(found: Fits) -> str:
    """Both batches and the cost of the larger one."""
    plain = "none" if found.plain is None else f"{found.plain}"
    if found.planned is None:
        return f"{plain} · none"
    assert found.overhead is not None
    return f"{plain} · {found.planned} ({found.overhead:+.0%})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETS)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    found = conditions()
    header = ("network", *(f"{memory}B ({card})" for card, memory in CARDS.items()))
    rows, record = [], []
    for name in NETS if asked.only is None else [asked.only]:
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        cells, start = [], 32
        for card, memory in CARDS.items():
            fits = on_card(model, card, memory, asked.precision, start)
            start = fits.plain or start
            cells.append(cell(fits))
            record.append({"network": name, "card": card, "memory": memory, **fits.__dict__})
        rows.append((name, *cells))
        print(" | ".join(rows[-1]), flush=True)
        about = f"{__doc__.split(chr(10) * 2)[2]}\n\nPlain · planned (time more), {asked.precision}. {sentence(found)}."
        write(asked.out, "what_fits", {**found, "fits": record}, f"# What fits\n\n{about}\n\n{table(header, rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
