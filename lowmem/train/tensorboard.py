"""TensorBoard while a run is trained: whenever rows have come, they are exported (see `lowmem.runs.event_files`).

Nothing of it can stop or change a run: what goes wrong is said once, and the tables have everything all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.config.schema import Config
from lowmem.runs.event_files import EventFiles, require_tensorboard
from lowmem.train.observer import Observer, Progress

if TYPE_CHECKING:
    from lowmem.train.loop import Trainer


def check_board(config: Config) -> None:
    """Raises PreflightError if event files are wanted and cannot be written here."""
    if config.train.tensorboard:
        require_tensorboard()


@contextmanager
def exporting(trainer: Trainer, run: Path) -> Iterator[None]:
    """While inside, what the trainer tells its observer of also keeps the run's event file up to date, if that is
    wanted; at the end with the last rows."""
    if not trainer.config.train.tensorboard:
        yield
        return
    told = trainer.observer
    board = trainer.observer = BoardObserver(told, EventFiles(run))
    board.export()
    try:
        yield
    finally:
        board.export()
        board.files.close()
        trainer.observer = told


class BoardObserver(Observer):
    """Passes everything on, and exports when rows were written."""

    def __init__(self, observer: Observer, files: EventFiles) -> None:
        self.files = files
        self._told = observer
        self._warned = False

    def export(self) -> None:
        """Never raises an Exception: a full disk, or a file that somebody else holds, is no reason to stop a run."""
        try:
            self.files.update()
        except Exception as error:
            self.files.close()
            if not self._warned:
                self._warned = True
                reason = getattr(error, "strerror", None) or error
                self._told.warning(
                    f"{self.files.folder} cannot be written ({reason}): training goes on, and TensorBoard's curves "
                    "are made up for as soon as it can"
                )

    def note(self, text: str) -> None:
        self._told.note(text)

    def warning(self, text: str) -> None:
        self._told.warning(text)

    def progress(self, progress: Progress) -> None:
        self._told.progress(progress)
        self.export()

    def data_progress(self, what: str, done: int, total: int) -> None:
        self._told.data_progress(what, done, total)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self._told.epoch(row, epochs)
        self.export()

    def close(self) -> None:
        self._told.close()
