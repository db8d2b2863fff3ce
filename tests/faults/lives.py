"""Processes that run `lowmem` commands and are killed, forked from one that has imported everything: it saves seconds.

    python -m tests.faults.lives        reads an order a line, writes an answer a line, both JSON

Linux only.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
AVAILABLE = sys.platform == "linux"
_SHARED = struct.Struct("q")  # the last step
_NONE = -1


@dataclass(frozen=True, kw_only=True)
class Death:
    """When a process is to die: before its operation number `at`, or before the first like the pattern `on`, after half
    of its bytes if `half`; or so many seconds after it began. `power`: what was not fsynced is lost. Never, if none of
    these is given."""

    at: int | None = None
    on: str | None = None
    half: bool = False
    power: bool = False
    after_seconds: float | None = None
    signal: int = int(signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Life:
    """What became of a process. `code`: its exit code, negative for a signal. `step`: the last it had done, None if it
    never had a run. `operations`: what it did to the run's files, like "fsync metrics.csv"; killed before the last."""

    code: int
    step: int | None
    operations: tuple[str, ...]
    output: str
    seconds: float


class Lives:
    """The parent of the processes. Use as a context manager; one process at a time."""

    def __init__(self, folder: Path, name: str = "lives") -> None:
        self._log, self._output = folder / f"{name}.log", folder / f"{name}.out"
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "tests.faults.lives"]
        self._server = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.kill()  # it has nothing to finish
        self._server.communicate()

    def live(self, arguments: Sequence[str], run: Path, death: Death | None = None) -> Life:
        """`lowmem ARGUMENTS`, which writes the folder `run`, until it ends or dies."""
        order = {
            "arguments": list(arguments),
            "run": str(run),
            "death": asdict(death or Death()),
            "log": str(self._log),
            "output": str(self._output),
        }
        for file in (self._log, self._output):  # killed at once, it writes neither
            file.write_text("")
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        operations = tuple(self._log.read_text().splitlines())
        return Life(**answer, operations=operations, output=self._output.read_text(errors="replace"))


def _serve() -> None:
    """The process that forks. It never runs an operation itself, so that its children start without threads."""
    import matplotlib.figure  # noqa: F401
    import torch

    torch.set_num_threads(1)
    answers, sys.stdout = os.dup(1), sys.stderr
    os.dup2(2, 1)
    for line in sys.stdin:
        answer = _fork(json.loads(line))
        os.write(answers, (json.dumps(answer) + "\n").encode())


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    shared = mmap.mmap(-1, _SHARED.size)
    shared[:] = _SHARED.pack(_NONE)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _child(order, shared)
        finally:
            os._exit(1)
    after = order["death"]["after_seconds"]
    if after is not None:
        process = os.pidfd_open(child)
        if not select.select([process], [], [], after)[0]:
            os.kill(child, order["death"]["signal"])
        os.close(process)
    _, status = os.waitpid(child, 0)
    (step,) = _SHARED.unpack(shared[:])
    return {
        "code": os.waitstatus_to_exitcode(status),
        "step": None if step == _NONE else step,
        "seconds": time.monotonic() - began,
    }


def _child(order: dict[str, Any], shared: mmap.mmap) -> None:
    from lowmem.cli.main import main
    from tests.faults.hook import Hook

    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w") for stream in (1, 2))
    _watch_steps(shared)
    death = order["death"]
    hook = Hook(
        Path(order["run"]),
        Path(order["log"]),
        die_at=death["at"],
        die_on=death["on"],
        half=death["half"],
        power=death["power"],
        death=death["signal"],
    )
    hook.install()
    code = 1
    try:
        main(order["arguments"])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch_steps(shared: mmap.mmap) -> None:
    """Leaves the last step done where the parent finds it, whenever the process dies."""
    from lowmem.runs.checkpoint_state import RunState

    def note(state: RunState, name: str, value: Any) -> None:
        object.__setattr__(state, name, value)
        if name == "step":
            shared[:] = _SHARED.pack(max(value, *_SHARED.unpack(shared[:])))

    RunState.__setattr__ = note  # type: ignore[assignment]


if __name__ == "__main__":
    _serve()
