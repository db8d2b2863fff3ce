"""Imports go downward only (the rooms of the design), and `lowmem --help` stays free of torch (invariant 11)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowmem"

# A room, and what it may import of lowmem. The leaves may be imported by every room.
LEAVES = {"units", "errors", "addressed", "shipped", "places", "reading"}
MAY_IMPORT: dict[str, set[str]] = {
    "units": set(),
    "errors": {"units"},
    "addressed": set(),
    "shipped": {"errors"},
    "places": set(),
    "reading": set(),
    "environment": {"", "measure", "remat"},
    "config": LEAVES,
    "settings": LEAVES | {"config"},
    "cards": LEAVES,
    "plan": {"units", "errors"},
    "models": LEAVES | {"config"},
    "remat": LEAVES | {"plan"},
    "simulate": {"units", "errors"},
    # Like remat it is executed in a run and simulated before one: the planner sees what reduction takes by running it.
    "distributed": {"units", "errors", "plan", "measure"},
    "measure": {"units", "errors"},
    "data": LEAVES | {"config"},
    "runs": LEAVES | {"config"},
    "choose": LEAVES | {"config", "settings", "cards", "models", "plan", "remat", "simulate", "measure", "distributed"},
    "train": LEAVES | {"config", "settings", "models", "plan", "remat", "data", "runs", "measure", "distributed"},
    # A trial does what a run does: it draws its batches from data/, executes its plan by remat/, and where it is a
    # whole (if short) run, it has a folder of runs/.
    "bench": LEAVES
    | {"config", "settings", "cards", "plan", "models", "remat", "data", "runs", "choose", "train", "measure"}
    | {"environment"},
    "report": LEAVES | {"config", "runs"},
}
# preflight and confirm are what a run does before its first step; confirm needs both what was chosen (choose) and what
# tries it (bench), so it is in neither of them.
# The doctor looks at everything a run needs: settings, data, models, the driver, what `train` would refuse.
# reproduce looks at several runs as a job: with the eyes of the planner (choose) at those to come, and of runs at those
# that have begun.
# together and decide_shares are how several processes (distributed) begin and go on with a run: what is read, planned
# and written by whom.
# belonging compares what is on disk (runs) with the network (models) and the identity a run records (train).
ANYTHING = {
    "belonging", "decide", "decide_shares", "together", "resuming", "doctor", "fork", "preflight", "confirm",
    "reproduce", "api", "cli", "__init__", "__main__",
}  # fmt: skip


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "lowmem" else [f"lowmem.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path} imports relatively; write the whole name")
        for name in names:
            if name == "lowmem" or name.startswith("lowmem."):
                rooms.add(name.partition(".")[2].partition(".")[0])
    return rooms


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    room = _room(path)
    if room in ANYTHING:
        return
    assert room in MAY_IMPORT, f"lowmem/{room} is no room of the design: add it to the table with its reason"
    allowed = MAY_IMPORT[room] | {room}
    assert _imported_rooms(path) <= allowed, f"{path.relative_to(PACKAGE)} imports {_imported_rooms(path) - allowed}"


def _imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            modules.add(str(node.args[0].value))  # importlib.import_module("pynvml")
    return modules


@pytest.mark.parametrize(("library", "module"), [("pynvml", "measure/nvml.py"), ("tensorboard", "runs/event_files.py")])
def test_only_one_module_knows_an_optional_library(library: str, module: str) -> None:
    knowing = {path.relative_to(PACKAGE).as_posix() for path in FILES if library in _imported_modules(path)}
    assert knowing == {module}


@pytest.mark.parametrize("room", ["api.py", "doctor", "reproduce"])
def test_only_the_command_line_imports_itself(room: str) -> None:
    files = [path for path in FILES if _room(path) == room.removesuffix(".py")]
    assert files
    assert not [path for path in files if "cli" in _imported_rooms(path)]


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"past 400 lines: {long}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    probe = (
        "import sys\n"
        "from lowmem.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
