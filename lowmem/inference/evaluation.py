"""What a trained network makes of pictures whose classes are known: the figures that its metrics.csv has, by the same
code in the same batches, and each picture's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lowmem.config.paths import where_else
from lowmem.config.schema import Config
from lowmem.core.errors import DataError, UsageError
from lowmem.core.units import counted, name_some
from lowmem.data import AnyPictures, TestSet, eval_batches, load, load_test
from lowmem.inference.execution import evaluation_parts, prepare_execution, within_memory
from lowmem.inference.loading import LoadedRun, load_run
from lowmem.runs.rows import EpochRow
from lowmem.runs.view import RunView, recorded_settings
from lowmem.runs.weights import WeightsInfo
from lowmem.step.train_step import Execution, Score, evaluate
from lowmem.train.observer import Observer

TOP = 5  # of the top-5 error, told where there are more than twice as many classes
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A run's network on pictures. `weights`, `info`: the file, and what it says of itself; `tests`: the pictures, with
    the labels that the network has for their classes; `batch`: how many at a time; `row`: of metrics.csv, where that is
    of the same weights and pictures.

    Of the pictures one by one, [N] each: the `labels` and the `predictions`, int64; the probability of the latter and
    the loss (nats), float32; whether the label is among the `TOP` most probable, bool."""

    run: RunView
    weights: Path
    info: WeightsInfo
    tests: TestSet
    execution: Execution
    batch: int
    score: Score
    row: EpochRow | None
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    losses: NDArray[np.float32]
    in_top: NDArray[np.bool_]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.tests.classes

    @property
    def top_error_pct(self) -> float | None:
        """None where there are too few classes for it to say much."""
        if len(self.classes) <= 2 * TOP:
            return None
        return 100.0 * int((~self.in_top).sum()) / self.score.count

    @property
    def as_recorded(self) -> bool | None:
        """Whether loss and error are those of metrics.csv to the last digit; None where it has none to compare with."""
        if self.row is None:
            return None
        return (self.row.test_loss, self.row.test_error_pct) == (self.score.loss, self.score.error_pct)

    def by_class(self) -> list[dict[str, Any]]:
        """Of each class its `name`, `count` of pictures, `precision` and `recall` in [0, 1]; None of no picture."""
        right, count, taken = (
            np.bincount(one, minlength=len(self.classes)).tolist()
            for one in (self.labels[self.labels == self.predictions], self.labels, self.predictions)
        )
        return [
            {
                "name": name,
                "precision": right[label] / taken[label] if taken[label] else None,
                "recall": right[label] / count[label] if count[label] else None,
                "count": count[label],
            }
            for label, name in enumerate(self.classes)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for evaluation.json and `--json`."""
        return {
            "run": str(self.run.path),
            "weights": str(self.weights),
            "epoch": self.info.epoch,
            "step": self.info.step,
            "data": self.tests.name,
            "count": self.score.count,
            "loss": self.score.loss,
            "error_pct": self.score.error_pct,
            "top5_error_pct": self.top_error_pct,
            "as_in_metrics_csv": self.as_recorded,
            **vars(self.execution),
            "batch": self.batch,
            "classes": self.by_class(),
        }


def evaluate_runs(
    paths: Sequence[Path], weights: str, changes: Mapping[str, object], tell: Observer
) -> Iterator[Evaluation]:
    """Each run's network, `weights` as in `load_run`, on its own test pictures, or with `data.source` among the
    `changes` on those. `changes`: settings that say where pictures are, and which device computes.

    Raises UsageError for what is no run, and for pictures of other classes; OutOfMemory; what `load_run` and `load`
    raise."""
    read: dict[str, TestSet] = {}  # runs of one recipe have the same pictures
    own = "data.source" not in changes
    for path in paths:
        config, run = recorded_settings(path).replace(changes, "evaluate").config, RunView(path)
        tell.phase(f"loading {path.name}")
        network = load_run(path, weights, config.train.device)
        key = f"{config.seed} {config.data}"
        if key not in read:
            read[key] = _read_pictures(config, own, tell)
        yield _evaluate(network, run, config, _in_order(read[key], network, path), own, tell)


def _evaluate(
    network: LoadedRun, run: RunView, config: Config, tests: TestSet, own: bool, tell: Observer
) -> Evaluation:
    execution, parts = prepare_execution(network), evaluation_parts(run, config, len(tests.pictures))
    scores, columns, sizes = [], [], []
    for first, past, batch in parts:
        part, what = tests.pictures.part(first, past), f"evaluating {run.path.name}"
        if past > first:
            (score, seen), size = within_memory(partial(_score, network, execution, part, tell, what), batch, tell)
            scores.append(astuple(score))
            columns.append(seen)
            sizes.append(size)
    total = Score(*map(sum, zip(*scores, strict=True)))
    every: Any = map(np.concatenate, zip(*columns, strict=True))
    info, row = network.info, None
    if own and network.weights.parent == run.path / "weights":
        row = next((row for row in run.epochs if (row.epoch, row.step) == (info.epoch, info.step)), None)
    return Evaluation(run, network.weights, info, tests, execution, max(sizes), total, row, *every)


def _read_pictures(config: Config, own: bool, tell: Observer) -> TestSet:
    tell.phase("reading pictures")
    try:
        if own:
            data = load(config.data, config.seed, progress=tell.phase)
            found = TestSet(data.name, data.classes, data.test, data.test_files, data.warnings)
        else:
            found = load_test(config.data, progress=tell.phase)
    except DataError as error:
        raise DataError(f"{error}{where_else(config, flags=True)}") from None
    for text in found.warnings:
        tell.warning(text)
    return found


def _in_order(found: TestSet, network: LoadedRun, path: Path) -> TestSet:
    """With the labels that the network has for the classes. Raises UsageError for other classes than it tells apart."""
    ours, theirs = network.info.classes or (), tuple(text.encode("utf-8", "replace").decode() for text in found.classes)
    if {*ours} != {*theirs}:
        there, here = (
            f"{counted(len(one), 'class')}{_only_there(one, other)}" for one, other in ((theirs, ours), (ours, theirs))
        )
        raise UsageError(
            f"{found.name} has {there}, and the network of {path} tells apart {here}: give pictures of the same "
            "classes, by the same names"
        )
    label = torch.tensor(range(len(ours)) if ours == theirs else [ours.index(name) for name in theirs])
    return replace(found, classes=ours, pictures=replace(found.pictures, labels=label[found.pictures.labels]))


def _only_there(one: Sequence[str], other: Sequence[str]) -> str:
    names = sorted({*one} - {*other})
    return f" (other ones: {name_some(names, _NAMED)})" if names else ""


def _score(
    network: LoadedRun, execution: Execution, pictures: AnyPictures, tell: Observer, what: str, size: int
) -> tuple[Score, list[NDArray[Any]]]:
    """And of each picture what an `Evaluation` has last."""
    columns: list[list[Tensor]] = []

    def look(logits: Tensor, labels: Tensor) -> None:
        logits, predictions = logits.float(), logits.argmax(1)
        probabilities = logits.softmax(1).gather(1, predictions[:, None])[:, 0]
        losses = F.cross_entropy(logits, labels, reduction="none")
        in_top = (logits.topk(min(TOP, logits.shape[1]), 1).indices == labels[:, None]).any(1)
        columns.append([one.cpu() for one in (labels, predictions, probabilities, losses, in_top)])

    def going_on(done: int) -> bool:
        tell.phase(what, done, len(pictures))
        return False

    info = network.info
    assert info.mean is not None
    assert info.std is not None
    batches = eval_batches(pictures, size, info.mean, info.std, network.device, execution.torch_memory_format)
    score = evaluate(network.model, batches, execution, going_on, look)
    assert score is not None
    return score, [torch.cat(one).numpy() for one in zip(*columns, strict=True)]
