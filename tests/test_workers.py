"""A worker that dies ends a run of the test suite's own command: with a failure that names the test, and soon."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment

ROOT = Path(__file__).parent.parent
DYING = {
    "in a test": "import os\ndef test_dies(): os.abort()\n",
    "and its child lives on": (
        "import os, time\ndef test_dies():\n    if os.fork() == 0:\n        time.sleep(200)\n        os._exit(0)\n"
        "    os.abort()\n"
    ),
    "while it collects": "import os\nos.abort()\n",
    "in a test that hangs": (
        "import pytest, time\n@pytest.mark.timeout(1)\ndef test_dies():\n    while True: time.sleep(1)\n"
    ),
}
RARER = ("and its child lives on", "while it collects", "in a test that hangs")
HOOKS = "from tests import workers\nfrom tests.workers import *\n"
IMPATIENT = HOOKS + "workers.PATIENCE_SECONDS = 2.0\n"
PASSING = "import pytest\n@pytest.mark.parametrize('number', range(4))\ndef test_passes(number): pass\n"
# Another worker's, which takes its time: the run does not wait for it.
LONG = "import time\ndef test_long(): time.sleep(300)\n"


def _run(folder: Path, files: dict[str, str]) -> tuple[int, str, float]:
    """Code, output (a file's: a pipe would be open as long as anybody holds it) and seconds of pytest with this
    project's options."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in {"conftest.py": HOOKS, **files}.items():
        (folder / name).write_text(text)
    began = time.monotonic()
    with open(folder / "said.txt", "w+") as said:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "."],
            cwd=folder,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=240,
        )
        took = time.monotonic() - began
        said.seek(0)
        return done.returncode, said.read(), took


@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.slow] if how in RARER else []) for how in DYING])
def test_a_worker_that_dies_ends_the_run(tmp_path: Path, how: str) -> None:
    dying = {"test_b_dies.py": DYING[how], "test_d_passes.py": PASSING, "test_e_passes.py": PASSING}
    others = {"test_c_long.py": LONG} if "def test_dies" in DYING[how] else {}
    if "child" in how:
        others["conftest.py"] = IMPATIENT
    code, said, seconds = _run(tmp_path, {"test_a_passes.py": PASSING, **dying, **others})
    assert code == 1, said
    assert seconds < 200, said  # of the 300 of the long one; alone it takes 15
    if "child" in how:
        assert "what it has forked lives on" in said
    elif others:
        assert "crashed while running 'test_b_dies.py::test_dies'" in said


@pytest.mark.slow
def test_a_run_without_deaths_passes(tmp_path: Path) -> None:
    code, said, _ = _run(tmp_path, {f"test_{name}.py": PASSING for name in "abc"})
    assert code == 0, said
    assert "12 passed" in said
