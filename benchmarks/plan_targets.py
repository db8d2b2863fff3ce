"""Memory against predicted time of the plans for a few networks and budgets, beside the targets set for them.

Nothing runs for real. Each row is a budget: the solver's schedule for it is simulated whole (the real executor and
optimizer on outlines), which gives the peak of the step's tensors (parameters, momentum, gradients, activations,
temporaries), the seconds by the roofline with a card's rates, and the floating-point operations. Overhead and extra
operations are over the simulated step of the untouched model under autograd, not over any plan of the engine. Where
the budget is a card, the caching allocator's segments count too: the reserved figure has to fit. The solver's seconds
are those of the table for one budget and of reading the schedule from it, without the costs it is given.

With host memory a scenario names the link's rate, each way; complete gradients may wait there too. The step's seconds
then include what the timeline (`lowmem.plan.timeline`) says it waits for the link. How much host memory there is does
not bound the plans: a column says what they take of it.

Writes `results/plan_targets.json` and `.md` beside this file. Takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torchvision
from conditions import RESULTS, conditions, sentence, table, write

from lowmem.choose.costs import measure_costs, price
from lowmem.choose.fitting import fit
from lowmem.choose.request import MARGIN_SHARE, Budget, card_rates, of_card
from lowmem.config.cards import load_card
from lowmem.core.errors import Infeasible
from lowmem.core.units import GIB, MIB, format_size
from lowmem.models import skeleton
from lowmem.plan.cost import ChainCost, Rates
from lowmem.plan.hosting import HostSolver, HostTerms
from lowmem.plan.solver import Solver
from lowmem.plan.timeline import LinkRates
from lowmem.simulate import Simulated, StepShape, StepSimulator, simulate_step

NAME = "plan_targets"
HEADER = (
    "budget",
    "peak of tensors, MiB",
    "on the host, MiB",
    "overhead",
    "extra GFLOP",
    "solver, s",
    "target",
    "others",
    "target met",
)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A budget: bytes, a share of the plain step's peak, a card's memory, or (none of them) the least feasible.

    Target and `others` (a prototype's, or what a paper has published) are overheads, of the least feasible bytes;
    `fits` is a target that asks no more than that.
    """

    bytes: int | None = None
    share_of_plain: float | None = None
    card_bytes: int | None = None
    target: float | None = None
    others: float | None = None
    fits: bool = False


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A network's step and the budgets to plan it for."""

    arch: str
    block: str
    batch: int
    goals: tuple[Goal, ...]
    precision: str = "fp32"
    size: int = 32  # of the pictures
    card: str | None = None  # whose rates predict time, where it is not the one that was asked for
    link: float | None = None  # to host memory, GB/s each way; None: tensors do not wait there

    @property
    def title(self) -> str:
        rates = "" if self.card is None else f", rates of {load_card(self.card).name}"
        host = "" if self.link is None else f", host memory at {self.link:g} GB/s"
        return f"{self.arch} {self.block}, batch {self.batch}, {self.precision}{rates}{host}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a goal. Overhead is a share; None throughout if nothing fits."""

    label: str
    budget_bytes: int | None
    peak_tensor_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    host_bytes: int | None = None
    waiting_seconds: float | None = None
    overhead: float | None = None
    extra_flops: int | None = None
    solver_seconds: float | None = None
    peak_at: str | None = None
    refused: str | None = None
    target: float | None = None
    others: float | None = None
    met: bool | None = None


@dataclass(frozen=True)
class Bench:
    """One scenario's step, simulated plain, and its chain of costs."""

    shape: StepShape
    steps: StepSimulator
    rates: Rates
    plain: Simulated
    chain: ChainCost
    costs_seconds: float
    link: float | None = None

    def solver(self, limit_bytes: int | None = None) -> Solver:
        if self.link is None:
            return Solver(self.chain, limit_bytes=limit_bytes)
        rates = LinkRates(self.link * 1e9, self.link * 1e9)
        return HostSolver(self.chain, HostTerms(rates, UNBOUNDED, grads=True))


