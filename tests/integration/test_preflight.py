"""Before the first step: outputs that read back differently stop a run, and a dry run leaves nothing at all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.cli.main import main
from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, OutOfMemory, PreflightError
from lowmem.data import load
from lowmem.lifecycle import preflight as preflight_module
from lowmem.lifecycle import run_training
from lowmem.runs.view import RunView
from tests.conftest import assert_same_run, environment
from tests.faults.injection import Scarce, make_trainer, run, scarce_from
from tests.tiny import Heard, arguments, tiny

OWN = (
    "data.train_subset=120", "data.test_subset=50", "train.batch=50", "train.epochs=2",
    "train.memory_format=contiguous",
)  # fmt: skip
ARGUMENTS = ["train", *arguments(*OWN)]


def _settings(*sets: str) -> Settings:
    return tiny(*OWN, *sets)


def test_a_run_with_preflight_is_the_run_without(tmp_path: Path) -> None:
    settings = _settings()
    with_it = run_training(settings, tmp_path / "with").path
    dataset = load(settings.config.data, settings.config.seed)
    without = run(tmp_path / "without", settings, make_trainer(settings, dataset, None))
    assert_same_run(with_it, without)
    assert not (with_it / ".preflight").exists()


def test_out_of_memory_without_a_way_out(tmp_path: Path) -> None:
    said = r"trial before the first step.*nothing was started.*--vram"
    with scarce_from(0, Scarce({30})), pytest.raises(OutOfMemory, match=said):
        run_training(_settings(), tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []


def _harm(monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], None]) -> None:
    """A disk that gives back something else of one file, once it is in its place or is about to be read."""
    replace, read = os.replace, preflight_module.read_run

    def replacing(source: Any, target: Any) -> None:
        replace(source, target)
        if ".preflight" in str(target) and Path(target).name == name and not name.endswith(("csv", "jsonl")):
            harm(Path(target))

    def reading(path: Path) -> RunView:
        if name.endswith(("csv", "jsonl")):
            harm(path / name)
        return read(path)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(preflight_module, "read_run", reading)


def _other_digit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\n", 0, -1) + 1] ^= 1  # the first of the last line; the last ones of a float may mean nothing
    path.write_bytes(bytes(data))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("metrics.csv", _other_digit),
        ("steps.csv", _other_digit),
        ("gradients.csv", _other_digit),
        ("events.jsonl", _halve),
        ("best.safetensors", _flip),
        ("best.safetensors", _halve),
        ("report.md", _halve),
        pytest.param("plan.json", _halve, marks=pytest.mark.slow),
        ("step-00000000", lambda path: _flip(path / "optimizer.safetensors")),
    ],
)
def test_an_output_that_reads_back_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], None]
) -> None:
    _harm(monkeypatch, name, harm)
    planned = ["memory.tensors=6M"] if name == "plan.json" else []
    with pytest.raises(PreflightError, match=name.partition(".")[0]):
        run_training(_settings(*planned), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_could_not_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(PreflightError, match=r"no matplotlib.*with pip"):
        run_training(_settings(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_start_is_spared_what_it_does_not_need(tmp_path: Path) -> None:
    """Import of each takes 0.3 to 1.5 s (benchmarks/LOG.md, 2026-11-27). torch 2.7 itself imports sympy, for the sizes
    of tensors that have no storage."""
    heavy = {"matplotlib", "torchvision", "torch._dynamo", "sympy"} - (
        {"sympy"} if torch.__version__ < "2.8" else set()
    )
    probe = (
        "import sys\n"
        "from lowmem.cli.main import main\n"
        "try:\n"
        f"    main({[*ARGUMENTS, '--out', str(tmp_path / 'run'), '--dry-run']!r})\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        f"heavy = {heavy} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_disk_must_have_room_for_the_kept_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    heard = Heard()
    settings = _settings("train.epochs=400", "train.max_steps=1")
    run_training(settings, tmp_path / "roomy", heard)
    assert any(line.startswith("disk: ") and "3 checkpoints of " in line for line in heard.notes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2 * 2**20))
    run_training(settings, tmp_path / "tight")
    with pytest.raises(PreflightError, match=r"42 checkpoints of .*2 MiB free: .*keep fewer"):
        run_training(_settings("train.epochs=400", "checkpoint.keep_every=10"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _leave(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.mark.parametrize(
    "there", [pytest.param((), marks=pytest.mark.slow), ("runs",), ("runs", "runs/deep", "runs/deep/run")]
)
def test_a_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / name).mkdir()
    planned = [] if there else ["--tensors", "6M"]
    assert _leave([*ARGUMENTS, *planned, "--out", "runs/deep/run", "--dry-run"]) == ExitCode.DONE
    out = capsys.readouterr().out
    for begins in ("preflight: ", "time: about ", "disk: ", "dry run: "):
        assert sum(line.startswith(begins) for line in out.splitlines()) == 1, out
    assert ("smaller plans" in out) == bool(planned)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == sorted(there)


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 0\n")
    assert _leave([*ARGUMENTS, "--out", str(tmp_path / "run"), "--dry-run"]) == ExitCode.USAGE
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"


def test_rows_of_the_trial_are_not_in_the_run(tmp_path: Path) -> None:
    path = run_training(_settings("train.max_steps=1"), tmp_path / "run").path
    assert len((path / "metrics.csv").read_text().splitlines()) == 1
    kinds = [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind != "progress"] == ["start", "checkpoint", "stop"]
