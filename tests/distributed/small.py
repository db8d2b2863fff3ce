"""A small run of several processes, put together as the commands do it."""

from __future__ import annotations

import torch

from lowmem.config.schema import Config
from lowmem.data import Dataset, Pictures
from lowmem.distributed.group import Group, Split
from lowmem.models import build
from lowmem.models.freezing import freeze
from lowmem.plan.policy import LEAN, Keep, Schedule, Segment, keep, uniform
from lowmem.plan.record import Plan
from lowmem.remat import decompose, stage_names
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer
from tests.exact.schedules import hosting

BATCH = 12


def dataset(pictures: int = 30) -> Dataset:
    """Noise: every process makes the same."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (pictures + 9, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(pictures + 9) % 10
    train, test = (Pictures(images[part], labels[part]) for part in (slice(pictures), slice(pictures, None)))
    classes = tuple(str(one) for one in range(10))
    return Dataset("noise", classes, train, None, test, (0.5,) * 3, (0.3,) * 3, "noise")  # type: ignore[arg-type]


def config(*, sync_bn: bool = False, arch: str = "res20", epochs: int = 1, **train: object) -> Config:
    section = {"batch": BATCH, "epochs": epochs, "log_every_steps": 1, "sync_bn": sync_bn, "device": "cpu"}
    section |= {"precision": "fp32", "memory_format": "contiguous", **train}
    return Config.model_validate(
        {"model": {"arch": arch, "width": 4}, "train": section, "optim": {"lr": 0.05}, "checkpoint": {"keep": 2}}
    )


def schedules(arch: str = "res20") -> dict[str, Schedule]:
    """Plans that differ as much as plans can."""
    count = len(stage_names(build(arch, width=4)))
    head = Keep(count - 1, keep())
    middle = [Keep(index, LEAN) for index in range(1, count - 1)]
    inner = Segment(2, 3, uniform([LEAN] * 2, 2))
    nested = Segment(1, count - 2, Schedule((Keep(1, LEAN), inner, *middle[3:])))
    return {
        "lean": uniform([LEAN] * (count - 1) + [keep()]),
        "nested segments": Schedule((Keep(0, LEAN), nested, head)),
        "host": hosting(decompose(build(arch, width=4)), 3),
    }


def plan(schedule: Schedule, share: int, shares: tuple[int, ...], ladder: tuple[Plan, ...] = ()) -> Plan:
    micro = max(1, share)
    return Plan(
        budget_bytes=1 << 30, batch=micro, micro_batch=micro, accumulation=1, precision="fp32",
        memory_format="contiguous", exact=True, stages=stage_names(build("res20", width=4)), schedule=schedule,
        shares=shares, ladder=ladder,
    )  # fmt: skip


def trainer(
    group: Group,
    settings: Config,
    data: Dataset,
    split: Split | None = None,
    plan: Plan | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    spec = settings.model
    model = build(spec.arch, spec.block, width=spec.width, num_classes=10, seed=1).to(dtype)
    freeze(model, settings.train.freeze)
    return Trainer(settings, model, data, Observer(), plan, group, split)
