"""The engine against the library's checkpointing, on real tensors on the CPU, in one run.

Ways: plain autograd; `torch.utils.checkpoint` around every block (`lowmem.trial.blocks_of`); its selective form around
every block, which saves the outputs of convolutions only, where the network lets it (no tensor that is saved may be
changed in place); and the engine, without a limit of memory, and planned for the tensor peak that was measured of each
of these and for a third of plain's, or where nothing fits into that for the least that does. All do the same training
step (forward, cross-entropy, backward, SGD with momentum) on the same pictures. The network is one of the family, or
whatever `--model` names.

Every way has a process of its own for the whole run (`engine_worker.py`). After two steps it reports by how much its
resident memory has grown at its peak (VmHWM; counted from a small network's step, which loads the library's parts).
Then one step runs under a tracker of storages (a dispatch mode and finalizers) and the profiler's record of the
allocator, which sees buffers inside kernels too: the peak of tensors, and of the allocator. Then come the timed steps,
with no tracker: in each round every way does one step, in random order, so that whatever else the machine does hits
all alike; ratios are to plain's step of the same round. Only one process computes at a time.

Writes `results/engine_cpu.json` and `.md` beside this file, of another network `engine_cpu_NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conditions import RESULTS, conditions, sentence, table, write
from engine_worker import WARMUP, Task, way_of

from lowmem.choose.planning import Request, card_rates, choose
from lowmem.choose.request import REFERENCE_CARD, Budget, Choice
from lowmem.config.cards import load_card
from lowmem.config.schema import ModelConfig
from lowmem.config.sources import SOURCE_SIDE
from lowmem.core.errors import Infeasible
from lowmem.core.units import MIB
from lowmem.models import check_network, make_network
from lowmem.plan.cost import Rates
from lowmem.simulate import StepShape, simulate_step
from lowmem.trial import PER_BLOCK, PLAIN, SELECTIVE

NAME = "engine_cpu"
PLENTY_BYTES = 1 << 50
WORKER = Path(__file__).with_name("engine_worker.py")
HEADER = (
    "way",
    "budget, MiB",
    "peak of tensors, MiB",
    "simulated",
    "allocator's peak",
    "resident, grown by",
    "step, s (lowest to highest)",
    "times plain",
    "CPU time, times plain",
)
AGAINST = (
    "the library's way",
    "its peak, MiB",
    "the engine's",
    "time, engine / library (lowest to highest)",
    "CPU time, likewise",
    "target met",
)


@dataclass
class Cell:
    """A way, its process and what was measured of it. All bytes and seconds; a value a round."""

    name: str
    task: Task
    process: subprocess.Popen[str]
    budget_bytes: int | None = None
    simulated_bytes: int | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        peak = self.memory["peak_tensor_bytes"]
        assert peak is not None
        return peak

    def answer(self) -> dict[str, Any]:
        """The worker's next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the worker ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def timed_step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.rounds.append(self.answer())

    def values(self, key: str) -> list[float]:
        return [one[key] for one in self.rounds]

    def ratios(self, other: Cell, key: str = "seconds") -> list[float]:
        """To the other's step of the same round."""
        return [mine / theirs for mine, theirs in zip(self.values(key), other.values(key), strict=True)]


def start(name: str, task: Task, threads: int, budget_bytes: int | None = None) -> Cell:
    """A new process, until it has reported its memory."""
    command = [sys.executable, str(WORKER), json.dumps(asdict(task))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True)
    cell = Cell(name, task, process, budget_bytes)
    cell.memory = cell.answer()
    print(f"{name}: {cell.peak_bytes / MIB:,.0f} MiB of tensors", flush=True)
    return cell


def shape_of(task: Task) -> StepShape:
    return StepShape(
        model=make_network(task.model),
        image_shape=task.image_shape,
        batch=task.batch,
        micro_batch=task.batch,
        precision="fp32",
        memory_format=task.memory_format,
    )


