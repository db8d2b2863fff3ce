"""A network of one's own from the command line: trained, stopped, resumed bit for bit; and its file, once it has
changed, is not run by anything that the user did not name it to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from lowmem.cli.main import main
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import PreflightError, UsageError
from lowmem.lifecycle import fork_run, resume_training, run_training
from lowmem.lifecycle.verify import verify
from lowmem.runs.view import list_runs, read_run
from lowmem.runs.weights import read_weights
from tests.conftest import assert_same_tensors, exact_rows
from tests.tiny import TINY, Heard

Command = Callable[..., CompletedProcess[str]]
# Dropout: what a step draws is a function of its place, or a resumed run would be another.
NET = """
from torch import nn
from layers import act

class Net(nn.Module):
    def __init__(self, num_classes=10, width=4, dropout=0.25):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), act())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.last = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.last(self.head(self.body(x)))
"""
LAYERS = "from torch import nn\n\ndef act():\n    return nn.ReLU(inplace=True)\n"
SETS = [f"{key}={value}" for key, value in TINY.items() if not key.startswith("model.")]
STOPPED = ("train.max_steps=7", "checkpoint.every_steps=4", "checkpoint.keep=4")


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "my_net.py").write_text(NET)
    return f"{tmp_path / 'my_net.py'}:Net"


def _settings(spec: str, *sets: str, **args: object) -> Settings:
    return gather(flags={"model.spec": spec, "model.args": {"width": 6, **args}}, sets=[*SETS, *sets])


def _tells_when_run(file: Path) -> Path:
    """Changes the file such that the returned one is there when it has been run."""
    told = file.with_name("ran")
    file.write_text(f"open({str(told)!r}, 'w')\n{file.read_text()}")
    return told


def test_it_is_trained_from_the_command_line(spec: str, tmp_path: Path, lowmem_command: Command) -> None:
    sets = [word for text in SETS for word in ("--set", text)]
    done = lowmem_command("train", "--model", "my_net.py:Net", "--model-args", "width=6", *sets)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "my_net-Net"
    assert "my_net.py:Net (width=6) on shapes" in done.stdout + done.stderr
    config = read_run(run).config.model
    assert (config.spec, config.args) == (spec, {"width": 6})
    assert set(config.sha256) == {"layers.py", "my_net.py"}
    info = read_weights(run / "weights" / "last.safetensors")[1]
    assert (info.spec, info.args, info.arch) == ("my_net.py:Net", {"width": 6}, None)
    assert [list_runs(tmp_path / "runs")[0].to_json()[name] for name in ("spec", "arch")] == [spec, None]
    assert verify(run).finished
    report = lowmem_command("report", str(run))
    assert "my_net-Net" in report.stdout
    again = run_training(gather(config_file=run / "config.yaml"), tmp_path / "again", Heard())
    assert_same_tensors(run / "weights/last.safetensors", again.path / "weights/last.safetensors")


@pytest.mark.parametrize("planned", [False, True])
def test_it_is_stopped_and_resumed_bit_for_bit(spec: str, tmp_path: Path, planned: bool) -> None:
    budget = ("memory.tensors=64M",) if planned else ()
    whole = run_training(_settings(spec, *budget), tmp_path / "whole", Heard()).path
    run = run_training(_settings(spec, *STOPPED, *budget), tmp_path / "run", Heard()).path
    assert (run / "plan.json").exists() == planned
    assert verify(run).can_resume
    assert resume_training(run, {"train.max_steps": None}, Heard()).finished
    assert exact_rows(run) == exact_rows(whole)
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-00000009/{name}.safetensors"
        assert_same_tensors(whole / file, run / file)


@pytest.mark.parametrize("name", ["my_net.py", "layers.py"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_changed_file_is_refused_and_runs_nothing(
    spec: str, tmp_path: Path, name: str, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_training(_settings(spec, *STOPPED), tmp_path / "run", Heard()).path
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    told = _tells_when_run(tmp_path / name)
    if gone:
        (tmp_path / name).unlink()
    out = str(tmp_path / "fork")
    for words in (
        ("resume", str(run)),
        ("verify", str(run)),
        ("fork", str(run), "--at", "last", "--set", "optim.lr=0.05", "--out", out),
        ("train", "--config", str(run / "config.yaml"), "--out", out),
    ):
        with pytest.raises(SystemExit) as left:
            main(list(words))
        said = capsys.readouterr().err.splitlines()
        assert left.value.code == 3, words
        assert str(tmp_path / name) in said[-1]
        assert "lowmem fork" in said[-1]
    for look in (["ls", str(tmp_path)], ["report", str(run), "--out", str(tmp_path / "report")]):
        with pytest.raises(SystemExit) as left:  # what only reads needs no network
            main(look)
        assert not left.value.code
    assert not told.exists()
    assert not Path(out).exists()
    assert {path: path.read_bytes() for path in before} == before


def test_a_fork_goes_on_in_a_new_file(spec: str, tmp_path: Path) -> None:
    run = run_training(_settings(spec), tmp_path / "run", Heard()).path
    shutil.move(tmp_path / "my_net.py", tmp_path / "other.py")
    told, heard = _tells_when_run(tmp_path / "other.py"), Heard()
    changes = {"model.spec": f"{tmp_path / 'other.py'}:Net", "model.args": {"width": 6, "dropout": 0.0}}
    with pytest.raises(
        UsageError, match=r"cannot take the weights .*body.0.weight is \[6, .* it is \[4, .*same tensors"
    ):
        fork_run(run, at=2, changes={"model.spec": changes["model.spec"]}, out=tmp_path / "fork")
    forked = fork_run(run, at=2, changes=changes, out=tmp_path / "fork", observer=heard)
    assert told.exists()
    assert forked.finished
    assert exact_rows(forked.path)[:2] == exact_rows(run)[:2]
    assert "model.sha256: the network's files are other ones: my_net.py, other.py" in heard.notes
    assert set(read_run(forked.path).config.model.sha256) == {"other.py", "layers.py"}
    assert verify(forked.path).can_resume


def test_a_fork_names_the_same_file_after_it_was_changed(spec: str, tmp_path: Path) -> None:
    run = run_training(_settings(spec), tmp_path / "run", Heard()).path
    (tmp_path / "my_net.py").write_text(NET.replace("dropout=0.25", "dropout=0.5"))
    changes: dict[str, object] = {"model.spec": spec, "model.args": {"width": 6}}
    assert fork_run(run, at=2, changes=changes, out=tmp_path / "fork").finished
    with pytest.raises(PreflightError, match="has changed since"):
        fork_run(run, at=2, changes={"optim.lr": 0.05}, out=tmp_path / "other")
    with pytest.raises(UsageError, match="is recorded, and cannot be set"):
        fork_run(tmp_path / "fork", at=2, changes={"model.sha256": {"my_net.py": "0"}}, out=tmp_path / "other")


def test_a_hash_that_was_taken_out_does_not_help(spec: str, tmp_path: Path) -> None:
    run = run_training(_settings(spec, *STOPPED), tmp_path / "run", Heard()).path
    told = _tells_when_run(tmp_path / "my_net.py")
    text = (run / "config.yaml").read_text().splitlines(keepends=True)
    (run / "config.yaml").write_text("".join(line for line in text if "sha256" not in line))
    with pytest.raises((PreflightError, UsageError)):
        resume_training(run, {"train.max_steps": None}, Heard())
    with pytest.raises(PreflightError):
        verify(run)
    assert not told.exists()


def test_what_cannot_be_trained_leaves_nothing_behind(spec: str, tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(NET.replace("Conv2d(3,", "Conv2d(1,"))
    for budget in ((), ("memory.tensors=64M",)):
        with pytest.raises(PreflightError, match="takes pictures of 1 channel, and these have 3"):
            run_training(_settings(spec, *budget), tmp_path / "run", Heard())
    assert not (tmp_path / "run").exists()


def test_it_is_planned_and_tried_in_other_processes(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured and what is tried is made there from the recipe."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = ("memory.tensors=64M", "memory.confirm=always", "memory.calibrate=always", "train.epochs=1")
    run = run_training(_settings(spec, *sets), tmp_path / "run", Heard()).path
    (event,) = (one for one in read_run(run).events if one.kind == "confirmed")
    trials = event.detail["trials"]
    assert isinstance(trials, list)
    assert [one["refused_because"] for one in trials] == [None]
