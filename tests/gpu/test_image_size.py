"""Batches for a card have the bytes that they have on the CPU, however they come there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem.data import AnyPictures, Pictures, TrainBatches, batches, eval_batches
from lowmem.data.mapped import MappedStore
from lowmem.data.pictures import PerChannel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HALF: PerChannel = (0.5, 0.5, 0.5)
COUNT = 70


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, side, side, 3), dtype=np.uint8)


def in_memory(side: int, enlarged_to: int | None = None) -> Pictures:
    return Pictures(torch.from_numpy(noise(side).transpose(0, 3, 1, 2).copy()), torch.arange(COUNT), enlarged_to)


def on_disk(folder: Path) -> AnyPictures:
    store = MappedStore(folder, "test", [number.to_bytes(16, "big") for number in range(1, COUNT + 1)], 256)
    for number, pixels in enumerate(noise(256)):
        store.put(number, pixels)
    store.close()
    return store.pictures(range(COUNT), torch.arange(COUNT), 224)


def epoch(pictures: AnyPictures, device: str) -> list[tuple[Tensor, Tensor]]:
    made = TrainBatches(pictures, seed=0, batch=16, augment=True, mean=HALF, std=HALF, device=device)
    trained = [made.batch(1, step) for step in range(made.steps_per_epoch)]
    assert all(images.device.type == device for images, _ in trained)
    return [*trained, *eval_batches(pictures, 16, HALF, HALF, device)]


@pytest.mark.parametrize("kind", ["held", "copied", "enlarged", "on the disk"])
def test_a_card_sees_the_pictures_of_the_cpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "copied":
        monkeypatch.setattr(batches, "MOST_HELD_BYTES", 0)
    pictures = on_disk(tmp_path) if kind == "on the disk" else in_memory(32, 224 if kind == "enlarged" else None)
    before = torch.cuda.memory_allocated()
    made = TrainBatches(pictures, seed=0, batch=16, augment=True, mean=HALF, std=HALF, device="cuda")
    held = torch.cuda.memory_allocated() - before
    assert (held > COUNT * 3 * 32 * 32) == (kind in ("held", "enlarged"))
    del made
    with_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for (images, labels), (ours, same) in zip(epoch(pictures, "cuda"), epoch(pictures, "cpu"), strict=True):
            assert torch.equal(images.cpu(), ours)
            assert torch.equal(labels.cpu(), same)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = with_tf32
