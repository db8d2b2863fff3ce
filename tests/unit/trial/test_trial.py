"""A trial in a process of its own: it measures what was predicted, and whatever goes wrong is a refusal."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lowmem.choose.planning import make_plan
from lowmem.core.units import MIB
from lowmem.models import skeleton
from lowmem.trial.trial import OUT_OF_MEMORY, Trial, TrialResult, run_trial
from lowmem.trial.ways import PER_BLOCK, PLANNED
from lowmem.trial.worker import work

TINY: dict[str, Any] = {"arch": "res20", "block": "basic", "width": 8, "batch": 32, "steps": 1, "warmup": 1}


@pytest.fixture(scope="module")
def plain() -> TrialResult:
    return run_trial(Trial(**TINY, eval_batch=40))


def test_what_a_trial_tells(plain: TrialResult) -> None:
    assert plain.refused is None
    assert plain.finite
    assert plain.step_seconds is not None
    assert plain.peak_allocated_bytes is not None
    assert plain.eval_peak_allocated_bytes is not None
    assert plain.eval_peak_allocated_bytes < plain.peak_allocated_bytes
    assert plain.peak_reserved_bytes is None
    assert len(plain.losses) == 2


def test_a_plan_takes_what_was_predicted_and_computes_the_same(plain: TrialResult) -> None:
    plan = make_plan(skeleton("res20", width=8), batch=32, budget="10M")
    assert "KEEP{}" in plan.blocks().values()
    result = run_trial(Trial(**TINY, way=PLANNED, plan=plan.to_json(), eval_batch=32))
    assert result.peak_allocated_bytes == pytest.approx(plan.predicted.peak_allocated_bytes, rel=0.02)
    assert result.losses == plain.losses


def test_the_librarys_checkpointing_is_tried_likewise(plain: TrialResult) -> None:
    found = work(Trial(**TINY, way=PER_BLOCK))  # in this process: what it does, not where
    assert tuple(found["losses"]) == plain.losses
    assert plain.peak_allocated_bytes is not None
    assert found["peak_allocated_bytes"] < plain.peak_allocated_bytes


_LIMITED = """
import resource, runpy, torch
import lowmem.trial.worker
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + {spare}, -1))
runpy.run_module("lowmem.trial.trial", run_name="__main__")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by /proc")
def test_out_of_memory_is_a_refusal() -> None:
    command = [sys.executable, "-c", _LIMITED.format(spare=300 * MIB)]
    result = run_trial(Trial(**{**TINY, "batch": 8192}), command=command)
    assert (result.refused, result.out_of_memory) == (OUT_OF_MEMORY, True)


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("raise SystemExit('no such kernel')", "crashed: no such kernel"),
        ("raise RuntimeError('CUDA error: out of memory')", OUT_OF_MEMORY),
        ("import os; os.abort()", "crashed"),
        ("pass", "answered nothing"),
        ("print('hello')", "answered with 'hello'"),
        ("print('{\"surprise\": 1}')", "unknown keys: surprise"),
        ("import time; time.sleep(60)", "took longer than 3 s"),
    ],
)
def test_a_child_that_goes_wrong_is_a_refusal(code: str, refused: str) -> None:
    result = run_trial(Trial(**TINY), timeout_seconds=3, command=[sys.executable, "-c", code])
    assert refused in (result.refused or "")
    assert result.out_of_memory == (refused == OUT_OF_MEMORY)


def test_a_command_that_is_not_there_is_a_refusal() -> None:
    assert "could not be started" in (run_trial(Trial(**TINY), command=["no-such-command-here"]).refused or "")


def test_a_wrong_trial_is_a_refusal() -> None:
    assert "no way of doing a step" in (run_trial(Trial(**TINY, way="by hand")).refused or "")
