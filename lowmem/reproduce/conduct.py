"""Conducting a job: what is finished is skipped, what was begun goes on, what is missing is trained in its own process.

The process of a run reads its request, one line of JSON, from the pipe that is its standard input. Each byte after that
asks it to stop, as Ctrl-C does: the first saves and leaves, the second leaves at once. The end of the pipe means that
whoever conducts the job is gone, by whatever death: then it saves and leaves, too. So nothing depends on signals
between processes, which Windows has not, and no run is trained on without its job.

The process is in a group of its own, or a Ctrl-C in the terminal would reach it twice. What stops and continues a job
of the shell (Ctrl-Z, `fg`) is handed on for that reason.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from types import FrameType
from typing import Any, BinaryIO

from lowmem.config.refusals import refuse_missing_pictures, refuse_unknown_cards
from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, PreflightError, UsageError
from lowmem.core.reading import RECORD_LIMIT_BYTES, parse_json
from lowmem.core.units import counted
from lowmem.reproduce.job import ALL, Asked, Job, Member, ask, held
from lowmem.reproduce.progress import Standing, standing_of
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.lock import writer_of
from lowmem.runs.view import read_run
from lowmem.train.signals import StopSignals

Say = Callable[[str], None]
# What would stop every other run too. Anything else is a run's own: the others go on without it.
_STOPS_ALL = {ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.DISK, ExitCode.INTERRUPTED, ExitCode.TERMINATED}
_REASONS: dict[int, str] = {
    ExitCode.BUG: "a bug",
    ExitCode.NO_PLAN: "no plan fits",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.DIVERGED: "diverged, or learned nothing",
    ExitCode.CHECKPOINT: "no usable checkpoint",
}
_LEAVING_SECONDS = 120.0
_SLICE_SECONDS = 0.2  # on Windows a wait without end cannot be interrupted by Ctrl-C


class JobStopped(LowmemError):
    """The job, or some of its runs, did not end; what was done is kept. The code is that of what went wrong first."""


def reproduce_job(
    path: Path, settings: Settings, members: tuple[Member, ...], say: Say, show: Callable[..., None], *, dry_run: bool
) -> int:
    """Does it, and the report of what is there, which `show` prints; returns the exit code. Raises LowmemError."""
    with held(path) as lock:
        code, stopped = 0, None
        with Conductor() as conductor:
            asked = ask(path, settings, members)
            if lock.taken_over is not None:
                say(f"{path} is taken over from {lock.taken_over}, which ended without leaving it")
            try:
                code = conduct(asked, conductor, say, dry_run=dry_run)
            except JobStopped as error:
                stopped = error
        # From here on signals end the process: the report is written again in seconds.
        if stopped is None:
            refuse_interrupted(asked, conductor, "stopped before the report")
        if conductor.requested is None and not dry_run and code == 0:
            try:
                if runs := to_report(asked.job, say):
                    say("drawing the report")
                    from lowmem.report import write_report

                    show(write_report(runs, path / "report", html=True))
                    say(last_words(asked))
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


def last_words(asked: Asked) -> str:
    """Of a job that has done all that was asked for: what that was, and what comes next."""
    job, limit = asked.job, asked.max_steps
    runs = counted(len(asked.members), "run")
    standings = [standing_of(job, member, limit) for member in asked.members]
    if stopped := [standing for standing in standings if standing.state == "stopped"]:
        return (
            f"{len(stopped)} of {runs} stopped at step {limit} as asked (train.max_steps, for this call): "
            f"`{asked.again}` goes on to the end"
        )
    left = [member.name for member in ALL if standing_of(job, member).state == "to go on"]
    others = f"; begun and not finished: {', '.join(left)}" if left else ""
    train = job.settings.config.train
    epochs = counted(train.epochs, "epoch") + (" at most" if train.patience is not None else "")
    return f"{job.path} is finished: {runs} of {epochs}{others}"


# -- the loop over the runs --------------------------------------------------------------------------------------------


def conduct(asked: Asked, conductor: Conductor, say: Say, *, dry_run: bool = False) -> int:
    """Trains what is left to train of the runs asked for. The caller holds the job's folder.

    Returns the exit code: of the look ahead, which has said what is wrong, else 0. Raises Interrupted after a signal,
    with everything saved; JobStopped if a run did not end.
    """
    job = asked.job
    _wait_for_writers(job, say, conductor)
    refuse_interrupted(asked, conductor, "stopped before the first run")
    standings = [standing_of(job, member, asked.max_steps) for member in asked.members]
    names = [member.name for member in asked.members]
    request = {"out": str(job.path), "names": names, "max_steps": asked.max_steps}
    before = job.file.read_bytes() if job.file.is_file() else None
    job.write()  # from which the processes read what they are to do
    settled, code_of_first = False, 0
    failed: list[str] = []
    try:
        if any(standing.left for standing in standings):
            refuse_unknown_cards(job.settings.config)
            refuse_missing_pictures(job.settings.config)
            code = conductor.run(request)
            refuse_interrupted(asked, conductor, "stopped before the first run")
            if code != ExitCode.DONE:
                return code if code > 0 else ExitCode.BUG
        settled = not dry_run
        for number, standing in enumerate(standings, start=1):
            name, which = standing.member.name, f"run {number} of {len(standings)}"
            if not standing.left or (dry_run and standing.begun):
                skipped = "has begun, nothing to try" if standing.left else f"{_words(standing)}, skipped"
                say(f"{which}: {name} {skipped}")
                continue
            say(f"{which}: {name} {'goes on' if standing.begun else 'begins'}{' (dry run)' if dry_run else ''}")
            code = conductor.run({**request, "name": name, "dry_run": dry_run})
            if conductor.requested is not None:
                where = f"at {name}"
                with suppress(LowmemError):  # what became of it
                    where = f"{name} {_words(standing_of(job, standing.member))}"
                refuse_interrupted(asked, conductor, where)
            if code in _STOPS_ALL:
                raise JobStopped(f"stopped at {name}; what was done is kept, go on with `{asked.again}`", code)
            if code != ExitCode.DONE:
                code_of_first = code_of_first or code
                died = f"its process died of signal {-code}"
                failed.append(f"{name} ({_REASONS.get(code, died if code < 0 else f'code {code}')})")
                say(f"{which}: {name} did not end; what it saved stands")
    finally:
        if not settled and before is not None:
            with suppress(OSError):
                write_bytes_atomic(job.file, before)
    if failed:
        again = f"give `{asked.again}` to try again, the rest is done"
        raise JobStopped(f"did not end: {', '.join(failed)}; {again}", code_of_first)
    return ExitCode.DONE


def _wait_for_writers(job: Job, say: Say, conductor: Conductor) -> None:
    """A job that was killed leaves a process behind that still saves its run: until it has left, for two minutes at
    the most, or until a signal."""
    deadline = time.monotonic() + _LEAVING_SECONDS
    for path in [job.path / member.name for member in ALL]:
        if conductor.came() or (who := writer_of(path)) is None:
            continue
        say(f"{path} is still being written by {who}: waiting for it to leave")
        while not conductor.came() and writer_of(path) is not None and time.monotonic() < deadline:
            time.sleep(0.2)


def refuse_interrupted(asked: Asked, conductor: Conductor, where: str) -> None:
    """Raises Interrupted if a signal came: what was saved, and the command that goes on."""
    if conductor.requested is not None:
        raise Interrupted(f"{conductor.requested}: {where}; go on with `{asked.again}`", conductor.exit_code)


def _words(standing: Standing) -> str:
    if standing.state == "finished":
        return f"is finished ({counted(int(standing.epochs_done), 'epoch')})"
    if standing.state == "stopped":
        return f"was stopped at step {standing.step} as asked (train.max_steps)"
    if not standing.begun:
        return "had not begun"
    return f"is saved at epoch {standing.epochs_done + 1}, step {standing.step}"


def to_report(job: Job, say: Say) -> list[Path]:
    """The folders of all runs of the job that have begun; says why others are left out: one that cannot be read must
    not hide the rest. Raises UsageError if the report's own folder leads elsewhere."""
    folder, runs = job.path / "report", []
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, which no job of lowmem has: put what it leads to in its place")
    for member in ALL:
        try:
            standing = standing_of(job, member)
            if standing.begun:
                read_run(standing.path)
                runs.append(standing.path)
        except (UsageError, PreflightError) as error:
            say(f"not in the report: {error}")
    return runs


