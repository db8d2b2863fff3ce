"""Makes the job: every plan and every question, where there is no card, so that no second on the card is spent on
planning. A rehearsal asks the same questions of small networks on the CPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks.conditions import conditions
from benchmarks.gpu import questions
from benchmarks.gpu.job import PARTS, Job, write_job
from benchmarks.gpu.plans import Plans, Scale


def prepare(folder: Path, scale: Scale) -> None:
    """The job in a folder."""
    plans = Plans(scale)
    asked = {
        "facts": questions.facts(scale, plans),
        "gradients": questions.gradients(scale, plans),
        "memory": questions.memory(scale, plans),
        "host": questions.host(scale, plans),
        "out-of-memory": questions.survival(scale, plans),
        "resume": questions.resume(scale, plans),
        "acceptance": questions.acceptance(scale, plans),
        "tests": {"files": questions.marked_files()},
    }
    limits = {part.name: part.seconds for part in PARTS} | dict(scale.limits)
    write_job(folder, Job(device=scale.device, limits=limits, conditions=conditions()), asked)
