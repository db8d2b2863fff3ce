"""How much disk a run takes: one calculation, for the preflight, which has a checkpoint to measure, and the doctor."""

from __future__ import annotations

# Generous: a row of metrics.csv with its `checkpoint` event, and one of steps.csv.
_EPOCH_BYTES, _STEP_BYTES = 1024, 64
_NORM_BYTES = 13  # of gradients.csv: six digits, an exponent, a comma


def rows_bytes(
    *,
    epochs: int,
    steps_per_epoch: int,
    log_every_steps: int,
    steps_between_saves: int | None,
    layers: int,
    grad_norms_every: int,
) -> int:
    """Bytes of metrics.csv, steps.csv, gradients.csv (of `layers` norms, every so many steps) and events.jsonl at the
    end of a run."""
    steps = epochs * steps_per_epoch
    saves = steps // steps_between_saves if steps_between_saves else 0
    gradients = (1 + steps // grad_norms_every) * (_STEP_BYTES + layers * _NORM_BYTES)
    logged = (steps // log_every_steps) * _STEP_BYTES
    return epochs * _EPOCH_BYTES + logged + saves * 2 * _STEP_BYTES + gradients


def kept_epochs(*, epochs: int, keep_every: int | None) -> int:
    """Checkpoints that checkpoint.keep_every keeps beside the newest, at the most: the last epoch's is one of those."""
    return 0 if keep_every is None else (epochs - 1) // keep_every


def run_bytes(
    *, checkpoint_bytes: int, parameter_bytes: int, keep: int, kept_epochs: int = 0, rows_bytes: int = 0
) -> int:
    """Bytes on disk that a run needs at its fullest.

    `checkpoint_bytes`: of one checkpoint, momentum included. One more generation than are kept exists while a new one
    is written; weights are exported twice and replaced aside.
    """
    return (keep + 1 + kept_epochs) * checkpoint_bytes + 3 * parameter_bytes + rows_bytes
