"""The names of the package's front door, loaded on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lowmem


def test_the_four_calls_of_the_design() -> None:
    model = lowmem.models.build("res20", width=4)
    plan = lowmem.make_plan(model, batch=16, budget="6G")
    assert isinstance(plan, lowmem.Plan)
    planned = lowmem.apply_plan(model, plan)
    assert planned(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert callable(lowmem.run_training)


def test_the_package_itself_is_light() -> None:
    probe = "import sys, lowmem; lowmem.__version__; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0


def test_the_public_names_are_listed_without_being_imported() -> None:
    probe = "import sys, lowmem; assert set(dir(lowmem)) == set(lowmem.__all__); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0
    assert all(getattr(lowmem, name) is not None for name in dir(lowmem))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lowmem.trian  # noqa: B018
