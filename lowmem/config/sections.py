"""What the sections of the settings share, and those that say where pictures come from, what a run must fit into and
when it is saved. The others are in `lowmem.config.schema`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from lowmem.config.sources import SOURCE_SIDE, SOURCES, canonical_source
from lowmem.core.units import LEAST_CARD_BYTES, LEAST_TENSORS_BYTES, parse_memory, parse_size


def _parsed_by(parse: Callable[[int | str], int]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, int | str) else value)


Size = Annotated[PositiveInt, _parsed_by(parse_size)]
CardMemory = Annotated[PositiveInt, _parsed_by(partial(parse_memory, least_bytes=LEAST_CARD_BYTES))]
TensorMemory = Annotated[PositiveInt, _parsed_by(partial(parse_memory, least_bytes=LEAST_TENSORS_BYTES))]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Values of a file: frozen, and nothing that is not known."""


def _check_share(value: object) -> object:
    """A number of pictures, or a share between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{value!r} is neither a number of pictures, like 500, nor a share of them, like 0.2")
    if value >= 1 and value != int(value):
        raise ValueError(f"{value!r} is no whole number of pictures, and no share below 1")
    return int(value) if value >= 1 else value


class DataConfig(Section):
    """Where pictures come from."""

    source: Annotated[str, AfterValidator(canonical_source)] = Field(
        "cifar10",
        description="the pictures: cifar10, cifar100, fashion-mnist, shapes (built in), folder:PATH or csv:FILE",
    )
    root: str = Field(
        "data", description="folder that holds, or receives, the files of cifar10, cifar100 and fashion-mnist"
    )
    cache: str | None = Field(None, description="folder for decoded pictures; default: the user's cache folder")
    download: bool = Field(True, description="download cifar10, cifar100 and fashion-mnist where they are missing")
    train_subset: PositiveInt | None = Field(
        None, description="train on this many pictures, the same share of every class, chosen by the seed"
    )
    test_subset: PositiveInt | None = Field(None, description="test on this many pictures, chosen likewise")
    val_split: int = Field(
        default=0, ge=0, description="hold back this many training pictures, and choose the best weights on them"
    )
    image_size: int = Field(SOURCE_SIDE, ge=8, le=1024, description="side of the square pictures that the network sees")
    channels: Literal[1, 3] = Field(
        3, description="of what the network sees. 3: RGB, grey pictures have it three times; 1: all pictures as grey"
    )
    augment: bool = Field(
        True,
        description="random horizontal flip and random crop: with padding 4; of a folder from image_size 64 on resized",
    )
    cutout: PositiveInt | None = Field(
        None,
        description="side of a square of the mean colour over every training picture, in pixels as the network sees "
        "them, its centre anywhere in the picture (DeVries and Taylor 2017)",
    )
    random_erasing: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the training pictures that lose a rectangle of 2 to 33 % of the area, aspect 0.3 to 3.3, "
        "to the mean colour (torchvision's RandomErasing)",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=100,
        description="alpha of mixup (Zhang et al. 2018): every batch is mixed with itself in another order, by a share "
        "of Beta(alpha, alpha); the training error counts against the label with the larger share; 0: none",
    )
    fit: Literal["crop", "stretch"] = Field(
        "crop",
        description="files: how a picture becomes square. crop: upright by its EXIF orientation, transparency over "
        "white, the middle square of it; stretch: all of it squeezed, orientation and transparency ignored",
    )
    test_split: Annotated[int | float, BeforeValidator(_check_share)] | None = Field(
        None,
        description="folder or list without test pictures: test on this many, or this share, chosen by the seed",
    )
    val_folder: bool = Field(True, description="folder or list: hold back its pictures of val, where there are some")
    skip_damaged: bool = Field(False, description="folder or list: go on without files that are no pictures or damaged")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of what the network sees: channels, height, width."""
        return self.channels, self.image_size, self.image_size

    @model_validator(mode="after")
    def _not_shrunk(self) -> DataConfig:
        if self.source in SOURCES and self.image_size < SOURCE_SIDE:
            raise ValueError(
                f"{self.source} has pictures of {SOURCE_SIDE}x{SOURCE_SIDE}, and image_size {self.image_size} is less: "
                f"raise it to {SOURCE_SIDE} or more; folder:PATH and csv:FILE take any size"
            )
        if self.cutout is not None and self.cutout >= self.image_size:
            raise ValueError(f"cutout {self.cutout} covers pictures of image_size {self.image_size}: lower it")
        return self


class MemoryConfig(Section):
    """What the step must fit into. Without any of it the CPU trains unplanned, and a CUDA device has what is free."""

    vram: CardMemory | None = Field(
        None,
        description="the whole memory of a card, like 6G: of memory.card, else of the (then emulated) CUDA device at "
        "hand, else of one on the terms of the reference card",
    )
    tensors: TensorMemory | None = Field(
        None, description="in place of vram: what the step's tensors alone may take, like 2700M"
    )
    card: str | None = Field(
        None, description="plan for this card: a name of `lowmem cards` or a .yaml file; A,B: one for each process"
    )
    platform: Literal["auto", "linux", "linux-display", "windows"] = Field(
        "auto", description="the machine the card is in, for the share of its memory that can be used"
    )
    host: Literal["off", "auto"] | Size = Field(
        "off",
        description="host memory in which tensors of the step may wait, like 4G; auto: half of what is free there",
    )
    link: Literal["auto"] | Annotated[float, Field(gt=0, le=1e4)] = Field(
        "auto",
        description="GB/s that get to host memory, each way; auto: as measured, else by the card's PCIe; on the CPU, "
        "which then copies for real, a number holds it to that",
    )
    calibrate: Literal["auto", "always", "never"] = Field(
        "auto",
        description="predict time and workspace by what is measured on this device; auto: on CUDA",
    )
    allow_accumulation: bool = Field(
        True, description="accumulate gradients where nothing else fits, which under batch norm computes otherwise"
    )
    auto_batch: bool = Field(
        False, description="choose the batch with the most pictures a second that fits; the same as train.batch=auto"
    )
    confirm: Literal["auto", "always", "never"] = Field(
        "auto", description="try a plan with real steps in a process of its own before the run; auto: on CUDA"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> MemoryConfig:
        if self.vram is not None and self.tensors is not None:
            raise ValueError("--vram is the whole card's memory, --tensors the step's tensors alone: give one of them")
        return self


class CheckpointConfig(Section):
    """When to save: after every epoch, and more often."""

    every_minutes: PositiveFloat | None = Field(10.0, description="a kill loses this many minutes at most; null: any")
    every_steps: PositiveInt | None = Field(None, description="a kill loses this many steps at most; null: any")
    keep: int = Field(2, ge=2, description="how many good checkpoints stay")
    keep_every: PositiveInt | None = Field(None, description="keep those of every N-th epoch too, to fork from")

    @property
    def steps_between_saves(self) -> int | None:
        """Half of `every_steps`: the other half is for writing one, while training goes on (`train.watchers`)."""
        return None if self.every_steps is None else max(1, self.every_steps // 2)
