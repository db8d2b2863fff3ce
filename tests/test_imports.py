"""Imports go downward only (the rooms of the design), and `lowmem --help` stays free of torch (invariant 11)."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowmem"

# A room, and those it stands on: it may import them and whatever they stand on. `lifecycle` puts a run together and
# `cli` prints anything; no other room is exempt.
STANDS_ON: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "plan": {"core"},
    "measure": {"core"},
    "models": {"config"},
    "data": {"config"},
    "distributed": {"measure"},
    "remat": {"plan", "measure"},
    "step": {"remat", "distributed", "config"},
    "simulate": {"step"},
    "calibrate": {"simulate", "models", "isolate"},
    "choose": {"calibrate", "data"},
    "isolate": {"measure"},
    "trial": {"choose", "isolate"},
    "runs": {"config"},
    "train": {"step", "data", "runs", "models"},
    "lifecycle": {"train", "trial", "report"},
    "report": {"runs"},
    "bench": {"trial", "train"},
    "reproduce": {"choose", "train", "report"},
    "doctor": {"choose", "runs", "isolate"},
    "inference": {"choose", "train", "report"},
    "cli": {"lifecycle", "bench", "reproduce", "doctor", "inference"},
}
EXEMPT = {"lifecycle", "cli"}
MOST_FLOORS = 10


def _below(room: str) -> set[str]:
    """All that a room stands on."""
    return STANDS_ON[room].union(*map(_below, STANDS_ON[room]))


def _floor(room: str) -> int:
    return 1 + max(map(_floor, STANDS_ON[room]), default=0)


def test_rooms_have_few_floors() -> None:
    assert max(map(_floor, STANDS_ON)) <= MOST_FLOORS


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
    if room in EXEMPT or room.startswith("__"):
        return
    assert room in STANDS_ON, f"lowmem/{room} is no room of the design: add it to the table with its reason"
    odd = _imported_rooms(path) - _below(room) - {room, ""}
    assert not odd, f"{path.relative_to(PACKAGE)} imports {odd}"


def _imported_files(path: Path) -> set[Path]:
    """Also those that only types or functions import; a package's own text may name what is in it."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            place = PACKAGE.parent / name.replace(".", "/")
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file in FILES}
    return found - {path, path.parent / "__init__.py"}


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({path: _imported_files(path) for path in FILES}).prepare()


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert not {name: files for name, files in places.items() if len(files) > 1}


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


@pytest.mark.parametrize(
    ("library", "module"),
    [
        ("pynvml", "measure/nvml.py"),
        ("tensorboard", "runs/event_files.py"),
        ("onnx", "inference/export.py"),
        ("onnxruntime", "inference/export.py"),
    ],
)
def test_only_one_module_knows_an_optional_library(library: str, module: str) -> None:
    knowing = {path.relative_to(PACKAGE).as_posix() for path in FILES if library in _imported_modules(path)}
    assert knowing == {module}


@pytest.mark.parametrize("room", ["lifecycle", "doctor", "reproduce"])
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
