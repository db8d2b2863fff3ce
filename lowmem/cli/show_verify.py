"""`lowmem verify`: a line a finding, or JSON."""

from __future__ import annotations

from pathlib import Path

from lowmem.cli.printed import printable
from lowmem.core.errors import ExitCode
from lowmem.lifecycle.run_identity import verify
from lowmem.runs.verify import Verified, to_json


def show_verify(run: Path, as_json: bool) -> ExitCode:
    """Looks, prints. CHECKPOINT if the run cannot be resumed, DONE otherwise."""
    found = verify(run)
    if as_json:
        print(to_json(found))
    else:
        width = max(len(finding.where) for finding in found.findings)
        for finding in found.findings:
            print(printable(f"{finding.status:8} {finding.where:{width}}  {finding.what}"))
        print(printable(_summary(found)))
    return ExitCode.DONE if found.can_resume else ExitCode.CHECKPOINT


def _summary(found: Verified) -> str:
    if not found.can_resume:
        return f"{found.run} cannot be resumed: {found.obstacle}"
    assert found.epoch is not None
    if found.finished:
        return f"{found.run} is finished: all {found.epoch} epochs are in {found.resumes_from}"
    return (
        f"{found.run} can be resumed exactly, from {found.resumes_from}: epoch {found.epoch + 1}, "
        f"step {found.step_in_epoch} of it"
    )
