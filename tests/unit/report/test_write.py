"""`write_report`: where it writes, what it refuses, and that it leaves the runs alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowmem.core.errors import DiskError, UsageError
from lowmem.report import write_report
from tests.unit.report.fake_runs import MakeRun


def test_one_run_goes_into_its_folder(make_run: MakeRun) -> None:
    run = make_run("res20")
    result = write_report([run])
    assert result.markdown.parent == run / "report"
    assert sorted(path.name for path in (run / "report").iterdir()) == ["loss.png", "report.md", "test_error.png"]
    assert result.markdown.read_text(encoding="utf-8").startswith("# Training report")


def test_six_runs(six_runs: list[Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for run in six_runs for path in run.rglob("*") if path.is_file()}
    result = write_report(six_runs, tmp_path / "deep" / "report")
    assert [len(table.rows) for table in result.tables] == [6, 6]
    assert len(result.figures) == 5
    named = re.findall(r"\]\(([^)]+\.png)\)", result.markdown.read_text(encoding="utf-8"))
    assert named == [path.name for path in result.figures]  # relative: the folder can be moved
    assert all(path.is_file() for path in result.figures)
    assert before == {path: path.read_bytes() for run in six_runs for path in run.rglob("*") if path.is_file()}


def test_again_over_the_old_one(make_run: MakeRun) -> None:
    run = make_run("res20")
    first = write_report([run]).markdown.read_bytes()
    assert write_report([run]).markdown.read_bytes() == first


def test_a_run_given_twice_counts_once(make_run: MakeRun) -> None:
    run = make_run("res20")
    assert len(write_report([run, run / ".." / "res20"]).tables[0].rows) == 1


def test_several_runs_have_a_folder_here(six_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_report(six_runs[:2]).markdown == Path("report/report.md")


def test_the_runs_in_a_folder(make_run: MakeRun, tmp_path: Path) -> None:
    """What is no run and what cannot be read is named, and hides no other; what is not finished is one of them."""
    make_run("res20")
    make_run("cnn20", done=2)
    make_run("res56", name="group/deep", done=0)
    (make_run("cnn56") / "config.yaml").write_text("train: {epochs: -1}\n", encoding="utf-8")
    runs = tmp_path / "runs"
    (runs / "notes").mkdir()
    (runs / "notes.txt").write_text("no run", encoding="utf-8")
    for _ in range(2):  # an earlier report is none of them
        result = write_report([runs], runs / "report")
        assert [row[1:3] for row in result.tables[0].rows] == [("res20", "5"), ("deep", "0 of 5"), ("cnn20", "2 of 5")]
        damaged, other = result.left_out
        assert str(runs / "cnn56") in damaged
        assert other == f"{runs / 'notes'} holds no run"


def test_a_folder_without_a_run_to_report(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no run in"):
        write_report([tmp_path / "empty"])
    (make_run("cnn56") / "config.yaml").write_text("train: {epochs: -1}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"can be read: .*cnn56"):
        write_report([tmp_path / "runs"])


def test_nothing_is_written_if_a_run_is_missing(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        write_report([make_run("res20"), tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no run given"):
        write_report([])


def test_no_rows(make_run: MakeRun) -> None:
    result = write_report([make_run("res20", done=0)])
    assert result.figures == ()
    assert result.tables[0].rows[0][3] == "–"


def test_a_folder_that_cannot_be_made(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiskError, match="give another --out"):
        write_report([make_run("res20")], tmp_path / "file" / "report")
