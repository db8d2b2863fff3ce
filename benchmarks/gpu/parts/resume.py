"""A run at once against one that is stopped in the middle and resumed, by the command line: the same bits at the end;
and what it took against what its plan said."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from benchmarks.gpu.account import Account
from benchmarks.gpu.parts.commands import lowmem


def work(questions: dict[str, Any], account: Account, artefacts: Path) -> None:
    """`arguments` of `lowmem train`; `steps` in all, `stop_at` of them before the resume."""
    steps, stop_at = questions["steps"], questions["stop_at"]
    with tempfile.TemporaryDirectory(prefix="gpu-resume-") as place:
        whole, parted = Path(place) / "whole", Path(place) / "parted"
        train = ["train", *questions["arguments"], "--out"]
        commands = (
            (f"{steps} steps at once", [*train, str(whole), "--set", f"train.max_steps={steps}"], whole),
            (f"{stop_at} steps", [*train, str(parted), "--set", f"train.max_steps={stop_at}"], parted),
            ("resumed", ["resume", str(parted), "--set", f"train.max_steps={steps}"], parted),
        )
        for name, command, run in commands:
            refused = lowmem(command, artefacts / "lowmem.txt", account.seconds_left)
            if refused is not None:
                account.row(name, refused, met=False)
                return
            account.row(name, _used(run))
        ours, theirs = _digests(whole), _digests(parted)
        met = ours == theirs and len(ours) > 1
        account.row("the same SHA-256 of weights and momentum", {"at_once": ours, "resumed": theirs}, met=met)


def _used(run: Path) -> dict[str, Any]:
    """The run's own record of its memory: predicted and measured bytes, and its events by name."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [event for event in events if event["event"] == "measured"]
    return {"measured": measured[-1] if measured else None, "events": [event["event"] for event in events]}


def _digests(run: Path) -> dict[str, str]:
    """Of every file of tensors in the newest checkpoint: SHA-256 over names and values, in the names' order (a file of
    the same tensors can differ in the order of its header)."""
    newest = max((run / "checkpoints").glob("step-*"))
    found = {"checkpoint": newest.name}
    for path in sorted(newest.glob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode())
            digest.update(tensor.tobytes())
        found[path.name] = digest.hexdigest()
    return found
