"""How several processes begin and go on with one run: who reads, who writes, who takes which part of the batch.

Rank 0 reads and writes the run's folder, and tells the others what they need; they need not see its disk. Pictures are
read by every process. In one process alone all of this is what it was.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import lowmem
from lowmem.config.schema import Config, flatten, nest
from lowmem.config.settings import Settings
from lowmem.core.errors import Diverged, PreflightError, UsageError
from lowmem.core.reading import PLAN_LIMIT_BYTES, read_json
from lowmem.data import Dataset, load
from lowmem.distributed.group import Group, join
from lowmem.distributed.launch import Launch
from lowmem.distributed.split import Split
from lowmem.runs.null_writer import AbsentFolder
from lowmem.runs.setup import never_began
from lowmem.runs.store import RunFolder, leaving_no_trace
from lowmem.train.observer import Observer
from lowmem.train.state import config_hash


def launched(observer: Observer | None, device: str = "auto") -> tuple[Launch | None, Observer]:
    """How this process was started, with its CUDA device taken if it may want one, and whom it talks to: rank 0 alone
    talks to the user.

    Raises UsageError, PreflightError. To be called before CUDA is used."""
    launch = Launch.of_environment()
    if launch is None:
        return None, observer or Observer()
    if device != "cpu":
        launch.take_device()
    return launch, observer or Observer() if launch.rank == 0 else Observer()


@contextmanager
def joined(launch: Launch | None, config: Config) -> Iterator[Group]:
    """The group of this process. Raises PeerLost, UsageError if the processes are not alike: on devices of different
    types, or with different versions."""
    with join(launch, config.train.device, 60 * config.train.peer_timeout_minutes) as group:
        with group.alike():
            _require_one(group, "devices", config.train.device, "give all of them --device cpu, or each a card")
            versions = f"lowmem {lowmem.__version__}, torch {torch.__version__}"
            _require_one(group, "versions", versions, "install the same everywhere")
        yield group


def _require_one(group: Group, what: str, value: str, way_out: str) -> None:
    values = group.gather(value)
    if len(set(values)) > 1:
        told = "; ".join(f"process {rank}: {one}" for rank, one in enumerate(values))
        raise UsageError(f"the processes have different {what} ({told}): {way_out}")


def require_pictures(group: Group, config: Config) -> None:
    """Raises UsageError for a batch that cannot be split."""
    with group.alike():
        if group.size > config.train.batch:
            raise UsageError(
                f"a batch of {config.train.batch} cannot be split over {group.size} processes: raise --batch, or start "
                "fewer"
            )


def share_settings(group: Group, read: Callable[[], Settings]) -> Settings:
    """What `read` gives in rank 0, in every process."""
    mine = group.lead(lambda: _read_here(group, read), None)
    told = group.share(None if mine is None else [flatten(mine.config), dict(mine.sources)])
    if mine is not None:
        return mine
    values, sources = told
    return Settings(Config.model_validate(nest(values)), sources)


def _read_here(group: Group, read: Callable[[], Settings]) -> Settings:
    try:
        return read()
    except UsageError as error:
        if group.alone:
            raise
        raise UsageError(
            f"{error} (looked for by process 0, on {socket.gethostname()}: with several machines the one that has the "
            "run must be rank 0, by `torchrun --node-rank=0 --master-addr=HOST`, or the folder must be a shared one)"
        ) from None


def load_data(group: Group, config: Config, observer: Observer) -> Dataset:
    """The data set, read by one process of each machine and then by the others, which find it decoded.

    Raises DataError, PreflightError if machines have different pictures."""

    def read(turn: bool) -> Dataset | None:
        return load(config.data, config.seed, progress=observer.data_progress) if turn else None

    first = group.together(lambda: read(group.local_rank == 0))
    others = group.together(lambda: read(group.local_rank != 0))
    dataset = first or others
    assert dataset is not None
    with group.alike():
        if len(set(group.gather(dataset.fingerprint))) > 1:
            raise PreflightError("the processes have different pictures: give all machines the same data")
    return dataset


@contextmanager
def new_folder(group: Group, path: Path, config_yaml: str, environment: Mapping[str, Any]) -> Iterator[RunFolder]:
    """The folder of a new run, for the process that writes it."""
    with leaving_no_trace(path) if group.leads else nullcontext():
        absent: RunFolder = AbsentFolder(path)
        with group.lead(lambda: RunFolder.create(path, config_yaml, environment), absent) as folder:
            yield folder


def begun_before(group: Group, path: Path, config: Config) -> bool:
    """Whether torchrun has started these processes again after a failure, and it was they who began this run, with
    these settings. Raises Diverged if the run then stopped as it was asked to: starting again does not undo that."""

    def look() -> bool:
        environment = path / "env.json"
        if group.restarts == 0 or not (path / "config.yaml").is_file() or not environment.is_file():
            return False
        known = read_json(environment, PLAN_LIMIT_BYTES)
        mine = {"asked": config_hash(config), "launcher": launcher()}
        if not isinstance(known, dict) or {key: known.get(key) for key in mine} != mine or never_began(path):
            return False
        _refuse_stopped(path)
        return True

    return bool(group.share(group.lead(look, False)))


def _refuse_stopped(path: Path) -> None:
    events = path / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    if last.get("event") == "diverged" or (last.get("event") == "stuck" and last.get("stopped")):
        raise Diverged(f"{path} was stopped before this restart, as asked: {last.get('why') or 'it learns nothing'}")


def launcher() -> int | None:
    """The process that started this one, if that is torchrun: it outlives those that it starts again."""
    return None if Launch.of_environment() is None else os.getppid()


def norm_words(group: Group, config: Config, split: Split) -> str:
    """What batch norm sees, which several processes must say."""
    shares = " + ".join(map(str, split.shares))
    head = f"{group.size} processes: a batch of {split.batch} is {shares} pictures"
    if config.train.sync_bn:
        return f"{head}; batch norm is over all of them (train.sync_bn), as in one process"
    return f"{head}; each one's batch norm sees its own only, as is usual (--sync-bn: all of them, as in one process)"


def changed_words(before: int, group: Group, config: Config) -> str:
    """What a resume on another number of processes must say."""
    stays = "the same pictures in the same order, the same batch and learning rates"
    told = f"saved by {_count(before)}, going on with {_count(group.size)}: {stays}"
    if config.train.sync_bn:
        return f"{told}; sums have another rounding, so that from here on it is not bit for bit the run that it was"
    sees = "the whole batch at once" if group.alone else "each process's own pictures"
    return (
        f"{told}; but batch norm now sees {sees}, so that from here on gradients are not those that the run would have "
        "had"
    )


def _count(size: int) -> str:
    return "1 process" if size == 1 else f"{size} processes"
