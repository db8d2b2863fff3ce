from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import find_pictures, load
from lowmem.lifecycle import run_training
from lowmem.runs.view import read_run
from lowmem.runs.weights import read_weights
from tests.tiny import Heard, tiny

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_batch(path: Path, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]}))
    return data


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10 in the usual folder; only the table of MD5s is made to fit it."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        write_batch(folder / name, number)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    know(CIFAR10, folder, monkeypatch)
    return tmp_path


def know(reader: type[CIFAR10], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MD5s of the files as they are now."""

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for table in ("train_list", "test_list"):
        known = [[name, md5(name)] for name, _ in getattr(reader, table)]
        monkeypatch.setattr(reader, table, known)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(reader.meta["filename"])})


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-100 as the archive has it: two files, fine and coarse labels, their names in `meta`."""
    folder, rng = tmp_path / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        fine = [i % 100 for i in range(count)]
        values = {
            "filenames": [f"{i}.png" for i in range(count)], "batch_label": name, "fine_labels": fine,
            "coarse_labels": [one // 5 for one in fine], "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(values))
    names = {"fine_label_names": [f"fine{i:02}" for i in range(100)], "coarse_label_names": ["coarse"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names))
    know(CIFAR100, folder, monkeypatch)
    return tmp_path


def config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="cifar10", root=str(root), **settings)


def test_pictures_arrive_as_they_are(cifar_root: Path) -> None:
    data = load(config(cifar_root), 0)
    assert data.classes == tuple(CLASSES)
    assert (len(data.train), len(data.test)) == (100, 20)
    first = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    assert np.array_equal(data.train.images[:20].numpy().reshape(20, 3072), first)
    assert data.train.images.is_contiguous()
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    assert data.fingerprint == load(config(cifar_root, download=False), 1).fingerprint


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_file_with_a_wrong_md5_is_never_unpickled(cifar_root: Path, name: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    (cifar_root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=f"{name}.* does not have CIFAR-10's MD5 and was not unpickled: delete it"):
        load(config(cifar_root), 0)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_named(cifar_root: Path) -> None:
    path = cifar_root / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"data_batch_1 \([\d,]+ bytes\)"):
        load(config(cifar_root), 0)


def test_missing_and_not_to_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_batch_1 is missing; unpack .* or set data.download=true"):
        load(config(tmp_path, download=False), 0)
    assert not list(tmp_path.iterdir())


def test_missing_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object) -> None:
        raise URLError("[Errno -3] Temporary failure in\nname resolution")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"cannot be downloaded .*name resolution.* --data shapes") as caught:
        load(config(tmp_path / "new"), 0)
    assert "\n" not in str(caught.value)


def test_missing_and_downloaded(
    cifar_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cifar_root / "cifar-10-batches-py" / "data_batch_5"
    content = path.read_bytes()
    path.unlink()

    def download(self: object) -> None:
        print("\r50%", file=sys.stderr)  # the library's own bar
        path.write_bytes(content)

    monkeypatch.setattr(CIFAR10, "download", download)
    said: list[str] = []
    assert len(load(config(cifar_root), 0, progress=lambda what, *_: said.append(what)).train) == 100
    assert "downloading CIFAR-10, 163 MiB" in said
    assert not capsys.readouterr().err


def test_an_interrupted_download_leaves_a_clear_error(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cifar_root / "cifar-10-batches-py" / "data_batch_5").unlink()
    monkeypatch.setattr(CIFAR10, "download", lambda self: None)
    with pytest.raises(DataError, match="data_batch_5"):
        load(config(cifar_root), 0)


# -- CIFAR-100 ---------------------------------------------------------------------------------------------------------


def test_cifar100_has_a_hundred_fine_classes(cifar100_root: Path) -> None:
    data = load(DataConfig(source="CIFAR-100", root=str(cifar100_root), download=False), 0)
    assert data.name == "cifar100"
    assert data.classes == tuple(f"fine{i:02}" for i in range(100))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([*range(100), *range(100)], [*range(100)])
    first = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    assert np.array_equal(data.train.images.numpy().reshape(200, 3072), first)
    assert find_pictures(DataConfig(source="cifar100", root=str(cifar100_root))).words.startswith("CIFAR-100 in ")


def test_cifar100_is_never_unpickled_with_a_wrong_md5(cifar100_root: Path) -> None:
    file = cifar100_root / "cifar-100-python" / "meta"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"meta .* does not have CIFAR-100's MD5 .*python\.tar\.gz anew"):
        load(DataConfig(source="cifar100", root=str(cifar100_root)), 0)


def test_a_missing_cifar100_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CIFAR-100 is not in .*train is missing; unpack cifar-100-python\.tar\.gz"):
        load(DataConfig(source="cifar100", root=str(tmp_path), download=False), 0)
    found = find_pictures(DataConfig(source="cifar100", root=str(tmp_path)))
    assert found.words == f"CIFAR-100 is not in {tmp_path}: 161 MiB would be downloaded"
    assert found.url == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert (CIFAR100.filename, CIFAR100.tgz_md5) == ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")


def test_a_network_for_cifar100_has_as_many_outputs(cifar100_root: Path, tmp_path: Path) -> None:
    where = (f"data.root={cifar100_root}", "data.train_subset=100", "data.test_subset=100", "train.epochs=1")
    run = tmp_path / "run"
    run_training(tiny("data.source=cifar100", *where), run, Heard())
    assert read_run(run).classes == 100
    shapes, info = read_weights(run / "weights" / "last.safetensors")
    assert (shapes["linear.bias"], info.data, info.classes and info.classes[7]) == ((100,), "cifar100", "fine07")
