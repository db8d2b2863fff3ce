"""`lowmem plan`: the choice in words or as JSON, and the curve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.choose.batch_split import describe_split
from lowmem.choose.decide import Silence, decide
from lowmem.choose.execution import resolve_execution
from lowmem.choose.explain import in_full
from lowmem.cli.terminal import say
from lowmem.config.cards import load_card
from lowmem.config.schema import cards_of
from lowmem.config.settings import Settings
from lowmem.core.errors import PreflightError, UsageError
from lowmem.runs.atomic import write_bytes_atomic

if TYPE_CHECKING:
    from lowmem.choose.request import Choice
    from lowmem.plan.solver import Points


def show_plan(settings: Settings, as_json: bool, curve: Path | None, recalibrate: bool = False) -> None:
    """Plans, prints, draws. With `recalibrate` the device at hand is measured first. For several cards, one process on
    each: who takes how much of the batch, and each one's plan.

    Raises Infeasible, UsageError, PreflightError."""
    card, names = settings.config.memory.card, cards_of(settings.config)
    if recalibrate:
        if card is not None:
            raise UsageError(
                f"--recalibrate measures the device at hand, and --card {card} asks for another: leave one out"
            )
        settings = settings.replace({"memory.calibrate": "always"}, "--recalibrate")
    if curve is not None and len(names) > 1:
        raise UsageError("--curve draws one card's plans: name one with --card")
    if card is None:
        # Without a named card it is about this machine: what `lowmem train` would do here.
        settings = resolve_execution(settings, planned=True)
    cards = [load_card(name) for name in names] if len(names) > 1 else []
    auto = settings.config.memory.auto_batch
    decided = decide(settings, tell=_Beside(), on_paper=True, recalibrate=recalibrate)
    config, split, choice = decided.settings.config, decided.planned, decided.choice
    assert split is not None
    title = f"{config.model.arch} ({config.model.block}, width {config.model.width})"
    rate = f"Learning rate {config.optim.lr:g} ({decided.settings.sources['optim.lr']})."
    curves = None if curve is None else _draw(choice, title, curve)
    if as_json:
        record = choice.plan.to_json()
        if cards:
            processes = [split.choices[rank].plan.to_json() for rank in range(len(cards))]
            record = {"shares": split.shares, "step_seconds": split.step_seconds, "processes": processes}
        elif curves is not None:
            record["curve"] = curves  # the points of the picture, as [bytes, share of time more than plain]
        print(json.dumps(record, indent=1))
        return
    print(f"{title}\n")
    if cards:
        print("\n".join(describe_split(split, [each.name for each in cards])))
        if auto:
            print(rate)
        for rank, each in enumerate(cards):
            print(f"\nProcess {rank}, {each.name}\n\n{in_full(split.choices[rank])}")
        return
    print(in_full(choice))
    if auto:
        print(f"\n{rate}")
    if curve is not None:
        print(f"\ndrawn: {curve}")


def _draw(choice: Choice, title: str, path: Path) -> Mapping[str, Points]:
    """The picture; returns what is in it. Raises PreflightError."""
    from lowmem.plan.solver import strategies
    from lowmem.report.method_figures import draw_memory_curve  # matplotlib: only if there is something to draw

    plan, curves = choice.plan, strategies(choice.chain, choice.plain.estimate.peak_allocated_bytes)
    words = f"{title}, batch {plan.batch}, {plan.precision}, {plan.memory_format}"
    try:
        write_bytes_atomic(path, draw_memory_curve(words, curves, choice.budget.tensor_bytes))
    except OSError as error:
        raise PreflightError(f"{path} cannot be written ({error.strerror}): give --curve another path") from None
    return curves


class _Beside(Silence):
    """Beside the plan, which may be piped into something."""

    def note(self, text: str) -> None:
        say(text, "stderr")
