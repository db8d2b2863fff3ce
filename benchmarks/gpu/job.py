"""What is to be done on the card: the parts in their order, with limits of time; and the folder that holds their
questions, made beforehand where there is no card. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.core.errors import UsageError
from lowmem.core.reading import Unreadable, read_json
from lowmem.runs.atomic import write_text_atomic

FORMAT = 1
_JOB = "job.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """`seconds`: the most that it may take on a card; None: what the others leave. `tells`: what one knows after it."""

    name: str
    seconds: float | None
    tells: str


# The first three minutes tell the most; all of them together stay under nine.
PARTS = (
    Part(name="facts", seconds=60, tells="bits, bytes and seconds of the library's kernels that plans rely on"),
    Part(
        name="gradients", seconds=60, tells="whether a planned step has autograd's bits, with ample and scarce memory"
    ),
    Part(
        name="memory", seconds=90, tells="allocated and reserved bytes against the prediction, and time against plain"
    ),
    Part(name="host", seconds=60, tells="the planned step with and without host memory, pinned and not"),
    Part(
        name="out-of-memory",
        seconds=60,
        tells="whether a step that runs out of memory is repeated, to the same weights",
    ),
    Part(name="resume", seconds=120, tells="whether 20 + 20 steps end with the weights of 40, and what they took"),
    Part(name="acceptance", seconds=80, tells="the most telling cells of `lowmem bench --suite acceptance`"),
    Part(name="tests", seconds=None, tells="the tests marked gpu, those that matter most first"),
)


def select(names: str | None) -> tuple[Part, ...]:
    """The parts of a list with commas, in their own order; all for None. Raises UsageError for an unknown one."""
    if names is None:
        return PARTS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {part.name for part in PARTS}
    if odd := [name for name in wanted if name not in known]:
        raise UsageError(f"there is no part {odd[0]!r}: the parts are {', '.join(part.name for part in PARTS)}")
    return tuple(part for part in PARTS if part.name in wanted)


@dataclass(frozen=True, kw_only=True)
class Job:
    """`device`: what the questions were made for; on `cpu` it is a rehearsal. `limits`: part -> seconds (None: what
    the others leave). `conditions`: of the preparing machine."""

    device: str
    limits: Mapping[str, float | None]
    conditions: Mapping[str, Any]

    def limit_seconds(self, part: Part, left_seconds: float) -> float:
        limit = self.limits.get(part.name, part.seconds)
        return left_seconds if limit is None else min(limit, left_seconds)


def write_job(folder: Path, job: Job, questions: Mapping[str, Any]) -> None:
    """`job.json`, and `PART.json` with the questions of each part; `job.json` last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, asked in questions.items():
        write_text_atomic(questions_file(folder, name), json.dumps(asked, indent=1) + "\n")
    write_text_atomic(folder / _JOB, json.dumps({"format": FORMAT, **asdict(job)}, indent=1) + "\n")


def questions_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def read_job(folder: Path) -> Job:
    """Raises UsageError for a folder that holds none."""
    try:
        found = read_json(folder / _JOB)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise UsageError(f"{folder / _JOB} is of another version: prepare it again")
        return Job(**found)
    except (OSError, Unreadable, TypeError) as error:
        raise UsageError(
            f"{folder} holds no prepared job ({error}): make it with `python -m benchmarks.gpu prepare --out {folder}`"
        ) from None
