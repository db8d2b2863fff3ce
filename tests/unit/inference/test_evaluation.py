"""`lowmem evaluate`: the figures that training wrote, to the last digit, and each picture's own; other pictures of the
same classes; a run is left as it was."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowmem.cli.main import _run
from lowmem.config.settings import gather
from lowmem.data import load
from lowmem.inference.execution import evaluation_parts
from lowmem.lifecycle import run_training
from lowmem.runs.view import read_run
from tests.tiny import Heard, copy_run, sets, tiny

ALL = {"evaluation.json", "predictions.csv", "confusion.png", "worst.png"}
DATA = ("data.train_subset=100", "data.test_subset=50")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs; its test pictures take three batches, and the weights of the best epoch are not the last."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    run_training(tiny(*DATA, "train.precision=amp", "train.memory_format=channels-last"), path, Heard())
    return path


def evaluated(*words: str | Path, code: int = 0) -> list[dict[str, Any]]:
    """What is written, of each run that is named first; of `--out` instead where it is given."""
    assert _run(["evaluate", *map(str, words)]) == code
    folders = [words[words.index("--out") + 1]] if "--out" in words else [Path(words[0]) / "evaluate"]
    return [json.loads((Path(folder) / "evaluation.json").read_text()) for folder in folders]


def states(run: Path) -> dict[str, str]:
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "evaluate")
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def predictions(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_figures_are_those_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows = states(run), read_run(run).epochs
    file = run / "weights" / "best.safetensors"
    for weights, row in (("last", rows[-1]), (file, min(rows, key=lambda row: row.test_error_pct or 0.0))):
        (found,) = evaluated(run, "--weights", weights)
        assert (found["loss"], found["error_pct"], found["epoch"]) == (row.test_loss, row.test_error_pct, row.epoch)
        assert found["as_in_metrics_csv"] is True
        assert f"{Path(weights).stem}, epoch {row.epoch}" in capsys.readouterr().out
    assert states(run) == before
    assert {path.name for path in (run / "evaluate").iterdir()} == ALL


def test_each_picture_adds_up_to_them(run: Path) -> None:
    (found,) = evaluated(run)
    rows = predictions(run / "evaluate")
    assert [row["picture"] for row in rows] == [str(number) for number in range(50)]
    assert sum(row["label"] != row["prediction"] for row in rows) * 2 == found["error_pct"]
    assert sum(float(row["loss"]) for row in rows) / 50 == pytest.approx(found["loss"], rel=1e-6)
    for row in rows:  # the loss is of the class, the probability of what was predicted
        if row["label"] == row["prediction"]:
            assert float(row["loss"]) == pytest.approx(-np.log(float(row["probability"])), rel=1e-3, abs=1e-6)
    labels, taken = (Counter(row[name] for row in rows) for name in ("label", "prediction"))
    right = Counter(row["label"] for row in rows if row["label"] == row["prediction"])
    for one in found["classes"]:
        name = one["name"]
        assert one["count"] == labels[name] == 5
        assert one["recall"] == right[name] / labels[name]
        assert one["precision"] == (right[name] / taken[name] if taken[name] else None)
    assert found["top5_error_pct"] is None  # of ten classes


def test_a_plan_evaluates_its_micro_batches(tmp_path: Path) -> None:
    run_training(tiny(*DATA, "train.micro_batch=7", "train.epochs=1", "memory.tensors=20M"), tmp_path / "run", Heard())
    (found,) = evaluated(tmp_path / "run")
    assert found["batch"] == 7
    assert found["as_in_metrics_csv"] is True
    own = read_run(copy_run(tmp_path / "run", tmp_path / "several"))
    recorded = json.loads((own.path / "plan.json").read_text())
    (own.path / "plan.json").write_text(json.dumps(recorded | {"batch": 20, "shares": [20, 12]}))
    other = recorded | {"batch": 12, "micro_batch": 6, "accumulation": 2, "shares": [20, 12], "ladder": []}
    (own.path / "plan-1.json").write_text(json.dumps(other))
    assert evaluation_parts(own, own.config, 48) == [(0, 30, 7), (30, 48, 6)]


NARROW = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(4, num_classes))

    def forward(self, x):
        if not self.training and len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return super().forward(x)
"""


