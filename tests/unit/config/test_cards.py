"""Card profiles: all of them load, figures are in bytes and per second, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.config import cards
from lowmem.config.cards import Card, find_card, load_card
from lowmem.core import reading
from lowmem.core.errors import UsageError
from lowmem.core.reading import profile_names
from lowmem.core.units import GIB, MIB


@pytest.mark.parametrize("name", profile_names("cards"))
def test_every_profile_is_plausible(name: str) -> None:
    card = load_card(name)
    assert 3 * GIB <= card.memory_bytes <= 16 * GIB
    assert 1e11 < card.bandwidth_bytes_per_second < 1e12
    assert 2e12 < card.fp32_flops_per_second < 5e13
    assert 250 * MIB <= card.context_bytes <= 400 * MIB
    assert card.tensor_cores == (card.name.startswith(("RTX", "V100")))
    assert card.usable.windows < card.usable.linux_display < card.usable.linux
    assert 7e9 < card.pcie_lane_bytes_per_second * card.pcie_lanes < 7e10
    assert cards._key(card.name) == cards._key(name)


def test_all_the_cards_are_there() -> None:
    names = profile_names("cards")
    assert len({load_card(name).name for name in names}) == len(names)
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert f"`profiles/cards/`, {len(names)} cards" in readme


def test_the_card_this_is_for() -> None:
    card = load_card("gtx1060-6g")
    assert (card.name, card.memory_bytes, card.capability_pair) == ("GTX 1060 6G", 6 * GIB, (6, 1))
    assert (card.bandwidth_bytes_per_second, card.fp32_flops_per_second) == (192e9, 4.38e12)
    assert (card.fp16, card.amp_flops_per_second) == ("1/64", 4.38e12)
    assert (card.pcie_lanes, card.pcie_lane_bytes_per_second) == (16, 0.985e9)


def test_half_precision_rates() -> None:
    assert load_card("gtx1660").fp16 == "2:1"
    assert load_card("gtx1660").amp_flops_per_second == 5.03e12
    assert load_card("rtx2060").amp_flops_per_second == 4 * 6.45e12
    assert load_card("v100").amp_flops_per_second == 8 * 14.13e12
    assert load_card("p100").amp_flops_per_second == 9.526e12
    assert load_card("rtx3070").amp_flops_per_second == 2 * 20.3e12


@pytest.mark.parametrize("name", ["GTX 1060 6G", "gtx1060_6g", "GTX1060-6G", "1060 6gb", "NVIDIA GeForce GTX 1060 6GB"])
def test_names_are_read_leniently(name: str) -> None:
    assert load_card(name) == load_card("gtx1060-6g")


def test_a_number_is_a_card_where_there_is_one_of_it() -> None:
    assert load_card("970").name == "GTX 970"
    assert load_card("2080 ti").name == "RTX 2080 Ti"
    assert load_card("4060").name == "RTX 4060"


def test_an_unknown_card_is_refused_with_the_nearest_names() -> None:
    for name in ("gtx1060", "1060", "GTX 1060"):
        with pytest.raises(UsageError, match="did you mean gtx1060-3g or gtx1060-6g"):
            load_card(name)
    with pytest.raises(UsageError, match=r"did you mean .*rtx3070.*\?"):
        load_card("rtx3070s")
    for name in ("voodoo", "", "-"):
        with pytest.raises(UsageError, match="`lowmem cards` lists them"):
            load_card(name)


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA GeForce GTX 1060 6GB", 6, "GTX 1060 6G"),
        ("NVIDIA GeForce GTX 1050 Ti", 4, "GTX 1050 Ti"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", 4, "RTX 3050 Laptop"),
        ("NVIDIA GeForce RTX 3050", 8, "RTX 3050 8G"),
        ("NVIDIA GeForce RTX 3050", 6, "RTX 3050 6G"),
        ("NVIDIA GeForce GTX 1660 SUPER", 6, "GTX 1660 Super"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "RTX 4060 Ti 16G"),
        ("NVIDIA GeForce RTX 4060 Ti", 8, None),
        ("NVIDIA GeForce GTX 1060 3GB", 3, "GTX 1060 3G"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8, "RTX 4060 Laptop"),
        ("NVIDIA GeForce RTX 3080", 10, "RTX 3080 10G"),
        ("NVIDIA GeForce RTX 3080", 12, None),
        ("NVIDIA H200", 139, None),
    ],
)
def test_a_card_is_found_by_its_drivers_name(device: str, gib: int, name: str | None) -> None:
    card = find_card(device, gib * GIB - 100 * MIB)
    assert (card.name if card else None) == name


MINE = """
name: Mine
memory: 3G
capability: 6.1
bandwidth_gb_per_second: 192
fp32_tflops: 3.9
fp16: "1/64"
pcie: 3.0x16
context: 300M
usable: {linux: 0.9, linux_display: 0.8, windows: 0.7}
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE, encoding="utf-8")
    card = load_card(str(path))
    assert isinstance(card, Card)
    assert (card.memory_bytes, card.capability) == (3 * GIB, "6.1")
    assert card.usable.windows == 0.7
    with pytest.raises(UsageError, match=r"no card profile .*other\.yaml"):
        load_card(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("memory: 3G", "memory: big", "memory: .*is not a size"),
        ("memory: 3G", "memory: -3", "memory: .*positive"),
        ("pcie: 3.0x16", "pcie: 9.0x16", "pcie: .*unknown"),
        ("pcie: 3.0x16", "pcie: 3.0x3", "pcie"),
        ('fp16: "1/64"', "fp16: 2:1", "fp16"),
        ("windows: 0.7", "windows: 70", r"usable\.windows"),
        ("fp32_tflops: 3.9", "fp32_tflops: .nan", "fp32_tflops"),
        ("name: Mine", "nmae: Mine", "name"),
        ("name: Mine", "name: [", "no valid YAML"),
        (MINE, "", "no card profile"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=why):
        load_card(str(path))


def test_profiles_are_found_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the wheel has them: lowmem/profiles/cards."""
    inside = tmp_path / "lowmem" / "profiles" / "cards"
    inside.mkdir(parents=True)
    (inside / "mine.yaml").write_text(MINE, encoding="utf-8")
    monkeypatch.setattr(reading, "_PACKAGE", tmp_path / "lowmem")
    assert profile_names("cards") == ("mine",)
    assert load_card("mine").name == "Mine"
