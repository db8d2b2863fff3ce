"""`lowmem plan`: the choice in words or as JSON, and the curve."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.choose.batch_split import describe_split
from lowmem.choose.decide import Silence, decide
from lowmem.choose.execution import resolve_execution
from lowmem.choose.explain import in_full
from lowmem.config.cards import load_card
from lowmem.config.schema import cards_of
from lowmem.config.settings import Settings
from lowmem.core.errors import PreflightError, UsageError
from lowmem.runs.atomic import write_bytes_atomic

if TYPE_CHECKING:
    from lowmem.choose.curve import Points
    from lowmem.choose.request import Choice


def show_plan(settings: Settings, as_json: bool, curve: Path | None, recalibrate: bool = False) -> None:
    """Plans, prints, draws. With `recalibrate` the device at hand is measured first.

    Raises Infeasible, UsageError, PreflightError."""
    if recalibrate:
        settings = _measured_here(settings)
    if len(cards_of(settings.config)) > 1:
        _show_shares(settings, as_json, curve)
        return
    if settings.config.memory.card is None:
        # Without a named card it is about this machine: what `lowmem train` would do here.
        settings = resolve_execution(settings, planned=True)
    auto = settings.config.memory.auto_batch
    decided = decide(settings, tell=_Beside(), on_paper=True, recalibrate=recalibrate)
    config, sources, choice = decided.settings.config, decided.settings.sources, decided.choice
    title = f"{config.model.arch} ({config.model.block}, width {config.model.width})"
    curves = None if curve is None else _draw(choice, title, curve)
    if as_json:
        # The points of the picture with it, as [bytes, share of time more than plain].
        record = choice.plan.to_json()
        print(json.dumps(record if curves is None else {**record, "curve": curves}, indent=1))
        return
    print(f"{title}\n")
    print(in_full(choice))
    if auto:
        print(f"\nLearning rate {config.optim.lr:g} ({sources['optim.lr']}).")
    if curve is not None:
        print(f"\ndrawn: {curve}")


def _show_shares(settings: Settings, as_json: bool, curve: Path | None) -> None:
    """One process on each of several cards: who takes how much of the batch, and each one's plan."""
    if curve is not None:
        raise UsageError("--curve draws one card's plans: name one with --card")
    cards = [load_card(name) for name in cards_of(settings.config)]
    auto = settings.config.memory.auto_batch
    decided = decide(settings, tell=_Beside(), on_paper=True)
    config, sources, split = decided.settings.config, decided.settings.sources, decided.planned
    assert split is not None
    plans = [split.choices[rank].plan for rank in range(len(cards))]
    if as_json:
        record = {"shares": split.shares, "step_seconds": split.step_seconds}
        print(json.dumps({**record, "processes": [plan.to_json() for plan in plans]}, indent=1))
        return
    print(f"{config.model.arch} ({config.model.block}, width {config.model.width})\n")
    print("\n".join(describe_split(split, [card.name for card in cards])))
    if auto:
        print(f"Learning rate {config.optim.lr:g} ({sources['optim.lr']}).")
    for rank, card in enumerate(cards):
        print(f"\nProcess {rank}, {card.name}\n")
        print(in_full(split.choices[rank]))


def _draw(choice: Choice, title: str, path: Path) -> Mapping[str, Points]:
    """The picture; returns what is in it. Raises PreflightError."""
    from lowmem.choose.curve import strategies
    from lowmem.report.memory_curve import draw_memory_curve  # matplotlib: only if there is something to draw

    plan, curves = choice.plan, strategies(choice)
    words = f"{title}, batch {plan.batch}, {plan.precision}, {plan.memory_format}"
    try:
        write_bytes_atomic(path, draw_memory_curve(words, curves, choice.budget.tensor_bytes))
    except OSError as error:
        raise PreflightError(f"{path} cannot be written ({error.strerror}): give --curve another path") from None
    return curves


def _measured_here(settings: Settings) -> Settings:
    """Raises UsageError if it is about another card than the one at hand."""
    card = settings.config.memory.card
    if card is not None:
        raise UsageError(
            f"--recalibrate measures the device at hand, and --card {card} asks for another: leave one out"
        )
    return settings.replace({"memory.calibrate": "always"}, "--recalibrate")


class _Beside(Silence):
    """Beside the plan, which may be piped into something."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