def test_memory_that_runs_out_takes_fewer_pictures_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in training, and with its figures."""
    (tmp_path / "narrow.py").write_text(NARROW)
    own = [text for text in sets(*DATA, "train.epochs=1") if not text.startswith(("model.arch", "model.width"))]
    run_training(gather(sets=[*own, f"model.spec={tmp_path / 'narrow.py'}:Net"]), tmp_path / "run", Heard())
    (found,) = evaluated(tmp_path / "run")
    assert "evaluating 5 pictures at a time from here on" in capsys.readouterr().err
    assert (found["batch"], found["as_in_metrics_csv"]) == (5, True)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    assert _run(["predict", str(tmp_path / "run"), *[str(tmp_path / "a.png")] * 21, "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 22
    assert captured.err.count("pictures at a time") == 2  # 20, 10, 5; the second batch begins with 5


def test_other_pictures_of_the_same_classes(run: Path, tmp_path: Path) -> None:
    """The run's own test pictures from files: the same figures, whatever the order of the folders."""
    evaluated(run)
    own = predictions(run / "evaluate")
    pictures = load(tiny(*DATA).config.data, 0).test
    for number, row in enumerate(own):
        folder = tmp_path / "files" / row["label"]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = pictures.take(np.array([number])).images[0].permute(1, 2, 0).numpy()  # type: ignore[union-attr]
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = [run, "--data", f"folder:{tmp_path / 'files'}", "--out", tmp_path / "other"]
    (found,) = evaluated(*words)
    assert found["as_in_metrics_csv"] is None
    again = {Path(row["picture"]).stem: row for row in predictions(tmp_path / "other")}
    for number, row in enumerate(own):
        same = again[str(number)]
        assert (same["label"], same["prediction"]) == (row["label"], row["prediction"])
        assert float(same["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)
    (tmp_path / "test").mkdir()
    (tmp_path / "files").rename(tmp_path / "test" / "test")
    (held_out,) = evaluated(run, "--data", tmp_path / "test", "--out", tmp_path / "held out")
    assert held_out["count"] == 50


def test_pictures_of_other_classes_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    assert _run(["evaluate", str(run), "--data", f"folder:{tmp_path}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "has 2 classes (other ones: cat, dog), and the network" in last
    assert re.search(r"tells apart 10 classes \(other ones: \w+, \w+, \w+ and 7 more\): give", last)
    names = load(tiny(*DATA).config.data, 0).classes[:4]
    for name in names:
        (tmp_path / "some" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "some" / name / "0.png")
    assert _run(["evaluate", str(run), "--data", f"folder:{tmp_path / 'some'}"]) == 2
    assert "has 4 classes, and the network" in capsys.readouterr().err


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy_run(run, tmp_path / "other")
    assert _run(["evaluate", str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in (other / "evaluate").iterdir()} == ALL
    assert _run(["evaluate", str(run), str(other), "--out", str(tmp_path / "both")]) == 2
    assert "one run's results" in capsys.readouterr().err
    head = next(line for line in out.splitlines() if line.startswith("class"))
    assert head.split()[2:] == ["precision", "run", "recall", "run", "precision", "other", "recall", "other"]
    assert _run(["evaluate", str(other), "--weights", "last", "--json"]) == 0
    ((found),) = json.loads(capsys.readouterr().out)
    assert (found["run"], found["loss"]) == (str(other), read_run(run).epochs[-1].test_loss)


def test_runs_of_unlike_pictures_and_weights_of_another(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "fewer"
    run_training(tiny(*DATA[:1], "data.test_subset=30", "train.epochs=1"), fewer, Heard())
    assert _run(["evaluate", str(copy_run(run, tmp_path / "run")), str(fewer)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, *rows = lines[next(n for n, line in enumerate(lines) if line.startswith("class")) :][:11]
    assert head.split()[:5] == ["class", "pictures", "run", "pictures", "fewer"]
    counts = [[int(count) for count in row.split()[1:3]] for row in rows]
    assert [sum(column) for column in zip(*counts, strict=True)] == [50, 30]
    file = run / "weights" / "best.safetensors"
    assert _run(["evaluate", str(fewer), "--weights", str(file)]) == 0
    assert f"fewer  {file}, epoch" in capsys.readouterr().out  # and not `best`, which is its own


def test_what_differs_from_training_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = copy_run(run, tmp_path / "changed")
    rows = (changed / "metrics.csv").read_text().replace(str(read_run(run).epochs[-1].test_loss), "1.25")
    (changed / "metrics.csv").write_text(rows)
    (found,) = evaluated(changed, "--weights", "last")
    assert found["as_in_metrics_csv"] is False
    assert "in metrics.csv 1.25 and" in capsys.readouterr().out


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["evaluate", str(run / "weights" / "best.safetensors")]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert _run(["evaluate", str(run), "--out", str(tmp_path / "file" / "x")]) == 3
    assert "is no folder" in capsys.readouterr().err
