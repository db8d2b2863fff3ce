"""`lowmem bench` as a command: a tiny one as a whole, killed in the middle and given again; its suite of checks."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli.main import _run
from lowmem.cli.show_bench import _budgets, show_bench
from lowmem.core.errors import UsageError
from lowmem.core.units import MIB
from tests.conftest import environment

TINY = (
    "bench", "--quick", "--device", "cpu", "--arch", "res20", "--width", "2", "--batch", "8", "--rounds", "1",
    "--steps", "1", "--budgets", "0.75,100K", "--minutes", "600", "--out", "found",
)  # fmt: skip
SUITE = (
    "bench", "--suite", "acceptance", "--device", "cpu", "--arch", "res20", "--width", "4", "--batch", "16",
    "--tensors", "6M", "--steps", "1",
)  # fmt: skip
FLAGS = {"model.arch": "res20", "model.width": 2, "train.batch": 8, "train.device": "cpu"}
SAME: dict[str, Any] = {
    "flags": FLAGS, "steps": 1, "rounds": 1, "budgets": "0.75,100K", "quick": True, "minutes": 600.0,
    "out": Path("found"),
}  # fmt: skip


class Killed:
    """A command that was killed with SIGKILL after its first measurements, and given again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "found"
        with open(folder / "first.txt", "w") as log:
            first = subprocess.Popen(
                [sys.executable, "-m", "lowmem", *TINY], cwd=folder, env=environment(), stdout=log, stderr=log
            )
            try:
                while len(self.trials()) < 3 and first.poll() is None:
                    time.sleep(0.05)
            finally:
                first.kill()
            self.code = first.wait()
        self.before = self.trials()
        self.again = subprocess.run(
            [sys.executable, "-m", "lowmem", *TINY],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=500,
        )
        self.after = self.trials()

    def record(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "bench.json").read_text())
        except (OSError, ValueError):  # not there yet, or empty
            return {"cells": []}
        return found

    def trials(self) -> dict[tuple[Any, ...], Any]:
        return {
            (cell["kind"], cell["precision"], cell["memory_format"], cell["family"], cell["budget"], number): trial
            for cell in self.record()["cells"]
            for number, trial in cell["trials"].items()
        }


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
def test_what_was_measured_before_a_kill_is_not_measured_again(killed: Killed) -> None:
    assert killed.code == -signal.SIGKILL
    assert killed.again.returncode == 0, killed.again.stderr
    assert len(killed.before) >= 3
    assert f"{len(killed.before)} measurements from before" in killed.again.stderr
    assert killed.before.items() <= killed.after.items()
    assert len(killed.after) > len(killed.before)
    assert killed.record()["finished"]


def test_every_table_has_its_cells(killed: Killed) -> None:
    families = {key[3] for key in killed.after}
    assert families == {
        "plain PyTorch", "plain PyTorch, fused optimizer", "checkpoint, selective", "checkpoint per block", "lowmem"
    }  # fmt: skip
    modes = {(key[1], key[2]) for key in killed.after if key[0] == "step"}
    # In fp32 and channels-last the library corrupts memory in a net so thin.
    assert modes == {("fp32", "contiguous"), ("amp", "contiguous"), ("amp", "channels-last")}
    assert {key[3] for key in killed.after if key[0] == "largest"} == families - {"plain PyTorch, fused optimizer"}
    for title in ("A batch of 8 in every way", "The largest batch in", "Precision, memory format and way"):
        assert title in killed.again.stdout


def test_an_impossible_budget_is_a_row(killed: Killed) -> None:
    cell = next(one for one in killed.record()["cells"] if one["budget"] == 100 * 1024)
    assert cell["refused"].startswith("no plan fits: the least takes")
    assert not cell["trials"]
    assert cell["refused"] in (killed.folder / "bench.md").read_text()


def test_engine_and_library_compute_the_same_and_take_what_was_predicted(killed: Killed) -> None:
    rows = [row for row in _csv(killed) if row["kind"] == "step" and not row["refused"]]
    engine = [row for row in rows if row["way"].startswith("lowmem")]
    assert len(engine) == 3
    assert {row["as_plain"] for row in engine} == {"same bits"}
    # The library's checkpointing moves batch norm's statistics a second time (pytorch issue 96136).
    assert {row["as_plain"] for row in rows if row["way"].startswith("checkpoint")} == {"gradients only"}
    for row in rows:
        assert int(row["peak_allocated_bytes"]) == pytest.approx(int(row["predicted_allocated_bytes"]), rel=0.02)


def test_the_largest_batch_is_larger_in_the_planned_way(killed: Killed) -> None:
    largest = {row["way"]: row for row in _csv(killed) if row["kind"] == "largest"}
    assert int(largest["lowmem"]["batch"]) > int(largest["plain PyTorch"]["batch"])
    for row in largest.values():
        assert int(row["peak_allocated_bytes"]) <= int(row["budget_bytes"])


