"""Kills training runs at every operation on their files and at random moments, and counts what is lost.

    python benchmarks/kill.py [--moments 200] [--workers 2] [--every 1] [--minutes 60]

Each death is a SIGKILL of a real `lowmem` process on the CPU, just before an operation on a file of the run's folder
(open, write, flush, fsync, close, mkdir, replace, delete), after half of the bytes of a write, or at a random moment.
`power`: what was not fsynced is taken away as well, as far as that can be imitated (see tests/faults/hook.py). The run
is resumed after each, and its end is compared bit by bit with that of the same run left alone. Linux only.

Writes `results/kill.json` and `.md` beside this file; leaves with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conditions import RESULTS, conditions, sentence, table, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.kills import (
    EVERY_STEPS,
    SMALL,
    STEPS,
    Killed,
    Lost,
    differing_bits,
    go_on,
    litter,
    survive,
    unreadable_events,
)
from tests.faults.lives import Death, Life, Lives

RARELY_STEPS = 8
RARELY = (*SMALL, "--set", f"checkpoint.every_steps={RARELY_STEPS}")
# Six steps, for all that is done to files once a run has begun; two, for all before that.
BRIEF = (*SMALL, "--set", "data.train_subset=20")
BRIEFEST = (*SMALL, "--set", "train.epochs=1", "--set", "data.train_subset=10")
SOME_MOMENTS = 4  # deaths at most that are drawn for one run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run: how it starts, what it finds (a folder to copy), how it dies, what it must equal."""

    part: str
    start: tuple[str, ...]
    deaths: tuple[Death, ...]
    whole: Path
    base: Path | None = None
    first: tuple[str, ...] | None = None  # a command that dies the first death instead of a plain resume
    interval: int = EVERY_STEPS
    begins_at: int = 0  # the step of a fork, which it has not done itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it."""

    part: str
    interval: int
    deaths: tuple[Killed, ...]
    halves: int
    power: int
    differing_bits: int
    astray: int  # files on one side only
    unreadable_events: int
    failure: str | None


def perform(job: Job, lives: Lives, run: Path) -> Outcome:
    """Runs it in the folder `run`, which is removed."""
    if job.base is not None:
        shutil.copytree(job.base, run)
    deaths, failure, killed, judged = list(job.deaths), None, [], (0, 0, 0)
    try:
        if job.first is not None:
            life = lives.live((*job.first[:1], str(run), *job.first[1:]), run, deaths.pop(0))
            if life.code != -signal.SIGKILL:
                raise Lost(f"{job.first} was not killed: {life.output}")
        killed = survive(lives, job.start, run, deaths, job.interval, job.begins_at).deaths
        judged = (differing_bits(run, job.whole), len(litter(run, job.whole)), len(unreadable_events(run)))
    except Lost as error:
        failure = str(error)
    if job.first is not None:
        killed = [Killed(operation=str(job.deaths[0].on), step=None, kept=None, saving=0), *killed]
    shutil.rmtree(run, ignore_errors=True)
    return Outcome(
        part=job.part,
        interval=job.interval,
        deaths=tuple(killed),
        halves=sum(
            one.half and str(by.operation).startswith("write") for one, by in zip(job.deaths, killed, strict=False)
        ),
        power=sum(death.power for death in job.deaths),
        differing_bits=judged[0],
        astray=judged[1],
        unreadable_events=judged[2],
        failure=failure,
    )


