"""The budget that peers are held to, and the table, without the peers; their own parts where they are installed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import cell, doubling, lowmem_auto, table
from benchmarks.peers.budget import Place, TensorBudget
from benchmarks.peers.task import Found, Task, evaluate, loader, network, sgd, train_steps
from benchmarks.peers.ways import INSTALL, ROWS, Row
from lowmem.core.units import KIB, MIB
from lowmem.measure.out_of_memory import classify
from lowmem.models import skeleton
from lowmem.simulate import OutlineMode
from tests.conftest import environment

ROOT = Path(__file__).parents[3]


def _task(**changes: Any) -> Task:
    values = {"arch": "res20", "block": "basic", "width": 4, "device": "cpu", "budget_bytes": 6 * MIB, "batch": 32}
    return Task(**{**values, "pictures": 256, "eval_pictures": 64, "steps": 2, **changes})


def _refused(budget: TensorBudget, size_bytes: int) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(size_bytes, dtype=torch.uint8)
    return caught.value


def test_the_budget_is_kept_to_the_byte() -> None:
    with TensorBudget(1000) as budget:
        kept = torch.zeros(600, dtype=torch.uint8)
        error = _refused(budget, 401)
        assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 401 bytes" in str(error)
        assert (budget.live_bytes, budget.peak_bytes, budget.refusals) == (600, 600, 1)
        rest = torch.zeros(400, dtype=torch.uint8)
        rest[3:].add_(1)  # neither a view nor an operation in place takes more
        del kept
        assert (budget.live_bytes, budget.peak_bytes) == (400, 1000)


def test_what_does_not_count() -> None:
    data = torch.zeros(4000, dtype=torch.uint8)
    with TensorBudget(1000) as budget:
        budget.exempt([data])
        view = data[10:2000]
        budget.paused = True
        made = torch.zeros(5000, dtype=torch.uint8)
        budget.paused = False
        skeleton("res20", width=8)
        with OutlineMode():
            torch.zeros(1 << 40)
        assert budget.peak_bytes == 0
        with pytest.raises(RuntimeError, match="allocate 5000 bytes"):
            budget.adopt([made])
    assert view.shape[0] == 1990


def test_a_step_passes_at_its_peak_and_fails_one_byte_below() -> None:
    """The peak is that of the simulation, which knows nothing of this count."""
    found = cell.check(_task(), Place("cpu", None))
    assert found["holds"], found["words"]
    assert found["peak_bytes"] == found["simulated_bytes"]


def test_the_backward_pass_is_counted() -> None:
    """A budget that the forward pass fits into, and the backward pass does not."""
    x = torch.randn(64, 64, requires_grad=True)
    size = 64 * 64 * 4
    with TensorBudget(size + KIB) as budget:
        loss = (x * x).sum()
        assert budget.refusals == 0
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            loss.backward()  # the gradient to either factor
        assert budget.live_bytes <= size + KIB


def test_refusals_are_out_of_memory_to_all() -> None:
    error = _refused_error()
    failure = classify(error, "forward")
    assert failure is not None
    assert failure.asked_bytes == 2000


def _refused_error() -> RuntimeError:
    with TensorBudget(1000) as budget:
        return _refused(budget, 2000)


@pytest.mark.parametrize(
    ("module", "function", "distribution"),
    [
        ("lightning.pytorch.utilities.memory", "is_oom_error", "lightning"),
        ("accelerate.utils.memory", "should_reduce_batch_size", "accelerate"),
    ],
)
def test_refusals_are_out_of_memory_to_peers(module: str, function: str, distribution: str) -> None:
    pytest.importorskip(distribution, reason=INSTALL)
    known = getattr(importlib.import_module(module), function)
    assert known(_refused_error())
    assert not known(RuntimeError("shapes do not match"))


def test_a_batch_counts_from_where_it_is_put() -> None:
    with Place("cpu", MIB) as place:
        images, labels = next(iter(loader(place, 16, 8)))
        assert (place.live_bytes or 0) < 8 * KIB  # the loader's order
        before = place.live_bytes or 0
        placed = place.put(images, labels)
        assert place.live_bytes == before + 8 * 3 * 32 * 32 * 4 + 8 * 8
        assert placed[0].data_ptr() == images.data_ptr()


def test_steps_and_evaluation_leave_nothing_alive() -> None:
    task = _task()
    with Place("cpu", 64 * MIB) as place:
        net = network(task)
        standing = place.live_bytes
        optimizer = sgd(net, task)
        train_steps(net, optimizer, place, loader(place, 64, 32, shuffle=True), 2)
        assert 0 <= evaluate(net, place, loader(place, 64, 32)) <= 1
        assert place.phase == "evaluation"
        del optimizer
        net.zero_grad()
        assert place.live_bytes == standing


def test_doubling_finds_the_largest_that_holds() -> None:
    task = _task()
    found = doubling.find(task, Place("cpu", task.budget_bytes))
    tried = [(one["batch"], one["ran"]) for one in found.tried]
    assert tried[-1] == (2 * found.batch, False)
    assert tried[:-1] == [(32 * 2**at, True) for at in range(len(tried) - 1)]
    assert all(one["peak_bytes"] <= task.budget_bytes for one in found.tried)
    assert found.alive_after_bytes == found.alive_before_bytes
    assert doubling.train(task, Place("cpu", task.budget_bytes), found, found.batch).survived
    died = doubling.train(task, Place("cpu", MIB), found, found.batch)
    assert not died.survived
    assert died.how == "out of memory in training step 1"


@pytest.mark.slow
def test_lowmem_trains_and_evaluates_within_what_it_planned() -> None:
    task = _task(budget_bytes=10 * MIB)
    found = lowmem_auto.find(task, Place("cpu", task.budget_bytes), batch=64)
    trained = lowmem_auto.train(task, Place("cpu", task.budget_bytes), found, found.batch)
    assert (found.batch, found.lr) == (64, 0.1)
    assert (trained.survived, trained.how, trained.batch) == (True, "", 64)
    assert trained.train_peak_bytes is not None
    assert trained.train_peak_bytes <= found.carry["predicted_peak_bytes"] <= task.budget_bytes
    # With less than it planned for it goes on all the same, and says how.
    less = lowmem_auto.train(task, Place("cpu", found.carry["predicted_peak_bytes"] * 9 // 10), found, found.batch)
    assert less.survived
    assert "went on under a plan for" in less.how


@pytest.mark.slow
def test_lowmem_auto_scales_the_learning_rate_with_the_batch() -> None:
    task = _task(budget_bytes=10 * MIB, pictures=32)  # so that there is one to choose
    found = lowmem_auto.find(task, Place("cpu", task.budget_bytes))
    assert found.batch == 32
    assert found.lr == pytest.approx(0.1 * 32 / 128)


def test_what_is_not_installed_is_a_row_that_says_so() -> None:
    assert Row(title="", module="", needs="no-such-distribution").version is None
    record = {
        "conditions": dict.fromkeys(("cpu", "cores", "python", "torch", "revision", "date", "command"), "x")
        | {"load_average_1min": 0.0},
        "asked": {"task": vars(_task()), "eval_batch": 512, "threads": 1},
        "cells": {"timm/find": {"version": None, "missing": INSTALL}},
    }
    assert f"| – | {INSTALL} |" in table.markdown(record)


def test_what_becomes_of_the_recipe() -> None:
    task = vars(_task(batch=128))
    given, found, fewer, rule = (
        {"batch": batch, "lr": lr, "tried": tried}
        for batch, lr, tried in ((128, 0.1, []), (128, 0.1, [{}]), (52, 0.1, [{}]), (64, 0.05, []))
    )
    assert table.recipe(given, task) == "kept"
    assert table.recipe(found, task).startswith("the same, as it happens")
    assert table.recipe(fewer, task) == "batch 128 → 52, lr left as it was"
    assert table.recipe(rule, task) == "batch 128 → 64, lr 0.1 → 0.05"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.needs not in ("torch", "lowmem")])
def test_peers_find_and_train(name: str) -> None:
    row = ROWS[name]
    if row.version is None:
        pytest.skip(INSTALL)
    task = _task()
    way = row.load()
    found: Found = way.find(task, Place("cpu", task.budget_bytes), **row.options)
    assert not all(one["ran"] for one in found.tried)
    assert any(one["ran"] for one in found.tried)
    assert way.train(task, Place("cpu", task.budget_bytes), found, found.batch).survived


@pytest.mark.slow
def test_the_script_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers.run", "--arch", "res20", "--width", "4", "--budget", "8M"]
    command += ["--threads", "1", "--out", str(tmp_path), "--rounds", "1", "--pictures", "512", "--only"]
    for only, asked in (("doubling", 5), ("doubling", 0), ("doubling,lowmem-auto", 4)):
        done = subprocess.run(
            [*command, only], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert sum(line.endswith(" s") for line in done.stderr.splitlines()) == asked
    record = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert record["cells"]["check"]["holds"]
    assert {"doubling/find", "lowmem-auto/evaluate", "speed"} <= set(record["cells"])
    assert (tmp_path / "peers.md").read_text(encoding="utf-8").count("| yes |") >= 2
