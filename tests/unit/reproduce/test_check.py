"""What is seen before hours are spent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem.core.errors import Infeasible, PreflightError, UsageError
from lowmem.core.units import format_size
from lowmem.reproduce.check import look_ahead
from lowmem.reproduce.job import Job, select
from lowmem.reproduce.progress import Standing
from lowmem.train.observer import Observer
from tests.tiny import Heard, tiny


def job(path: Path, *sets: str) -> Job:
    own = ("model.width=4", "data.train_subset=40", "train.epochs=2", "train.memory_format=contiguous")
    return Job(path, tiny(*own, *sets))


def to_begin(job: Job, only: str) -> list[Standing]:
    return [Standing(member, job.path / member.name, "to begin", 2) for member in select(only, None)]


def test_pictures_weights_and_disk(tmp_path: Path) -> None:
    unplanned = job(tmp_path, "model.width=64")
    heard = Heard()
    learned, runs = look_ahead(unplanned, to_begin(unplanned, "res20,res110"), heard)
    assert learned.data is not None
    first, *_, last = heard.notes
    assert first.startswith(f"job {tmp_path}: 2 runs of 2 epochs at width 64, 40 pictures of shapes to train on")
    # 24.17 and 3.78 GFLOP a picture in training.
    assert learned.weights["res110"] / learned.weights["res20"] == pytest.approx(6.39, abs=0.05)
    assert f"disk: at most {format_size(sum(run.disk_bytes for run in runs))} more, " in last
    assert runs[1].disk_bytes > 4 * runs[0].disk_bytes
    assert list(tmp_path.iterdir()) == []


def test_a_budget_must_fit_every_network(tmp_path: Path) -> None:
    planned = job(tmp_path, "memory.tensors=40M", "train.precision=fp32")
    heard = Heard()
    look_ahead(planned, to_begin(planned, "res20,cnn20"), heard)
    assert [note.split(":")[0] for note in heard.notes[:2]] == ["res20", "cnn20"]
    assert "of tensors" in heard.notes[0]

    tight = job(tmp_path, "memory.tensors=1M", "train.precision=fp32", "memory.allow_accumulation=false")
    with pytest.raises(Infeasible, match="for res20, and less for cnn20: ") as caught:
        look_ahead(tight, to_begin(tight, "res20,cnn20"), Observer())
    assert caught.value.least_bytes > caught.value.budget_bytes == 1 << 20
    assert "--only" in str(caught.value)


@pytest.mark.slow
def test_accumulation_is_said(tmp_path: Path) -> None:
    planned, heard = job(tmp_path, "memory.tensors=2M", "train.precision=fp32"), Heard()
    look_ahead(planned, to_begin(planned, "res20"), heard)
    assert "not the same computation" in heard.notes[0]


def test_the_disk_must_take_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unplanned = job(tmp_path)
    standings = to_begin(unplanned, "res20,cnn20")
    needed = sum(run.disk_bytes for run in look_ahead(unplanned, standings, Observer())[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    look_ahead(unplanned, standings, Observer())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(PreflightError, match=r"the job needs .* more at the most"):
        look_ahead(unplanned, standings, Observer())
    # What is there already is not needed once more.
    half = [replace(standings[0], state="to go on", size_bytes=1000), standings[1]]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1000))
    look_ahead(unplanned, half, Observer())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1001))
    with pytest.raises(PreflightError, match=r"the job needs .* more at the most"):
        look_ahead(unplanned, half, Observer())


def begun(standings: Sequence[Standing]) -> list[Standing]:
    return [replace(standings[0], state="finished"), *standings[1:]]


def test_other_pictures_are_refused_once_a_run_has_begun(tmp_path: Path) -> None:
    first = job(tmp_path)
    standings = to_begin(first, "res20,cnn20")
    known, _ = look_ahead(first, standings, Observer())
    look_ahead(known, begun(standings), Observer())
    moved = replace(known, settings=known.settings.replace({"data.test_subset": 10}, "test"))
    look_ahead(moved, standings, Observer())
    with pytest.raises(UsageError, match="shapes holds other pictures than those"):
        look_ahead(moved, begun(standings), Observer())


def test_a_process_that_trains_is_spared_what_only_the_look_ahead_needs() -> None:
    """The library's counter of operations brings triton."""
    probe = "import sys, lowmem.reproduce.check; assert not {'triton', 'torch.utils.flop_counter'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
