"""Policies and schedules: names, validation, round trips."""

from __future__ import annotations

import json
import random

import pytest

from lowmem.plan.policy import (
    FUSED,
    INPUT_ONLY,
    LEAN,
    SAVE_ALL,
    BlockPolicy,
    Item,
    Keep,
    PolicyKind,
    Schedule,
    Segment,
    keep,
    uniform,
)

NAMES = {
    "SAVE_ALL": SAVE_ALL,
    "LEAN": LEAN,
    "LEAN-out": BlockPolicy(PolicyKind.LEAN, drop_output=True),
    "KEEP{}": INPUT_ONLY,
    "KEEP{conv1,conv2}": keep("conv2", "conv1"),
    "KEEP{conv2,shortcut.0}": keep("shortcut.0", "conv2"),
    "KEEP{conv1,conv3}-out": keep("conv1", "conv3", drop_output=True),
    "FUSED": FUSED,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_read_back(name: str) -> None:
    assert NAMES[name].name == str(NAMES[name]) == name
    assert BlockPolicy.parse(name) == NAMES[name]


@pytest.mark.parametrize(
    "name", ["", "KEEP", "LEAN{}", "keep{conv1}", "KEEP{a b}", "KEEP{.a}", "FUSED-out", "SAVE_ALL{conv1}"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no policy|no names of operations|cannot drop"):
        BlockPolicy.parse(name)


def test_only_keep_takes_names() -> None:
    with pytest.raises(ValueError, match="takes no names"):
        BlockPolicy(PolicyKind.LEAN, frozenset({"conv1"}))


def nested() -> Schedule:
    deep = Segment(3, 4, Schedule((Keep(3, LEAN), Keep(4, FUSED))))
    return Schedule(
        (
            Keep(0, SAVE_ALL),
            Keep(1, keep("conv2", drop_output=True)),
            Segment(2, 5, Schedule((Keep(2, INPUT_ONLY), deep, Keep(5, FUSED)))),
            Keep(6, SAVE_ALL),
        )
    )


def test_a_schedule_survives_json() -> None:
    schedule = nested()
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert (schedule.start, schedule.end) == (0, 6)
    assert [depth for depth, _ in schedule.walk()] == [0, 0, 0, 1, 1, 2, 2, 1, 0]
    assert schedule.policies()[4] == (2, FUSED)
    assert set(schedule.policies()) == set(range(7))


def random_schedule(rng: random.Random, start: int, end: int, inside: bool = False) -> Schedule:
    items: list[Item] = []
    while start <= end:
        stop = rng.randint(start, end)
        if rng.random() < 0.4 and (stop, start) != (end, 0):
            items.append(Segment(start, stop, random_schedule(rng, start, stop, True)))
            start = stop + 1
        else:
            last = inside and start == end
            items.append(Keep(start, FUSED if last and rng.random() < 0.5 else keep("conv1")))
            start += 1
    return Schedule(tuple(items))


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_survive_json(seed: int) -> None:
    schedule = random_schedule(random.Random(seed), 0, 6)
    schedule.check_covers(7)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ((), "at least one"),
        ((Keep(0, LEAN), Keep(2, LEAN)), "consecutive"),
        ((Keep(0, LEAN), Keep(0, LEAN)), "consecutive"),
        ((Keep(0, FUSED), Keep(1, LEAN)), "FUSED but not the last"),
        ((Keep(0, keep(drop_output=True)), Keep(1, FUSED)), "cannot be"),
        ((Keep(0, keep(drop_output=True)),), "nothing would restore"),
    ],
)
def test_wrong_schedules_are_refused(items: tuple[Item, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Schedule(items)


def test_a_segment_and_its_inside_cover_the_same_stages() -> None:
    with pytest.raises(ValueError, match=r"2\.\.4"):
        Segment(2, 4, uniform([LEAN, LEAN], start=2))


def test_check_covers() -> None:
    nested().check_covers(7)
    with pytest.raises(ValueError, match=r"0\.\.6"):
        nested().check_covers(8)
    with pytest.raises(ValueError, match="FUSED"):
        Schedule((Keep(0, LEAN), Keep(1, FUSED))).check_covers(2)


@pytest.mark.parametrize(
    "items",
    [
        {"keep": 0},
        [{"keep": 0}],
        [{"keep": 0, "policy": "LEAN", "more": 1}],
        [{"keep": "0", "policy": "LEAN"}],
        [{"segment": [0], "inner": []}],
        [{"keep": 0, "policy": "EVERYTHING"}],
    ],
)
def test_other_json_is_refused(items: object) -> None:
    with pytest.raises(ValueError, match=r"schedule|policy"):
        Schedule.from_json(items)
