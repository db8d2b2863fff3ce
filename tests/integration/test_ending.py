"""How a run ends, in words, and how it goes on: what has come of it, on which pictures, where that is, what to type."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowmem.core.errors import DataError, ForeignCheckpoint
from lowmem.lifecycle import extend_run, fork_run, recorded_settings, resume_training, run_training
from lowmem.runs.view import RunView
from lowmem.runs.watch import Live
from tests.tiny import Heard, tiny


def test_a_finished_run_says_what_has_come_of_it(tmp_path: Path) -> None:
    run, heard = tmp_path / "run", Heard()
    outcome = run_training(tiny("data.val_split=10", "train.epochs=2"), run, heard)
    rows, best = RunView(run).epochs, outcome.state.best
    assert best is not None
    words, then = heard.notes[-2:]
    assert words.startswith(f"{run} is finished: 2 epochs in 0:")
    assert (
        f"error on 10 held-back pictures of shapes {rows[-1].val_error_pct:.2f} % at the end, best "
        f"{best.error_pct:.2f} % in epoch {best.epoch}; on the 20 test pictures of shapes {rows[-1].test_error_pct:.2f}"
    ) in words
    for name in ("best", "last"):
        assert str(run / f"weights/{name}.safetensors") in words
        assert (run / f"weights/{name}.safetensors").is_file()
    assert f"`lowmem report {run}`" in then
    assert f"`lowmem resume {run} --epochs N`" in then
    # There is nothing left to do, which is no reason to say nothing.
    again = Heard()
    assert resume_training(run, observer=again).finished
    assert again.notes[-2:] == [words, then]
    longer, told = tmp_path / "longer", Heard()
    extend_run(run, epochs=3, out=longer, observer=told)
    assert told.notes[-2].startswith(f"{longer} is finished: 3 epochs in ")


def test_a_limit_of_steps_is_no_dead_end(tmp_path: Path) -> None:
    run, heard = tmp_path / "run", Heard()
    run_training(tiny("train.max_steps=4", "train.log_every_steps=20"), run, heard)
    assert heard.notes[-2:] == [
        f"stopped after 4 steps as asked (train.max_steps = 4); {run} is saved at epoch 2, step 4 of 9",
        f"`lowmem resume {run} --set train.max_steps=null` goes on to the end, `lowmem resume {run} --set "
        "train.max_steps=N` to another step",
    ]
    live = Live(run).look()  # by no row of a step
    assert (live.state, live.step, live.epoch, live.step_in_epoch, live.end) == ("stopped", 4, 1, 1, 4)
    again = Heard()
    assert not resume_training(run, observer=again).finished
    assert again.notes[-2:] == heard.notes[-2:]
    told = Heard()
    assert not resume_training(run, {"train.max_steps": 7}, told).finished
    assert f"resuming {run} from step-00000004: epoch 2, step 4 (1 of its 3 done)" in told.notes
    assert resume_training(run, {"train.max_steps": None}, told).finished
    assert RunView(run).state == "finished"


def test_who_looks_on_knows_speed_and_memory_before_an_epoch_is_done(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(tiny("train.batch=4", "train.max_steps=9"), run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "progress"]
    assert [event["step"] for event in told] == [1, 2, 4, 8]  # ever less often
    live = Live(run).look()
    assert (live.rows, live.device_bytes) == ((), told[-1]["device_used_bytes"])
    assert live.images_per_second == told[-1]["images_per_second"] > 0


# -- from another folder, and after the pictures have moved ------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures and a run of two steps, begun there by their relative path."""
    for part, count in (("train", 6), ("test", 2)):
        for label in "ab":
            folder = tmp_path / "project" / "pictures" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                grey = np.full((32, 32, 3), 20 * number + ord(label), dtype=np.uint8)
                Image.fromarray(grey).save(folder / f"{number}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    subsets = ("data.train_subset=null", "data.test_subset=null", "data.cache=cache")
    run_training(tiny("data.source=folder:pictures", "train.batch=6", "train.max_steps=1", *subsets), Path("run"))
    return tmp_path / "project"


def test_a_run_goes_on_from_another_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent / "elsewhere")
    assert resume_training(project / "run", {"train.max_steps": 2}).state.step == 2
    assert "source: folder:pictures " in (project / "run/config.yaml").read_text()  # as it was typed
    forked = fork_run(project / "run", at="last", changes={"optim.lr": 0.02, "train.max_steps": 3}, out="fork").path
    assert recorded_settings(forked).config.data.source == f"folder:{project / 'pictures'}"
    assert not os.path.exists("cache")
    # Where all of it has moved to, too.
    moved = Path(shutil.move(project, project.with_name("moved")))
    assert resume_training(moved / "run", {"train.max_steps": 3}).state.step == 3


def test_pictures_that_have_moved_are_asked_for_once(project: Path) -> None:
    moved = Path(shutil.move(project / "pictures", project / "photos"))
    with pytest.raises(DataError) as caught:
        resume_training(Path("run"), {"train.max_steps": 2})
    recorded = f"data.source is folder:pictures, which from here is {project / 'pictures'}"
    assert f"{recorded}: if the pictures are elsewhere, add `--data folder:PATH`" in str(caught.value)
    with pytest.raises(DataError, match=r"add `--set data.source=folder:PATH`"):
        fork_run(Path("run"), at="last", changes={"optim.lr": 0.02, "train.max_steps": 3})
    resume_training(Path("run"), {"train.max_steps": 2, "data.source": "folder:photos"})
    assert resume_training(Path("run"), {"train.max_steps": 3}).state.step == 3
    (moved / "train" / "a" / "0.png").unlink()
    with pytest.raises(ForeignCheckpoint, match=rf"other data than .*data.source is folder:{moved}: if"):
        resume_training(Path("run"), {"train.max_steps": 4})
