"""`lowmem verify`: looks through a run folder for what a resume relies on, and changes nothing. Checkpoints and plans
are checked against what the run is by its config.yaml.

Known limitation: rows and weights carry no checksum of their own. A digit that became another digit in a row is not
noticed; exported weights are compared bit for bit where the checkpoint of the same step is still there.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem.config.schema import Config
from lowmem.core.errors import CorruptCheckpoint, ForeignCheckpoint
from lowmem.core.phases import Phase, untold
from lowmem.core.reading import Unreadable, read_limited, shorten
from lowmem.core.units import counted, format_size
from lowmem.lifecycle.preflight import tensor_bits
from lowmem.lifecycle.run_identity import (
    Changes,
    as_trained,
    belongs_to,
    check_shapes,
    most_bytes,
    network,
    network_shapes,
    read_plans,
)
from lowmem.runs.checkpoint import Checkpoint, load, named
from lowmem.runs.checkpoint_state import read_state
from lowmem.runs.lock import LOCK_NAME, OWNER_NAME, read_owner
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, RowTable
from lowmem.runs.store import plan_file
from lowmem.runs.tables import scan_table
from lowmem.runs.view import RunView, recorded_settings
from lowmem.runs.weights import read_weights
from lowmem.train.metrics import measured_weights
from lowmem.train.replica import weights_of
from lowmem.train.watchers import is_finished

FileStatus = Literal["ok", "note", "damaged"]


@dataclass(frozen=True)
class FileFinding:
    """`where`: the file or folder, as it is called inside the run folder."""

    status: FileStatus
    where: str
    what: str


@dataclass(frozen=True)
class Verified:
    """`resumes_from`: the checkpoint that a resume would take, at `step` of which `step_in_epoch` are of the epoch
    after `epoch`; None if it would take none. `obstacle`: why it could not go on all the same."""

    run: Path
    findings: tuple[FileFinding, ...]
    resumes_from: str | None = None
    epoch: int | None = None
    step: int | None = None
    step_in_epoch: int | None = None
    obstacle: str | None = None
    finished: bool = False

    @property
    def can_resume(self) -> bool:
        return self.resumes_from is not None and self.obstacle is None

    def to_json(self) -> str:
        """For `--json`."""
        return json.dumps({"can_resume": self.can_resume, **asdict(self), "run": os.fspath(self.run)}, indent=1)


def verify(run: Path, phase: Phase = untold) -> Verified:
    """Raises UsageError if it is no run or its config.yaml cannot be used; what else is damaged, the result says."""
    recorded = recorded_settings(run)
    trained, edits = as_trained(run, recorded)
    return _Verification(run, trained.config, edits, phase).result()


class _Verification:
    """What was found so far. A check that returns words says why a resume could not go on."""

    def __init__(self, run: Path, config: Config, edits: Changes, phase: Phase) -> None:
        """`config`: as the run was trained; `edits`: what config.yaml says otherwise."""
        self._run, self._config, self._edits, self._most_bytes = run, config, edits, most_bytes(config)
        self._phase = phase
        self._shapes = network_shapes(config)
        self._findings: list[FileFinding] = []
        self._good: dict[str, Checkpoint] = {}  # those that verify, by name, newest first

    def result(self) -> Verified:
        obstacles = [self._check_settings()]
        self._check_lock()
        self._check_checkpoints()
        self._phase("verifying rows and weights")
        newest = next(iter(self._good), None)
        state = {} if newest is None else self._good[newest].state["run"]
        obstacles += [self._check_plan()]
        obstacles += [self._check_rows(table, state.get(table.key)) for table in (EPOCH_TABLE, STEP_TABLE)]
        for name in ("last", "best"):
            self._check_weights(self._run / "weights" / f"{name}.safetensors")
        self._check_gradients(self._run / GRADIENT_TABLE.file_name, state.get("step"))
        self._check_records()
        findings = tuple(self._findings)
        if newest is None:
            return Verified(self._run, findings, obstacle="no checkpoint verifies")
        position = (state["epoch"], state["step"], state["step_in_epoch"])
        obstacle = next((words for words in obstacles if words is not None), None)
        finished = is_finished(self._config.train, read_state(self._good[newest].state, self._good[newest].step))
        return Verified(self._run, findings, newest, *position, obstacle, finished)

    def _add(self, status: FileStatus, where: str, what: object) -> None:
        self._findings.append(FileFinding(status, where, shorten(what, 500)))

    def _check_settings(self) -> str | None:
        if not self._edits:
            self._add("ok", "config.yaml", "every setting is known and valid")
            return None
        listed = ", ".join(f"{key} {now!r} (was {then!r})" for key, (then, now) in self._edits.items())
        self._add("damaged", "config.yaml", f"was changed since the run was trained: {listed}")
        return "its settings were changed"

    def _check_checkpoints(self) -> None:
        try:
            paths = named(self._run / "checkpoints")
        except CorruptCheckpoint as error:
            self._add("damaged", "checkpoints", error)
            return
        if not paths:
            self._add("damaged", "checkpoints", "there are none")
        check = belongs_to(self._config)
        for done, path in enumerate(paths):
            self._phase("verifying checkpoints", done, len(paths))
            where = f"checkpoints/{path.name}"
            try:
                saved = load(path, self._most_bytes)
                check(saved)
            except CorruptCheckpoint as error:
                self._add("note" if isinstance(error, ForeignCheckpoint) else "damaged", where, error)
                continue
            self._good[path.name] = saved
            at = saved.state["run"]
            size = format_size(sum(file.stat().st_size for file in path.iterdir()))
            words = f"epoch {at['epoch'] + 1}, step {at['step_in_epoch']} of it; sizes and hashes are right, {size}"
            self._add("ok", where, words)

    def _check_plan(self) -> str | None:
        try:
            plans = read_plans(self._run, self._config)
            processes = max(1, len(plans[0].shares)) if plans else 0
            if len(plans) < processes:
                missing = next(name for name in map(plan_file, range(processes)) if not (self._run / name).is_file())
                raise CorruptCheckpoint(
                    f"{self._run / missing} is missing, the plan of one of the {processes} processes that train this "
                    "run: restore it, or go on with another number of them"
                )
        except CorruptCheckpoint as error:
            self._add("damaged", "plan.json", error)
            return "its plan cannot be used"
        for first in plans[:1]:
            several = f"{processes} processes, of which this takes " if processes > 1 else ""
            micro = f"batch {first.batch} in micro-batches of {first.micro_batch}"
            self._add("ok", "plan.json", f"{several}{micro}, {counted(len(first.ladder), 'smaller plan')} in reserve")
        return None

    def _check_rows(self, table: RowTable[Any], last: int | None) -> str | None:
        """Against the checkpoint at `last`, if there is one."""
        name = table.file_name
        try:
            rows = scan_table(self._run / name, table, last)
        except (CorruptCheckpoint, OSError) as error:
            self._add("damaged", name, error)
            return f"{name} cannot be used"
        words = counted(rows.kept, "row") + (f" up to the checkpoint, {rows.beyond} after it" if rows.beyond else "")
        if rows.cut_off:
            words += ", the last line was cut off"
        if rows.damage is not None:
            self._add("damaged", name, f"{rows.damage}; {words}")
        elif table is EPOCH_TABLE and rows.beyond > 1:
            # A checkpoint follows every row of an epoch.
            self._add("damaged", name, f"newer checkpoints than there are were saved: {words}")
        else:
            self._add("note" if rows.beyond or rows.cut_off else "ok", name, words)
        return None

    def _check_gradients(self, path: Path, last: int | None) -> None:
        """Nothing is computed from them: whatever they are, a resume goes on, setting aside what it cannot use."""
        layers = tuple(measured_weights(network(self._config)))
        try:
            path.stat()
            rows = scan_table(path, GRADIENT_TABLE.of_layers(layers), last)
        except FileNotFoundError:
            self._add("note", path.name, "is not there")
        except (CorruptCheckpoint, OSError) as error:
            self._add("note", path.name, f"{shorten(error, 300)}; a resume goes on all the same, with a new one")
        else:
            words = f"{counted(rows.kept, 'row')} of {counted(len(layers), 'layer')}"
            words += f", {rows.damage}" if rows.damage else ""
            self._add("note" if rows.damage else "ok", path.name, words)

    def _check_weights(self, path: Path) -> None:
        from safetensors.torch import load as decode

        where = f"weights/{path.name}"
        try:
            shapes, info = read_weights(path)
            check_shapes(self._shapes, shapes, where)
            step = "unknown" if info.step is None else info.step
            same = next((saved for saved in self._good.values() if saved.step == info.step), None)
            if same is not None and tensor_bits(decode(read_limited(path, self._most_bytes))) != tensor_bits(
                weights_of(same)
            ):
                raise CorruptCheckpoint(f"is not what the checkpoint of step {step} holds")
        except FileNotFoundError:
            self._add("note", where, "is not there")
        except (Unreadable, CorruptCheckpoint, OSError) as error:
            self._add("damaged", where, error)
        else:
            compared = "its checkpoint is gone to compare with"
            compared = compared if same is None else "equal to its checkpoint, bit for bit"
            named = f"{counted(len(info.classes), 'class')} by name" if info.classes else "its classes have no names"
            self._add("ok", where, f"of step {step}; {named}; {compared}")

    def _check_records(self) -> None:
        """What only colours a report."""
        view = RunView(self._run)
        words = counted(len(view.events), "line") if (self._run / "events.jsonl").exists() else "is not there"
        told = tuple(view.notes)
        self._add("note" if told else "ok", "events.jsonl", "; ".join((words, *told)))
        if not view.env:
            self._add("note", "env.json", "; ".join(view.notes[len(told) :]) or "is not there")

    def _check_lock(self) -> None:
        """Whether somebody writes. The lock is not tried, which could be in the way of who wants it: Linux lists locks,
        elsewhere it stays unknown."""
        owner = read_owner(self._run / OWNER_NAME)
        try:
            status = (self._run / LOCK_NAME).stat()
            with open("/proc/locks", encoding="ascii") as file:
                held = [(fields[4], fields[5]) for line in file if len(fields := line.split()) > 5]
        except (OSError, ValueError):
            last = "" if owner is None else f"; last opened by process {owner.pid} on {owner.host}"
            self._add("note", LOCK_NAME, f"whether a process writes it is not known{last}")
            return
        # The number of a file is one of its file system only. Some (btrfs) tell another device than is listed here:
        # there the owner's word is taken that it is this file.
        device, number = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:", f":{status.st_ino}"
        for pid, at in held:
            same = at.startswith(device) or (owner is not None and pid == str(owner.pid))
            if same and at.endswith(number):
                self._add("note", LOCK_NAME, f"process {pid} writes this run now: what is found may change")
                return
        self._add("ok", LOCK_NAME, "no process on this machine writes this run")
