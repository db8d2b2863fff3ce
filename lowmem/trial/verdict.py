"""Whether a trial kept its budget, and whether its time is the card's or the host's."""

from __future__ import annotations

from lowmem.choose.budget import Budget
from lowmem.core.units import format_size
from lowmem.trial.trial import TrialResult

# Of a step's seconds: a card that computes less of them waits for the host to launch its kernels.
BUSY_SHARE = 0.8


def waits_for_host(busy_share: float | None) -> bool:
    """Whether a card computes so little of a step that what is timed is launching. Unknown is not known to be."""
    return busy_share is not None and busy_share < BUSY_SHARE


def launch_words(busy_share: float | None, batch: int) -> str | None:
    """What is to be said of a plain step in which the card waits for the host; None if it does not."""
    if busy_share is None or not waits_for_host(busy_share):
        return None
    return (
        f"Bound by launches: the card computes {busy_share:.0%} of a plain step at batch {batch}; compare at a larger "
        "--batch."
    )


def verdict(result: TrialResult, budget: Budget, device: str) -> tuple[str | None, bool]:
    """(why the trial is refused, or None if it holds; whether that is a matter of memory)."""
    if result.refused is not None:
        return result.refused, result.out_of_memory
    # On a card the convolution library's workspace comes from the same allocator as the tensors.
    limit = budget.tensor_bytes + (budget.workspace_bytes if device == "cuda" else 0)
    for what, taken in (
        ("training", result.peak_allocated_bytes),
        ("evaluation", result.eval_peak_allocated_bytes),
    ):
        if taken is not None and taken > limit:
            over = f"{taken / limit - 1:.1%} over the budget of {format_size(limit)}"
            return f"OVER: {what} takes {format_size(taken)}, {over}", True
    cap, reserved = budget.allocator_bytes, result.most_reserved_bytes
    if cap is not None and reserved is not None and reserved > cap - budget.pictures_bytes:
        return f"OVER: the allocator holds {format_size(reserved)}, it may hold {format_size(cap)}", True
    if not result.finite:
        return "the loss is not finite", False
    return None, False
