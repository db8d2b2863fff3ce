"""Which packages a machine lacks for this project, and the one command that fetches their wheels elsewhere.

The build backend is not among them: the project is used from its folder, through PYTHONPATH. No torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_ROOT = Path(__file__).resolve().parents[2]
# What the tests of a card need beside the package itself; linters and builders stay at home.
_TESTS = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis")
# A machine with a card that can be had for minutes, as of November 2026: what of all that is needed it has. For another
# one give `prepare` its own list.
PRESENT = """
torch 2.11.0+cu130, torchvision 0.26.0, numpy, safetensors, typer, rich, markdown-it-py, pyyaml, matplotlib, pillow,
nvidia-ml-py, filelock, packaging, typing-extensions, pytest, pytest-xdist, pytest-timeout, hypothesis, timm
"""
PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def names_of(text: str) -> set[str]:
    """Package names in a list like PRESENT, or as `pip list` and `pip freeze` print it."""
    entries = re.split(r"[,\n]", text)
    found = (re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", entry) for entry in entries)
    return {_plain(match.group(1)) for match in found if match}


def missing(present: set[str]) -> list[str]:
    """`name==version` of what is declared, directly or by what is missing itself, and not present; versions are those
    installed here. Raises PackageNotFoundError if this environment lacks one of them, too."""
    declared = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tests = [one for one in declared["optional-dependencies"]["test"] if Requirement(one).name in _TESTS]
    wanted, found = list(declared["dependencies"]) + tests, dict[str, str]()
    while wanted:
        name = _plain(Requirement(wanted.pop()).name)
        if name in present or name in found:
            continue
        found[name] = metadata.version(name)
        wanted += _needed(metadata.requires(name) or ())
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def download_command(wheels: Iterable[str], folder: str) -> str:
    """For pip, on a machine that reaches a package index."""
    platforms = " ".join(f"--platform {name}" for name in _PLATFORMS)
    options = f"--no-deps --only-binary=:all: --implementation cp --python-version {PYTHON} {platforms}"
    return f"python3 -m pip download {options} -d {folder} {' '.join(wheels)}"


def _needed(requirements: Iterable[str]) -> list[str]:
    """Without those of extras and of other pythons or systems."""
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": ""}
    there |= {"os_name": "posix", "platform_system": "Linux", "platform_machine": "x86_64"}
    parsed = map(Requirement, requirements)
    return [str(one) for one in parsed if one.marker is None or one.marker.evaluate(there)]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
