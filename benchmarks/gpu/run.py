"""Conducts the parts on the machine with the card: one after the other, each in a process of its own with its own
limit of time, so that one that dies or hangs takes nothing with it. No torch, no CUDA context.

OUT has PART.json as soon as a part has begun, and log.txt; when all is done three files: results.json (all parts),
log.txt and artefacts.tar.gz (what the parts wrote beside their figures).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.account import (
    DONE,
    NO_TIME,
    RESULTS,
    plain,
    read_account,
    read_accounts,
    shortcomings,
    write_account,
)
from benchmarks.gpu.job import FORMAT, PARTS, Job, Part, questions_file, read_job
from lowmem.core.errors import PreflightError
from lowmem.isolate import run
from lowmem.runs.atomic import write_text_atomic

LOG, ARTEFACTS = "log.txt", "artefacts.tar.gz"
_PACKING_SECONDS = 5.0
_LEAST_SECONDS = 5.0  # with less there is no use in starting a process that imports torch
# A part's process should end by itself at its limit, and say what it had no time for.
_GRACE_SECONDS = 3.0
# Untouched and planned Bottleneck-110 of one question take 12 GiB at the most; the CPU has two cores.
_BYTES_A_QUESTION = 12 << 30
_MOST_AT_ONCE = 4
_LARGEST_BYTES = 4 << 20  # of a file in the archive of artefacts
NAMES = tuple(part.name for part in PARTS)

# (part, its questions, its account, folder of its artefacts, seconds, questions side by side) -> what to start
Command = Callable[[Part, Path, Path, Path, float, int], list[str]]


def part_command(
    part: Part, questions: Path, account: Path, artefacts: Path, seconds: float, at_once: int
) -> list[str]:
    files = [str(questions), str(account), str(artefacts)]
    return [sys.executable, "-m", "benchmarks.gpu.parts", part.name, *files, f"{seconds:.1f}", str(at_once)]


def conduct(
    prepared: Path, out: Path, parts: tuple[Part, ...], minutes: float, command: Command = part_command
) -> list[str]:
    """Runs the parts within so many minutes; those that OUT has already are not done again. What did not go as it
    should, a sentence each. Raises UsageError without a prepared job, PreflightError without its device."""
    job = read_job(prepared)
    out.mkdir(parents=True, exist_ok=True)
    with Conductor(job, prepared, out, minutes, command) as conductor:
        for part in parts:
            conductor.do(part)
    accounts = read_accounts(out, NAMES)
    return [line for part in parts for line in shortcomings(accounts[part.name])]


class Conductor:
    """Context manager: whatever ends it, what was found is packed."""

    def __init__(self, job: Job, prepared: Path, out: Path, minutes: float, command: Command = part_command) -> None:
        self.job, self.prepared, self.out, self.command = job, prepared, out, command
        self._began = time.monotonic()
        self._ends = self._began + 60 * minutes - _PACKING_SECONDS
        self.environment = _environment(job.device)
        self._artefacts = Path(tempfile.mkdtemp(prefix="gpu-artefacts-"))
        if (out / ARTEFACTS).exists():  # of parts that are done
            with tarfile.open(out / ARTEFACTS) as archive:
                archive.extractall(self._artefacts, filter="data")
        self._previous: Any = None

    def __enter__(self) -> Conductor:
        self._previous = signal.signal(signal.SIGTERM, _interrupt)
        where = self.environment.get("card") or self.environment.get("cpu")
        self.log(f"{where}, torch {self.environment.get('torch')}, {self._ends - time.monotonic():.0f} s for the parts")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._pack()
        finally:
            signal.signal(signal.SIGTERM, self._previous)
            shutil.rmtree(self._artefacts, ignore_errors=True)

    def log(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:7.1f} s  {text}"
        print(line, flush=True)
        with open(self.out / LOG, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def do(self, part: Part) -> None:
        """A part, unless it is done already or there is no time left for it."""
        done = read_accounts(self.out, NAMES).get(part.name)
        if done is not None and done.get("outcome") == DONE:
            self.log(f"{part.name}: done already")
            return
        account = self.out / f"{part.name}.json"
        account.unlink(missing_ok=True)
        seconds = self.job.limit_seconds(part, self._ends - time.monotonic())
        began = time.monotonic()
        if seconds < _LEAST_SECONDS:
            outcome = NO_TIME
        else:
            self.log(f"{part.name}: begins, at most {seconds:.0f} s")
            outcome = self._process(part, account, seconds)
        record = read_account(account) or {"part": part.name, "device": self.job.device, "skipped": None, "rows": []}
        took = round(time.monotonic() - began, 1)
        record |= {"outcome": outcome, "seconds": took, "limit_seconds": round(seconds, 1)}
        record |= {"environment": self.environment, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
        write_account(account, record)
        said = record["skipped"] or outcome
        kept = [row["met"] for row in record["rows"] if row["met"] is not None]
        self.log(f"{part.name}: {said}; {len(record['rows'])} rows, {sum(kept)} of {len(kept)} promises kept, {took} s")

    def _process(self, part: Part, account: Path, seconds: float) -> str:
        """How it ended. It and all that it started are gone afterwards."""
        artefacts = self._artefacts / part.name
        artefacts.mkdir(exist_ok=True)
        given = max(seconds / 2, seconds - _GRACE_SECONDS)
        questions, at_once = questions_file(self.prepared, part.name), _at_once(self.environment)
        command = self.command(part, questions, account, artefacts, given, at_once)
        said = artefacts / "said.txt"
        with open(said, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"took longer than {seconds:.0f} s"
            finally:
                _end(process)
        if code == 0:
            return DONE
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        how = f"was ended by signal {-code}" if code < 0 else f"left with code {code}"
        return f"{how}: {lines[-1][:200]}" if lines[-1] else how

    def _pack(self) -> None:
        """Few files, in place of one for each part."""
        accounts = read_accounts(self.out, NAMES)
        record = {"format": FORMAT, "prepared": dict(self.job.conditions), "parts": accounts}
        write_text_atomic(self.out / RESULTS, json.dumps(plain(record), indent=1) + "\n")
        for part in accounts:
            (self.out / f"{part}.json").unlink(missing_ok=True)
        files = [path for path in sorted(self._artefacts.rglob("*")) if path.is_file()]
        with tarfile.open(self.out / ARTEFACTS, "w:gz") as archive:
            for path in files:
                name = path.relative_to(self._artefacts)
                if path.stat().st_size <= _LARGEST_BYTES:
                    archive.add(path, arcname=str(name))
                else:
                    self.log(f"artefact {name} is left out: {path.stat().st_size:,} bytes")
        self.log(f"packed: {RESULTS}, {LOG}, {ARTEFACTS}")


def _environment(device: str) -> dict[str, Any]:
    """Of this machine, by a process of its own. Raises PreflightError if the device is not there."""
    outcome = run("benchmarks.gpu.environment:environment", device, timeout_seconds=120)
    if outcome.refused is not None:
        raise PreflightError(f"the job is for {device}, and this machine does not answer for it: {outcome.refused}")
    found: dict[str, Any] = outcome.answer
    return found


def _at_once(environment: Mapping[str, Any]) -> int:
    """Questions side by side where their memory is there; on the CPU two."""
    room = environment.get("card_bytes")
    return 2 if room is None else max(1, min(_MOST_AT_ONCE, room // _BYTES_A_QUESTION))


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process, and what it started: a trial that outlives its part would take memory and time from the next."""
    if os.name == "nt":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
