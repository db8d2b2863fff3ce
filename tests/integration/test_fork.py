"""A fork is a new run from an old checkpoint; the old run is only read, and its past is not rewritten."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lowmem.cli.main import main
from lowmem.core.errors import CorruptCheckpoint, PreflightError, UsageError
from lowmem.lifecycle import extend_run, fork, fork_run, recorded_settings, resume_training, run_training
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.view import read_run
from lowmem.train.schedule import learning_rate
from tests.conftest import assert_same_tensors, exact_rows
from tests.tiny import Heard, tiny

# Four steps an epoch; the rate falls after six, where a checkpoint is kept too.
OWN = (
    "train.batch=50", "data.train_subset=200", "data.test_subset=50", "schedule.milestones=[82]",
    "checkpoint.every_steps=12", "checkpoint.keep=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "run"
    run_training(tiny(*OWN), path)
    return path


@pytest.fixture
def copied(parent: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parent, tmp_path / "run"))


def _files(path: Path) -> dict[str, bytes]:
    """All but the lock, which may be looked at."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith("run.")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def _rates(path: Path) -> list[str]:
    return [row["lr"] for row in exact_rows(path)]


def test_a_longer_cycle_falls_to_the_new_end(tmp_path: Path) -> None:
    heard, before, after = Heard(), tmp_path / "before", tmp_path / "after"
    run_training(tiny(*OWN, "schedule.kind=one-cycle", "schedule.milestones=[81, 122]"), before)
    extend_run(before, epochs=5, out=after, observer=heard)
    config = recorded_settings(after).config
    assert config.schedule.warmup_epochs == pytest.approx(0.9)
    told = "\n".join(heard.notes)
    assert (
        "train.epochs: 3 -> 5\nthe one-cycle schedule now ends with epoch 5: from here on the rate is what a run of "
        "that length has there\n"
    ) in told
    assert "schedule." not in told
    rates = [float(rate) for rate in _rates(after)]
    assert rates[2] == 0  # of the run before
    assert rates[3:] == [learning_rate(config, 4, step, low_start=False) for step in (15, 19)]
    assert 0 == rates[4] < rates[3] < 0.1
    assert (after / "report" / "learning_rate.png").stat().st_size > 1000


def test_a_fork_trains_on_from_the_checkpoint(parent: Path, tmp_path: Path) -> None:
    before, heard = _files(parent), Heard()
    result = fork_run(parent, at=2, changes={"optim.lr": 0.5}, out=tmp_path / "fork", observer=heard)
    assert result.finished
    assert exact_rows(result.path)[:2] == exact_rows(parent)[:2]
    assert _rates(result.path) == ["0.1", "0.01", "0.05"]
    events = [json.loads(line)["event"] for line in (result.path / "events.jsonl").read_text().splitlines()]
    assert [kind for kind in events if kind != "progress"] == ["fork", "start", "checkpoint", "done"]
    assert "lr: 0.5  # fork of run" in (result.path / "config.yaml").read_text()
    steps = [(path / "steps.csv").read_text().splitlines()[:9] for path in (parent, result.path)]
    assert steps[0] == steps[1]
    assert (result.path / "report/learning_rate.png").read_bytes().startswith(b"\x89PNG")
    assert _files(parent) == before
    told = "\n".join(heard.notes)
    assert f"a fork of {parent} from the end of epoch 2 (step-00000008); {parent} stays as it is" in told
    assert "optim.lr: 0.1 -> 0.5\n" in told
    assert "learning rate  before  after\nfrom epoch 3   0.01    0.05\nlast epoch     3       3\n" in told


@pytest.mark.parametrize("at", [2, "step:6", "step:8"])
def test_more_epochs_leave_the_ones_there_were_as_they_were(parent: Path, tmp_path: Path, at: int | str) -> None:
    """To the last bit, from the middle of an epoch too: the schedule is not scaled, the pictures are the same."""
    heard = Heard()
    result = fork_run(parent, at=at, changes={"train.epochs": 4}, out=tmp_path / "fork", observer=heard)
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-00000012/{name}.safetensors"
        assert_same_tensors(parent / file, result.path / file)
    assert exact_rows(result.path)[:3] == exact_rows(parent)
    lines = [(path / "steps.csv").read_text().splitlines()[:13] for path in (parent, result.path)]
    assert lines[0] == lines[1]
    assert _rates(result.path) == ["0.1", "0.01", "0.01", "0.01"]
    told = "\n".join(heard.notes)
    assert "train.epochs: 3 -> 4\nthe schedule stays where it was, milestones at epoch 1.5: " in told
    assert ("epoch 2 goes on after 2 of its 4 steps" in told) == (at == "step:6")
    assert "schedule.milestones:" not in told


