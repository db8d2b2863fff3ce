"""The picture of a schedule: short, complete, and explained."""

from __future__ import annotations

import random

import pytest

from lowmem.plan.picture import in_short, legend, lines, shown, text
from lowmem.plan.policy import FUSED, GRADS, LEAN, OUTPUT, SAVE_ALL, Host, Item, Keep, Schedule, Segment, keep
from tests.unit.plan.test_policy import random_schedule

NAMES = ("stem", *(f"layer1.{i}" for i in range(3)), *(f"layer2.{i}" for i in range(12)), "head")


def segment(start: int, end: int) -> Segment:
    inner = (*(Keep(index, keep("conv2")) for index in range(start, end)), Keep(end, FUSED))
    return Segment(start, end, Schedule(inner))


def schedule() -> Schedule:
    turns = [Keep(i, keep("conv2", drop_output=True) if i % 2 else LEAN) for i in range(7, 13)]
    items: tuple[Item, ...] = (
        Keep(0, SAVE_ALL),
        *(Keep(index, LEAN) for index in (1, 2)),
        segment(3, 4),
        segment(5, 6),
        *turns,
        segment(13, 13),
        segment(14, 14),
        *(Keep(index, LEAN) for index in (15, 16)),
    )
    return Schedule(items)


def test_what_waits_on_the_host_is_marked_and_explained() -> None:
    first = Keep(0, SAVE_ALL, (Host(frozenset({OUTPUT}), 1, 1),))
    last = Keep(2, SAVE_ALL, (Host(frozenset({GRADS}), 1, -1),))
    both = Schedule((first, Keep(1, SAVE_ALL), last))
    assert [what for *_, what in lines(both, NAMES)] == ["SAVE_ALL +host", "SAVE_ALL", "SAVE_ALL +host.grad"]
    marks = [line.partition(":")[0] for line in legend(both) if line.startswith("+")]
    assert marks == ["+host", "+host.grad"]
    assert [
        line for line in legend(Schedule((first, *both.items[1:2], Keep(2, SAVE_ALL)))) if "+host.grad" in line
    ] == []


def test_lines() -> None:
    assert lines(schedule(), NAMES) == [
        ("stem", 1, "SAVE_ALL"),
        ("layer1.0-1", 2, "LEAN"),
        ("layer1.2 to layer2.0", 2, "checkpoint of 2 [KEEP{conv2}, FUSED]"),
        ("layer2.1-2", 2, "checkpoint of 2 [KEEP{conv2}, FUSED]"),
        ("layer2.3-8", 6, "3 x (KEEP{conv2}-out, LEAN)"),
        ("layer2.9-10", 2, "2 x checkpoint [FUSED]"),
        ("layer2.11", 1, "LEAN"),
        ("head", 1, "LEAN"),
    ]


def test_text_explains_every_policy_that_occurs_and_no_other() -> None:
    picture = text(schedule(), NAMES)
    assert "stem                  1 stage   SAVE_ALL\n" in picture
    kinds = [line.partition(":")[0] for line in legend(schedule())]
    assert kinds == ["SAVE_ALL", "LEAN", "KEEP", "FUSED", "-out", "checkpoint"]
    assert [line.partition(":")[0] for line in legend(Schedule((Keep(0, LEAN),)))] == ["LEAN"]
    assert max(map(len, picture.splitlines())) <= 110


def test_in_short() -> None:
    assert in_short(schedule()) == "7 x LEAN, 5 x KEEP{…}, 4 x FUSED, 1 x SAVE_ALL"
    few = Schedule((Keep(0, SAVE_ALL), Keep(1, keep("conv2")), Keep(2, SAVE_ALL)))
    assert in_short(few) == "2 x SAVE_ALL, 1 x KEEP{conv2}"


def test_of_many_kept_tensors_some_are_named() -> None:
    few, many = keep(*(f"conv{i}" for i in range(6))), keep(*(f"conv{i}" for i in range(7)), drop_output=True)
    assert shown(few) == few.name
    assert shown(many) == "KEEP{conv0,conv1,… 7 in all}-out"
    assert not any("--json" in line for line in legend(Schedule((Keep(0, few),))))
    assert any("--json" in line for line in legend(Schedule((Keep(0, many), Keep(1, few)))))


@pytest.mark.parametrize("seed", range(20))
def test_every_stage_is_on_one_line(seed: int) -> None:
    rows = lines(random_schedule(random.Random(seed), 0, len(NAMES) - 1), NAMES)
    assert sum(count for _, count, _ in rows) == len(NAMES)
    assert rows[0][0].startswith("stem")
    assert rows[-1][0].endswith("head")
