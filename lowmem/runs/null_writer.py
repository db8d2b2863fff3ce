"""What a process has of a run that another one writes: the same methods, and nothing happens.

Of several processes that train a run together rank 0 alone holds its folder and saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lowmem.runs.lock import Owner
from lowmem.runs.saver import Save, Saved, Saver
from lowmem.runs.store import RunFolder

if TYPE_CHECKING:
    from torch import Tensor


class AbsentFolder(RunFolder):
    """Writes nothing. `path` is where the run is for the process that writes it; here there may be nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def taken_over(self) -> Owner | None:
        return None

    @property
    def rows_waiting(self) -> int:
        return 0

    def close(self) -> None: ...

    def tidy(self, *, keep: int, keep_every: int | None = None) -> None: ...

    def discard(self) -> None: ...

    def write_plan(self, plan: Mapping[str, Any], rank: int = 0) -> None: ...

    def forget_plans(self, after: int) -> None: ...

    def update_plan(self, plan: Mapping[str, Any], rank: int = 0) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def append_metrics(self, row: Mapping[str, Any]) -> None: ...

    def append_steps(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def append_gradients(self, rows: Sequence[tuple[int, int, Sequence[float]]]) -> None: ...

    def flush(self) -> None: ...

    def begin_gradients(self, layers: Sequence[str], *, step: int) -> str | None:
        return None

    def copy_metrics(self, source: Path, *, epoch: int) -> None: ...

    def cut_back(self, *, epoch: int, step: int) -> list[str]:
        return []

    def write_config(self, text: str) -> None: ...

    def save_weights(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None: ...


class AbsentSaver(Saver):
    """Saves nothing, waits for nothing."""

    def __init__(self) -> None: ...

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    @property
    def longest_write_seconds(self) -> float:
        return 0.0

    @property
    def last_saved(self) -> Saved | None:
        return None

    def poll(self) -> None: ...

    def wait(self) -> None: ...

    def submit(self, save: Save) -> None: ...

    def drop(self) -> None: ...

    def finish(self, hurried: Callable[[], bool] = lambda: False) -> None: ...
