"""What is made of a card's load: columns of metrics.csv, a warning, what `watch` shows. The driver is scripted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lowmem.cli.watch import describe_card, to_json
from lowmem.lifecycle import resume_training, run_training
from lowmem.measure import Meter
from lowmem.measure.nvml import CardLoad, Driver
from lowmem.runs.rows import EPOCH_TABLE
from lowmem.runs.view import RunView
from lowmem.runs.watch import Live
from lowmem.train.card_watch import CardWatch
from tests.tiny import Heard, tiny
from tests.unit.measure.scripted import Card, ScriptedNvml

WELL = CardLoad(
    temperature_c=71, power_watts=95.0, clock_mhz=1800, most_clock_mhz=2000, utilization_pct=96, throttle_reasons=0
)
HOT = CardLoad(
    temperature_c=88, power_watts=70.0, clock_mhz=1000, most_clock_mhz=2000, utilization_pct=99, throttle_reasons=0x60
)


def watch(*loads: CardLoad | None) -> CardWatch:
    found = CardWatch()
    for load in loads:
        found.look(load)
    return found


def test_means_and_the_most_of_an_epoch() -> None:
    card = watch(WELL, HOT, WELL, CardLoad(temperature_c=60))
    assert card.columns() == {
        "gpu_temperature_c": 88,
        "gpu_power_watts": 86.7,
        "gpu_clock_mhz": 1533.3,
        "gpu_utilization_pct": 97.0,
        "gpu_throttled_pct": 33.3,  # of the looks that tell
        "gpu_throttle_reasons": 0x60,
    }
    card.begin_epoch()
    assert card.columns() == watch(None, None).columns() == {}
    assert set(watch(CardLoad()).columns().values()) == {None}


def test_it_warns_once_where_it_costs_more_than_a_tenth() -> None:
    assert watch(*[WELL] * 30).throttled() is None, "below its most, but nothing holds it back"
    assert watch(*[HOT] * 9).throttled() is None, "for a moment"
    assert watch(*[WELL] * 8, *[HOT] * 2).throttled() is None, "a tenth of the speed, and no more"
    assert watch(*[CardLoad(throttle_reasons=0x60)] * 30).throttled() is None, "nobody tells the clock"
    card = watch(*[WELL] * 7, *[HOT] * 3)
    assert card.throttled() == (
        "the card is held back (heat, heat (hardware)) 30% of the time, which costs about 15% of the speed: cool it "
        "better (dust, fans, the air in the case), or lower its power limit a little"
    )
    assert card.throttled() is None
    limited = CardLoad(clock_mhz=1400, most_clock_mhz=2000, throttle_reasons=0x4)
    assert "(power limit) 100% of the time" in (words := watch(*[limited] * 10).throttled() or "")
    assert "`nvidia-smi -pl WATTS`" in words


def test_a_run_records_it_and_watch_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, run = Card(clock=1000, throttle=0x24, temperature=83), tmp_path / "run"
    driver = Driver(ScriptedNvml(cards=[card]))

    class OfACard(Meter):
        def __init__(self, device: str) -> None:
            super().__init__(device)
            self.load = lambda: driver.load(card.uuid)

    monkeypatch.setattr("lowmem.train.replica.Meter", OfACard)
    small = ("train.batch=10", "train.epochs=4")  # six steps an epoch
    heard = Heard()
    run_training(tiny(*small, "train.max_steps=3"), run, heard)
    assert not heard.warnings, "too early to tell"
    assert describe_card(Live(run).look().card) == (
        "83 °C, 96 W, 1,000 MHz, 97 % busy, held back 100 % of the time (power limit, heat)"
    )
    for steps in (15, None):
        card.clock, card.throttle = (1000, 0x24) if steps else (1911, 0)
        resume_training(run, {"train.max_steps": steps}, heard := Heard())
        assert len([text for text in heard.warnings if "which costs about" in text]) == (1 if steps else 0)
    rows = RunView(run).epochs
    assert [row.gpu_throttle_reasons for row in rows] == [0x24, 0x24, 0, 0], "of the steps since the resume"
    assert [row.gpu_clock_mhz for row in rows] == [1000.0, 1000.0, 1911.0, 1911.0]
    assert rows[-1].gpu_temperature_c == 83
    warned = [event for event in RunView(run).events if event.kind == "warning"]
    assert len(warned) == 1
    live = Live(run).look()
    assert describe_card(live.card) == "83 °C, 96 W, 1,911 MHz, 97 % busy"
    assert to_json(live)["card"]["gpu_power_watts"] == 95.5


def test_without_a_card_the_columns_are_empty(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(tiny("train.epochs=1"), run)
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == list(EPOCH_TABLE.names)
    assert list(row)[-6:] == [name for name in row if name.startswith("gpu_")], "at the end"
    assert {row[name] for name in list(row)[-6:]} == {""}
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert not [name for event in told for name in event if name.startswith("gpu_")]
    live = Live(run).look()
    assert (live.card, describe_card(live.card)) == ({}, "")
