"""The folder of an evaluation: its figures as JSON, every picture as a row, and two pictures to look at."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np

from lowmem.core.errors import DiskError
from lowmem.core.phases import Phase, untold
from lowmem.inference.evaluation import Evaluation
from lowmem.runs.atomic import write_bytes_atomic, write_text_atomic

COLUMNS = ("picture", "label", "prediction", "probability", "loss")


def write_evaluation(evaluation: Evaluation, out: Path, phase: Phase = untold) -> list[Path]:
    """evaluation.json, predictions.csv, confusion.png and worst.png, in place of those of an earlier one. Raises
    DiskError."""
    phase("drawing figures")
    # matplotlib takes a second, and not all who import this draw
    from lowmem.inference.figures import draw_confusion, draw_worst

    pictures = {"confusion.png": draw_confusion(evaluation), "worst.png": draw_worst(evaluation)}
    texts = {"predictions.csv": _rows(evaluation), "evaluation.json": json.dumps(evaluation.to_json(), indent=1) + "\n"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            write_bytes_atomic(out / name, png)
        for name, text in texts.items():
            write_text_atomic(out / name, text)
    except OSError as error:
        raise DiskError(
            f"cannot write the evaluation to {out}: {error.strerror or error}: give another --out"
        ) from error
    return [out / name for name in (*texts, *pictures)]


def _rows(evaluation: Evaluation) -> str:
    """CSV with `COLUMNS`: the picture's path, or where it is no file its index from 0; classes by name; float32 in its
    shortest form that is the same number."""
    classes, files = evaluation.classes, evaluation.tests.files
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for number, label in enumerate(evaluation.labels.tolist()):
        name = files[number] if files else number
        figures = (
            np.format_float_positional(one[number], trim="0") for one in (evaluation.probabilities, evaluation.losses)
        )
        rows.writerow((name, classes[label], classes[evaluation.predictions[number]], *figures))
    return text.getvalue()
