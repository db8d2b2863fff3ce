from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem.calibrate.device import DeviceFacts
from lowmem.choose.execution import budget_of, request_of
from lowmem.choose.planning import choose
from lowmem.choose.request import (
    ASSUMED_COMMUNICATOR_BYTES,
    Budget,
    Request,
    card_rates,
    of_card,
    of_device,
    with_communicators,
)
from lowmem.config.cards import load_card
from lowmem.config.settings import gather
from lowmem.core.errors import Infeasible
from lowmem.core.units import GIB, KIB, MIB
from lowmem.models import skeleton
from lowmem.trial.plan_trial import trial_of

CARD = load_card("gtx1060-6g")


def _facts(free_bytes: int, total_bytes: int, **known: Any) -> DeviceFacts:
    """Of a card with no need of cuBLAS's workspace, unless it is among what is `known`."""
    card: dict[str, Any] = {
        "name": "GTX 1060",
        "capability": (6, 1),
        "driver": None,
        "cudnn": None,
        "link": (None, None),
    }
    unknown = {"context_bytes": None, "blas_workspace_bytes": 0}
    return DeviceFacts(free_bytes=free_bytes, total_bytes=total_bytes, **{**card, **unknown, **known})


def test_a_bare_budget_is_for_tensors_alone() -> None:
    budget = Budget(total_bytes=4600 * MIB)
    assert budget.tensor_bytes == 4600 * MIB
    assert not budget.on_card
    assert [size for _, size in budget.rows()] == [4600 * MIB, 4600 * MIB]


@pytest.mark.parametrize("vram", [None, 4 * GIB])
def test_the_terms_of_a_card_add_up(vram: int | None) -> None:
    budget = of_card(load_card("gtx1060-6g"), vram)
    *terms, (last, left) = budget.rows()
    assert last == "for the step's tensors"
    assert sum(size for _, size in terms) == left == budget.tensor_bytes
    assert terms[0][1] == (vram or 6 * GIB)
    assert budget.on_card


def test_what_others_use_on_a_device_is_not_ours() -> None:
    budget = of_device(_facts(4 * GIB, 6 * GIB))
    # The context is there already: what is free is left but for workspace and margin.
    assert budget.tensor_bytes == 4 * GIB - 256 * MIB - int(6 * GIB * 0.02)
    assert of_device(_facts(4 * GIB, 6 * GIB), pictures_bytes=MIB).tensor_bytes == budget.tensor_bytes - MIB
    emulated = of_device(_facts(138 * GIB, 139 * GIB), 6 * GIB)
    assert emulated.total_bytes == 6 * GIB
    assert "emulated" in emulated.source
    # The same memory by name is no emulation, and does not make what others use disappear.
    assert of_device(_facts(4 * GIB, 6 * GIB), 6 * GIB) == budget
    assert of_device(_facts(4 * GIB, 6 * GIB), 8 * GIB) == budget


def test_a_card_too_small_for_anything() -> None:
    with pytest.raises(Infeasible, match="before any tensor"):
        of_card(load_card("gtx1060-6g"), 500 * MIB)


def test_a_measured_context_and_no_assumed_workspace() -> None:
    budget = of_device(_facts(5 * GIB, 6 * GIB, context_bytes=300 * MIB), workspace_bytes=0)
    assert budget.others_bytes == GIB - 300 * MIB
    assert [name for name, _ in budget.terms()] == [
        "others: driver, desktop, processes",
        "CUDA context (measured)",
        "margin (2%)",
    ]
    assert not budget.emulated
    # What the large card's driver keeps to itself is not taken from the small one that it stands for.
    emulated = of_device(_facts(130 * GIB, 139 * GIB, name="H200", context_bytes=500 * MIB), 6 * GIB, workspace_bytes=0)
    assert emulated.emulated
    assert emulated.others_bytes == 0
    assert emulated.source == "emulated card on H200"
    # Unless there is not even that much left.
    crowded = of_device(_facts(4 * GIB, 139 * GIB, context_bytes=500 * MIB), 6 * GIB, workspace_bytes=0)
    assert crowded.others_bytes == 2 * GIB - 500 * MIB


def test_cublas_workspace_is_a_term_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    card = load_card("gtx1060-6g")
    exact, free = of_card(card), of_card(card, deterministic=False)
    assert dict(exact.terms())["cuBLAS workspace (assumed)"] == 128 * KIB + MIB
    assert dict(free.terms())["cuBLAS workspace (assumed)"] == 8_519_680 + MIB
    assert exact.tensor_bytes - free.tensor_bytes == 8_519_680 - 128 * KIB
    measured = of_device(_facts(5 * GIB, 6 * GIB, blas_workspace_bytes=3 * MIB))
    assert dict(measured.terms())["cuBLAS workspace (measured)"] == 3 * MIB
    assert sum(size for _, size in measured.terms()) + measured.tensor_bytes == 6 * GIB


def test_what_the_allocator_may_hold() -> None:
    """All but what is not its own: the context, NCCL's communicators, the others."""
    budget = with_communicators(
        of_device(_facts(130 * GIB, 139 * GIB, context_bytes=500 * MIB, blas_workspace_bytes=MIB), 6 * GIB, 150 * MIB)
    )
    assert budget.allocator_bytes == 6 * GIB - 500 * MIB - ASSUMED_COMMUNICATOR_BYTES
    inside = budget.tensor_bytes + budget.workspace_bytes + budget.blas_workspace_bytes
    assert inside + budget.pictures_bytes + budget.margin_bytes == budget.allocator_bytes
    assert Budget(total_bytes=GIB).allocator_bytes is None


