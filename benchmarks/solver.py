"""Seconds that the solver takes, for chains of equal stages whose options all trade bytes for time.

    python -m benchmarks.solver [--rounds 7]

Each chain is solved for one budget, from nothing: the table, the schedule, and the check of its peak. Writes
`results/solver.json` and `.md` beside this file and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.plan.cost import ChainCost
from lowmem.plan.policy import keep
from lowmem.plan.solver import Solver, useful_bytes
from tests.unit.plan.chains import tradeoffs

RESULTS = Path(__file__).resolve().parent / "results"
SLOTS = 5000
SIZES = ((39, 8, False), (39, 8, True), (56, 8, False), (56, 8, True))


def with_dropping(chain: ChainCost) -> ChainCost:
    """The last two options of each stage become ones that drop the output, with two ways of restoring it."""
    stages = []
    for stage in chain.stages:
        *others, first, second = stage.options
        small = others[0].kept_bytes // 2
        dropping = [
            dataclasses.replace(
                option,
                policy=keep(*names, drop_output=True),
                kept_bytes=small * size,
                restore_seconds=0.5 / size,
                restore_temp_bytes=stage.input_bytes * 2,
                restored_bytes=left,
            )
            for option, names, size, left in (
                (first, ("conv1",), 1, stage.input_bytes),
                (second, ("conv1", "conv3"), 2, 0),
            )
        ]
        stages.append(dataclasses.replace(stage, options=(*others, *dropping)))
    return dataclasses.replace(chain, stages=tuple(stages))


def measure(chain: ChainCost, rounds: int) -> dict[str, Any]:
    """Seconds on the clock and of this process, one pair a round; the first round is not counted."""
    useful = useful_bytes(chain)
    wall, cpu = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter(), time.process_time()
        solver = Solver(chain, slot_bytes=-(-useful // SLOTS))
        solver.solve(useful // 3)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"slots": solver.table.slots, "seconds": wall[1:], "cpu_seconds": cpu[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    conditions = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rounds": arguments.rounds,
        "load_average_1min": round(os.getloadavg()[0], 2),
    }
    rows = []
    for stages, options, dropping in SIZES:
        chain = tradeoffs(stages, options)
        measured = measure(with_dropping(chain) if dropping else chain, arguments.rounds)
        rows.append({"stages": stages, "options": options, "dropping": 2 * dropping, **measured})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "solver.json").write_text(json.dumps({**conditions, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(_table(conditions, rows)) + "\n"
    (RESULTS / "solver.md").write_text(table, encoding="utf-8")
    print(table)


def _table(conditions: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    head = ("stages", "options", "of them dropping", "slots", "seconds", "spread", "seconds of the process")
    lines = [
        "{cpu}, {cores} cores (one used), Python {python}, numpy {numpy}, median of {rounds} (lowest to "
        "highest); load average before {load_average_1min}: above about 1, others were using the cores, and "
        "the process's own time is the steadier one. `python -m benchmarks.solver`".format(**conditions),
        "",
        _row(*head),
        "|" + "---|" * len(head),
    ]
    for row in rows:
        wall, cpu = row["seconds"], row["cpu_seconds"]
        seconds = (f"{statistics.median(wall):.2f}", f"{min(wall):.2f} to {max(wall):.2f}")
        counts = (row["stages"], row["options"], row["dropping"], f"{row['slots']:,}")
        lines.append(_row(*counts, *seconds, f"{statistics.median(cpu):.2f}"))
    return lines


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
