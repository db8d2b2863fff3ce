"""Figures are the same whatever is set outside, and nothing that is set there ends a run."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

import lowmem
from lowmem.report.chart import log_limits, log_ticks
from lowmem.report.figures import draw_rate_curve
from lowmem.report.method_figures import draw_memory_curve
from lowmem.report.style import FORMATS

PROBE = (
    "import hashlib, os, sys\n"
    "before = dict(os.environ)\n"
    "from lowmem.core.errors import LowmemError\n"
    "try:\n"
    "    from lowmem.report.figures import draw_rate_curve\n"
    "except LowmemError as error:\n"
    "    sys.exit(str(error))\n"
    "assert before == dict(os.environ), 'what others find is changed'\n"
    "assert 'matplotlib.pyplot' not in sys.modules\n"
    "print(hashlib.sha256(draw_rate_curve('a', *[[(0.0, 0.1), (2.0, 0.1)]] * 3, 2.0)).hexdigest())\n"
)


def rate_curve() -> bytes:
    return draw_rate_curve("a", *[[(0.0, 0.1), (2.0, 0.1)]] * 3, 2.0)


def drawn_with(folder: Path, probe: str = PROBE, **outside: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lowmem.__file__).parents[1]), **outside}
    return subprocess.run(
        [sys.executable, "-c", probe], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "outside",
    [
        {"MPLBACKEND": "nonsense"},
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},  # of a notebook, in which it is not installed here
        {"MATPLOTLIBRC": "damaged"},
        {"MATPLOTLIBRC": "colourful"},
        {"MPLCONFIGDIR": "damaged/none"},  # cannot be made: the one above is a file
    ],
    ids=lambda outside: "-".join(*outside.items()),
)
def test_what_is_set_outside_is_nothing_to_a_figure(tmp_path: Path, outside: dict[str, str]) -> None:
    (tmp_path / "damaged").write_bytes(b"\xff\xfe\x00nothing: \n")
    (tmp_path / "colourful").write_text("axes.facecolor: red\nfont.size: 30\nbackend: nonsense\nno.such: 1\n")
    drawn = drawn_with(tmp_path, **outside)
    assert drawn.stderr == ""
    assert drawn.stdout.strip() == hashlib.sha256(rate_curve()).hexdigest()


@pytest.mark.parametrize("backend", ["svg", "", "nonsense"])
def test_what_the_caller_draws_is_as_it_was_set(tmp_path: Path, backend: str) -> None:
    """The first to load matplotlib must not settle for everybody which windows there are, nor how lines look."""
    (tmp_path / "mine").write_text("lines.linewidth: 7\nno.such: 1\n")
    asks = "import matplotlib\nprint(matplotlib.get_backend(auto_select=False), matplotlib.rcParams['lines.linewidth'])"
    drawn = drawn_with(tmp_path, PROBE + asks, MPLBACKEND=backend, MATPLOTLIBRC="mine")
    assert drawn.stderr == ""
    assert drawn.stdout.splitlines()[1] == f"{'svg' if backend == 'svg' else None} 7.0"


def test_a_damaged_file_that_cannot_be_passed_by(tmp_path: Path) -> None:
    """The one in the working folder is read before any that the environment names."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\x00")
    drawn = drawn_with(tmp_path)
    assert drawn.returncode == 1
    assert "matplotlib cannot be loaded" in drawn.stderr
    assert "matplotlibrc" in drawn.stderr


def test_nor_what_a_program_has_set() -> None:
    usual = rate_curve()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert rate_curve() == usual
        assert matplotlib.rcParams["font.size"] == 30


def test_nothing_else_loads_it() -> None:
    package = Path(lowmem.__file__).parent
    loads = re.compile(r"^\s*(from|import) matplotlib", re.MULTILINE)
    found = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if loads.search(path.read_text())]
    assert found == ["report/agg.py"]


HEADS = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_what_its_name_says(kind: str) -> None:
    def draw() -> bytes:
        return draw_memory_curve("title", {"lowmem": [(10 << 20, 0.4), (50 << 20, 0.0)]}, 30 << 20, kind)

    data = draw()
    assert data.startswith(HEADS[kind])
    assert data == draw()
    assert b"Matplotlib v" not in data


@pytest.mark.parametrize(
    "limits",
    [log_limits(values) for values in ((0.1,), (0.09, 0.1), (0.3, 0.9), (2, 9), (12, 55), (0.0016, 2.3), (1e-9, 3e6))],
    ids=lambda limits: f"{limits[0]:.2g}-{limits[1]:.2g}",
)
def test_a_log_axis_has_several_numbers(limits: tuple[float, float]) -> None:
    ticks = log_ticks(*limits)
    assert 3 <= len(ticks) <= 12
    assert ticks == sorted(ticks)
    assert limits[0] <= ticks[0] < ticks[-1] <= limits[1]
