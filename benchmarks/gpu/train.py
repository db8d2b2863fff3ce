"""The homework report's networks on real pictures, one a call, so that several short turns add up to all.

What comes back of a turn is `train-NETWORK.json` and the run folder as `train-NETWORK.tar.gz`. With its checkpoints the
run can go on anywhere; but those of a network of width 64 have 200 to 1,100 MB, which a machine that can be had for
minutes does not give back. So the number of epochs is chosen such that one call finishes the network, with the recipe's
schedule scaled to them, and of weights only their SHA-256 sums come back, in no precision. The record says what was
left out, and whether the run can go on from what there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.reading import read_json
from lowmem.reproduce.job import ALL, Member, select
from lowmem.runs.atomic import write_text_atomic
from lowmem.runs.view import RunView
from lowmem.trial import Trial, run_trial

BATCH = 128
_SHARE = 0.85  # of the time that is planned with: an epoch's length varies
# Beside its steps an epoch evaluates a fifth as many pictures, augments, saves and records.
_EPOCH_OVER_STEPS = 1.25
_START_SECONDS = 45.0  # of a run: imports, decoding, planning, trying every output
_SAVING_SECONDS = 20.0
LARGEST_BYTES = 16 << 20  # of a file that comes back
_HEAVY = ("checkpoints", "weights")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One call. `pictures`: an archive of `train/<class>/*` and `test/<class>/*`, or a folder of them. `network`: a
    name of the homework report, or `next`: the first that `out` has not finished. `epochs` None: as many as
    `minutes` allow."""

    network: str
    pictures: Path
    out: Path
    minutes: float
    device: str = "cuda"
    width: int = 64
    epochs: int | None = None


def take(turn: Turn) -> dict[str, Any] | None:
    """Trains, or goes on with what `out` has of it. The record; None if there is nothing left to do. Raises UsageError
    for a network that there is not, PreflightError if not even an epoch fits, or the run does not begin."""
    ends = time.monotonic() + 60 * turn.minutes
    member = _member(turn)
    if member is None or _finished(turn.out, member):
        return None
    turn.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-train-") as place, _interruptible():
        run, data = Path(place) / member.name, _pictures(turn.pictures, Path(place) / "pictures")
        if _unpacked(turn.out / f"train-{member.name}.tar.gz", run):
            command = ["resume", str(run), "--data", f"folder:{data}", "--set", f"data.cache={place}/decoded"]
        else:
            epochs = turn.epochs or _epochs(turn, member, data, ends)
            command = _command(turn, member, data, epochs, run)
        code = _run(command, ends - _SAVING_SECONDS - time.monotonic(), turn.out / f"train-{member.name}.txt")
        if not (run / "metrics.csv").exists():
            raise PreflightError(f"the run did not begin (code {code}): see {turn.out / f'train-{member.name}.txt'}")
        record = _record(turn, member, run, code)
        record["left_out"] = _pack(run, turn.out / f"train-{member.name}.tar.gz")
        record["can_go_on"] = not record["finished"] and not record["left_out"]
        # Before the pictures are removed, which takes a while.
        write_text_atomic(_record_file(turn.out, member), json.dumps(record, indent=1) + "\n")
    return record


def _member(turn: Turn) -> Member | None:
    if turn.network != "next":
        return select(turn.network, None)[0]
    return next((one for one in ALL if not _finished(turn.out, one)), None)


def _record_file(out: Path, member: Member) -> Path:
    return out / f"train-{member.name}.json"


def _finished(out: Path, member: Member) -> bool:
    path = _record_file(out, member)
    return path.exists() and bool(read_json(path).get("finished"))


def _pictures(source: Path, place: Path) -> Path:
    """The folder that has `train` and `test`. Raises UsageError if there is none."""
    folder = source
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(place, filter="data")
        folder = place
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise UsageError(f"{source} has no train and test folders of pictures")
    return folder


def _unpacked(archive: Path, run: Path) -> bool:
    """Whether a run with a checkpoint came out of the archive of an earlier turn."""
    if not archive.exists():
        return False
    with tarfile.open(archive) as packed:
        if not any("/checkpoints/" in name for name in packed.getnames()):
            return False
        packed.extractall(run.parent, filter="data")
    return True


