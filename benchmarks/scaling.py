"""Several processes on this machine's processor (gloo over loopback): time, memory, and what communication takes.

    python -m benchmarks.scaling [--rounds 3] [--steps 6]

For each network one process, then 2 and 4 started by torchrun, train the same effective batch, in turn, `--rounds`
times: `lowmem` as a run does it (its step, with the sums begun during the backward pass, and the vote before the
update), and torch's own DistributedDataParallel on the untouched model, for comparison. One thread a process. Reported
are medians over the rounds of the slowest process's median step.

`waited`: the share of a step in which a process does nothing but wait for sums and for the vote, after its own backward
pass. On one machine processes also take memory bandwidth and cores from each other, which is no communication: four
on two cores cannot be faster than two. Bytes: the tensors of a step at its peak, counted, against the simulator's.

Writes results/scaling.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.conditions import RESULTS, conditions, sentence, table, write

NETWORKS = {
    "res20 basic, width 32": {"arch": "res20", "block": "basic", "width": 32, "batch": 64},
    "res56 bottleneck, width 16": {"arch": "res56", "block": "bottleneck", "width": 16, "batch": 64},
}
PROCESSES = (1, 2, 4)
WAYS = ("lowmem", "lowmem --sync-bn", "DistributedDataParallel")
MIB = 1 << 20


def measure(network: dict[str, Any], way: str, processes: int, steps: int, folder: Path) -> dict[str, Any]:
    """One torchrun; the figures of every process."""
    out = folder / "figures.json"
    job = json.dumps({**network, "way": way, "steps": steps, "out": str(out)})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "benchmarks.scaling_worker", job], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{way} on {processes} processes: {done.stderr[-2000:]}")
    figures: list[dict[str, Any]] = json.loads(out.read_text())
    slowest = max(figures, key=lambda one: one["step_seconds"])
    return {**slowest, "processes_bytes": [one["peak_bytes"] for one in figures]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    before = conditions()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name, network in NETWORKS.items():
                for way in WAYS:
                    for processes in PROCESSES:
                        if processes == 1 and way != "lowmem":
                            continue
                        print(f"round {number + 1}: {name}, {way}, {processes}", flush=True)
                        figures = measure(network, way, processes, arguments.steps, Path(folder))
                        found.setdefault((name, way, processes), []).append(figures)
    rows = [_row(key, rounds, found) for key, rounds in found.items()]
    record = {"conditions": before, "rows": rows}
    text = ["# Several processes on one machine's processor", "", sentence(before), "", *_said()]
    for name in NETWORKS:
        text += ["", f"{name}, effective batch {NETWORKS[name]['batch']}:", ""]
        text.append(table(_HEADER, [_cells(row) for row in rows if row["network"] == name]))
    write(RESULTS, "scaling", record, "\n".join(text))
    print(f"written: {RESULTS / 'scaling.md'}")


def _row(key: tuple[str, str, int], rounds: list[dict[str, Any]], found: dict[Any, Any]) -> dict[str, Any]:
    name, way, processes = key
    library = way == "DistributedDataParallel" or processes == 1
    seconds = statistics.median(one["step_seconds"] for one in rounds)
    alone = statistics.median(one["step_seconds"] for one in found[name, "lowmem", 1])
    return {
        "network": name,
        "way": way,
        "processes": processes,
        "step_seconds": seconds,
        "all_rounds_seconds": [one["step_seconds"] for one in rounds],
        "times_one_process": alone / seconds,
        "waited_share": None if library else statistics.median(one["waited_share"] for one in rounds),
        "predicted_peak_bytes": rounds[0]["predicted_peak_bytes"],
        "measured_peak_bytes": max(max(one["processes_bytes"]) for one in rounds),
    }


_HEADER = ("way", "processes", "step, ms", "times one process", "waited", "predicted MiB each", "measured MiB each")


def _cells(row: dict[str, Any]) -> list[str]:
    predicted = row["predicted_peak_bytes"]
    waited = row["waited_share"]
    return [
        row["way"],
        str(row["processes"]),
        f"{1000 * row['step_seconds']:,.0f}",
        f"{row['times_one_process']:.2f}",
        "" if waited is None else f"{waited:.0%}",
        "" if predicted is None else f"{predicted / MIB:.2f}",
        f"{row['measured_peak_bytes'] / MIB:.2f}",
    ]


def _said() -> list[str]:
    return [
        "The same effective batch on one, two and four processes, one thread each, gloo over loopback; medians. Four",
        "processes share two cores. `waited`: of a step, what a process waits for sums and for the vote after its own",
        "backward pass. MiB: tensors of a step at its peak, of every process, simulated and counted.",
    ]


if __name__ == "__main__":
    main()
