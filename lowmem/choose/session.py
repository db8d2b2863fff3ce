"""From a run's settings to its plan: which budget, which rates, which batch."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowmem.cards import Card, find_card, load_card
from lowmem.choose.budget import Budget, of_card, of_device, tensors_only
from lowmem.choose.execution import has_tensor_cores
from lowmem.choose.planning import REFERENCE_CARD, Choice, Request, card_rates, choose, precision_order
from lowmem.config import Config
from lowmem.errors import Infeasible, UsageError
from lowmem.models import skeleton
from lowmem.plan.record import Candidate, Plan
from lowmem.settings import Settings

_PICTURE_BYTES = 3 * 32 * 32  # uint8
AUTO_BATCHES = (32, 64, 128, 256, 512, 1024)


def wants_plan(config: Config) -> bool:
    """Whether there is anything to fit into: a budget, a card, or a CUDA device that has what it has."""
    memory = config.memory
    return memory.vram is not None or memory.card is not None or config.train.device == "cuda"


def budget_of(config: Config, train_pictures: int = 0) -> tuple[Budget, Card | None]:
    """The budget for the step's tensors and, where it is known, the card whose rates predict time.

    Raises UsageError for an unknown card or where there is nothing to fit into, Infeasible for too small a card.
    """
    memory = config.memory
    pictures_bytes = train_pictures * _PICTURE_BYTES
    if memory.card is not None:
        card = load_card(memory.card)
        return of_card(card, memory.vram, pictures_bytes), card
    if config.train.device == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return of_device(free, total, memory.vram, pictures_bytes), find_card(torch.cuda.get_device_name(), total)
    if memory.vram is None:
        raise UsageError("there is nothing to fit into: give --vram, like --vram 6G, or --card, like --card gtx1060-6g")
    return tensors_only(memory.vram), None


def request_of(config: Config, num_classes: int = 10, train_pictures: int = 0) -> Request:
    """What `choose` needs to know of a run. Raises as `budget_of` does, and UsageError for settings at odds."""
    budget, card = budget_of(config, train_pictures)
    model, micro_batch = config.model, config.train.micro_batch
    if micro_batch is not None and config.memory.auto_batch:
        raise UsageError("--batch auto chooses a batch that fits in one piece: leave --micro-batch out")
    if micro_batch is not None and micro_batch < config.train.batch and not config.memory.allow_accumulation:
        raise UsageError(
            f"--micro-batch {micro_batch} accumulates up to the batch of {config.train.batch}, and "
            "memory.allow_accumulation=false forbids it: leave one of them out"
        )
    if card is None and config.train.device == "cuda" and torch.cuda.is_available():
        tensor_cores = has_tensor_cores()
    else:
        tensor_cores = card is not None and card.tensor_cores
    layout = config.train.memory_format
    return Request(
        model=skeleton(model.arch, model.block, width=model.width, num_classes=num_classes),
        batch=config.train.batch,
        budget=budget,
        rates=card_rates(card or load_card(REFERENCE_CARD)),
        precisions=precision_order(config.train.precision, tensor_cores),
        memory_format=("channels-last" if tensor_cores else "contiguous") if layout == "auto" else layout,
        micro_batch=config.train.micro_batch,
        allow_accumulation=config.memory.allow_accumulation,
        momentum=config.optim.momentum > 0,
    )


def plan_run(settings: Settings, num_classes: int = 10, train_pictures: int | None = None) -> tuple[Settings, Choice]:
    """The settings with what the plan decided (precision, memory format, and with `--batch auto` batch and learning
    rate), and the choice. Raises Infeasible, UsageError."""
    request = request_of(settings.config, num_classes, train_pictures or 0)
    choice = ranked(request, settings.config, train_pictures)[0]
    return settle(settings, choice), choice


def ranked(request: Request, config: Config, train_pictures: int | None) -> list[Choice]:
    """The choice, and with `--batch auto` the other batches that fit, those with more pictures per second first.

    Raises Infeasible, UsageError."""
    return _batches(request, train_pictures) if config.memory.auto_batch else [choose(request)]


def settle(settings: Settings, choice: Choice) -> Settings:
    """The settings with what the choice decided."""
    if settings.config.memory.auto_batch:
        settings = _follow_batch(settings, choice.plan.batch)
    plan = choice.plan
    decided: dict[str, object] = {}
    if settings.config.train.precision != plan.precision:
        decided["train.precision"] = plan.precision
    if settings.config.train.memory_format != plan.memory_format:
        decided["train.memory_format"] = plan.memory_format
    return settings.replace(decided, "auto: the plan") if decided else settings


def replan(config: Config, recorded: Plan, num_classes: int = 10, train_pictures: int = 0) -> Choice:
    """A plan for another budget that computes what the recorded one does: same precision, format and micro-batch.

    Raises Infeasible."""
    request = request_of(config, num_classes, train_pictures)
    return choose(
        replace(
            request,
            batch=recorded.batch,
            precisions=(recorded.precision,),
            memory_format=recorded.memory_format,
            micro_batch=recorded.micro_batch,
            settled=True,
        )
    )


def _batches(request: Request, train_pictures: int | None) -> list[Choice]:
    """The batches that fit without accumulation, the one with the most pictures per second first; why the others were
    not chosen stands with it. Raises Infeasible if none does."""
    fitting: list[Choice] = []
    refused: list[Candidate] = []
    least: Infeasible | None = None
    for batch in AUTO_BATCHES:
        if train_pictures is not None and batch > train_pictures:
            continue
        try:
            fitting.append(choose(replace(request, batch=batch, micro_batch=None, allow_accumulation=False)))
        except Infeasible as error:
            least = least or error
            refused.append(
                Candidate(what=f"batch {batch}", refused_because="does not fit", peak_bytes=error.least_bytes)
            )
            break  # nothing larger fits either
    if not fitting:
        raise least or UsageError("there are too few pictures for --batch auto: give a batch")
    best, *others = sorted(fitting, key=lambda choice: -choice.images_per_second)
    candidates = (*(_slower(choice) for choice in others), *refused, *best.plan.candidates)
    return [replace(best, plan=replace(best.plan, candidates=candidates)), *others]


def _slower(choice: Choice) -> Candidate:
    return Candidate(
        what=f"batch {choice.plan.batch}",
        refused_because=f"fewer pictures per second ({choice.images_per_second:.0f})",
        peak_bytes=choice.plan.predicted.peak_allocated_bytes,
        step_seconds=choice.plan.predicted.step_seconds,
    )


def _follow_batch(settings: Settings, batch: int) -> Settings:
    """The linear rule (Goyal et al., "Accurate, large minibatch SGD", 2017): the learning rate follows the batch."""
    config = settings.config
    before = config.train.batch
    settings = settings.replace({"train.batch": batch}, "auto: the most pictures per second that fit")
    if batch == before:
        return settings
    factor = batch / before
    rates = {"optim.lr": config.optim.lr * factor, "schedule.low_start_lr": config.schedule.low_start_lr * factor}
    return settings.replace(rates, f"linear rule: batch {before} -> {batch}")
