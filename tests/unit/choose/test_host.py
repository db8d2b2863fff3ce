"""Host memory by the settings and by what is free, and runs that go on where less is free than was planned for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from lowmem.choose import host
from lowmem.choose.decide import DataSize, Listener, RecordedRun, decide
from lowmem.choose.host import host_terms_of
from lowmem.config.cards import load_card
from lowmem.config.settings import Settings
from lowmem.core.errors import PreflightError
from lowmem.core.units import GIB, KIB
from lowmem.measure.host import free_host_bytes
from lowmem.plan.hosting import HostTerms
from lowmem.plan.record import Plan
from lowmem.plan.timeline import LinkRates
from tests.tiny import tiny

CARD = load_card("gtx1060-6g")
Free = Callable[[int | None], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Free:
    """Sets what this machine's own file says to be free, in bytes; None: there is no such file."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(host, "free_host_bytes", partial(free_host_bytes, tmp_path / "meminfo", tmp_path))

    def say(nbytes: int | None) -> None:
        (tmp_path / "meminfo").unlink(missing_ok=True)
        if nbytes is not None:
            (tmp_path / "meminfo").write_text(f"MemAvailable: {-(-nbytes // 1024)} kB\n")

    return say


def terms(*sets: str, processes: int = 1, on_paper: bool = True) -> HostTerms | None:
    return host_terms_of(tiny(*sets).config, CARD, processes, on_paper=on_paper)


def limit(*sets: str, processes: int = 1, on_paper: bool = True) -> int:
    found = terms(*sets, processes=processes, on_paper=on_paper)
    assert found is not None
    return found.limit_bytes


# -- the settings ------------------------------------------------------------------------------------------------------


def test_off_is_nothing(free: Free) -> None:
    free(8 * GIB)
    assert terms() is None
    assert terms("memory.host=off", "memory.link=3") is None


def test_a_size_half_of_what_is_free_and_the_link(free: Free) -> None:
    free(8 * GIB)
    by_card = CARD.host_bytes_per_second
    assert terms("memory.host=3G") == HostTerms(LinkRates(by_card, by_card), 3 * GIB, grads=True)
    assert terms("memory.host=auto", "memory.link=1.5") == HostTerms(LinkRates(1.5e9, 1.5e9), 4 * GIB, grads=True)
    assert limit("memory.host=8G") == 8 * GIB


def test_gradients_wait_where_no_other_process_adds_to_them(free: Free) -> None:
    free(8 * GIB)
    for processes, on_paper in ((2, True), (2, False)):
        found = terms("memory.host=1G", processes=processes, on_paper=on_paper)
        assert found is not None
        assert not found.grads


def test_more_than_is_free_is_refused_but_for_another_machine(free: Free) -> None:
    free(8 * GIB)
    with pytest.raises(
        PreflightError, match=r"memory\.host is 9,216 MiB, and 8,192 MiB of host memory are free: give less"
    ):
        terms("memory.host=9G")
    there = "memory.host=9G", f"memory.card={CARD.name}"
    assert limit(*there) == 9 * GIB
    with pytest.raises(PreflightError, match="9,216 MiB"):
        terms(*there, on_paper=False)  # it is trained here


def test_where_nobody_tells_a_size_is_believed(free: Free) -> None:
    free(None)
    with pytest.raises(PreflightError, match=r"give memory\.host a size"):
        terms("memory.host=auto")
    assert limit("memory.host=9G") == 9 * GIB