def test_the_files_agree(killed: Killed) -> None:
    cells, rows = killed.record()["cells"], _csv(killed)
    assert len(cells) == len(rows)
    markdown = (killed.folder / "bench.md").read_text()
    for cell, row in zip(cells, rows, strict=True):
        assert (cell["kind"], cell["precision"], cell["memory_format"]) == (
            (row["kind"], row["precision"], row["memory_format"])
        )
        trials = [trial for trial in cell["trials"].values() if trial["refused"] is None]
        if not trials:
            assert row["refused"]
            continue
        assert float(row["step_seconds"]) == trials[0]["step_seconds"]  # of the only round
        shown = f"{trials[0]['peak_allocated_bytes'] / MIB:,.1f}"
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {row['way']} |"))
        assert shown in markdown
        assert line
        if (cell["kind"], cell["precision"], cell["memory_format"]) == ("step", "fp32", "contiguous"):
            assert f"| {shown} |" in line
    assert (killed.folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_given_once_more_nothing_is_measured(
    killed: Killed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(killed.folder.parent)
    show_bench(**SAME)
    said = capsys.readouterr()
    assert f"{len(killed.after)} measurements from before" in said.err
    assert "[1/" not in said.err
    assert "A batch of 8 in every way" in said.out
    assert killed.trials() == killed.after


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("steps", {"steps": 2}),
        ("batch", {"flags": {**FLAGS, "train.batch": 16}}),
        ("budgets", {"budgets": "0.6"}),
        ("quick", {"quick": False}),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    killed: Killed, name: str, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(killed.folder.parent)
    with pytest.raises(UsageError, match=rf"{name}: .* there, .* here.*give another --out"):
        show_bench(**{**SAME, **other})
    assert killed.trials() == killed.after


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowmem", *TINY]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[2/"):
            os.kill(process.pid, signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert re.search(r"interrupted: [1-9]\d* measurements? kept in found; the same command goes on", rest)


def test_no_time_is_said_in_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    show_bench(**{**SAME, "minutes": 0.0})
    assert "not finished within 0 min" in capsys.readouterr().out
    with open(tmp_path / "found/bench.csv", newline="") as file:
        assert {row["refused"] for row in csv.DictReader(file)} == {"not run: time"}
    assert not (tmp_path / "found/bench.png").exists()


def test_the_account_is_written_even_if_there_is_time_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run([*SUITE, "--minutes", "0", "--out", "found"]) == 0
    assert "## Targets" in capsys.readouterr().out
    record = json.loads((tmp_path / "found/acceptance.json").read_text())
    assert record["finished"]
    assert {cell["refused"] for cell in record["cells"]} == {"not run: time"}
    assert record["environment"]["torch"]
    for name in ("acceptance.csv", "acceptance.md", "acceptance.png"):
        assert (tmp_path / "found" / name).stat().st_size > 0


def test_another_size_of_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = ("bench", "--device", "cpu", "--arch", "res20", "--minutes", "0", "--batch", "8")
    assert _run([*network, "--image-size", "48"]) == 0
    assert "res20 (basic, width 64) at 48x48" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench/res20-basic-w64-48-b8-cpu/bench.json").read_text())
    assert record["settings"]["image_size"] == 48
    assert _run([*network, "--image-size", "224"]) == 2
    assert "res20 takes no pictures of 224x224" in capsys.readouterr().err


def test_some_of_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = ("--cells", "memory, out  of memory", "--minutes", "0", "--out", "found")
    assert _run([*SUITE, *cells]) == 0
    record = json.loads((tmp_path / "found/acceptance.json").read_text())
    assert [cell["kind"] for cell in record["cells"]] == ["memory", "memory", "out of memory"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "8", "--batch", "16"), "--batch once"),
        (("--cells", "memory"), "--suite acceptance"),
        (("--suite", "acceptance", "--out", "x", "--cells", "memory,speed"), "'speed'"),
        (("--suite", "acceptance", "--out", "x", "--cells", ""), "memory, time, gradients, out of memory"),
        (("--suite", "acceptance"), "--out"),
        (("--suite", "everything", "--out", "x"), "everything"),
        (("--suite", "acceptance", "--out", "x", "--batch", "8", "--batch", "16"), "--batch once"),
        (("--suite", "acceptance", "--out", "x", "--quick"), "--quick"),
        (("--suite", "acceptance", "--out", "x", "--rounds", "2", "--budgets", "0.5"), "--rounds, --budgets"),
        (("--budgets", "much"), "much"),
        (("--budgets", "0.5,6"), "did you mean 6G"),
        (("--vram", "6"), "did you mean 6G"),
        (("--vram", "6G", "--tensors", "2G"), "give one"),
        (("--suite", "acceptance", "--host", "1G", "--out", "there"), "--host: not of the suite"),
        (("--arch", "res21"), "res21"),
        (("--vram", "-1"), "memory.vram"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_budgets() -> None:
    assert _budgets("1200M, 0.5,least,0.5") == (1200 * MIB, 0.5, "least")
    for wrong in ("", "1.5.", "most", "0", "-1"):
        with pytest.raises(UsageError):
            _budgets(wrong)


def _csv(killed: Killed) -> list[dict[str, str]]:
    with open(killed.folder / "bench.csv", newline="") as file:
        return list(csv.DictReader(file))