def _epochs(turn: Turn, member: Member, data: Path, ends: float) -> int:
    """As many as fit, by some real steps. Raises PreflightError for less than one."""
    pictures = sum(1 for path in (data / "train").rglob("*") if path.is_file())
    trial = Trial(
        arch=member.arch,
        block=member.block,
        width=turn.width,
        batch=BATCH,
        precision="amp",
        memory_format="channels-last",
        device=turn.device,
        pictures=pictures,
        steps=20 if turn.device == "cuda" else 3,
        warmup=5 if turn.device == "cuda" else 1,
    )
    found = run_trial(trial)
    if found.step_seconds is None:
        raise PreflightError(f"a trial of {member.name} failed: {found.refused}")
    epoch = found.step_seconds * -(-pictures // BATCH) * _EPOCH_OVER_STEPS
    left = _SHARE * (ends - time.monotonic() - _START_SECONDS - _SAVING_SECONDS)
    epochs = int(left / epoch)
    print(f"{member.name}: {1000 * found.step_seconds:.1f} ms a step, {epochs} epochs of {epoch:.1f} s", flush=True)
    if epochs < 1:
        raise PreflightError(
            f"an epoch of {member.name} takes {epoch:.0f} s, {max(0.0, left):.0f} s are left for it: give more "
            "--minutes, or --epochs to train in several turns where the run folder is small enough"
        )
    return epochs


def _command(turn: Turn, member: Member, data: Path, epochs: int, run: Path) -> list[str]:
    sets = ["memory.calibrate=never", "memory.confirm=never", f"data.cache={run.parent / 'decoded'}"]
    flags = {
        "arch": member.arch,
        "block": member.block,
        "width": turn.width,
        "data": f"folder:{data}",
        "epochs": epochs,
        "batch": BATCH,
        "precision": "amp",
        "memory-format": "channels-last",
        "device": turn.device,
        "out": run,
    }
    return ["train", *(part for key, value in flags.items() for part in (f"--{key}", str(value)))] + [
        part for one in sets for part in ("--set", one)
    ]


def _run(arguments: list[str], seconds: float, said: Path) -> int:
    """Its exit code; asked to save and leave when the time is over, or when this process is."""
    with open(said, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowmem", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(1.0, seconds))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.send_signal(signal.SIGINT)
            try:
                return process.wait(_SAVING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, as a limit of time from outside sends it, is a Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _record(turn: Turn, member: Member, run: Path, code: int) -> dict[str, Any]:
    """The run's own figures; errors in %."""
    view = RunView(run)
    config, rows = view.config, view.epochs
    errors = [row.test_error_pct for row in rows if row.test_error_pct is not None]
    epochs = config.train.epochs
    return {
        "network": member.name,
        "arch": member.arch,
        "block": member.block,
        "width": turn.width,
        "batch": BATCH,
        "device": turn.device,
        "environment": read_json(run / "env.json"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "epochs": epochs,
        "epochs_done": len(rows),
        "finished": code == 0 and len(rows) == epochs,
        "exit_code": code,
        "test_error_pct": errors[-1] if errors else None,
        "least_test_error_pct": min(errors, default=None),
        "train_loss": rows[-1].train_loss if rows else None,
        "train_seconds": rows[-1].elapsed_seconds if rows else None,
        "images_per_second": rows[-1].images_per_second if rows else None,
        "peak_allocated_bytes": rows[-1].peak_allocated_bytes if rows else None,
        "weights_sha256": {path.name: _sha256(path) for path in sorted((run / "weights").glob("*.safetensors"))},
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(run: Path, archive: Path) -> list[str]:
    """The run folder in one file; what was left out of it for its size."""
    heavy = sum(path.stat().st_size for name in _HEAVY for path in (run / name).rglob("*") if path.is_file())
    left_out = list(_HEAVY) if heavy > LARGEST_BYTES else []
    aside = archive.with_name(archive.name + ".partial")
    with tarfile.open(aside, "w:gz") as packed:
        for path in sorted(run.iterdir()):
            if path.name not in left_out:
                packed.add(path, arcname=f"{run.name}/{path.name}")
    os.replace(aside, archive)
    return left_out
