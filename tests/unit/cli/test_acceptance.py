"""`lowmem bench --suite acceptance` as a command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_account_is_written_even_if_there_is_time_for_nothing(lowmem_command: Command, tmp_path: Path) -> None:
    small = ("--device", "cpu", "--arch", "res20", "--width", "4", "--batch", "16", "--vram", "6M", "--steps", "1")
    done = lowmem_command("bench", "--suite", "acceptance", *small, "--minutes", "0", "--out", "found")
    assert done.returncode == 0, done.stderr
    assert "## Targets" in done.stdout
    record = json.loads((tmp_path / "found/acceptance.json").read_text())
    assert record["finished"]
    assert {cell["refused"] for cell in record["cells"]} == {"not run: time"}
    assert record["environment"]["torch"]
    for name in ("acceptance.csv", "acceptance.md", "acceptance.png"):
        assert (tmp_path / "found" / name).stat().st_size > 0


def test_some_of_the_cells(lowmem_command: Command, tmp_path: Path) -> None:
    small = ("--device", "cpu", "--arch", "res20", "--width", "4", "--batch", "16", "--vram", "6M", "--steps", "1")
    cells = ("--cells", "memory, out  of memory", "--minutes", "0", "--out", "found")
    done = lowmem_command("bench", "--suite", "acceptance", *small, *cells)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "found/acceptance.json").read_text())
    assert [cell["kind"] for cell in record["cells"]] == ["memory", "memory", "out of memory"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cells", "memory"), "--suite acceptance"),
        (("--suite", "acceptance", "--out", "x", "--cells", "memory,speed"), "'speed'"),
        (("--suite", "acceptance", "--out", "x", "--cells", ""), "memory, time, gradients, out of memory"),
        (("--suite", "acceptance"), "--out"),
        (("--suite", "everything", "--out", "x"), "everything"),
        (("--suite", "acceptance", "--out", "x", "--batch", "8", "--batch", "16"), "--batch once"),
    ],
)
def test_what_cannot_be_meant_is_refused(lowmem_command: Command, arguments: tuple[str, ...], said: str) -> None:
    done = lowmem_command("bench", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
