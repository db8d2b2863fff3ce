"""The run folder while it is written (`lowmem.runs.view` reads it): made once, locked, appended to, cut back on resume;
and how much room it takes."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from lowmem.config.schema import Config
from lowmem.core.errors import CorruptCheckpoint, DiskError, PreflightError
from lowmem.core.reading import shorten
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.atomic import PARTIAL, RowFile, fsync_folder, replace_path, replacing, write_text_atomic
from lowmem.runs.checkpoint import FULL, disk_error, disk_errors
from lowmem.runs.folder import FORKING, clear, refuse_existing
from lowmem.runs.lock import RunLock
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, RowTable, csv_line, gradient_line
from lowmem.runs.tables import cut_table
from lowmem.runs.weights import WeightsInfo

if TYPE_CHECKING:
    from torch import Tensor


PLAN = "plan.json"


def plan_file(rank: int) -> str:
    """plan.json, or that of another process of a run that several train, by its rank."""
    return PLAN if rank == 0 else f"plan-{rank}.json"


class RunFolder(AbstractContextManager["RunFolder"]):
    """A run folder held under its lock. Rows and events that the disk refuses are kept in memory and written, in order,
    before the next ones or by `flush`. Threads may share it."""

    def __init__(self, path: Path, lock: RunLock | None = None, made: Sequence[Path] = ()) -> None:
        self.path = path
        self._lock, self._made = lock, made
        # The writer before this one, if it ended without leaving (killed, or the machine went down).
        self.taken_over = None if lock is None else lock.taken_over
        self.checkpoints = path / "checkpoints"
        self.metrics_file, self.steps_file = path / EPOCH_TABLE.file_name, path / STEP_TABLE.file_name
        self.gradients_file, self.events_file = path / GRADIENT_TABLE.file_name, path / "events.jsonl"
        files = (self.metrics_file, self.steps_file, self.gradients_file, self.events_file)
        self._rows = {file: RowFile(file) for file in files}
        self._plans_waiting: dict[int, Mapping[str, Any]] = {}
        self._plan_lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, config_yaml: str, environment: Mapping[str, Any]) -> RunFolder:
        """Makes a new run folder, durably, or takes over one of a run that never began. Raises UsageError if there is
        anything else, PreflightError if it cannot be made; what was made then goes."""
        refuse_existing(path)
        try:
            with ExitStack() as undo:
                made = [folder for folder in (path, *path.parents) if not folder.exists()]
                undo.callback(_unmake, made)
                path.mkdir(parents=True, exist_ok=True)
                for folder in made:
                    with suppress(OSError):  # who may write to a folder may perhaps not read it
                        fsync_folder(folder.parent)
                lock = RunLock(path)
                undo.callback(lock.release)
                refuse_existing(path)  # another process may have begun a run in the meantime
                run = cls(path, lock, made)
                undo.callback(run.discard)
                clear(path)
                (path / "checkpoints").mkdir()
                (path / "weights").mkdir()
                write_text_atomic(path / "config.yaml", config_yaml)
                write_text_atomic(path / "env.json", json.dumps(environment, indent=1) + "\n")
                write_text_atomic(run.metrics_file, f"{EPOCH_TABLE.header}\n")
                write_text_atomic(run.steps_file, f"{STEP_TABLE.header}\n")
                undo.pop_all()
        except OSError as error:
            raise PreflightError(
                f"the run folder {path} cannot be written ({error.strerror or error}): choose another with --out"
            ) from None
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """For writing, a run that the caller has looked at (`folder.require_run`). Raises UsageError if another process
        writes it, DiskError if there is no room, PreflightError if it cannot be written otherwise."""
        try:
            return cls(path, RunLock(path))
        except OSError as error:
            if error.errno in FULL:
                raise disk_error(error, path) from None
            raise PreflightError(
                f"{path} cannot be written ({error.strerror or error}): check its permissions"
            ) from None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what rows still wait, if the disk takes them, and releases the lock."""
        if self._lock is not None and self._lock.held:  # else it was discarded
            with suppress(DiskError):
                self.flush()
            self._lock.release()

    def newest_checkpoint(self) -> Path | None:
        """By its name, whole or not."""
        return next(iter(checkpoints.checkpoint_folders(self.checkpoints)), None)

    def tidy(self, *, keep: int, keep_every: int | None = None) -> None:
        """Deletes what a killed writer left half done. Failing to delete is no reason to stop a run."""
        parts = (*self.path.glob(f"*{PARTIAL}"), *(self.path / "weights").glob(f"*{PARTIAL}"))
        for file in (*parts, self.path / FORKING):
            with suppress(OSError):
                file.unlink()
        shutil.rmtree(self.path / ".preflight", ignore_errors=True)
        checkpoints.tidy(self.checkpoints, keep=keep, keep_every=keep_every)

    def discard(self) -> None:
        """Removes a run folder that never took a step, while it is still locked: nobody else begins in it meanwhile."""
        if self._lock is None or not self._lock.held:
            return  # done before: what is there by now is somebody else's
        with suppress(OSError):
            clear(self.path, ignore_errors=True)
        self._lock.release(remove=True)
        _unmake(self._made)

    def write_plan(self, plan: Mapping[str, Any], rank: int = 0) -> None:
        """Writes plan.json, or the plan of another process of the run, atomically. Raises DiskError."""
        with disk_errors(self.path / plan_file(rank)) as path:
            write_text_atomic(path, json.dumps(plan, indent=1) + "\n")

    def forget_plans(self, after: int) -> None:
        """Of processes that the run has no longer: rank `after` and above."""
        kept = {plan_file(rank) for rank in range(after)}
        for file in self.path.glob("plan-*.json"):
            if file.name not in kept:
                with suppress(OSError):
                    file.unlink()

    def update_plan(self, plan: Mapping[str, Any], rank: int = 0) -> None:
        """`write_plan` while a run goes on: what the disk refuses is written by the next `flush`."""
        with self._plan_lock:
            self._plans_waiting[rank] = plan
        with suppress(DiskError):
            self._write_waiting_plan()

    def event(self, name: str, **fields: Any) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._append(self.events_file, [json.dumps({"time": stamp, "event": name, **fields})])

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        self._append(self.metrics_file, [csv_line(EPOCH_TABLE.names, row)])

    def append_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._append(self.steps_file, [csv_line(STEP_TABLE.names, row) for row in rows])

    def _append(self, file: Path, lines: list[str]) -> None:
        with suppress(OSError):  # they wait; whoever saves or ends the run asks `flush`
            self._rows[file].append(lines)

    def _cut(self, table: RowTable[Any], last: int) -> str | None:
        file = self.path / table.file_name
        damage = cut_table(file, table, last)
        self._rows[file].replaced()
        return damage

    @property
    def rows_waiting(self) -> int:
        """Lines of all files that are in memory only, because the disk refused them."""
        return sum(len(file.waiting) for file in self._rows.values())

    def flush(self) -> None:
        """Writes everything that waits. Raises DiskError if the disk still refuses; nothing of it is lost then. A
        checkpoint may be committed only after this: a resume cannot make up for rows that are missing before it."""
        for file in self._rows:
            with disk_errors(file):
                self._rows[file].append()
        self._write_waiting_plan()

    def _write_waiting_plan(self) -> None:
        with self._plan_lock:
            for rank in list(self._plans_waiting):
                self.write_plan(self._plans_waiting[rank], rank)
                del self._plans_waiting[rank]

    def begin_gradients(self, layers: Sequence[str], *, step: int) -> str | None:
        """Makes gradients.csv, or drops the rows after `step` from the one that is there. Nothing is computed from
        it: one that is no table of these layers is set aside as `damaged-gradients.csv` and stops no run. Returns a
        sentence if anything was wrong. Raises DiskError."""
        table, damage = GRADIENT_TABLE.of_layers(layers), None
        with disk_errors(self.gradients_file) as file:
            if file.is_file() and file.stat().st_size == 0:
                file.unlink()
            if file.exists():
                try:
                    damage = self._cut(table, step)
                except (CorruptCheckpoint, PermissionError) as error:
                    aside, number = file.with_name(f"damaged-{file.name}"), 1
                    while aside.exists():
                        number += 1
                        aside = file.with_name(f"damaged-{file.stem}-{number}{file.suffix}")
                    replace_path(file, aside)
                    self._rows[file].replaced()
                    damage = f"{shorten(error)}; the run goes on with a new one, the file as it was is {aside.name}"
            if not file.exists() and not self._rows[file].waiting:
                self._append(file, [table.header])
        return damage

    def append_gradients(self, rows: Sequence[tuple[int, int, Sequence[float]]]) -> None:
        """Appends (step, epoch, norms) to gradients.csv."""
        self._append(self.gradients_file, [gradient_line(*row) for row in rows])

    def copy_rows(self, source: Path, *, epoch: int, step: int | None) -> None:
        """Takes over another run's rows up to `epoch`, and to `step` (None: none) if it has any. Raises DiskError."""
        for table, last in ((EPOCH_TABLE, epoch), (STEP_TABLE, step)):
            file, theirs = self.path / table.file_name, source / table.file_name
            if last is None or (table is STEP_TABLE and not theirs.is_file()):
                continue
            with disk_errors(file):
                with open(theirs, "rb") as old, replacing(file) as new:
                    shutil.copyfileobj(old, new)
                self._cut(table, last)
                # What lines nothing could be made of are the other run's, where they still are.
                file.with_name(f"damaged-{file.name}").unlink(missing_ok=True)

    def cut_back(self, *, epoch: int, step: int) -> list[str]:
        """Drops rows after `epoch` from metrics.csv and after `step` from steps.csv, which a resume will repeat.
        Returns a sentence for each file that had lines nothing could be made of. Raises CorruptCheckpoint for a file
        that is no table of these columns, DiskError."""
        self.flush()  # rows that still wait are to be dropped, too, if they are of later steps
        with disk_errors(self.path):
            damages = (self._cut(EPOCH_TABLE, epoch), self._cut(STEP_TABLE, step))
        return [damage for damage in damages if damage is not None]

    def write_config(self, text: str) -> None:
        """Replaces config.yaml, after an operational setting changed. Raises DiskError."""
        with disk_errors(self.path / "config.yaml") as path:
            write_text_atomic(path, text)

    def save_weights(self, name: str, tensors: Mapping[str, Tensor], info: WeightsInfo) -> None:
        """Writes weights/<name>.safetensors atomically. Raises DiskError."""
        from safetensors.torch import save as encode

        with disk_errors(self.path / "weights" / f"{name}.safetensors") as path, replacing(path) as file:
            file.write(encode(dict(tensors), metadata=info.to_metadata()))


