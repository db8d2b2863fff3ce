"""Whether what lies in a run folder is that run's: its checkpoints' tensors and settings, and its plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from lowmem.choose.execution import wants_plan
from lowmem.config.networks import refuse_changed_files
from lowmem.config.schema import OPERATIONAL, Config, flatten
from lowmem.config.settings import Settings, other_run
from lowmem.core.errors import CorruptCheckpoint, Diverged, UsageError
from lowmem.core.reading import shorten
from lowmem.distributed.group import Group
from lowmem.distributed.launch import Launch
from lowmem.models import network_of
from lowmem.plan.record import Plan
from lowmem.remat import stage_names
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.folder import never_began
from lowmem.runs.store import PLAN, plan_file
from lowmem.runs.view import RunView
from lowmem.train.replica import check_belongs, config_hash

Shape = tuple[int | None, ...]
Changes = Mapping[str, tuple[object, object]]


def network(config: Config, classes: int = 10) -> nn.Module:
    """On `meta`. Of recorded settings: raises PreflightError for a file that is not as it was recorded, and does not
    run it."""
    refuse_changed_files(config.model.spec, config.model.sha256)
    return network_of(config, classes)


def network_shapes(config: Config) -> dict[str, Shape]:
    """Name -> shape of the network's tensors, without making any. None: as many as there are classes in the data."""
    one, other = (network(config, classes).state_dict() for classes in (10, 11))
    return {
        name: tuple(a if a == b else None for a, b in zip(tensor.shape, other[name].shape, strict=True))
        for name, tensor in one.items()
    }


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises CorruptCheckpoint naming the first tensor of `found` that the network has not, or otherwise."""
    if odd := sorted(set(expected) ^ set(found)):
        raise CorruptCheckpoint(f"{what} is another network's: {shorten(odd[0])!r} is on one side only")
    for name, shape in expected.items():
        if len(shape) != len(found[name]) or any(a not in (None, b) for a, b in zip(shape, found[name], strict=True)):
            raise CorruptCheckpoint(
                f"{what}: {name} is {list(found[name])}, in the network of the settings it is "
                f"{['classes' if size is None else size for size in shape]}"
            )


def most_bytes(config: Config) -> int:
    """An upper bound of any file of tensors that a run of these settings writes, for as many as 100,000 classes."""
    return 16 * sum(tensor.numel() for tensor in network(config, 100_000).state_dict().values()) + (8 << 20)


def classes_of(saved: Checkpoint, config: Config) -> int | None:
    """How many classes the network of a checkpoint tells apart; None where no tensor of it says so."""
    sizes = (
        saved.model[name].shape[shape.index(None)] for name, shape in network_shapes(config).items() if None in shape
    )
    return next(sizes, None)


def belongs_to(config: Config, into: Config | None = None) -> Callable[[Checkpoint], None]:
    """A check for `load_newest`: raises CorruptCheckpoint for a checkpoint of other settings or another network.
    `into`: settings whose network is to take its weights, if not these; then UsageError for one with other tensors."""
    expected, identity = network_shapes(into or config), {"settings": config_hash(config)}

    def check(saved: Checkpoint) -> None:
        check_belongs(saved, identity)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.model.items()}
        try:
            check_shapes(expected, shapes, f"the model of step {saved.step}")
        except CorruptCheckpoint as error:
            if into is None:
                raise
            raise UsageError(
                f"{into.model.words} cannot take the weights ({error}): name a network with the same tensors, or start "
                "a new run with `lowmem train`"
            ) from None
        if saved.state["run"]["epoch"] > config.train.epochs:
            raise CorruptCheckpoint(f"step {saved.step} is of an epoch after the run's last, {config.train.epochs}")

    return check


def as_trained(run: Path, recorded: Settings) -> tuple[Settings, Changes]:
    """The settings that the run's checkpoints were made with, and what its config.yaml, edited by hand since, says
    otherwise: name -> (then, now). `recorded`, and nothing, where any was made with these, or none says with which."""
    positions, now = RunView(run).checkpoints, flatten(recorded.config)
    if config_hash(recorded.config) in {position.identity.get("settings") for position in positions}:
        return recorded, {}
    for position in positions:
        exact = {key: value for key, value in position.settings.items() if key not in OPERATIONAL}
        then = {key: value for key, value in exact.items() if now.get(key) != value}
        try:
            trained = recorded.replace(then, position.path.name)
        except UsageError:
            continue  # nothing vouches for what it says but its own hash
        if config_hash(trained.config) == position.identity.get("settings"):
            return trained, {key: (value, now[key]) for key, value in then.items()}
    return recorded, {}


def refuse_edited(run: Path, recorded: Settings) -> None:
    """Raises UsageError if `as_trained` finds that settings were edited."""
    if edits := as_trained(run, recorded)[1]:
        listed = ", ".join(f"{key} is {now!r} there and was {then!r}" for key, (then, now) in edits.items())
        raise UsageError(
            f"{run / 'config.yaml'} was changed since the run was trained ({listed}): put it back to go on as before, "
            f"or {other_run(str(run), {key: now for key, (_, now) in edits.items()})}"
        )


# -- a run that torchrun starts again ----------------------------------------------------------------------------------


def begun_before(group: Group, path: Path, config: Config) -> bool:
    """Whether torchrun has started these processes again after a failure, and it was they who began this run, with
    these settings. Raises Diverged if the run then stopped as it was asked to: starting again does not undo that."""

    def begun() -> bool:
        if group.restarts == 0 or not (path / "config.yaml").is_file() or never_began(path):
            return False
        run, mine = RunView(path), {"asked": config_hash(config), "launcher": launcher()}
        if {key: run.env.get(key) for key in mine} != mine:
            return False
        for last in run.events[-1:]:
            if last.kind == "diverged" or (last.kind == "stuck" and last.detail.get("stopped")):
                why = shorten(last.detail.get("why") or "it learns nothing", 500)
                raise Diverged(f"{path} was stopped before this restart, as asked: {why}")
        return True

    return bool(group.share(group.lead(begun, False)))


def launcher() -> int | None:
    """The process that started this one, if that is torchrun: it outlives those that it starts again."""
    return None if Launch.of_environment() is None else os.getppid()


# -- plans: plan.json, and one for each further process that trains the run --------------------------------------------


def read_plan(run: Path, config: Config, name: str = PLAN) -> Plan | None:
    """The plan in a run's plan.json (or of another process); None if there is none. Raises CorruptCheckpoint if it is
    damaged or does not belong to these settings."""
    path = run / name
    if (plan := Plan.read(path)) is None:
        return None
    train = config.train
    ours = (stage_names(network(config)), train.batch, train.precision, train.memory_format)
    if (plan.stages, plan.effective_batch, plan.precision, plan.memory_format) != ours:
        raise CorruptCheckpoint(f"{path} is the plan of another run: restore this run's own, or start another run")
    return plan


def read_plans(run: Path, config: Config) -> list[Plan]:
    """Of all processes that last trained the run of these recorded settings, as far as they are there; none for a run
    without plans. Raises CorruptCheckpoint."""
    first = read_plan(run, config)
    if first is None:
        if wants_plan(config):
            raise CorruptCheckpoint(f"{run / PLAN} is missing, which this run was planned by: restore it")
        return []
    others = (read_plan(run, config, plan_file(rank)) for rank in range(1, len(first.shares)))
    return [first, *(plan for plan in others if plan is not None)]
