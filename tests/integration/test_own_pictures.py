"""Runs on pictures in folders: those that began before pictures were cropped keep theirs, what is left out is recorded,
and a class is not another one on resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowmem
from lowmem.cli.main import _run
from lowmem.config.schema import BEFORE
from lowmem.config.settings import from_yaml, gather
from lowmem.core.errors import UsageError
from lowmem.lifecycle import run_training
from lowmem.reproduce.job import Job, read_job
from tests import pictures
from tests.tiny import Heard, tiny


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twelve training pictures and four test pictures of two classes, wide ones."""
    return pictures.pets(tmp_path)


def begin(pets: Path, *changes: str, observer: Heard | None = None) -> Path:
    """A run in the middle of its first epoch of three steps."""
    run = pets.parent / "run"
    settings = tiny(
        f"data.source=folder:{pets}", f"data.cache={pets.parent / 'cache'}", "data.train_subset=null", "train.batch=4",
        "data.test_subset=null", "train.epochs=1", "train.max_steps=2", *changes,
    )  # fmt: skip
    run_training(settings, run, observer or Heard())
    return run


def make_older(run: Path) -> None:
    """Its config.yaml as it was written when these settings were not known yet."""
    file, later = run / "config.yaml", {key.removeprefix("data.") for key in BEFORE if key.startswith("data.")}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if line.split(":")[0].strip() not in later), encoding="utf-8")


def test_an_older_run_goes_on_with_its_pictures(pets: Path, tmp_path: Path) -> None:
    run = begin(pets, "data.fit=stretch", "data.val_folder=false")
    make_older(run)
    assert from_yaml(run / "config.yaml").config.data.fit == "stretch"
    assert gather(config_file=run / "config.yaml").config.data.fit == "stretch"  # which repeats it
    forked = lowmem.fork_run(run, at="last", changes={"optim.lr": 0.01, "train.max_steps": None}, out=tmp_path / "fork")
    assert forked.finished
    assert lowmem.resume_training(run, {"train.max_steps": None}).finished


def test_a_run_of_cropped_pictures_is_not_taken_for_an_older_one(pets: Path) -> None:
    run = begin(pets)
    make_older(run)
    with pytest.raises(UsageError, match=r"data\.fit is 'stretch' there and was 'crop'"):
        lowmem.resume_training(run, {"train.max_steps": None})


def test_an_older_job_is_read(tmp_path: Path) -> None:
    Job(tmp_path, tiny("data.fit=stretch").replace({}, "")).write()
    file = tmp_path / "job.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in BEFORE:
        values["settings"].pop(key, None)  # an empty one is not written
    file.write_text(json.dumps(values), encoding="utf-8")
    assert read_job(tmp_path).settings.config.data.fit == "stretch"


def test_what_is_left_out_is_said_and_recorded(pets: Path) -> None:
    (pets / "train" / "cat" / "bad.jpg").write_text("no picture")
    heard = Heard()
    run = begin(pets, "data.skip_damaged=true", observer=heard)
    assert any("1 of 17 pictures are left out" in text for text in heard.warnings)
    assert "folder:pets: 2 classes: cat, dog" in heard.notes
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (left_out,) = [event for event in events if event["event"] == "pictures left out"]
    assert left_out["count"] == 1
    assert left_out["files"][0].startswith(str(Path("train", "cat", "bad.jpg")))
    assert lowmem.resume_training(run, {"train.max_steps": None}).finished


def test_a_class_by_another_name_is_said(pets: Path, tmp_path: Path) -> None:
    run = begin(pets)
    for part in ("train", "test"):
        (pets / part / "cat").rename(pets / part / "cot")
    resumed, heard = Heard(), Heard()
    lowmem.fork_run(
        run, at="last", changes={"optim.lr": 0.01, "train.max_steps": None}, out=tmp_path / "fork", observer=heard,
        dry_run=True,
    )  # fmt: skip
    lowmem.resume_training(run, {"train.max_steps": None}, resumed)
    for said in (heard, resumed):
        assert any("classes have other names" in text for text in said.warnings)


def test_doctor_and_train_find_the_same(
    pets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pets / "train" / "cat" / "bad.jpg").write_text("no picture")
    monkeypatch.chdir(pets.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(pets.parent / "cache"))
    assert _run(["train", "--data", "folder:pets", "--device", "cpu"]) == 3
    words = capsys.readouterr().err.removeprefix("lowmem: ").partition(": replace")[0]
    assert "bad.jpg" in words
    assert _run(["doctor", "--data", "folder:pets", "--device", "cpu", "--json"]) == 3
    (found,) = [one for one in json.loads(capsys.readouterr().out)["findings"] if one["name"] == "data"]
    assert words in found["finding"]
