"""What differs is said once for all runs, and what is one run's own with that run."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem.report.departures import departures
from lowmem.report.tables import build_rows
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun


def found(*runs: Path) -> list[tuple[str, str]]:
    return departures(build_rows([read_run(run) for run in runs]))


def test_the_published_setting(make_run: MakeRun) -> None:
    run = make_run("res20", done=164, epochs=164)
    assert found(run) == [("res20", "nothing that the settings show")]
    assert departures([]) == []


def test_what_all_have_in_common_is_said_once(make_run: MakeRun) -> None:
    thin = {"model__width": 16, "train__batch": 64}
    runs = [
        make_run("res20", **thin),
        make_run("cnn20", done=3, **thin),
        make_run("res56", model__block="bottleneck", **thin),
    ]
    assert found(*runs) == [
        ("all 3 runs", "width 16 instead of 64; 5 epochs instead of 164*; batch 64 instead of 128*"),
        ("cnn20 also", "only 3 of its 5 epochs done"),
        ("res56 also", "named in the report, whose author could not train it: there is no figure to hold it against"),
    ]
    assert found(*runs[:2])[0][0] == "both runs"


def test_runs_that_share_nothing(make_run: MakeRun) -> None:
    right, wrong = make_run("res20", done=164, epochs=164), make_run("cnn20", done=164, epochs=164, optim__lr=0.2)
    other = make_run("res50", done=164, epochs=164)
    assert found(right, wrong, other) == [
        ("res20", "nothing that the settings show"),
        ("cnn20", "lr 0.2 instead of 0.1*"),
        ("res50", "not among the published networks"),
    ]


def test_a_run_that_was_rescued(make_run: MakeRun) -> None:
    run = make_run("res20", done=164, epochs=164)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"event": "rollback", "lr_scale": scale}) + "\n" for scale in (0.5, 0.25))
    assert found(run) == [("res20", "0.25 of the learning rate after its loss broke")]
