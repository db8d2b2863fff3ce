"""The order of things, and what becomes of the job if a run does not end. The processes are scripted here; real ones
are killed and interrupted in tests/faults/test_reproduce.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.settings import gather, to_yaml
from lowmem.core.errors import ExitCode, Interrupted, UsageError
from lowmem.reproduce.conduct import Conductor, JobStopped, conduct, to_report
from lowmem.reproduce.job import ALL, Asked, Job, ask, read_job, select
from lowmem.runs.lock import RunLock
from tests.unit.report.fake_runs import write_run

NAMES = [member.name for member in select(None, None)]


class Scripted(Conductor):
    """Answers with a code for each name (None: the look ahead), and keeps what it was asked for."""

    def __init__(self, codes: Mapping[str | None, int] | None = None) -> None:
        super().__init__()
        self.codes = codes or {}
        self.then: Callable[[str], None] | None = None  # called with the name of a run that is started
        self.requests: list[dict[str, Any]] = []

    def run(self, request: Mapping[str, Any]) -> int:
        self.requests.append(dict(request))
        name = request.get("name")
        if self.then is not None and name is not None:
            self.then(name)
        return self.codes.get(name, 0)

    @property
    def trained(self) -> list[str]:
        return [request["name"] for request in self.requests if "name" in request]


def asked(out: Path, *sets: str, only: str | None = None, block: str | None = None, **flags: Any) -> Asked:
    members = select(only, block)
    out.mkdir(exist_ok=True)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return ask(out, gather(flags=named, sets=sets), members)


def put_run(out: Path, name: str, *, done: int, epochs: int = 164) -> None:
    """A run of the job with `done` epochs, by its rows; without a checkpoint unless it is finished."""
    member = next(member for member in ALL if member.name == name)
    write_run(out / name, member.arch, done=done, epochs=epochs)
    settings = gather(flags={"model.arch": member.arch, "model.block": member.block, "train.epochs": epochs})
    (out / name / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")


def do(asked: Asked, conductor: Conductor, *, dry_run: bool = False) -> list[str]:
    said: list[str] = []
    assert conduct(asked, conductor, said.append, dry_run=dry_run) == 0
    return said


def test_all_six_the_cheapest_first(tmp_path: Path) -> None:
    conductor = Scripted()
    said = do(asked(tmp_path), conductor)
    assert conductor.trained == NAMES
    assert "name" not in conductor.requests[0]  # all are looked at before the first is trained
    assert all(request["names"] == NAMES for request in conductor.requests)
    assert said[0] == "run 1 of 6: res20 begins"


def test_only_some_and_two_more(tmp_path: Path) -> None:
    conductor = Scripted()
    do(asked(tmp_path, only="res110", block="bottleneck"), conductor)
    assert conductor.trained == ["res110", "res56-bottleneck", "res110-bottleneck"]


def test_what_is_finished_is_skipped(tmp_path: Path) -> None:
    first = asked(tmp_path)
    first.job.write()
    put_run(tmp_path, "res20", done=164)
    put_run(tmp_path, "cnn20", done=3)
    conductor = Scripted()
    said = do(asked(tmp_path, only="res20,cnn20,res56"), conductor)
    assert conductor.trained == ["cnn20", "res56"]
    assert said == [
        "run 1 of 3: res20 is finished (164 epochs), skipped",
        "run 2 of 3: cnn20 goes on",
        "run 3 of 3: res56 begins",
    ]
    done = Scripted()
    do(asked(tmp_path, only="res20"), done)
    assert done.requests == []  # nothing to look ahead to
    assert names(to_report(read_job(tmp_path), lambda text: None)) == ["res20", "cnn20"]


@pytest.mark.parametrize("code", [ExitCode.NO_PLAN, ExitCode.OUT_OF_MEMORY, ExitCode.DIVERGED, ExitCode.CHECKPOINT, -9])
def test_a_run_that_fails_for_a_reason_of_its_own(tmp_path: Path, code: int) -> None:
    conductor = Scripted({"cnn56": code, "res110": ExitCode.DIVERGED})
    with pytest.raises(JobStopped) as caught:
        do(asked(tmp_path), conductor)
    assert conductor.trained == NAMES  # the others go on
    assert caught.value.exit_code == (code if code > 0 else ExitCode.BUG)  # that of the first
    assert "cnn56 (" in str(caught.value)
    assert "res110 (diverged, or learned nothing)" in str(caught.value)
    assert f"`lowmem reproduce --out {tmp_path}`" in str(caught.value)


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.DISK, ExitCode.TERMINATED])
def test_what_would_stop_all_runs_stops_the_job(tmp_path: Path, code: ExitCode) -> None:
    conductor = Scripted({"cnn20": code})
    with pytest.raises(JobStopped, match=r"stopped at cnn20.*go on with `lowmem reproduce") as caught:
        do(asked(tmp_path), conductor)
    assert conductor.trained == ["res20", "cnn20"]
    assert caught.value.exit_code == code


def test_a_failed_look_ahead_says_it_all_itself(tmp_path: Path) -> None:
    conductor = Scripted({None: ExitCode.NO_PLAN})
    assert conduct(asked(tmp_path), conductor, lambda text: None) == ExitCode.NO_PLAN
    assert conductor.trained == []


def test_a_signal_between_or_in_runs(tmp_path: Path) -> None:
    conductor = Scripted({"cnn20": 130})
    conductor.then = lambda name: put_signal(conductor, name)
    with pytest.raises(Interrupted) as caught:
        do(asked(tmp_path), conductor)
    assert conductor.trained == ["res20", "cnn20"]
    assert caught.value.exit_code == 130
    assert str(caught.value) == f"SIGINT: cnn20 had not begun; go on with `lowmem reproduce --out {tmp_path}`"


def test_a_signal_while_another_still_writes(tmp_path: Path) -> None:
    asked(tmp_path).job.write()
    put_run(tmp_path, "res20", done=3)
    lock, conductor = RunLock(tmp_path / "res20", "run"), Scripted()

    def interrupt(text: str) -> None:
        assert "waiting for it to leave" in text
        conductor.requested = "SIGINT"

    try:
        with pytest.raises(Interrupted, match="SIGINT: stopped before the first run"):
            conduct(asked(tmp_path), conductor, interrupt)
    finally:
        lock.release()
    assert conductor.requests == []


def put_signal(conductor: Conductor, name: str) -> None:
    if name == "cnn20":
        conductor.requested = "SIGINT"


# -- settings ----------------------------------------------------------------------------------------------------------


def recorded(out: Path) -> dict[str, Any]:
    return json.loads((out / "job.json").read_text())["settings"]


def test_settings_are_settled_by_the_first_run_that_begins(tmp_path: Path) -> None:
    do(asked(tmp_path, train__epochs=5), Scripted())  # nothing was begun: these processes did nothing
    do(asked(tmp_path, train__epochs=164), Scripted())
    put_run(tmp_path, "res20", done=3)
    do(asked(tmp_path), Scripted())  # what is left out is what it began with
    with pytest.raises(UsageError, match=r"train.epochs 164 \(now 5\)"):
        asked(tmp_path, train__epochs=5)
    assert recorded(tmp_path)["train.epochs"] == 164


def test_what_is_operational_may_change_and_is_kept(tmp_path: Path) -> None:
    asked(tmp_path, memory__vram="6G").job.write()
    put_run(tmp_path, "res20", done=3)
    do(asked(tmp_path, "checkpoint.keep=3", memory__vram="4G"), Scripted())
    assert read_job(tmp_path).operational == {"checkpoint.keep": 3, "memory.vram": 4 << 30}
    assert recorded(tmp_path)["memory.vram"] == 4 << 30
    # A later call holds to it for runs that were begun before, too.
    do(asked(tmp_path), Scripted())
    assert read_job(tmp_path).operational == {"checkpoint.keep": 3, "memory.vram": 4 << 30}


def test_a_trials_limit_holds_for_its_call_alone(tmp_path: Path) -> None:
    trial = Scripted()
    do(asked(tmp_path, "train.max_steps=20"), trial)
    assert trial.requests[-1]["max_steps"] == 20
    put_run(tmp_path, "res20", done=3)
    do(asked(tmp_path, "train.max_steps=30"), Scripted())
    assert recorded(tmp_path)["train.max_steps"] is None
    plain = Scripted()
    do(asked(tmp_path), plain)
    assert plain.requests[-1]["max_steps"] is None
    assert "train.max_steps" not in read_job(tmp_path).operational


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_came_to_nothing_is_not_recorded(tmp_path: Path, dry_run: bool) -> None:
    asked(tmp_path, memory__vram="6G").job.write()
    put_run(tmp_path, "res20", done=3)
    before = (tmp_path / "job.json").read_bytes()
    conductor = Scripted({} if dry_run else {None: ExitCode.NO_PLAN})
    conduct(asked(tmp_path, memory__vram="1G"), conductor, lambda text: None, dry_run=dry_run)
    assert (tmp_path / "job.json").read_bytes() == before


def test_a_dry_run_tries_what_has_not_begun(tmp_path: Path) -> None:
    asked(tmp_path).job.write()
    put_run(tmp_path, "res20", done=3)
    conductor = Scripted()
    said = do(asked(tmp_path, only="res20,cnn20"), conductor, dry_run=True)
    assert conductor.trained == ["cnn20"]
    assert conductor.requests[-1]["dry_run"] is True
    assert said[0] == "run 1 of 2: res20 has begun, nothing to try"


@pytest.mark.parametrize(
    ("only", "block", "words"),
    [
        (None, None, "lowmem reproduce"),
        (None, "bottleneck", "lowmem reproduce --block bottleneck"),
        ("cnn20,res20", None, "lowmem reproduce --only res20,cnn20"),
    ],
)
def test_the_command_that_goes_on(only: str | None, block: str | None, words: str) -> None:
    settings, members = gather(), select(only, block)
    assert Asked(Job(Path("runs/reproduce"), settings), members).again == words
    first, _, rest = words.partition("reproduce")
    assert Asked(Job(Path("x"), settings), members).again == f"{first}reproduce --out x{rest}"


def names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]


def test_the_report_is_of_all_runs_that_have_begun(tmp_path: Path) -> None:
    asked(tmp_path).job.write()
    put_run(tmp_path, "res110-bottleneck", done=2)
    put_run(tmp_path, "res20", done=1)
    put_run(tmp_path, "cnn20", done=1, epochs=3)  # another job's
    left_out: list[str] = []
    assert names(to_report(read_job(tmp_path), left_out.append)) == ["res20", "res110-bottleneck"]
    assert ["cnn20 is no run of this job" in text for text in left_out] == [True]
    # One that cannot be read must not hide the others.
    (tmp_path / "res20" / "metrics.csv").write_text("nonsense\n1\n")
    assert names(to_report(read_job(tmp_path), left_out.append)) == ["res110-bottleneck"]
    assert len(left_out) == 1 + 2


def test_runs_of_one_length_have_no_clock_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train.hours is for one run, .* lower --epochs instead"):
        asked(tmp_path / "job", "train.hours=3")
