"""Other people's batch finders and checkpointing beside `lowmem --batch auto`, on the same network and budget.

    pip install -r benchmarks/peers/requirements.txt
    python -m benchmarks.peers.run [--quick] [--only lightning-power,lowmem-auto] [--out benchmarks/results]
    python -m benchmarks.peers.run --device cuda --arch res110 --width 64 --budget 6G --pictures 16384

Each row is one way (`ways.py`): it searches a batch, as its documentation has it; then, in clean processes and under
the same budget, it trains a few steps with that batch and evaluates, once with the same number of pictures at a time
and once with `--eval-batch`; at last bare training steps of all are timed, in turns. The network is lowmem's own, a
plain module (timm: its own, checked to be the same function). Without a GPU the budget is one of tensors, counted and
refused in the words of the CPU's allocator, which all of these know (`budget.py` says what is counted); on CUDA it is
an emulated card, the allocator capped. Whether the budget holds is checked first.

Seconds are those of the search alone, without loading libraries; on the CPU a search that runs steps is slowed down by
the count of tensors, by a Python call for each operation.

What is not installed is a row that says so. Results are saved after every cell, and a rerun with the same options goes
on where it stopped (`--fresh`: begins again). Writes `peers.json` and `peers.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conditions import RESULTS, conditions, write
from benchmarks.peers.table import markdown
from benchmarks.peers.task import Task
from benchmarks.peers.ways import INSTALL, ROWS
from lowmem.config.networks import resolve_block
from lowmem.core.units import parse_size
from lowmem.isolate import run

NAME = "peers"
QUICK = {"arch": "res20", "budget": "100M", "eval_batch": 512, "rounds": 2}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="res56")
    parser.add_argument("--block", help="default: bottleneck where the family has it")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--budget", default="400M", help="of tensors on the CPU, of the emulated card on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pictures", type=int, default=4096, help="in the training set: no search goes beyond it")
    parser.add_argument("--eval-batch", type=int, default=512, help="pictures at a time in the second evaluation")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a cell")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--quick", action="store_true", help="Res20 in 100 MiB: less than the defaults of all these")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    first = parser.parse_known_args(arguments)[0]
    if first.quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(ROWS):
        parser.error(f"--only knows no {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    if options.block is None:
        options.block = "bottleneck" if options.arch == "res56" else resolve_block(options.arch, None)
    return options


def task_of(options: argparse.Namespace) -> Task:
    return Task(
        arch=options.arch,
        block=options.block,
        width=options.width,
        device=options.device,
        budget_bytes=parse_size(options.budget),
        pictures=options.pictures,
        eval_pictures=max(512, options.eval_batch),
    )


class Table:
    """The record on disk, and what is still to be asked."""

    def __init__(self, options: argparse.Namespace, task: Task) -> None:
        self._options, self._task = options, task
        asked = {"task": asdict(task), **{key: getattr(options, key) for key in ("eval_batch", "rounds", "threads")}}
        found = conditions()
        self.record: dict[str, Any] = {"conditions": found, "asked": asked, "cells": {}}
        before = self._read()
        if before.get("asked") == json.loads(json.dumps(asked)) and not options.fresh:
            self.record = {**before, "asked": asked}
        self._now = found

    def _read(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads((self._options.out / f"{NAME}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known

    def cell(self, name: str, action: str, version: str | None, **question: Any) -> dict[str, Any]:
        """The answer, asked in a process of its own unless it is known of the same version."""
        known: dict[str, Any] | None = self.record["cells"].get(name)
        if known is not None and known["version"] == version and "failed" not in known:
            return known
        if self._now != self.record["conditions"] and self._now not in self.record.setdefault("resumed", []):
            self.record["resumed"].append(self._now)
        full = {"action": action, "task": asdict(self._task), "threads": self._options.threads, **question}
        began = time.monotonic()
        answer = run("benchmarks.peers.cell:answer", full, timeout_seconds=self._options.timeout).answer_or_refusal
        cell = {"version": version, **(answer if isinstance(answer, dict) else {"failed": answer})}
        cell["wall_seconds"] = round(time.monotonic() - began, 1)
        self.keep(name, cell)
        print(f"{name}: {cell['wall_seconds']} s", file=sys.stderr, flush=True)
        return cell

    def keep(self, name: str, cell: dict[str, Any]) -> None:
        self.record["cells"][name] = cell
        self.write()

    def write(self) -> None:
        write(self._options.out, NAME, self.record, markdown(self.record))


def fill(table: Table, options: argparse.Namespace) -> None:
    check = table.cell("check", "check", None)
    if not check.get("holds"):
        sys.exit(f"the budget does not hold, so nothing is compared: {check}")
    founds = {}
    for name in options.only.split(","):
        row = ROWS[name]
        if row.version is None:
            table.keep(f"{name}/find", {"version": None, "missing": INSTALL})
            continue
        found = table.cell(f"{name}/find", "find", row.version, row=name)
        if "batch" not in found:
            continue
        known = {key: value for key, value in found.items() if key not in ("version", "wall_seconds")}
        founds[name] = known
        question = {"row": name, "found": known}
        table.cell(f"{name}/train", "train", row.version, **question, eval_batch=found["batch"])
        table.cell(f"{name}/evaluate", "train", row.version, **question, eval_batch=options.eval_batch)
    # Timed together, so again if there is another one or another batch.
    batches = ", ".join(f"{name} {ROWS[name].version} {found['batch']}" for name, found in founds.items())
    if founds:
        table.cell("speed", "speed", batches, founds=founds, rounds=options.rounds)


def main() -> None:
    options = parse()
    table = Table(options, task_of(options))
    fill(table, options)
    table.write()
    print(markdown(table.record))


if __name__ == "__main__":
    main()
