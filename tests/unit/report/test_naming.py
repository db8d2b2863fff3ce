"""Runs are told apart, and labels stay short."""

from __future__ import annotations

from pathlib import Path

from lowmem.report.naming import LONGEST_NAME, curve_labels, file_names, run_names, shorten
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import write_run


def test_single_runs_are_called_by_their_network(tmp_path: Path) -> None:
    histories = [read_run(write_run(tmp_path / name, name)) for name in ("res20", "cnn20")]
    assert curve_labels(histories) == ["Res20", "CNN20"]


def test_seeds_are_told_apart(tmp_path: Path) -> None:
    histories = [read_run(write_run(tmp_path / name)) for name in ("res20", "res20-seed1", "other")]
    assert curve_labels(histories) == ["Res20", "Res20 seed1", "Res20 other"]


def test_res20_is_no_prefix_of_res200(tmp_path: Path) -> None:
    histories = [read_run(write_run(tmp_path / name)) for name in ("res2000", "res20")]
    assert curve_labels(histories) == ["Res20 res2000", "Res20"]


def test_same_folder_names(tmp_path: Path) -> None:
    histories = [read_run(write_run(tmp_path / above / "res20")) for above in ("a", "b")]
    assert run_names(histories) == ["a/res20", "b/res20"]
    histories = [read_run(write_run(tmp_path / top / "x" / "res20")) for top in ("c", "d")]
    assert run_names(histories) == ["x/res20 (1)", "x/res20 (2)"]


def test_shorten_keeps_both_ends() -> None:
    assert shorten("short") == "short"
    long = shorten("width16-jpeg-subset-seed12")
    assert len(long) == LONGEST_NAME
    assert long.startswith("width16")
    assert long.endswith("seed12")


def test_file_names(tmp_path: Path) -> None:
    """Usable on every system, and no two the same where capitals are not told apart."""
    names = ("a b", "a-b", "A-B", "..", "x/../y", "Größe")
    runs = [
        write_run(tmp_path / str(n) / name.replace("/", "\N{DIVISION SLASH}"))
        for n, name in enumerate(names)
        if name != ".."
    ]
    assert file_names([read_run(run) for run in runs]) == ["a-b", "a-b-2", "A-B-3", "x-..-y", "Gr-e"]
