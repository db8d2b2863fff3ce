"""How much disk a run takes: one calculation, for the preflight, which has a checkpoint to measure, and the doctor."""

from __future__ import annotations

# Generous: a row of metrics.csv with its `checkpoint` event, and one of steps.csv.
_EPOCH_BYTES, _STEP_BYTES = 1024, 64


def rows_bytes(*, epochs: int, steps_per_epoch: int, log_every_steps: int, every_steps: int | None) -> int:
    """Bytes of metrics.csv, steps.csv and events.jsonl at the end of a run. `every_steps`: checkpoint.every_steps."""
    steps = epochs * steps_per_epoch
    saves = steps // every_steps if every_steps else 0
    return epochs * _EPOCH_BYTES + (steps // log_every_steps) * _STEP_BYTES + saves * 2 * _STEP_BYTES


def most_checkpoints(*, keep: int, keep_every: int | None, epochs: int) -> int:
    """Checkpoints that exist at the most: the newest `keep`, one that is being written, and of the epochs before them
    every `keep_every`-th."""
    return keep + 1 + ((epochs - 1) // keep_every if keep_every is not None else 0)


def run_bytes(*, checkpoint_bytes: int, parameter_bytes: int, checkpoints: int, rows_bytes: int = 0) -> int:
    """Bytes on disk that a run needs at its fullest.

    `checkpoint_bytes`: of one checkpoint, momentum included; weights are exported twice and replaced aside.
    `rows_bytes`: of metrics.csv and steps.csv at the end.
    """
    return checkpoints * checkpoint_bytes + 3 * parameter_bytes + rows_bytes
