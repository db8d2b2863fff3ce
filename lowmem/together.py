"""How several processes begin and go on with one run: who reads, who writes, who takes which part of the batch.

Rank 0 reads and writes the run's folder, and tells the others what they need; they need not see its disk. Pictures are
read by every process. In one process alone all of this is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from lowmem.config import Config, flatten, nest
from lowmem.data import Dataset, load
from lowmem.distributed.group import Group, join
from lowmem.distributed.launch import Launch
from lowmem.errors import PreflightError, UsageError
from lowmem.reading import PLAN_LIMIT_BYTES, read_json
from lowmem.runs.absent import AbsentFolder
from lowmem.runs.store import RunFolder, leaving_no_trace
from lowmem.settings import Settings
from lowmem.train.observer import Observer
from lowmem.train.state import config_hash

T = TypeVar("T")


def launched(observer: Observer | None) -> tuple[Launch | None, Observer]:
    """How this process was started, with its CUDA device taken, and whom it talks to: rank 0 alone talks to the user.

    Raises UsageError. To be called before CUDA is used."""
    launch = Launch.of_environment()
    if launch is None:
        return None, observer or Observer()
    launch.take_device()
    return launch, observer or Observer() if launch.rank == 0 else Observer()


@contextmanager
def joined(launch: Launch | None, config: Config) -> Iterator[Group]:
    """The group of this process. Raises PeerLost, UsageError if the processes are on devices of different types."""
    with join(launch, config.train.device, 60 * config.train.peer_timeout_minutes) as group:
        devices = group.gather(config.train.device)
        if len(set(devices)) > 1:
            raise UsageError(
                f"the processes are on different devices ({', '.join(devices)}): start no more of them than there are "
                "cards, or give all of them --device cpu"
            )
        if group.size > config.train.batch:
            raise UsageError(
                f"a batch of {config.train.batch} cannot be split over {group.size} processes: raise --batch, or start "
                "fewer"
            )
        yield group


def share_settings(group: Group, read: Callable[[], Settings]) -> Settings:
    """What `read` gives in rank 0, in every process."""
    mine = group.lead(read, None)
    told = group.share(None if mine is None else [flatten(mine.config), dict(mine.sources)])
    if mine is not None:
        return mine
    values, sources = told
    return Settings(Config.model_validate(nest(values)), sources)


def load_data(group: Group, config: Config, observer: Observer, local_rank: int = 0) -> Dataset:
    """The data set, read by one process of each machine and then by the others, which find it decoded.

    Raises DataError, PreflightError if machines have different pictures."""

    def read(turn: bool) -> Dataset | None:
        return load(config.data, config.seed, progress=observer.data_progress) if turn else None

    first = group.together(lambda: read(local_rank == 0))
    dataset = first or group.together(lambda: read(local_rank != 0))
    if first is not None:
        group.together(lambda: None)
    assert dataset is not None
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
    """Whether torchrun has started these processes again after a failure, and the run had begun with these settings."""

    def look() -> bool:
        asked = path / "env.json"
        if group.restarts == 0 or not (path / "config.yaml").is_file() or not asked.is_file():
            return False
        known = read_json(asked, PLAN_LIMIT_BYTES)
        return isinstance(known, dict) and known.get("asked") == asked_hash(config)

    return bool(group.share(group.lead(look, False)))


def asked_hash(config: Config) -> str:
    """Of the settings as they were asked for, before anything was planned."""
    return config_hash(config)
