"""What people have in their folders of pictures."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError, UsageError
from lowmem.data import Dataset, decoding, load


def picture(path: Path | bytes, seed: int = 0) -> None:
    where = Path(os.fsdecode(path))
    where.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(where)


def fill(root: Path, parts: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Three pictures in each class of each part, no two alike."""
    for a, part in enumerate(parts):
        for b, name in enumerate(classes):
            for number in range(3):
                picture(root / part / name / f"{number}.png", 100 * a + 10 * b + number)
    return root


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets")


def read(root: Path | str, seed: int = 0, **settings: object) -> Dataset:
    cache = str(Path(root).parent / "cache")
    return load(DataConfig(source=f"folder:{root}", cache=cache, **settings), seed)  # type: ignore[arg-type]


def refused(root: Path, match: str, **settings: object) -> str:
    with pytest.raises((DataError, UsageError), match=match) as caught:
        read(root, **settings)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be written anywhere
    return str(caught.value)


# -- files that cannot be used -----------------------------------------------------------------------------------------


def _damage(root: Path) -> list[str]:
    """One file of every kind; their names, in the order in which they are read."""
    cat = root / "train" / "cat"
    os.symlink("/nowhere/x.png", cat / "a.png")
    os.symlink("b.png", cat / "b.png")
    (cat / "c.png").touch()
    (cat / "d.png").write_text("text")
    (cat / "e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    picture(cat / "f.png")
    (cat / "f.png").write_bytes((cat / "f.png").read_bytes()[:-900])
    os.mkfifo(cat / "g.png")
    return [f"{name}.png" for name in "abcd"] + ["e.heic", "f.png", "g.png"]


def test_all_damaged_files_are_named_at_once(pets: Path) -> None:
    names = _damage(pets)
    said = refused(pets, r"7 of 19 pictures .*: replace them, take them out, or go on .*--skip-damaged")
    at = [said.index(f"{os.path.join('train', 'cat', name)} (") for name in names]
    assert at == sorted(at)
    for why in ("a link that leads nowhere", "empty", "no picture", "damaged: image file is truncated", "no regular"):
        assert why in said


def test_of_many_the_first_are_named(pets: Path) -> None:
    for number in range(30):
        (pets / "train" / "cat" / f"x{number:02}.jpg").write_text("text")
    said = refused(pets, "30 of 42 pictures")
    assert said.count(".jpg (") == 20
    assert "and 10 more: " in said


def test_without_damaged_files_it_goes_on(pets: Path) -> None:
    whole = read(pets)
    names = _damage(pets)
    data = read(pets, skip_damaged=True)
    assert data.fingerprint == whole.fingerprint
    assert [file.partition(" (")[0] for file in data.skipped] == [f"train/cat/{name}" for name in names]
    assert any("7 of 19 pictures are left out" in text for text in data.warnings)
    assert read(pets, skip_damaged=True).skipped == data.skipped


def test_what_was_decoded_is_kept_though_others_are_damaged(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _damage(pets)
    refused(pets, "7 of 19")
    seen: list[str] = []
    real = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, *how: seen.append(Path(path).name) or real(path, *how))  # type: ignore[func-returns-value]
    for name in names:
        (pets / "train" / "cat" / name).unlink()
    picture(pets / "train" / "cat" / "new.png")
    read(pets)
    assert seen == ["new.png"]


def test_a_signal_costs_no_decoded_picture(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 4)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    cache = str(pets.parent / "cache")
    with pytest.raises(KeyboardInterrupt):
        load(DataConfig(source=f"folder:{pets}", cache=cache), 0, progress=stop)
    seen: list[str] = []
    real = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, *how: seen.append(path) or real(path, *how))  # type: ignore[func-returns-value]
    read(pets)
    assert len(seen) == 8


def test_a_class_with_damaged_pictures_only(pets: Path) -> None:
    for number in range(3):
        (pets / "test" / "dog" / f"{number}.png").write_text("text")
    refused(pets, "test.dog has no pictures that can be used", skip_damaged=True)


