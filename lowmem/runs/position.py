"""What a checkpoint's state.json says, checked before anything is made of it: types, ranges, and that it is of its
step.

Only what a run could not go on from is refused: fields that a later version adds are that version's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowmem.core.errors import CorruptCheckpoint

_LARGEST = 1 << 53
_LARGEST_LOG = 745.2  # of a positive double, either way
_COUNTS = ("epoch", "step", "step_in_epoch", "seen")
_AMOUNTS = ("wrong", "elapsed_seconds", "train_seconds")
# What a run keeps track of besides; older versions did not.
_LATER_COUNTS = ("share_count", "chance_epochs", "exploded_losses", "rollbacks")
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def check_state(state: Mapping[str, Any], step: int) -> None:
    """Raises CorruptCheckpoint naming the first field of `state` (of the checkpoint of `step`) that cannot be."""
    run, identity = state.get("run"), state.get("identity")
    if not isinstance(run, dict) or not isinstance(identity, dict):
        raise CorruptCheckpoint(f"state.json of step {step} lacks what a run needs: its position and its identity")
    for name in _COUNTS:
        _need(is_count(run.get(name)), name, step)
    _need(run["step"] == step and run["step_in_epoch"] <= step, "step", step)
    _need((run["seen"] > 0) == (run["step_in_epoch"] > 0), "seen", step)
    for name in _AMOUNTS:
        _need(_is_amount(run.get(name)), name, step)
    _need(_is_number(run.get("loss_sum")), "loss_sum", step)  # not finite once a run has diverged
    _need(isinstance(run.get("low_start"), bool), "low_start", step)
    for name in _LATER_COUNTS:
        _need(is_count(run.get(name, 0)), name, step)
    logs, shares = run.get("share_log_sum", 0.0), run.get("share_count", 0)
    _need(_is_number(logs) and not _is_special(logs) and abs(logs) <= _LARGEST_LOG * shares, "share_log_sum", step)
    _need(run.get("gradient_share") is None or _is_amount(run["gradient_share"]), "gradient_share", step)
    scale = run.get("lr_scale", 1.0)
    _need(_is_amount(scale) and 0 < scale <= 1, "lr_scale", step)
    _need(isinstance(run.get("told_stuck", False), bool), "told_stuck", step)
    _need("best" in run and _is_best(run["best"]), "best", step)
    _need(is_count(run.get("processes", 1)) and run.get("processes", 1) > 0, "processes", step)
    _need(_is_scaler(run.get("scaler")), "scaler", step)


def _need(good: bool, name: str, step: int) -> None:
    if not good:
        raise CorruptCheckpoint(f"state.json of step {step} lacks what a run needs: {name!r} is missing or impossible")


def _is_number(value: object) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300) or _is_special(value)


def _is_special(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def is_count(value: object) -> bool:
    """An integer from zero that a float holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_amount(value: object) -> bool:
    return _is_number(value) and not _is_special(value) and value >= 0  # type: ignore[operator]


def _is_best(value: object) -> bool:
    match value:
        case None:
            return True
        case {"epoch": epoch, "step": step, "error_pct": error, "chosen_on": str(), **rest} if not rest:
            return is_count(epoch) and is_count(step) and _is_number(error)
    return False


def _is_scaler(value: object) -> bool:
    """Empty where nothing is scaled."""
    return isinstance(value, dict) and (not value or all(_is_amount(value.get(name)) for name in _SCALER))
