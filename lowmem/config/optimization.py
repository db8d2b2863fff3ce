"""The sections of the settings that say how every step changes the weights: optimizer and learning rate."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lowmem.config.sections import Section

_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """The update: SGD in the form of torch.optim.SGD (Sutskever et al.), or torch.optim.AdamW (Loshchilov and Hutter,
    2019)."""

    kind: Literal["sgd", "adamw"] = Field("sgd", description="the optimizer; adamw keeps two tensors of each parameter")
    lr: PositiveFloat = Field(
        0.1, description="learning rate before the first milestone; the highest of a cosine or one-cycle schedule"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay; AdamW's is decoupled from the gradient")
    nesterov: bool = Field(False, description="Nesterov's form of the momentum")
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.999), description="decay of AdamW's two running means")
    eps: PositiveFloat = Field(1e-8, description="what AdamW adds to the denominator")
    decay_norms: bool = Field(
        True, description="weight decay of norms and biases too: of parameters with fewer than two dimensions"
    )
    clip_norm: PositiveFloat | None = Field(
        None, description="scale gradients down to this norm, of all of them together; null: never"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="evaluate and export a running mean of the weights with this decay a step, like 0.999, from the "
        "weights that training begins with; buffers are the network's own",
    )

    @property
    def copies(self) -> int:
        """Tensors of a parameter's size that are kept of each between two steps."""
        own = 2 if self.kind == "adamw" else int(self.momentum > 0)
        return own + (self.ema is not None)

    @property
    def work(self) -> tuple[object, ...]:
        """What of it decides a step's bytes and operations."""
        return self.kind, self.momentum > 0, self.clip_norm is not None, self.ema is not None

    @model_validator(mode="after")
    def _of_the_kind(self) -> OptimConfig:
        others, whose = (("momentum", "nesterov"), "SGD") if self.kind == "adamw" else (("betas", "eps"), "AdamW")
        for name in others:
            usual = type(self).model_fields[name].default
            if getattr(self, name) != usual:
                raise ValueError(
                    f"{name} is {whose}'s, and kind is {self.kind}: it takes --set optim.{name}={json.dumps(usual)}"
                )
        return self


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