class Bench:
    """The runs that are left alone, and the jobs that are made of them."""

    def __init__(self, folder: Path, lives: Lives) -> None:
        self.folder, self.lives = folder, lives
        self.whole, life = self._left_alone("whole", SMALL)
        self.life = life
        self.rarely = self._left_alone("rarely", RARELY)[0]

    def _left_alone(self, name: str, start: tuple[str, ...]) -> tuple[Path, Life]:
        run = self.folder / name
        life = go_on(self.lives, start, run, Death())
        if life.code != 0:
            raise SystemExit(f"the run that nobody kills left with {life.code}: {life.output}")
        return run, life

    def operations(self, every: int) -> Iterator[Job]:
        """Each operation of a run, and the middle of each write; every other one also with a power cut."""
        for start, name in ((BRIEFEST, "setting up"), (BRIEF, "training")):
            whole, life = self._left_alone(name.replace(" ", "-"), start)
            made = life.operations
            begun = made.index("fsync checkpoints") + 1
            span = range(1, begun + 1) if start is BRIEFEST else range(begun + 1, len(made) + 1)
            for at in span[::every]:
                for half in (False, True) if made[at - 1].startswith("write") else (False,):
                    yield Job(part=name, start=start, deaths=(Death(at=at, half=half),), whole=whole)
                if at % 2 and start is BRIEF:
                    deaths = (Death(at=at, half=True, power=True),)
                    yield Job(part=f"{name}, every other operation, power cut", start=start, deaths=deaths, whole=whole)

    def saved_twice(self, every: int) -> Iterator[Job]:
        """A step that is saved before its evaluation and again after it: each operation of that resumed process."""
        base = self.folder / "saved-twice"
        go_on(self.lives, SMALL, base, Death(on="open weights/*"))
        go_on(self.lives, SMALL, base, Death(on="write steps.csv", signal=signal.SIGTERM))
        probe = self.folder / "probe"
        shutil.copytree(base, probe)
        made = go_on(self.lives, SMALL, probe, Death()).operations
        first = made.index("open metrics.csv") + 1
        last = max(at for at, line in enumerate(made, 1) if line.startswith("delete checkpoints/step-00000005.old"))
        for at in range(first, last + 2, every):
            for power in (False, True)[: 1 + at % 2]:
                deaths = (Death(at=at, power=power),)
                yield Job(part="a step saved twice", start=SMALL, deaths=deaths, whole=self.whole, base=base)

    def forks(self, every: int) -> Iterator[Job]:
        """`lowmem fork` until the fork's first step, every other operation."""
        source = self.folder / "source"
        go_on(self.lives, (*SMALL, "--set", "train.max_steps=5"), source, Death())
        start = ("fork", str(source), "--at", "1", "--set", "optim.lr=0.01", "--set", "train.max_steps=null")
        whole, life = self._left_alone("fork", start)
        begun = life.operations.index("write steps.csv", life.operations.index("fsync checkpoints"))
        for at in range(1, begun, 2 * every):
            yield Job(part="fork", start=start, deaths=(Death(at=at, half=True),), whole=whole, begins_at=5)

    def replans(self) -> Iterator[Job]:
        """plan.json and config.yaml, written anew by `resume --tensors`."""
        start = (*SMALL, "--tensors", "3M")
        whole, life = self._left_alone("planned", start)
        for line in ("write plan.json.partial", "replace plan.json"):
            assert line in life.operations
            yield Job(part="plan and settings", start=start, deaths=(Death(on=line, half=True),), whole=whole)
        base = self.folder / "planned-base"
        go_on(self.lives, start, base, Death(on="open weights/*"))
        first = ("resume", "--tensors", "1M")
        probe = self.folder / "probe-planned"
        shutil.copytree(base, probe)
        made = self.lives.live(("resume", str(probe), "--tensors", "1M"), probe).operations
        for line in [line for line in made if "plan.json" in line or "config.yaml" in line]:
            for half in (False, True) if line.startswith("write") else (False,):
                deaths = (Death(on=line, half=half),)
                yield Job(part="plan and settings", start=start, deaths=deaths, whole=whole, base=base, first=first)

    def random_run(self, draw: random.Random, left: int) -> Job:
        """A run with up to four moments; every third saves half as often."""
        moments = (draw.uniform(0, self.life.seconds) for _ in range(min(SOME_MOMENTS, left)))
        deaths = tuple(Death(after_seconds=moment) for moment in moments)
        if draw.randrange(3):
            return Job(part="random moments", start=SMALL, deaths=deaths, whole=self.whole)
        return Job(
            part="random moments, saving rarely",
            start=RARELY,
            deaths=deaths,
            whole=self.rarely,
            interval=RARELY_STEPS,
        )


class Workers:
    """Threads with a parent process each."""

    def __init__(self, folder: Path, count: int, until: float) -> None:
        self._folder, self._until = folder, until
        self.left_out = 0  # runs for which the time was over
        self._mine = threading.local()
        self._made: list[Lives] = []
        self._pool = ThreadPoolExecutor(count)

    def map(self, jobs: Sequence[Job]) -> list[Outcome]:
        done = list(self._pool.map(self._perform, jobs))
        self.left_out += done.count(None)
        return [outcome for outcome in done if outcome is not None]

    def _perform(self, job: Job) -> Outcome | None:
        if time.monotonic() > self._until:
            return None
        if not hasattr(self._mine, "lives"):
            self._mine.lives = Lives(self._folder, f"lives-{threading.get_ident()}")
            self._made.append(self._mine.lives)
        return perform(job, self._mine.lives, self._folder / f"run-{threading.get_ident()}")

    def close(self) -> None:
        self._pool.shutdown()
        for lives in self._made:
            lives.__exit__()


