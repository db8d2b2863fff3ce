"""gradients.csv: written, cut back, read."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from lowmem.core.errors import UsageError
from lowmem.runs.rows import GRADIENT_TABLE, GradientRow, GradientRows, gradient_line
from lowmem.runs.store import RunFolder
from lowmem.runs.view import RunView

LAYERS = ("conv1.weight", "linear.weight")


def read(path: Path) -> GradientRows:
    view = RunView(path.parent)
    assert view.notes == []
    return view.gradients


def write(folder: Path, *lines: str) -> Path:
    (folder / "gradients.csv").write_text("".join(f"{line}\n" for line in lines), newline="")
    return folder / "gradients.csv"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        run.begin_gradients(LAYERS, step=0)
        assert read(run.gradients_file) == GradientRows(LAYERS, ())
        run.append_gradients([(1, 1, [1.93212345e6, 0.36]), (40, 1, [math.inf, math.nan])])
        run.append_gradients([(80, 2, [0.0, 1e-30])])
        first, overflowed, last = read(run.gradients_file).rows
        assert first == GradientRow(1, 1, (1932120.0, 0.36))  # six digits
        assert overflowed.norms[0] == math.inf
        assert math.isnan(overflowed.norms[1])
        assert last == GradientRow(80, 2, (0.0, 1e-30))


def test_rows_after_the_step_are_dropped_and_half_lines_too(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        run.begin_gradients(LAYERS, step=0)
        run.append_gradients([(step, 1, [1.0, 2.0]) for step in (1, 40, 80)])
        with open(run.gradients_file, "a") as file:
            file.write("120,1,0.")
        run.begin_gradients(LAYERS, step=79)
        assert [row.step for row in read(run.gradients_file).rows] == [1, 40]


@pytest.mark.parametrize("what", ["another network's", "a bit", "a folder", "no regular size"])
def test_what_cannot_be_used_is_set_aside_and_a_new_one_begun(what: str, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        file = run.gradients_file
        for number in ("", "-2"):  # nothing that was set aside is overwritten
            run.begin_gradients(LAYERS, step=0)
            run.append_gradients([(1, 1, [1.0, 2.0])])
            if what == "another network's":
                file.write_text("step,epoch,conv1.weight\n1,1,2.0\n")
            elif what == "a bit":
                file.write_bytes(b"r" + file.read_bytes()[1:])
            elif what == "a folder":
                file.unlink()
                file.mkdir()
            else:
                os.truncate(file, 5 << 30)  # a hole: nothing is read of it
            said = run.begin_gradients(LAYERS, step=1)
            assert said is not None
            assert f"damaged-gradients{number}.csv" in said
            assert (run.path / f"damaged-gradients{number}.csv").exists()
            run.append_gradients([(2, 1, [3.0, 4.0])])
            assert [row.step for row in read(file).rows] == [2]
        run.flush()
        assert run.begin_gradients(LAYERS, step=2) is None


def test_damaged_lines_are_said(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as run:
        run.begin_gradients(LAYERS, step=0)
        run.append_gradients([(step, 1, [1.0, 2.0]) for step in (1, 2, 3)])
        run.gradients_file.write_text(run.gradients_file.read_text().replace("\n2,", "\n?,"))
        assert "1 damaged lines" in (run.begin_gradients(LAYERS, step=3) or "")
        assert [row.step for row in read(run.gradients_file).rows] == [1, 3]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["step,conv1.weight"], "line 1"),
        (["step,epoch"], "line 1"),
        (["step,epoch,a,a"], "line 1"),
        (["step,epoch,a\rb"], "line 1"),
        (["step,epoch,a", "1,1"], "line 2: 2 fields"),
        (["step,epoch,a", "1,1,x"], "line 2"),
        (["step,epoch,a", "one,1,0.5"], "line 2"),
        (["step,epoch,a", "2,1,0.5", "2,1,0.5"], "line 3: step 2 follows step 2"),
    ],
)
def test_what_is_damaged_is_refused(lines: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        read(write(tmp_path, *lines))


def test_a_message_does_not_carry_the_whole_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        read(write(tmp_path, "step,epoch,a", f"1,1,{'x' * 70_000}"))
    assert len(str(raised.value)) < 400


def test_an_empty_file_is_none(tmp_path: Path) -> None:
    assert read(write(tmp_path)) == GradientRows()
    assert gradient_line(1, 2, [0.5]) == "1,2,0.5"
    assert GRADIENT_TABLE.of_layers(LAYERS).names == ("step", "epoch", *LAYERS)