# -- the processes -----------------------------------------------------------------------------------------------------


class Conductor(StopSignals):
    """Starts one process after the other, and hands on to it what signals ask for meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._process: Popen[bytes] | None = None
        self._asked = 0

    def run(self, request: Mapping[str, Any]) -> int:
        """The exit code of a process that does what is requested; of a killed one minus the signal's number."""
        command = [sys.executable, "-m", "lowmem", "reproduce-run"]
        # 0x200: CREATE_NEW_PROCESS_GROUP, a name that there is on Windows alone
        apart: dict[str, Any] = {"process_group": 0} if os.name != "nt" else {"creationflags": 0x200}
        with Popen(command, stdin=PIPE, **apart) as process:
            assert process.stdin is not None
            with suppress(OSError):  # it is gone already: its code says how
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            # In this order: a signal may come between any two of these lines, and twice asked means at once.
            self._asked = 0
            self._process = process
            if self.requested is not None and not self._asked:  # in the meantime
                self._ask()
            try:
                while True:
                    with suppress(TimeoutExpired):
                        return process.wait(_SLICE_SECONDS if os.name == "nt" else None)
            finally:
                self._process = None

    def _ask(self) -> None:
        """Asks the process to stop; a third time it is not asked any more."""
        process = self._process
        if process is None or process.stdin is None:
            return
        self._asked += 1
        if self._asked > 2:
            process.kill()
        with suppress(OSError, ValueError):
            os.write(process.stdin.fileno(), b"!")

    def __enter__(self) -> Conductor:
        super().__enter__()
        if hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, first = signal.Signals(number).name, self.requested is None
        self.requested = self.requested or name
        if (self._insists(name) or first) and name != "SIGBREAK":  # which reaches the process by itself
            self._ask()

    def _pause(self, number: int, frame: FrameType | None) -> None:
        process = self._process
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # goes on from here when the shell continues it
        signal.signal(signal.SIGTSTP, self._pause)
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGCONT)


def read_request() -> dict[str, Any]:
    """In the process: the request on standard input; from then on the conductor is listened to. Raises ValueError."""
    # Not buffered: what comes after the line is for the thread that listens.
    pipe = open(os.dup(sys.stdin.fileno()), "rb", buffering=0)  # noqa: SIM115
    with open(os.devnull, "rb") as nothing:  # what this process starts must not read of the pipe
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    if hasattr(signal, "SIGTTOU"):  # a terminal with `tostop` would stop a process of another group that writes to it
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    request: dict[str, Any] = parse_json(pipe.readline(RECORD_LIMIT_BYTES))
    threading.Thread(target=_listen, args=(pipe,), name="lowmem-conductor", daemon=True).start()
    return request


def _listen(pipe: BinaryIO) -> None:
    """Each byte is a Ctrl-C, from within, and so is the end. To the main thread, so that what it waits for in the
    system ends, too."""
    main, byte = threading.main_thread().ident, b"!"
    while byte:
        try:
            byte = pipe.read(1)
        except OSError:
            byte = b""
        if hasattr(signal, "pthread_kill") and main is not None:
            signal.pthread_kill(main, signal.SIGINT)
        else:
            _thread.interrupt_main()
