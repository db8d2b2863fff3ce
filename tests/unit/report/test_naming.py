"""Runs are told apart, labels stay short, and pairs find each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.config.schema import ModelConfig
from lowmem.report.naming import LONGEST_NAME, find_pairs, in_order, network_name, shorten_middle
from lowmem.report.tables import differences
from tests.unit.report.fake_runs import MakeRun, named, write_run


def test_networks() -> None:
    assert network_name(ModelConfig(arch="res110")) == "Res110"
    assert network_name(ModelConfig(arch="cnn110", block="bottleneck")) == "CNN110-bottleneck"


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (("res20", "cnn20"), ["Res20", "CNN20"]),
        (("res20", "res20-seed1", "other"), ["Res20", "Res20 seed1", "Res20 other"]),
        (("res2000", "res20"), ["Res20 res2000", "Res20"]),  # res20 is no prefix of res200
    ],
)
def test_labels(tmp_path: Path, folders: tuple[str, ...], labels: list[str]) -> None:
    runs = [write_run(tmp_path / name, "cnn20" if name == "cnn20" else "res20") for name in folders]
    assert [run.label for run in named(*runs)] == labels


def test_same_folder_names(tmp_path: Path) -> None:
    runs = named(*(write_run(tmp_path / above / "res20") for above in ("a", "b")))
    assert [run.name for run in runs] == ["a/res20", "b/res20"]
    runs = named(*(write_run(tmp_path / top / "x" / "res20") for top in ("c", "d")))
    assert [run.name for run in runs] == ["x/res20 (1)", "x/res20 (2)"]


def test_shorten_keeps_both_ends() -> None:
    assert shorten_middle("short") == "short"
    long = shorten_middle("width16-jpeg-subset-seed12")
    assert len(long) == LONGEST_NAME
    assert long.startswith("width16")
    assert long.endswith("seed12")


def test_file_names(tmp_path: Path) -> None:
    """Usable on every system, and no two the same where capitals are not told apart."""
    names = ("a b", "a-b", "A-B", "x\N{DIVISION SLASH}..\N{DIVISION SLASH}y", "Größe")
    runs = named(*(write_run(tmp_path / str(n) / name) for n, name in enumerate(names)))
    assert [run.file_name for run in runs] == ["a-b", "a-b-2", "A-B-3", "x-..-y", "Gr-e"]


def test_the_published_order(six_runs: list[Path]) -> None:
    histories = [run.history for run in named(*reversed(six_runs))]
    assert [history.name for history in in_order(histories)] == ["res20", "res56", "res110", "cnn20", "cnn56", "cnn110"]


def test_pairs_by_depth_and_block(make_run: MakeRun, six_runs: list[Path]) -> None:
    more = [make_run("res110", name="b", model__block="bottleneck"), make_run("res34"), make_run("cnn34", done=0)]
    pairs = find_pairs(named(*six_runs, *more))
    assert list(pairs) == ["20", "56", "110"]
    assert [run.name for run in pairs["110"]] == ["res110", "cnn110"]


def test_networks_of_ones_own_stand_behind_the_family(make_run: MakeRun, six_runs: list[Path]) -> None:
    own = [
        make_run(name="b", model__spec="/nets/my_net.py:Net"),
        make_run(name="a", model__spec="torchvision:resnet18", model__args={"groups": 2}),
    ]
    runs = named(*own, *six_runs)
    assert [run.label for run in runs[:2]] == ["my_net-Net", "resnet18"]
    assert [run.name for run in in_order([run.history for run in runs])][-2:] == ["b", "a"]
    assert list(find_pairs(runs)) == ["20", "56", "110"]
    assert not {run.style.dashes for run in runs[:2]} & {run.style.dashes for run in runs[2:]}
    assert differences(runs[0].history)[0] == "my_net.py:Net instead of a network of that report"


def test_runs_of_one_network_share_colour_not_width(make_run: MakeRun) -> None:
    first, second = named(*(make_run("res20", name=f"s{seed}", seed=seed) for seed in range(2)))
    assert first.style.colour == second.style.colour
    assert first.style.width > second.style.width
    assert first.label != second.label


def test_same_colour_in_every_subset(six_runs: list[Path]) -> None:
    everywhere = {run.name: run.style.colour for run in named(*six_runs)}
    assert len(set(everywhere.values())) == 6
    for shown in (six_runs[2:3], six_runs[::-1]):
        assert all(run.style.colour == everywhere[run.name] for run in named(*shown))