def at_random(bench: Bench, workers: Workers, moments: int) -> list[Outcome]:
    """Runs until so many have really been killed: a run may end before its moment comes."""
    draw, outcomes, hit = random.Random(moments), list[Outcome](), 0
    while hit < moments:
        jobs, planned = list[Job](), 0
        while planned < moments - hit:
            jobs.append(bench.random_run(draw, moments - hit - planned))
            planned += len(jobs[-1].deaths)
        done = workers.map(jobs)
        outcomes += done
        hit += sum(len(outcome.deaths) for outcome in done)
        if len(done) < len(jobs) or any(outcome.failure for outcome in done):
            break
    return outcomes


def summary(part: str, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The figures of one part."""
    deaths = [death for outcome in outcomes for death in outcome.deaths]
    kinds = Counter(str(death.operation).split()[0] for death in deaths if death.operation)
    return {
        "part": part,
        "runs": len(outcomes),
        "deaths": len(deaths),
        "in_half_writes": sum(outcome.halves for outcome in outcomes),
        "with_power_cut": sum(outcome.power for outcome in outcomes),
        "before_the_first_checkpoint": sum(death.kept is None and death.step in (0, None) for death in deaths),
        "last_operation_by_kind": dict(sorted(kinds.items())),
        "steps_lost_most": max(death.lost for death in deaths),
        "steps_lost_allowed": outcomes[0].interval,
        "steps_lost_by_deaths": dict(sorted(Counter(str(death.lost) for death in deaths).items())),
        "steps_done_while_saving_most": max(death.saving for death in deaths),
        "differing_bits": sum(outcome.differing_bits for outcome in outcomes),
        "files_astray": sum(outcome.astray for outcome in outcomes),
        "unreadable_events": sum(outcome.unreadable_events for outcome in outcomes),
        "runs_lost": [outcome.failure for outcome in outcomes if outcome.failure],
    }


def report(
    found: dict[str, str | int | float | None], parts: Sequence[dict[str, object]], seconds: float, left_out: int
) -> str:
    """The page."""
    header = ("part", "killed", "in half a write", "with the power cut", "steps lost, most", "interval")
    header += ("runs lost", "differing bits", "files astray")
    names = ("part", "deaths", "in_half_writes", "with_power_cut", "steps_lost_most", "steps_lost_allowed")
    rows = [
        [
            *(str(part[name]) for name in names),
            str(len(part["runs_lost"])),  # type: ignore[arg-type]
            str(part["differing_bits"]),
            str(part["files_astray"]),
        ]
        for part in parts
    ]
    killed = sum(int(str(part["deaths"])) for part in parts)
    return (
        f"{sentence(found)}; {seconds:.0f} s.\n\n"
        f"res20 of width 2, 40 pictures of shapes, {STEPS} steps in two epochs (20 pictures and 6 steps where every "
        f"operation has its turn, 10 and 2 for those of setting up), checkpoint.every_steps={EVERY_STEPS} and a "
        "checkpoint at the end of each epoch. A process dies by SIGKILL before an operation on a file of its run, in "
        "the middle of a write, or at a random moment; then the run goes on as a user would let it, by `lowmem "
        "resume`, or by the same command again before its first checkpoint. Steps lost: those done that the next "
        "process repeats; a run counts as lost, too, if they are more than the interval. Differing bits: of weights, "
        "optimizer, rows of metrics.csv (measurements left out) and steps.csv, against the "
        f"same run left alone. {killed} deaths in all; runs left out because the time was over: {left_out}.\n\n"
        f"{table(header, rows)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200, help="random moments at least")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th operation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after this time")
    arguments = parser.parse_args()
    found, began = conditions(), time.monotonic()
    with tempfile.TemporaryDirectory() as name, Lives(Path(name)) as lives:
        bench, workers = (
            Bench(Path(name), lives),
            Workers(Path(name), arguments.workers, began + 60 * arguments.minutes),
        )
        every = arguments.every
        jobs = [*bench.operations(every), *bench.saved_twice(every), *bench.forks(every), *bench.replans()]
        print(f"{arguments.moments} random moments, then {len(jobs)} runs with a death each", flush=True)
        outcomes = at_random(bench, workers, arguments.moments)
        print(f"random moments done after {time.monotonic() - began:.0f} s", flush=True)
        outcomes += workers.map(jobs)
        workers.close()
    names = list(dict.fromkeys(outcome.part for outcome in outcomes))
    parts = [summary(name, [one for one in outcomes if one.part == name]) for name in names]
    seconds = time.monotonic() - began
    text = report(found, parts, seconds, workers.left_out)
    record = {**found, "seconds": round(seconds), "runs_left_out": workers.left_out, "parts": parts}
    write(arguments.out, "kill", record, text)
    print(text)
    wrong = [part for part in parts if part["runs_lost"] or part["differing_bits"] or part["unreadable_events"]]
    for part in wrong:
        print(part["part"], part["runs_lost"], file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