def test_labels_put_right_are_not_taken_from_what_was_kept(tmp_path: Path) -> None:
    """Size and times stay, as an archive sets them and as renaming leaves them."""
    root = tmp_path / "pets"
    for part in ("train", "test"):
        for level, name in ((0, "cat"), (200, "dog")):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (level, 0, 0)).save(root / part / name / "0.bmp")
            os.utime(root / part / name / "0.bmp", (1e9, 1e9))
    assert read(root).train.images[:, 0, 0, 0].tolist() == [0, 200]
    cat, dog = root / "train" / "cat" / "0.bmp", root / "train" / "dog" / "0.bmp"
    cat.rename(tmp_path / "t")
    dog.rename(cat)
    (tmp_path / "t").rename(dog)
    assert read(root).train.images[:, 0, 0, 0].tolist() == [200, 0]
    (root / "train" / "cat").rename(tmp_path / "t")
    (root / "train" / "dog").rename(root / "train" / "cat")
    (tmp_path / "t").rename(root / "train" / "dog")
    assert read(root).train.images[:, 0, 0, 0].tolist() == [0, 200]


# -- what is none of it ------------------------------------------------------------------------------------------------


def test_strays_are_passed_over_and_said(pets: Path) -> None:
    whole = read(pets).fingerprint
    (pets / "train" / "cat" / "@eaDir").mkdir()
    picture(pets / "train" / "cat" / "@eaDir" / "0.png")
    picture(pets / "__MACOSX" / "train" / "cat" / "0.png")
    picture(pets / "train" / "top.png")
    picture(pets / "top.png")
    for name in ("labels.txt", "Thumbs.db", ".DS_Store", "._0.png"):
        (pets / "train" / "dog" / name).write_text("x")
    (pets / "train" / "dog" / "notes.md").touch()
    os.symlink("/nowhere", pets / "train" / "fox")
    os.symlink("/nowhere", pets / "test" / "cat" / "labels.txt")
    data = read(pets)
    assert data.fingerprint == whole
    (said,) = [note for note in data.notes if "passed over" in note]
    assert "and 6 more" in said
    assert "__MACOSX, top.png" in said


def test_a_picture_is_one_whatever_its_name_says(pets: Path) -> None:
    picture(pets / "train" / "cat" / "9.png")
    (pets / "train" / "cat" / "9.png").rename(pets / "train" / "cat" / "9.txt")
    assert len(read(pets).train) == 7


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_split(tmp_path: Path) -> None:
    root = fill(tmp_path / "flat", ("",))
    refused(root, "train is missing.*--test-split 0.2")
    data, again, other = (read(root, seed, test_split=2) for seed in (0, 0, 5))
    assert data.classes == ("cat", "dog")
    assert torch.bincount(data.train.labels).tolist() == [2, 2]
    assert torch.bincount(data.test.labels).tolist() == [1, 1]
    assert data.fingerprint == again.fingerprint != other.fingerprint
    keys = {image.numpy().tobytes() for part in (data.train, data.test) for image in part.images}
    assert len(keys) == 6
    share = read(root, test_split=1 / 3, val_split=2)
    assert share.val is not None
    assert (len(share.train), len(share.val), len(share.test)) == (2, 2, 2)
    assert torch.equal(share.test.images, data.test.images)
    refused(root, "leaves none to train on", test_split=6)


def test_a_split_where_there_are_test_pictures_is_refused(pets: Path) -> None:
    refused(pets, "data.test_split is given, but folder:pets has test pictures", test_split=0.5)
    with pytest.raises(UsageError, match="shapes has test pictures"):
        load(DataConfig(source="shapes", test_split=0.5), 0)