TORCHVISION = "torchvision"
UNBOUNDED = 1 << 50  # of host memory
# Shah et al., "Memory optimization for deep networks" (ICLR 2021), measured there on a P100. Its GB are 2^30 bytes: its
# plain step takes 15.06, which is the simulated peak of ours in these.
MONET = (
    Goal(bytes=int(8.01 * GIB), target=0.03, others=0.056),
    Goal(bytes=int(6.00 * GIB), target=0.06, others=0.093),
    Goal(bytes=int(4.99 * GIB), target=0.09, others=0.1195),
    Goal(),
)
THE_USUAL = (Goal(share_of_plain=1.0), Goal(share_of_plain=1 / 2), Goal(share_of_plain=1 / 3), Goal())
HALF_AND_THIRD = (Goal(share_of_plain=1 / 2), Goal(share_of_plain=1 / 3))


def hosted_110(link: float, *targets: float, least: int | None = None) -> Scenario:
    """Bottleneck-110 with host memory."""
    budgets = (4600, 3600, 2708, 1806, 1500)
    goals = tuple(Goal(bytes=mib * MIB, target=target) for mib, target in zip(budgets, targets, strict=True))
    return Scenario(arch="res110", block="bottleneck", batch=128, link=link, goals=(*goals, Goal(target=least)))


SCENARIOS = (
    Scenario(
        arch="res110",
        block="bottleneck",
        batch=128,
        goals=(
            Goal(bytes=4600 * MIB, target=0.03, others=0.031),
            Goal(bytes=3600 * MIB, target=0.07, others=0.078),
            Goal(bytes=2708 * MIB, target=0.12, others=0.132),
            Goal(bytes=1806 * MIB, target=0.20, others=0.237),
            Goal(bytes=1500 * MIB, target=0.28, others=0.306),
            Goal(target=1300 * MIB, others=1424 * MIB),
        ),
    ),
    Scenario(arch="res110", block="basic", batch=128, goals=THE_USUAL),
    Scenario(arch="res50", block="bottleneck", batch=128, goals=THE_USUAL),
    Scenario(arch="res101", block="bottleneck", batch=128, goals=THE_USUAL),
    Scenario(
        arch="res110", block="bottleneck", batch=1024, precision="amp", goals=(Goal(card_bytes=6 * GIB, target=0.27),)
    ),
    Scenario(
        arch="res110", block="bottleneck", batch=128, precision="amp", goals=(Goal(card_bytes=2 * GIB, fits=True),)
    ),
    Scenario(arch="resnet50", block=TORCHVISION, batch=184, size=224, card="p100", goals=MONET),
    Scenario(arch="resnet50", block=TORCHVISION, batch=184, size=224, card="v100", goals=MONET),
    hosted_110(12, 0.002, 0.005, 0.015, 0.05, 0.09, least=1030 * MIB),
    hosted_110(3, 0.007, 0.025, 0.06, 0.11, 0.15),
    Scenario(arch="res110", block="basic", batch=128, link=12, goals=HALF_AND_THIRD),
    Scenario(arch="res110", block="basic", batch=128, link=3, goals=HALF_AND_THIRD),
    Scenario(arch="res101", block="bottleneck", batch=128, link=12, goals=HALF_AND_THIRD),
    Scenario(arch="res101", block="bottleneck", batch=128, link=3, goals=HALF_AND_THIRD),
    Scenario(arch="res110", block="bottleneck", batch=512, goals=(Goal(card_bytes=6 * GIB),)),
    Scenario(arch="res110", block="bottleneck", batch=512, link=12, goals=(Goal(card_bytes=6 * GIB, target=0.06),)),
    Scenario(
        arch="res110",
        block="bottleneck",
        batch=1024,
        precision="amp",
        link=12,
        goals=(Goal(card_bytes=6 * GIB, target=0.08),),
    ),
    Scenario(
        arch="resnet50",
        block=TORCHVISION,
        batch=184,
        size=224,
        card="p100",
        link=12,
        goals=(replace(MONET[0], target=None), replace(MONET[1], target=None), replace(MONET[2], target=0.06)),
    ),
)


