"""`execute`: the one pipe that every run goes through, however it begins (the package's text says which way)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

import lowmem
from lowmem.choose.decide import DataSize, Decision, decide
from lowmem.choose.execution import numerics_of, refuse_size, refuse_unsafe, require_device, resolve_execution
from lowmem.config.schema import Config, known_keys
from lowmem.config.settings import Settings
from lowmem.core.errors import DataError, ForeignCheckpoint, OutOfMemory, PreflightError, UsageError
from lowmem.data import Dataset, load
from lowmem.distributed.group import Group, Split, join
from lowmem.distributed.launch import Launch
from lowmem.lifecycle.begin import New, Resume
from lowmem.lifecycle.ending import last_words
from lowmem.measure.cuda import cap_allocator
from lowmem.measure.out_of_memory import classify
from lowmem.models import check_network, network_of
from lowmem.remat.libraries import prepare_libraries
from lowmem.runs.event_files import require_tensorboard
from lowmem.train.loop import Outcome, Trainer
from lowmem.train.observer import Observer
from lowmem.train.schedule import starts_low
from lowmem.train.signals import StartupSignals
from lowmem.trial.plan_trial import confirm_run, wants_confirmation

T = TypeVar("T")


def execute(begin: New | Resume, observer: Observer | None = None) -> Outcome:
    """A run from its beginning, whichever that is, to its end: by this process, or by all that torchrun has started.

    Raises LowmemError: UsageError and PreflightError before anything is changed, Infeasible, CorruptCheckpoint,
    OutOfMemory, Diverged, DiskError, PeerLost, and Interrupted after a signal, with everything saved.
    """
    if observer is not None and Launch.of_environment() is not None:
        observer.phase("joining the other processes")
    with StartupSignals(), _joined(begin.given, begin.source) as group, ExitStack() as stack:
        if observer is None or not group.leads:  # rank 0 alone talks to the user
            observer = Observer()
        if type(begin) is New:
            begin = begin.after_restart(group, observer)
        settings, recorded = begin.open(group, observer, stack)
        config = settings.config
        group.together(lambda: refuse_unfit(group, config))
        elsewhere = begin.where_data_is_given(config)
        dataset = _load_data(group, config, observer, elsewhere)
        size = DataSize(len(dataset.classes), len(dataset.train))
        group.together(lambda: check_network(config.model, size.classes, config.data.image_shape))
        if recorded is None and not config.memory.auto_batch and config.train.batch > len(dataset.train):
            # No refusal: all pictures in a step can be meant, and a trial on a few keeps the recipe's batch.
            observer.warning(_describe_large_batch(config.train.batch, len(dataset.train)))
        tells = partial(confirm_run, tell=observer.note, phase=observer.phase)
        confirm = partial(tells, num_classes=size.classes, train_pictures=len(dataset.train))
        wanted = confirm if wants_confirmation(config) else None
        decision = decide(settings, size, group, recorded=recorded, confirm=wanted, tell=observer)
        checkpoint = begin.checkpoint(decision.settings, dataset, observer)
        stack.enter_context(_out_of_memory(begin.path))
        observer.phase("building the network")
        folder = begin.folder(group, decision.settings, dataset, stack)
        trainer = make_trainer(group, decision, dataset, observer, begin.path)
        if checkpoint is not None:
            trainer.state = group.together(lambda: _with_words(elsewhere, lambda: trainer.restore(checkpoint)))
        if not begin.commit(decision, trainer, folder):
            return Outcome(begin.path, False, trainer.state)
        outcome = trainer.run(folder)
        if group.leads:
            words, then = last_words(trainer, outcome)
            observer.ended(words, then)
            outcome = replace(outcome, words=words)
        return outcome


# -- one process, or several -------------------------------------------------------------------------------------------


@contextmanager
def _joined(given: Mapping[str, object], source: str) -> Iterator[Group]:
    """The group of this process, by those of the `given` settings that joining takes: a run's own are not at hand yet.
    To be called before CUDA is used: one of several processes takes a device. Raises PreflightError, PeerLost, and
    UsageError if the processes are not alike: on other types of devices, or with other versions."""
    launch = Launch.of_environment()
    if launch is not None and given.get("train.device") != "cpu":
        launch.take_device()
    wanted = {key: given[key] for key in ("train.device", "train.peer_timeout_minutes") if key in given}
    alone = Settings(Config(), dict.fromkeys(known_keys(), "default"))
    train = resolve_execution(alone.replace(wanted, source)).config.train
    with join(launch, train.device, 60 * train.peer_timeout_minutes) as group:
        versions = f"lowmem {lowmem.__version__}, torch {torch.__version__}"
        for what, value, way_out in (
            ("devices", train.device, "give all of them --device cpu, or each a card"),
            ("versions", versions, "install the same everywhere"),
        ):
            values = group.gather(value)
            with group.alike():
                if len(set(values)) > 1:
                    different = "; ".join(f"process {rank}: {each}" for rank, each in enumerate(values))
                    raise UsageError(f"the processes have different {what} ({different}): {way_out}")
        yield group


def refuse_unfit(group: Group, config: Config) -> None:
    """What takes no time to refuse. Raises PreflightError, UsageError. The libraries are set for all that follows."""
    require_device(config.train.device)
    refuse_size(config)
    if config.train.freeze:
        network_of(config)
    if config.train.tensorboard:
        require_tensorboard()
    if group.size > config.train.batch:
        raise UsageError(
            f"a batch of {config.train.batch} cannot be split over {group.size} processes: raise --batch, or start "
            "fewer"
        )
    prepare_libraries(numerics_of(config.train))


def _load_data(group: Group, config: Config, observer: Observer, elsewhere: str) -> Dataset:
    """The data set, read by one process of each machine and then by the others, which find it decoded.

    Raises DataError, which ends with `elsewhere`, and PreflightError if machines have different pictures."""
    read = partial(load, config.data, config.seed, progress=observer.phase)
    observer.phase("reading pictures")
    first = group.together(lambda: _with_words(elsewhere, read) if group.local_rank == 0 else None)
    dataset = group.together(lambda: first or _with_words(elsewhere, read))
    with group.alike():
        if len(set(group.gather(f"{dataset.fingerprint} {dataset.classes}"))) > 1:
            raise PreflightError("the processes have different pictures: give all machines the same data")
    for text in dataset.notes:
        observer.note(text)
    for text in dataset.warnings:
        observer.warning(text)
    return dataset


def _with_words(elsewhere: str, work: Callable[[], T]) -> T:
    """What `work` gives; what it says of data that is missing, or not the run's, ends with `elsewhere`."""
    try:
        return work()
    except (DataError, ForeignCheckpoint) as error:
        raise type(error)(f"{error}{elsewhere}") from None


