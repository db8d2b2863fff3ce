"""The columns of metrics.csv and steps.csv, in file order. An unknown value is an empty field, never zero."""

from __future__ import annotations

METRICS = (
    "epoch",  # 1-based, completed
    "step",  # optimizer steps done
    "lr",
    "train_loss",
    "train_error_pct",
    "test_loss",
    "test_error_pct",
    "images_per_second",  # training only, evaluation not counted
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "elapsed_seconds",  # of the run, over all resumes
    # After the design's columns, so that their positions stay: only with data.val_split.
    "val_loss",
    "val_error_pct",
)
STEPS = ("step", "epoch", "lr", "loss")
INTEGER = frozenset({"epoch", "step", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes"})
# What a resumed run repeats bit for bit; the others are measurements.
EXACT_METRICS = tuple(
    name for name in METRICS if not name.endswith("_bytes") and name not in {"images_per_second", "elapsed_seconds"}
)
