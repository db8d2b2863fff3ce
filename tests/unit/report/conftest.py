"""Fixtures of made-up runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.fake_runs import PLAUSIBLE, MakeRun, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("res20", name="a", done=3, epochs=5, train__batch=64)` -> the folder."""

    def make(arch: str = "res20", name: str | None = None, **kwargs: Any) -> Path:
        return write_run(tmp_path / "runs" / (name or arch), arch, **kwargs)

    return make


@pytest.fixture
def six_runs(make_run: MakeRun) -> list[Path]:
    return [make_run(arch) for arch in PLAUSIBLE]
