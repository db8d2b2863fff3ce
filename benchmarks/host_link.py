"""What a plan with host memory is predicted to take, and what it takes: on the CPU, over the link of its own rate.

    python benchmarks/host_link.py [--arch res56] [--block bottleneck] [--width 32] [--batch 32] [--rounds 7]
                                   [--busy]

One process, one thread, pictures of noise. Blocks are timed on this machine, as `memory.calibrate=always` does; then a
step is planned into shares of what plain PyTorch takes, with host memory and without. At the link's rate what waits on
the host takes as long to leave as a third of the plain step, as nearly as plans go; the weak link has a hundredth of
that. Each round takes one step of every way after the other, so that a busy machine slows all of them, and a measured
ratio is the median over the rounds of ratios within one:

- plain: the untouched network under autograd;
- without: the plan that the same budget gets without host memory;
- bare: the schedule of the plan with host memory, but nothing waits there, so it takes more memory;
- full speed: the plan with host memory, over a link as fast as memory is copied;
- hosted: over the link at the rate that it was planned for.

Whatever else a machine does slows the computing, but not the link, which sleeps. On one that is `--busy` seconds are
those of the thread that computes: what it computed, and what it would have waited for a link at the rate in that time.
The link copies at once there, as early and as late as it is asked.

How far bare steps are from their prediction is the error of the timed blocks; the link's own is what hosted steps take
beside bare ones. Gradients of all ways have to be plain's, bit by bit, and what comes to exist and goes in a hosted
step has to be what is simulated, event by event. Writes `results/host_link.json` and `.md` beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conditions import RESULTS, conditions, sentence, table, write
from torch import Tensor, nn

from lowmem.calibrate.calibrator import Calibration, Calibrator
from lowmem.calibrate.device import cpu_identity
from lowmem.choose.costs import measure_costs, price
from lowmem.choose.fitting import fit
from lowmem.choose.request import REFERENCE_CARD, Budget, card_rates
from lowmem.config.cards import load_card
from lowmem.core.units import MIB
from lowmem.models import build
from lowmem.plan.cost import ChainCost
from lowmem.plan.evaluate import Solution, evaluate
from lowmem.plan.hosting import HostSolver, HostTerms
from lowmem.plan.policy import Schedule
from lowmem.plan.solver import Solver
from lowmem.plan.timeline import LinkRates
from lowmem.remat import apply_plan
from lowmem.remat.links import CpuLink, Passing, Slab
from lowmem.simulate import OutlineMode, Recorder, Simulated, StepShape, StepSimulator, empty_copy, simulate_step

RATES = card_rates(load_card(REFERENCE_CARD))("fp32")
CASES = (("half", 0.5, 1.0), ("a third", 1 / 3, 1.0), ("half, weak link", 0.5, 0.01))  # of plain's memory, of the rate
NEAR = 0.15  # the share by which a time may be off
HEADER = (
    "budget, MiB",
    "link, MB/s",
    "on the host, MiB",
    "leaving, of plain's step: predicted",
    "bare step, s: predicted, measured",
    "hosted, s: predicted, measured",
    "hosted / bare: predicted, measured",
    "waiting, of the hosted step: predicted, measured",
    "full speed / bare",
    "hosted / without host memory: predicted, measured",
    "bits, bytes",
)
UNBOUND = 1e15  # bytes per second: no bound


@dataclass(eq=False)
class _Watched:
    passing: Passing
    link: WatchedLink
    due: float  # by the link's clock

    def wait(self) -> None:
        began = time.perf_counter()
        self.passing.wait()
        waited = time.perf_counter() - began
        if self.link.busy_rate is not None:
            waited = max(0.0, self.due - self.link.now())
        self.link.waited_seconds += waited


class WatchedLink(CpuLink):
    """That adds up how long the computing waits for it. `busy`: the rate holds in the time of the thread that computes,
    what it waited included."""

    def __init__(self, bytes_per_second: float | None = None, *, busy: bool = False) -> None:
        super().__init__(None if busy else bytes_per_second)
        self.busy_rate = bytes_per_second if busy else None
        self.waited_seconds = 0.0
        self._free_at = [0.0, 0.0]  # out, back

    def now(self) -> float:
        return time.thread_time() + self.waited_seconds

    def copy_out(self, tensor: Tensor, slab: Slab) -> Passing:
        return self._watched(super().copy_out(tensor, slab), tensor.nbytes, 0)

    def copy_back(self, slab: Slab, tensor: Tensor) -> Passing:
        return self._watched(super().copy_back(slab, tensor), tensor.nbytes, 1)

    def _watched(self, passing: Passing, nbytes: int, way: int) -> Passing:
        if self.busy_rate is not None:
            self._free_at[way] = max(self._free_at[way], self.now()) + nbytes / self.busy_rate
        return _Watched(passing, self, self._free_at[way])


class Took(NamedTuple):
    """Seconds of a step."""

    computing: float
    waiting: float
    on_clock: float


class Net:
    """A network that learns nothing, so that all its steps are alike."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.model = build(asked.arch, asked.block, width=asked.width)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9, fused=True)
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(asked.batch, 3, 32, 32), torch.randint(10, (asked.batch,))
        self.shape = StepShape(
            model=self.model,
            image_shape=(3, 32, 32),
            batch=asked.batch,
            micro_batch=asked.batch,
            precision="fp32",
            memory_format="contiguous",
        )

    def step(self, schedule: Schedule | None, link: WatchedLink | None = None) -> Took:
        """Of a training step; without a schedule of the untouched network."""
        model: nn.Module = self.model
        if schedule is not None:
            model = planned = apply_plan(self.model, schedule)
            planned.lowmem.link = link
        before = 0.0 if link is None else link.waited_seconds
        began, computed = time.perf_counter(), time.thread_time()
        self.optimizer.zero_grad(set_to_none=True)
        pass_of(model, self.images, self.labels)
        self.optimizer.step()
        on_clock, computed = time.perf_counter() - began, time.thread_time() - computed
        return Took(computed, 0.0 if link is None else link.waited_seconds - before, on_clock)

    def grads(self) -> list[Tensor]:
        return [one.grad.clone() for one in self.model.parameters() if one.grad is not None]

    def changes(self, schedule: Schedule) -> tuple[list[int], list[int]]:
        """Bytes that come to exist and go in forward and backward, in order: real ones, simulated ones."""
        self.optimizer.zero_grad(set_to_none=True)
        real = changes_of(apply_plan(self.model, schedule), self.images, self.labels, Recorder())
        with OutlineMode():
            recorder = Recorder()
            with recorder:
                outline = empty_copy(self.model).train()
                images = torch.empty(self.images.shape)
                labels = torch.zeros(self.labels.shape, dtype=torch.int64)
            return real, changes_of(apply_plan(outline, schedule), images, labels, recorder)


