"""A run on photographs that a CSV file lists: checked, trained, gone on with from elsewhere, reported and evaluated."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from lowmem.cli.main import _run
from tests import pictures
from tests.conftest import assert_same_run
from tests.tiny import arguments

CLASSES = ("cat", "ship", "truck")
MOST = {"train": 10, "test": 4}
CHANGES = ("data.train_subset=null", "data.test_subset=null", "train.batch=10", "train.epochs=2")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one folder, by numbers; `list.csv` says of which class they are, in the order in which they came."""
    root, lines = tmp_path_factory.mktemp("photographs"), []
    (root / "in one place").mkdir()
    for part, kind, _, data in pictures.photographs(MOST, CLASSES):
        name = f"in one place/no {len(lines)}, a photo.jpg"
        (root / name).write_bytes(data)
        lines.append((name, kind, part))
    write(root / "list.csv", lines)
    return root


def write(file: Path, lines: list[tuple[str, str, str]]) -> None:
    with open(file, "w", encoding="utf-8-sig", newline="") as text:
        csv.writer(text).writerows([("path", "label", "split"), *lines])


def lines_of(file: Path) -> list[tuple[str, str, str]]:
    with open(file, encoding="utf-8-sig", newline="") as text:
        return [(path, label, part) for path, label, part in list(csv.reader(text))[1:]]


def test_it_is_trained_and_goes_on_with_what_was_moved(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photographs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    cache = f"data.cache={tmp_path / 'cache'}"
    words = [*arguments(*CHANGES, "data.source=csv:list.csv", cache)]
    assert _run(["train", *words, "--out", str(tmp_path / "whole")]) == 0
    assert _run(["train", *words, "--set", "train.max_steps=4", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    # Elsewhere, under other names, by another list.
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there" / "in one place").rename(tmp_path / "there" / "moved")
    monkeypatch.chdir(tmp_path)
    lines = lines_of(Path("there/list.csv"))
    moved = [(path.replace("in one place", "moved"), label, part) for path, label, part in lines]
    resume = ["resume", str(tmp_path / "run"), "--set", "train.max_steps=null"]
    assert _run(resume) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "list.csv is no file: give csv: the path of one that has lines of path,label" in said
    assert "if the pictures are elsewhere, add `--data csv:FILE`" in said
    write(tmp_path / "there" / "list.csv", [*moved[1:], moved[0]])  # another order
    assert _run([*resume, "--data", "csv:there/list.csv"]) == 7
    assert "was made with other data than this run has now" in capsys.readouterr().err
    write(tmp_path / "there" / "list.csv", moved)
    assert _run([*resume, "--data", "csv:there/list.csv"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_what_the_commands_say_of_it(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, cache = photographs / "list.csv", f"data.cache={tmp_path / 'cache'}"
    _run(["doctor", "--data", f"csv:{file}", "--device", "cpu", "--set", cache])
    said = " ".join(capsys.readouterr().out.split())
    assert "list.csv has pictures of 3 classes: cat, ship, truck; 30 to train on, 12 to test on" in said
    run = tmp_path / "run"
    assert _run(["train", *arguments(*CHANGES, f"data.source={file}", cache), "--out", str(run)]) == 0  # csv: by itself
    capsys.readouterr()
    assert _run(["watch", "--once", str(run)]) == 0
    assert "on csv list.csv at 32x32" in capsys.readouterr().out
    assert _run(["report", str(run)]) == 0
    report = (run / "report" / "report.md").read_text()
    assert "pictures listed in list.csv instead of the original CIFAR-10" in report
    assert str(photographs) not in report
    assert _run(["evaluate", str(run)]) == 0
    with open(run / "evaluate" / "predictions.csv", encoding="utf-8", newline="") as text:
        named = {row["picture"] for row in csv.DictReader(text)}
    assert named == {str(photographs / path) for path, _, part in lines_of(file) if part == "test"}
    # Other pictures of the same classes, listed without a column split: all of them.
    tests = [(photographs / path, label) for path, label, part in lines_of(file) if part == "test"]
    with open(tmp_path / "others.csv", "w", newline="") as text:
        csv.writer(text).writerows(tests)
    capsys.readouterr()
    assert _run(["evaluate", str(run), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert _run(["evaluate", str(run), "--data", f"csv:{tmp_path / 'others.csv'}", "--json"]) == 0
    others = json.loads(capsys.readouterr().out)
    assert (others[0]["data"], others[0]["loss"], others[0]["classes"]) == (
        "csv:others.csv", own[0]["loss"], own[0]["classes"],
    )  # fmt: skip


def test_a_picture_that_is_gone_is_named_with_its_line(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photographs, tmp_path / "here")
    gone = lines_of(tmp_path / "here" / "list.csv")[4][0]
    (tmp_path / "here" / gone).unlink()
    words = [*arguments(*CHANGES, f"data.source=csv:{tmp_path / 'here' / 'list.csv'}", f"data.cache={tmp_path / 'c'}")]
    assert _run(["train", *words, "--out", str(tmp_path / "run")]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 of 42 pictures in {tmp_path / 'here' / 'list.csv'} cannot be used: {gone} (line 6: No such file" in said
    assert not (tmp_path / "run").exists()
    assert _run(["train", *words, "--skip-damaged", "--out", str(tmp_path / "run")]) == 0
