"""Saves in the background: in order, one at a time, tried again, never at the cost of the checkpoint before."""

from __future__ import annotations

import errno
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.core.errors import DiskError, OutOfMemory
from lowmem.runs import atomic, saver
from lowmem.runs import checkpoint as cp
from lowmem.runs.saver import Save, Saver
from lowmem.runs.store import RunFolder
from lowmem.runs.weights import WeightsInfo
from tests.faults.disk import FailingDisk


def _save(step: int, *names: str) -> Save:
    tensors = {"w": torch.full((64,), float(step))}
    checkpoint = cp.Checkpoint(step, tensors, {"m/w": torch.zeros(64)}, {"run": {"step": step}})
    return Save(checkpoint, step // 10, {name: (tensors, WeightsInfo(step=step)) for name in names})


def _row(step: int) -> dict[str, object]:
    return {"step": step, "epoch": 1, "lr": 0.1, "loss": 2.0}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path / "run", "", {}) as folder:
        cp.save(folder.checkpoints, _save(1).checkpoint, keep=2)
        yield folder


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "PAUSES_SECONDS", (0.0,) * 3)
    monkeypatch.setattr(saver, "FINAL_PAUSES_SECONDS", (0.0,) * 3)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next try is long after the test."""
    monkeypatch.setattr(saver, "PAUSES_SECONDS", (3600.0,))
    monkeypatch.setattr(saver, "FINAL_PAUSES_SECONDS", (0.0,))


def _events(run: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.events_file.read_text().splitlines()] if run.events_file.exists() else []


def _steps(run: RunFolder) -> list[int]:
    return [int(line.split(",")[0]) for line in run.steps_file.read_text().splitlines()[1:]]


def test_what_a_save_writes_and_in_which_order(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(run, keep=2) as writer:
        disk = FailingDisk(monkeypatch)
        writer.submit(_save(10, "best", "last"))
        writer.finish()
    names = [name for kind, name in disk.operations if kind != "fsync"]
    commit = names.index("step-00000010")
    assert set(names[:commit]) >= {"best.safetensors", "last.safetensors", "model.safetensors", "manifest.json"}
    assert names[commit + 1 :] == ["events.jsonl"]
    assert [(event["event"], event["step"], event["epoch"]) for event in _events(run)] == [("checkpoint", 10, 1)]
    assert cp.load_newest(run.checkpoints)[0].step == 10
    assert writer.last_saved is not None
    assert writer.last_saved.step == 10


def _operations(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> int:
    run.event("start")  # once it is there, the folder need not be synced for it
    with monkeypatch.context() as patch, Saver(run, keep=2) as writer:
        disk = FailingDisk(patch)
        run.append_steps([_row(2)])
        writer.submit(_save(2, "last"))
        writer.finish()
        return len(disk.operations)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_refused_once_at_each_operation(code: int, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before stands until the new one does, and then there is everything, once."""
    count = _operations(run, monkeypatch)
    assert count > 15
    for k in range(1, count + 1):
        step = 10 * k
        with monkeypatch.context() as patch, Saver(run, keep=2) as writer:
            disk = FailingDisk(patch)
            disk.code, disk.refuses = code, lambda at, k=k: at == k  # type: ignore[misc]
            run.append_steps([_row(step)])
            writer.submit(_save(step, "last"))
            writer.finish()
        loaded, _, skipped = cp.load_newest(run.checkpoints)
        assert (loaded.step, skipped) == (step, {}), disk.operations
        assert len(cp.checkpoint_folders(run.checkpoints)) == 2
        assert load_file(run.path / "weights/last.safetensors")["w"][0] == step
        assert not [*run.path.rglob("*.partial"), *run.checkpoints.glob(".aside*")]
    assert _steps(run) == [2, *range(10, 10 * count + 10, 10)]
    assert [event["step"] for event in _events(run) if event["event"] == "checkpoint"] == _steps(run)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_refused_from_each_operation_on(code: int, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the one before and says so; as soon as there is room, everything is there."""
    count = _operations(run, monkeypatch)
    before = 2
    for k in range(1, count + 1):
        step = 10 * k
        warnings: list[str] = []
        with Saver(run, keep=2, warn=warnings.append) as writer:
            with monkeypatch.context() as patch:
                disk = FailingDisk(patch)
                disk.code, disk.refuses = code, lambda at, k=k: at >= k  # type: ignore[misc]
                run.append_steps([_row(step)])
                writer.submit(_save(step, "last"))
                with pytest.raises(DiskError) as caught:
                    writer.finish()
            # What half was written is gone: it would take the room for another try.
            assert not [*run.path.rglob("*.partial"), *run.checkpoints.glob(".aside*")]
            stands = cp.load_newest(run.checkpoints)[0].step
            assert stands in {before, step}  # the latter where it is there and only the words about it are not
            assert f"saved last is step {stands} (" in str(caught.value) or stands == step
            assert f"lowmem resume {run.path}" in str(caught.value)
            assert len(warnings) == 1
            writer.finish()
        assert cp.load_newest(run.checkpoints)[0].step == step
        before = step
    assert _steps(run) == [2, *range(10, 10 * count + 10, 10)]


@pytest.mark.usefixtures("patient")
def test_a_refused_save_is_superseded_and_its_weights_are_not_lost(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    warnings: list[str] = []
    with Saver(run, keep=2, warn=warnings.append, note=notes.append) as writer:
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch)
            disk.refuses = lambda at: True
            writer.submit(_save(10, "best", "last"))
            writer.wait()  # training would go on here
            tried = len(disk.operations)
            writer.submit(_save(11, "last"))  # within the pause: nothing is tried
            writer.wait()
            assert sum(name.startswith("best") for _, name in disk.operations[tried:]) == 0
            assert len(warnings) == 1
            assert "step 10 was not saved (the disk is full" in warnings[0]
            assert "step 1 (" in warnings[0]
        writer.finish()
    assert [cp.load(path).step for path in cp.checkpoint_folders(run.checkpoints)] == [11, 1]
    assert load_file(run.path / "weights/best.safetensors")["w"][0] == 10
    assert load_file(run.path / "weights/last.safetensors")["w"][0] == 11
    assert notes == ["saved again: step 11 is on disk"]
    assert [event["event"] for event in _events(run)] == ["warning", "checkpoint"]


@pytest.mark.usefixtures("patient")
def test_a_refused_save_can_be_dropped(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(run, keep=2) as writer:
        with monkeypatch.context() as patch:
            FailingDisk(patch).refuses = lambda at: True
            writer.submit(_save(10, "best"))
            writer.drop()
        writer.finish()
        assert cp.load_newest(run.checkpoints)[0].step == 1
        writer.submit(_save(5))
        writer.finish()
    assert cp.load_newest(run.checkpoints)[0].step == 5
    assert not (run.path / "weights/best.safetensors").exists()


def test_tries_between_two_saves_are_bounded(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "PAUSES_SECONDS", (0.0, 0.0))
    warnings: list[str] = []
    tries = [0]
    with Saver(run, keep=2, warn=warnings.append) as writer, monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> Path:
            tries[0] += 1
            if tries[0] in (3, 6):
                exhausted.set()
            raise DiskError("no room")

        patch.setattr(cp, "save", refuse)
        for step in (10, 20):
            exhausted = threading.Event()
            writer.submit(_save(step))
            while not exhausted.is_set():
                writer.poll()
            writer.wait()
            assert writer._due is None  # nothing more until the next save
    assert tries == [6]
    assert [text.split(" (")[0] for text in warnings] == ["step 10 was not saved", "step 20 was not saved"]


@pytest.mark.usefixtures("no_pauses")
def test_no_checkpoint_without_the_rows_before_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(run, keep=2) as writer:
        with monkeypatch.context() as patch:

            def refuse(*_: object, **__: object) -> int:
                raise OSError(errno.ENOSPC, "full")

            patch.setattr("lowmem.runs.atomic.append_lines", refuse)
            run.append_steps([_row(9)])
            writer.submit(_save(10))
            with pytest.raises(DiskError):
                writer.finish()
            assert cp.load_newest(run.checkpoints)[0].step == 1
        run.append_steps([_row(10)])
        writer.finish()
    assert _steps(run) == [9, 10]
    assert cp.load_newest(run.checkpoints)[0].step == 10


def _held(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Writing of files waits: (has begun, may go on)."""
    begun, go_on = threading.Event(), threading.Event()
    write = atomic.write_synced

    def held(path: Path, data: bytes) -> None:
        begun.set()
        assert go_on.wait(30)
        write(path, data)

    monkeypatch.setattr(cp, "write_synced", held)
    return begun, go_on


def test_training_goes_on_while_it_is_written_and_a_second_save_waits(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = _held(monkeypatch)
    with Saver(run, keep=2) as writer:
        writer.submit(_save(10))
        assert begun.wait(30)
        writer.poll()
        assert cp.load_newest(run.checkpoints)[0].step == 1
        threading.Timer(0.2, go_on.set).start()
        writer.submit(_save(20))
        assert go_on.is_set()
        assert cp.load(run.checkpoints / "step-00000010").step == 10
        writer.finish()
    assert cp.load_newest(run.checkpoints)[0].step == 20


def test_an_error_of_the_loop_waits_for_the_write_that_has_begun(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = _held(monkeypatch)

    def fail() -> None:
        with Saver(run, keep=2) as writer:
            writer.submit(_save(10))
            assert begun.wait(30)
            threading.Timer(0.2, go_on.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert cp.load_newest(run.checkpoints)[0].step == 10


def test_no_room_for_a_thread_is_a_save_in_this_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Saver(run, keep=2) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            writer.submit(_save(10))
        writer.finish()
    assert cp.load_newest(run.checkpoints)[0].step == 10


def test_a_bug_in_the_background_surfaces(run: RunFolder) -> None:
    def fail() -> None:
        with Saver(run, keep=2) as writer:
            writer.submit(Save(cp.Checkpoint(10, {"w": "no tensor"}, {}, {}), 1))  # type: ignore[dict-item]
            while True:
                writer.poll()

    with pytest.raises(ValueError, match="Key `w` is invalid"):
        fail()
    assert cp.load_newest(run.checkpoints)[0].step == 1


@pytest.mark.usefixtures("no_pauses")
def test_what_the_disk_gives_back_differently_is_not_committed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[[Path, bytes], None] = atomic.write_synced
    with Saver(run, keep=2) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(cp, "write_synced", lambda path, data: write(path, data[:-1] + b"?"))
            writer.submit(_save(10))
            with pytest.raises(DiskError, match=r"the last save failed: .*manifest\.json"):
                writer.finish()
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]


@pytest.mark.usefixtures("no_pauses")
def test_no_memory_to_write_is_tried_again_too(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(run, keep=2) as writer, monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> Path:
            raise MemoryError

        patch.setattr(cp, "save", fail)
        writer.submit(_save(10))
        with pytest.raises(OutOfMemory, match="saved last is step 1 "):
            writer.finish()


@pytest.mark.parametrize("hurried", [True, False])
def test_somebody_who_waits_is_not_kept_for_minutes(
    hurried: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "PAUSES_SECONDS", ())
    monkeypatch.setattr(saver, "FINAL_PAUSES_SECONDS", (0.0, 0.0, 3600.0) if hurried else (0.0,) * 5)
    tries = [0]
    with Saver(run, keep=2) as writer, monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> Path:
            tries[0] += 1
            raise DiskError("no room")

        patch.setattr(cp, "save", refuse)
        writer.submit(_save(10))
        with pytest.raises(DiskError, match="no room; saved last is step 1 "):
            writer.finish(lambda: hurried)
    assert tries[0] in ((3, 4) if hurried else (6, 7))  # the first may be over before it is asked for


def test_nothing_of_a_save_is_held_longer_than_it_must(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """Neither after it was written, nor what was made of it after it was refused."""
    encoded: list[weakref.ref[_Bytes]] = []
    write_synced = cp.write_synced

    def write(path: Path, data: bytes) -> None:
        payload = _Bytes()
        encoded.append(weakref.ref(payload))
        if len(encoded) == 1:
            raise OSError(errno.ENOSPC, "full")
        write_synced(path, data)

    monkeypatch.setattr(cp, "write_synced", write)
    with Saver(run, keep=2) as writer:
        save = _save(10)
        kept = weakref.ref(save)
        writer.submit(save)
        del save
        writer.wait()
        assert kept() is not None
        assert encoded[0]() is None
        writer.finish()
        _until(lambda: kept() is None)


class _Bytes:
    """Stands for the bytes of a file."""


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
