"""The run folder while it is written: made once, locked, appended to, cut back on resume.

Reading a run without writing to it is `lowmem.runs.history`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lowmem.errors import LowmemError, PreflightError, UsageError
from lowmem.runs import columns, gradients
from lowmem.runs.atomic import append_lines, write_bytes_atomic, write_text_atomic
from lowmem.runs.checkpoint import disk_error

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """A run folder held under its lock. Use as a context manager; leaving it releases the lock."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    checkpoints = property(lambda self: self.path / "checkpoints")
    metrics_file = property(lambda self: self.path / "metrics.csv")
    steps_file = property(lambda self: self.path / "steps.csv")
    gradients_file = property(lambda self: self.path / gradients.FILE_NAME)
    events_file = property(lambda self: self.path / "events.jsonl")

    @classmethod
    def create(cls, path: Path, config_yaml: str, environment: Mapping[str, Any]) -> RunFolder:
        """Makes a new run folder. Raises UsageError if it exists, PreflightError if it cannot be made."""
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            if not (path / "config.yaml").is_file():
                raise UsageError(f"{path} exists and is not an empty folder: choose another with --out")
            raise UsageError(
                f"{path} exists and is never overwritten: go on with `lowmem resume {path}`, change its settings with "
                f"`lowmem fork {path}`, or choose another folder with --out"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _locked(path))
            (path / "checkpoints").mkdir()
            (path / "weights").mkdir()
            write_text_atomic(path / "config.yaml", config_yaml)
            write_text_atomic(path / "env.json", json.dumps(environment, indent=1) + "\n")
            append_lines(run.metrics_file, [",".join(columns.METRICS)])
            append_lines(run.steps_file, [",".join(columns.STEPS)])
        except OSError as error:
            raise PreflightError(
                f"the run folder {path} cannot be written ({error.strerror or error}): choose another with --out"
            ) from None
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens an existing run for writing. Raises UsageError if it is none or another process writes it."""
        require_run(path)
        try:
            return cls(path, _locked(path))
        except OSError as error:
            raise PreflightError(
                f"{path} cannot be written ({error.strerror or error}): check its permissions"
            ) from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def discard(self) -> None:
        """Removes a run folder that never took a step."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Writes plan.json atomically. Raises DiskError."""
        try:
            write_text_atomic(self.path / "plan.json", json.dumps(plan, indent=1) + "\n")
        except OSError as error:
            raise disk_error(error, self.path / "plan.json") from error

    def event(self, name: str, **fields: Any) -> None:
        """Appends one line to events.jsonl. Raises DiskError."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._append(self.events_file, [json.dumps({"time": stamp, "event": name, **fields})])

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends a row to metrics.csv; None becomes an empty field. Raises DiskError."""
        self._append(self.metrics_file, [csv_line(columns.METRICS, row)])

    def append_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to steps.csv. Raises DiskError."""
        self._append(self.steps_file, [csv_line(columns.STEPS, row) for row in rows])

    def begin_gradients(self, layers: Sequence[str], *, step: int) -> None:
        """Makes gradients.csv with its header, or drops the rows after `step` from the one that is there.

        Raises DiskError, and LowmemError if it is another network's."""
        try:
            _cut(self.gradients_file, gradients.columns(layers), "step", step)
        except OSError as error:
            raise disk_error(error, self.gradients_file) from error

    def append_gradients(self, rows: Sequence[tuple[int, int, Sequence[float]]]) -> None:
        """Appends (step, epoch, norms) to gradients.csv. Raises DiskError."""
        self._append(self.gradients_file, [gradients.line(*row) for row in rows])

    def _append(self, path: Path, lines: list[str]) -> None:
        try:
            append_lines(path, lines)
        except OSError as error:
            raise disk_error(error, path) from error

    def copy_metrics(self, source: Path, *, epoch: int) -> None:
        """Takes over the rows of another run's metrics.csv up to `epoch`. Raises DiskError."""
        try:
            shutil.copyfile(source / "metrics.csv", self.metrics_file)
            _cut(self.metrics_file, columns.METRICS, "epoch", epoch)
        except OSError as error:
            raise disk_error(error, self.metrics_file) from error

    def cut_back(self, *, epoch: int, step: int) -> None:
        """Drops rows after `epoch` from metrics.csv and after `step` from steps.csv: what a resume will repeat."""
        try:
            _cut(self.metrics_file, columns.METRICS, "epoch", epoch)
            _cut(self.steps_file, columns.STEPS, "step", step)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def write_config(self, text: str) -> None:
        """Replaces config.yaml, after an operational setting changed. Raises DiskError."""
        try:
            write_text_atomic(self.path / "config.yaml", text)
        except OSError as error:
            raise disk_error(error, self.path / "config.yaml") from error

    def save_weights(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Writes weights/<name>.safetensors atomically, with string metadata. Raises DiskError."""
        from safetensors.torch import save as encode

        path = self.path / "weights" / f"{name}.safetensors"
        try:
            write_bytes_atomic(path, encode(dict(tensors), metadata=dict(metadata)))
        except OSError as error:
            raise disk_error(error, path) from error


def require_run(path: Path) -> None:
    """Raises UsageError unless `path` looks like a run folder."""
    if not path.is_dir():
        raise UsageError(f"{path} does not exist: give the folder of a run, like runs/res110")
    if not (path / "config.yaml").is_file():
        raise UsageError(f"{path} is no run folder (it has no config.yaml): give the folder of a run, like runs/res110")


def _locked(path: Path) -> FileLock:
    # The system frees this lock when the process ends, however it ends: a dead writer leaves nothing behind.
    lock = FileLock(path / "run.lock", timeout=0)
    owner = path / "run.owner.json"
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{path} is being written by {_owner(owner)}: wait for it, or stop it first") from None
    write_text_atomic(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    return lock


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def csv_line(names: Sequence[str], row: Mapping[str, Any]) -> str:
    """One CSV line without its end. Floats keep every digit; None is empty. Raises KeyError for a foreign name."""
    if foreign := set(row) - set(names):
        raise KeyError(f"no such column: {', '.join(sorted(foreign))}")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(["" if row.get(name) is None else row[name] for name in names])
    return buffer.getvalue()


def _cut(path: Path, names: Sequence[str], key: str, last: int) -> None:
    kept = [",".join(names)]
    if path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            if header is not None and header != list(names):
                raise LowmemError(f"{path} has other columns than this lowmem writes: use the lowmem that wrote it")
            column = names.index(key)
            # A line that a crash cut short has too few fields; what it held will be repeated.
            kept += [
                ",".join(fields)
                for fields in reader
                if len(fields) == len(names) and fields[column].isdigit() and int(fields[column]) <= last
            ]
    write_text_atomic(path, "\n".join(kept) + "\n")