def test_train_alone_can_be_split(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", ("train",))
    refused(root, "test is missing.*--test-split 0.2")
    assert (len(read(root, test_split=0.34).train), len(read(root, test_split=0.34).test)) == (4, 2)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", float("nan")])
def test_a_split_that_is_none(value: object) -> None:
    with pytest.raises(ValidationError):
        DataConfig(source="folder:x", test_split=value)  # type: ignore[arg-type]


def test_whole_numbers_are_pictures() -> None:
    assert json.loads(DataConfig(test_split=500.0).model_dump_json())["test_split"] == 500
    assert type(DataConfig(test_split=500.0).test_split) is int


def test_val_is_held_back(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", ("train", "test", "val"))
    data = read(root)
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (6, 6, 6)
    refused(root, r"val/: leave it out, or .*data\.val_folder=false", val_split=2)
    old = read(root, val_folder=False, val_split=2)
    assert old.val is not None
    assert (len(old.train), len(old.val)) == (4, 2)
    assert any("val" in note for note in old.notes)


def test_val_without_test_is_tested_on(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", ("train", "val"))
    data = read(root)
    assert (data.val, len(data.test)) == (None, 6)
    assert any("no test/: errors are measured on val/" in note for note in data.notes)
    split = read(root, test_split=2)
    assert split.val is not None
    assert (len(split.train), len(split.val), len(split.test)) == (4, 6, 2)


def test_val_needs_no_picture_of_every_class_but_no_other_class(tmp_path: Path) -> None:
    root = fill(fill(tmp_path / "pets"), ("val",), ("cat",))
    (warning,) = read(root).warnings
    assert "no picture to hold back of 1 of 2 classes ('dog')" in warning
    picture(root / "val" / "fox" / "0.png")
    refused(root, "train.fox is missing, but val has 'fox'")


# -- classes -----------------------------------------------------------------------------------------------------------


def test_one_class_is_refused(tmp_path: Path) -> None:
    refused(fill(tmp_path / "pets", classes=("all",)), r"train has only one class \('all'\).*two at the least")
    refused(fill(tmp_path / "flat", ("",), ("all",)), "flat has only one class", test_split=1)


def test_a_class_of_which_nothing_is_left_is_said(pets: Path) -> None:
    picture(pets / "train" / "rare" / "0.png", 7)
    picture(pets / "test" / "rare" / "0.png", 8)
    assert read(pets).warnings == ()
    for settings, words in (
        ({"val_split": 5}, "no picture to train on of 1 of 3 classes ('rare')"),
        ({"train_subset": 2}, "no picture to train on of 1 of 3 classes"),
        ({"test_subset": 2}, "no picture to test on of 1 of 3 classes"),
    ):
        assert any(words in text for text in read(pets, 1, **settings).warnings), settings


def test_names_of_classes_are_told(pets: Path) -> None:
    assert read(pets).notes == ("folder:pets: 2 classes: cat, dog",)
    many = fill(pets.parent / "many", classes=tuple(f"c{number:02}" for number in range(30)))
    assert read(many).notes[0].endswith("30 classes: c00, c01, c02, c03, c04, c05, c06, c07, c08, c09 and 20 more")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for part in (b"train", b"test"):
        for name in (b"caf\xe9", b"b"):
            picture(os.path.join(os.fsencode(root), part, name, b"0\xff.png"))
    data = read(root)
    assert data.classes == ("b", r"caf\xe9")
    assert read(root).fingerprint == data.fingerprint
    os.unlink(os.path.join(os.fsencode(root), b"train", b"caf\xe9", b"0\xff.png"))
    refused(root, r"caf\\xe9 has no pictures")
    with pytest.raises(ValidationError, match="no path in UTF-8"):
        DataConfig(source="folder:" + os.fsdecode(b"caf\xe9"))


def test_names_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    composed = "café"
    parts = unicodedata.normalize("NFD", composed)
    assert composed != parts
    data = read(fill(tmp_path / "both", classes=(composed, parts, "tea", "Tea")))
    assert len(data.classes) == 4
    (warning,) = data.warnings
    assert "cafe<U+0301> and caf<U+00E9>" in warning
    assert "Tea and tea" in warning
    mixed = fill(fill(tmp_path / "mixed", ("train",), (composed, "tea")), ("test",), (parts, "tea"))
    refused(mixed, r"caf<U\+00E9> of train is written cafe<U\+0301> in test")


# -- what the system refuses -------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_read(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def locked(path: str | Path) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    refused(pets, r"train.dog cannot be read \(Permission denied\)")


def test_links_in_a_circle(pets: Path) -> None:
    os.symlink("round", pets.parent / "round")
    refused(pets.parent / "round", "train is missing")
    os.symlink("fox", pets / "train" / "fox")
    assert read(pets).classes == ("cat", "dog")
    os.symlink("..", pets / "train" / "cat" / "up")
    refused(pets, "cat.up is a folder inside a class")


def test_a_home_that_is_nobodys() -> None:
    refused(Path("~nobody-of-this-name/pets"), "train is missing")
