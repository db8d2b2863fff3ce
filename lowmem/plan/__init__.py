"""Decides what is kept and what is computed again. Pure: no torch, no card, no files."""

from lowmem.plan.policy import (
    FUSED,
    INPUT_ONLY,
    LEAN,
    SAVE_ALL,
    BlockPolicy,
    Item,
    Keep,
    PolicyKind,
    Schedule,
    Segment,
    keep,
    uniform,
)
from lowmem.plan.record import Candidate, Plan, Predicted

__all__ = [
    "FUSED",
    "INPUT_ONLY",
    "LEAN",
    "SAVE_ALL",
    "BlockPolicy",
    "Candidate",
    "Item",
    "Keep",
    "Plan",
    "PolicyKind",
    "Predicted",
    "Schedule",
    "Segment",
    "keep",
    "uniform",
]
