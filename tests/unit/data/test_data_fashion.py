from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import downloaded, load


def idx(values: np.ndarray, magic: int) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.astype(np.uint8).tobytes()


def files(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    made = {}
    for part, n in (("train", 30), ("t10k", 10)):
        made[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28)), 2051)
        made[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n) % 10, 2049)
    return made


def write(folder: Path, *, compressed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files().items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


@pytest.fixture(autouse=True)
def _no_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloaded, "DEBIAN_FOLDER", tmp_path / "debian")


def config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="fashion-mnist", root=str(root), **{"download": False, **settings})


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw", "../debian"])
def test_found_in_every_usual_place(tmp_path: Path, place: str, compressed: bool) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(root / place, compressed=compressed)
    data = load(config(root), 0)
    assert data.classes == downloaded.FASHION_CLASSES
    assert (len(data.train), len(data.test)) == (30, 10)
    grey = np.frombuffer(files()["train-images-idx3-ubyte"][16:], dtype=np.uint8).reshape(30, 28, 28)
    for channel in range(3):
        assert np.array_equal(data.train.images[:, channel, 2:30, 2:30].numpy(), grey)
    border = data.train.images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert not border.any()
    assert data.train.labels.tolist() == [i % 10 for i in range(30)]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte", lambda data: data[:-1], "its header says 23,536: it is damaged"),
        ("train-images-idx3-ubyte", lambda data: data + b"x", "its header says 23,536"),
        ("t10k-images-idx3-ubyte", lambda data: data[:10], "ends within its header"),
        ("train-labels-idx1-ubyte", lambda data: b"", "begins with None"),
        ("train-labels-idx1-ubyte", lambda data: b"<html>not here</html>", "this kind of IDX file with 2049"),
        ("t10k-labels-idx1-ubyte", lambda data: files()["t10k-images-idx3-ubyte"], "begins with 2051"),
        ("t10k-labels-idx1-ubyte", lambda data: idx(np.arange(9), 2049), "10 pictures, .* 9 labels"),
        ("t10k-labels-idx1-ubyte", lambda data: idx(np.arange(10) + 1, 2049), "holds the label 10"),
        ("train-images-idx3-ubyte", lambda data: idx(np.zeros((30, 20, 20)), 2051), "pictures of 20x20"),
        # a header that promises more than a machine has must not be believed
        ("train-images-idx3-ubyte", lambda data: data[:4] + b"\xff" * 12 + data[16:], "damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    write(tmp_path, compressed=False)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load(config(tmp_path), 0)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"text", lambda data: data[:30] + b"\0" * 50])
def test_damaged_archives_are_named(tmp_path: Path, damage: Any) -> None:
    write(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz cannot be read \(.*fetch it again"):
        load(config(tmp_path), 0)


def test_one_file_missing(tmp_path: Path) -> None:
    write(tmp_path, compressed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte \(or .gz\) is missing"):
        load(config(tmp_path), 0)


def test_one_file_missing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, compressed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setattr(FashionMNIST, "download", lambda self: write(Path(self.raw_folder), compressed=False))
    assert len(load(config(tmp_path, download=True), 0).test) == 10


def test_all_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"download is off.*dataset-fashion-mnist.*--data shapes"):
        load(config(tmp_path), 0)


def test_missing_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr(FashionMNIST, "download", offline)
    with pytest.raises(DataError, match=r"cannot be downloaded: .*no route to host"):
        load(config(tmp_path, download=True), 0)


def test_missing_and_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "download", lambda self: write(Path(self.raw_folder), compressed=False))
    # torchvision reads what it fetched with its own reader, which must accept the same files
    data = load(config(tmp_path, download=True), 0)
    assert len(data.train) == 30
    assert torch.equal(data.train.images, load(config(tmp_path), 0).train.images)
