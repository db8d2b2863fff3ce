"""Trials on the CPU in less time: forked from a process that has imported the library and done nothing else.

Importing torch takes seconds, a small network's step a tenth of one. A child of `python -m lowmem.trial.forked` starts
with the library loaded and no network, no cached kernel, no thread and no tensor of another trial, which is what a
process of its own is for. Only on Linux (elsewhere a fork is not safe, or is none) and never for CUDA, which does not
survive a fork; there every trial is a whole new process, as `run_trial` starts it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import IO

from lowmem.trial.trial import Trial, TrialResult, result_of, run_trial, understood


def forks(device: str) -> bool:
    """Whether trials on this device can be forked here."""
    return device == "cpu" and sys.platform == "linux"


class Trials:
    """Context manager; runs trials one after the other, each in a clean process. What goes wrong in one, the process
    that forks included, is a refusal of that one."""

    def __init__(self, device: str) -> None:
        self._forks = forks(device)
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Trials:
        if self._forks:
            self._started()  # it takes seconds, in which the first plan can be made
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, trial: Trial, timeout_seconds: float) -> TrialResult:
        if not self._forks:
            return run_trial(trial, timeout_seconds)
        server = self._started()
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill(server)

        timer = threading.Timer(timeout_seconds, end)
        timer.start()
        try:
            line = _asked(server, json.dumps(asdict(trial)))
        finally:
            timer.cancel()
        if line:
            answer = json.loads(line)
            return result_of(understood(answer["code"], answer["output"], answer["errors"]))
        self._end()
        return result_of(f"took longer than {timeout_seconds:,.0f} s" if late.is_set() else understood(-9, "", ""))

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            pipe = subprocess.PIPE
            # A session of its own, so that a trial and what forked it are ended together.
            self._server = subprocess.Popen(
                (sys.executable, "-m", "lowmem.trial.forked"),
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        return self._server

    def _end(self) -> None:
        if self._server is not None:
            self._kill(self._server)
            for stream in (self._server.stdin, self._server.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            self._server.wait()
            self._server = None

    @staticmethod
    def _kill(server: subprocess.Popen[str]) -> None:
        if server.returncode is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _asked(server: subprocess.Popen[str], question: str) -> str:
    """The answer, or nothing if the process has ended."""
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(question + "\n")
        server.stdin.flush()
    except OSError:
        return ""
    return server.stdout.readline()


def serve() -> None:
    """A child for every line of standard input, until there are no more."""
    _load()
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                _child(line, output, errors)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            texts = [_tail(file) for file in (output, errors)]
        print(json.dumps({"code": code, "output": texts[0], "errors": texts[1]}), flush=True)


def _load() -> None:
    """What a trial imports, and what the library itself imports when its first optimizer is made. Nothing is computed:
    threads that exist before a fork are gone after it."""
    import torch

    import lowmem.trial.worker  # noqa: F401

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def _child(line: str, output: IO[str], errors: IO[str]) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    code = 1
    try:
        from lowmem.trial.worker import work

        print(json.dumps(work(Trial(**json.loads(line)))), flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)  # not through the parent's own ends: it still reads its questions


def _tail(file: IO[str]) -> str:
    file.seek(0)
    return file.read()[-100_000:]


if __name__ == "__main__":
    serve()
