"""How much disk a run takes: one calculation, for the preflight, which has a checkpoint to measure, and the doctor."""

from __future__ import annotations


def run_bytes(*, checkpoint_bytes: int, parameter_bytes: int, keep: int) -> int:
    """Bytes on disk that a run needs at its fullest.

    `checkpoint_bytes`: of one checkpoint, momentum included. One more generation than are kept exists while a new one
    is written; weights are exported twice and replaced aside.
    """
    return (keep + 1) * checkpoint_bytes + 3 * parameter_bytes
