"""A run, read from its folder by the one reader there is: for resume, report, ls, watch, verify, fork and reproduce.

No torch: a report is written on any machine, and `lowmem ls` must be there at once. Nothing is written. A half-written
last line is left out and noted. Any other damage of `config.yaml` or of a table is an error that names the file and the
line. What only colours a report (`env.json`, `events.jsonl`, the weights' metadata) is left out and noted where it
cannot be read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lowmem.config.paths import as_meant
from lowmem.config.schema import Config
from lowmem.config.settings import Settings, from_yaml
from lowmem.core.errors import CorruptCheckpoint, LowmemError, UsageError
from lowmem.core.reading import PLAN_LIMIT_BYTES, RECORD_LIMIT_BYTES, TABLE_LIMIT_BYTES, Unreadable, read_json, shorten
from lowmem.runs.checkpoint import checkpoint_folders
from lowmem.runs.checkpoint_state import Position, read_position
from lowmem.runs.folder import require_run, run_folders
from lowmem.runs.lock import OWNER_NAME, writer_of
from lowmem.runs.rows import (
    EPOCH_TABLE,
    GRADIENT_TABLE,
    STEP_TABLE,
    EpochRow,
    Event,
    GradientRows,
    Row,
    RowTable,
    StepRow,
)
from lowmem.runs.tables import read_events, read_table
from lowmem.runs.weights import WeightsInfo, read_weights

State = Literal[
    "starting", "training", "finished", "finished early", "stopped", "out of time", "interrupted", "diverged", "stuck",
    "ended", "died",
]  # fmt: skip
# What to type when nobody trains it any more, by how it stands.
NEXT_COMMANDS: dict[State, str] = {
    **dict.fromkeys(("interrupted", "died", "ended"), "`lowmem resume {run}` goes on with it"),
    "stopped": "`lowmem resume {run} --set train.max_steps=null` goes on to the end, `lowmem resume {run} --set "
    "train.max_steps=N` to another step",
    "out of time": "`lowmem resume {run} --hours H` goes on until it was trained for H hours in all, `lowmem resume "
    "{run} --set train.hours=null` to the end",
    "finished early": "`lowmem report {run}` draws the curves; `lowmem resume {run} --patience N` waits N epochs for a "
    "better error, `lowmem resume {run} --set train.patience=null` goes on to the last epoch",
    "finished": "`lowmem report {run}` draws the curves; `lowmem resume {run} --epochs N` trains it for longer, in a "
    "new run",
}
_ENDS: dict[str, State] = {"stop": "stopped", "signal": "interrupted", "diverged": "diverged", "stuck": "stuck"}


class RunView:
    """A run folder. Each part is read when it is asked for first, and kept. Raises UsageError for what is damaged.
    `notes`: what was left out of the parts that were read, and why; `damaged_checkpoints`: why those are none that
    are not among `checkpoints`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        self.damaged_checkpoints: list[str] = []

    @property
    def name(self) -> str:
        return shorten(self.path.resolve().name)  # "." and "runs/res20/" have a name as well

    # -- settings, machine, plan -----------------------------------------------------------------------------------

    @cached_property
    def config(self) -> Config:
        return from_yaml(self.path / "config.yaml").config

    @cached_property
    def env(self) -> Mapping[str, object]:
        """Hardware and versions where the run began; empty where they are not known."""
        values = self._record("env.json", PLAN_LIMIT_BYTES)  # there may be many classes
        if values is None and os.path.exists(self.path / "env.json"):
            self.notes.append("env.json cannot be read: hardware and versions are unknown")
        return values or {}

    @cached_property
    def budget_bytes(self) -> int | None:
        """Of the plan, for tensors."""
        size = (self._record("plan.json", PLAN_LIMIT_BYTES) or {}).get("budget_bytes")
        return size if type(size) is int and 0 < size < 1 << 62 else None

    @cached_property
    def in_host_memory(self) -> tuple[int | None, float | None]:
        """As the plan predicts: bytes that wait there (None: nothing does), and the share of their transfer's seconds
        beside which it computes (None: not recorded)."""
        predicted = (self._record("plan.json", PLAN_LIMIT_BYTES) or {}).get("predicted")
        known = predicted if isinstance(predicted, dict) else {}
        size, share = known.get("host_bytes"), known.get("hidden_share")
        if type(size) is not int or not 0 < size < 1 << 62:
            return None, None
        return size, share if type(share) is float and 0 <= share <= 1 else None

    def _record(self, name: str, limit_bytes: int = RECORD_LIMIT_BYTES) -> dict[str, Any] | None:
        try:
            values = read_json(self.path / name, limit_bytes)
        except (Unreadable, OSError):
            return None
        return values if isinstance(values, dict) else None

    # -- rows ------------------------------------------------------------------------------------------------------

    @cached_property
    def epochs(self) -> tuple[EpochRow, ...]:
        return self._rows(EPOCH_TABLE)[1]

    @cached_property
    def steps(self) -> tuple[StepRow, ...]:
        return self._rows(STEP_TABLE)[1]

    @cached_property
    def gradients(self) -> GradientRows:
        table, rows = self._rows(GRADIENT_TABLE)
        return GradientRows(table.names[2:], rows)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        return read_events(self.path / "events.jsonl", self.notes)

    def _rows(self, table: RowTable[Row]) -> tuple[RowTable[Row], tuple[Row, ...]]:
        """A run that records every step of small batches may write more than there is room for: not its fault."""
        path = self.path / table.file_name
        if table.key == "step" and path.is_file() and (size := path.stat().st_size) > TABLE_LIMIT_BYTES:
            self.notes.append(f"{path.name} has {size:,} bytes, more than are read: what it holds is left out")
            return table, ()
        return read_table(path, table, self.notes)

    @property
    def last(self) -> EpochRow | None:
        """The newest completed epoch, or None before the first."""
        return self.epochs[-1] if self.epochs else None

    @property
    def epochs_done(self) -> int:
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def times_resumed(self) -> int:
        return sum(event.kind == "resume" for event in self.events)

    # -- weights and checkpoints -----------------------------------------------------------------------------------

    @cached_property
    def best(self) -> WeightsInfo | None:
        """What weights/best.safetensors says of itself."""
        try:
            return read_weights(self.path / "weights" / "best.safetensors")[1]
        except FileNotFoundError:
            return None
        except (Unreadable, OSError):
            self.notes.append("weights/best.safetensors cannot be read")
            return None

    @cached_property
    def classes(self) -> int | None:
        """How many, by what the exported weights say or their last layer has, else by the data set's name."""
        for name in ("last.safetensors", "best.safetensors"):
            with suppress(Unreadable, OSError, LookupError):
                shapes, info = read_weights(self.path / "weights" / name)
                return len(info.classes) if info.classes else shapes["linear.bias"][0]
        return {"cifar10": 10, "fashion-mnist": 10, "cifar100": 100}.get(self.config.data.source)

    @cached_property
    def checkpoints(self) -> tuple[Position, ...]:
        """Those that look whole (their hashes are not computed), newest first."""
        positions = []
        try:
            for path in checkpoint_folders(self.path / "checkpoints"):
                try:
                    positions.append(read_position(path))
                except CorruptCheckpoint as error:
                    if os.path.lexists(path):  # else it was pruned meanwhile
                        self.damaged_checkpoints.append(f"a checkpoint is damaged: {error}")
        except CorruptCheckpoint as error:
            self.damaged_checkpoints.append(shorten(error, 1000))
        return tuple(positions)

    # -- how it stands ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """As its files tell: whether a process holds it now is another question (`lock.writer_of`)."""
        return state_of(self.path, self.config, position_of(self.checkpoints, self.epochs), self.events)