# -- the trainer -------------------------------------------------------------------------------------------------------


def make_trainer(group: Group, decision: Decision, dataset: Dataset, observer: Observer, path: Path) -> Trainer:
    """Raises OutOfMemory, PreflightError; in all processes."""
    config = decision.settings.config

    def make() -> Trainer:
        refuse_unsafe(config)
        model = network_of(config, len(dataset.classes), seed=config.seed)
        with _out_of_memory(path):
            return Trainer(config, model, dataset, observer, decision.plan, group, decision.split)

    trainer, plan = group.together(make), decision.plan
    trainer.state.low_start = starts_low(config)
    if config.train.device == "cuda" and plan is not None and plan.allocator_bytes is not None:
        # A larger card made to behave like a smaller one, by the cap that the plan was made for and tried under.
        cap_allocator(plan.allocator_bytes)
    if not group.alone:
        observer.note(_describe_batch_norm(group, config, decision.split))
    return trainer


@contextmanager
def _out_of_memory(path: Path) -> Iterator[None]:
    """Turns the library's exception into ours, with the way out, wherever there is no step to undo: while a run is set
    up, and where no smaller plan is left; the run is then saved."""
    failure = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = classify(error, "setting up")
        if failure is None:
            raise
    # Outside of the handler, which would hold on to the tensors.
    if failure is not None:
        raise OutOfMemory(
            f"{failure.words} ({failure.message}); the last checkpoint, if there is one, stands: free what others use, "
            f"or give less to plan for, like `lowmem resume {path} --vram 4G`"
        )


def _describe_large_batch(batch: int, pictures: int) -> str:
    return (
        f"batch {batch:,} is more than the {pictures:,} training pictures: an epoch is one step of all of them, and a "
        f"plan is for {batch:,}; give --batch {pictures} or less"
    )


def _describe_batch_norm(group: Group, config: Config, split: Split) -> str:
    """What batch norm sees, which several processes must say."""
    shares = " + ".join(map(str, split.shares))
    head = f"{group.size} processes: a batch of {split.batch} is {shares} pictures"
    if config.train.sync_bn:
        return f"{head}; batch norm is over all of them (train.sync_bn), as in one process"
    return f"{head}; each one's batch norm sees its own only, as is usual (--sync-bn: all of them, as in one process)"
