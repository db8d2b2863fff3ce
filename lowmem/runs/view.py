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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lowmem.config.schema import Config
from lowmem.config.settings import Settings, from_yaml
from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import PLAN_LIMIT_BYTES, TABLE_LIMIT_BYTES, Unreadable, read_json, shorten
from lowmem.runs.checkpoint import checkpoint_folders
from lowmem.runs.checkpoint_state import Position, read_header, read_position
from lowmem.runs.lock import OWNER_NAME
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, EpochRow, Event, Gradients, Row, RowTable, StepRow
from lowmem.runs.setup import require_run
from lowmem.runs.tables import read_events, read_table

State = Literal["starting", "training", "finished", "stopped", "interrupted", "diverged", "stuck", "ended", "died"]
_ENDS: dict[str, State] = {"stop": "stopped", "signal": "interrupted", "diverged": "diverged", "stuck": "stuck"}


@dataclass(frozen=True)
class BestWeights:
    """What weights/best.safetensors says of itself. `chosen_on`: "val" or "test", the pictures it was chosen on."""

    epoch: int | None
    step: int | None
    error_pct: float | None
    chosen_on: str | None


class RunView:
    """A run folder. Each part is read when it is asked for first, and kept. Raises UsageError for what is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._notes: list[str] = []

    @property
    def name(self) -> str:
        return shorten(self.path.resolve().name)  # "." and "runs/res20/" have a name as well

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the parts that were read, and why."""
        return tuple(self._notes)

    # -- settings, machine, plan -----------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Settings:
        return from_yaml(self.path / "config.yaml")

    @property
    def config(self) -> Config:
        return self.settings.config

    @cached_property
    def env(self) -> Mapping[str, object]:
        """Hardware and versions where the run began; empty where they are not known."""
        try:
            values = read_json(self.path / "env.json")
        except FileNotFoundError:
            return {}
        except (Unreadable, OSError):
            values = None
        if not isinstance(values, dict):
            self._notes.append("env.json cannot be read: hardware and versions are unknown")
            return {}
        return values

    @cached_property
    def budget_bytes(self) -> int | None:
        """Of the plan, for tensors."""
        try:
            values = read_json(self.path / "plan.json", PLAN_LIMIT_BYTES)
        except (Unreadable, OSError):
            return None
        size = values.get("budget_bytes") if isinstance(values, dict) else None
        return size if type(size) is int and 0 < size < 1 << 62 else None

    # -- rows ------------------------------------------------------------------------------------------------------

    @cached_property
    def epochs(self) -> tuple[EpochRow, ...]:
        return self._rows(EPOCH_TABLE)

    @cached_property
    def steps(self) -> tuple[StepRow, ...]:
        return () if self._is_too_large(STEP_TABLE) else self._rows(STEP_TABLE)

    @cached_property
    def gradients(self) -> Gradients:
        if self._is_too_large(GRADIENT_TABLE):
            return Gradients()
        table, rows = read_table(self.path / GRADIENT_TABLE.file_name, GRADIENT_TABLE, self._notes)
        return Gradients(table.names[2:], rows)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        return read_events(self.path / "events.jsonl", self._notes)

    def _rows(self, table: RowTable[Row]) -> tuple[Row, ...]:
        return read_table(self.path / table.file_name, table, self._notes)[1]

    def _is_too_large(self, table: RowTable[Any]) -> bool:
        """A run that records every step of small batches may write more than there is room for: not its fault."""
        path = self.path / table.file_name
        size = path.stat().st_size if path.is_file() else 0
        if size > TABLE_LIMIT_BYTES:
            self._notes.append(f"{path.name} has {size:,} bytes, more than are read: what it holds is left out")
        return size > TABLE_LIMIT_BYTES

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
    def best(self) -> BestWeights | None:
        try:
            metadata = read_header(self.path / "weights" / "best.safetensors").metadata
        except FileNotFoundError:
            return None
        except (Unreadable, OSError):
            self._notes.append("weights/best.safetensors cannot be read")
            return None
        epoch, step = (_number(metadata.get(name)) for name in ("epoch", "step"))
        return BestWeights(
            epoch=None if epoch is None else int(epoch),
            step=None if step is None else int(step),
            error_pct=_number(metadata.get("error_pct")),
            chosen_on=metadata.get("chosen_on") or None,
        )

    @cached_property
    def classes(self) -> int | None:
        """Outputs of the network: by the exported weights' last layer, else by what the data set is known to have."""
        for name in ("last.safetensors", "best.safetensors"):
            try:
                return read_header(self.path / "weights" / name).shapes["linear.bias"][0]
            except (Unreadable, OSError, LookupError):
                continue
        return 10 if self.config.data.source in {"cifar10", "fashion-mnist"} else None

    @cached_property
    def checkpoints(self) -> tuple[Position, ...]:
        """Those that look whole (their hashes are not computed), newest first."""
        return self._positions[0]

    @property
    def damaged_checkpoints(self) -> tuple[str, ...]:
        """Why the others are none."""
        return self._positions[1]

    @cached_property
    def _positions(self) -> tuple[tuple[Position, ...], tuple[str, ...]]:
        positions, trouble = [], []
        try:
            paths = checkpoint_folders(self.path / "checkpoints")
        except (CorruptCheckpoint, OSError) as error:
            return (), (shorten(error, 1000),)
        for path in paths:
            try:
                positions.append(read_position(path))
            except CorruptCheckpoint as error:
                if os.path.lexists(path):  # else it was pruned meanwhile
                    trouble.append(f"a checkpoint is damaged: {error}")
        return tuple(positions), tuple(trouble)

    # -- how it stands ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> tuple[int, int]:
        """Epochs and steps that a resume does not repeat: of the newest checkpoint, else (a folder that has none any
        more) of the last row."""
        for newest in self.checkpoints[:1]:
            return newest.epoch, newest.step
        return (self.epochs[-1].epoch, self.epochs[-1].step) if self.epochs else (0, 0)

    @property
    def state(self) -> State:
        """As its files tell: whether a process holds it now is another question (`lock.writer_of`)."""
        return state_of(self.config, *self.position, self.events, left_owner=(self.path / OWNER_NAME).exists())


def state_of(config: Config | None, epoch: int, step: int, events: Sequence[Event], *, left_owner: bool) -> State:
    """How a run stands that no process holds, with `epoch` epochs and `step` steps on disk. `left_owner`: a process
    ended without leaving it. What an earlier process said at its end does not count once another has begun."""
    epochs, max_steps = (None, None) if config is None else (config.train.epochs, config.train.max_steps)
    if epochs is not None and epoch >= epochs:
        return "finished"  # even if it was killed before it could say so
    for event in reversed(events):
        if event.kind == "done":
            return "finished" if epochs in (None, event.detail.get("epoch")) else "stopped"
        if event.kind in ("start", "resume"):
            break
        if event.kind == "stuck" and event.detail.get("stopped") is not True:
            continue
        if event.kind in _ENDS:
            return _ENDS[event.kind]
    if max_steps is not None and step >= max_steps:
        return "stopped"
    return "died" if left_owner else "ended"


def recorded_settings(path: Path) -> Settings:
    """The settings of an existing run. Raises UsageError if it is none."""
    require_run(path)
    return from_yaml(path / "config.yaml")


def read_run(path: Path) -> RunView:
    """Everything in a run folder. Raises UsageError if there is none at `path`, or if it is damaged (see the module's
    text)."""
    require_run(Path(path))
    view = RunView(path)
    for part in ("config", "env", "epochs", "steps", "events", "best", "classes", "gradients"):
        getattr(view, part)
    return view


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