@pytest.mark.parametrize(
    ("variables", "share"), [({}, 1), ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, 2), ({"WORLD_SIZE": "4"}, 4)]
)
def test_the_processes_of_a_machine_share_it(
    variables: dict[str, str], share: int, free: Free, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(8 * GIB)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert limit("memory.host=auto", processes=8, on_paper=False) == 4 * GIB // share
    assert limit("memory.host=auto", processes=8) == GIB // 2  # all of them on one, on paper
    each = 8 * GIB // share
    assert limit(f"memory.host={each}", processes=8, on_paper=False) == each
    if share > 1:
        with pytest.raises(PreflightError, match=f"for each of {share} processes, and 8,192 MiB"):
            terms(f"memory.host={each + GIB}", processes=8, on_paper=False)


# -- runs that go on ---------------------------------------------------------------------------------------------------


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def settings(*sets: str) -> Settings:
    return tiny(
        "model.width=4", "data.train_subset=40", "train.batch=16", "train.memory_format=contiguous",
        "memory.tensors=3M", "memory.host=4G", "memory.link=12", *sets,
    )  # fmt: skip


@cache
def _planned() -> Plan:
    plan = decide(settings(), DataSize(10, 40)).plan
    assert plan is not None
    assert plan.schedule.hosts
    return plan


@pytest.fixture
def begun(free: Free) -> tuple[Settings, Plan, RecordedRun]:
    """Planned where there was enough."""
    free(8 * GIB)
    return settings(), _planned(), RecordedRun(settings().config, [_planned()])


def test_where_there_is_room_the_plan_is_replayed(begun: tuple[Settings, Plan, RecordedRun], free: Free) -> None:
    now, plan, run = begun
    # Less than memory.host, and as much as waits there under the plan or the ones in reserve.
    free(max(one.predicted.host_bytes or 0 for one in (plan, *plan.ladder)))
    told = Notes()
    again = decide(now, DataSize(10, 40), recorded=run, tell=told)
    assert (again.plan, again.changed, told.notes) == (plan, False, [])
    free(None)
    assert decide(now, DataSize(10, 40), recorded=run).plan == plan


@pytest.mark.parametrize("left", [1024 * KIB, 0])
def test_where_there_is_less_the_same_computation_is_planned_again(
    left: int, begun: tuple[Settings, Plan, RecordedRun], free: Free
) -> None:
    now, plan, run = begun
    free(left)
    told = Notes()
    again = decide(now, DataSize(10, 40), recorded=run, tell=told)
    assert again.plan is not None
    assert again.changed
    assert again.settings == now
    assert again.why is not None
    assert again.why.startswith("the recorded plan lets wait ")
    assert again.why in told.notes
    for one in (again.plan, *again.plan.ladder):
        assert (one.predicted.host_bytes or 0) <= left // 2
    assert again.plan.schedule != plan.schedule
    same = ("batch", "micro_batch", "precision", "memory_format", "exact", "budget_bytes", "shares")
    assert [getattr(again.plan, name) for name in same] == [getattr(plan, name) for name in same]


def test_the_processes_of_a_machine_need_it_together(
    begun: tuple[Settings, Plan, RecordedRun], free: Free, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, plan, run = begun
    free(2 * max(one.predicted.host_bytes or 0 for one in (plan, *plan.ladder)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not decide(now, DataSize(10, 40), recorded=run).changed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    why = decide(now, DataSize(10, 40), recorded=run).why
    assert why is not None
    assert "for each of 3 processes" in why


@pytest.mark.parametrize(
    ("change", "hosts"), [("memory.host=off", False), ("memory.host=1G", True), ("memory.link=40", True)]
)
def test_another_setting_plans_the_same_computation_again(
    change: str, hosts: bool, begun: tuple[Settings, Plan, RecordedRun]
) -> None:
    run = begun[2]
    key, value = change.split("=")
    again = decide(settings().replace({key: value}, "resume"), DataSize(10, 40), recorded=run)
    assert again.plan is not None
    assert again.changed
    assert (again.plan.batch, again.plan.micro_batch, again.plan.schedule.hosts) == (16, 16, hosts)


def test_a_size_that_is_not_free_is_no_error_for_a_run_that_has_begun(
    begun: tuple[Settings, Plan, RecordedRun], free: Free
) -> None:
    now, _, run = begun
    free(1 * GIB)
    told = Notes()
    again = decide(now.replace({"memory.tensors": "2900K"}, "resume"), DataSize(10, 40), recorded=run, tell=told)
    assert again.plan is not None
    assert again.plan.schedule.hosts
    assert again.settings.config.memory.host == 4 * GIB
    assert told.notes[0] == "memory.host is 4,096 MiB, and 1,024 MiB of host memory are free: planned for half of that"
    with pytest.raises(PreflightError):
        decide(now, DataSize(10, 40))
