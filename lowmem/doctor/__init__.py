"""What is wrong with this machine for a training run, and the command that mends it.

`gather` collects `Facts` once; a check is a pure function of them. What may crash (torch, torchvision, the card) is
asked in a process of its own, so that the doctor outlives its patient. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowmem.doctor import checks_install, checks_run
from lowmem.doctor.facts import Facts, Finding, Status, gather

__all__ = ["CHECKS", "Facts", "Finding", "Status", "can_start", "examine", "gather"]

# In the order they are shown: what is installed, the card, the run. None: it does not apply here, or what it needs is
# unknown.
CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    checks_install.python,
    checks_install.torch,
    checks_install.torchvision,
    checks_install.driver,
    checks_run.card,
    checks_install.build,
    checks_run.visible,
    checks_install.kernel,
    checks_run.memory,
    checks_run.display,
    checks_run.link,
    checks_run.host_memory,
    checks_run.precision,
    checks_run.memory_format,
    checks_run.spill,
    checks_run.allocator,
    checks_run.variables,
    checks_run.processor,
    checks_run.refusal,
    checks_run.disk,
    checks_run.data,
)


def examine(facts: Facts) -> list[Finding]:
    return [finding for check in CHECKS if (finding := check(facts)) is not None]


def can_start(findings: Iterable[Finding]) -> bool:
    return all(finding.status != Status.FAIL for finding in findings)
