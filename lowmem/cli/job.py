"""`lowmem reproduce`: the process that conducts the job (no torch before the report), and what one of its processes
does: look at all runs, or train one of them, with the job's time left beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.cli.terminal import aligned, observer, say
from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, UsageError
from lowmem.core.units import format_duration, format_size
from lowmem.reproduce.conduct import Asked, Conductor, JobStopped, ask, conduct, refuse_interrupted, to_report
from lowmem.reproduce.job import ALL, held, read_job, select
from lowmem.reproduce.progress import (
    JobObserver,
    Standing,
    epoch_seconds_of,
    measured_before,
    standing_of,
    standings_of,
)
from lowmem.train.observer import Observer

if TYPE_CHECKING:
    from lowmem.reproduce.check import Outlook

_HEADER = ("run", "state", "epoch", "time left", "on disk")


def reproduce_job(out: Path, settings: Settings, only: str | None, block: str | None, dry_run: bool) -> int:
    """Does it and returns the exit code. Raises LowmemError."""
    members = select(only, block)
    with held(out) as lock:
        stopped: JobStopped | None = None
        with Conductor() as conductor:
            asked = ask(out, settings, members)
            if lock.taken_over is not None:
                say(f"{out} is taken over from {lock.taken_over}, which ended without leaving it")
            try:
                code = conduct(asked, conductor, say, dry_run=dry_run)
            except JobStopped as error:
                stopped, code = error, error.exit_code
        # From here on signals end the process: the report is written again in seconds.
        if stopped is None:
            refuse_interrupted(asked, conductor, "stopped before the report")
        if conductor.requested is None and not dry_run and (stopped is not None or code == 0):
            try:
                _report(asked)
            except KeyboardInterrupt:
                words = f"SIGINT: stopped in the report, all runs are saved; go on with `{asked.again}`"
                raise Interrupted(words, ExitCode.INTERRUPTED) from None
            except LowmemError as error:
                if stopped is None:
                    raise
                say(f"there is no report: {error}")  # that the job has stopped says more
        if stopped is not None:
            raise stopped
        return code


def _report(asked: Asked) -> None:
    """Of what is there. Raises LowmemError."""
    runs, left_out = to_report(asked.job.path)
    folder = asked.job.path / "report"
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, which no job of lowmem has: put what it leads to in its place")
    for words in left_out:
        say(f"not in the report: {words}")
    if runs:
        from lowmem.cli.show import show_report
        from lowmem.report import write_report

        show_report(write_report(runs, folder, html=True))


# -- one of its processes ----------------------------------------------------------------------------------------------


def work(request: Mapping[str, Any]) -> int:
    """Does what is requested; returns the exit code. Raises LowmemError."""
    job, limit = read_job(Path(request["out"])), request["max_steps"]
    members = [member for member in ALL if member.name in request["names"]]
    standings, measured = standings_of(job, members, limit), measured_before(job, members)
    with observer() as shown:
        if "name" not in request:
            from lowmem.reproduce.check import look_ahead

            outlook = look_ahead(job, standings, shown)
            for line in describe(outlook, measured):
                shown.note(line)
            outlook.job.write()
            return ExitCode.DONE
        number = [member.name for member in members].index(request["name"])
        begins = job.settings_of(members[number])
        try:
            _train(standings[number], begins, request, JobObserver(shown, standings, number, measured))
        except Interrupted as stopped:
            return stopped.exit_code  # whoever conducts the job says what is next
    if not request["dry_run"] and (standing := standing_of(job, members[number], limit)).left:
        # A run that left without an error and is not done must not pass for one that is.
        raise LowmemError(
            f"{standing.path} was left at step {standing.step}, epoch {standing.epochs_done} of {standing.epochs}, "
            f"without an error ({standing.state}): look at it with `lowmem verify {standing.path}`"
        )
    return ExitCode.DONE


def _train(standing: Standing, begins: Settings, request: Mapping[str, Any], shown: Observer) -> None:
    from lowmem import lifecycle

    # Always with the limit, be it None: the run may have been begun as a trial.
    limit = {"train.max_steps": request["max_steps"]}
    if standing.begun:
        recorded = lifecycle.recorded_settings(standing.path)
        lifecycle.resume_training(standing.path, recorded.replace({**request["given"], **limit}, "reproduce"), shown)
    else:
        settings = begins.replace(limit, "reproduce") if request["max_steps"] is not None else begins
        lifecycle.run_training(settings, standing.path, shown, dry_run=bool(request["dry_run"]))


def describe(outlook: Outlook, measured: Sequence[Standing] = ()) -> list[str]:
    """The table before the first run: a line a run, and what they take together. `measured`: of runs that are not among
    them."""
    job, runs = outlook.job, outlook.runs
    rows: list[tuple[str, ...]] = [_HEADER]
    total = 0.0
    for run in runs:
        per_epoch = epoch_seconds_of(run, [*runs, *measured])
        seconds = run.epochs_left * per_epoch if per_epoch is not None else run.planned_seconds if run.left else 0.0
        total += seconds if seconds is not None else float("nan")
        rows.append(
            (
                run.member.name,
                run.state,
                f"{run.epochs_done}/{run.epochs}",
                "?" if seconds is None else f"about {format_duration(seconds)}" if run.left else "",
                ("at most " if run.left else "") + format_size(run.disk_bytes),
            )
        )
    config = job.settings.config
    time = "known after the first epoch" if total != total else f"about {format_duration(total)}"
    return [
        f"job {job.path}: {len(runs)} {'run' if len(runs) == 1 else 'runs'} of {config.train.epochs} epochs at width "
        f"{config.model.width}, {outlook.pictures}",
        *aligned(rows, right={2, 3, 4}),
        f"time left in all: {time}; disk: at most {format_size(outlook.needed_bytes)} more, "
        f"{format_size(outlook.free_bytes)} free",
    ]
