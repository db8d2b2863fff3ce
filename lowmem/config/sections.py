"""What the sections of the settings share, and those that say the learning rate of every step, what a run must fit into
and when it is saved. The others are in `lowmem.config.schema`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from lowmem.core.units import LEAST_CARD_BYTES, LEAST_TENSORS_BYTES, parse_memory, parse_size


def _parsed_by(parse: Callable[[int | str], int]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, int | str) else value)


Size = Annotated[PositiveInt, _parsed_by(parse_size)]
CardMemory = Annotated[PositiveInt, _parsed_by(partial(parse_memory, least_bytes=LEAST_CARD_BYTES))]
TensorMemory = Annotated[PositiveInt, _parsed_by(partial(parse_memory, least_bytes=LEAST_TENSORS_BYTES))]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Values of a file: frozen, and nothing that is not known."""


class ScheduleConfig(Section):
    """The learning rate of every step (`lowmem.train.schedule`). The low start (He et al. 2016, section 4.2: the
    110-layer net begins at lr 0.01 until its training error is under 80 %) is of a step schedule without another
    warm-up; it ends at the latest at the first milestone, and is decided at the end of an epoch, from that epoch's
    training error."""

    kind: Literal["steps", "cosine", "one-cycle"] = Field(
        "steps",
        description="steps: lowered at milestones; cosine: after the warm-up down by half a cosine; one-cycle: up from "
        "1/25 of optim.lr and down, by half a cosine each, as torch's OneCycleLR with constant momentum",
    )
    milestones: tuple[PositiveFloat, ...] = Field(
        (81, 122), description="steps: epochs, of a run of reference_epochs, after which the learning rate is lowered"
    )
    gamma: float = Field(0.1, gt=0, lt=1, description="steps: what the learning rate is multiplied by at a milestone")
    reference_epochs: PositiveInt = Field(
        164, description="steps: length of the run that the milestones are for; one of another length scales them"
    )
    warmup_epochs: float | None = Field(
        None,
        ge=0,
        description="epochs, of any run, in which the rate rises to optim.lr, in equal parts from step to step "
        "(one-cycle: by its cosine); default: none, of one-cycle 0.3 of the run",
    )
    final_share: float = Field(
        0.0, ge=0, le=1, description="cosine, one-cycle: the learning rate of the last step, as a share of optim.lr"
    )
    low_start: Literal["auto", "always", "never"] = Field(
        "auto",
        description="steps without warmup_epochs: begin with low_start_lr until the net learns; auto: from 110 layers "
        "on, and never under the other kinds",
    )
    low_start_lr: PositiveFloat = Field(0.01, description="learning rate of the low start")
    low_start_until_error_pct: float = Field(
        80.0, gt=0, lt=100, description="the low start ends when the training error is under this, in per cent"
    )

    @model_validator(mode="after")
    def _rising(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} do not rise: write them in rising order, each once")
        return self

    @model_validator(mode="after")
    def _of_its_kind(self) -> ScheduleConfig:
        if self.kind == "steps" and self.final_share:
            raise ValueError(
                f"final_share {self.final_share:g} is for cosine and one-cycle, the kind is steps: set schedule.kind, "
                "or milestones and gamma in its place"
            )
        if self.low_start == "always" and (self.kind != "steps" or self.warmup_epochs):
            other = "warmup_epochs" if self.kind == "steps" else f"the kind {self.kind}"
            raise ValueError(f"low_start always and {other} are two warm-ups: set low_start to auto or never")
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
