"""Gradients, batch norm and out-of-memory over 2 and 4 processes (see checks.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.checks import BY_FOUR, CHECKS, SLOW
from tests.distributed.torchrun import torchrun

QUICK = [name for name in CHECKS if name not in SLOW]


def results_of(processes: int, folder: Path, names: Sequence[str]) -> dict[str, str | None]:
    out = folder / "results.json"
    code, output = torchrun(folder, processes, "tests.distributed.checks", str(out), *names)
    assert out.is_file(), output
    found: dict[str, str | None] = json.loads(out.read_text())
    assert code == 0, output
    return found


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of(2, tmp_path_factory.mktemp("two"), QUICK)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of(4, tmp_path_factory.mktemp("four"), BY_FOUR)


@pytest.mark.parametrize("name", QUICK)
def test_two_processes(name: str, of_two: dict[str, str | None]) -> None:
    assert of_two[name] is None, of_two[name]


@pytest.mark.slow
def test_two_processes_for_longer(tmp_path: Path) -> None:
    assert results_of(2, tmp_path, SLOW) == dict.fromkeys(SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_FOUR)
def test_four_processes(name: str, of_four: dict[str, str | None]) -> None:
    assert of_four[name] is None, of_four[name]
