"""Pictures a second from the disk to a training batch at 224x224: cut from mapped pieces, and by the usual loader.

    python benchmarks/loading.py [--pictures 1024] [--rounds 5] [--threads 1]

The pictures are photographs' stand-ins (coloured clouds with grain, 500x375, JPEG quality 90), decoded once into a
cache beside them. A round is one epoch in batches of 128; all ways take turns, so that a busy machine slows all of
them, and the first round is not counted. The files are in the system's cache then: what a disk takes comes on top of
all ways. Besides what lowmem does stand the ways that were tried and not taken. Writes `results/loading.json` and `.md`
beside this file and prints the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from conditions import RESULTS, conditions, sentence, table, write
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lowmem.config.sections import DataConfig
from lowmem.data import TrainBatches, eval_batches, load
from lowmem.data.batches import epoch_order
from lowmem.data.cutting import crop_boxes
from lowmem.data.pictures import Dataset, MappedPictures

SIZE, BATCH, CLASSES = 224, 128, 4
Round = Callable[[], int]


def make_pictures(root: Path, count: int) -> None:
    """Half as many to test on as are trained on."""
    rng = np.random.default_rng(0)
    for part, pictures in (("train", count), ("test", count // 2)):
        for label in range(CLASSES):
            (root / part / f"class{label}").mkdir(parents=True)
        for number in range(pictures):
            clouds = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            large = np.asarray(clouds.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = rng.integers(-12, 13, large.shape, dtype=np.int16)
            picture = Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8))
            picture.save(root / part / f"class{number % CLASSES}" / f"{number:05}.jpg", quality=90)


def lowmem_batches(data: Dataset, *, floats: bool) -> Round:
    made = TrainBatches(data.train, seed=0, batch=BATCH, augment=True, mean=data.mean, std=data.std, device="cpu")
    epochs = iter(range(10**9))

    def one_epoch() -> int:
        epoch = next(epochs)
        get = made.batch if floats else made.raw_batch
        return sum(len(get(epoch, step)[1]) for step in range(made.steps_per_epoch))

    return one_epoch


def lowmem_evaluation(data: Dataset) -> Round:
    return lambda: sum(len(labels) for _, labels in eval_batches(data.test, BATCH, data.mean, data.std, "cpu"))


def tried(pictures: MappedPictures, cut: Callable[[Tensor], Tensor], *, planar: bool, antialias: bool) -> Round:
    """A loop over a batch of the library's public functions, with the same draws. `cut`: of a piece the pictures as
    they are stored, [K, S, S, 3] or [K, 3, S, S]."""
    pieces = [cut(piece) for piece in pictures.pieces]
    epochs = iter(range(10**9))

    def one_epoch() -> int:
        epoch, count = next(epochs), len(pictures)
        order = epoch_order(0, epoch, count)
        boxes = crop_boxes(0, epoch, order, pictures.side).T.tolist()
        for start in range(0, count, BATCH):
            indices = order[start : start + BATCH]
            out = torch.empty(len(indices), 3, SIZE, SIZE, dtype=torch.uint8)
            for place, (index, (top, left, height, width)) in enumerate(
                zip(indices, boxes[start : start + BATCH], strict=True)
            ):
                piece, row = pictures.places[index]
                rows, columns = slice(top, top + height), slice(left, left + width)
                stored = pieces[piece][row]
                image = stored[:, rows, columns] if planar else stored[rows, columns].permute(2, 0, 1)
                image = F.interpolate(image[None], (SIZE, SIZE), mode="bilinear", antialias=antialias)
                out[place] = (image.flip(3) if index % 2 else image)[0]
        return count

    return one_epoch


class AsImages:
    """Decoded pictures as PIL images."""

    def __init__(self, pictures: MappedPictures, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pictures[index].numpy())), int(self.pictures.labels[index])


def usual(data: Dataset) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )


def loader(pictures: object) -> Round:
    made = DataLoader(pictures, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
    return lambda: sum(len(labels) for _, labels in made)


def ways(root: Path, data: Dataset) -> dict[str, Round]:
    train = data.train
    assert isinstance(train, MappedPictures)

    def planar(piece: Tensor) -> Tensor:
        return piece.permute(0, 3, 1, 2).contiguous()

    def as_stored(piece: Tensor) -> Tensor:
        return piece

    return {
        "lowmem: uint8 batch, ready for a card": lowmem_batches(data, floats=False),
        "lowmem: normalised float32 batch": lowmem_batches(data, floats=True),
        "lowmem: evaluation, normalised float32": lowmem_evaluation(data),
        "tried: `interpolate` of each picture, copied into the batch": tried(
            train, as_stored, planar=False, antialias=True
        ),
        "tried: the same without antialiasing": tried(train, as_stored, planar=False, antialias=False),
        "tried: the same, stored by colour (CHW)": tried(train, planar, planar=True, antialias=True),
        "usual loader, decoded pictures (PIL, torchvision's transforms)": loader(AsImages(train, usual(data))),
        "usual loader, JPEG files (ImageFolder)": loader(ImageFolder(str(root / "train"), usual(data))),
    }


def measure(rounds: dict[str, Round], count: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Pictures a second, and a second of this process's CPU time."""
    rates: dict[str, list[float]] = {name: [] for name in rounds}
    cpu_rates: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(count + 1):
        for name, run in rounds.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            pictures = run()
            if number > 0:
                rates[name].append(pictures / (time.perf_counter() - started))
                cpu_rates[name].append(pictures / (time.process_time() - cpu_started))
    return rates, cpu_rates


