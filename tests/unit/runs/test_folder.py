"""A folder of a run that was killed before its first checkpoint is taken over; one with anything to lose never is. And
what a run takes on disk is at least what a run writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem.config.settings import gather
from lowmem.core.errors import PreflightError, UsageError
from lowmem.runs import folder
from lowmem.runs.folder import never_began, require_run
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE, csv_line, gradient_line
from lowmem.runs.store import RunFolder, run_bytes
from tests.faults.disk import tiny_disk

Spoil = Callable[[RunFolder], object]


def _folder(path: Path, kind: str) -> Path:
    made = path / kind
    made.mkdir(parents=True)
    return made


def test_a_run_that_never_began_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.create(path, "seed: 0\n", {}) as run:
        run.write_plan({"budget": 1})
        _folder(path / "checkpoints", ".aside-step-00000000")
        _folder(path / ".preflight", "checkpoints")
        (path / "config.yaml.partial").write_text("see")
    with RunFolder.create(path, "seed: 1\n", {}):
        names = {entry.name for entry in path.iterdir()} - {"run.lock", "run.owner.json"}
        assert names == {"config.yaml", "env.json", "metrics.csv", "steps.csv", "checkpoints", "weights"}
        assert not any((path / "checkpoints").iterdir())
        assert (path / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.event("start"),
        lambda run: run.append_steps([{"step": 1, "epoch": 1, "lr": 0.1, "loss": 2.0}]),
        lambda run: _folder(run.checkpoints, "step-00000000"),
        lambda run: _folder(run.checkpoints, "damaged-step-00000004"),
        lambda run: (run.path / "weights/last.safetensors").write_bytes(b"1"),
        lambda run: (run.path / "notes.txt").write_text("mine"),
        lambda run: (run.path / "run.lock").rename(run.path / "config.yaml.partial"),
    ],
)
def test_nothing_else_is(spoil: Spoil, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "seed: 0\n", {}) as run:
        spoil(run)
    names = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    assert not never_began(tmp_path / "run")
    with pytest.raises(UsageError, match="never overwritten"):
        RunFolder.create(tmp_path / "run", "seed: 1\n", {})
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == names


def test_one_that_is_being_set_up_is_left_alone(tmp_path: Path) -> None:
    with (
        RunFolder.create(tmp_path / "run", "seed: 0\n", {}),
        pytest.raises(UsageError, match="is being written by process"),
    ):
        RunFolder.create(tmp_path / "run", "seed: 1\n", {})
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"


def test_who_resumes_it_is_told_to_start_again(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "seed: 0\n", {}):
        pass
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(UsageError, match="nothing is lost: give the command that started it once more"):
        require_run(tmp_path / "run")


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        require_run(tmp_path / "none")
    with pytest.raises(UsageError, match="no run folder"):
        require_run(tmp_path)


def test_a_half_line_is_cut_off_before_the_next(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        run.event("start")
        whole = run.events_file.read_text()
        for half in ('{"time": "2026', "\0\0\0"):
            with open(run.events_file, "a") as file:
                file.write(half)
            run.event("resume")
            *before, last = run.events_file.read_text().splitlines(keepends=True)
            assert "".join(before) == whole
            assert '"event": "resume"' in last
            run.events_file.write_text(whole)
        run.events_file.write_text("cut in its first line")
        run.event("start")
        assert run.events_file.read_text().count("\n") == 1
        assert run.events_file.read_text().startswith("{")


def test_what_a_killed_writer_left_is_tidied_away(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        for name in ("step-00000012", "step-00000008", "step-00000008.old", "step-00000004", ".aside-step-00000014"):
            _folder(run.checkpoints, name)
        _folder(run.checkpoints, "step-00000006.old")
        (run.path / "weights/best.safetensors.partial").write_bytes(b"1")
        (run.path / "plan.json.partial").write_bytes(b"1")
        run.tidy(keep=3)
        left = {path.name for path in run.checkpoints.iterdir()}
        assert left == {"step-00000012", "step-00000008", "step-00000006.old"}
        assert not list(run.path.rglob("*.partial"))


@pytest.mark.parametrize(("pages", "entries"), [(1, 0), (2, 0), (3, 0), (4, 0), (9, 3), (9, 4), (9, 5), (9, 6), (9, 8)])
def test_a_folder_that_cannot_be_made_leaves_nothing(pages: int, entries: int, tmp_path: Path) -> None:
    with tiny_disk(tmp_path, pages * 4096, entries) as point:
        path = point / "t/x/y"
        with (
            pytest.raises(PreflightError, match="choose another with --out"),
            RunFolder.create(path, "seed: 0\n", {}),
        ):
            raise AssertionError("the disk took everything")
        assert list(point.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with tiny_disk(tmp_path, 4096) as point:
        (point / "mine").mkdir()
        with pytest.raises(PreflightError):
            RunFolder.create(point / "mine", "seed: 0\n", {})
        assert list(point.rglob("*")) == [point / "mine"]


def test_nobody_begins_in_a_folder_that_is_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    rmtree = folder.shutil.rmtree

    def meanwhile(path: Path, ignore_errors: bool = False) -> None:
        with pytest.raises(UsageError, match="being written"):
            RunFolder.create(tmp_path / "run", "seed: 1\n", {})
        refused.append(path)
        rmtree(path, ignore_errors=ignore_errors)

    with RunFolder.create(tmp_path / "run", "seed: 0\n", {}) as run:
        monkeypatch.setattr(folder.shutil, "rmtree", meanwhile)
        run.discard()
        monkeypatch.undo()
        assert len(refused) == 2  # checkpoints, weights
        assert list(tmp_path.iterdir()) == []
        with RunFolder.create(tmp_path / "run", "seed: 1\n", {}) as other:
            run.discard()
            run.close()
            assert (other.path / "run.owner.json").exists()
            assert (other.path / "config.yaml").read_text() == "seed: 1\n"


# -- room on the disk --------------------------------------------------------------------------------------------------

LONGEST = 1e-300 / 3  # a float of as many digits as there are


def _rows_bytes(*sets: str, steps_per_epoch: int, layers: int = 0, norms_every: int = 10**9) -> int:
    config = gather(sets=sets).config
    sizes = {"steps_per_epoch": steps_per_epoch, "layers": layers, "norms_every": norms_every}
    return run_bytes(config, checkpoint_bytes=0, parameter_bytes=0, **sizes)


def test_rows_fit_into_what_is_counted_for_them() -> None:
    one_epoch = _rows_bytes("train.epochs=1", steps_per_epoch=0)
    event = json.dumps({"time": "2026-11-23T10:00:00+0000", "event": "checkpoint", "epoch": 10**6, "step": 10**9})
    whole = dict.fromkeys(EPOCH_TABLE.names, -LONGEST)
    assert len(csv_line(EPOCH_TABLE.names, whole)) + len(event) + 2 <= one_epoch
    row = csv_line(STEP_TABLE.names, {"step": 10**7, "epoch": 10**4, "lr": 0.1, "loss": LONGEST})
    logged = _rows_bytes("train.epochs=1", "train.log_every_steps=20", steps_per_epoch=40)
    assert logged - one_epoch >= 2 * len(row) + 2
    often = _rows_bytes("train.epochs=1", "train.log_every_steps=100", "checkpoint.every_steps=10", steps_per_epoch=40)
    assert often - one_epoch >= 4 * (len(event) + 1)


def test_gradient_norms_fit_too() -> None:
    """The 110-layer net, every step of 164 epochs: its gradients.csv is larger than all that was counted before."""
    row = gradient_line(64_124, 164, [LONGEST] * 110)
    every, none = (_rows_bytes(steps_per_epoch=391, layers=110, norms_every=apart) for apart in (1, 10**9))
    assert every - none >= 64_124 * (len(row) + 1)


def test_one_generation_more_than_are_kept() -> None:
    config = gather().config
    assert run_bytes(config, checkpoint_bytes=100, parameter_bytes=10) == 3 * 100 + 3 * 10
