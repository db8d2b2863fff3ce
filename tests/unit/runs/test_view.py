"""Reading a run folder: whole, half written, damaged, empty."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from lowmem.config.schema import Config, flatten
from lowmem.config.settings import from_yaml
from lowmem.core.errors import UsageError
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE
from lowmem.runs.view import RunView, read_run, summarize
from lowmem.runs.watch import Live
from lowmem.runs.weights import WeightsInfo


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four epochs, two of them done."""
    folder = tmp_path / "res20"
    folder.mkdir()
    config = Config.model_validate({"train": {"epochs": 4}}).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config) + "# lr: flag\n", encoding="utf-8")
    epochs = [
        ",".join(EPOCH_TABLE.names[:14]),  # of a version that knew no more
        "1,10,0.1,2.0,70,1.9,60.5,500,1000,,,3.5,,",
        "2,20,0.1,nan,65,1.5,55,510,1000,,,7,,",
    ]
    (folder / "metrics.csv").write_text("\n".join(epochs) + "\n", encoding="utf-8")
    (folder / "steps.csv").write_text(STEP_TABLE.header + "\n10,1,0.1,2.1\n20,2,0.1,1.8\n", encoding="utf-8")
    events = [{"time": "2026-11-01T10:00:00", "event": "start"}, {"time": 5.0, "event": "resume", "step": 10}]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    return folder


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_reads_typed_rows(run: Path) -> None:
    history = read_run(run)
    assert history.name == "res20"
    assert history.config.train.epochs == 4
    first, second = history.epochs
    assert (first.epoch, first.step, first.test_error_pct) == (1, 10, 60.5)
    assert first.peak_allocated_bytes == 1000
    assert isinstance(first.peak_allocated_bytes, int)
    assert first.peak_reserved_bytes is None  # an empty field is unknown, never zero
    assert first.val_error_pct is None
    assert second.train_loss is not None
    assert math.isnan(second.train_loss)
    assert [row.loss for row in history.steps] == [2.1, 1.8]
    assert [event.kind for event in history.events] == ["start", "resume"]
    assert history.events[1].detail == {"step": 10}
    assert (history.times_resumed, history.state, history.notes) == (1, "ended", [])
    assert history.classes == 10  # known of cifar10


def test_windows_line_ends(run: Path) -> None:
    whole = read_run(run)
    for name in ("metrics.csv", "steps.csv", "events.jsonl"):
        (run / name).write_bytes((run / name).read_bytes().replace(b"\n", b"\r\n"))
    assert read_run(run).steps == whole.steps
    assert read_run(run).events == whole.events


@pytest.mark.parametrize("torn", ["3", "3,30,0.1,1.0,50,1", "3,30,0.1,1.0,50,1.2,40,500,1000,,,9,,", "\0\0\0"])
def test_half_written_last_line_is_left_out(run: Path, torn: str) -> None:
    append(run / "metrics.csv", torn)
    history = read_run(run)
    assert [row.epoch for row in history.epochs] == [1, 2]
    assert history.notes == ["the last line of metrics.csv was half written and is left out"]


def test_half_written_header(run: Path) -> None:
    (run / "metrics.csv").write_text("epoch,st", encoding="utf-8")
    assert read_run(run).epochs == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("3,30,0.1,x,50,1.2,40,500,,,,9,,", "line 4: train_loss is 'x', which is no number"),
        ("3,3.5,0.1,1,50,1.2,40,500,,,,9,,", "line 4: step is '3.5'"),
        ("3,,0.1,1,50,1.2,40,500,,,,9,,", "line 4: step is empty"),
        ("3,30", "line 4: 2 fields where the header has 14"),
        ("", "line 4: 0 fields"),
        ("2,30,0.1,1,50,1.2,40,500,,,,9,,", "line 4: epoch 2 follows epoch 2"),
    ],
)
def test_damage_names_file_and_line(run: Path, line: str, said: str) -> None:
    append(run / "metrics.csv", line + "\n")
    with pytest.raises(UsageError, match=r"metrics\.csv") as caught:
        read_run(run)
    assert said in str(caught.value)


def test_bytes_that_are_no_text(run: Path) -> None:
    (run / "steps.csv").write_bytes((run / "steps.csv").read_bytes() + b"30,2,\xff\xfe,1\n")
    with pytest.raises(UsageError, match=r"steps.csv line 4: lr"):
        read_run(run)


@pytest.mark.parametrize(
    ("header", "said"),
    [("epoch,step,speed", "unknown column 'speed'"), ("epoch,lr", "no column 'step'"), ("epoch,step,lr,lr", "doubled")],
)
def test_wrong_header(run: Path, header: str, said: str) -> None:
    (run / "metrics.csv").write_text(header + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=f"metrics.csv line 1: {said}"):
        read_run(run)


