"""What is printed is readable on a phone: forty columns; and as wide as it is where nobody has said how wide."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowmem.cli.layout import fold, room, table
from lowmem.cli.show import show_ls, show_report, show_verify
from lowmem.cli.watch import show_watch
from lowmem.report import write_report
from lowmem.runs.rows import EPOCH_TABLE
from tests.unit.report.fake_runs import write_run

ROWS = [("run", "epoch", "fork --at"), ("res20", "1/3", "1, 2, step:37"), ("a-rather-long-name", "12/164", "")]


def test_a_table_that_fits() -> None:
    wide = [
        "run                  epoch  fork --at",
        "res20                  1/3  1, 2, step:37",
        "a-rather-long-name  12/164",
    ]
    assert table(ROWS, {1}, None) == table(ROWS, {1}, 41) == wide


def test_its_last_column_wraps() -> None:
    wrapped = ["res20                  1/3  1, 2,", f"{'':28}step:37"]
    assert table(ROWS, {1}, 40) == ["run                  epoch  fork --at", *wrapped, "a-rather-long-name  12/164"]


def test_rows_become_blocks() -> None:
    assert table(ROWS, {1}, 30) == [
        "res20",
        "  epoch      1/3",
        "  fork --at  1, 2, step:37",
        "a-rather-long-name",
        "  epoch  12/164",
    ]


@pytest.mark.parametrize(
    ("line", "folded"),
    [
        ("fits", ["fits"]),
        ("  others            123 MiB", ["  others     123 MiB"]),  # a number keeps its place at the right
        ("  others, many of them  123 MiB", ["  others, many of", "  them  123 MiB"]),
        ("ok  name  one two three four", ["ok  name  one two", "          three four"]),
        ("ok    a/long/path/to/something/  is there", ["ok    a/long/path/to/something/", "      is there"]),
        ("          > lowmem resume runs/res20", ["          > lowmem resume runs/res20"]),  # to be copied
        ("one two three four five six", ["one two three four", "  five six"]),
        ("in the end all of it is there", ["in the end all of it", "  is there"]),
    ],
)
def test_lines_are_folded(line: str, folded: list[str]) -> None:
    assert fold([line], 20) == folded
    assert fold([line], None) == [line]


@pytest.mark.parametrize("columns", [40, 80])
def test_every_screen_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    """Nothing is wider than the terminal, but a name, which must be copied in one piece; and nothing is cut off."""
    write_run(tmp_path / "runs" / "res20")
    write_run(tmp_path / "runs" / "cnn20-a-rather-long-name", "cnn20", done=2, train__max_steps=782)
    (write_run(tmp_path / "runs" / "res56", "res56") / "config.yaml").write_text(
        "train: {epochs: -1}\n", encoding="utf-8"
    )
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    assert room() == columns
    show_ls(Path("runs"), as_json=False)
    show_verify(Path("runs/res20"), as_json=False)
    show_watch(Path("runs/res20"), interval=1, once=True, as_json=False)
    show_report(write_report([Path("runs")]))
    out = capsys.readouterr().out
    assert "…" not in out
    long = [line for line in out.splitlines() if len(line) > columns and "written: " not in line]
    assert not [line for line in long if len(line.split()) > 2]
    assert "loss" in out


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", os.terminal_size)
    assert room() is None


def test_losses_of_any_size_are_said_to_be_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "res20", done=2)
    show_watch(run, interval=1, once=True, as_json=False)
    assert "(of one step)" in capsys.readouterr().out
    (run / "steps.csv").write_text("step,epoch,lr,loss\n782,2,0.1,9341813685810.4258\n", encoding="utf-8")
    show_watch(run, interval=1, once=True, as_json=False)
    assert "9.342e12 (of one step)" in capsys.readouterr().out
    (run / "steps.csv").write_text("step,epoch,lr,loss\n", encoding="utf-8")
    row = {**dict.fromkeys(EPOCH_TABLE.names, ""), "epoch": 3, "step": 1173, "train_loss": 2.320075263977051}
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write(",".join(map(str, row.values())) + "\n")
    show_watch(run, interval=1, once=True, as_json=False)
    assert "2.3201 (mean of epoch 3)" in capsys.readouterr().out
