"""How long planning takes: whole processes beside `import torch`, and the planning itself by its parts.

    python benchmarks/planning.py [--rounds 5] [--only NAME]

Every round of every case is a process of its own, started cold; one after the other, so that nothing competes but what
else the machine does. A case's own time is on the clock from the first call to the plan, without imports. `curve`
solves 60 budgets and simulates each step whole; `ladder` is what is planned in reserve for when memory runs out.

Writes `results/planning.json` and `.md` beside this file, after each case.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from conditions import RESULTS, conditions, sentence, table, write

IMPORT = [sys.executable, "-c", "import torch"]
PLAN = [sys.executable, "-m", "lowmem", "plan", "--arch", "res110", "--block", "bottleneck", "--card", "gtx1060-6g"]
BUDGETS = 60
HEADER = ("case", "seconds, median (least to most)", "of which", "target, s", "met")


@dataclass
class Clock:
    """Seconds of named parts."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began


def plan_of(network: str, batch: int, size: int, card_name: str, budget_bytes: int | None, clock: Clock) -> None:
    """As `lowmem.choose.planning` does it, part by part; no `budget_bytes`: the whole card."""
    import torch
    import torchvision

    from lowmem.choose.costs import measure_costs, price
    from lowmem.choose.fitting import fit
    from lowmem.choose.request import Budget, card_rates, of_card
    from lowmem.config.cards import load_card
    from lowmem.models import skeleton
    from lowmem.plan.solver import Solver
    from lowmem.simulate import StepShape, StepSimulator, simulate_step

    card = load_card(card_name)
    rates = card_rates(card)("fp32")
    budget = of_card(card) if budget_bytes is None else Budget(total_bytes=budget_bytes)
    with torch.device("meta"):
        own = network.startswith("res110")
        model = skeleton(*network.split()) if own else torchvision.models.get_model(network)
    shape = StepShape(
        model=model,
        image_shape=(3, size, size),
        batch=batch,
        micro_batch=batch,
        precision="fp32",
        memory_format="contiguous",
    )
    with clock.part("stages"):
        measured = measure_costs(shape, rates=rates)
    with clock.part("table"):
        chain = price(measured, rates)
        solver = Solver(chain, limit_bytes=budget.tensor_bytes)
    with clock.part("whole steps"):
        fit(solver, StepSimulator(shape), budget, rates)
    with clock.part("plain step"):
        simulate_step(shape, None, rates)


def curve(clock: Clock) -> None:
    """Bottleneck-110 at batch 128: costs, table, and 60 budgets simulated whole."""
    from lowmem.choose.costs import measure_costs, price
    from lowmem.choose.request import card_rates
    from lowmem.config.cards import load_card
    from lowmem.models import skeleton
    from lowmem.plan.solver import Solver
    from lowmem.simulate import StepShape, StepSimulator

    rates = card_rates(load_card("gtx1060-6g"))("fp32")
    shape = StepShape(
        model=skeleton("res110", "bottleneck"),
        image_shape=(3, 32, 32),
        batch=128,
        micro_batch=128,
        precision="fp32",
        memory_format="contiguous",
    )
    with clock.part("stages"):
        measured = measure_costs(shape, rates=rates)
    with clock.part("table"):
        solver = Solver(price(measured, rates))
    with clock.part("budgets"):
        solutions = solver.curve(BUDGETS)
    with clock.part("whole steps"):
        steps = StepSimulator(shape)
        for solution in solutions:
            steps.simulate(solution.schedule, rates)


def ladder(clock: Clock) -> None:
    """The plans in reserve of Bottleneck-110 at batch 128 on the card that this project is aimed at."""
    from lowmem.choose.planning import Request, choose, with_ladder
    from lowmem.choose.request import card_rates, of_card
    from lowmem.config.cards import load_card
    from lowmem.models import skeleton

    card = load_card("gtx1060-6g")
    choice = choose(
        Request(model=skeleton("res110", "bottleneck"), batch=128, budget=of_card(card), rates=card_rates(card))
    )
    with clock.part("ladder"):
        with_ladder(choice)


MONET_BYTES = 6 * 2**30
CASES: dict[str, tuple[Callable[[Clock], None], float | None]] = {
    "res110 bottleneck, batch 128, GTX 1060 6G": (
        lambda clock: plan_of("res110 bottleneck", 128, 32, "gtx1060-6g", None, clock),
        None,  # a third of importing torch
    ),
    "ResNet-50, batch 184 at 224": (
        lambda clock: plan_of("resnet50", 184, 224, "p100", MONET_BYTES, clock),
        2.0,
    ),
    "DenseNet-121, batch 64 at 224": (
        lambda clock: plan_of("densenet121", 64, 224, "gtx1060-6g", None, clock),
        10.0,
    ),
    f"curve, {BUDGETS} budgets": (curve, 5.0),
    "ladder": (ladder, 1.0),
}


def process_seconds(command: list[str]) -> float:
    """Of a whole process, on the clock."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    return time.perf_counter() - began


def case_seconds(name: str) -> dict[str, float]:
    """Of a case's parts, in a process of its own."""
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(name: str, seconds: list[float], parts: str, target: float | None) -> tuple[str, ...]:
    """A case's texts, in the order of HEADER."""
    median = statistics.median(seconds)
    spread = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    if target is None:
        return (name, spread, parts, "–", "")
    return (name, spread, parts, f"{target:.2f}", "yes" if median <= target else "no")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="cases whose name has these words, beside the whole processes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.case is not None:
        import torchvision  # noqa: F401

        gc.collect()
        gc.freeze()  # as the command line does with what it imports: see lowmem/cli/terminal.py
        clock = Clock()
        CASES[asked.case][0](clock)
        print(json.dumps(clock.parts))
        return
    found = conditions()
    importing, planning = [], []
    for _ in range(asked.rounds):
        importing.append(process_seconds(IMPORT))
        planning.append(process_seconds(PLAN))
    torch_seconds = statistics.median(importing)
    rows = [
        row("`import torch`, whole process", importing, "", None),
        row("`lowmem plan` for Bottleneck-110, whole process", planning, "", 1.6 * torch_seconds),
    ]
    record: dict[str, object] = {**found, "import_torch_s": importing, "lowmem_plan_s": planning}
    for name, (_, target) in CASES.items():
        if asked.only is not None and asked.only not in name:
            continue
        rounds = [case_seconds(name) for _ in range(asked.rounds)]
        medians = {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in medians.items())
        least = torch_seconds / 3 if target is None else target
        rows.append(row(name, [sum(one.values()) for one in rounds], parts, least))
        record[name] = rounds
        print(" | ".join(rows[-1]), flush=True)
        introduction = f"{__doc__.split(chr(10) * 2)[2]}\n\n{sentence(found)}; median of {asked.rounds}.\n\n"
        write(asked.out, "planning", record, f"# Seconds of planning\n\n{introduction}{table(HEADER, rows)}")


if __name__ == "__main__":
    main()