def position_of(checkpoints: Sequence[Position], rows: Sequence[EpochRow]) -> tuple[int, int]:
    """Epochs and steps that a resume does not repeat: of the newest checkpoint, else of the last row."""
    newest: Sequence[Position | EpochRow] = checkpoints[:1] or rows[-1:]
    return next(((last.epoch, last.step) for last in newest), (0, 0))


def state_of(path: Path, config: Config | None, position: tuple[int, int], events: Sequence[Event]) -> State:
    """How a run stands that no process holds. What an earlier process said at its end does not count once another has
    begun; one that left its owner file has died."""
    epoch, step = position
    epochs, max_steps = (None, None) if config is None else (config.train.epochs, config.train.max_steps)
    if epochs is not None and epoch >= epochs:
        return "finished"  # even if it was killed before it could say so
    for event in reversed(events):
        if event.kind == "done" and event.detail.get("reason") == "train.patience":
            return "finished early"
        if event.kind == "done":
            return "finished" if epochs in (None, event.detail.get("epoch")) else "stopped"
        if event.kind == "stop" and event.detail.get("reason") == "train.hours":
            return "out of time"
        if event.kind in ("start", "resume"):
            break
        if event.kind in _ENDS and (event.kind != "stuck" or event.detail.get("stopped") is True):
            return _ENDS[event.kind]
    if max_steps is not None and step >= max_steps:
        return "stopped"
    return "died" if (path / OWNER_NAME).exists() else "ended"


