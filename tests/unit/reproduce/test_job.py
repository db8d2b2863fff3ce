"""Which runs a job has, job.json (what is recorded, what may differ, what is refused), and the job's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.networks import BLOCK_LAYOUT
from lowmem.config.settings import Settings, gather, to_yaml
from lowmem.core.errors import UsageError
from lowmem.reproduce.job import (
    ALL,
    REPORTED,
    Job,
    asked_for,
    begun,
    held,
    read_job,
    refuse_foreign,
    refuse_other_settings,
    select,
)

RES110 = next(member for member in ALL if member.name == "res110-bottleneck")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    settings = gather(flags={"train.epochs": 3, "memory.vram": "2G"}, sets=["optim.lr=0.05"])
    job = Job(tmp_path, settings, "abc", {"res20": 4.5})
    job.write()
    return job


def test_reads_back_what_it_wrote(job: Job) -> None:
    back = read_job(job.path)
    assert (back.settings.config, back.data, back.weights) == (job.settings.config, "abc", {"res20": 4.5})
    assert back.settings.sources["train.epochs"] == "flag"
    assert back.settings.sources["optim.lr"] == "--set"
    assert back.settings.sources["optim.momentum"] == "recipe report"


def test_the_settings_of_a_run(job: Job) -> None:
    config = job.settings_of(RES110).config
    assert (config.model.arch, config.model.block) == ("res110", "bottleneck")
    assert (config.train.epochs, config.optim.lr, config.memory.vram) == (3, 0.05, 2 << 30)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["settings"].pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.update(format=2), "no job of this version"),
        (lambda values: values.update(data=3), "no job of this version"),
        (without("train.epochs"), "lacks the setting train.epochs"),
        (lambda values: values["settings"].update({"model.arch": "res20"}), "has the setting model.arch"),
        (lambda values: values["settings"].update({"train.epochs": -1}), "train.epochs"),
        (lambda values: values["settings"].update({"train.epochs": True}), "train.epochs"),
        (lambda values: values["settings"].update({"optim.lr": float("nan")}), "optim.lr"),
        (lambda values: values["sources"].update(seed=[]), "sources"),
        (lambda values: values["weights"].update(res20="much"), "weights"),
        (lambda values: values["weights"].update(res21=1.0), "weights"),
        (lambda values: values["weights"].update(res20=0), "weights"),
    ],
)
def test_a_damaged_record(job: Job, change: Callable[[dict[str, Any]], None], words: str) -> None:
    values = json.loads(job.file.read_text())
    change(values)
    job.file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=words) as caught:
        read_job(job.path)
    assert str(job.file) in str(caught.value)
    assert "--out" in str(caught.value)


def test_no_record_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a job"):
        read_job(tmp_path)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        read_job(tmp_path)
    (tmp_path / "job.json").write_text("5")
    with pytest.raises(UsageError, match="holds no job"):
        read_job(tmp_path)
    (tmp_path / "job.json").unlink()
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "job.json").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        read_job(tmp_path)


# -- what is asked for -------------------------------------------------------------------------------------------------


def asked(tmp_path: Path, *sets: str, **how: Any) -> dict[str, object]:
    return asked_for(gather(sets=sets, **how))


def test_only_what_somebody_gave(tmp_path: Path) -> None:
    assert asked(tmp_path) == {}
    assert asked(tmp_path, "optim.lr=0.05", flags={"train.epochs": 4}) == {"optim.lr": 0.05, "train.epochs": 4}
    file = tmp_path / "own.yaml"
    file.write_text("train: {epochs: 7}\n")
    assert asked(tmp_path, config_file=file) == {"train.epochs": 7}


def test_a_recipe_that_is_named_is_given(tmp_path: Path) -> None:
    given = asked(tmp_path, recipe="report")
    assert given["recipe"] == "report"
    assert given["optim.lr"] == 0.1


def test_a_batch_is_not_chosen_where_one_is_named(tmp_path: Path) -> None:
    assert asked(tmp_path, flags={"train.batch": 64}) == {"train.batch": 64, "memory.auto_batch": False}
    assert asked(tmp_path, flags={"train.batch": "auto"}) == {"memory.auto_batch": True}


@pytest.mark.parametrize("key", ["model.arch=res20", "model.block=basic", "model.spec=torchvision:resnet18"])
def test_the_networks_are_the_jobs(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match="--only"):
        asked(tmp_path, key)


def test_settings_that_would_change_what_is_computed(job: Job) -> None:
    refuse_other_settings(job, {"train.epochs": 3, "optim.lr": 0.05, "memory.vram": 1 << 30, "train.device": "cpu"})
    with pytest.raises(UsageError) as caught:
        refuse_other_settings(job, {"train.epochs": 5, "seed": 1, "memory.vram": 1 << 30})
    message = str(caught.value)
    assert "train.epochs 3 (now 5), seed 0 (now 1)" in message
    assert "memory.vram" not in message
    assert "--out" in message
    assert "\n" not in message


@pytest.mark.parametrize(("device", "of_tensors"), [("cpu", True), ("auto", True), ("cuda", False)])
def test_a_job_from_before_there_was_a_budget_of_tensors(job: Job, device: str, of_tensors: bool) -> None:
    """Where the device was left to the runs, theirs tells what `memory.vram` was."""
    put(job, job.settings_of(RES110).replace({"train.device": "cpu"}, "auto"))
    values = json.loads(job.file.read_text(encoding="utf-8"))
    del values["settings"]["memory.tensors"], values["sources"]["memory.tensors"]
    values["settings"]["train.device"] = device
    job.file.write_text(json.dumps(values), encoding="utf-8")
    asked = read_job(job.path).operational
    assert asked["memory.tensors" if of_tensors else "memory.vram"] == 2 << 30
    assert asked["memory.vram" if of_tensors else "memory.tensors"] is None


# -- a run folder ------------------------------------------------------------------------------------------------------


def put(job: Job, settings: Settings) -> None:
    folder = job.path / RES110.name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")


def test_a_run_of_the_job(job: Job) -> None:
    resolved: dict[str, object] = {"train.precision": "amp", "train.memory_format": "contiguous", "train.device": "cpu"}
    put(job, job.settings_of(RES110).replace({**resolved, "memory.vram": 5 << 30}, "auto"))
    refuse_foreign(job, RES110)


@pytest.mark.parametrize(("key", "value"), [("optim.lr", 0.1), ("model.block", "basic"), ("train.epochs", 4)])
def test_a_run_that_is_another_jobs(job: Job, key: str, value: object) -> None:
    put(job, job.settings_of(RES110).replace({key: value}, "test"))
    with pytest.raises(UsageError, match=f"is no run of this job: {key} is {value} there") as caught:
        refuse_foreign(job, RES110)
    assert "--out" in str(caught.value)


def test_a_batch_that_each_run_chose(tmp_path: Path) -> None:
    job = Job(tmp_path, gather(flags={"train.batch": "auto", "memory.vram": "1G"}))
    chosen: dict[str, object] = {"train.batch": 512, "optim.lr": 0.4, "schedule.low_start_lr": 0.04}
    put(job, job.settings_of(RES110).replace(chosen, "auto"))
    refuse_foreign(job, RES110)


# -- which runs --------------------------------------------------------------------------------------------------------


def names(only: str | None = None, block: str | None = None) -> list[str]:
    return [member.name for member in select(only, block)]


def test_the_six_and_the_two() -> None:
    assert names() == names(block="basic") == ["res20", "cnn20", "res56", "cnn56", "res110", "cnn110"]
    assert names(block="bottleneck") == [*names(), "res56-bottleneck", "res110-bottleneck"]
    assert len(REPORTED) == 6
    for member in ALL:
        assert (int(member.arch[3:]), member.block) in BLOCK_LAYOUT


def test_only_these_in_the_jobs_order() -> None:
    assert names("cnn110, res20") == ["res20", "cnn110"]
    assert names("res20,res20,") == ["res20"]
    assert names("res56-bottleneck") == ["res56-bottleneck"]
    assert names("res20", "bottleneck") == ["res20", "res56-bottleneck", "res110-bottleneck"]


@pytest.mark.parametrize(("only", "block"), [("res21", None), ("", None), (",", None), (None, "wide"), ("RES20", None)])
def test_what_there_is_not(only: str | None, block: str | None) -> None:
    with pytest.raises(UsageError, match="res56-bottleneck"):
        select(only, block)


# -- the folder --------------------------------------------------------------------------------------------------------


def test_nothing_stays_where_nothing_was_begun(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "job"
    with held(out):
        (out / "job.json").write_text("{}")
        assert (out / "job.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with held(tmp_path):
        pass
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_begun_job_stays(tmp_path: Path) -> None:
    out = tmp_path / "job"
    with held(out):
        (out / "job.json").write_text("{}")
        (out / "res20").mkdir()
        assert not begun(out)  # an empty folder is no run
        (out / "res20" / "metrics.csv").write_text("epoch\n1\n")
        assert begun(out)
    assert (out / "job.json").exists()
    assert not (out / "job.owner.json").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "job"
    with held(out), pytest.raises(UsageError, match="is being written by process"), held(out):
        pass


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", "res20"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"is not the folder of a job.*--out"), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("mine")
    with pytest.raises(UsageError, match="is a file"), held(tmp_path / "job"):
        pass


def test_what_a_killed_one_left_is_taken_over(tmp_path: Path) -> None:
    for name in ("job.lock", "job.json.partial"):
        (tmp_path / name).touch()
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_job_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "pictures").mkdir(parents=True)
    (tmp_path / "project" / "job").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    settings = gather(sets=["data.source=folder:pictures", "data.root=nowhere"])
    Job(Path("job"), settings).write()
    assert read_job(Path("job")).settings == settings
    monkeypatch.chdir(tmp_path)
    data = read_job(Path("project/job")).settings.config.data
    assert (data.source, data.root) == (f"folder:{tmp_path / 'project' / 'pictures'}", "nowhere")
