"""What a trained network says of pictures whose classes nobody knows, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem.core.phases import Phase, untold
from lowmem.data.decoding import decode_ahead
from lowmem.data.pictures import stored_side
from lowmem.inference.execution import batch_of, prepare_execution, within_memory
from lowmem.inference.loading import LoadedRun
from lowmem.step.train_step import Execution
from lowmem.train.observer import Observer

Prediction = tuple[str, list[tuple[str, float]] | str]
"""A picture by its path, and the most probable classes with their probabilities, the first the most probable; or in
their place why it cannot be used."""


def predict(
    run: LoadedRun,
    path: Path,
    files: Iterable[tuple[str, str]],
    top: int,
    tell: Observer,
    phase: Phase = untold,
    total: int | None = None,
) -> Iterator[list[Prediction]]:
    """Of `files` (paths, and why they cannot be read at all, as `picture_files` gives them) in order, a batch at a
    time; they are decoded ahead in threads, two batches at the most. `path`: what the run was loaded from; `total`: how
    many there will be, if that is known. Raises OutOfMemory, CorruptCheckpoint."""
    execution, batch = prepare_execution(run), batch_of(path, run.config)
    classes, size, done = run.info.classes or (), batch, 0
    decoded = decode_ahead(files, run.pictures.fit, stored_side(run.pictures), batch, run.pictures.channels)
    while group := list(islice(decoded, batch)):
        likely: Iterator[list[tuple[str, float]]] = iter(())
        if pictures := [pixels for _, pixels in group if not isinstance(pixels, str)]:
            (probabilities, labels), size = within_memory(
                partial(_most_likely, run, execution, np.stack(pictures), top), size, tell
            )
            names = ([classes[label] for label in row] for row in labels.tolist())
            likely = map(list, map(zip, names, probabilities.tolist()))
        yield [(name, pixels if isinstance(pixels, str) else next(likely)) for name, pixels in group]
        done += len(group)
        phase("predicting", done, total)


@torch.inference_mode()
def _most_likely(
    run: LoadedRun, execution: Execution, pictures: NDArray[np.uint8], top: int, size: int
) -> tuple[Tensor, Tensor]:
    """Of uint8 [N, S, S, C], `size` at a time: probabilities and labels, [N, top] each, the most probable first."""
    found = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(size):
        images = run.prepare(part).contiguous(memory_format=execution.torch_memory_format)
        with execution.autocast():
            logits = run.model(images)
        found.append([one.cpu() for one in logits.float().softmax(1).topk(min(top, logits.shape[1]))])
    probabilities, labels = map(torch.cat, zip(*found, strict=True))
    return probabilities, labels
