"""Run folders as a trainer leaves them, with made-up but plausible curves."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from lowmem.config.schema import Config, nest
from lowmem.report.naming import NamedRun, name_runs
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE
from lowmem.runs.view import read_run

# arch -> final training loss, final test error, first test error
PLAUSIBLE = {
    "res20": (0.0042, 8.1, 55.0),
    "res56": (0.0021, 7.8, 58.0),
    "res110": (0.0016, 7.5, 66.0),
    "cnn20": (0.0075, 9.0, 60.0),
    "cnn56": (0.98, 39.0, 88.0),
    "cnn110": (2.3028, 89.66, 90.0),
}
MakeRun = Callable[..., Path]


def named(*folders: Path) -> list[NamedRun]:
    """The runs as a report reads and calls them, in this order."""
    return name_runs([read_run(folder) for folder in folders])


def write_run(
    folder: Path,
    arch: str = "res20",
    *,
    done: int = 5,
    epochs: int = 5,
    chosen_on: str = "test",
    **settings: Any,
) -> Path:
    """A run of `arch`, `done` of `epochs` epochs old. `settings`: dotted names with `__` for the dot."""
    folder.mkdir(parents=True)
    flat = {"model.arch": arch, "train.epochs": epochs} | {key.replace("__", "."): v for key, v in settings.items()}
    config = Config.model_validate(nest(flat))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    versions = {
        "lowmem": "0.1.0",
        "torch": "2.7.1",
        "device": "NVIDIA GeForce GTX 1060 6GB",
        "platform": "Linux",
    }
    (folder / "env.json").write_text(json.dumps(versions), encoding="utf-8")
    _write_curves(folder, arch, config.seed, done, epochs)
    kinds = ["start"] + ["checkpoint"] * done + (["done"] if done == epochs else [])
    lines = [json.dumps({"time": f"2026-11-01T10:{n:02d}:00", "event": kind}) for n, kind in enumerate(kinds)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if done:
        (folder / "weights").mkdir()
        metadata = {"epoch": str(done), "step": str(391 * done), "error_pct": "7.95", "chosen_on": chosen_on}
        save_file({"linear.bias": np.zeros(10, np.float32)}, folder / "weights" / "best.safetensors", metadata)
    return folder


def _write_curves(folder: Path, arch: str, seed: int, done: int, epochs: int) -> None:
    final_loss, final_error, first_error = PLAUSIBLE.get(arch, PLAUSIBLE["res20"])
    rng = random.Random(f"{arch}-{seed}")
    metrics, steps = [EPOCH_TABLE.header], [STEP_TABLE.header]
    for epoch in range(1, done + 1):
        share = epoch / epochs
        phase = 0.75 * min(1.0, 9 * share) ** 0.5 * 0.6 + 0.3 * (share > 0.5) + 0.25 * (share > 0.74)
        loss = math.exp(math.log(2.2) + (math.log(final_loss) - math.log(2.2)) * min(1, phase)) * rng.uniform(
            0.96, 1.04
        )
        falling = max(0.0, 1 - phase)
        error = final_error + (first_error - final_error) * falling**1.5 * rng.uniform(0.6, 1.4)
        error = min(error, 90.5) if epoch < epochs else final_error
        lr = 0.1 * 0.1 ** ((share > 0.5) + (share > 0.74))
        row: dict[str, object] = dict.fromkeys(EPOCH_TABLE.names, "")
        row |= {
            "epoch": epoch,
            "step": 391 * epoch,
            "lr": lr,
            "train_loss": loss,
            "train_error_pct": loss * 30,
        }
        row |= {"test_loss": loss + 0.3, "test_error_pct": error, "images_per_second": rng.uniform(560, 580)}
        row |= {"peak_allocated_bytes": 1_795_162_112, "elapsed_seconds": 88.0 * epoch}
        metrics.append(",".join(str(value) for value in row.values()))
        for step in range(391 * (epoch - 1) + 20, 391 * epoch, 20):
            steps.append(f"{step},{epoch},{lr},{loss * rng.lognormvariate(0, 0.35)}")
    (folder / "metrics.csv").write_text("\n".join(metrics) + "\n", encoding="utf-8")
    (folder / "steps.csv").write_text("\n".join(steps) + "\n", encoding="utf-8")
