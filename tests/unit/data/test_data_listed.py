"""Pictures that a CSV file lists: the same data set as the folder that they lie in, and what is wrong by its line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError, UsageError
from lowmem.data import Dataset, find_pictures, load
from tests import pictures


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Four training pictures and two test pictures of each of two classes, in class folders."""
    return pictures.pets(tmp_path, 4, size=(40, 50))


def rows(pets: Path) -> list[tuple[str, str, str]]:
    """In the order in which the folder has them."""
    files = [
        file for part in ("train", "test") for name in ("cat", "dog") for file in sorted((pets / part / name).iterdir())
    ]
    return [(file.relative_to(pets).as_posix(), file.parent.name, file.parent.parent.name) for file in files]


def written(pets: Path, lines: Sequence[Sequence[str]], name: str = "list.csv") -> Path:
    with open(pets / name, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return pets / name


def read(file: Path, **settings: Any) -> Dataset:
    return load(DataConfig(source=f"csv:{file}", cache=str(file.parent.parent / "cache"), **settings), 0)


def refused(file: Path, words: str, **settings: Any) -> None:
    with pytest.raises((DataError, UsageError), match=words) as caught:
        read(file, **settings)
    assert "\n" not in str(caught.value)


def refused_text(pets: Path, text: str | bytes, words: str, **settings: Any) -> None:
    (pets / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(pets / "list.csv", words, **settings)


@pytest.mark.parametrize("size", [32, 64])
def test_it_is_the_data_set_of_the_folder(pets: Path, size: int) -> None:
    folder = load(DataConfig(source=f"folder:{pets}", cache=str(pets.parent / "cache"), image_size=size), 0)
    listed = read(written(pets, rows(pets)), image_size=size)
    assert listed.fingerprint == folder.fingerprint
    assert (listed.classes, listed.mean, listed.std) == (folder.classes, folder.mean, folder.std)
    assert (listed.name, listed.describe()["data"]) == ("csv:list.csv", "csv:list.csv")
    assert [Path(file).resolve() for file in listed.test_files] == [
        pets / path for path, _, part in rows(pets) if part == "test"
    ]


@pytest.mark.parametrize("between", [",", ";", "\t"])
@pytest.mark.parametrize("head", ["", "path,label,split\n", "\ufeffPath,Label,Split\n"], ids=["none", "header", "mark"])
def test_headers_and_what_stands_between(pets: Path, between: str, head: str) -> None:
    before = read(written(pets, rows(pets)))
    lines = "".join(f"{','.join(row)}\r\n" for row in rows(pets))
    (pets / "list.csv").write_text((head + lines).replace(",", between), encoding="utf-8", newline="")
    assert read(pets / "list.csv").fingerprint == before.fingerprint


def test_columns_by_name_stand_anywhere(pets: Path) -> None:
    before = read(written(pets, rows(pets)))
    named = [("", "split", "who", "label", "path")]
    named += [(str(number), part, "me", label, path) for number, (path, label, part) in enumerate(rows(pets))]
    assert read(written(pets, named)).fingerprint == before.fingerprint


def test_quotes_spaces_and_empty_lines(pets: Path) -> None:
    before = read(written(pets, rows(pets)))
    odd = pets / 'a "b", c é.png'
    (pets / "train" / "cat" / "0.png").rename(odd)
    lines = [[str(path), f" {label} ", part.upper()] for path, label, part in rows(pets)]
    lines.insert(0, [odd.name, "cat", "train"])
    (pets / "list.csv").write_text(
        "\n" + "\n".join('"' + '", "'.join(cell.replace('"', '""') for cell in line) + '"\n' for line in lines),
        encoding="utf-8",
    )
    assert read(pets / "list.csv").fingerprint == before.fingerprint
    assert str(odd) not in read(pets / "list.csv").test_files


def test_absolute_paths_and_other_folders(pets: Path) -> None:
    before = read(written(pets, rows(pets)))
    (pets / "lists").mkdir()
    lines = [(str(pets / path) if number % 2 else f"../{path}", label, part)
             for number, (path, label, part) in enumerate(rows(pets))]  # fmt: skip
    assert read(written(pets, lines, "lists/other.csv")).fingerprint == before.fingerprint


def test_numbers_are_sorted_as_numbers(pets: Path) -> None:
    lines = [(path, ("10", "2", "9")[number % 3]) for number, (path, *_) in enumerate(rows(pets))]
    data = read(written(pets, lines), test_split=3)
    assert data.classes == ("2", "9", "10")
    files = [str(Path(file).relative_to(pets)) for file in data.test_files]
    assert [data.classes[label] for label in data.test.labels.tolist()] == [dict(lines)[file] for file in files]
    assert read(written(pets, [*lines[:-1], (lines[-1][0], "x")]), test_split=4).classes == ("10", "2", "9", "x")


def test_without_split_some_are_held_back_to_test_on(pets: Path) -> None:
    file = written(pets, [row[:2] for row in rows(pets)])
    refused(file, r"list\.csv lists no pictures to test on: add --test-split 0\.2 .* or a third column, split")
    data = read(file, test_split=4)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert torch.bincount(data.test.labels).tolist() == [2, 2]
    assert len(data.test_files) == 4
    refused(written(pets, rows(pets)), "data.test_split is given, but csv:list.csv has test pictures", test_split=4)


def test_val_is_held_back_tested_on_or_passed_over(pets: Path) -> None:
    lines = [(path, label, "val" if path.endswith("3.png") else part) for path, label, part in rows(pets)]
    data = read(written(pets, lines))
    assert (len(data.train), len(data.val or ()), len(data.test)) == (6, 2, 4)
    data = read(pets / "list.csv", val_folder=False)
    assert (len(data.train), data.val, len(data.test)) == (6, None, 4)
    data = read(written(pets, [row for row in lines if row[2] != "test"]))
    assert (len(data.train), data.val, len(data.test)) == (6, None, 2)
    assert any("errors are measured on val" in note for note in data.notes)


def test_what_is_missing_or_damaged_is_named_with_its_line(pets: Path) -> None:
    (pets / "train" / "cat" / "1.png").unlink()
    (pets / "train" / "dog" / "2.png").write_bytes(b"no picture")
    (pets / "train" / "dog" / "3.png").write_bytes(b"")
    named = (
        r"3 of 12 pictures in .*list\.csv cannot be used: train/cat/1\.png \(line 2: No such file.*\), "
        r"train/dog/2\.png \(no picture.*\), train/dog/3\.png \(line 8: empty\).*--skip-damaged"
    )
    file = written(pets, [*rows(pets)[:1], ("train/cat/1.png", "cat", "train"), *rows(pets)[1:]])
    refused(file, named)
    data = read(file, skip_damaged=True)
    assert (len(data.train), len(data.skipped)) == (5, 3)
    (pets / "test" / "dog" / "0.png").unlink()
    (pets / "test" / "dog" / "1.png").write_bytes(b"")
    refused(file, r"list\.csv has no pictures of dog to test on that can be used: add some", skip_damaged=True)


LINES = "train/cat/0.png,cat\ntrain/dog/0.png,dog\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no pictures to train on: write a line for each, path,label"),
        ("path,label\n\n", "lists no pictures"),
        ("train/cat/0.png\n", "line 1: 1 column: path,label or path,label,split are wanted"),
        (f"image,label\n{LINES}", "image .line 1: No such file"),
        ("a,b,c,d\n", "line 1: 4 columns: .* or a first line that names these"),
        (f"{LINES}train/cat/1.png,cat,train\n", "line 3: 3 columns, and the first line has 2: .* quote"),
        (f"path,label,split\n{LINES}", "line 2: 2 columns, and the first line has 3"),
        (f"{LINES},cat\n", "line 3: no path"),
        (f"{LINES}\ntrain/cat/1.png,\n", "line 4: no label"),
        (f"{LINES}x\0y.png,cat\n", "line 3: no path"),
        ("a.png,cat,dev\n", "line 1: split is 'dev': write train, test or val"),
        (f"{LINES}./train/../train/cat/0.png,cat\n", r"line 3: \./train.* is in line 1 already: take one"),
        (f"{LINES}train/dog/0.png,cat\n", "line 3: .* is in line 2 already"),
        ("train/cat/0.png,cat\ntrain/cat/1.png,cat\n", r"has only one class \('cat'\)"),
        (f'{LINES}"train/cat/1.png,cat\n', "line 3: unexpected end of data: check its quotes"),
        ('"a"b,cat\n', "line 1: .* check its quotes"),
        (LINES.encode() + b"caf\xe9.png,cat\n", "line 3: the byte 0xe9 is no UTF-8: save it as CSV in UTF-8"),
        ("a.png,cat,test\nb.png,dog,val\n", "lists no pictures to train on"),
        ("train/cat/0.png,cat,train\ntrain/dog/0.png,dog,train\ntest/cat/0.png,cat,test\n",
         "has no pictures of dog to test on: add some"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(pets: Path, text: str | bytes, words: str) -> None:
    test_split = {} if b"test" in (text if isinstance(text, bytes) else text.encode()) else {"test_split": 0.5}
    refused_text(pets, text, words, **test_split)


def test_what_is_no_file_is_refused(pets: Path) -> None:
    refused(pets, "no regular file: give the path of a CSV file", test_split=1)
    refused(pets / "nothing.csv", r"nothing\.csv cannot be read \(No such file")


def test_classes_that_look_alike_are_warned_of(pets: Path) -> None:
    lines = [(path, "Cat" if path == "train/cat/0.png" else label) for path, label, _ in rows(pets)]
    data = read(written(pets, lines), test_split=2)
    assert data.classes == ("Cat", "cat", "dog")
    assert any("look alike are kept apart: Cat and cat" in text for text in data.warnings)


def test_doctor_s_look_at_it(pets: Path) -> None:
    file = written(pets, rows(pets))
    found = find_pictures(DataConfig(source=f"csv:{file}", cache=str(pets.parent / "cache")))
    assert found.words == f"{file} has pictures of 2 classes: cat, dog; 8 to train on, 4 to test on"
    assert not (pets.parent / "cache").exists()
