"""The job: what is finished is skipped, what was begun goes on, what is missing is trained, a process for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem.config.schema import OPERATIONAL
from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, PreflightError, UsageError
from lowmem.reproduce.folder import begun
from lowmem.reproduce.job import Job, asked_for, is_job, read_job, refuse_other_settings
from lowmem.reproduce.members import ALL, REPORTED, Member
from lowmem.reproduce.process import Conductor
from lowmem.reproduce.progress import Standing, standing_of, standings_of, wait_for_writers
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.view import read_run

# What would stop every other run too. Anything else is a run's own: the others go on without it.
_STOPS_ALL = {ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.DISK, ExitCode.INTERRUPTED, ExitCode.TERMINATED}
_REASONS: dict[int, str] = {
    ExitCode.BUG: "a bug",
    ExitCode.NO_PLAN: "no plan fits",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.DIVERGED: "diverged, or learned nothing",
    ExitCode.CHECKPOINT: "no usable checkpoint",
}


class JobStopped(LowmemError):
    """The job, or some of its runs, did not end; what was done is kept. The code is that of what went wrong first."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.BUG


@dataclass(frozen=True)
class Asked:
    """What this call of the command wants. `given`: the operational settings that somebody asked the job for, now or
    earlier, by dotted name, for runs that have begun with others; `again`: the command that goes on with it;
    `max_steps`: of a trial, for this call alone."""

    job: Job
    members: tuple[Member, ...]
    given: Mapping[str, object]
    again: str
    max_steps: int | None = None


def ask(path: Path, settings: Settings, members: Sequence[Member], again: str) -> Asked:
    """The job in `path` with what is asked for this time, or a new one if no run of it has begun.

    Raises UsageError if its settings would not be those that its runs were begun with."""
    max_steps, settings = settings.config.train.max_steps, _to_the_end(settings)
    given = asked_for(settings)
    if not is_job(path) or not begun(path):
        return Asked(Job(path, settings), tuple(members), _operational(given), again, max_steps)
    job = read_job(path)
    refuse_other_settings(job, given)
    settled = _to_the_end(job.settings)
    for key, value in _operational(given).items():
        settled = settled.replace({key: value}, settings.sources[key])
    return Asked(replace(job, settings=settled), tuple(members), _operational(asked_for(settled)), again, max_steps)


def _to_the_end(settings: Settings) -> Settings:
    """Without the limit of a trial, or every later call would take the job for done there."""
    return settings.replace({"train.max_steps": None}, "default")


def _operational(given: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in given.items() if key in OPERATIONAL}


@dataclass
class _Failed:
    runs: list[str] = field(default_factory=list)
    code: int | None = None

    def add(self, name: str, code: int) -> None:
        why = _REASONS.get(code, f"its process died of signal {-code}" if code < 0 else f"code {code}")
        self.runs.append(f"{name} ({why})")
        self.code = self.code if self.code is not None else code


def conduct(asked: Asked, conductor: Conductor, say: Callable[[str], None], *, dry_run: bool = False) -> int:
    """Trains what is left to train of the runs asked for. The caller holds the job's folder.

    Returns the exit code: of the check before the first run, which has said what is wrong, else 0. Raises Interrupted
    after a signal, with everything saved; JobStopped if a run did not end.
    """
    job, members = asked.job, asked.members
    wait_for_writers([job.folder_of(member) for member in ALL], say, lambda: conductor.requested is not None)
    if conductor.requested is not None:
        raise interrupted(conductor, "stopped before the first run", asked)
    standings = standings_of(job, members, asked.max_steps)
    request: dict[str, Any] = {
        "out": str(job.path),
        "names": [member.name for member in members],
        "max_steps": asked.max_steps,
    }
    with _recorded(job) as keep:
        if any(standing.left for standing in standings):
            code = conductor.run(request)
            if conductor.requested is not None:
                raise interrupted(conductor, "stopped before the first run", asked)
            if code != ExitCode.DONE:
                return code if code > 0 else ExitCode.BUG
        if not dry_run:
            keep()
        _each(asked, standings, request, conductor, say, dry_run)
    return ExitCode.DONE


@contextmanager
def _recorded(job: Job) -> Iterator[Callable[[], None]]:
    """Writes job.json, from which the processes read what they are to do; what was in it before is there again
    afterwards unless `keep()` is called."""
    before = job.file.read_bytes() if job.file.is_file() else None
    settled: list[bool] = []
    job.write()
    try:
        yield lambda: settled.append(True)
    finally:
        if not settled and before is not None:
            with suppress(OSError):
                write_bytes_atomic(job.file, before)


def _each(
    asked: Asked,
    standings: Sequence[Standing],
    request: Mapping[str, Any],
    conductor: Conductor,
    say: Callable[[str], None],
    dry_run: bool,
) -> None:
    failed = _Failed()
    for number, standing in enumerate(standings, start=1):
        name, which = standing.member.name, f"run {number} of {len(standings)}"
        if not standing.left or (dry_run and standing.begun):
            say(f"{which}: {name} {_why_skipped(standing)}")
            continue
        say(f"{which}: {name} {'goes on' if standing.begun else 'begins'}{' (dry run)' if dry_run else ''}")
        code = conductor.run({**request, "given": dict(asked.given), "name": name, "dry_run": dry_run})
        if conductor.requested is not None:
            raise interrupted(conductor, _where(asked, standing.member), asked)
        if code in _STOPS_ALL:
            raise JobStopped(f"stopped at {name}; what was done is kept, go on with `{asked.again}`", code)
        if code != ExitCode.DONE:
            failed.add(name, code)
            say(f"{which}: {name} did not end; what it saved stands")
    if failed.code is not None:
        raise JobStopped(
            f"did not end: {', '.join(failed.runs)}; give `{asked.again}` to try again, the rest is done", failed.code
        )


def interrupted(conductor: Conductor, where: str, asked: Asked) -> Interrupted:
    return Interrupted(f"{conductor.requested}: {where}; go on with `{asked.again}`", conductor.exit_code)


def _where(asked: Asked, member: Member) -> str:
    """What became of the run that was under way."""
    try:
        standing = standing_of(asked.job, member)
    except LowmemError:
        return f"at {member.name}"
    if not standing.begun:
        return f"{member.name} had not begun"
    if standing.state == "finished":
        return f"{member.name} is finished"
    return f"{member.name} is saved at epoch {standing.epochs_done + 1}, step {standing.step}"


def _why_skipped(standing: Standing) -> str:
    if standing.state == "finished":
        return f"is finished ({standing.epochs} epochs), skipped"
    if standing.state == "stopped":
        return f"was stopped at step {standing.step} as asked (train.max_steps), skipped"
    return "has begun, nothing to try"


def to_report(path: Path) -> tuple[list[Path], list[str]]:
    """The folders of all runs of the job that have begun, and why others are left out: one that cannot be read must not
    hide the rest."""
    job = read_job(path)
    runs, left_out = [], []
    for member in ALL:
        try:
            standing = standing_of(job, member)
            if standing.begun:
                read_run(standing.path)
                runs.append(standing.path)
        except (UsageError, PreflightError) as error:
            left_out.append(str(error))
    return runs, left_out


def command(path: Path, members: Sequence[Member]) -> str:
    """What to type to go on: the settings are recorded, which runs were asked for is not."""
    out = "" if path == Path("runs/reproduce") else f" --out {path}"
    if tuple(members) == REPORTED:
        return f"lowmem reproduce{out}"
    if tuple(members) == ALL:
        return f"lowmem reproduce{out} --block bottleneck"
    return f"lowmem reproduce{out} --only {','.join(member.name for member in members)}"
