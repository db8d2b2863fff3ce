"""A run that is killed again and again and goes on until it ends, and what is measured at each death."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lowmem.core.errors import CorruptCheckpoint, ExitCode
from lowmem.runs import checkpoint as checkpoints
from tests.conftest import exact_rows
from tests.faults.lives import Death, Life, Lives
from tests.tiny import arguments

EVERY_STEPS = 4  # a kill may lose; there is a checkpoint every two steps then, and epochs have five
SMALL = (
    "train",
    *arguments(
        "train.epochs=2", "train.batch=8", "data.train_subset=40", "data.test_subset=10", "train.precision=auto",
        "train.memory_format=contiguous", "checkpoint.every_minutes=null", f"checkpoint.every_steps={EVERY_STEPS}",
    ),
)  # fmt: skip
STEPS = 10
_ASIDE = re.compile(r"\.aside-step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Killed:
    """One death. `step`: done by then in that life, `kept`: of the newest checkpoint that verifies (None: there is
    none); `saving`: steps done since the snapshot that was being written, if one was. `base`: where the run begins."""

    operation: str | None
    step: int | None
    kept: int | None
    saving: int
    base: int = 0

    @property
    def lost(self) -> int:
        kept = self.base if self.kept is None else self.kept
        return 0 if self.step is None else max(0, self.step - kept)  # below: it died while it resumed


@dataclass
class Story:
    """All the deaths of a run that ended."""

    run: Path
    deaths: list[Killed] = field(default_factory=list)


class Lost(AssertionError):
    """The run did not survive: what was done, and what the process said."""


def survive(
    lives: Lives,
    start: tuple[str, ...],
    run: Path,
    deaths: Iterable[Death],
    every: int = EVERY_STEPS,
    base: int = 0,
) -> Story:
    """Starts `run` with the command, dies each of the deaths in turn (each time going on from there), then goes on to
    the end. `base`: the step at which the run begins, which a fork does not do itself.

    Raises Lost if it cannot go on, if more than `every` steps are lost, or if the last process did not go on from the
    newest checkpoint.
    """
    story, kept = Story(run), newest(run)
    for death in (*deaths, Death()):
        over = run.exists() and is_over(run)
        life = go_on(lives, start, run, death)
        if life.code == ExitCode.DONE:
            if not over and story.deaths and kept is not None and kept != resumed_at(run):
                raise Lost(f"{run}: {story.deaths[-1]}, then resumed at step {resumed_at(run)}")
            return story
        if life.code != -signal.SIGKILL or death == Death():
            raise Lost(f"{run}, after {story.deaths}: left with {life.code}: {life.output}")
        before, kept = kept, newest(run)
        story.deaths.append(replace(_killed(life, kept), base=base))
        if (before or 0) > (kept or 0):
            raise Lost(f"{run}: {story.deaths[-1]} had a checkpoint of step {before} before")
        if story.deaths[-1].lost > every:
            raise Lost(f"{run}: {story.deaths[-1]} lost more than {every} steps")
    raise AssertionError("unreachable: a life that nobody ends leaves with some code")


def go_on(lives: Lives, start: tuple[str, ...], run: Path, death: Death) -> Life:
    """What a user does: resume; and where the run had not begun, what resume says: the same command once more."""
    if run.exists() and newest(run) is not None:
        return lives.live(("resume", str(run)), run, death)
    return lives.live((*start, "--out", str(run)), run, death)


def is_over(run: Path) -> bool:
    """Whether the run has said that it is finished: whoever is killed as it leaves has nothing to go on with."""
    return (run / "events.jsonl").exists() and any(event["event"] == "done" for event in _events(run)[0])


def resumed_at(run: Path) -> int | None:
    """The step at which the latest process went on, None if none did."""
    return max((event["step"] for event in _events(run)[0] if event["event"] == "resume"), default=None)


def newest(run: Path) -> int | None:
    """The step of the newest checkpoint that verifies, None if there is none."""
    try:
        return checkpoints.load_newest(run / "checkpoints")[0].step
    except CorruptCheckpoint:
        return None


def _killed(life: Life, kept: int | None) -> Killed:
    *done, last = life.operations or ("",)
    begun = [int(found[1]) for line in life.operations if (found := _ASIDE.search(line)) and ".preflight" not in line]
    at = begun[-1] if begun else None
    over = at is None or any(line == f"replace checkpoints/{checkpoints.folder_name(at)}" for line in done)
    saving = 0 if over or life.step is None else max(0, life.step - (at or 0))
    return Killed(operation=last or None, step=life.step, kept=kept, saving=saving)


def differing_bits(run: Path, whole: Path) -> int:
    """Bits in which weights, optimizer, state and exact rows differ; a file, tensor or row on one side only counts
    whole."""
    names = ("weights/last.safetensors", "weights/best.safetensors", "steps.csv", "gradients.csv")
    last = f"checkpoints/{checkpoints.folder_name(newest(whole) or 0)}"
    names += tuple(f"{last}/{name}.safetensors" for name in ("model", "optimizer"))
    rows = (json.dumps(exact_rows(path)).encode() for path in (run, whole))
    states = (_exact_state(path / last / "state.json") for path in (run, whole))
    return _bits(*rows) + _bits(*states) + sum(_file_bits(run / name, whole / name) for name in names)


def _exact_state(file: Path) -> bytes:
    """All of a checkpoint's state but the times that were measured."""
    if not file.is_file():
        return b""
    state = json.loads(file.read_bytes())
    for name in ("elapsed_seconds", "train_seconds"):
        del state["run"][name]
    return json.dumps(state, sort_keys=True).encode()


def _file_bits(left: Path, right: Path) -> int:
    if not left.is_file():
        return 8 * right.stat().st_size
    if left.suffix != ".safetensors":
        return _bits(left.read_bytes(), right.read_bytes())
    ours, theirs = load_file(left), load_file(right)
    names = ours.keys() | theirs.keys()
    return sum(_bits(*(side[name].tobytes() if name in side else b"" for side in (ours, theirs))) for name in names)


def _bits(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right))
    a, b = (np.frombuffer(side[:length], dtype=np.uint8) for side in (left, right))
    return int(np.unpackbits(a ^ b).sum()) + 8 * abs(len(left) - len(right))


def litter(run: Path, whole: Path) -> set[str]:
    """Names in one folder and not in the other."""
    return set.symmetric_difference(
        *({str(path.relative_to(side)) for path in side.rglob("*")} for side in (run, whole))
    )


def unreadable_events(run: Path) -> list[str]:
    """Lines of events.jsonl that are no JSON object."""
    return _events(run)[1]


def _events(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The events, and the lines that are none."""
    good, bad = [], []
    for line in (run / "events.jsonl").read_text().split("\n")[:-1]:
        try:
            event = json.loads(line)
            good.append({"event": event["event"], **event})
        except (ValueError, KeyError, TypeError):
            bad.append(line)
    return good, bad
