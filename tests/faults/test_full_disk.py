"""A disk that is full for a while, or for good: the run goes on, nothing is lost, nothing is doubled."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.settings import Settings, to_yaml
from lowmem.core.errors import DiskError, ExitCode, PreflightError
from lowmem.data import Dataset, load
from lowmem.lifecycle import resume_training
from lowmem.lifecycle.preflight import preflight
from lowmem.runs import checkpoint as cp
from lowmem.runs import saver
from lowmem.runs.store import RunFolder
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer
from tests.conftest import assert_same_run
from tests.faults.disk import FailingDisk, fill, tiny_disk
from tests.faults.injection import events, make_trainer, run
from tests.tiny import Heard, tiny

DISK_BYTES = 3 << 20  # a checkpoint of this net takes a quarter of it


@cache
def _settings() -> Settings:
    return tiny(
        "model.width=4", "data.train_subset=64", "data.test_subset=12", "train.batch=16",
        "train.memory_format=contiguous", "checkpoint.every_steps=4",
    )  # fmt: skip


@cache
def _dataset() -> Dataset:
    config = _settings().config
    return load(config.data, config.seed)


class Acting(Heard):
    """Calls `at_epoch[n]` after epoch n, in the thread that trains."""

    def __init__(self, at_epoch: Mapping[int, Callable[[], Any]]) -> None:
        super().__init__()
        self.at_epoch = at_epoch

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        super().epoch(row, epochs)
        self.at_epoch.get(row["epoch"], lambda: None)()


def _trainer(observer: Observer | None = None) -> Trainer:
    trainer = make_trainer(_settings(), _dataset(), None)
    if observer is not None:
        trainer.observer = observer
    return trainer


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", _settings(), _trainer())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tiny_disk(tmp_path, DISK_BYTES) as point:
        yield point


def _wait(trainer_saver: list[saver.Saver]) -> None:
    for one in trainer_saver:
        one.wait()


@pytest.fixture
def savers(monkeypatch: pytest.MonkeyPatch) -> list[saver.Saver]:
    """Those that runs make."""
    made: list[saver.Saver] = []
    enter = saver.Saver.__enter__

    def remember(self: saver.Saver) -> saver.Saver:
        made.append(self)
        return enter(self)

    monkeypatch.setattr(saver.Saver, "__enter__", remember)
    return made


def test_a_real_disk_that_is_full_for_two_epochs(
    small_disk: Path, untroubled: Path, savers: list[saver.Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "PAUSES_SECONDS", (0.0,))
    inside: list[int] = []

    def full() -> None:
        _wait(savers)
        fill(small_disk)

    def room() -> None:
        # The epoch in between was trained and evaluated, and nothing of it could be written.
        _wait(savers)
        inside.append(cp.load_newest(small_disk / "run/checkpoints")[0].step)
        (small_disk / "filler").unlink()

    heard = Acting({1: full, 2: room})
    path = run(small_disk / "run", _settings(), _trainer(heard))
    assert inside == [4]
    assert_same_run(path, untroubled)
    assert len([text for text in heard.warnings if "the disk is full" in text or "refuses rows" in text]) >= 1
    assert "saved again" in heard.notes[-1]
    assert [event["event"] for event in events(path, "done")] == ["done"]
    assert not [*path.rglob("*.partial"), *path.rglob(".aside*")]


def test_a_real_disk_that_stays_full(
    small_disk: Path, untroubled: Path, savers: list[saver.Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "FINAL_PAUSES_SECONDS", (0.0, 0.0))

    def full() -> None:
        _wait(savers)
        fill(small_disk)

    path = small_disk / "run"
    with pytest.raises(DiskError) as caught:
        run(path, _settings(), _trainer(Acting({1: full})))
    assert caught.value.exit_code == ExitCode.DISK
    for said in (
        "the disk is full",
        "saved last is step 4 (",
        str(path / "checkpoints/step-00000004"),
        "lowmem resume",
    ):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DiskError, match="the disk is full"):
        resume_training(path)
    assert cp.load_newest(path / "checkpoints")[0].step == 4
    (small_disk / "filler").unlink()
    assert resume_training(path).finished
    assert_same_run(path, untroubled)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("every", [7, 31])
def test_every_so_many_operations_fail(
    code: int, every: int, tmp_path: Path, untroubled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole run's writes, in both threads, every 7th (a checkpoint takes more: no save succeeds at once)."""
    monkeypatch.setattr(saver, "PAUSES_SECONDS", (0.0,) * 20)
    monkeypatch.setattr(saver, "FINAL_PAUSES_SECONDS", (0.0,) * 20)

    @contextmanager
    def during(trainer: Trainer) -> Iterator[None]:
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch)
            disk.code = code
            disk.refuses = lambda count: count % every == 0 if every > 7 else count % 40 < 7
            yield
        assert len(disk.operations) > 100

    path = run(tmp_path / "run", _settings(), _trainer(), during)
    assert_same_run(path, untroubled)
    assert [event["step"] for event in events(path, "checkpoint")][-1] == 12


def test_space_is_checked_before_the_run_and_told(small_disk: Path) -> None:
    heard = Heard()
    with RunFolder.create(small_disk / "run", to_yaml(_settings()), {}) as folder:
        preflight(_trainer(heard), folder)
        (line,) = [text for text in heard.notes if text.startswith("disk: ")]
        assert "3 checkpoints" in line
        assert "free" in line
        fill(small_disk, leave_bytes=2 << 20)
        with pytest.raises(PreflightError, match=r"the run needs .* free: free some space, keep fewer checkpoints"):
            preflight(_trainer(), folder)
        fill(small_disk)
        with pytest.raises(PreflightError, match="choose another with --out"):
            preflight(_trainer(), folder)
    assert json.loads((untouched := small_disk / "run" / "env.json").read_text()) == {}, untouched
