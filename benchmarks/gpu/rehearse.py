"""From beginning to end on the CPU, with small networks: everything but the card's own figures.

What only a card can do says so in its account (`skipped`), and nothing of a rehearsal is ever collected as a card's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.conditions import conditions
from benchmarks.gpu.account import read_accounts, shortcomings
from benchmarks.gpu.collect import collect
from benchmarks.gpu.job import PARTS
from benchmarks.gpu.plans import QUICK, WHOLE
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.run import conduct
from benchmarks.gpu.train import Turn, take
from lowmem.core.errors import UsageError
from lowmem.core.reading import read_json
from lowmem.runs.atomic import write_text_atomic

_MINUTES = 30.0  # no limit to speak of: each part has its own
_EPOCHS = 10  # many enough to be ended in the middle
_CLASSES, _EACH = ("circle", "square"), {"train": 160, "test": 40}


def rehearse(out: Path, quick: bool) -> list[str]:
    """What did not go as it should, a sentence each; `summary.json` in `out`. Raises UsageError unless that is empty or
    new: what an earlier rehearsal did would not be done again."""
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: rehearse in a new folder")
    out.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(out.resolve() / "cache")  # nothing of this is to be found by a real run
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before, seconds = conditions(), dict[str, float]()

    def timed(name: str, do: Callable[[], Any]) -> Any:
        began = time.monotonic()
        found = do()
        seconds[name] = round(time.monotonic() - began, 1)
        return found

    timed("prepare", lambda: prepare(out / "prepared", QUICK if quick else WHOLE))
    timed("run", lambda: conduct(out / "prepared", out / "results", PARTS, _MINUTES))
    accounts = read_accounts(out / "results", tuple(part.name for part in PARTS))
    wrong = [line for account in accounts.values() for line in shortcomings(account)]
    wrong += [f"{part.name}: did not run" for part in PARTS if part.name not in accounts]
    wrong += _refusal(out)
    turns = timed("train", lambda: _turns(out, wrong))
    summary = {
        "rehearsal": "CPU, small networks: no figure of it is a card's",
        "conditions": before,
        "seconds": seconds,
        "parts": {name: _summary(account) for name, account in accounts.items()},
        "train": turns,
        "wrong": wrong,
    }
    write_text_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return wrong


def _summary(account: dict[str, Any]) -> dict[str, Any]:
    kept = [row["met"] for row in account["rows"] if row["met"] is not None]
    return {
        "outcome": account["outcome"],
        "skipped": account["skipped"],
        "seconds": account["seconds"],
        "rows": len(account["rows"]),
        "promises": len(kept),
        "kept": sum(kept),
    }


def _refusal(out: Path) -> list[str]:
    """Collecting this must fail."""
    try:
        collect([out / "results"], out / "collected")
    except UsageError as error:
        print(f"collect, as it should: {error}", flush=True)
        return []
    return ["collect: took a rehearsal for a card's result"]


def _turns(out: Path, wrong: list[str]) -> list[dict[str, Any]]:
    """A network in two turns: the first is ended from outside, as a machine's limit of time does it, the second goes on
    in another place from what came back, and a third has nothing to do."""
    trained, network = out / "trained", "res20"
    turn: dict[str, Any] = {
        "network": network,
        "pictures": make_archive(out / "pictures.tar.xz"),
        "out": trained,
        "device": "cpu",
    }
    turn |= {"minutes": 10.0, "width": 4, "epochs": _EPOCHS}
    options = (f"--{name}={value}" for name, value in turn.items())
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "train", *options])
    while process.poll() is None and not _begun(trained / f"train-{network}.txt"):
        time.sleep(0.1)
    process.terminate()
    process.wait()
    first = read_json(trained / f"train-{network}.json") if (trained / f"train-{network}.json").exists() else None
    if first is None or not first["can_go_on"]:
        wrong.append("train: the first turn left nothing to go on from")
    second = take(Turn(**turn))
    if second is None or not second["finished"]:
        wrong.append("train: the second turn did not finish the network")
    if take(Turn(**turn)) is not None:
        wrong.append("train: a finished network was trained again")
    return [one for one in (first, second) if one is not None]


def _begun(said: Path) -> bool:
    """Whether the run has told of its first epoch."""
    return said.exists() and "epoch 1" in said.read_text(encoding="utf-8", errors="replace")


def make_archive(path: Path) -> Path:
    """A few pictures of two classes, as the real ones come: a compressed archive of JPEG files."""
    generator, place = np.random.default_rng(0), path.parent / "pictures"
    for part, count in _EACH.items():
        for number, name in enumerate(_CLASSES):
            folder = place / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for one in range(count):
                noise = generator.integers(0, 128, (32, 32, 3)) + 100 * number
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{one:04}.jpg")
    with tarfile.open(path, "w:xz") as archive:
        archive.add(place / "train", arcname="train")
        archive.add(place / "test", arcname="test")
    return path
