"""Seconds that training is held up by saving: written in the foreground, as it was, and in the background.

    python benchmarks/saving_cost.py [--arch res56] [--block bottleneck] [--batch 16] [--steps 4] [--rounds 5]
                                     [--folder .]

One process on the CPU, one thread, pictures of noise. A round is a number of plain steps, then a save of each kind
(two exported weights and a checkpoint, as at the end of an epoch where the best was found) followed by the same
number of steps; the kinds take turns, so that a busy machine slows all of them. Written down are the seconds blocked
in each save, and how much slower the steps are while the other thread writes. Writes `results/saving_cost.json` and
`.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from conditions import RESULTS, conditions, sentence

from lowmem.models import build
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.saver import Save, Saver
from lowmem.runs.store import RunFolder
from lowmem.runs.weights import WeightsInfo
from lowmem.step.train_step import Execution, TrainStep
from lowmem.train.replica import capture

INFO = WeightsInfo(arch="benchmark")


class Net:
    """A model that trains on noise, and its state as a run captures it."""

    def __init__(self, arch: str, block: str, batch: int) -> None:
        torch.manual_seed(0)
        self.model = build(arch, block)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, fused=True)
        self.images, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        scaler, execution = torch.amp.GradScaler("cpu", enabled=False), Execution("cpu", "fp32", "contiguous")
        self.step = TrainStep(self.model, self.optimizer, scaler, execution, None)
        self.state = RunState()

    def steps(self, count: int) -> float:
        """Seconds of one step, the mean of `count`."""
        began = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
            self.state.step += 1
        return (time.perf_counter() - began) / count

    def save(self) -> Save:
        taken = capture(self.state, self.model, self.step, {})
        return Save(taken, 1, dict.fromkeys(("best", "last"), (taken.model, INFO)))


def foreground(net: Net, folder: RunFolder) -> None:
    save = net.save()
    for name, (tensors, info) in save.weights.items():
        folder.save_weights(name, tensors, info)
    checkpoints.save(folder.checkpoints, save.checkpoint, keep=2)


def measure(net: Net, folder: RunFolder, steps: int, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {
        name: [] for name in ("plain_step", "foreground_blocked", "background_blocked", "background_step", "written")
    }
    with Saver(folder, keep=2) as saver:
        for _ in range(rounds):
            found["plain_step"].append(net.steps(steps))
            began = time.perf_counter()
            foreground(net, folder)
            found["foreground_blocked"].append(time.perf_counter() - began)
            found["plain_step"].append(net.steps(steps))
            began = time.perf_counter()
            saver.wait()
            saver.submit(net.save())
            found["background_blocked"].append(time.perf_counter() - began)
            found["background_step"].append(net.steps(steps))
            saver.finish()
            found["written"].append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="res56")
    parser.add_argument("--block", default="bottleneck")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the run folder is made, and removed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    where, net = conditions(), Net(asked.arch, asked.block, asked.batch)
    net.steps(2)
    place = Path(tempfile.mkdtemp(prefix="saving-cost-", dir=asked.folder))
    try:
        with RunFolder.create(place / "run", "", {}) as folder:
            found = measure(net, folder, asked.steps, asked.rounds)
            newest = checkpoints.checkpoint_folders(folder.checkpoints)[0]
            checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())
    finally:
        shutil.rmtree(place, ignore_errors=True)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratio = medians["background_blocked"] / medians["foreground_blocked"]
    slower = medians["background_step"] / medians["plain_step"]
    lines = [
        "# What a save costs training",
        "",
        f"{asked.arch} {asked.block}, batch {asked.batch}, fp32, one thread; a checkpoint of "
        f"{checkpoint_bytes / 2**20:.0f} MiB and two exported weights; median of {asked.rounds} rounds, spread in "
        "brackets.",
        "",
        "| | seconds |",
        "|---|---|",
        *(
            f"| {name.replace('_', ', ')} | {medians[name]:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) |"
            for name, seconds in found.items()
        ),
        "",
        f"Blocked in the background against the foreground: {ratio:.3f}. A step while the other thread writes against "
        f"a plain step: {slower:.3f}.",
        "",
        sentence(where),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "saving_cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {**where, **vars(asked), "folder": str(asked.folder), "checkpoint_bytes": checkpoint_bytes}
    record |= {"seconds": found, "blocked_ratio": ratio, "step_ratio": slower}
    (RESULTS / "saving_cost.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
