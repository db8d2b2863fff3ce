"""Pieces of decoded pictures on the disk: found again, verified, and written so that a kill costs one piece."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import Dataset, decoding, find_pictures, load, mapped
from lowmem.data.mapped import MappedStore
from lowmem.data.pictures import MappedPictures, Pictures, statistics, stored_side

SIDE, SIZE = 73, 64
KEYS = [bytes([number]) * 16 for number in range(12)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pictures each."""
    monkeypatch.setattr(mapped, "PIECE_BYTES", 4 * SIDE * SIDE * 3)


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def store_of(folder: Path, keys: list[bytes] = KEYS, **options: bool) -> MappedStore:
    return MappedStore(folder, "test", keys, SIDE, **options)  # type: ignore[arg-type]


def filled(folder: Path, keys: list[bytes] = KEYS) -> MappedStore:
    store = store_of(folder, keys)
    for number in np.flatnonzero(~store.there):
        store.put(int(number), pixels(KEYS.index(keys[number])))
    store.close()
    return store


def pictures_of(store: MappedStore) -> MappedPictures:
    count = len(store.there)
    return store.pictures(range(count), torch.zeros(count, dtype=torch.int64), SIZE)


def pieces(folder: Path) -> list[Path]:
    """In the order of the manifest."""
    return [folder / piece["name"] for piece in json.loads((folder / "manifest.json").read_text())["pieces"]]


def assert_right(store: MappedStore) -> None:
    found = pictures_of(store)
    assert all(np.array_equal(found[i].numpy(), pixels(i)) for i in range(len(found)))


def test_what_was_put_is_found(tmp_path: Path) -> None:
    first = filled(tmp_path / "new")
    assert_right(first)
    assert [path.stat().st_size > 4 * SIDE * SIDE * 3 for path in pieces(tmp_path / "new")] == [True] * 3
    again = store_of(tmp_path / "new")
    assert again.there.all()
    assert_right(again)


def test_sums_and_digests_are_those_of_the_pixels(tmp_path: Path) -> None:
    found = pictures_of(filled(tmp_path))
    images = torch.from_numpy(np.stack([pixels(i).transpose(2, 0, 1) for i in range(12)]))
    assert statistics(found) == statistics(Pictures(images, torch.zeros(12, dtype=torch.int64)))
    part = found.take(np.array([3, 7]))
    assert statistics(part) == statistics(Pictures(images[[3, 7]], torch.zeros(2, dtype=torch.int64)))


