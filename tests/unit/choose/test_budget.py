from __future__ import annotations

import pytest

from lowmem.cards import Platform, load_card
from lowmem.choose.budget import of_card, of_device, tensors_only
from lowmem.errors import Infeasible
from lowmem.units import GIB, MIB


def test_a_bare_budget_is_for_tensors_alone() -> None:
    budget = tensors_only(4600 * MIB)
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
    budget = of_device(free_bytes=4 * GIB, total_bytes=6 * GIB)
    # The context is there already: what is free is left but for workspace and margin.
    assert budget.tensor_bytes == 4 * GIB - 256 * MIB - int(6 * GIB * 0.02)
    assert of_device(4 * GIB, 6 * GIB, pictures_bytes=MIB).tensor_bytes == budget.tensor_bytes - MIB
    emulated = of_device(free_bytes=138 * GIB, total_bytes=139 * GIB, vram_bytes=6 * GIB)
    assert emulated.total_bytes == 6 * GIB
    assert "emulated" in emulated.source
    # The same memory by name is no emulation, and does not make what others use disappear.
    assert of_device(4 * GIB, 6 * GIB, vram_bytes=6 * GIB) == budget
    assert of_device(4 * GIB, 6 * GIB, vram_bytes=8 * GIB) == budget


def test_a_card_too_small_for_anything() -> None:
    with pytest.raises(Infeasible, match="before any tensor"):
        of_card(load_card("gtx1060-6g"), 500 * MIB)


def test_a_measured_context_and_no_assumed_workspace() -> None:
    budget = of_device(5 * GIB, 6 * GIB, name="GTX 1060", context_bytes=300 * MIB, workspace_bytes=0)
    assert budget.others_bytes == GIB - 300 * MIB
    assert [name for name, _ in budget.terms()] == [
        "others: driver, desktop, processes",
        "CUDA context (measured)",
        "margin (2%)",
    ]
    assert not budget.emulated
    # What the large card's driver keeps to itself is not taken from the small one that it stands for.
    emulated = of_device(130 * GIB, 139 * GIB, 6 * GIB, name="H200", context_bytes=500 * MIB, workspace_bytes=0)
    assert emulated.emulated
    assert emulated.others_bytes == 0
    assert emulated.source == "emulated card on H200"
    # Unless there is not even that much left.
    crowded = of_device(4 * GIB, 139 * GIB, 6 * GIB, context_bytes=500 * MIB, workspace_bytes=0)
    assert crowded.others_bytes == 2 * GIB - 500 * MIB


@pytest.mark.parametrize("platform", ["linux", "linux_display", "windows"])
def test_the_machine_decides_what_of_a_card_is_usable(platform: Platform) -> None:
    card = load_card("gtx1060-6g")
    budget = of_card(card, platform=platform)
    assert budget.others_bytes == card.memory_bytes - card.usable_bytes(platform)
