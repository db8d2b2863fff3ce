"""Whether what lies in a run folder is that run's: its checkpoints' tensors, settings and plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lowmem.config import Config
from lowmem.errors import CorruptCheckpoint
from lowmem.models import skeleton
from lowmem.runs.checkpoint import Checkpoint
from lowmem.train.state import check_belongs, config_hash

Shape = tuple[int | None, ...]
_CLASSES = ("linear.weight", "linear.bias")


def network_shapes(config: Config) -> dict[str, Shape]:
    """Name -> shape of the network's tensors, without making any. None: as many as there are classes, which only the
    data tells."""
    model = config.model
    net = skeleton(model.arch, model.block, width=model.width)
    return {
        name: (None, *tensor.shape[1:]) if name in _CLASSES else tuple(tensor.shape)
        for name, tensor in net.state_dict().items()
    }


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises CorruptCheckpoint naming the first tensor of `found` that the network has not, or otherwise."""
    if odd := sorted(set(expected) ^ set(found)):
        raise CorruptCheckpoint(f"{what} is another network's: {odd[0]!r} is on one side only")
    for name, shape in expected.items():
        if len(shape) != len(found[name]) or any(a not in (None, b) for a, b in zip(shape, found[name], strict=True)):
            raise CorruptCheckpoint(
                f"{what}: {name} is {list(found[name])}, in the network of config.yaml it is "
                f"{['classes' if size is None else size for size in shape]}"
            )


def belongs_to(config: Config) -> Callable[[Checkpoint], None]:
    """A check for `load_newest`: raises CorruptCheckpoint for a checkpoint of other settings or another network."""
    expected, identity = network_shapes(config), {"settings": config_hash(config)}

    def check(saved: Checkpoint) -> None:
        check_belongs(saved, identity)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.model.items()}
        check_shapes(expected, shapes, f"the model of step {saved.step}")

    return check
