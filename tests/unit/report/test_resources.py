"""Time and memory of each run, as far as it is known."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.report.resources import HEADER, resource_rows
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun


def row(run: Path) -> dict[str, str]:
    (cells,) = resource_rows([read_run(run)])
    return dict(zip(HEADER, cells, strict=True))


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
    assert [found[name] for name in HEADER[1:]] == ["–"] * 6 + ["no"]