@pytest.mark.slow
def test_one_cap_for_the_plan_its_trial_and_the_run() -> None:
    """Of an emulated card; a real one needs none."""
    config = gather(flags={"model.arch": "res20", "model.width": 4, "train.batch": 8, "memory.vram": "2G"}).config
    for total, emulated in ((139 * GIB, True), (2 * GIB, False)):
        budget = of_device(_facts(total - GIB, total, context_bytes=500 * MIB), 2 * GIB)
        request = replace(request_of(config), budget=budget)
        plan = choose(request).plan
        assert plan.allocator_bytes == (budget.allocator_bytes if emulated else None)
        assert trial_of(config, plan, budget, 10, 0).cap_bytes == budget.allocator_bytes
        assert all(rung.allocator_bytes == plan.allocator_bytes for rung in plan.ladder)


@pytest.mark.parametrize("platform", ["linux", "linux_display", "windows"])
def test_the_machine_decides_what_of_a_card_is_usable(platform: str) -> None:
    card = load_card("gtx1060-6g")
    budget = of_card(card, platform=platform)
    assert budget.others_bytes == card.memory_bytes - int(card.memory_bytes * getattr(card.usable, platform))


@pytest.mark.parametrize("emulated", [False, True])
def test_tensors_alone_are_trained_under_the_limit_they_are_tried_under(emulated: bool) -> None:
    config = gather(flags={"model.arch": "res20", "model.width": 2, "train.batch": 4}).config
    card = of_device(_facts(10 * GIB, 12 * GIB), 6 * GIB if emulated else None)
    budget = card.for_tensors(64 * MIB, "tensors")
    plan = choose(Request(model=skeleton("res20", width=2), batch=4, budget=budget, rates=card_rates(CARD))).plan
    assert plan.allocator_bytes == trial_of(config, plan, budget, 10, 0).cap_bytes == 64 * MIB + 256 * MIB


def test_a_smaller_card_by_name_is_emulated_on_the_one_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = gather(flags={"train.device": "cuda", "memory.card": "gtx1060-6g"}).config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for size, emulated in ((80 * GIB, True), (6 * GIB - 69 * MIB, False)):
        there = SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, there=there: there)
        assert budget_of(config)[0].emulated == emulated


@pytest.mark.parametrize(("sync_bn", "communicators"), [(False, 1), (True, 2)])
def test_one_of_several_processes_has_the_tensors_it_was_given(sync_bn: bool, communicators: int) -> None:
    sets = (
        "memory.card=gtx1060-6g",
        "memory.tensors=300M",
        "train.device=cpu",
        f"train.sync_bn={str(sync_bn).lower()}",
    )
    budget = request_of(gather(flags={"model.arch": "res20"}, sets=sets).config, processes=2).budget
    assert budget.tensor_bytes == 300 * MIB
    assert budget.communicator_bytes == communicators * ASSUMED_COMMUNICATOR_BYTES


def _budget(*sets: str) -> Budget:
    return budget_of(gather(flags={"train.device": "cpu"}, sets=sets).config, 50_000)[0]


def test_a_bare_memory_is_that_of_a_card_like_the_reference() -> None:
    bare, named = _budget("memory.vram=4G"), _budget("memory.vram=4G", "memory.card=gtx1060-6g")
    assert replace(bare, source=named.source) == named
    assert bare.on_card
    assert "a card like the GTX 1060 6G, as no --card is given" in bare.source
    config = gather(flags={"model.arch": "res20", "model.width": 4, "train.batch": 8, "memory.vram": "2G"}).config
    request = request_of(config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})}))
    assert request.batch_norm == "library"  # what the card would take


def test_tensors_alone() -> None:
    assert _budget("memory.tensors=3G").terms() == []
    card = _budget("memory.card=gtx1060-6g")
    on_card = _budget("memory.card=gtx1060-6g", "memory.tensors=3G")
    assert on_card.tensor_bytes == 3 * GIB
    assert on_card.process_bytes == card.process_bytes
    more = _budget("memory.card=gtx1060-6g", "memory.tensors=6G")  # than it leaves
    assert replace(more, source=card.source) == card
    assert "leaves less than the 6,144 MiB asked for" in more.source


@pytest.mark.parametrize("mib", [1, 700, 9000])
@pytest.mark.parametrize("sets", [("memory.vram=2G",), ("memory.card=gtx1070",), ("memory.tensors=1G",)])
def test_what_is_said_to_be_enough_is(sets: tuple[str, ...], mib: int) -> None:
    _, flag, size, *_ = _budget(*sets).more(mib * MIB).split()
    others = [one for one in sets if "card" in one]
    assert 0 <= _budget(*others, f"memory.{flag.removeprefix('--')}={size}").tensor_bytes - mib * MIB < 2 * MIB


def test_more_tensors_on_a_card_are_so_much_more_and_nothing_else() -> None:
    budget = _budget("memory.card=gtx1060-6g", "memory.tensors=20M")
    assert budget.more(40 * MIB) == "give --tensors 40M or more"
    assert budget.more(7 * GIB) == "give a larger --card"  # this one would leave less


def test_a_card_that_has_no_more() -> None:
    assert "free what others use" in of_device(_facts(4 * GIB, 6 * GIB)).more(7 * GIB)
    emulated = of_device(_facts(10 * GIB, 12 * GIB), 6 * GIB)
    assert emulated.more(7 * GIB).startswith("give --vram 7")
    of_tensors = of_device(_facts(10 * GIB, 12 * GIB)).for_tensors(GIB, "tensors")
    assert of_tensors.more(7 * GIB) == "give --tensors 7168M or more"
    for budget in (emulated, of_tensors):
        assert budget.more(10 * GIB + 500 * MIB) == "free what others use on the card"
    with pytest.raises(Infeasible, match=r"takes \d+ MiB, and it has 512 MiB: give --vram \d+M and on top of it what"):
        _budget("memory.vram=512M")
