"""Looks through a run folder for what a resume relies on, and changes nothing.

Checkpoints and plan are checked against what the run is by its config.yaml. Knows nothing of networks: what belongs to
a run is told by the caller (`Belonging`).

Known limitation: rows and weights carry no checksum of their own. A digit that became another digit in a row is not
noticed; exported weights are compared bit for bit where the checkpoint of the same step is still there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, read_json, read_limited, shorten
from lowmem.core.units import format_size
from lowmem.runs.checkpoint import Checkpoint, load, named
from lowmem.runs.checkpoint_state import read_header
from lowmem.runs.lock import OWNER_NAME, read_owner
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, Columns, parse_event
from lowmem.runs.tables import scan_table


class Status(StrEnum):
    OK = "ok"
    NOTE = "note"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Finding:
    """`where`: the file or folder, as it is called inside the run folder."""

    status: Status
    where: str
    what: str


@dataclass(frozen=True)
class Verified:
    """`resumes_from`: the checkpoint that a resume would take, at `step` of which `step_in_epoch` are of the epoch
    after `epoch`; None if it would take none. `obstacle`: why it could not go on all the same."""

    run: Path
    findings: tuple[Finding, ...]
    resumes_from: str | None = None
    epoch: int | None = None
    step: int | None = None
    step_in_epoch: int | None = None
    obstacle: str | None = None
    finished: bool = False

    @property
    def can_resume(self) -> bool:
        return self.resumes_from is not None and self.obstacle is None


@dataclass(frozen=True)
class Belonging:
    """What is the run's own. Each raises CorruptCheckpoint for what is not. `tensors`: of shapes by name, and what to
    call them; `plan`: the run's plan in words, None if it needs none. `most_bytes`: of a file of tensors. `epochs`: of
    the whole run. `layers`: those of gradients.csv."""

    checkpoint: Callable[[Checkpoint], None]
    tensors: Callable[[Mapping[str, tuple[int, ...]], str], None]
    plan: Callable[[], str | None]
    most_bytes: int
    epochs: int
    layers: tuple[str, ...]


def verify_run(run: Path, belonging: Belonging) -> Verified:
    """Everything that is found. What damages a resume is in the result, not raised."""
    findings = [Finding(Status.OK, "config.yaml", "every setting is known and valid")]
    findings.append(_lock(run))
    good, newest = _checkpoints(run / "checkpoints", belonging, findings)
    obstacles = [_plan(belonging, findings)]
    state = good[newest].state["run"] if newest is not None else None
    for name, columns in ((EPOCH_TABLE.file_name, EPOCH_TABLE.columns), (STEP_TABLE.file_name, STEP_TABLE.columns)):
        obstacles.append(_rows(run / name, columns, None if state is None else state[columns.key], findings))
    for name in ("last", "best"):
        _weights(run / "weights" / f"{name}.safetensors", belonging, good, findings)
    _gradients(run / GRADIENT_TABLE.file_name, belonging.layers, None if state is None else state["step"], findings)
    _records(run, findings)
    obstacle = next((one for one in obstacles if one is not None), None)
    if state is None:
        return Verified(run, tuple(findings), obstacle="no checkpoint verifies")
    position = (state["epoch"], state["step"], state["step_in_epoch"])
    return Verified(run, tuple(findings), newest, *position, obstacle, state["epoch"] >= belonging.epochs)


def _checkpoints(
    folder: Path, belonging: Belonging, findings: list[Finding]
) -> tuple[dict[str, Checkpoint], str | None]:
    """Those that verify, by name, newest first, and the name of the first."""
    good: dict[str, Checkpoint] = {}
    try:
        paths = named(folder)
    except CorruptCheckpoint as error:
        findings.append(Finding(Status.DAMAGED, "checkpoints", shorten(error)))
        return good, None
    if not paths:
        findings.append(Finding(Status.DAMAGED, "checkpoints", "there are none"))
    for path, is_folder in paths:
        where = f"checkpoints/{path.name}"
        try:
            if not is_folder:
                raise CorruptCheckpoint(f"{path} is no folder")
            saved = load(path, belonging.most_bytes)
            belonging.checkpoint(saved)
        except CorruptCheckpoint as error:
            findings.append(Finding(Status.DAMAGED, where, shorten(error, 500)))
            continue
        good[path.name] = saved
        at = saved.state["run"]
        size = format_size(sum(file.stat().st_size for file in path.iterdir()))
        words = f"epoch {at['epoch'] + 1}, step {at['step_in_epoch']} of it; sizes and hashes are right, {size}"
        findings.append(Finding(Status.OK, where, words))
    return good, next(iter(good), None)


def _plan(belonging: Belonging, findings: list[Finding]) -> str | None:
    """Why a resume could not go on, None if it could."""
    try:
        words = belonging.plan()
    except CorruptCheckpoint as error:
        findings.append(Finding(Status.DAMAGED, "plan.json", shorten(error, 500)))
        return "its plan cannot be used"
    if words is not None:
        findings.append(Finding(Status.OK, "plan.json", words))
    return None


def _rows(path: Path, columns: Columns, last: int | None, findings: list[Finding]) -> str | None:
    """Against the checkpoint at `last`, if there is one. Returns why a resume could not go on, None if it could."""
    an_epoch = columns.key == "epoch"
    try:
        rows = scan_table(path, columns, 1 << 53 if last is None else last, every=an_epoch and last is not None)
    except (CorruptCheckpoint, OSError) as error:
        findings.append(Finding(Status.DAMAGED, path.name, shorten(error, 500)))
        return f"{path.name} cannot be used"
    words = f"{rows.kept} rows" + (f" up to the checkpoint, {rows.beyond} after it" if rows.beyond else "")
    if rows.cut_off:
        words += ", the last line was cut off"
    if rows.damage is not None:
        findings.append(Finding(Status.DAMAGED, path.name, f"{rows.damage}; {words}"))
    elif an_epoch and rows.beyond > 1:
        # A checkpoint follows every row of an epoch.
        findings.append(Finding(Status.DAMAGED, path.name, f"newer checkpoints than there are were saved: {words}"))
    else:
        repeated = rows.beyond or rows.cut_off
        findings.append(Finding(Status.NOTE if repeated else Status.OK, path.name, words))
    return None


def _gradients(path: Path, layers: tuple[str, ...], last: int | None, findings: list[Finding]) -> None:
    """Nothing is computed from them: whatever they are, a resume goes on, setting aside what it cannot use."""
    try:
        path.stat()
        rows = scan_table(path, GRADIENT_TABLE.of_layers(layers), 1 << 53 if last is None else last)
    except FileNotFoundError:
        findings.append(Finding(Status.NOTE, path.name, "is not there"))
    except (CorruptCheckpoint, OSError) as error:
        words = f"{shorten(error, 300)}; a resume goes on all the same, with a new one"
        findings.append(Finding(Status.NOTE, path.name, words))
    else:
        words = f"{rows.kept} rows of {len(layers)} layers" + (f", {rows.damage}" if rows.damage else "")
        findings.append(Finding(Status.NOTE if rows.damage else Status.OK, path.name, words))


def _weights(path: Path, belonging: Belonging, good: Mapping[str, Checkpoint], findings: list[Finding]) -> None:
    where = f"weights/{path.name}"
    try:
        header = read_header(path)
        belonging.tensors(header.shapes, where)
        step = header.metadata.get("step", "")
        same = next((saved for saved in good.values() if str(saved.step) == step), None)
        if same is not None and not _equal(read_limited(path, belonging.most_bytes), same):
            raise CorruptCheckpoint(f"is not what the checkpoint of step {step} holds")
    except FileNotFoundError:
        findings.append(Finding(Status.NOTE, where, "is not there"))
    except (Unreadable, CorruptCheckpoint, OSError) as error:
        findings.append(Finding(Status.DAMAGED, where, shorten(error, 500)))
    else:
        compared = (
            "equal to its checkpoint, bit for bit" if same is not None else "its checkpoint is gone to compare with"
        )
        findings.append(Finding(Status.OK, where, f"of step {shorten(step)}; {compared}"))


def _equal(data: bytes, saved: Checkpoint) -> bool:
    from safetensors.torch import load as decode

    ours = decode(data)
    return ours.keys() == saved.model.keys() and all(
        tensor.dtype == saved.model[name].dtype
        and tensor.contiguous().numpy().tobytes() == saved.model[name].contiguous().numpy().tobytes()
        for name, tensor in ours.items()
    )


def _records(run: Path, findings: list[Finding]) -> None:
    """What only colours a report."""
    try:
        lines = read_limited(run / "events.jsonl", TABLE_LIMIT_BYTES).splitlines()
        bad = sum(parse_event(line) is None for line in lines)
        status = Status.NOTE if bad else Status.OK
        findings.append(Finding(status, "events.jsonl", f"{len(lines)} lines" + f", {bad} unreadable" * bool(bad)))
    except (Unreadable, OSError) as error:
        findings.append(Finding(Status.NOTE, "events.jsonl", shorten(error)))
    try:
        read_json(run / "env.json")
    except (Unreadable, OSError) as error:
        findings.append(Finding(Status.NOTE, "env.json", shorten(error)))


def _lock(run: Path) -> Finding:
    """Whether somebody writes. The lock is not tried, which could be in the way of who wants it: Linux lists locks,
    elsewhere it stays unknown."""
    try:
        status = (run / "run.lock").stat()
        with open("/proc/locks", encoding="ascii") as file:
            held = [line.split() for line in file]
        owner = read_owner(run / OWNER_NAME)
        # The number of a file is one of its file system only. Some (btrfs) tell another device than is listed here:
        # there the owner's word is taken that it is this file.
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        same = [
            (fields[4], fields[5]) for fields in held if len(fields) > 5 and fields[5].endswith(f":{status.st_ino}")
        ]
        writers = [pid for pid, at in same if at.startswith(f"{device}:") or (owner and pid == str(owner.pid))]
    except FileNotFoundError:
        return Finding(Status.NOTE, "run.lock", f"whether a process writes it is not known; {_owner(run)}")
    except (OSError, ValueError):
        return Finding(Status.NOTE, "run.lock", "whether a process writes it is not known")
    if writers:
        return Finding(Status.NOTE, "run.lock", f"process {writers[0]} writes this run now: what is found may change")
    return Finding(Status.OK, "run.lock", "no process on this machine writes this run")


def _owner(run: Path) -> str:
    try:
        owner: Any = read_json(run / "run.owner.json")
        return f"last opened by process {int(owner['pid'])} on {shorten(owner['host'], 60)}"
    except (Unreadable, OSError, LookupError, TypeError, ValueError):
        return "nor who last did"


def to_json(found: Verified) -> str:
    """For `lowmem verify --json`."""
    values = {
        "run": os.fspath(found.run),
        "can_resume": found.can_resume,
        "resumes_from": found.resumes_from,
        "epoch": found.epoch,
        "step": found.step,
        "step_in_epoch": found.step_in_epoch,
        "finished": found.finished,
        "obstacle": found.obstacle,
        "findings": [{"status": one.status, "where": one.where, "what": one.what} for one in found.findings],
    }
    return json.dumps(values, indent=1)