class NullFolder(RunFolder):
    """Of a process of a run that another one writes (of several that train together rank 0 alone holds the folder and
    saves): the same methods, and nothing happens. There may be nothing at `path` here."""

    def cut_back(self, *, epoch: int, step: int) -> list[str]:
        return []


for _name, _member in vars(RunFolder).items():
    if isinstance(_member, FunctionType) and not _name.startswith("_") and _name not in vars(NullFolder):
        setattr(NullFolder, _name, lambda self, *_, **__: None)


def _unmake(made: Sequence[Path]) -> None:
    """The folders that were made for a run that came to nothing go, if there is nothing in them."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


# -- room on the disk --------------------------------------------------------------------------------------------------

# Generous: a row of metrics.csv with its `checkpoint` event, and one of steps.csv.
_EPOCH_BYTES, _STEP_BYTES = 1024, 64
_NORM_BYTES = 13  # of gradients.csv: six digits, an exponent, a comma


def most_checkpoints(config: Config) -> int:
    """That a run has at its fullest: one generation more than are kept exists while a new one is written. Those kept
    for their epoch come to these; the last epoch's is among the newest."""
    every = config.checkpoint.keep_every
    return config.checkpoint.keep + 1 + (0 if every is None else (config.train.epochs - 1) // every)


def run_bytes(
    config: Config,
    *,
    checkpoint_bytes: int,
    parameter_bytes: int,
    steps_per_epoch: int | None = None,
    layers: int = 0,
    norms_every: int = 1,
) -> int:
    """Bytes on disk that a run needs at its fullest: checkpoints, optimizer included; weights, which are exported twice
    and replaced aside; and, where the steps of an epoch are known, rows, those of gradients.csv of so many layers."""
    needed = most_checkpoints(config) * checkpoint_bytes + 3 * parameter_bytes
    if steps_per_epoch is None:
        return needed
    steps, saves_apart = config.train.epochs * steps_per_epoch, config.checkpoint.steps_between_saves
    saves = steps // saves_apart if saves_apart else 0
    logged = steps // config.train.log_every_steps * _STEP_BYTES
    gradients = (1 + steps // norms_every) * (_STEP_BYTES + layers * _NORM_BYTES)
    return needed + config.train.epochs * _EPOCH_BYTES + logged + saves * 2 * _STEP_BYTES + gradients
