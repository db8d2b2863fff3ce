from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowmem.data
from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import Dataset, decoding, folder, kept, load


def save(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, three training pictures and one test picture each."""
    root = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        for i in range(3):
            save(root / "train" / name / f"{i}.png", 10 * label + i)
        save(root / "test" / name / "0.png", 100 + label)
    return root


def config_of(root: Path, **settings: object) -> DataConfig:
    return DataConfig(source=f"folder:{root}", cache=str(root.parent / "cache"), **settings)  # type: ignore[arg-type]


def read(root: Path, **settings: object) -> Dataset:
    return load(config_of(root, **settings), 0)


def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files decoded from now on."""
    seen: list[str] = []
    real = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, *how: seen.append(path) or real(path, *how))  # type: ignore[func-returns-value]
    return seen


def test_pixels_and_labels(tree: Path) -> None:
    data = read(tree)
    assert data.name == "folder:pets"
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.random.default_rng(11).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(data.train.images[4].numpy(), expected.transpose(2, 0, 1))


def test_other_sizes_and_modes(tree: Path) -> None:
    pixels = save(tree / "train" / "cat" / "0.png", 5, size=(100, 50))
    grey = Image.fromarray(np.full((32, 32), 9, dtype=np.uint8))
    grey.save(tree / "train" / "cat" / "1.png")
    Image.fromarray(pixels).convert("P").save(tree / "train" / "cat" / "2.gif")
    Image.fromarray(pixels).save(tree / "test" / "cat" / "1.JPEG", quality=95)
    data = read(tree)
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC, box=(25, 0, 75, 50))
    assert np.array_equal(data.train.images[0].numpy(), np.asarray(expected).transpose(2, 0, 1))
    assert (data.train.images[1] == 9).all()
    assert len(data.train) == 7


def test_more_than_a_card_is_to_hold_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, said in ((6 * 3072, 0), (6 * 3072 - 1, 1)):
        monkeypatch.setattr(lowmem.data, "MOST_HELD_BYTES", most)
        assert sum("there every batch is copied" in note for note in read(tree).notes) == said


def test_the_second_time_nothing_is_decoded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = decodes(monkeypatch)
    first = read(tree)
    assert len(seen) == 8
    second = read(tree)
    assert len(seen) == 8
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train.images, second.train.images)


@pytest.mark.parametrize("change", ["touched", "resized", "added", "removed", "renamed"])
def test_a_changed_folder_is_decoded_again(tree: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    first = read(tree)
    path = tree / "train" / "cat" / "1.png"
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "resized":
        stat = path.stat()
        save(path, 77, size=(40, 40))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "added":
        save(tree / "train" / "cat" / "9.png", 9)
    elif change == "removed":
        path.unlink()
    else:
        path.rename(path.with_name("8.png"))
    seen = decodes(monkeypatch)
    second = read(tree)
    assert len(seen) == (change != "removed")  # the others are kept
    assert (second.fingerprint == first.fingerprint) == (change == "touched")
    seen.clear()
    read(tree)
    assert not seen


def test_a_damaged_cache_is_rebuilt(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(tree)
    (kept,) = (tree.parent / "cache").glob("*/pictures-*.safetensors")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    seen = decodes(monkeypatch)
    assert read(tree).fingerprint == first.fingerprint
    assert len(seen) == 8
    read(tree)
    assert len(seen) == 8


def test_a_verified_cache_of_other_contents_is_rebuilt(tree: Path) -> None:
    first = read(tree)
    (manifest,) = (tree.parent / "cache").glob("*/manifest.json")
    decoder = json.loads(manifest.read_text())["decoder"]
    for tensors in ({"images": torch.zeros(1)}, {"images": torch.zeros(9, 3, 32, 32, dtype=torch.uint8)}):
        kept.write_cache(manifest.parent, decoder, tensors)
        assert read(tree).fingerprint == first.fingerprint


def test_a_cache_that_cannot_be_written_is_a_warning(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.parent / "cache").write_text("a file, not a folder")
    data = read(tree)
    assert len(data.train) == 6
    assert re.search("could not be kept in .*set data.cache", data.warnings[0])


def test_a_moved_folder_has_the_same_fingerprint(tree: Path) -> None:
    first = read(tree)
    shutil.move(tree, tree.with_name("moved"))
    assert read(tree.with_name("moved")).fingerprint == first.fingerprint


def test_progress_reaches_the_total(tree: Path) -> None:
    for number in range(600):
        shutil.copy(tree / "train" / "cat" / "0.png", tree / "train" / "cat" / f"copy-{number}.png")
    calls: list[tuple[str, int, int]] = []
    folder.read(config_of(tree), progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1] == ("decoding pictures", 608, 608)
    assert len(calls) == 3  # of 256 pictures each, and the rest


def test_what_file_managers_leave_is_ignored(tree: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tree / "train" / "cat" / name).write_text("x")
    (tree / "train" / ".git").mkdir()
    (tree / "train" / "README.txt").write_text("a file beside the classes")
    assert len(read(tree).train) == 6


def _text_as_jpeg(root: Path) -> None:
    (root / "train" / "dog" / "3.jpg").write_text("no picture")


def _truncated(root: Path) -> None:
    path = root / "test" / "dog" / "1.jpg"
    save(path, 1, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-800])


def _empty(root: Path) -> None:
    (root / "test" / "dog" / "1.jpg").touch()


def _sixteen_bits(root: Path) -> None:
    Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(root / "train" / "dog" / "3.png")


def _class_missing_in_test(root: Path) -> None:
    shutil.rmtree(root / "test" / "dog")


def _class_missing_in_train(root: Path) -> None:
    save(root / "test" / "fox" / "0.png", 1)


def _no_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def _empty_class(root: Path) -> None:
    (root / "train" / "dog" / "0.png").unlink()
    (root / "train" / "dog" / "1.png").unlink()
    (root / "train" / "dog" / "2.png").unlink()


def _nothing(root: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(root / part)
        (root / part).mkdir()


def _folder_in_class(root: Path) -> None:
    (root / "train" / "dog" / "more").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _text_as_jpeg,
            r"1 of 9 pictures .* train.dog.3\.jpg \(no picture.*replace them, take them out.*--skip-damaged",
        ),
        (_truncated, r"test.dog.1\.jpg \(damaged: .*truncated"),
        (_empty, r"test.dog.1\.jpg \(empty\)"),
        (_sixteen_bits, r"train.dog.3\.png \(more than 8 bits a channel, I;16: convert it"),
        (_class_missing_in_test, r"test.dog is missing, but train has 'dog'.*2 in train, 1 in test"),
        (_class_missing_in_train, r"train.fox is missing, but test has 'fox'"),
        (_no_test, r"test is missing: pictures belong in"),
        (_empty_class, r"train.dog has no pictures"),
        (_nothing, r"train has no class folders"),
        (_folder_in_class, r"dog.more is a folder inside a class"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tree: Path, damage: object, message: str) -> None:
    damage(tree)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        read(tree)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train is missing"):
        read(tmp_path / "none")
