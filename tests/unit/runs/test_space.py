"""What a run takes on disk is at least what a run writes."""

from __future__ import annotations

import json

from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE, csv_line, gradient_line
from lowmem.runs.setup import rows_bytes, run_bytes

NONE = {"layers": 0, "grad_norms_every": 10**9}
LONGEST = 1e-300 / 3  # a float of as many digits as there are


def test_rows_fit_into_what_is_counted_for_them() -> None:
    one_epoch = rows_bytes(epochs=1, steps_per_epoch=0, log_every_steps=1, steps_between_saves=None, **NONE)
    event = json.dumps({"time": "2026-11-23T10:00:00+0000", "event": "checkpoint", "epoch": 10**6, "step": 10**9})
    whole = dict.fromkeys(EPOCH_TABLE.names, -LONGEST)
    assert len(csv_line(EPOCH_TABLE.names, whole)) + len(event) + 2 <= one_epoch
    row = csv_line(STEP_TABLE.names, {"step": 10**7, "epoch": 10**4, "lr": 0.1, "loss": LONGEST})
    assert (
        rows_bytes(epochs=1, steps_per_epoch=40, log_every_steps=20, steps_between_saves=None, **NONE) - one_epoch
        >= 2 * len(row) + 2
    )
    often = rows_bytes(epochs=1, steps_per_epoch=40, log_every_steps=100, steps_between_saves=10, **NONE)
    assert often - one_epoch >= 4 * (len(event) + 1)


def test_gradient_norms_fit_too() -> None:
    """The 110-layer net, every step of 164 epochs: its gradients.csv is larger than all that was counted before."""
    figures = {"epochs": 164, "steps_per_epoch": 391, "log_every_steps": 10, "steps_between_saves": None, "layers": 110}
    row = gradient_line(64_124, 164, [LONGEST] * 110)
    every = rows_bytes(**figures, grad_norms_every=1)  # type: ignore[arg-type]
    assert every - rows_bytes(**figures, grad_norms_every=10**9) >= 64_124 * (len(row) + 1)  # type: ignore[arg-type]


def test_one_generation_more_than_are_kept() -> None:
    assert run_bytes(checkpoint_bytes=100, parameter_bytes=10, keep=2, rows_bytes=7) == 3 * 100 + 3 * 10 + 7