def prepare(scenario: Scenario, card_name: str, width: int) -> Bench:
    """Simulates the plain step and measures the chain's costs."""
    if scenario.block == TORCHVISION:
        with torch.device("meta"):
            model = torchvision.models.get_model(scenario.arch)
    else:
        model = skeleton(scenario.arch, scenario.block, width=width)
    shape = StepShape(
        model=model,
        image_shape=(3, scenario.size, scenario.size),
        batch=scenario.batch,
        micro_batch=scenario.batch,
        precision=scenario.precision,
        memory_format="contiguous",
    )
    rates = card_rates(load_card(scenario.card or card_name))(scenario.precision)
    plain = simulate_step(shape, None, rates)
    began = time.perf_counter()
    chain = price(measure_costs(shape, rates=rates), rates)
    return Bench(shape, StepSimulator(shape), rates, plain, chain, time.perf_counter() - began, scenario.link)


def label(goal: Goal) -> str:
    """The budget in words."""
    if goal.card_bytes is not None:
        return f"a card of {format_size(goal.card_bytes)}"
    if goal.bytes is not None:
        return f"{goal.bytes // MIB:,} MiB"
    names = {1.0: "plain's peak", 1 / 2: "half of plain", 1 / 3: "a third of plain", None: "least feasible"}
    return names[goal.share_of_plain]


def budget_of(goal: Goal, bench: Bench, card_name: str) -> Budget:
    """Raises Infeasible for a card too small for anything."""
    if goal.card_bytes is not None:
        return of_card(load_card(card_name), goal.card_bytes)
    if goal.bytes is not None:
        return Budget(total_bytes=goal.bytes, source=label(goal))
    assert goal.share_of_plain is not None
    return Budget(total_bytes=int(bench.plain.estimate.peak_tensor_bytes * goal.share_of_plain), source=label(goal))


def measure(goal: Goal, bench: Bench, card_name: str) -> Row:
    """Solves and simulates one budget."""
    least = goal == Goal(target=goal.target, others=goal.others)
    budget: Budget | None = None
    try:
        began = time.perf_counter()
        if least:
            solver = bench.solver()
            solution = solver.solve(solver.least().peak_bytes)
            solver_seconds = time.perf_counter() - began
            simulated = bench.steps.simulate(solution.schedule, bench.rates)
        else:
            budget = budget_of(goal, bench, card_name)
            solver = bench.solver(budget.tensor_bytes)
            solver.solve(budget.tensor_bytes)
            solver_seconds = time.perf_counter() - began
            solution, simulated = fit(solver, bench.steps, budget, bench.rates)
    except Infeasible as error:
        return Row(
            label=label(goal),
            budget_bytes=error.budget_bytes,
            refused=f"no plan fits; the least is {format_size(error.least_bytes)}",
            target=goal.target,
            others=goal.others,
            met=False if goal.target is not None or goal.fits else None,
        )
    taken = simulated.estimate
    overhead = (simulated.seconds + solution.waiting_seconds) / bench.plain.seconds - 1
    return Row(
        label=label(goal),
        budget_bytes=None if budget is None else budget.tensor_bytes,
        peak_tensor_bytes=taken.peak_tensor_bytes,
        peak_reserved_bytes=taken.peak_reserved_bytes if budget is not None and budget.on_card else None,
        host_bytes=None if bench.link is None else solution.host_bytes,
        waiting_seconds=None if bench.link is None else solution.waiting_seconds,
        overhead=overhead,
        extra_flops=simulated.flops - bench.plain.flops,
        solver_seconds=round(solver_seconds, 3),
        peak_at=f"{taken.peak_at.phase}, {taken.peak_at.operation}",
        target=goal.target,
        others=goal.others,
        met=met(goal, taken.peak_tensor_bytes if least else overhead),
    )


def met(goal: Goal, reached: float) -> bool | None:
    """None if there is no target."""
    if goal.target is None:
        return True if goal.fits else None
    return reached <= goal.target


