"""The run folder: made once, locked, appended to, cut back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowmem.core.errors import UsageError
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE, csv_line
from lowmem.runs.store import NullFolder, RunFolder
from lowmem.runs.weights import WeightsInfo


def _row(epoch: int, step: int) -> dict[str, object]:
    return {**dict.fromkeys(EPOCH_TABLE.names), "epoch": epoch, "step": step, "train_loss": 0.1 + 0.2}


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "seed: 0\n", {"torch": "x"}) as run:
        run.event("start")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UsageError, match=r"lowmem resume .*lowmem fork .*--out"):
        RunFolder.create(tmp_path / "run", "seed: 1\n", {})
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_somebody_elses_folder_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        RunFolder.create(tmp_path / "full", "", {})
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", "", {}).close()


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}), pytest.raises(UsageError, match="is being written by process"):
        RunFolder.open(tmp_path / "run")
    RunFolder.open(tmp_path / "run").close()


def test_rows_that_another_run_has_lost_are_no_damage_of_the_one_that_takes_over_the_rest(tmp_path: Path) -> None:
    """The folder of a fork that dies before its first checkpoint can be taken again."""
    with RunFolder.create(tmp_path / "old", "", {}) as old, RunFolder.create(tmp_path / "run", "", {}) as run:
        for epoch in (1, 3):
            old.append_metrics(_row(epoch, 10 * epoch))
        run.copy_rows(old.path, epoch=3, step=30)
        assert run.metrics_file.read_text() == old.metrics_file.read_text()
        assert not list(run.path.glob("damaged-*"))


def test_rows_are_cut_back_and_half_lines_dropped(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        for epoch in (1, 2, 3):
            run.append_metrics(_row(epoch, 10 * epoch))
        run.append_steps([{"step": step, "epoch": 1, "lr": 0.1, "loss": 2.3} for step in (10, 20, 30)])
        whole = run.metrics_file.read_text().splitlines()
        with open(run.metrics_file, "a") as file:
            file.write("4,40,0.1")
        run.cut_back(epoch=2, step=20)
        assert run.metrics_file.read_text().splitlines() == whole[:3]
        assert [line.split(",")[0] for line in run.steps_file.read_text().splitlines()] == ["step", "10", "20"]
        run.cut_back(epoch=0, step=0)
        assert run.metrics_file.read_text().splitlines() == [",".join(EPOCH_TABLE.names)]


def test_floats_keep_every_digit_and_unknown_is_empty() -> None:
    line = csv_line(EPOCH_TABLE.names, _row(1, 10)).split(",")
    assert float(line[EPOCH_TABLE.names.index("train_loss")]) == 0.1 + 0.2
    assert line[EPOCH_TABLE.names.index("peak_allocated_bytes")] == ""
    with pytest.raises(KeyError, match="no such column"):
        csv_line(STEP_TABLE.names, {"los": 1})


def test_events_and_weights(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        run.event("start", step=0)
        run.event("signal", signal="SIGINT")
        events = [json.loads(line) for line in run.events_file.read_text().splitlines()]
        assert [event["event"] for event in events] == ["start", "signal"]
        run.save_weights("best", {"w": torch.ones(2)}, WeightsInfo(chosen_on="val"))
        with safe_open(run.path / "weights/best.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["lowmem"]) == {"chosen_on": "val"}
            assert torch.equal(file.get_tensor("w"), torch.ones(2))


def test_a_process_that_does_not_write(tmp_path: Path) -> None:
    """The same methods, and nothing happens: not even the folder is there."""
    with NullFolder(tmp_path / "nowhere") as run:
        run.event("start")
        run.append_metrics(_row(1, 10))
        run.write_plan({"budget": 1})
        run.save_weights("best", {}, WeightsInfo())
        assert run.cut_back(epoch=1, step=10) == []
        assert run.begin_gradients(["conv1.weight"], step=0) is None
        run.flush()
        run.tidy(keep=2)
        assert (run.rows_waiting, run.taken_over) == (0, None)
        run.discard()
    assert not (tmp_path / "nowhere").exists()
