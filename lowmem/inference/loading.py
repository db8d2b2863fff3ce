"""A trained network from its run, or from a file of its weights alone, and its pictures as evaluation in training has
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from lowmem.choose.execution import card_obstacle, require_device
from lowmem.config.networks import file_of, refuse_changed_files, split_spec
from lowmem.config.schema import Config, ModelConfig
from lowmem.config.sections import DataConfig
from lowmem.core.errors import CorruptCheckpoint, DataError, PreflightError, UsageError
from lowmem.core.reading import Unreadable, shorten
from lowmem.data.batches import Normalizer
from lowmem.data.cutting import middle_of
from lowmem.data.decoding import decode, squared
from lowmem.data.enlarging import Enlarger
from lowmem.data.pictures import are_mapped, stored_side
from lowmem.models import make_network
from lowmem.runs.view import recorded_settings
from lowmem.runs.weights import WeightsInfo, read_weights

Picture = str | Path | Image.Image
MOST_IMAGE_SIZE = 1024  # as of `DataConfig`


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """`model`: in evaluation mode, in fp32 on `device`; `info`: what its weights' file (`weights`) says of itself, with
    `data`, `classes`, `image_size`, `mean` and `std`; `config`: the run's settings, None for a file by itself;
    `pictures`: the settings by which pictures become square."""

    model: nn.Module
    info: WeightsInfo
    config: Config | None
    weights: Path
    device: torch.device
    pictures: DataConfig
    normalize: Normalizer

    def prepare(self, pictures: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Pictures as evaluation in training has them: float32 [N, C, S, S] on the device, normalised, S the
        `image_size`, C the channels of the `pictures`. They are those of `squares`, and raise the same."""
        return self.normalize(self.squares(pictures))

    def squares(self, pictures: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """As `prepare`, not normalised yet: uint8 [N, C, S, S] on the device. `pictures`: paths, Pillow's or uint8 [N,
        C, H, W]. Of S x S a tensor is taken as it is; all else becomes square, and as large as the network sees it, in
        the way that the run's own pictures did.

        Raises DataError naming a picture that cannot be used, UsageError for a tensor of another kind, OSError where
        the machine fails. A JPEG that Pillow has opened already can differ by a level from the same one by its path,
        of which the decoder makes less where it is large."""
        size, side, channels = self.pictures.image_size, stored_side(self.pictures), self.pictures.channels
        if isinstance(pictures, Tensor):
            shape = list(pictures.shape)
            if pictures.dtype != torch.uint8 or len(shape) != 4 or shape[1] != channels:
                said = f"pictures are {str(pictures.dtype).removeprefix('torch.')} {shape}"
                raise UsageError(f"{said}, and a tensor of them is uint8 [N, {channels}, H, W]: give it so, or paths")
            if shape[2:] == [size, size]:
                return pictures.to(self.device).contiguous()
            rows = pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            pictures = [Image.fromarray(one if channels > 1 else one[..., 0]) for one in rows]
        elif isinstance(pictures, Picture):
            pictures = [pictures]
        stored = np.empty((len(pictures), side, side, channels), np.uint8)
        for place, picture in enumerate(pictures):
            stored[place] = _square(picture, self.pictures.fit, side, channels)
        if are_mapped(self.pictures):
            middle = middle_of(side, size)
            stored = stored[:, middle, middle]
        images = torch.from_numpy(stored).permute(0, 3, 1, 2).contiguous().to(self.device)
        return Enlarger(side, size, self.device)(images)

    @property
    def how_prepared(self) -> str:
        """What `squares` makes of a file, in words."""
        side, size = (f"{one}x{one}" for one in (stored_side(self.pictures), self.pictures.image_size))
        what = "the middle square" if self.pictures.fit == "crop" else "all"
        then = f", of that the middle {size}" if are_mapped(self.pictures) else f", then bilinear to {size}"
        return f"{what} of a picture, resized to {side} (bicubic){then if side != size else ''}"


def load_run(path: str | Path, weights: str | Path = "best", device: str = "auto") -> LoadedRun:
    """The trained network of a run folder, or of a .safetensors file of its weights by itself. `weights`: of a run
    folder `best`, `last`, or a file; `device`: `auto`, `cuda` or `cpu`.

    Raises UsageError for what is no run and weights that are not there; CorruptCheckpoint for weights that cannot be
    read, are another network's, or for pictures of another size or colour than the run's; PreflightError for a device
    that is not there, weights that do not say what is needed, and for a network of a Python file that is not as it was
    recorded (it is not run then)."""
    path = Path(path)
    if path.is_file():
        if weights != "best":
            raise UsageError(f"{path} is a file of weights already: leave weights={str(weights)!r} out")
        config, file = None, path
    else:
        config = recorded_settings(path).config
        file = path / "weights" / f"{weights}.safetensors" if weights in ("best", "last") else Path(weights)
    info = _read(file)
    if not (info.data and info.classes and info.image_size and info.mean and info.std):
        raise PreflightError(
            f"{file} does not say its data, classes, picture size, mean and deviation (an older lowmem wrote it, or "
            "another program): train an epoch more with this one, which writes it anew"
        )
    settings = _network_of(file, info) if config is None else config.model
    refuse_changed_files(settings.spec, settings.sha256)
    on = _device(device)
    channels: Literal[1, 3] = 1 if len(info.mean) == 1 else 3
    tensors = safetensors.torch.load_file(file)
    try:  # on `meta` first: a stranger's file may name one that fits no memory
        make_network(settings, len(info.classes), channels=channels).load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        said = f"{file} is another network's than {settings.words} ({shorten(error)})"
        raise CorruptCheckpoint(f"{said}: name the run's own weights") from None
    its = _pictures(channels, info.image_size)
    if config is not None and its != (own := _pictures(config.data.channels, config.data.image_size)):
        raise CorruptCheckpoint(f"{file} is for {its}, and {path} has {own}: name the run's own weights")
    model = make_network(settings, len(info.classes), channels=channels, seed=0)
    model.load_state_dict(tensors)
    fit = info.fit or ("crop" if config is None else config.data.fit)
    pictures = DataConfig.model_construct(source=info.data, image_size=info.image_size, channels=channels, fit=fit)
    return LoadedRun(model.to(on).eval(), info, config, file, on, pictures, Normalizer(info.mean, info.std, on))


def _pictures(channels: int, size: int) -> str:
    return f"{'grey' if channels == 1 else 'RGB'} pictures of {size}x{size}"


def _read(file: Path) -> WeightsInfo:
    try:
        _, info = read_weights(file)
        odd = min(info.std or (1,)) <= 0 or len(info.std or ()) != len(info.mean or ())
        if odd or (info.image_size or 0) > MOST_IMAGE_SIZE:
            said = f"pictures of side {info.image_size} have mean {info.mean} and deviation {info.std}"
            raise Unreadable(f"says that {said}")
        return info
    except FileNotFoundError:
        raise UsageError(
            f"{file} is not there: a run writes best and last when its first epoch ends; name another run or file"
        ) from None
    except (Unreadable, OSError) as error:
        why = error.strerror or error if isinstance(error, OSError) else error
        raise CorruptCheckpoint(f"{file} cannot be used ({shorten(why)}): name other weights") from None


def _network_of(file: Path, info: WeightsInfo) -> ModelConfig:
    """What a file of weights by itself says of its network."""
    if info.spec is None and info.arch is None:
        raise PreflightError(f"{file} does not say what network it is of: name the folder of its run")
    names = ("arch", "block", "width") if info.spec is None else ("spec", "args")
    try:
        model = ModelConfig.model_validate(info.model_dump(include={*names}, exclude_none=True))
    except (ValidationError, UsageError, ValueError) as error:
        raise CorruptCheckpoint(f"{file} says of itself what cannot be ({shorten(error)})") from None
    if file_of(model.spec) is not None and info.spec is not None:
        name = shorten(split_spec(info.spec)[0])
        raise PreflightError(
            f"{file} says of its network only that {name} makes it, and no code runs on that: name the folder of its "
            "run, which records where that is and its hash, and this file as the weights"
        )
    return model


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() and card_obstacle() is None else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise UsageError(f"there is no device {shorten(wanted)!r}: use auto, cuda or cpu")
    require_device(wanted)
    return torch.device(wanted)


def _square(picture: Picture, fit: str, side: int, channels: int) -> np.ndarray:
    try:
        if isinstance(picture, Image.Image):
            return squared(picture, fit, side, channels)
        return decode(str(picture), fit, side, channels)
    except DataError as error:
        name = "a picture" if isinstance(picture, Image.Image) else shorten(picture)
        raise DataError(f"{name} cannot be used: {error}") from None
