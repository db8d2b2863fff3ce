"""The figures of an evaluation, from two classes to very many: what they show, that they decode and that no text leaves
them. How they look was looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.data import Pictures, TestSet
from lowmem.inference.evaluation import Evaluation
from lowmem.inference.figures import confusion, draw_confusion, draw_worst
from lowmem.runs.view import RunView
from lowmem.runs.weights import WeightsInfo
from lowmem.step.train_step import Execution, Score
from tests.unit.report.test_figures import assert_margins_are_white, pixels

LONG = "a class with a name that is far too long, $x_1$ in it"


def evaluation(classes: tuple[str, ...], *, each: int = 4, files: bool = True) -> Evaluation:
    """The last picture of each class but the first is taken for the class before it, and the loss rises with the
    number of the picture."""
    count = each * len(classes)
    labels = np.repeat(np.arange(len(classes)), each)
    predictions = np.where((np.arange(count) % each == each - 1) & (labels > 0), labels - 1, labels)
    ones = np.full(count, 0.5, np.float32)
    losses = np.arange(count, dtype=np.float32)
    images = torch.arange(count).remainder(256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    paths = tuple(f"/pictures/{LONG} {number}.jpg" for number in range(count)) if files else ()
    tests = TestSet("folder:" + LONG, classes, Pictures(images, torch.from_numpy(labels)), paths)
    score = Score(float(losses.sum()), float((labels != predictions).sum()), count)
    fp32 = Execution("cpu", "fp32", "contiguous")
    run = RunView(Path("a run with a long name, which somebody wrote by hand"))
    judged = labels, predictions, ones, losses, labels >= 0
    return Evaluation(run, Path("best"), WeightsInfo(), tests, fp32, 1, score, None, *judged)


@pytest.mark.parametrize("count", [2, 28, 1000])
def test_confusion(count: int) -> None:
    known = evaluation(tuple(f"{number} {LONG}" for number in range(count)), each=4 if count < 1000 else 1)
    right, wrong = confusion(known)
    assert right.shape == wrong.shape == (min(count, 200),) * 2
    assert (right + wrong).sum(1) == pytest.approx(np.ones(len(right)))
    if count < 1000:  # else five classes stand together
        assert np.diag(right).tolist() == [1.0] + [0.75] * (count - 1)
        assert np.diag(wrong, -1).tolist() == [0.25] * (count - 1)
    png = draw_confusion(known)
    assert_margins_are_white(png)
    assert draw_confusion(known) == png


def test_very_many_classes_take_no_memory() -> None:
    right, wrong = confusion(evaluation(tuple(map(str, range(20_001))), each=1))
    assert right.shape == (199, 199)
    assert right.sum() + wrong.sum() == pytest.approx(199)


@pytest.mark.parametrize("files", [True, False])
def test_worst(files: bool) -> None:
    known = evaluation(("cat", LONG), each=10, files=files)
    png = draw_worst(known)
    image = pixels(png)
    assert_margins_are_white(png)
    grey = [tuple(np.round(255 * image[280, 160 + 295 * column]).astype(int)) for column in range(4)]
    assert grey == [(number,) * 3 for number in (19, 18, 17, 16)]  # the greatest losses first


def test_fewer_pictures_than_there_is_room_for() -> None:
    tall, few = (pixels(draw_worst(evaluation(("cat", "dog"), each=each))).shape for each in (10, 1))
    assert few[0] < tall[0] / 2


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    known = evaluation(("cat", "dog"), each=10)
    known.losses[3] = np.nan
    image = pixels(draw_worst(known))
    assert np.round(255 * image[280, 160]).astype(int).tolist() == [3, 3, 3]