@pytest.mark.parametrize(
    ("at", "values", "message"),
    [
        (
            7,
            {"optim.lr": 0.02},
            r"no usable checkpoint of the end of epoch 7: there are 1, step:6, 2, 3; .*--keep-every",
        ),
        ("step:7", {"optim.lr": 0.02}, "no usable checkpoint of step 7"),
        (2, {}, "is a resume"),
        (2, {"optim.lr": 0.1}, "is a resume"),
        (2, {"model.width": 4}, "cannot become 4"),
        (2, {"model.arch": "res34"}, "cannot become 'res34'"),
        (2, {"recipe": "other"}, "cannot be changed in a fork"),
        (3, {"optim.lr": 0.02}, "ask for more"),
        (3, {"train.epochs": 2}, "ask for more"),
        (2, {"optim.lr": -1}, "a number > 0"),
        ("step:6", {"train.batch": 25}, r"train.batch changes which picture comes when.*step 6 .*epoch 2: fork at"),
        ("step:6", {"seed": 1}, "seed changes which picture"),
        ("step:6", {"data.train_subset": 100}, "train_subset changes which picture"),
        ("step:6", {"data.val_split": 20}, "val_split changes which picture"),
        *(
            (at, {"optim.lr": 0.02}, "is no place in a run")
            for at in ("x", "-1", "step:", "step:x", "1.5", "١", "", "9" * 5000)
        ),
    ],
)
def test_refusals(parent: Path, tmp_path: Path, at: int | str, values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fork_run(parent, at=at, changes=values, out=tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_another_batch_keeps_the_place_in_the_schedule(parent: Path, tmp_path: Path) -> None:
    result = fork_run(parent, at=1, changes={"train.batch": 20}, out=tmp_path / "fork")
    assert result.state.step == 3 * 10
    history = read_run(result.path)
    assert [(row.epoch, row.step, row.lr) for row in history.epochs] == [(1, 4, 0.1), (2, 20, 0.01), (3, 30, 0.01)]
    # Its own steps only: the old ones are counted otherwise. The rate falls after one and a half epochs, as it did.
    assert [row.step for row in history.steps] == list(range(11, 31))
    assert [row.step for row in history.steps if row.lr == 0.1] == list(range(11, 16))


@pytest.mark.slow
def test_a_batch_that_was_chosen_can_be_changed(tmp_path: Path) -> None:
    """What is carried over belongs to the settings as they were decided."""
    run = run_training(tiny(*OWN, "train.batch=auto", "memory.tensors=8M", "train.epochs=1"), tmp_path / "run").path
    assert recorded_settings(run).config.train.batch == 32
    result = fork_run(run, at=1, changes={"train.batch": 64, "train.epochs": 2}, out=tmp_path / "fork")
    assert (result.state.step, recorded_settings(result.path).config.train.batch) == (8, 64)


def test_a_dry_run_says_it_all_and_leaves_nothing(parent: Path, tmp_path: Path) -> None:
    heard = Heard()
    # Evaluation may change in the middle of an epoch.
    changes = {"data.test_subset": 40, "optim.lr": 0.2}
    out = tmp_path / "new" / "fork"
    result = fork_run(parent, at="step:6", changes=changes, out=out, observer=heard, dry_run=True)
    assert not result.finished
    assert list(tmp_path.iterdir()) == []
    begins = {note.partition(":")[0] for note in heard.notes}
    assert {"data.test_subset", "optim.lr", "preflight", "time", "disk", "dry run"} <= begins
    assert "from epoch 2, 50% in  0.01    0.02" in heard.notes
    assert heard.warnings == []


def test_a_disk_that_is_too_full_leaves_nothing(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    before = _files(parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(PreflightError, match="free some space"):
        fork_run(parent, at=2, changes={"optim.lr": 0.2}, out=tmp_path / "fork")
    assert list(tmp_path.iterdir()) == []
    assert _files(parent) == before


def test_pictures_held_back_that_the_weights_have_seen(parent: Path, tmp_path: Path) -> None:
    heard = Heard()
    fork_run(parent, at=2, changes={"data.val_split": 20}, out=tmp_path / "x", observer=heard, dry_run=True)
    assert "validation error will look too good" in heard.warnings[0]


def test_a_damaged_checkpoint_is_not_forked_from(copied: Path, tmp_path: Path) -> None:
    file = copied / "checkpoints/step-00000008/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the size stays
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpoint, match=r"end of epoch 2: .*damaged: .*hash"):
        fork_run(copied, at=2, changes={"optim.lr": 0.2})
    # And it is not the last.
    (copied / "checkpoints/step-00000012/manifest.json").unlink()
    found = fork.find(copied, recorded_settings(copied).config, "last")
    assert found.position.step == 6
    assert len(found.skipped) == 2


def test_of_a_run_that_went_back(copied: Path, tmp_path: Path) -> None:
    """What the old run had made of its learning rate stands beside the fork's own."""
    path = copied / "checkpoints/step-00000008"
    saved = checkpoints.load(path)
    saved.state["run"] |= {"lr_scale": 0.25, "rollbacks": 2}
    shutil.rmtree(path)
    checkpoints.save(copied / "checkpoints", saved, keep=5)
    heard = Heard()
    fork_run(copied, at=2, changes={"optim.lr": 0.02}, out=tmp_path / "fork", observer=heard, dry_run=True)
    told = " ".join("\n".join(heard.notes).split())
    assert "from epoch 3 0.0025 0.002" in told  # milestone behind: 0.1 * 0.1 * 0.25 and 0.02 * 0.1
    assert "is at 0.25 of its learning rate: the fork begins with 0.02" in told
    # Whatever else changes, the rate that led somewhere stays; more epochs of the same run are such a change.
    kept = fork_run(copied, at=2, changes={"optim.weight_decay": 0.0}, out=tmp_path / "kept", observer=heard)
    assert _rates(kept.path)[2:] == ["0.0025"]
    assert "so is the fork" in " ".join(heard.notes)
    longer = extend_run(Path(shutil.copytree(kept.path, tmp_path / "run2")), epochs=4, out=tmp_path / "longer")
    assert _rates(longer.path)[2:] == ["0.0025", "0.0025"]


def test_a_fork_is_of_the_run_as_it_was_trained_whatever_config_yaml_says_since(copied: Path, tmp_path: Path) -> None:
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("weight_decay: 0.0001", "weight_decay: 0.01"))
    heard, before = Heard(), _files(copied)
    with pytest.raises(UsageError, match=r"weight_decay is 0.01 there and was 0.0001.*fork .* --at last --set optim"):
        resume_training(copied)
    forked = fork_run(copied, at=2, changes={"optim.weight_decay": 0.01}, out=tmp_path / "fork", observer=heard)
    assert "optim.weight_decay: 0.0001 -> 0.01" in heard.notes
    assert recorded_settings(forked.path).config.optim.weight_decay == 0.01
    assert _files(copied) == before
    # More epochs, written there by hand.
    (copied / "config.yaml").write_text(text.replace("epochs: 3 ", "epochs: 4 "))
    with pytest.raises(UsageError, match=r"train.epochs is 4 there and was 3.*--epochs 4` goes on"):
        resume_training(copied)
    longer = extend_run(copied, epochs=4, out=tmp_path / "longer")
    assert (longer.finished, longer.state.epoch) == (True, 4)


def test_a_checkpoint_of_another_run_is_not_forked_from(copied: Path) -> None:
    for path in checkpoints.checkpoint_folders(copied / "checkpoints"):
        saved = checkpoints.load(path)
        settings = {**saved.state["settings"], "optim.lr": 7.0}  # of which its hash knows nothing
        checkpoints.save(path.parent, replace(saved, state={**saved.state, "settings": settings}), keep=9)
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("weight_decay: 0.0001", "weight_decay: 0.01"))
    with pytest.raises(CorruptCheckpoint, match="other settings"):
        fork_run(copied, at=2, changes={"optim.lr": 0.2})


# -- more epochs -------------------------------------------------------------------------------------------------------


def _leave(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_resume_with_more_epochs_is_a_fork_that_says_so(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(copied)
    assert _leave(["resume", str(copied), "--epochs", "5", "--keep-every", "2"]) == 0
    out = capsys.readouterr().out
    assert "is a run of 3 epochs and stays one: with --epochs 5 a new run forks off" in out
    assert "from epoch 4   over    0.01" in out
    longer = copied.with_name("run-fork")
    assert _rates(longer) == ["0.1", "0.01", "0.01", "0.01", "0.01"]
    assert _files(copied) == before
    assert recorded_settings(longer).config.checkpoint.keep_every == 2
    # A second time it is in the way, and the message says how to go on.
    assert _leave(["resume", str(copied), "--epochs", "5"]) == 2
    assert f"lowmem resume {longer}" in capsys.readouterr().err


def test_resume_with_the_same_epochs_is_a_resume(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _leave(["resume", str(copied), "--epochs", "3"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert not copied.with_name("run-fork").exists()
    assert _leave(["resume", str(copied), "--out", "x"]) == 2
    assert "--epochs" in capsys.readouterr().err
    assert _leave(["resume", str(copied), "--set", "train.epochs=5"]) == 2
    assert f"lowmem resume {copied} --epochs 5" in capsys.readouterr().err
    assert _leave(["resume", str(copied), "--epochs", "2"]) == 2
    assert "ask for more" in capsys.readouterr().err


def test_a_resume_reads_its_settings_and_walks_its_folder_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "notes").mkdir()  # which nobody has a reason to look into but to see that there are no links
    calls: list[str] = []
    load, scan = yaml.load, os.scandir
    monkeypatch.setattr(yaml, "load", lambda *given, **more: calls.append("yaml") or load(*given, **more))  # type: ignore[func-returns-value]
    monkeypatch.setattr(os, "scandir", lambda path=".": calls.append(str(path)) or scan(path))  # type: ignore[func-returns-value]
    assert _leave(["resume", str(copied)]) == 0
    assert calls.count("yaml") == 1
    assert calls.count(str(copied / "notes")) == 1


def test_a_run_that_was_stopped_is_extended_from_where_it_was(parent: Path, tmp_path: Path) -> None:
    for step in ("step-00000008", "step-00000012"):
        assert (parent / "checkpoints" / step).is_dir()
    stopped = Path(shutil.copytree(parent, tmp_path / "run"))
    for step in ("step-00000008", "step-00000012"):
        shutil.rmtree(stopped / "checkpoints" / step)
    result = extend_run(stopped, epochs=4)
    assert result.path == tmp_path / "run-fork"
    name = "checkpoints/step-00000012/model.safetensors"
    assert_same_tensors(parent / name, result.path / name)
    assert exact_rows(result.path)[:3] == exact_rows(parent)


def test_what_a_resume_is_told_stays_but_for_what_is_of_one_place(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the next one would delete what this one was told to keep, and stop where that one was told to go on."""
    shutil.rmtree(copied / "checkpoints/step-00000012")
    sets = [word for each in ("train.max_steps=9", "memory.platform=linux", "data.root=r") for word in ("--set", each)]
    assert _leave(["resume", str(copied), "--keep-every", "1", *sets]) == 0
    config = recorded_settings(copied).config
    assert (config.checkpoint.keep_every, config.checkpoint.keep, config.train.max_steps) == (1, 5, 9)
    assert (config.memory.platform, config.data.root) == ("auto", str(Path.cwd() / "r"))
    assert "train.max_steps=null` goes on to the end" in capsys.readouterr().out
    assert _leave(["resume", str(copied), "--set", "train.max_steps=null"]) == 0
    assert recorded_settings(copied).config.train.max_steps is None
    assert f"{copied} is finished: 3 epochs in " in capsys.readouterr().out


def test_a_limit_on_steps_is_not_run_into(copied: Path) -> None:
    with pytest.raises(UsageError, match=r"step 6 .*train\.max_steps = 6.*train\.max_steps=null"):
        fork_run(copied, at="step:6", changes={"train.max_steps": 6})
