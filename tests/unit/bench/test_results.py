"""The results folder: what is in it stays, and only what belongs to it is taken from it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.bench import Cell
from lowmem.bench.results import Results
from lowmem.bench.tables import MODES, TableSetup, account, largest_cells, step_cells
from lowmem.core.errors import DiskError, PreflightError, UsageError
from lowmem.trial import TrialResult

SETUP = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cpu")
HERE: dict[str, Any] = {
    "lowmem": "1",
    "torch": "2",
    "python": "3",
    "device": "cpu",
    "cpu": "a",
    "cpu_threads": 2,
    "git_commit": "x",
}


def some_cells() -> list[Cell]:
    cells = [*step_cells(SETUP, MODES[::2]), *largest_cells(SETUP)]
    cells[0].trials["1"] = asdict(TrialResult(step_seconds=0.5, losses=(2.0, math.nan)))
    return cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Results(tmp_path / "found", SETUP, HERE, account) as results:
        results.save(some_cells(), finished=False)
    return tmp_path / "found"


def test_what_was_saved_is_there(folder: Path) -> None:
    with Results(folder, SETUP, {**HERE, "git_commit": "another"}, account) as results:
        cells = results.load()
    assert len(cells) == len(some_cells())
    first = cells[some_cells()[0].key]
    assert first.step_seconds == 0.5
    assert first.results[0]["losses"] == [2.0, None]


def test_older_results_of_the_family_are_its_own_and_no_other_networks(folder: Path) -> None:
    file = folder / "bench.json"
    record = json.loads(file.read_text())
    for name in ("spec", "args", "sha256", "image_size"):
        assert record["settings"].pop(name) is None
    file.write_text(json.dumps(record))
    with Results(folder, SETUP, HERE, account) as results:
        assert results.load()
    other = replace(SETUP, spec="torchvision:resnet18", args={"groups": 2})
    assert other.name == "torchvision:resnet18 (groups=2)"
    with Results(folder, other, HERE, account) as results, pytest.raises(UsageError, match="spec: None there"):
        results.load()


def test_what_others_say_is_no_markdown() -> None:
    """The name of a processor, the words of an exception."""
    (cell, *rest) = some_cells()
    cell = replace(cell, refused="crashed: <b> `c` | *d*")
    text = account(SETUP, {**HERE, "cpu": "a_b [c](d)"}, [cell, *rest], finished=True).markdown()
    assert r"On the CPU (a\_b \[c\](d), 2 threads)" in text
    assert r"| crashed: \<b\> \`c\` \| \*d\* |" in text


def test_an_empty_folder_has_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    with Results(tmp_path / "new", SETUP, HERE, account) as results:
        assert results.load() == {}
    assert not list((tmp_path / "new").glob("bench.[jcmp]*"))


@pytest.mark.parametrize(
    ("setup", "environment", "said"),
    [
        (replace(SETUP, steps=9), HERE, "steps: 5 there, 9 here"),
        (replace(SETUP, budgets=(0.5,)), HERE, "budgets: "),
        (SETUP, {**HERE, "torch": "3"}, "torch: 2 there, 3 here"),
        (SETUP, {**HERE, "cpu_threads": 1}, "cpu_threads: 2 there, 1 here"),
    ],
)
def test_results_of_something_else_are_refused(
    folder: Path, setup: TableSetup, environment: dict[str, Any], said: str
) -> None:
    before = (folder / "bench.json").read_bytes()
    with Results(folder, setup, environment, account) as results, pytest.raises(UsageError, match=said):
        results.load()
    assert (folder / "bench.json").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"bench": 2}', '{"bench": 1}', '{"bench": 1, "settings": 3, "environment": {}, "cells": []}'],
)
def test_what_is_no_result_is_refused(folder: Path, text: str) -> None:
    (folder / "bench.json").write_text(text)
    with (
        Results(folder, SETUP, HERE, account) as results,
        pytest.raises(UsageError, match="give another --out, or delete it"),
    ):
        results.load()
    assert (folder / "bench.json").read_text() == text


def test_a_cell_that_was_changed_by_hand_is_refused(folder: Path) -> None:
    found = json.loads((folder / "bench.json").read_text())
    found["cells"][0]["trials"]["1"]["surprise"] = 1
    (folder / "bench.json").write_text(json.dumps(found))
    with Results(folder, SETUP, HERE, account) as results, pytest.raises(UsageError, match="surprise"):
        results.load()


def test_a_second_writer_is_refused(folder: Path) -> None:
    with (
        Results(folder, SETUP, HERE, account),
        pytest.raises(UsageError, match="another `lowmem bench` is writing"),
        Results(folder, SETUP, HERE, account),
    ):
        pass
    with Results(folder, SETUP, HERE, account) as results:
        assert results.load()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PreflightError, match="choose another with --out"),
        Results(tmp_path / "file" / "x", SETUP, HERE, account),
    ):
        pass


def test_a_picture_that_fails_costs_nothing_else(folder: Path) -> None:
    def fails(_: object) -> bytes:
        raise ValueError("no font")

    with Results(folder, SETUP, HERE, account) as results, pytest.raises(ValueError, match="no font"):
        results.save(some_cells(), finished=True, draw=fails)
    assert json.loads((folder / "bench.json").read_text())["finished"] is True


def test_a_disk_that_refuses_says_what_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with Results(folder, SETUP, HERE, account) as results:
        monkeypatch.setattr("lowmem.bench.results.write_bytes_atomic", full)
        with pytest.raises(DiskError, match="what was measured before is there"):
            results.save(some_cells(), finished=True)
        assert results.load()