def recorded_settings(path: Path) -> Settings:
    """The settings of an existing run, as they are meant where it was begun. Raises UsageError if it is none."""
    require_run(path)
    return as_meant(from_yaml(path / "config.yaml"), path, RunView(path).env.get("started_in"))


def read_run(path: Path) -> RunView:
    """Everything in a run folder. Raises UsageError if there is none, or if it is damaged as the module's text says."""
    require_run(Path(path))
    view = RunView(path)
    for part in ("config", "env", "epochs", "steps", "events", "best", "classes", "gradients"):
        getattr(view, part)
    return view


# -- the runs in a folder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run in a line. `stopped`: as asked, by train.max_steps or train.hours. `writer`: who trains it now, if
    anybody. `epoch`: completed ones. `error_on`: the pictures by which the best epoch is told, `val` if any are held
    back, else `test`. `checkpoints`: oldest first. Unknown is None."""

    path: Path
    state: Literal["training", "finished", "stopped", "interrupted", "never started", "damaged"]
    config: Config | None = None
    writer: str | None = None
    epoch: int | None = None
    step: int | None = None
    error_on: str | None = None
    last_error_pct: float | None = None
    best_error_pct: float | None = None
    best_epoch: int | None = None
    size_bytes: int = 0
    checkpoints: tuple[Position, ...] = ()
    trouble: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        model, train = (self.config.model, self.config.train) if self.config else (None, None)
        known = {name: value for name, value in vars(self).items() if name != "config"}
        return known | {
            "path": str(self.path),
            **dict.fromkeys(("arch", "block", "width", "spec", "args")),
            **({name: value for name, value in model.given.items() if name != "sha256"} if model else {}),
            "epochs": train.epochs if train else None,
            "checkpoints": [{"at": kept.at, "epoch": kept.epoch, "step": kept.step} for kept in self.checkpoints],
        }


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs in `folder` (or `folder` itself, if it is one) by name. Raises UsageError if there is no such folder."""
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} does not exist: give the folder that holds the runs, like runs")
    return [summarize(path) for path in run_folders(folder)]


def summarize(path: Path) -> RunSummary:
    """One run, whatever became of it: one bad folder must not hide the others."""
    run, writer = RunView(path), writer_of(path)
    known: dict[str, Any] = {"path": path, "writer": writer, "size_bytes": _size_bytes(path)}
    known["checkpoints"], trouble = run.checkpoints[::-1], tuple(run.damaged_checkpoints)
    try:
        config, rows = run.config, run.epochs
        epoch, step = position_of(run.checkpoints, rows)
        notes, state = tuple(run.notes), run.state
        known |= {"config": config, "epoch": epoch, "step": step, **errors_of(rows, run.events)}
        words: Any = {"finished early": "finished", "out of time": "stopped"}.get(state, state)
        words = words if words in ("finished", "stopped") else "interrupted" if step else "never started"
        if not run.checkpoints and (rows or trouble) and words != "finished":
            words, trouble = "damaged", (*trouble, "no usable checkpoint to go on from")
        trouble = (*trouble, *notes)
    except (LowmemError, OSError) as error:
        words, trouble = "damaged", (shorten(error, 1000), *trouble)
    # While somebody writes it, what was half written this moment is no damage.
    return RunSummary(state=words if writer is None else "training", trouble=trouble, **known)


def errors_of(rows: tuple[EpochRow, ...], events: Sequence[Event]) -> dict[str, Any]:
    """The fields of `RunSummary` on errors; none before the first epoch. The best is one of the epochs since a fork, as
    the best weights are."""
    if not rows:
        return {}
    on = "val" if any(row.val_error_pct is not None for row in rows) else "test"
    errors = [(getattr(row, f"{on}_error_pct"), row.epoch) for row in rows]
    finite = [(error, epoch) for error, epoch in errors if error is not None and math.isfinite(error)]
    last = finite[-1][0] if finite[-1:] == errors[-1:] else None
    forks = (event.detail.get("epoch") for event in events if event.kind == "fork")
    since = max((epoch for epoch in forks if isinstance(epoch, int)), default=0)
    best = min((one for one in finite if one[1] > since), default=(None, None))
    return {"error_on": on, "last_error_pct": last, "best_error_pct": best[0], "best_epoch": best[1]}


def _size_bytes(path: Path) -> int:
    """Of all files below, links not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
