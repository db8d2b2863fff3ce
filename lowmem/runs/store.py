"""The run folder while it is written: made once, locked, appended to, cut back on resume.

Reading a run without writing to it is `lowmem.runs.view`.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from lowmem.core.errors import CorruptCheckpoint, DiskError, PreflightError, UsageError
from lowmem.core.reading import shorten
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.atomic import (
    PARTIAL,
    RowFile,
    fsync_folder,
    replace_path,
    replacing,
    write_bytes_atomic,
    write_text_atomic,
)
from lowmem.runs.checkpoint import FULL, disk_error
from lowmem.runs.lock import Owner, RunLock
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, csv_line, gradient_line
from lowmem.runs.setup import FORKING, clear, refuse_existing
from lowmem.runs.tables import cut_table

if TYPE_CHECKING:
    from torch import Tensor


PLAN = "plan.json"


def plan_file(rank: int) -> str:
    """plan.json, or that of another process of a run that several train, by its rank."""
    return PLAN if rank == 0 else f"plan-{rank}.json"


class RunFolder:
    """A run folder held under its lock. Use as a context manager; leaving it releases the lock.

    Rows and events that the disk refuses are kept in memory and written, in order, before the next ones or by `flush`.
    Threads may share it.
    """

    def __init__(self, path: Path, lock: RunLock | None) -> None:
        self.path = path
        self._lock = lock
        self.checkpoints = path / "checkpoints"
        self.metrics_file, self.steps_file = path / EPOCH_TABLE.file_name, path / STEP_TABLE.file_name
        self.gradients_file, self.events_file = path / GRADIENT_TABLE.file_name, path / "events.jsonl"
        self._metrics, self._steps = RowFile(self.metrics_file), RowFile(self.steps_file)
        self._events, self._gradients = RowFile(self.events_file), RowFile(self.gradients_file)
        self._row_files = (self._metrics, self._steps, self._gradients, self._events)
        self._plans_waiting: dict[int, Mapping[str, Any]] = {}
        self._plan_lock = threading.Lock()

    @property
    def taken_over(self) -> Owner | None:
        """The writer before this one, if it ended without leaving (killed, or the machine went down)."""
        return None if self._lock is None else self._lock.taken_over

    @classmethod
    def create(cls, path: Path, config_yaml: str, environment: Mapping[str, Any]) -> RunFolder:
        """Makes a new run folder, or takes over one of a run that never began (see `setup.never_began`).

        Raises UsageError if there is anything else, PreflightError if it cannot be made.
        """
        refuse_existing(path)
        try:
            lock = _lock_new(path)
            run = cls(path, lock)
            try:
                refuse_existing(path)  # another process may have begun a run in the meantime
            except UsageError:
                lock.release()
                raise
            try:
                run._set_up(config_yaml, environment)
            except BaseException:
                run.discard()
                raise
        except OSError as error:
            raise PreflightError(
                f"the run folder {path} cannot be written ({error.strerror or error}): choose another with --out"
            ) from None
        return run

    def _set_up(self, config_yaml: str, environment: Mapping[str, Any]) -> None:
        clear(self.path)
        (self.path / "checkpoints").mkdir()
        (self.path / "weights").mkdir()
        write_text_atomic(self.path / "config.yaml", config_yaml)
        write_text_atomic(self.path / "env.json", json.dumps(environment, indent=1) + "\n")
        write_text_atomic(self.metrics_file, f"{EPOCH_TABLE.header}\n")
        write_text_atomic(self.steps_file, f"{STEP_TABLE.header}\n")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens an existing run for writing, which the caller has looked at (`setup.require_run`). Raises UsageError if
        another process writes it, DiskError if there is no room, PreflightError if it cannot be written otherwise."""
        try:
            return cls(path, RunLock.acquire(path))
        except OSError as error:
            if error.errno in FULL:
                raise disk_error(error, path) from None
            raise PreflightError(
                f"{path} cannot be written ({error.strerror or error}): check its permissions"
            ) from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Writes what rows still wait, if the disk takes them, and releases the lock."""
        with suppress(DiskError):
            self.flush()
        if self._lock is not None:
            self._lock.release()

    def tidy(self, *, keep: int, keep_every: int | None = None) -> None:
        """Deletes what a killed writer left half done. Failing to delete is no reason to stop a run."""
        for folder in (self.path, self.path / "weights"):
            for file in folder.glob(f"*{PARTIAL}"):
                with suppress(OSError):
                    file.unlink()
        shutil.rmtree(self.path / ".preflight", ignore_errors=True)
        with suppress(OSError):
            (self.path / FORKING).unlink(missing_ok=True)
        checkpoints.tidy(self.checkpoints, keep=keep, keep_every=keep_every)

    def discard(self) -> None:
        """Removes a run folder that never took a step, while it is still locked: nobody else begins in it meanwhile."""
        if self._lock is None or not self._lock.held:
            return  # done before: what is there by now is somebody else's
        with suppress(OSError):
            clear(self.path, ignore_errors=True)
        self._lock.remove()

    def write_plan(self, plan: Mapping[str, Any], rank: int = 0) -> None:
        """Writes plan.json, or the plan of another process of the run, atomically. Raises DiskError."""
        with _disk_errors(self.path / plan_file(rank)) as path:
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
        """Appends one line to events.jsonl."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._append(self._events, [json.dumps({"time": stamp, "event": name, **fields})])

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends a row to metrics.csv; None becomes an empty field."""
        self._append(self._metrics, [csv_line(EPOCH_TABLE.names, row)])

    def append_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to steps.csv."""
        if rows:
            self._append(self._steps, [csv_line(STEP_TABLE.names, row) for row in rows])

    def _append(self, file: RowFile, lines: list[str]) -> None:
        with suppress(OSError):  # they wait; whoever saves or ends the run asks `flush`
            file.append(lines)

    @property
    def rows_waiting(self) -> int:
        """Lines of all files that are in memory only, because the disk refused them."""
        return sum(file.waiting for file in self._row_files)

    def flush(self) -> None:
        """Writes everything that waits. Raises DiskError if the disk still refuses; nothing of it is lost then.

        A checkpoint may be committed only after this: a resume cuts the rows back to it and cannot make up for rows
        that are missing before it.
        """
        for file in self._row_files:
            with _disk_errors(file.path):
                file.append()
        self._write_waiting_plan()

    def _write_waiting_plan(self) -> None:
        with self._plan_lock:
            for rank in list(self._plans_waiting):
                self.write_plan(self._plans_waiting[rank], rank)
                del self._plans_waiting[rank]

    def begin_gradients(self, layers: Sequence[str], *, step: int) -> str | None:
        """Makes gradients.csv with its header, or drops the rows after `step` from the one that is there.

        Nothing is computed from it, so that nothing in it can stop a run: one that is no table of these layers is set
        aside as `damaged-gradients.csv`. Returns a sentence if anything was wrong. Raises DiskError.
        """
        table, damage = GRADIENT_TABLE.of_layers(layers), None
        with _disk_errors(self.gradients_file) as file:
            if file.is_file() and file.stat().st_size == 0:
                file.unlink()
            if file.exists():
                try:
                    damage = cut_table(file, table, step)
                except (CorruptCheckpoint, PermissionError) as error:
                    aside = _free(file.with_name(f"damaged-{file.name}"))
                    replace_path(file, aside)
                    damage = f"{shorten(error)}; the run goes on with a new one, the file as it was is {aside.name}"
                self._gradients.replaced()
            if not file.exists() and not self._gradients.waiting:
                self._append(self._gradients, [table.header])
        return damage

    def append_gradients(self, rows: Sequence[tuple[int, int, Sequence[float]]]) -> None:
        """Appends (step, epoch, norms) to gradients.csv."""
        if rows:
            self._append(self._gradients, [gradient_line(*row) for row in rows])

    def copy_metrics(self, source: Path, *, epoch: int) -> None:
        """Takes over the rows of another run's metrics.csv up to `epoch`. Raises DiskError."""
        with _disk_errors(self.metrics_file):
            with open(source / EPOCH_TABLE.file_name, "rb") as old, replacing(self.metrics_file) as new:
                shutil.copyfileobj(old, new)
            cut_table(self.metrics_file, EPOCH_TABLE, epoch)
            self._metrics.replaced()

    def cut_back(self, *, epoch: int, step: int) -> list[str]:
        """Drops rows after `epoch` from metrics.csv and after `step` from steps.csv: what a resume will repeat.

        Returns a sentence for each file that had lines nothing could be made of. Raises CorruptCheckpoint for a file
        that is no table of these columns, DiskError.
        """
        self.flush()  # rows that still wait are to be dropped, too, if they are of later steps
        with _disk_errors(self.path):
            damages = (
                cut_table(self.metrics_file, EPOCH_TABLE, epoch, every=True),
                cut_table(self.steps_file, STEP_TABLE, step),
            )
            self._metrics.replaced()
            self._steps.replaced()
        return [damage for damage in damages if damage is not None]

    def write_config(self, text: str) -> None:
        """Replaces config.yaml, after an operational setting changed. Raises DiskError."""
        with _disk_errors(self.path / "config.yaml") as path:
            write_text_atomic(path, text)

    def save_weights(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Writes weights/<name>.safetensors atomically, with string metadata. Raises DiskError."""
        from safetensors.torch import save as encode

        with _disk_errors(self.path / "weights" / f"{name}.safetensors") as path:
            write_bytes_atomic(path, encode(dict(tensors), metadata=dict(metadata)))


Writer = TypeVar("Writer", bound=type)


def writes_nothing(of: type) -> Callable[[Writer], Writer]:
    """A decorator of a subclass of `of`: every public method of `of` that it does not define does nothing and returns
    None. For a process of a run that another one writes: of several that train together rank 0 alone holds the folder
    and saves."""

    def silenced(writer: Writer) -> Writer:
        for name, member in vars(of).items():
            if isinstance(member, FunctionType) and not name.startswith("_") and name not in vars(writer):
                setattr(writer, name, lambda self, *_, **__: None)
        return writer

    return silenced


@writes_nothing(RunFolder)
class NullFolder(RunFolder):
    """The same methods, and nothing happens. `path` is where the run is for the process that writes it; here there may
    be nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, None)

    def cut_back(self, *, epoch: int, step: int) -> list[str]:
        return []


@contextmanager
def _disk_errors(path: Path) -> Iterator[Path]:
    """Around writing `path`: an OSError becomes the one-line DiskError."""
    try:
        yield path
    except OSError as error:
        raise disk_error(error, path) from error


def _lock_new(path: Path) -> RunLock:
    """Makes the folder, durably, and locks it. One that cannot be locked does not stay. Raises OSError, UsageError."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in made:
            with suppress(OSError):  # who may write to a folder may perhaps not read it
                fsync_folder(folder.parent)
        return RunLock.acquire(path)
    except BaseException:
        if made:
            with suppress(OSError):
                path.rmdir()  # only if it is empty
        raise


def _free(path: Path) -> Path:
    """`path`, or if there is something of that name already, the first of it with a number that is free."""
    names = (path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, 1000)))
    return next((one for one in names if not one.exists()), path)
