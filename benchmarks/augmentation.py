"""Images a second of crop, flip and normalisation: whole batches against the usual transforms of single pictures.

    python benchmarks/augmentation.py [--epochs 5] [--pictures 10000] [--threads 1]

Everything is measured in this one run, in turns, so that a busy machine slows all of it. A round is one epoch; the
first is not counted. Besides `TrainBatches` stand the ways to crop that were tried and not taken. Writes
`results/augmentation.json` and `.md` beside this file and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from lowmem.data import Pictures, TrainBatches
from lowmem.data.batches import Normalizer

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RESULTS = Path(__file__).resolve().parent / "results"
Round = Callable[[], int]
Rates = dict[str, list[float]]


class OnePicture(TorchDataset[tuple[Tensor, int]]):
    """What CIFAR10 of torchvision does: an array becomes a PIL image, that goes through the transforms."""

    def __init__(self, pictures: Pictures) -> None:
        self.data = np.ascontiguousarray(pictures.images.numpy().transpose(0, 2, 3, 1))
        self.labels = pictures.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.labels[index]


class Windows(TrainBatches):
    """Tried: one index into all 81 windows of the padded batch, mirrored pictures as a second half of it."""

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        n = images.shape[0]
        both = torch.zeros(2, n, 3, 40, 40, dtype=torch.uint8, device=images.device)
        both[0, :, :, 4:36, 4:36] = images
        both[1, :, :, 4:36, 4:36] = images.flip(3)
        windows = both.view(2 * n, 3, 40, 40).unfold(2, 32, 1).unfold(3, 32, 1)
        place = torch.arange(n, device=images.device) + n * flip
        return windows[place, :, top, torch.where(flip == 1, 8 - left, left)]


class FlatTake(TrainBatches):
    """Tried: the address of every byte computed, then one `take` from the padded batch."""

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        n = images.shape[0]
        padded = F.pad(images, (4, 4, 4, 4))
        side = self._columns
        columns = (left + 31 * flip).view(n, 1) + (1 - 2 * flip).view(n, 1) * side
        start = torch.arange(n, device=images.device) * 4800 + top * 40
        offsets = torch.arange(3, device=images.device).view(3, 1, 1) * 1600 + side.view(32, 1) * 40
        return padded.take((start.view(n, 1) + columns).view(n, 1, 1, 32) + offsets)


class Slices(TrainBatches):
    """Tried: a loop over the pictures of a batch, a slice of each."""

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        padded, out = F.pad(images, (4, 4, 4, 4)), torch.empty_like(images)
        for i, (y, x, mirrored) in enumerate(zip(top.tolist(), left.tolist(), flip.tolist(), strict=True)):
            cut = padded[i, :, y : y + 32, x : x + 32]
            out[i] = cut.flip(2) if mirrored else cut
        return out


def batched(kind: type[TrainBatches], pictures: Pictures, memory_format: torch.memory_format) -> Round:
    made = kind(pictures, seed=0, batch=BATCH, augment=True, mean=MEAN, std=STD, device="cpu")
    epoch = iter(range(10**9))

    def one_epoch() -> int:
        number = next(epoch)  # the permutation and the draws of an epoch are part of the time
        steps = range(made.steps_per_epoch)
        return sum(len(made.batch(number, step, memory_format=memory_format)[1]) for step in steps)

    return one_epoch


def normalisation_only(pictures: Pictures) -> Round:
    normalize = Normalizer(MEAN, STD, torch.device("cpu"))
    return lambda: sum(len(normalize(images)) for images in pictures.images.split(BATCH))


def loader(pictures: Pictures, workers: int) -> Round:
    made = DataLoader(
        OnePicture(pictures),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: sum(len(labels) for _, labels in made)


def agree(pictures: Pictures) -> None:
    """All ways make the same pictures, or the comparison is worth nothing."""
    options = {"seed": 0, "batch": BATCH, "augment": True, "mean": MEAN, "std": STD, "device": "cpu"}
    expected, _ = TrainBatches(pictures, **options).raw_batch(1, 1)
    for kind in (Windows, FlatTake, Slices):
        assert torch.equal(kind(pictures, **options).raw_batch(1, 1)[0], expected), kind.__name__


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(rounds: dict[str, Round], epochs: int) -> tuple[Rates, Rates]:
    """Images a second, and a CPU second of this process, of each; in turns, the first epoch warms up."""
    rates: Rates = {name: [] for name in rounds}
    cpu_rates: Rates = {name: [] for name in rounds}
    for number in range(epochs + 1):
        for name, run in rounds.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            count = run()
            if number > 0:
                rates[name].append(count / (time.perf_counter() - started))
                cpu_rates[name].append(count / (time.process_time() - cpu_started))
    return rates, cpu_rates


def table(result: dict[str, object], rates: Rates, cpu_rates: Rates) -> str:
    lines = [
        f"{result['cpu']}, {result['cores']} cores, torch {result['torch']}, torchvision {result['torchvision']}, "
        f"{result['threads']} thread(s) in torch, batch {BATCH}, {result['pictures']:,} pictures, "
        f"median of {result['epochs']} epochs (lowest to highest); load average before {result['load_average_1min']}: "
        "above about 1, others were using the cores, and the rate per CPU second is the steadier one",
        "",
        "| way | images/s | spread | images per CPU second | times the usual (no workers) |",
        "|---|---|---|---|---|",
    ]
    usual = statistics.median(rates["torchvision per image, 0 workers"])
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        # The workers' CPU time is not this process's.
        cpu = "" if name.endswith("2 workers") else f"{statistics.median(cpu_rates[name]):,.0f}"
        lines.append(f"| {name} | {middle:,.0f} | {spread} | {cpu} | {middle / usual:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_before = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    images = torch.randint(0, 256, (options.pictures, 3, 32, 32), dtype=torch.uint8)
    pictures = Pictures(images, torch.randint(0, 10, (options.pictures,)))
    agree(pictures)
    plain = torch.contiguous_format
    rates, cpu_rates = measure(
        {
            "TrainBatches (rows by index_select, columns by gather)": batched(TrainBatches, pictures, plain),
            "TrainBatches, channels-last": batched(TrainBatches, pictures, torch.channels_last),
            "tried: index into unfolded windows": batched(Windows, pictures, plain),
            "tried: take by flat address": batched(FlatTake, pictures, plain),
            "tried: a slice of each picture": batched(Slices, pictures, plain),
            "normalisation to float32 alone (the bound)": normalisation_only(pictures),
            "torchvision per image, 0 workers": loader(pictures, 0),
            "torchvision per image, 2 workers": loader(pictures, 2),
        },
        options.epochs,
    )
    result: dict[str, object] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "batch": BATCH,
        "pictures": options.pictures,
        "epochs": options.epochs,
        "load_average_1min": load_before,
    }
    text = table(result, rates, cpu_rates)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    record = {
        **result,
        "images_per_second": {name: [round(v) for v in values] for name, values in rates.items()},
        "images_per_cpu_second": {name: [round(v) for v in values] for name, values in cpu_rates.items()},
    }
    (RESULTS / "augmentation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "augmentation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
