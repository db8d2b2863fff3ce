"""The network of a run's settings, of the family or any other, on `meta` (shapes without storage, for planning) or with
values; and its recipe, plain JSON by which another process makes the same.

Known limitation: a network that cannot be made on `meta` (its constructor looks at values) is made with values first,
which for planning takes the memory of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.config.networks import file_of
from lowmem.config.schema import Config, ModelConfig
from lowmem.core.counter_rng import derive_seed
from lowmem.core.errors import LowmemError, PreflightError, first_line
from lowmem.core.units import counted
from lowmem.models import resnet
from lowmem.models.freezing import freeze as freeze_parts
from lowmem.models.source import construct, file_hashes, generators_at

Recipe = Mapping[str, Any]
_TRIED = 2  # pictures, the least that batch norm takes


def make_network(
    model: ModelConfig,
    num_classes: int = 10,
    *,
    channels: int = 3,
    seed: int | None = None,
    freeze: Sequence[str] = (),
) -> nn.Module:
    """In fp32 on the CPU, initialised from the seed; None: on `meta`. `channels`: of the pictures; `freeze`: see
    `lowmem.models.freezing`. Raises UsageError, PreflightError (see `lowmem.models.source`)."""
    frozen = {"freeze": list(freeze)} if freeze else {}
    return from_recipe({**model.given, "num_classes": num_classes, "in_channels": channels, **frozen}, seed=seed)


def network_of(config: Config, num_classes: int = 10, *, seed: int | None = None) -> nn.Module:
    """As `make_network`, of a run's settings."""
    channels, freeze = config.data.channels, config.train.freeze
    return make_network(config.model, num_classes, channels=channels, seed=seed, freeze=freeze)


def hashes_of(model: ModelConfig, channels: int = 3) -> dict[str, str]:
    """What a run is to record in `model.sha256`, of a network that the user has just named: its file is run. Raises as
    `make_network` does."""
    if file_of(model.spec) is None or model.spec is None:
        return {}
    make_network(model, channels=channels)
    return file_hashes(model.spec)


def from_recipe(recipe: Recipe, *, seed: int | None = None) -> nn.Module:
    """As `make_network`. The same seed gives the same weights in any process: a network that is not of the family runs
    its own initialisation, with torch's, NumPy's and Python's generators begun at the address (seed, "init")."""
    said: dict[str, Any] = {key: value for key, value in recipe.items() if key != "freeze"}
    if "arch" in said:
        model: nn.Module = resnet.skeleton(**said) if seed is None else resnet.build(**said, seed=seed)
        said = dict(recipe_of(model))
    elif seed is None:
        model = _on_meta(said)
    else:
        with generators_at(derive_seed(seed, "init")):
            model = construct(**said)
    if frozen := recipe.get("freeze"):
        freeze_parts(model, frozen)
        said["freeze"] = frozen
    model.lowmem_recipe = said  # type: ignore[assignment]
    return model


def recipe_of(model: nn.Module) -> Recipe:
    """Of a network that was made here. Raises ValueError for one made by hand."""
    recipe = getattr(model, "lowmem_recipe", None)
    if recipe is None:
        raise ValueError(f"a {type(model).__name__} that was made by hand has no recipe")
    made: Recipe = recipe
    return made


def _on_meta(recipe: Mapping[str, Any]) -> nn.Module:
    try:
        with generators_at(0), torch.device("meta"):
            return construct(**recipe)
    except LowmemError:
        # Perhaps for `meta` alone; what is wrong with the network itself is said by the other way.
        with generators_at(0):
            return construct(**recipe).to("meta")


# -- whether it can be trained -----------------------------------------------------------------------------------------


def check_network(model: ModelConfig, num_classes: int, image_shape: Sequence[int]) -> None:
    """Raises PreflightError unless the network takes pictures, float [N, *image_shape], and returns logits, [N,
    num_classes], in training, of weights that can be trained. Tried on `meta`; where that does not run, on two pictures
    with values."""
    if model.spec is None:
        return  # the family does
    net, said = make_network(model, num_classes, channels=image_shape[0]).train(), model.words
    if any(nn.parameter.is_lazy(one) for one in (*net.parameters(), *net.buffers())):
        raise PreflightError(f"{said} has lazy layers, whose sizes are not known: give these layers their sizes")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise PreflightError(f"{said} has no parameters to train: let some of them require gradients")
    try:
        with torch.no_grad():
            logits = net(torch.empty(_TRIED, *image_shape, device="meta"))
    except Exception:
        logits = _tried_on_values(model, num_classes, image_shape)
    wanted = [_TRIED, num_classes]
    if not isinstance(logits, Tensor):
        raise PreflightError(
            f"{said} returns a {type(logits).__name__} in training, and one tensor of logits [N, {num_classes}] is "
            "needed: turn its other outputs off (as --model-args aux_logits=False does for some)"
        )
    if list(logits.shape) != wanted:
        raise PreflightError(
            f"{said} returns {list(logits.shape)} for {_TRIED} pictures, and the data has {num_classes} classes, which "
            f"makes {wanted}: let it take num_classes, or give its own name for that with --model-args"
        )


def _tried_on_values(model: ModelConfig, num_classes: int, image_shape: Sequence[int]) -> object:
    net, said = make_network(model, num_classes, channels=image_shape[0], seed=0).train(), model.words
    size = "x".join(map(str, image_shape))
    try:
        with torch.no_grad():
            return net(torch.zeros(_TRIED, *image_shape))
    except Exception as error:
        first = next((one for one in net.modules() if isinstance(one, nn.Conv2d)), None)
        if first is not None and first.in_channels != image_shape[0]:
            raise PreflightError(
                f"{said} takes pictures of {counted(first.in_channels, 'channel')}, and these have {image_shape[0]}: "
                f"let its first convolution take {image_shape[0]} (an argument in_channels or in_chans of it is given "
                "that), or set data.channels (3: RGB, 1: grey)"
            ) from None
        raise PreflightError(
            f"{said} does not take pictures of {size} ({first_line(error)}): give the --image-size that it takes, tell "
            f"it this one (some have --model-args image_size={image_shape[-1]}), or mend it"
        ) from None