def starts(root: Path, cache: Path) -> Iterator[tuple[str, float, Dataset]]:
    for name in ("decode all, and keep them", "the next start: verify them"):
        began = time.perf_counter()
        data = load(DataConfig(source=f"folder:{root}", cache=str(cache), image_size=SIZE), 0)
        yield name, time.perf_counter() - began, data


def rows(rates: dict[str, list[float]], cpu_rates: dict[str, list[float]]) -> Iterator[tuple[str, ...]]:
    *_, last = cpu_rates
    least = statistics.median(cpu_rates[last])
    for name, values in rates.items():
        cpu = statistics.median(cpu_rates[name])
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        yield name, f"{statistics.median(values):,.0f}", spread, f"{cpu:,.0f}", f"{cpu / least:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = conditions()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "pictures"
        make_pictures(root, options.pictures)
        loads = list(starts(root, Path(place) / "cache"))
        data = loads[-1][2]
        rates, cpu_rates = measure(ways(root, data), options.rounds)
    pictures = len(data.train) + len(data.test)
    lines = [
        f"{sentence(found)}; torchvision {torchvision.__version__}, Pillow {Image.__version__}. {len(data.train):,} "
        f"pictures of 500x375, stored as {data.train.side}x{data.train.side}, cut to {SIZE}x{SIZE}, batch {BATCH}, "
        f"{options.threads} thread(s); median of {options.rounds} rounds in turns (lowest to highest). Where others "
        "use the cores, the rate per CPU second is the steadier one.",
        table(("way", "pictures/s", "spread", "per CPU second", "times the usual, JPEG"), [*rows(rates, cpu_rates)]),
        *(f"To {name}: {pictures / took:,.0f} pictures/s ({took:.1f} s, all cores).\n" for name, took, _ in loads),
    ]
    text = "\n\n".join(lines[:2]) + "\n" + "\n".join(lines[2:])
    print(text)
    record = {
        **found,
        "torchvision": torchvision.__version__,
        "pictures": len(data.train),
        "threads": options.threads,
        "load_seconds": {name: round(took, 2) for name, took, _ in loads},
        "pictures_per_second": {name: [round(rate) for rate in values] for name, values in rates.items()},
        "pictures_per_cpu_second": {name: [round(rate) for rate in values] for name, values in cpu_rates.items()},
    }
    write(RESULTS, "loading", record, text)


if __name__ == "__main__":
    main()