def cells(row: Row) -> tuple[str, ...]:
    """A row's texts, in the order of HEADER."""
    verdict = {None: "", True: "yes", False: "no"}[row.met]
    budget = row.label
    if row.peak_reserved_bytes is not None:
        assert row.budget_bytes is not None
        budget = f"{row.label}: {format_size(row.budget_bytes)} for tensors"
    elif row.label in ("plain's peak", "half of plain", "a third of plain"):
        budget = f"{row.label}: {format_size(row.budget_bytes)}"
    if row.refused is not None:
        return (budget, row.refused, "", "", "", "", goal_text(row.target), goal_text(row.others), verdict)
    assert row.peak_tensor_bytes is not None
    assert row.extra_flops is not None
    peak = f"{row.peak_tensor_bytes / MIB:,.0f}"
    if row.peak_reserved_bytes is not None:
        peak += f" (reserved {row.peak_reserved_bytes / MIB:,.0f})"
    return (
        budget,
        peak,
        "–" if row.host_bytes is None else f"{row.host_bytes / MIB:,.0f}",
        f"{row.overhead:+.1%}",
        f"{row.extra_flops / 1e9:,.0f}",
        f"{row.solver_seconds:.1f}",
        "fits" if row.target is None and row.met else goal_text(row.target),
        goal_text(row.others),
        verdict,
    )


def goal_text(value: float | None) -> str:
    """An overhead or bytes."""
    if value is None:
        return "–"
    return f"{value:.1%}" if value < 1 else f"{value / MIB:,.0f} MiB"


def section(scenario: Scenario, bench: Bench, rows: list[Row]) -> str:
    """One scenario's table under its heading."""
    plain = bench.plain
    return (
        f"## {scenario.title}\n\nPlain autograd: {plain.estimate.peak_tensor_bytes / MIB:,.0f} MiB, "
        f"{plain.seconds:.3f} s a step (predicted), {plain.flops / 1e9:,.0f} GFLOP. Costs of the chain's stages took "
        f"{bench.costs_seconds:.1f} s.\n\n{table(HEADER, [cells(row) for row in rows])}"
    )


def record_of(scenario: Scenario, bench: Bench, rows: list[Row]) -> dict[str, object]:
    """One scenario for the JSON file."""
    plain = bench.plain
    return {
        "arch": scenario.arch,
        "block": scenario.block,
        "batch": scenario.batch,
        "precision": scenario.precision,
        "link_gb_per_second": scenario.link,
        "plain_peak_tensor_bytes": plain.estimate.peak_tensor_bytes,
        "plain_seconds": plain.seconds,
        "plain_flops": plain.flops,
        "costs_seconds": round(bench.costs_seconds, 3),
        "rows": [asdict(row) for row in rows],
    }


def introduction(card: str, width: int, made: str) -> str:
    """What the tables' figures are."""
    return (
        f"# Plans against their targets\n\nWidth {width}, contiguous, rates of {load_card(card).name}; peaks of the "
        "whole step's tensors, simulated; overhead over the predicted step of plain autograd. From a card's memory go "
        f"what the system keeps, the context, the assumed workspace and a margin of {MARGIN_SHARE:.0%}; the "
        f"allocator's segments have to fit into the rest.\n\n{made}\n"
    )


def wanted(only: str | None) -> Iterator[Scenario]:
    """Those whose title has the words."""
    yield from (scenario for scenario in SCENARIOS if only is None or only in scenario.title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="gtx1060-6g", help="whose rates predict time")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--only", help="scenarios whose title has these words, like 'res50'")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = conditions()
    intro = introduction(options.card, options.width, sentence(found))
    sections, records = [], []
    for scenario in wanted(options.only):
        print(f"{scenario.title}: plain step and costs", flush=True)
        bench = prepare(scenario, options.card, options.width)
        rows = []
        for goal in scenario.goals:
            rows.append(measure(goal, bench, options.card))
            print("  " + " | ".join(cells(rows[-1])), flush=True)
        sections.append(section(scenario, bench, rows))
        records.append(record_of(scenario, bench, rows))
        record = {**found, "card": options.card, "width": options.width, "scenarios": records}
        write(options.out, NAME, record, "\n".join([intro, *sections]))


if __name__ == "__main__":
    main()