def test_pictures_are_mapped_and_not_read(tmp_path: Path) -> None:
    filled(tmp_path)
    store = store_of(tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not say what is mapped")
    text = maps.read_text()
    assert all(path.name in text for path in pieces(tmp_path))
    del store


def test_another_decoder_or_size_is_not_served(tmp_path: Path) -> None:
    filled(tmp_path)
    assert not MappedStore(tmp_path, "another", KEYS, SIDE).there.any()
    assert not MappedStore(tmp_path, "test", KEYS, SIDE + 1).there.any()


@pytest.mark.parametrize("damage", ["cut", "gone", "foreign", "pixel", "key", "digest", "manifest", "listed", "odd"])
def test_damage_is_noticed_and_decoded_again(tmp_path: Path, damage: str) -> None:
    filled(tmp_path)
    second = pieces(tmp_path)[1]
    data = bytearray(second.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    where = {"digest": ("digests", 0), "key": ("keys", 0), "pixel": ("images", SIDE * SIDE * 3 + 5)}
    lost = {4, 5, 6, 7}
    if damage in where:
        name, offset = where[damage]
        begin = json.loads(data[8:header])[name]["data_offsets"][0]
        data[header + begin + offset] ^= 1
        second.write_bytes(data)
        lost = {5} if damage == "pixel" else lost
    elif damage == "cut":
        second.write_bytes(data[:-1])
    elif damage == "gone":
        second.unlink()
    elif damage == "foreign":
        second.write_bytes(b"no piece at all")
    else:
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["pieces"][1] = {"name": "pictures-other.safetensors"} if damage == "listed" else manifest["pieces"][1]
        manifest["pieces"][1] = 3 if damage == "odd" else manifest["pieces"][1]
        text = json.dumps(manifest)
        (tmp_path / "manifest.json").write_text(text[:-9] if damage == "manifest" else text)
        lost = set(range(12)) if damage in ("manifest", "odd") else lost
    found = store_of(tmp_path)
    assert set(np.flatnonzero(~found.there).tolist()) == lost
    assert_right(filled(tmp_path))
    again = store_of(tmp_path)
    assert again.there.all()
    assert_right(again)


@pytest.mark.parametrize("at", range(1, 6))
def test_killed_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Two operations a piece: what was committed before is there, and nothing that is half."""

    class Killed(BaseException):
        pass

    done = 0
    real = os.replace

    def replace(*paths: str) -> None:
        nonlocal done
        done += 1
        if done == at:
            raise Killed
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        filled(tmp_path)
    monkeypatch.setattr(os, "replace", real)
    found = store_of(tmp_path)
    assert found.there.sum() == 4 * ((at - 1) // 2)
    assert_right(filled(tmp_path))
    assert store_of(tmp_path).there.all()


def test_a_full_disk_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left.*all of them take .* set data\.cache"):
        filled(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_missing_room_is_said_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIDE * SIDE * 3
    filled(tmp_path, KEYS[:4])
    for free in (8 * size - 1, 8 * size):
        monkeypatch.setattr(mapped.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        store = store_of(tmp_path)
        if free < 8 * size:
            with pytest.raises(DataError, match=r"take .* are free there: make room, set data\.cache .*--image-size"):
                store.put(4, pixels(4))
        else:
            store.put(4, pixels(4))


def test_pieces_of_which_nothing_is_wanted_go(tmp_path: Path) -> None:
    filled(tmp_path, KEYS[:8])
    first, second = pieces(tmp_path)
    filled(tmp_path, KEYS[6:])
    assert not first.exists()
    assert second in pieces(tmp_path)
    assert store_of(tmp_path, KEYS[6:]).there.all()


def test_two_that_decode_at_once_keep_each_other_s(tmp_path: Path) -> None:
    one, other = store_of(tmp_path), store_of(tmp_path)
    for store, numbers in ((one, range(6)), (other, range(6, 12))):
        for number in numbers:
            store.put(number, pixels(number))
    one.close()
    other.close()
    assert store_of(tmp_path).there.all()


def test_only_looking_writes_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path, only_look=True)
    for number in range(12):
        store.put(number, pixels(number))
    assert store.there.all()
    assert not list(tmp_path.iterdir())


# -- a folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, three training pictures and one test picture each, 120 by 90."""
    for label, name in enumerate(("cat", "dog")):
        for part, count in (("train", 3), ("test", 1)):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng(10 * label + i).integers(0, 256, (90, 120, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "pets" / part / name / f"{i}.png")
    return tmp_path / "pets"


def read(root: Path, **settings: object) -> Dataset:
    values = {"image_size": SIZE, "cache": str(root.parent / "cache"), **settings}
    return load(DataConfig(source=f"folder:{root}", **values), 0)  # type: ignore[arg-type]


def test_a_folder_s_pictures_have_a_border(tree: Path) -> None:
    data = read(tree)
    assert isinstance(data.train, MappedPictures)
    assert (data.train.side, data.train.image_size, len(data.train)) == (SIDE, SIZE, 6)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    picture = Image.open(tree / "train" / "dog" / "2.png")
    expected = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(15, 0, 105, 90))
    assert np.array_equal(data.train[5].numpy(), np.asarray(expected))
    assert data.describe()["image_size"] == SIZE
    assert any("stay on the disk, " in note and "of 73x73: batches of 64x64" in note for note in data.notes)


@pytest.mark.parametrize("change", ["touched", "replaced", "added", "removed"])
def test_only_what_changed_is_decoded_again(tree: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    first = read(tree)
    path = tree / "train" / "cat" / "1.png"
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "replaced":
        Image.new("RGB", (80, 80), "red").save(path)
    elif change == "added":
        Image.new("RGB", (80, 80), "red").save(path.with_name("9.png"))
    else:
        path.unlink()
    seen: list[str] = []
    real = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, *how: seen.append(path) or real(path, *how))  # type: ignore[func-returns-value]
    second = read(tree)
    assert len(seen) == (change != "removed")
    assert (second.fingerprint == first.fingerprint) == (change == "touched")
    assert read(tree).fingerprint == second.fingerprint
    assert len(seen) == (change != "removed")


def test_each_size_has_its_own_cache(tree: Path) -> None:
    fingerprints = {size: read(tree, image_size=size).fingerprint for size in (32, 48, 64, 96)}
    assert len(set(fingerprints.values())) == 4
    assert {size: read(tree, image_size=size).fingerprint for size in fingerprints} == fingerprints
    assert len(list((tree.parent / "cache").iterdir())) == 4


def test_subsets_take_no_pixel(tree: Path) -> None:
    data = read(tree, train_subset=4, val_split=2)
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (2, 2, 2)
    assert data.train.labels.tolist() == [0, 1]


def test_looking_first_decodes_and_keeps_nothing(tree: Path) -> None:
    config = DataConfig(source=f"folder:{tree}", image_size=SIZE, cache=str(tree.parent / "cache"))
    assert "6 to train on" in find_pictures(config).words
    assert not (tree.parent / "cache").exists()


def test_damaged_files_are_left_out(tree: Path) -> None:
    (tree / "train" / "cat" / "0.png").write_text("no picture")
    with pytest.raises(DataError, match="1 of 8 pictures"):
        read(tree)
    data = read(tree, skip_damaged=True)
    assert len(data.train) == 5
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]


def test_large_photographs_are_shrunk_while_they_are_decoded(tmp_path: Path) -> None:
    """The decoder's own halves are nearly those of a filter."""
    ramp = np.linspace(0, 255, 900, dtype=np.uint8)
    photo = np.stack([ramp[None].repeat(700, 0), np.full((700, 900), 90, np.uint8), ramp[None, ::-1].repeat(700, 0)], 2)
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(photo).save(tmp_path / "a.png")
    jpeg, png = (decoding.decode(str(tmp_path / name), "crop", SIDE).astype(int) for name in ("a.jpg", "a.png"))
    assert jpeg.shape == (SIDE, SIDE, 3)
    assert abs(jpeg - png).max() <= 4


@pytest.mark.parametrize(("size", "side"), [(8, 8), (32, 32), (63, 63), (64, 73), (128, 146), (224, 256), (299, 342)])
def test_the_side_that_is_stored(size: int, side: int) -> None:
    assert stored_side(DataConfig(source="folder:x", image_size=size)) == side
