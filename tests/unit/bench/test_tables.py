"""The tables: every row as wide as its header, and the same figures in Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

import pytest

from lowmem.bench import ENGINE, ENGINE_HOST, PLAIN_DEFAULT, PLAIN_FREE
from lowmem.bench.tables import MODES, TableSetup, account, largest_cells, step_cells
from lowmem.core.units import MIB
from lowmem.trial import TrialResult

HERE: dict[str, Any] = {"lowmem": "1", "torch": "2", "python": "3", "device": "cpu", "cpu": "a", "cpu_threads": 2}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("measured", [False, True])
def test_rows_are_as_wide_as_their_header(device: str, measured: bool) -> None:
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device=device, host="auto")
    cells = [*step_cells(setup, MODES), *largest_cells(setup)]
    for cell in cells if measured else []:
        cell.trials["1"] = asdict(TrialResult(step_seconds=1.0, least_seconds=1.0, most_seconds=2.0, flops=10))
    told = account(setup, HERE, cells, finished=measured)
    for table in told.tables:
        header, *rows = table.lines()
        assert rows
        assert {len(row) for row in rows} == {len(header)}
        assert any("not run: time" in row for row in rows) != measured
        brief, *_ = table.lines(brief=True)
        assert set(brief) <= set(header)
    assert len(list(csv.DictReader(io.StringIO(told.csv())))) == len(cells)


def test_figures() -> None:
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cpu", budgets=(0.5,))
    cells = step_cells(setup, MODES[::2])
    plain = next(cell for cell in cells if cell.family == PLAIN_DEFAULT)
    planned = next(cell for cell in cells if cell.family == ENGINE)
    plain.predicted_allocated_bytes, planned.predicted_allocated_bytes = 400 * MIB, 50 * MIB
    for number, seconds in (("1", 1.0), ("2", 1.2), ("3", 1.0)):
        shared: dict[str, Any] = {"gradients": "g", "buffers": "b", "losses": (2.0,), "finite": True}
        plain.trials[number] = (
            asdict(
                TrialResult(
                    step_seconds=seconds, least_seconds=seconds, most_seconds=3.0, peak_allocated_bytes=401 * MIB
                )
            )
            | shared
            | {"flops": 1000}
        )
        planned.trials[number] = (
            asdict(TrialResult(step_seconds=1.5, least_seconds=1.4, most_seconds=1.6, peak_allocated_bytes=51 * MIB))
            | shared
            | {"flops": 1250}
        )
    text = account(setup, HERE, [*cells, *largest_cells(setup)], finished=True).markdown()
    assert (
        "| lowmem, 50% of plain | 50.0 | 51.0 | – | 21 | 1.500 (1.400 to 1.600) | 1.50 (1.25–1.50) | +25.0% "
        "| same bits |"
    ) in text
    assert "| plain PyTorch | 400 | 401 | – | 32 | 1.000 (1.000 to 3.000) | 1 | none | – |" in text
    assert "Not finished" not in text
    row = next(
        one
        for one in csv.DictReader(io.StringIO(account(setup, HERE, cells, True).csv()))
        if one["way"] == "lowmem, 50% of plain"
    )
    assert (row["times_plain"], row["least_times_plain"], row["extra_flops"]) == ("1.5", "1.25", "0.25")
    assert (row["peak_allocated_bytes"], row["as_plain"], row["refused"]) == (str(51 * MIB), "same bits", "")


def test_bytes_moved_and_the_hidden_share_of_it() -> None:
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cpu", budgets=(0.5,), host="auto")
    cells = step_cells(setup, MODES[:1])
    hosted = next(cell for cell in cells if cell.family == ENGINE_HOST)
    hosted.plan = {"predicted": {"host_bytes": 20 * MIB, "hidden_share": 0.957}}
    shown = account(setup, HERE, [*cells, *largest_cells(setup)], finished=True).tables[0]
    header, *lines = shown.lines()
    at, there = header.index("MiB on the host"), next(line for line in lines if line[0] == hosted.label)
    assert header[at + 1] == "transfer hidden"
    assert there[at : at + 2] == ["20.0", "96%"]
    assert all(line[at : at + 2] == ["–", "–"] for line in lines if line is not there)
    assert "predicted share of that transfer's time" in shown.note


@pytest.mark.parametrize(
    ("plain_seconds", "taken", "sign"),
    [
        ((1.0, 16.0, 1.0), 0.0, "took up to 16.0 times as long in one round as in another"),
        ((1.0, 1.1, 1.0), 1.0, "other programs kept 1.0 of the cores busy that this needs"),
        ((1.0, 1.1, 1.0), None, None),
        ((1.0, 1.1, 1.0), 0.1, None),
    ],
)
def test_a_machine_that_was_not_alone(plain_seconds: tuple[float, ...], taken: float | None, sign: str | None) -> None:
    """Two threads beside a busy program once made a plan 0.09 times as slow as plain PyTorch."""
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cpu", budgets=(0.5,))
    cells = step_cells(setup, MODES[:1])
    for cell in cells:
        for number, seconds in enumerate(plain_seconds if cell.family == PLAIN_DEFAULT else (1.5, 1.5, 1.5), 1):
            cell.trials[str(number)] = asdict(TrialResult(step_seconds=seconds, taken_cores=taken))
    told = account(setup, HERE, cells, finished=True)
    planned = next(line for line in told.markdown().splitlines() if line.startswith("| lowmem, 50%"))
    assert ("The machine was not alone" in told.conditions) == (sign is not None)
    assert (sign or "") in told.conditions
    assert ("unsure (" in planned) == (sign is not None)


def test_what_deterministic_kernels_cost_is_said() -> None:
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cuda")
    cells = [*step_cells(setup, MODES[:1]), *largest_cells(setup)]
    here = {**HERE, "device": "cuda", "tf32": True}
    assert "Deterministic kernels" not in account(setup, here, cells, finished=True).markdown()
    for cell in cells:
        if cell.family in (PLAIN_DEFAULT, PLAIN_FREE):
            cell.trials["1"] = asdict(TrialResult(step_seconds=1.1 if cell.family == PLAIN_DEFAULT else 1.0))
    text = account(setup, here, cells, finished=True).markdown()
    assert "make plain PyTorch's step +10.0% longer" in text
    assert "fp32 convolutions in TF32" in text


@pytest.mark.parametrize(("share", "said"), [(0.42, True), (0.93, False), (None, False)])
def test_a_card_that_waits_for_launches_is_said_to(share: float | None, said: bool) -> None:
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cuda", budgets=(0.5,))
    cells = step_cells(setup, MODES[:1])
    plain = next(cell for cell in cells if cell.family == PLAIN_DEFAULT)
    plain.trials["1"] = asdict(TrialResult(step_seconds=1.0, least_seconds=1.0, most_seconds=1.0, busy_share=share))
    text = account(setup, HERE, [*cells, *largest_cells(setup)], finished=True).markdown()
    assert ("the card computes 42% of a plain step at batch 32; compare at a larger --batch" in text) is said
    assert ("Bound by launches" in text) is said


def test_unfinished_results_say_so() -> None:
    setup = TableSetup(arch="res20", block="basic", width=8, batch=32, device="cpu")
    cells = [*step_cells(setup, MODES[::2]), *largest_cells(setup)]
    assert "**Not finished" in account(setup, HERE, cells, finished=False).markdown()
