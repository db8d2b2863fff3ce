"""The tables of final test errors, and of what each run took."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.report.markdown import render
from lowmem.report.tables import error_table, resource_table
from tests.unit.report.fake_runs import PLAUSIBLE, MakeRun, named


def test_six_runs(six_runs: list[Path]) -> None:
    table = error_table(named(*six_runs))
    assert [row[0] for row in table.rows] == ["Res20", "Res56", "Res110", "CNN20", "CNN56", "CNN110"]
    assert [row[3] for row in table.rows] == ["8.10 %", "7.80 %", "7.50 %", "9.00 %", "39.00 %", "89.66 %"]
    assert [row[4] for row in table.rows] == ["other epochs"] * 6


def test_the_published_figure_stands_beside_its_own_setting_alone(make_run: MakeRun) -> None:
    usual = {"done": 164, "epochs": 164}
    runs = [make_run(arch, **usual) for arch in PLAUSIBLE]
    figures = ["8.08 %", "7.74 %", "7.46 %", "8.92 %", "39.03 %", "89.66 %"]
    assert [row[4] for row in error_table(named(*runs)).rows] == figures
    others = [
        make_run("res20", name="thin", model__width=16, data__source="shapes", data__train_subset=100, **usual),
        make_run("res110", name="bottleneck", model__block="bottleneck", **usual),
        make_run("res20", name="unfinished", done=163, epochs=164),
        make_run("res20", name="lr", optim__lr=0.05, train__batch=64, **usual),
    ]
    said = ["other width, data", "other network", "other epochs", "other lr, batch"]
    assert [row[4] for row in error_table(named(*others)).rows] == said


def test_cells(make_run: MakeRun) -> None:
    runs = [make_run("res20"), make_run("cnn56", done=2), make_run("cnn110", done=0)]
    table = error_table(named(*runs, make_run("res110", model__block="bottleneck")))
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[0] == ("Res20", "res20", "5", "8.10 %", "other epochs")
    assert table.rows[1][2] == "2 of 5"
    assert table.rows[2][2:] == ("0 of 5", "–", "other epochs")
    assert (table.rows[3][0], table.rows[3][4]) == ("Res110-bottleneck", "other network, epochs")


def test_published_networks_without_run(make_run: MakeRun) -> None:
    run, bottleneck = make_run("res20", done=164, epochs=164), make_run("res110", model__block="bottleneck")
    text = render(named(run, bottleneck), [])
    assert "a student's homework report on ResNet against plain nets" in text
    missing = "Res56 7.74 %, Res110 7.46 %, CNN20 8.92 %, CNN56 39.03 %, CNN110 89.66 %"
    assert f"The homework report's networks without a run here: {missing}." in text
    assert "7.74 %" not in render(named(bottleneck), [])  # beside nothing that compares with it


def row(run: Path) -> dict[str, str]:
    table = resource_table(named(run))
    return dict(zip(table.header, table.rows[0], strict=True))


def add_events(run: Path, *events: dict[str, object]) -> None:
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_a_run_on_a_card(make_run: MakeRun) -> None:
    run = make_run("res20")
    add_events(run, {"event": "resume"}, {"event": "resume"})
    found = row(run)
    assert (found["Run"], found["Time"], found["Allocated"], found["Reserved"]) == ("res20", "7:20", "1,712 MiB", "–")
    assert 560 <= int(found["Images/s"]) <= 580
    assert found["Resumed"] == "2 times"
    assert found["Planned"] == "–"


def test_a_planned_run_on_the_cpu(make_run: MakeRun) -> None:
    """Allocations are counted there only while the plan is checked, after each change of it."""
    run = make_run("res20")
    text = (run / "metrics.csv").read_text().replace("1795162112", "")
    (run / "metrics.csv").write_text(text)
    add_events(
        run,
        {"event": "measured", "predicted_peak_bytes": 70 << 20, "measured_peak_bytes": 75 << 20},
        {"event": "measured", "predicted_peak_bytes": 60 << 20, "measured_peak_bytes": 59 << 20},
        {"event": "measured", "predicted_peak_bytes": "much", "measured_peak_bytes": True},
    )
    assert (row(run)["Planned"], row(run)["Allocated"]) == ("60 MiB", "59 MiB")


def test_before_the_first_epoch(make_run: MakeRun) -> None:
    found = row(make_run("res110", done=0))
    assert list(found.values())[1:] == ["–"] * 6 + ["no"]
