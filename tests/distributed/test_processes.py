"""Gradients, batch norm and out-of-memory over 2 and 4 processes (see checks.py)."""

from __future__ import annotations

import json

import pytest

from tests.distributed.checks import CHECKS
from tests.distributed.torchrun import torchrun


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("processes")
    out = folder / "results.json"
    code, output = torchrun(folder, request.param, "tests.distributed.checks", str(out))
    assert out.is_file(), output
    found: dict[str, str | None] = json.loads(out.read_text())
    assert code == 0, output
    return found


@pytest.mark.parametrize("name", list(CHECKS))
def test_holds(name: str, results: dict[str, str | None]) -> None:
    assert name in results
    assert results[name] is None, results[name]
