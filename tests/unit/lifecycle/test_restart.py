"""What torchrun's restart goes on with, and what it does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lowmem.choose.execution import resolve_execution
from lowmem.config.schema import Config
from lowmem.config.settings import Settings
from lowmem.core.errors import Diverged, UsageError
from lowmem.distributed.group import Group
from lowmem.lifecycle.execute import refuse_unfit
from lowmem.lifecycle.run_identity import begun_before, launcher
from lowmem.runs.folder import never_began
from lowmem.train.replica import config_hash

CONFIG = Config()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a process of torchrun has left it: begun, with a checkpoint."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    path = tmp_path / "run"
    (path / "checkpoints" / "step-00000000").mkdir(parents=True)
    for name in ("run.lock", "config.yaml", "metrics.csv", "plan.json", "plan-1.json"):
        (path / name).touch()
    _environment(path)
    _event(path, event="start")
    return path


def _environment(path: Path, **changes: object) -> None:
    known = {"asked": config_hash(CONFIG), "launcher": os.getppid(), **changes}
    (path / "env.json").write_text(json.dumps(known))


def _event(path: Path, **fields: object) -> None:
    with open(path / "events.jsonl", "a") as file:
        file.write(json.dumps(fields) + "\n")


def restarted(count: int = 1) -> Group:
    group = Group()
    group.restarts = count
    return group


def test_its_own_run(run: Path) -> None:
    assert launcher() == os.getppid()
    assert begun_before(restarted(), run, CONFIG)


def test_not_the_first_start(run: Path) -> None:
    assert not begun_before(restarted(0), run, CONFIG)


def test_not_somebody_elses_run_with_the_same_settings(run: Path) -> None:
    _environment(run, launcher=os.getppid() + 1)
    assert not begun_before(restarted(), run, CONFIG)


def test_not_other_settings(run: Path) -> None:
    other = Config.model_validate({"seed": 5})
    assert not begun_before(restarted(), run, other)
    assert not begun_before(restarted(), run / "nowhere", CONFIG)


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew(run: Path) -> None:
    (run / "checkpoints" / "step-00000000").rmdir()
    (run / "events.jsonl").unlink()
    assert never_began(run), "the other processes' plans are part of setting up"
    assert not begun_before(restarted(), run, CONFIG)


def test_a_damaged_record_of_the_machine_is_another_start(run: Path) -> None:
    (run / "env.json").write_text("{", encoding="utf-8")
    assert not begun_before(restarted(), run, CONFIG)


STOPPED: list[dict[str, object]] = [{"event": "diverged", "why": "as asked"}, {"event": "stuck", "stopped": True}]


@pytest.mark.parametrize("last", STOPPED)
def test_what_was_to_stop_stays_stopped(run: Path, last: dict[str, object]) -> None:
    _event(run, **last)
    with pytest.raises(Diverged, match="stopped before this restart, as asked"):
        begun_before(restarted(), run, CONFIG)


@pytest.mark.parametrize("line", ['{"event": "che', "5", "\\xff", "[]", '{"event": 5}'])
def test_what_a_death_leaves_of_a_line_stops_no_restart(run: Path, line: str) -> None:
    (run / "events.jsonl").write_bytes(b'{"event": "start"}\n' + line.encode("latin-1"))
    assert begun_before(restarted(), run, CONFIG)
    (run / "events.jsonl").write_bytes(line.encode("latin-1") + b'\n{"event": "diverged"}\n{"event": "ha')
    with pytest.raises(Diverged, match="it learns nothing"):
        begun_before(restarted(), run, CONFIG)


def test_a_warning_that_it_learns_nothing_is_none(run: Path) -> None:
    _event(run, event="stuck", stopped=False)
    assert begun_before(restarted(), run, CONFIG)


def test_a_batch_for_all() -> None:
    group = Group()
    group.size = 129
    with pytest.raises(UsageError, match="a batch of 128 cannot be split over 129 processes"):
        refuse_unfit(group, resolve_execution(Settings(CONFIG, {})).config)
