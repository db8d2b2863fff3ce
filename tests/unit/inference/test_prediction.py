"""`lowmem predict` on photographs: what evaluation says of the same files, in every format; broken files are told and
the rest is done; lists, folders, and the network of a file."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from lowmem.cli.main import _run
from lowmem.cli.show_inference import _rows_as
from lowmem.config.settings import gather
from lowmem.inference import load_run
from lowmem.inference.prediction import predict
from lowmem.lifecycle import run_training
from tests import pictures
from tests.tiny import Heard, sets, tiny

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.append(nn.Flatten()).append(nn.Linear(width, num_classes))
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with twenty photographs of airplanes and of automobiles: those that come first in the archive."""
    folder = tmp_path_factory.mktemp("photographs") / "classes"
    for _, kind, name, data in pictures.photographs({"train": 20}, ("airplane", "automobile")):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def run(photographs: Path) -> Path:
    path = photographs.parent / "run"
    settings = tiny(
        f"data.source=folder:{photographs}", f"data.cache={path.parent / 'cache'}", "data.test_split=12",
        "data.train_subset=null", "data.test_subset=null", "train.epochs=2", "train.batch=7",
    )  # fmt: skip
    run_training(settings, path, Heard())
    return path


def evaluated(run: Path) -> dict[str, dict[str, str]]:
    """The rows of predictions.csv by picture."""
    assert _run(["evaluate", str(run)]) == 0
    with open(run / "evaluate" / "predictions.csv", newline="", encoding="utf-8") as file:
        return {row["picture"]: row for row in csv.DictReader(file)}


def told(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert _run(["predict", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_files_are_what_evaluation_takes_them_for(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = evaluated(run)
    assert len(expected) == 12
    assert {Path(name).parent.name for name in expected} == {"airplane", "automobile"}
    assert all(Path(name).parent.name == row["label"] for name, row in expected.items())
    out, err = told(capsys, run, *expected, "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["picture"] for row in rows] == list(expected)  # in order, over two batches
    for row in rows:
        known = expected[row["picture"]]
        assert row["class"] == row["top"][0]["class"] == known["prediction"]
        assert row["probability"] == pytest.approx(float(known["probability"]), rel=1e-5)
        assert sum(one["probability"] for one in row["top"]) == pytest.approx(1.0, abs=1e-6)
    assert not err
    file = run / "weights" / "best.safetensors"
    for words in ([run, photographs], [file, photographs], [run, photographs, "--weights", file]):
        table, _ = told(capsys, *words, "--format", "csv", "--top", "1")
        found = {row["picture"]: row for row in csv.DictReader(io.StringIO(table))}
        assert len(found) == 40
        assert {name: found[name]["class"] for name in expected} == {
            name: row["prediction"] for name, row in expected.items()
        }


def test_broken_files_are_told_and_the_rest_is_done(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "deep"
    shutil.copytree(photographs / "airplane", folder)
    whole = sorted(path.name for path in folder.iterdir())
    data = (folder / whole[3]).read_bytes()
    (folder / whole[3]).write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "words.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("passed over")
    (folder / ".hidden.jpg").write_text("passed over")
    (folder / "pipe.png").touch() if os.name == "nt" else os.mkfifo(folder / "pipe.png")
    out, err = told(capsys, run, tmp_path / "in", tmp_path / "not there.jpg", code=3)
    lines = out.splitlines()
    assert lines[0].split() == ["class", "or", "picture"]
    assert [Path(line.split("  ")[-1]).name for line in lines[1:]] == [name for name in whole if name != whole[3]]
    pipe = "empty" if os.name == "nt" else "no regular file"
    for name, why in (
        (whole[3], "damaged"), ("empty.png", "empty"), ("words.jpg", "no picture"), ("pipe.png", pipe),
        ("not there.jpg", "No such file"),
    ):  # fmt: skip
        assert any(f"{name}: {why}" in line for line in err.splitlines()), name
    assert "5 of 24 pictures cannot be used" in err
    (tmp_path / "nothing").mkdir()
    out, err = told(capsys, run, tmp_path / "nothing", code=2)
    assert (out, "there is no picture in" in err) == ("", True)


def test_a_list_on_standard_input(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(map(str, (photographs / "airplane").iterdir()))[:9]
    text = "".join(f"{name}\r\n" for name in names[:8]) + f"\n{names[8]}"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(text))))
    out, _ = told(capsys, run, "-", "--format", "csv")
    assert [row["picture"] for row in csv.DictReader(io.StringIO(out))] == names


def test_no_more_is_read_than_two_batches_ahead(run: Path, photographs: Path) -> None:
    asked: list[str] = []

    def files() -> object:
        for path in sorted(photographs.rglob("*.jpg")):
            asked.append(str(path))
            yield str(path), ""

    heard = Heard()
    batches = predict(load_run(run), run, files(), 1, heard, heard.phase, 40)  # type: ignore[arg-type]
    assert len(next(batches)) == 7
    assert len(asked) <= 15
    assert sum(map(len, batches)) == 33
    assert [(done, total) for _, done, total in heard.phases][-1] == (40, 40)


def test_the_network_of_a_file_on_larger_pictures(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 64 pixels on pictures are stored with a border, of which evaluation sees the middle."""
    (tmp_path / "my_net.py").write_text(NET)
    changes = (
        f"model.spec={tmp_path / 'my_net.py'}:Net", f"data.source=folder:{photographs}", "data.image_size=64",
        f"data.cache={tmp_path / 'cache'}", "data.test_split=6", "data.train_subset=null", "data.test_subset=null",
        "train.epochs=1",
    )  # fmt: skip
    own = [text for text in sets(*changes) if not text.startswith(("model.arch", "model.width"))]
    run_training(gather(sets=own), tmp_path / "run", Heard())
    expected = evaluated(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "evaluate" / "evaluation.json").read_text())["as_in_metrics_csv"] is True
    out, _ = told(capsys, tmp_path / "run", *expected, "--format", "csv")
    for row in csv.DictReader(io.StringIO(out)):
        assert row["class"] == expected[row["picture"]]["prediction"]
        assert float(row["probability"]) == pytest.approx(float(expected[row["picture"]]["probability"]), rel=1e-5)


def test_classes_of_short_names_have_a_whole_head(capsys: pytest.CaptureFixture[str]) -> None:
    _rows_as("table", ("cat", "dog"), 2)("a.png", [("cat", 0.75), ("dog", 0.25)])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "or", "picture"]
    assert head.index("picture") == row.index("a.png")


def test_an_unknown_format_is_refused(run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = told(capsys, run, photographs, "--format", "xml", code=2)
    assert "table, csv, jsonl" in err
