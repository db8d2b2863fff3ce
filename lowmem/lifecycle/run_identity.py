"""Whether what lies in a run folder is that run's: its checkpoints' tensors, settings and plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

from torch import nn

from lowmem.choose.session import wants_plan
from lowmem.config.schema import Config
from lowmem.config.settings import from_yaml
from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import shorten
from lowmem.lifecycle.recorded_plans import read_plan
from lowmem.models import skeleton
from lowmem.plan.record import Plan
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.store import plan_file, require_run
from lowmem.runs.verify import Belonging, Verified, verify_run
from lowmem.train.stall import measured_weights
from lowmem.train.state import check_belongs, config_hash

Shape = tuple[int | None, ...]
_CLASSES = ("linear.weight", "linear.bias")


def network_shapes(config: Config) -> dict[str, Shape]:
    """Name -> shape of the network's tensors, without making any. None: as many as there are classes, which only the
    data tells."""
    return {
        name: (None, *tensor.shape[1:]) if name in _CLASSES else tuple(tensor.shape)
        for name, tensor in _skeleton(config).state_dict().items()
    }


def _skeleton(config: Config) -> nn.Module:
    model = config.model
    return skeleton(model.arch, model.block, width=model.width)


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises CorruptCheckpoint naming the first tensor of `found` that the network has not, or otherwise."""
    if odd := sorted(set(expected) ^ set(found)):
        raise CorruptCheckpoint(f"{what} is another network's: {shorten(odd[0])!r} is on one side only")
    for name, shape in expected.items():
        if len(shape) != len(found[name]) or any(a not in (None, b) for a, b in zip(shape, found[name], strict=True)):
            raise CorruptCheckpoint(
                f"{what}: {name} is {list(found[name])}, in the network of config.yaml it is "
                f"{['classes' if size is None else size for size in shape]}"
            )


def most_bytes(config: Config) -> int:
    """An upper bound of any file of tensors that a run of these settings writes, for as many as 100,000 classes."""
    sizes = [[100_000 if size is None else size for size in shape] for shape in network_shapes(config).values()]
    return 8 * sum(map(prod, sizes)) + (8 << 20)


def belongs_to(config: Config) -> Callable[[Checkpoint], None]:
    """A check for `load_newest`: raises CorruptCheckpoint for a checkpoint of other settings or another network."""
    expected, identity = network_shapes(config), {"settings": config_hash(config)}

    def check(saved: Checkpoint) -> None:
        check_belongs(saved, identity)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.model.items()}
        check_shapes(expected, shapes, f"the model of step {saved.step}")
        if saved.state["run"]["epoch"] > config.train.epochs:
            raise CorruptCheckpoint(f"step {saved.step} is of an epoch after the run's last, {config.train.epochs}")

    return check


def verify(run: Path) -> Verified:
    """What `lowmem verify` does: looks at everything a resume of `run` would rely on, and changes nothing.

    Raises UsageError if it is no run or its config.yaml cannot be used.
    """
    require_run(run)
    config = from_yaml(run / "config.yaml").config
    shapes = network_shapes(config)
    return verify_run(
        run,
        Belonging(
            checkpoint=belongs_to(config),
            tensors=lambda found, what: check_shapes(shapes, found, what),
            plan=lambda: _plan_in_words(run, config),
            most_bytes=most_bytes(config),
            epochs=config.train.epochs,
            layers=tuple(measured_weights(_skeleton(config))),
        ),
    )


def _plan_in_words(run: Path, config: Config) -> str | None:
    """None for a run without a plan. Raises CorruptCheckpoint."""
    plan = read_plan(run, config)
    if plan is None and wants_plan(config):
        raise CorruptCheckpoint(f"{run / 'plan.json'} is missing, which this run was planned by: restore it")
    if plan is None:
        return None
    for name in map(plan_file, range(1, len(plan.shares))):
        if read_plan(run, config, name) is None:
            raise CorruptCheckpoint(
                f"{run / name} is missing, the plan of one of the {len(plan.shares)} processes that train this run: "
                "restore it, or go on with another number of them"
            )
    if len(plan.shares) > 1:
        return f"{len(plan.shares)} processes, of which this takes {_words(plan)}"
    return _words(plan)


def _words(plan: Plan) -> str:
    return f"batch {plan.batch} in micro-batches of {plan.micro_batch}, {len(plan.ladder)} smaller plans in reserve"
