"""Killed in the middle of a save, of a row, of setting up, and at random: the run goes on and ends with the same bits.

All operations one by one, power cuts, and hundreds of random moments: `python benchmarks/kill.py`.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lowmem.core.errors import ExitCode
from lowmem.plan.record import Plan
from tests.conftest import assert_same_run
from tests.faults.kills import (
    EVERY_STEPS,
    SMALL,
    STEPS,
    Story,
    differing_bits,
    go_on,
    litter,
    newest,
    survive,
    unreadable_events,
)
from tests.faults.lives import AVAILABLE, Death, Life, Lives

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs fork, /proc and process descriptors")

Survives = Callable[[Sequence[Death]], Story]
KINDS = {"open", "write", "flush", "fsync", "close", "replace", "delete", "mkdir"}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with Lives(tmp_path_factory.mktemp("lives")) as parent:
        yield parent


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Life]:
    run = tmp_path_factory.mktemp("whole") / "run"
    life = go_on(lives, SMALL, run, Death())
    assert (life.code, life.step) == (0, STEPS), life.output
    return run, life


@pytest.fixture
def survives(lives: Lives, whole: tuple[Path, Life], tmp_path: Path) -> Survives:
    """A run dies these deaths one after another: `survive` holds each of them to its bound."""

    def judged(deaths: Sequence[Death]) -> Story:
        run = tmp_path / "run"
        story = survive(lives, SMALL, run, deaths)
        assert_same_run(run, whole[0])
        assert litter(run, whole[0]) == set()
        assert unreadable_events(run) == []
        shutil.rmtree(run)
        return story

    return judged


def _span(operations: tuple[str, ...], first: str, last: str) -> list[str]:
    begin = operations.index(first)
    return list(operations[begin : operations.index(last, begin) + 1])


def _deaths(operations: Sequence[str]) -> list[Death]:
    """One at each operation, and one in the middle of each write."""
    once = list(dict.fromkeys(operations))
    return [
        Death(on=line, half=half) for line in once for half in ((False, True) if line.startswith("write") else (False,))
    ]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_at_each_operation_up_to_the_commit(every: int, whole: tuple[Path, Life], survives: Survives) -> None:
    """The weights, the row of metrics.csv, the checkpoint: each process takes the epoch's last step and dies."""
    operations = _span(
        whole[1].operations, "open weights/best.safetensors.partial", "replace checkpoints/step-00000005"
    )
    assert {operation.split()[0] for operation in operations} == KINDS - {"delete"}
    deaths = _deaths(operations)
    assert {death.on for death in deaths} == set(operations)
    story = survives(deaths[::every])
    assert [death.operation for death in story.deaths] == [death.on for death in deaths[::every]]
    # The step since the checkpoint before, and one that was done while this one was written; or it died as it resumed.
    lost = [death.lost for death in story.deaths]
    assert set(lost) <= {0, 1, 2}
    assert every > 1 or sum(map(bool, lost)) > len(lost) // 2


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (3, 6))])
def test_at_each_operation_after_the_commit(first: int, survives: Survives) -> None:
    """The folder's fsync, the pruning of an older generation, the event."""
    step = "checkpoints/step-????????"
    files = ("manifest.json", "state.json", "optimizer.safetensors", "model.safetensors")
    patterns = ["fsync checkpoints", *(f"delete {step}/{name}" for name in files), f"delete {step}"]
    deaths = [Death(on=pattern) for pattern in patterns]
    deaths += [Death(on="write events.jsonl", half=True), Death(on="fsync events.jsonl")]
    assert 6 < len(deaths) <= 9
    story = survives(deaths[first : first + 3])
    assert len(story.deaths) == len(deaths[first : first + 3])


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_each_of_these_with_the_power_cut(every: int, survives: Survives) -> None:
    """What was not fsynced is gone as well."""
    step = "checkpoints/.aside-step-00000005"
    lines = [
        "close weights/last.safetensors.partial",
        "fsync weights",
        "close metrics.csv",
        f"close {step}/model.safetensors",
        f"close {step}/manifest.json",
        "replace checkpoints/step-00000005",
        "fsync checkpoints",
        "delete checkpoints/step-????????/manifest.json",
    ][::every]
    assert len(survives([Death(on=line, power=True) for line in lines]).deaths) == len(lines)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_while_the_run_is_set_up(
    every: int, lives: Lives, whole: tuple[Path, Life], survives: Survives, tmp_path: Path
) -> None:
    """Nothing is lost before the first step: `resume` says so, and the same `train` takes the folder over."""
    setting_up = _span(whole[1].operations, "mkdir .", "fsync checkpoints")
    assert "write .preflight/checkpoints/.aside-step-00000000/manifest.json" in setting_up
    moments = range(1, len(setting_up), len(setting_up) // 10)[::every]
    story = survives([Death(at=at, half=True) for at in moments])
    assert {death.kept for death in story.deaths} == {None}

    run = tmp_path / "run"
    for line in ("write config.yaml.partial", "write checkpoints/.aside-step-00000000/model.safetensors"):
        assert go_on(lives, SMALL, run, Death(on=line)).code < 0
        life = lives.live(("resume", str(run)), run)
        assert life.code == ExitCode.USAGE
        assert "give the command that started it once more" in life.output
        assert len(life.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_while_a_fork_is_made(lives: Lives, tmp_path: Path) -> None:
    """It is no run before its first checkpoint, which is the old run's: the same `fork` takes the folder over."""
    source, run = tmp_path / "source", tmp_path / "run"
    assert go_on(lives, (*SMALL, "--set", "train.max_steps=5"), source, Death()).code == 0
    start = ("fork", str(source), "--at", "1", "--set", "optim.lr=0.01", "--set", "train.max_steps=null")
    assert go_on(lives, start, tmp_path / "whole", Death()).code == 0
    lines = ["close steps.csv", "close metrics.csv", "write checkpoints/*/manifest.json", "write events.jsonl"]
    story = survive(lives, start, run, [Death(on=line, half=True) for line in lines], base=5)
    assert [death.kept for death in story.deaths] == [None, None, None, 5]
    assert_same_run(run, tmp_path / "whole")
    assert litter(run, tmp_path / "whole") == set()


@pytest.mark.parametrize("count", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_at_random_moments(count: int, whole: tuple[Path, Life], survives: Survives) -> None:
    draw = random.Random(5)
    moments = 0
    while moments < count:
        deaths = [Death(after_seconds=draw.uniform(0, whole[1].seconds)) for _ in range(count - moments)]
        story = survives(deaths)
        assert all(death.lost <= EVERY_STEPS for death in story.deaths)
        moments += len(story.deaths)


# Within what the step's tensors may take, its times measured here and a link that is slow: as many bytes wait in host
# memory as lie on the device; and within a card's memory, by the datasheet's times.
WAITING = {
    "tensors": (SMALL, ("--tensors", "1M", "--set", "memory.link=1", "--set", "memory.calibrate=always")),
    "vram": (
        (*SMALL, *sum((("--set", one) for one in ("model.width=4", "train.batch=128", "data.train_subset=640")), ())),
        ("--vram", "730M", "--set", "memory.link=12"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("budget", WAITING)
def test_twenty_times_with_tensors_in_host_memory(budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a run without host memory, without a plan and without a kill."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, more = WAITING[budget]
    start, draw, deaths = (*plain, *more, "--set", "memory.host=auto"), random.Random(7), 0
    with Lives(tmp_path) as lives:
        assert go_on(lives, plain, tmp_path / "plain", Death()).code == 0
        go_on(lives, start, tmp_path / "calibrated", Death())
        shutil.rmtree(tmp_path / "calibrated")
        whole = go_on(lives, start, tmp_path / "whole", Death())
        assert (whole.code, whole.step) == (0, STEPS), whole.output
        while deaths < 20:
            run = tmp_path / f"run-{deaths}"
            moments = [Death(after_seconds=draw.uniform(0, whole.seconds)) for _ in range(20 - deaths)]
            deaths += len(survive(lives, start, run, moments).deaths)
            assert_same_run(run, tmp_path / "plain")
            assert Plan.from_json(json.loads((run / "plan.json").read_text())).schedule.hosts


def test_killed_as_it_leaves(survives: Survives) -> None:
    """The run has gone on from an older checkpoint, and has said that it is finished: nothing is left to do."""
    story = survives([Death(on="write steps.csv"), Death(on="delete run.owner.json")])
    assert [death.kept for death in story.deaths] == [0, STEPS]


@pytest.mark.slow
def test_an_epoch_saved_before_its_evaluation_and_again_after_it(
    lives: Lives, survives: Survives, tmp_path: Path
) -> None:
    """The same step is saved twice: the old folder keeps a name that is known until the new one has its own."""
    run, again = tmp_path / "run", "checkpoints/step-00000005"
    assert go_on(lives, SMALL, run, Death(on="open weights/*")).code == -signal.SIGKILL
    stopped = go_on(lives, SMALL, run, Death(on="write steps.csv", signal=signal.SIGTERM))
    assert (stopped.code, stopped.step) == (ExitCode.TERMINATED, 5)
    assert newest(run) == 5
    lines = [f"replace {again}.old", f"replace {again}", f"delete {again}.old/*", f"delete {again}.old"]
    story = survives([Death(on=line) for line in lines])
    assert len(story.deaths) == len(lines)
    assert [death.operation for death in story.deaths[:2]] == lines[:2]
    assert {death.kept for death in story.deaths} == {5}


@pytest.mark.slow
def test_a_fork_that_dies_as_it_takes_over(lives: Lives, whole: tuple[Path, Life], tmp_path: Path) -> None:
    """The mark that it is forking is made and taken away by calls of their own, and rows are copied by another."""
    command = ("fork", str(whole[0]), "--at", "last", "--set", "train.epochs=3")
    lines = ["open forking", "close steps.csv", "delete forking"]
    story = survive(lives, command, tmp_path / "run", [Death(on=line, half=True) for line in lines], base=STEPS)
    assert [death.operation for death in story.deaths] == lines


def test_every_bit_of_state_and_norms_counts(whole: tuple[Path, Life], tmp_path: Path) -> None:
    def differing(name: str, old: str, new: str) -> int:
        run = shutil.copytree(whole[0], tmp_path / "run", dirs_exist_ok=True)
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))
        return differing_bits(run, whole[0])

    state = f"checkpoints/step-{STEPS:08d}/state.json"
    assert differing("gradients.csv", "\n1,1,", "\n1,3,") == 1
    assert differing(state, '"rollbacks": 0', '"rollbacks": 1') == 1
    assert differing(state, '"elapsed_seconds": ', '"elapsed_seconds": 1') == 0, "it is measured"