def simulated_peak(task: Task, rates: Callable[[str], Rates]) -> int:
    """Of a way that is not the engine, on outlines."""
    way = partial(way_of, task=task)
    return simulate_step(shape_of(task), None, rates("fp32"), way=way).estimate.peak_tensor_bytes


def request_of(task: Task, rates: Callable[[str], Rates]) -> Request:
    """Of the engine, for any budget."""
    shape = shape_of(task)
    return Request(
        model=shape.model,
        image_shape=task.image_shape,
        batch=task.batch,
        budget=Budget(total_bytes=PLENTY_BYTES),
        rates=rates,
        modes={"fp32": task.memory_format},
        allow_accumulation=False,
    )


def planned(task: Task, budget_bytes: int, request: Request) -> tuple[Task, int]:
    """The engine's task for a budget of tensors, or where nothing fits into that for the least that does; and its
    simulated peak. A plan counts tensors as a card's allocator rounds them; here they count as they are, so that it may
    have what they are less."""

    def chosen(size: int) -> Choice:
        return choose(replace(request, budget=Budget(total_bytes=size)))

    try:
        choice = chosen(budget_bytes)
        taken = choice.simulated.estimate
        more = chosen(budget_bytes + taken.peak_allocated_bytes - taken.peak_tensor_bytes)
        if more.simulated.estimate.peak_tensor_bytes <= budget_bytes:
            choice = more
    except Infeasible as error:
        print(error, flush=True)
        choice = chosen(error.least_bytes)
    fields = {**asdict(task), "way": "engine", "schedule": choice.plan.schedule.to_json()}
    return Task(**fields), choice.simulated.estimate.peak_tensor_bytes


def library_cells(options: argparse.Namespace, rates: Callable[[str], Rates]) -> list[Cell]:
    """Plain autograd and the library's two, without what fails for the network."""
    cells = []
    for way in (PLAIN, SELECTIVE, PER_BLOCK):
        task = Task(
            way=way,
            network=options.network.given,
            image_size=options.image_size,
            batch=options.batch,
            memory_format=options.memory_format,
        )
        try:
            simulated_bytes = simulated_peak(task, rates)
        except RuntimeError as error:
            if way != SELECTIVE:
                raise
            print(f"{way}: left out, fails for this network ({str(error).splitlines()[0]})", flush=True)
            continue
        cell = start(way, task, options.threads)
        cell.simulated_bytes = simulated_bytes
        cells.append(cell)
    return cells


