"""TensorBoard while a run is trained: the same rows, over a kill and a resume; and never a reason to stop."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from lowmem.cli.main import _run
from lowmem.config.settings import from_yaml, gather, to_yaml
from lowmem.lifecycle import resume_training
from lowmem.runs.event_files import EventFiles, read_points
from lowmem.runs.store import RunFolder
from lowmem.train.metrics import exporting
from tests.tiny import Heard, make_run
from tests.unit.runs.test_event_files import same, shown

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")


def test_trained_killed_and_resumed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "train.tensorboard=true")
    assert same(shown(run / "tensorboard"), run)
    # As if it had been killed before its last checkpoint: the rows of step 7 are repeated.
    shutil.rmtree(run / "checkpoints" / "step-00000007")
    recorded = from_yaml(run / "config.yaml")
    assert recorded.config.train.tensorboard
    resume_training(run, recorded.replace({"train.max_steps": None}, "test"), Heard())
    curves = shown(run / "tensorboard")
    assert same(curves, run)
    assert [step for step, _ in curves["loss/step"]] == list(range(1, 10))


def test_switched_on_by_a_resume(tmp_path: Path) -> None:
    """With what came before it."""
    run = make_run(tmp_path / "run")
    assert not (run / "tensorboard").exists()
    assert _run(["resume", str(run), "--tensorboard", "--set", "train.max_steps=8"]) == 0
    assert same(shown(run / "tensorboard"), run)
    assert _run(["verify", str(run)]) == 0


def test_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is made, not at hour three."""
    run = make_run(tmp_path / "run")
    rows = (run / "steps.csv").read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    new = tmp_path / "new"
    assert _run(["train", "--data", "shapes", "--width", "2", "--tensorboard", "--out", str(new)]) == 3
    assert not new.exists()
    assert _run(["resume", str(run), "--tensorboard"]) == 3
    assert (run / "steps.csv").read_bytes() == rows
    assert capsys.readouterr().err.count('pip install "lowmem[tensorboard]"') == 2


def test_what_goes_wrong_is_said_once_and_made_up_for(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", to_yaml(gather()), {}) as folder:
        (folder.path / "tensorboard").write_text("in the way", encoding="utf-8")
        heard = Heard()
        with exporting(EventFiles(folder.path), heard.warning) as export:
            for step in (1, 2, 3):
                folder.append_steps([{"step": step, "epoch": 1, "lr": 0.1, "loss": 2.0}])
                export()
            assert len(heard.warnings) == 1
            assert "training goes on" in heard.warnings[0]
            (folder.path / "tensorboard").unlink()
            export()
        assert [step for tag, step, _ in read_points(folder.path / "tensorboard") if tag == "lr"] == [1, 2, 3]
        assert len(heard.warnings) == 1


def test_a_report_writes_them_beside_itself(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b c")]
    out = tmp_path / "report"
    assert _run(["report", *map(str, runs), "--tensorboard", "--out", str(out)]) == 0
    for run, name in zip(runs, ("a", "b-c"), strict=True):
        assert same(shown(out / "tensorboard" / name), run)
        assert not (run / "tensorboard").exists()
