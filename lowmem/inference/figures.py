"""What is written of an evaluation: its figures as JSON, a row of each picture, and drawn which classes are taken for
which, and the pictures that it is most wrong about."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem.core.phases import Phase, untold
from lowmem.core.reading import shorten
from lowmem.data.batches import as_seen
from lowmem.data.pictures import MAPPED_FROM
from lowmem.inference.evaluation import Evaluation
from lowmem.report import style
from lowmem.report.agg import ConstrainedLayoutEngine, drawn_alike, to_rgb
from lowmem.report.chart import dress, fit, new_figure, to_bytes
from lowmem.report.labels import ink
from lowmem.report.naming import shorten_middle
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.checkpoint import disk_errors

_RIGHT, _WRONG = style.MEASURED, "#D55E00"
_MOST_NUMBERS, _MOST_NAMES = 12, 28  # classes: with more, numbers in the cells and names beside them had no room
_MOST_CELLS = 200  # a side: smaller ones are hardly seen, and 20,000 classes would take gigabytes
_CONFUSION_INCHES, _EDGE = 6.6, 0.02  # the edge as a share of the width
_PAIRS_NAMED = 4
_COLUMNS, _WORST = 4, 16
_CELL_INCHES, _WORDS_INCHES, _HEAD_INCHES = 1.36, 0.62, 0.68


def write_evaluation(evaluation: Evaluation, out: Path, phase: Phase = untold) -> None:
    """evaluation.json, predictions.csv, confusion.png and worst.png, in place of those of an earlier one. Raises
    DiskError."""
    phase("drawing figures")
    files = {
        "evaluation.json": (json.dumps(evaluation.to_json(), indent=1) + "\n").encode(),
        "predictions.csv": _rows(evaluation).encode(),
        "confusion.png": draw_confusion(evaluation),
        "worst.png": draw_worst(evaluation),
    }
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_bytes_atomic(out / name, data)


def _rows(evaluation: Evaluation) -> str:
    """CSV: the picture's path, or where it is no file its index from 0; classes by name; float32 in its shortest form
    that is the same number."""
    classes, labels = np.array(evaluation.classes, object), evaluation.labels
    figures = (
        [np.format_float_positional(value, trim="0") for value in one]
        for one in (evaluation.probabilities, evaluation.losses)
    )
    names = evaluation.tests.files or range(len(labels))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("picture", "label", "prediction", "probability", "loss"))
    rows.writerows(zip(names, classes[labels], classes[evaluation.predictions], *figures, strict=True))
    return text.getvalue()


@drawn_alike
def draw_confusion(evaluation: Evaluation) -> bytes:
    """A PNG. A row for each class, a column for each that its pictures were taken for: the stronger the colour, the
    more of the row's pictures."""
    classes, (right, wrong) = evaluation.classes, confusion(evaluation)
    figure = new_figure(_CONFUSION_INCHES)
    axes = figure.add_subplot()
    tinted = (
        1 - np.sqrt(one)[..., None] * (1 - np.array(to_rgb(hue))) for one, hue in ((right, _RIGHT), (wrong, _WRONG))
    )
    low, high = -0.5, len(classes) - 0.5
    axes.imshow(np.prod([*tinted], axis=0), extent=(low, high, high, low), interpolation="nearest")
    dress(axes)
    axes.grid(False)
    axes.set_xlabel("predicted", fontsize=style.AXIS_SIZE)
    axes.set_ylabel("class", fontsize=style.AXIS_SIZE)
    words = ["% of each class's pictures. Blue: right. Orange: wrong."]
    if len(classes) <= _MOST_NAMES:
        names = [shorten_middle(name) for name in classes]
        axes.set_yticks(range(len(names)), names, fontsize=style.LEAST_SIZE, parse_math=False)
        axes.set_xticks(range(len(names)), names, fontsize=style.LEAST_SIZE, parse_math=False, rotation=90)
    else:
        words[0] += " Classes by number, from 0."
    for row, column in np.argwhere(right + wrong >= 0.005).tolist() if len(classes) <= _MOST_NUMBERS else ():
        share = (right + wrong)[row, column]
        number = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center")
        number.set(fontsize=style.LEAST_SIZE, color="white" if share > 0.4 else "black")
    words += _most_confused(evaluation)
    title = figure.suptitle(_heading(evaluation), x=_EDGE, ha="left", fontsize=style.TITLE_SIZE, fontweight="bold")
    below = figure.supxlabel("\n".join(words), x=_EDGE, ha="left", fontsize=style.LABEL_SIZE, color=style.NEUTRAL)
    for drawn in (title, below):
        drawn.set_parse_math(False)
        fit(drawn, (1 - _EDGE) * figure.bbox.width)
    ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12).execute(figure)
    return to_bytes(figure)