def test_files_that_are_not_there_yet(run: Path) -> None:
    for name in ("metrics.csv", "steps.csv", "events.jsonl"):
        (run / name).unlink()
    history = read_run(run)
    assert (history.epochs, history.steps, history.events, dict(history.env)) == ((), (), (), {})
    assert (history.last, history.epochs_done, history.best, history.state) == (None, 0, None, "ended")


def test_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no run folder"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        read_run(run / "metrics.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", "config.yaml, line 2 is no valid YAML"),
        ("just words", "holds no settings"),
        ("optim: {rate: 1}", "optim.rate"),
        ("optim: {lr: 0.1}", "lacks seed, which every run records: it was cut off"),
    ],
)
def test_damaged_settings(run: Path, text: str, said: str) -> None:
    (run / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_run(run)
    assert said in str(caught.value)
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("  lr: 0.1\n", "  lr: -1\n", "optim.lr = -1"), ("arch: res20", "arch: vgg", "unknown architecture 'vgg'")],
)
def test_settings_that_cannot_be(run: Path, old: str, new: str, said: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_run(run)
    assert said in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_settings_under_dotted_names(run: Path) -> None:
    """What a resume takes, every other reader takes too."""
    flat = flatten(from_yaml(run / "config.yaml").config)
    (run / "config.yaml").write_text(yaml.safe_dump(flat), encoding="utf-8")
    assert read_run(run).config.train.epochs == 4
    assert summarize(run).epoch == 2
    assert Live(run).look().epochs == 4


def test_states(run: Path) -> None:
    append(run / "events.jsonl", '{"event": "done"}\n')
    assert read_run(run).state == "stopped"
    append(run / "events.jsonl", '{"event": "resume"}\n')
    assert read_run(run).state == "ended"
    (run / "run.owner.json").write_text("{}")
    assert read_run(run).state == "died"
    append(run / "events.jsonl", '{"event": "stop", "reason": "train.max_steps", "step": 20}\n')
    assert read_run(run).state == "stopped"
    append(run / "events.jsonl", '{"event": "resume"}\n{"event": "signal", "signal": "SIGINT"}\n')
    assert read_run(run).state == "interrupted"
    append(run / "metrics.csv", "3,30,,,,,,,,,,,,\n4,40,,,,,,,,,,,,\n")
    assert read_run(run).state == "finished"  # even if it was killed before it could say so


def test_damaged_events_and_env_are_noted(run: Path) -> None:
    append(run / "events.jsonl", '{"event": "wa{"event": "resume"}\n{"event": "resume"}\n5\n{"event": "do')
    (run / "env.json").write_text("{", encoding="utf-8")
    history = read_run(run)
    assert history.times_resumed == 2
    assert history.events[-1].kind == "resume"
    said = " ".join(history.notes)
    for words in ("events.jsonl line 3", "events.jsonl line 5", "last line of events.jsonl was half", "env.json"):
        assert words in said
    assert Live(run).look().events == history.events


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_events_that_cannot_be_read_at_all(run: Path) -> None:
    (run / "events.jsonl").unlink()
    os.mkfifo(run / "events.jsonl")
    view = RunView(run)
    assert (view.events, len(view.notes)) == ((), 1)


def test_best_weights(run: Path) -> None:
    (run / "weights").mkdir()
    path = run / "weights" / "best.safetensors"
    metadata = {"epoch": "2", "step": "20", "error_pct": "7.46", "chosen_on": "val"}
    save_file({"linear.bias": np.zeros(7, np.float32)}, path, metadata)
    history = read_run(run)
    assert history.best is not None
    assert (history.best.epoch, history.best.error_pct, history.best.chosen_on) == (2, 7.46, "val")
    assert history.classes == 7  # the weights know better than the data set's name
    save_file({"linear.bias": np.zeros(7, np.float32)}, path)
    best = read_run(run).best
    assert best is not None
    assert (best.epoch, best.error_pct, best.chosen_on) == (None, None, None)
    says = WeightsInfo(spec="torchvision:resnet18", classes=("cat", "dog", "ship"))
    save_file({"fc.bias": np.zeros(3, np.float32)}, path, says.to_metadata())
    assert read_run(run).classes == 3  # whatever the network calls its last layer
    path.write_bytes(b"garbage")
    history = read_run(run)
    assert history.best is None
    assert "weights/best.safetensors cannot be read" in history.notes


def test_needs_no_torch() -> None:
    code = "import sys, lowmem.report, lowmem.runs.view; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
