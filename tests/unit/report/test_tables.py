"""The table of final test errors."""

from __future__ import annotations

from pathlib import Path

from lowmem.report.tables import TABLE_HEADER, build_rows, in_order, without_run
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun


def test_six_runs_in_the_published_order(six_runs: list[Path]) -> None:
    rows = build_rows(in_order([read_run(run) for run in reversed(six_runs)]))
    assert [row.network for row in rows] == ["Res20", "Res56", "Res110", "CNN20", "CNN56", "CNN110"]
    assert [row.final_error_pct for row in rows] == [8.1, 7.8, 7.5, 9.0, 39.0, 89.66]
    assert [row.published_error_pct for row in rows] == [8.08, 7.74, 7.46, 8.92, 39.03, 89.66]


def test_cells(make_run: MakeRun) -> None:
    runs = [make_run("res20"), make_run("cnn56", done=2), make_run("cnn110", done=0)]
    runs += [make_run("res110", model__block="bottleneck"), make_run("res56", done=164, epochs=164)]
    cells = [row.cells() for row in build_rows([read_run(run) for run in runs])]
    assert all(len(line) == len(TABLE_HEADER) for line in cells)
    assert cells[0] == ("Res20", "res20", "5", "8.10 %", "8.08 %", "5 epochs instead of 164*")
    assert cells[1][2] == "2 of 5"
    assert cells[1][5].startswith("only 2 of its 5 epochs done; ")
    assert cells[2][2:5] == ("0 of 5", "–", "89.66 %")
    assert cells[3][0] == "Res110-bottleneck"
    assert cells[3][4:] == ("–", "not among the published networks")
    assert cells[4][5] == "nothing that the settings show"


def test_published_networks_without_run(make_run: MakeRun) -> None:
    histories = [read_run(make_run("res20")), read_run(make_run("res110", model__block="bottleneck"))]
    assert without_run(histories) == {"Res56": 7.74, "Res110": 7.46, "CNN20": 8.92, "CNN56": 39.03, "CNN110": 89.66}
