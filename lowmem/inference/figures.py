"""The figures of an evaluation: which classes are taken for which, and the pictures that it is most wrong about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowmem.data.cutting import middles
from lowmem.data.pictures import MAPPED_FROM, AnyPictures, MappedPictures
from lowmem.inference.evaluation import Evaluation
from lowmem.report import style
from lowmem.report.agg import ConstrainedLayoutEngine, drawn_alike, to_rgb
from lowmem.report.chart import dress, fit, new_figure, to_bytes
from lowmem.report.labels import ink
from lowmem.report.naming import shorten_middle

_RIGHT, _WRONG = style.MEASURED, "#D55E00"
_MOST_NUMBERS, _MOST_NAMES = 12, 28  # classes: with more, numbers in cells and names beside them would be too small
_MOST_CELLS = 1000  # a side: a picture has no more pixels for them, and 20,000 classes would take gigabytes
_CONFUSION_INCHES = 6.6
_CONFUSIONS_NAMED = 4
_COLUMNS, _WORST = 4, 16
_CELL_INCHES, _WORDS_INCHES, _TITLE_INCHES = 1.36, 0.62, 0.55


@drawn_alike
def draw_confusion(evaluation: Evaluation) -> bytes:
    """A PNG. A row for each class, a column for each that its pictures were taken for; the stronger the colour, the
    more of the row's pictures."""
    classes, matrix = evaluation.classes, confusion(evaluation)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = new_figure(_CONFUSION_INCHES)
    axes = figure.add_subplot()
    axes.imshow(_colours(shares), aspect="equal", interpolation="antialiased" if len(matrix) > 300 else "nearest")
    dress(axes, grid="x")
    axes.grid(False)
    axes.set_xlabel("predicted", fontsize=style.AXIS_SIZE)
    axes.set_ylabel("class", fontsize=style.AXIS_SIZE)
    if len(classes) <= _MOST_NAMES:
        names = [shorten_middle(name) for name in classes]
        axes.set_yticks(range(len(names)), names, fontsize=style.LEAST_SIZE, parse_math=False)
        axes.set_xticks(range(len(names)), names, fontsize=style.LEAST_SIZE, parse_math=False, rotation=90)
    if len(classes) <= _MOST_NUMBERS:
        for row, column in np.argwhere(shares >= 0.005).tolist():
            share = shares[row, column]
            number = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center")
            number.set(fontsize=style.LEAST_SIZE, color="white" if share > 0.4 else "black")
    title = axes.set_title(_heading(evaluation), loc="left", fontsize=style.TITLE_SIZE, fontweight="bold")
    title.set_parse_math(False)
    words = "% of each class's pictures. Blue: right. Orange: wrong."
    if most := most_confused(evaluation):
        words += "\nMost: " + "\n".join(most)
    figure.supxlabel(words, ha="left", x=0.02, fontsize=style.LABEL_SIZE, color=style.NEUTRAL, parse_math=False)
    ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12).execute(figure)
    fit(title, figure.bbox.width - axes.bbox.x0)
    return to_bytes(figure)


def confusion(evaluation: Evaluation) -> NDArray[np.int64]:
    """How many pictures of each class (row) were taken for each (column), [C, C]; of very many classes neighbours
    together."""
    together = -(-len(evaluation.classes) // _MOST_CELLS)
    side = -(-len(evaluation.classes) // together)
    cells = evaluation.judged.labels // together * side + evaluation.judged.predictions // together
    return np.bincount(cells, minlength=side * side).reshape(side, side)


def most_confused(evaluation: Evaluation) -> list[str]:
    """`cat taken for dog: 12 %`, of the class's pictures; those with the most pictures first."""
    labels, predictions, classes = evaluation.judged.labels, evaluation.judged.predictions, evaluation.classes
    of_class = np.bincount(labels, minlength=len(classes))
    pairs, counts = np.unique(np.stack([labels, predictions])[:, labels != predictions], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_CONFUSIONS_NAMED]
    return [
        f"{classes[label]} taken for {classes[taken]}: {100 * count / of_class[label]:.0f} %"
        for (label, taken), count in zip(pairs.T[order].tolist(), counts[order].tolist(), strict=True)
    ]


def _colours(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB in [0, 1], [C, C, 3]: white for none. By the root, for a few per cent are what there is to see."""
    right = np.eye(len(shares), dtype=bool)[..., None]
    return 1 - np.sqrt(shares)[..., None] * (1 - np.where(right, to_rgb(_RIGHT), to_rgb(_WRONG)))


@drawn_alike
def draw_worst(evaluation: Evaluation) -> bytes:
    """A PNG of the pictures with the greatest losses, as the network sees them: what they are, what they were taken for
    and how surely, the loss in nats, and the file or the index."""
    judged, classes, tests = evaluation.judged, evaluation.classes, evaluation.tests
    worst = np.argsort(-np.nan_to_num(judged.losses, nan=np.inf), kind="stable")[:_WORST]
    rows = -(-len(worst) // _COLUMNS)
    height = _TITLE_INCHES + rows * (_CELL_INCHES + _WORDS_INCHES)
    figure = new_figure(height)
    side = (style.WIDTH_INCHES - _COLUMNS * _CELL_INCHES) / (_COLUMNS + 1)
    title = figure.text(side / style.WIDTH_INCHES, 1 - 0.12 / height, f"Most wrong: {_heading(evaluation)}", va="top")
    title.set(fontsize=style.TITLE_SIZE, fontweight="bold", parse_math=False)
    fit(title, figure.bbox.width * (1 - side / style.WIDTH_INCHES))
    for place, (number, image) in enumerate(zip(worst.tolist(), _images(tests.pictures, worst), strict=True)):
        row, column = divmod(place, _COLUMNS)
        left, top = side + column * (_CELL_INCHES + side), _TITLE_INCHES + row * (_CELL_INCHES + _WORDS_INCHES)
        box = left / style.WIDTH_INCHES, 1 - (top + _CELL_INCHES) / height
        axes = figure.add_axes((*box, _CELL_INCHES / style.WIDTH_INCHES, _CELL_INCHES / height))
        axes.imshow(image, interpolation="nearest" if image.shape[0] < MAPPED_FROM else "antialiased")
        axes.set_axis_off()
        surely = f"{100 * judged.probabilities[number]:.0f} %"
        name = Path(tests.files[number]).name if tests.files else f"picture {number}"
        lines = (
            (classes[judged.labels[number]], ink(_RIGHT)),
            (f"{classes[judged.predictions[number]]} {surely}", ink(_WRONG)),
            (f"{judged.losses[number]:.2f}  {name}", style.NEUTRAL),
        )
        for line, (words, colour) in enumerate(lines):
            drawn = figure.text(box[0], box[1] - (0.05 + 0.17 * line) / height, words, va="top", color=colour)
            drawn.set(fontsize=style.LEAST_SIZE, parse_math=False)
            fit(drawn, (_CELL_INCHES + side) / style.WIDTH_INCHES * figure.bbox.width)
    return to_bytes(figure)


def _heading(evaluation: Evaluation) -> str:
    return f"{evaluation.run.name} on {evaluation.tests.name}"


def _images(pictures: AnyPictures, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [K, S, S, 3]."""
    if isinstance(pictures, MappedPictures):
        images = middles(pictures, chosen.tolist())
    else:
        images = pictures.take(chosen).images
    return images.permute(0, 2, 3, 1).numpy()
