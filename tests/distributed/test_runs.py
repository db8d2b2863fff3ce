"""Whole runs of several processes, as a user starts them: saved, killed, started again, on more and fewer processes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli.main import _run
from lowmem.measure.host import free_host_bytes
from lowmem.plan.record import Plan
from tests.conftest import assert_same_run
from tests.distributed.torchrun import Torchrun, torchrun, wait_for
from tests.tiny import arguments

# An epoch of 6 steps, the last of 10 pictures.
SMALL = (
    "model.width=4", "train.batch=32", "data.train_subset=170", "data.test_subset=40", "checkpoint.every_steps=4",
    "train.memory_format=contiguous", "train.precision=auto",
)  # fmt: skip
TRAIN = ("lowmem", "train", *arguments(*SMALL))
STEPS = 18
RESUME = ("lowmem", "resume")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def processes_of(run: Path) -> list[int]:
    """The pids of the run's processes on this machine, rank 0 first."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if folder.name.isdigit() and str(run).encode() in command and b"torch.distributed.run" not in command:
            rank = [one for one in variables if one.startswith(b"RANK=")]
            if rank:
                found[int(rank[0][5:])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def alone(*arguments: str) -> str:
    """`ARGUMENTS` of lowmem in this process, which must end well; what it printed."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = _run(list(arguments))
    assert code == 0, said.getvalue()
    return said.getvalue()


def losses(run: Path) -> list[float]:
    with open(run / "steps.csv", newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, from the first step to the last."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = torchrun(folder, 2, *TRAIN, "--out", str(folder / "run"))
    assert code == 0, output
    assert "2 processes: a batch of 32 is 16 + 16 pictures" in output
    assert "each one's batch norm sees its own only" in output
    assert output.count("epoch 3/3") == 1, "rank 0 alone talks"
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, which torchrun was told to end after some steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Torchrun(folder, 2, *TRAIN, "--out", str(folder / "run"))
    wait_for(folder / "run" / "steps.csv", "\n8,")
    run.signal(signal.SIGTERM)
    run.wait()
    assert "SIGTERM: saved at epoch" in run.output, run.output
    (said,) = events(folder / "run", "signal")
    assert 8 <= said["step"] < STEPS, "it was stopped in its middle"
    return folder / "run"


def resumed(run: Path, to: Path, processes: int, *arguments: str) -> tuple[Path, str]:
    shutil.copytree(run, to / "run")
    if processes == 1:
        return to / "run", alone("resume", str(to / "run"), *arguments)
    code, output = torchrun(to, processes, *RESUME, str(to / "run"), *arguments)
    assert code == 0, output
    return to / "run", output


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes under a budget that their parts do not fit into as they are, half of an epoch."""
    folder = tmp_path_factory.mktemp("planned")
    code, output = torchrun(
        folder,
        2,
        *TRAIN,
        "--set",
        "train.precision=fp32",
        "--tensors",
        TENSORS,
        "--set",
        "train.max_steps=3",
        "--out",
        "run",
    )
    assert code == 0, output
    assert "batch 32 over 2 processes" in output
    return folder / "run"


TENSORS = "2400K"


@pytest.mark.slow
def test_a_planned_run_has_everybodys_plan_and_memory(planned: Path) -> None:
    plans = [Plan.from_json(json.loads((planned / name).read_text())) for name in ("plan.json", "plan-1.json")]
    assert [plan.shares for plan in plans] == [(16, 16), (16, 16)]
    assert [plan.batch for plan in plans] == [16, 16]
    assert all(plan.predicted.extra_flops for plan in plans)
    (measured,) = events(planned, "measured")
    assert len(measured["processes"]) == 2
    for one in measured["processes"]:
        assert one["measured_peak_bytes"] <= one["budget_bytes"] == 2400 << 10
        # The prediction counts in the allocator's units of 512 bytes, of which a net this thin has many half empty.
        assert 0.85 * one["predicted_peak_bytes"] < one["measured_peak_bytes"] <= one["predicted_peak_bytes"]
    assert events(planned, "start")[0]["processes"] == 2
    assert "2 processes" in alone("verify", str(planned))


@pytest.mark.slow
def test_a_planned_run_goes_on_with_its_plans(planned: Path, tmp_path: Path) -> None:
    run, output = resumed(planned, tmp_path, 2, "--set", "train.max_steps=6")
    assert "warning" not in output
    assert not events(run, "replan")
    assert len(losses(run)) == 6


@pytest.mark.slow
def test_the_processes_of_a_machine_share_its_host_memory(planned: Path, tmp_path: Path) -> None:
    more = ("--set", "train.max_steps=6", "--set", "memory.link=12")
    without, _ = resumed(planned, tmp_path / "without", 2, *more)
    run, output = resumed(planned, tmp_path / "with", 2, *more, "--set", "memory.host=auto")
    assert len(events(run, "replan")) == 1
    for name in ("plan.json", "plan-1.json"):
        assert Plan.from_json(json.loads((run / name).read_text())).schedule.hosts, output
    assert_same_run(run, without)
    free = free_host_bytes()
    assert free is not None
    host, out = f"memory.host={free * 2 // 3}", tmp_path / "run"
    code, output = torchrun(tmp_path, 2, *TRAIN, "--tensors", TENSORS, "--set", host, "--out", str(out))
    assert code == 1
    assert "for each of 2 processes" in output
    assert not out.exists()


@pytest.mark.slow
def test_a_fork_of_a_planned_run_is_planned_for_one_process(planned: Path, tmp_path: Path) -> None:
    """Not with one process's plan, which would be accumulation."""
    out, changes = str(tmp_path / "fork"), ("--set", "optim.lr=0.01", "--set", "train.max_steps=6")
    said = alone("fork", str(planned), "--at", "last", *changes, "--out", out, "--dry-run")
    assert "plan: batch 32" in said


@pytest.mark.slow
def test_a_planned_run_of_two_goes_on_as_one(planned: Path, tmp_path: Path) -> None:
    run, output = resumed(planned, tmp_path, 1, "--set", "train.max_steps=6")
    assert "saved by 2 processes, going on with 1 process: the same pictures in the same order" in output
    plan = Plan.from_json(json.loads((run / "plan.json").read_text()))
    assert (plan.batch, plan.shares) == (32, (32,))
    assert not (run / "plan-1.json").exists()
    assert len(losses(run)) == 6


def test_stopped_and_resumed_is_the_whole_run_bit_for_bit(whole: Path, stopped: Path, tmp_path: Path) -> None:
    run, output = resumed(stopped, tmp_path, 2)
    assert "warning" not in output
    assert_same_run(run, whole)


def test_two_processes_go_on_as_one(whole: Path, stopped: Path, tmp_path: Path) -> None:
    run, _ = resumed(stopped, tmp_path, 1)
    at = events(stopped, "signal")[0]["step"]
    assert losses(run)[:at] == losses(whole)[:at]
    assert len(losses(run)) == STEPS


@pytest.mark.slow  # the quick one goes the other way
def test_one_process_goes_on_as_two_and_these_as_one(tmp_path: Path) -> None:
    """With batch norm over all pictures: to rounding the same run, so the same pictures in the same order."""
    settings = (*TRAIN, "--sync-bn", "--set", "optim.lr=0.001")
    one, part = tmp_path / "one", tmp_path / "part"
    alone(*settings[1:], "--out", str(one))
    alone(*settings[1:], "--out", str(part / "run"), "--set", "train.max_steps=7")
    run = part / "run"
    code, output = torchrun(part, 2, *RESUME, str(run), "--set", "train.max_steps=13")
    assert code == 0, output
    assert "saved by 1 process, going on with 2 processes" in output
    assert "another rounding" in events(run, "warning")[-1]["what"]
    said = alone("resume", str(run), "--set", "train.max_steps=1000")
    assert "saved by 2 processes, going on with 1 process" in said
    assert len(losses(run)) == STEPS
    assert losses(run)[:7] == losses(one)[:7]
    assert losses(run) == pytest.approx(losses(one), rel=2e-3)


@pytest.mark.slow  # quick: a process that is killed, below, and what a restart is told (tests/unit/lifecycle)
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_takes_the_others_down_and_all_are_started_again(
    rank: int, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    run = Torchrun(tmp_path, 2, *TRAIN, "--out", str(path), max_restarts=1)
    wait_for(path / "steps.csv", "\n8,")
    os.kill(processes_of(path)[rank], signal.SIGKILL)
    assert run.wait() == 0, run.output
    assert "started again after a failure (restart 1): going on with" in run.output
    assert len(events(path, "resume")) == 1
    assert not events(path, "warning"), "as many processes as before"
    assert_same_run(path, whole)


def test_a_killed_process_is_named_and_nobody_hangs(tmp_path: Path) -> None:
    """What is left saves the run as it was before the step in which the other one died. `wait` has the
    limit, less than the settings' own patience."""
    path = tmp_path / "run"
    run = Torchrun(tmp_path, 2, *TRAIN, "--out", str(path))
    wait_for(path / "steps.csv", "\n8,")
    os.kill(processes_of(path)[1], signal.SIGKILL)
    assert run.wait() == 1
    assert "another process of the run is gone" in run.output
    cause = run.output[run.output.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "Signal 9 (SIGKILL)" in cause
    (lost,) = events(path, "peer-lost")
    assert events(path, "checkpoint")[-1]["step"] == lost["step"] >= 8


@pytest.mark.slow
def test_a_bug_in_one_process_in_the_middle_of_its_backward_pass(tmp_path: Path) -> None:
    """The others wait for its sums: nobody may wait for long, and torchrun's summary has the cause."""
    code, output = torchrun(tmp_path, 2, "tests.distributed.broken", *TRAIN[1:], "--out", str(tmp_path / "run"))
    assert code == 1
    cause = output[output.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "stage 3 is broken" in cause
    assert events(tmp_path / "run", "peer-lost")[0]["step"] == 5


@pytest.mark.slow
def test_what_all_did_wrong_is_said_once(whole: Path, tmp_path: Path) -> None:
    """With its own exit code in torchrun's summary."""
    code, output = torchrun(tmp_path, 2, *TRAIN, "--out", str(whole))
    assert code == 1
    assert output[: output.index("lowmem FAILED")].count("is never overwritten") == 1
    assert "exitcode  : 2" in output


@pytest.mark.slow
def test_unlike_cards_with_a_batch_that_they_choose(tmp_path: Path) -> None:
    """The faster card takes more of every batch; a resume replays that; four processes go on with what two began."""
    run = tmp_path / "run"
    whole = tmp_path / "whole"
    asked = arguments(*SMALL, "train.batch=auto", "train.precision=fp32", "memory.card=gtx1050ti,gtx1070")
    train = ("lowmem", "train", *asked)
    code, output = torchrun(tmp_path, 2, *train, "--out", str(whole))
    assert code == 0, output
    code, output = torchrun(tmp_path, 2, *train, "--out", str(run), "--set", "train.max_steps=3")
    assert code == 0, output
    plans = [Plan.from_json(json.loads((run / name).read_text())) for name in ("plan.json", "plan-1.json")]
    small, large = plans[0].shares
    assert [plan.batch for plan in plans] == [small, large]
    assert 0 < small < large
    shutil.copytree(run, tmp_path / "four")
    code, output = torchrun(tmp_path, 2, *RESUME, str(run), "--set", "train.max_steps=1000")
    assert code == 0, output
    assert_same_run(run, whole)
    four = tmp_path / "four"
    more = ("--set", "train.max_steps=1000", "--set", "memory.card=gtx1070")
    code, output = torchrun(tmp_path, 4, *RESUME, str(four), *more)
    assert code == 0, output
    assert "saved by 2 processes, going on with 4 processes" in output
    assert len(losses(four)) == len(losses(whole))
    assert losses(four)[:3] == losses(whole)[:3]
    assert (four / "plan-3.json").is_file()
