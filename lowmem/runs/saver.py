"""Checkpoints in the background: training hands over a copy of its state and goes on; a thread writes it. The order on
disk is that of a save in the foreground, at any moment of a kill: the rows up to the checkpoint, the exported weights,
the checkpoint with its commit record (invariant 9), then the event that says so.

One save at a time, each try in a thread of its own. A second save waits for one that is being written, so that there is
one copy in host memory; one that the disk refused it supersedes, with the exported weights it does not have itself. So
a kill loses what was done since the save before the latest, at most. What the disk refuses `poll` tries again after
growing pauses, until `PAUSES_SECONDS` end or the next save is handed over. Known limitation: a disk that neither writes
nor refuses (a network folder whose server is gone) holds up training at the next save.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.core.errors import CorruptCheckpoint, DiskError, LowmemError, OutOfMemory
from lowmem.core.units import format_duration
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.store import RunFolder
from lowmem.runs.weights import WeightsInfo

if TYPE_CHECKING:
    from torch import Tensor

Weights = tuple[Mapping[str, "Tensor"], WeightsInfo]

PAUSES_SECONDS = (5.0, 15.0, 45.0, 135.0, 405.0)  # ten minutes in all: the default between two saves
FINAL_PAUSES_SECONDS = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # at the end of a run there is nothing to go on with
HURRIED_TRIES = 3  # after a signal: somebody waits for the process to leave
_HURRIED_PAUSE_SECONDS = 1.0
_SLICE_SECONDS = 0.2  # on Windows a wait without end cannot be interrupted by Ctrl-C


@dataclass(frozen=True)
class Save:
    """What one save writes. `epoch`: completed ones. `weights`: for weights/<name>.safetensors; the tensors may be the
    checkpoint's own. Nobody may change any of it any more. `taken_at`: when it was copied, by the monotonic clock."""

    checkpoint: Checkpoint
    epoch: int
    weights: Mapping[str, Weights] = field(default_factory=dict)
    taken_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint; `at`: when it was committed (None: by another process), by the monotonic clock."""

    path: Path
    step: int
    at: float | None = None
    taken_at: float | None = None

    def __str__(self) -> str:
        ago = "" if self.at is None else f", {format_duration(time.monotonic() - self.at)} ago"
        return f"step {self.step} ({self.path}{ago})"


class Saver(AbstractContextManager["Saver"]):
    """Writes the saves of one run. Its methods are for one thread, the one that trains, in which `warn` and `note` are
    called. All of them raise what ended the writing thread otherwise than by a refusal, which is a bug."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        keep: int,
        keep_every: int | None = None,
        warn: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._warn, self._note = warn, note
        self._save: Save | None = None  # that is not on disk
        self._thread: threading.Thread | None = None  # that writes it
        self._pauses = iter(PAUSES_SECONDS)  # before the next tries of what was handed over last
        self._due: float | None = None  # of the next try; None: not before the next save
        self._troubled = self._told = False  # since the last checkpoint; told of since the last save handed over
        # What the thread leaves behind.
        newest = folder.newest_checkpoint()
        self.last_saved = None if newest is None else Saved(newest, checkpoints.step_of(newest))  # that is committed
        self.longest_write_seconds = 0.0  # of the saves of this process
        self._failure: LowmemError | None = None  # of the last try
        self._bug: BaseException | None = None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Lets a write that has begun end; what the disk refused is dropped (`finish` is there to insist)."""
        with nullcontext() if error is None else suppress(Exception):  # the error that is under way says more
            self._settle()

    def poll(self) -> None:
        """Says what happened meanwhile and begins another try that is due. Costs nothing otherwise."""
        self._collect()
        if self._folder.rows_waiting and not self._troubled:
            self._trouble(f"the disk refuses rows of {self._folder.path}: they are kept in memory and written later")
        if self._thread is None and self._due is not None and self._due <= time.monotonic():
            self._begin()

    def wait(self) -> None:
        """Until nothing is being written: all is saved, or was refused and waits for another try."""
        self._settle()
        self.poll()

    def submit(self, save: Save) -> None:
        """Hands a save over and returns, after `wait`; best called before that is copied which is to be saved."""
        self._settle()
        if self._save is not None:
            save = replace(save, weights={**self._save.weights, **save.weights})
        if self._save is None or self._due is None:
            self._pauses, self._due, self._told = iter(PAUSES_SECONDS), time.monotonic(), False
        self._save = save  # if a pause goes on, the next try is of this one
        self.poll()

    def drop(self) -> None:
        """Forgets a save that the disk refused, after `wait`: for a run that goes back to the last checkpoint."""
        self._settle()
        self._save = self._due = self._failure = None
        self.poll()

    def finish(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """Until everything is on disk, rows included. `hurried`: whether somebody waits for the process to leave.
        Raises DiskError (or OutOfMemory), saying what was saved last and where, if that cannot be done within some
        minutes; within seconds, if hurried."""
        failure: LowmemError | None = None
        for count, pause in enumerate((0.0, *FINAL_PAUSES_SECONDS), start=1):
            if count > HURRIED_TRIES and hurried():
                break
            self._rest(pause, hurried)
            if self._save is not None and self._thread is None:
                self._begin()
            self._settle()
            failure = self._failure
            self.poll()
            if failure is None:
                try:
                    return self._folder.flush()
                except DiskError as error:
                    failure = error
        assert failure is not None
        last = "nothing was saved before" if self.last_saved is None else f"saved last is {self.last_saved}"
        way_out = f"then go on from there with `lowmem resume {self._folder.path}`"
        raise type(failure)(f"the last save failed: {failure}; {last}; {way_out}")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _rest(self, seconds: float, hurried: Callable[[], bool]) -> None:
        began = time.monotonic()
        while (passed := time.monotonic() - began) < (min(seconds, _HURRIED_PAUSE_SECONDS) if hurried() else seconds):
            self.poll()
            time.sleep(min(seconds - passed, _SLICE_SECONDS))

    def _begin(self) -> None:
        assert self._save is not None
        self._failure, self._due = None, None
        self._thread = threading.Thread(target=self._write, args=(self._save,), name="lowmem-saver", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no other thread: in this one, then
            self._write(self._save)

    def _settle(self) -> None:
        """Until nothing is being written."""
        self._collect()
        while self._thread is not None:
            self._thread.join(_SLICE_SECONDS)
            self._collect()

    def _collect(self) -> None:
        """What came of a try that has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            if self._bug is None:
                self._conclude()
        if self._bug is not None:
            raise self._bug

    def _conclude(self) -> None:
        assert self._save is not None
        step = self._save.checkpoint.step
        if self._failure is None:
            self._save = None
            if self._troubled:
                self._troubled = False
                self._note(f"saved again: step {step} is on disk")
            return
        pause = next(self._pauses, None)
        self._due = None if pause is None else time.monotonic() + pause
        if not self._told:
            stands = f"{self.last_saved} stands" if self.last_saved else "there is none before it"
            again = "with the next save" if pause is None else f"in {pause:g} s"
            self._trouble(f"step {step} was not saved ({self._failure}); {stands}; trying again {again}")

    def _trouble(self, text: str) -> None:
        """Once for each stretch of trouble, to the user and into the run's own record."""
        self._troubled = self._told = True
        self._folder.event("warning", what=text)
        self._warn(text)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _write(self, save: Save) -> None:
        """One try. Nothing of it is held when this returns: neither the copies, nor by the frames of a traceback what
        was made of them."""
        began = time.monotonic()
        try:
            self._folder.flush()
            for name, (tensors, info) in save.weights.items():
                self._folder.save_weights(name, tensors, info)
            where, keep_every = self._folder.checkpoints, self._keep_every
            path = checkpoints.save(where, save.checkpoint, keep=self._keep, keep_every=keep_every)
            now = time.monotonic()
            self.last_saved = Saved(path, save.checkpoint.step, now, save.taken_at)
            self.longest_write_seconds = max(self.longest_write_seconds, now - began)
            self._folder.event("checkpoint", epoch=save.epoch, step=save.checkpoint.step)
        except (DiskError, CorruptCheckpoint, OSError) as error:
            self._failure = DiskError(str(error))
        except (OutOfMemory, MemoryError) as error:
            self._failure = OutOfMemory("out of memory" if isinstance(error, MemoryError) else str(error))
        except BaseException as error:
            self._bug = error
