"""`lowmem plan`: the choice in words or as JSON, and the curve."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lowmem.choose.execution import resolve_execution
from lowmem.choose.explain import in_full
from lowmem.choose.session import plan_run
from lowmem.errors import PreflightError, UsageError
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.settings import Settings


def show_plan(settings: Settings, as_json: bool, curve: Path | None, recalibrate: bool = False) -> None:
    """Plans, prints, draws. With `recalibrate` the device at hand is measured first.

    Raises Infeasible, UsageError, PreflightError."""
    if recalibrate:
        settings = _measured_here(settings)
    if settings.config.memory.card is None:
        # Without a named card it is about this machine: what `lowmem train` would do here.
        settings = resolve_execution(settings, planned=True)
    settings, choice = plan_run(settings, progress=_tell, recalibrate=recalibrate)
    config = settings.config
    title = f"{config.model.arch} ({config.model.block}, width {config.model.width})"
    if as_json:
        print(json.dumps(choice.plan.to_json(), indent=1))
    else:
        print(f"{title}\n")
        print(in_full(choice))
        if config.memory.auto_batch:
            print(f"\nLearning rate {config.optim.lr:g} ({settings.sources['optim.lr']}).")
    if curve is not None:
        from lowmem.choose.curve import strategies
        from lowmem.report.memory_curve import draw_memory_curve  # matplotlib: only if there is something to draw

        plan = choice.plan
        words = f"{title}, batch {plan.batch}, {plan.precision}, {plan.memory_format}"
        png = draw_memory_curve(words, strategies(choice), choice.budget.tensor_bytes)
        try:
            write_bytes_atomic(curve, png)
        except OSError as error:
            raise PreflightError(f"{curve} cannot be written ({error.strerror}): give --curve another path") from None
        if not as_json:
            print(f"\ndrawn: {curve}")


def _measured_here(settings: Settings) -> Settings:
    """Raises UsageError if it is about another card than the one at hand."""
    card = settings.config.memory.card
    if card is not None:
        raise UsageError(
            f"--recalibrate measures the device at hand, and --card {card} asks for another: leave one out"
        )
    return settings.replace({"memory.calibrate": "always"}, "--recalibrate")


def _tell(text: str) -> None:
    """Beside the plan, which may be piped into something."""
    print(text, file=sys.stderr, flush=True)