def confusion(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of each class's pictures (row) that were taken for each (column), those rightly and those wrongly, [C, C]
    each; of many classes neighbours together."""
    labels, predictions = evaluation.labels, evaluation.predictions
    together = -(-len(evaluation.classes) // _MOST_CELLS)
    side = -(-len(evaluation.classes) // together)
    cells = labels // together * side + predictions // together
    right, wrong = (
        np.bincount(cells[those], minlength=side * side).reshape(side, side)
        for those in (labels == predictions, labels != predictions)
    )
    count = np.maximum((right + wrong).sum(1, keepdims=True), 1)
    return right / count, wrong / count


def _most_confused(evaluation: Evaluation) -> list[str]:
    """`cat taken for dog: 12 %`, of the class's pictures; those with the most pictures first."""
    labels, predictions, classes = evaluation.labels, evaluation.predictions, evaluation.classes
    of_class = np.bincount(labels, minlength=len(classes))
    pairs, counts = np.unique(np.stack([labels, predictions])[:, labels != predictions], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_PAIRS_NAMED]
    return [
        f"{shorten(classes[label], 24)} taken for {shorten(classes[taken], 24)}: {100 * count / of_class[label]:.0f} %"
        for (label, taken), count in zip(pairs.T[order].tolist(), counts[order].tolist(), strict=True)
    ]


@drawn_alike
def draw_worst(evaluation: Evaluation) -> bytes:
    """A PNG of the pictures with the greatest losses, as the network sees them: what they are, what they were taken for
    and how surely, the loss in nats, and the file or the index."""
    classes, tests = evaluation.classes, evaluation.tests
    worst = np.argsort(-np.nan_to_num(evaluation.losses, nan=np.inf), kind="stable")[:_WORST]
    width, height = style.WIDTH_INCHES, _HEAD_INCHES + -(-len(worst) // _COLUMNS) * (_CELL_INCHES + _WORDS_INCHES)
    figure, side = new_figure(height), (width - _COLUMNS * _CELL_INCHES) / (_COLUMNS + 1)

    def write(
        left: float, top: float, words: str, room: float, colour: str, size: float, weight: str = "normal"
    ) -> None:
        words = shorten(words, round(20 * room))  # more would not fit, and every character is measured
        drawn = figure.text(left / width, 1 - top / height, words, va="top", color=colour, parse_math=False)
        drawn.set(fontsize=size, fontweight=weight)
        fit(drawn, room * style.DPI)

    write(side, 0.12, f"Most wrong: {_heading(evaluation)}", width - side, "black", style.TITLE_SIZE, "bold")
    legend = "Blue: what it is. Orange: what it was taken for. Grey: the loss, and which picture."
    write(side, 0.38, legend, width - side, style.NEUTRAL, style.LABEL_SIZE)
    images = as_seen(tests.pictures.take(worst), torch.device("cpu")).permute(0, 2, 3, 1).numpy()
    for place, (number, image) in enumerate(zip(worst.tolist(), images, strict=True)):
        left = side + place % _COLUMNS * (_CELL_INCHES + side)
        foot = _HEAD_INCHES + place // _COLUMNS * (_CELL_INCHES + _WORDS_INCHES) + _CELL_INCHES
        axes = figure.add_axes((left / width, 1 - foot / height, _CELL_INCHES / width, _CELL_INCHES / height))
        smooth = "nearest" if image.shape[0] < MAPPED_FROM else "antialiased"
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smooth)  # the scale is of one channel
        axes.set_axis_off()
        name = Path(tests.files[number]).name if tests.files else f"picture {number}"
        taken = f"{100 * evaluation.probabilities[number]:.0f} % {classes[evaluation.predictions[number]]}"
        lines = (classes[evaluation.labels[number]], taken, f"{evaluation.losses[number]:.2f}  {name}")
        for line, (words, colour) in enumerate(zip(lines, (ink(_RIGHT), ink(_WRONG), style.NEUTRAL), strict=True)):
            write(left, foot + 0.05 + 0.17 * line, words, _CELL_INCHES + side, colour, style.LEAST_SIZE)
    return to_bytes(figure)


def _heading(evaluation: Evaluation) -> str:
    return shorten(f"{evaluation.run.name} on {evaluation.tests.name}", 80)