def engine_cells(options: argparse.Namespace, library: list[Cell], rates: Callable[[str], Rates]) -> list[Cell]:
    """The engine at the others' measured peaks, at a third of plain's or the least that fits, and without a limit."""
    budgets = [(f"engine, memory of {cell.name}", cell.peak_bytes) for cell in library]
    budgets += [("engine, a third of plain", library[0].peak_bytes // 3), ("engine, no limit", PLENTY_BYTES)]
    plain, cells = library[0].task, list[Cell]()
    request = request_of(plain, rates)
    for name, budget_bytes in budgets:
        task, simulated_bytes = planned(plain, budget_bytes, request)
        if simulated_bytes > budget_bytes:
            name = "engine, the least that fits"
        limited = simulated_bytes <= budget_bytes < PLENTY_BYTES
        cell = start(name, task, options.threads, budget_bytes if limited else None)
        cell.simulated_bytes = simulated_bytes
        cells.append(cell)
    return cells


def run_rounds(cells: list[Cell], rounds: int) -> None:
    """Every cell once a round, in an order of the round's own."""
    for number in range(rounds):
        for cell in random.Random(number).sample(cells, len(cells)):
            cell.timed_step()
        print(
            f"round {number + 1} of {rounds}: " + ", ".join(f"{c.rounds[-1]['seconds']:.2f}" for c in cells), flush=True
        )


def mib(size_bytes: int | None) -> str:
    return "–" if size_bytes is None else f"{size_bytes / MIB:,.0f}"


def spread(values: list[float], digits: int = 2) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def row(cell: Cell, plain: Cell) -> tuple[str, ...]:
    """The texts under HEADER."""
    return (
        cell.name,
        mib(cell.budget_bytes),
        mib(cell.peak_bytes),
        mib(cell.simulated_bytes),
        mib(cell.memory["peak_allocator_bytes"]),
        mib(cell.memory["resident_bytes"]),
        spread(cell.values("seconds")),
        spread(cell.ratios(plain), 3),
        f"{statistics.median(cell.ratios(plain, 'cpu_seconds')):.3f}",
    )


def against(library: Cell, engine: Cell) -> tuple[str, ...]:
    """The texts under AGAINST."""
    ratios, of_cpu = engine.ratios(library), engine.ratios(library, "cpu_seconds")
    met = statistics.median(ratios) < 1 and engine.peak_bytes <= library.peak_bytes
    sizes = mib(library.peak_bytes), mib(engine.peak_bytes)
    return library.name, *sizes, spread(ratios, 3), spread(of_cpu, 3), "yes" if met else "no"


def report(options: argparse.Namespace, library: list[Cell], engine: list[Cell], made: str) -> str:
    """The Markdown text."""
    cells, plain = [*library, *engine], library[0]
    same = all(cell.values("loss") == plain.values("loss") for cell in cells)
    size = f"{options.image_size}x{options.image_size}"
    intro = (
        f"# The engine against the library's checkpointing on the CPU\n\n{options.network.words}, batch "
        f"{options.batch} at {size}, fp32, {options.memory_format}, OMP_NUM_THREADS={options.threads}, median of "
        f"{options.rounds} rounds; plans by the rates of {load_card(options.card).name}. Losses of all timed steps "
        f"{'have the same bits' if same else 'DIFFER'}.\n\n{made}\n"
    )
    pairs = list(zip(library[1:], engine[1:], strict=False))
    return "\n".join(
        [
            intro,
            table(HEADER, [row(cell, plain) for cell in cells]),
            table(AGAINST, [against(one, other) for one, other in pairs]),
        ]
    )


def record_of(cell: Cell, plain: Cell) -> dict[str, object]:
    """A cell for the JSON file."""
    return {
        "name": cell.name,
        "budget_bytes": cell.budget_bytes,
        "simulated_peak_tensor_bytes": cell.simulated_bytes,
        **cell.memory,
        "seconds": [round(value, 4) for value in cell.values("seconds")],
        "cpu_seconds": [round(value, 4) for value in cell.values("cpu_seconds")],
        "times_plain": [round(value, 4) for value in cell.ratios(plain)],
        "losses": cell.values("loss"),
        "schedule": cell.task.schedule,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="res110")
    parser.add_argument("--block", default="bottleneck")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--model", help="another network, like torchvision:resnet50")
    parser.add_argument("--image-size", type=int, default=SOURCE_SIDE)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory-format", choices=("contiguous", "channels-last"), default="contiguous")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--card", default=REFERENCE_CARD, help="by whose rates the engine plans")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.network = ModelConfig(arch=options.arch, block=options.block, width=options.width, spec=options.model)
    check_network(options.network, 10, (3, options.image_size, options.image_size))
    return options


def main() -> None:
    options = parse()
    found = conditions()
    torch.set_num_threads(options.threads)
    rates = card_rates(load_card(options.card))
    library = library_cells(options, rates)
    engine = engine_cells(options, library, rates)
    cells = [*library, *engine]
    run_rounds(cells, options.rounds)
    for cell in cells:
        assert cell.process.stdin is not None
        cell.process.stdin.close()
        cell.process.wait()
    text = report(options, library, engine, sentence(found))
    print(text)
    asked = {key: value for key, value in vars(options).items() if key not in ("out", "network")}
    record = {**found, **asked, "warmup": WARMUP, "cells": [record_of(cell, library[0]) for cell in cells]}
    write(options.out, NAME if options.model is None else f"{NAME}_{options.network.name}", record, text)


if __name__ == "__main__":
    main()