def pass_of(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    nn.functional.cross_entropy(model(images), labels).backward()


def changes_of(model: nn.Module, images: Tensor, labels: Tensor, recorder: Recorder) -> list[int]:
    with recorder:
        recorder.adopt((*model.parameters(), *model.buffers(), images, labels))
        begun = len(recorder.trace.events)
        pass_of(model, images, labels)
    return [event.change_bytes for event in recorder.trace.events[begun:]]


@dataclass(frozen=True)
class Planner:
    """Plans one network's step; `chain` in seconds of this machine."""

    chain: ChainCost
    steps: StepSimulator

    def plan(self, budget_bytes: int, rate: float | None) -> tuple[Solution, Simulated]:
        """`rate`: of the link, in bytes per second; None: without host memory."""
        terms = None if rate is None else HostTerms(LinkRates(rate, rate), 1 << 40)
        solver = Solver(self.chain) if terms is None else HostSolver(self.chain, terms)
        return fit(solver, self.steps, Budget(total_bytes=budget_bytes), RATES)

    def rate_for(self, budget_bytes: int, seconds: float) -> float:
        """At which what waits on the host, under the budget, takes about so long to leave."""
        most = self.plan(budget_bytes, UNBOUND)[0].host_bytes / seconds
        rates = [most * 2 ** (power / 4) for power in range(-6, 3)]
        off = {rate: abs(self.plan(budget_bytes, rate)[0].host_bytes / rate / seconds - 1) for rate in rates}
        # Of several that are near it, the one with the most to move.
        return max((rate for rate in rates if off[rate] < NEAR), default=min(rates, key=off.__getitem__))


def bare(schedule: Schedule) -> Schedule:
    return Schedule(tuple(replace(item, host=()) for item in schedule.items))


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(mine / its for mine, its in zip(one, other, strict=True))


def measure(net: Net, planner: Planner, budget_bytes: int, rate: float, rounds: int, busy: bool) -> dict[str, Any]:
    """One case."""
    assert planner.chain.plain_seconds is not None
    (hosted, simulated), (without, _) = planner.plan(budget_bytes, rate), planner.plan(budget_bytes, None)
    alone = evaluate(bare(hosted.schedule), planner.chain).seconds
    slow, fast = WatchedLink(rate, busy=busy), WatchedLink()
    ways = {
        "plain": (None, None),
        "without": (without.schedule, None),
        "bare": (bare(hosted.schedule), None),
        "full speed": (hosted.schedule, fast),
        "hosted": (hosted.schedule, slow),
    }
    net.step(None)
    expected, same = net.grads(), True
    for schedule, link in ways.values():
        net.step(schedule, link)
        same &= all(torch.equal(one, other) for one, other in zip(expected, net.grads(), strict=True))
    took: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (schedule, link) in ways.items():
            took[way].append(net.step(schedule, link))
    seconds = {
        way: [one.computing + one.waiting if busy else one.on_clock for one in each] for way, each in took.items()
    }
    real, expected_changes = net.changes(hosted.schedule)
    predicted = {
        "plain": planner.chain.plain_seconds + planner.chain.outside_seconds,
        "without": without.seconds,
        "bare": alone,
        "hosted": hosted.seconds,
    }
    return {
        "budget_bytes": budget_bytes,
        "peak_bytes": simulated.estimate.peak_allocated_bytes,
        "host_bytes": hosted.host_bytes,
        "bytes_per_second": rate,
        "predicted_seconds": predicted,
        "seconds": seconds,
        "seconds_on_clock": {way: [one.on_clock for one in each] for way, each in took.items()},
        "predicted_waiting_seconds": hosted.waiting_seconds,
        "waiting_seconds": {way: statistics.median(one.waiting for one in each) for way, each in took.items()},
        "to_bare": {way: ratio(seconds[way], seconds["bare"]) for way in ways},
        "hosted_to_without": ratio(seconds["hosted"], seconds["without"]),
        "gradients_are_plain": same,
        "changes": len(real),
        "changes_are_simulated": real == expected_changes,
    }


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """A case's texts, in the order of HEADER."""
    predicted, waited = found["predicted_seconds"], found["waiting_seconds"]["hosted"]
    median = {way: statistics.median(each) for way, each in found["seconds"].items()}
    exact = ("gradients_are_plain", "changes_are_simulated")
    return (
        f"{found['budget_bytes'] / MIB:.0f}",
        f"{found['bytes_per_second'] / 1e6:.0f}",
        f"{found['host_bytes'] / MIB:.0f}",
        f"{found['host_bytes'] / found['bytes_per_second'] / predicted['plain']:.2f}",
        f"{predicted['bare']:.3f}, {median['bare']:.3f}",
        f"{predicted['hosted']:.3f}, {median['hosted']:.3f}",
        f"{predicted['hosted'] / predicted['bare']:.3f}, {found['to_bare']['hosted']:.3f}",
        f"{found['predicted_waiting_seconds'] / predicted['hosted']:.3f}, {waited / median['hosted']:.3f}",
        f"{found['to_bare']['full speed']:.3f}",
        f"{predicted['hosted'] / predicted['without']:.3f}, {found['hosted_to_without']:.3f}",
        ", ".join("equal" if found[what] else "DIFFERENT" for what in exact),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="res56")
    parser.add_argument("--block", default="bottleneck")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="others use the machine: seconds of the computing thread")
    parser.add_argument("--times", type=Path, help="folder with seconds of the blocks from before, else measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    where, net = conditions(), Net(asked)
    measured = measure_costs(net.shape)
    calibrator = Calibrator("cpu", Calibration(cpu_identity(), asked.times), print)
    planner = Planner(price(measured, RATES, calibrator.times(net.shape, measured.stages)), StepSimulator(net.shape))
    plain_bytes = simulate_step(net.shape, None, RATES).estimate.peak_allocated_bytes
    assert planner.chain.plain_seconds is not None
    plain_seconds = planner.chain.plain_seconds + planner.chain.outside_seconds
    rate = planner.rate_for(int(plain_bytes * CASES[0][1]), plain_seconds / 3)
    rows, cases = [], {}
    for name, share, of_rate in CASES:
        cases[name] = measure(net, planner, int(plain_bytes * share), rate * of_rate, asked.rounds, asked.busy)
        rows.append((name, *row(cases[name])))
        print(" | ".join(rows[-1]), flush=True)
    size = f"{asked.arch} {asked.block}, width {asked.width}, batch {asked.batch}, fp32, one thread"
    introduction = (
        f"{size}; plain takes {plain_bytes / MIB:.0f} MiB, by prediction {plain_seconds:.2f} s; medians of "
        f"{asked.rounds} rounds, of ratios within a round. What the columns are: the head of `benchmarks/host_link.py`."
    )
    record = {
        **where,
        **{name: value for name, value in vars(asked).items() if name not in ("out", "times")},
        "plain_bytes": plain_bytes,
        "cases": cases,
    }
    text = f"# Host memory on the CPU's link\n\n{introduction}\n\n{table(('plan', *HEADER), rows)}\n{sentence(where)}\n"
    write(asked.out, "host_link", record, text)


if __name__ == "__main__":
    main()
