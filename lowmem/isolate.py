"""A function in a clean child process: JSON in, JSON out, a limit of time, and a verdict of how it ended.

`run` starts a Python of its own for one call: nothing of the caller is imported, cached or allocated there, and
whatever happens in it, up to the death of the process, is a `CallResult` here and never an exception. The child
imports what the caller would: this `lowmem`, and the rest from where PYTHONPATH says and the caller looks. It ends when
the caller does.

What the function prints, in Python or in C, goes to the child's standard error: the answer has a pipe of its own that
nothing else writes to. A function that yields hands on each value when it is made, so that what was known before a
crash is known (`CallResult.parts`); what it returns is the answer.

`Forks` does the same from a process that has imported what the functions need and done nothing else. Importing torch
takes seconds, a small network's step a tenth of one. Only on Linux (elsewhere a fork is not safe, or is none), and
never for CUDA, which does not survive a fork; elsewhere each call is a `run`. Known limitation: a forked call that is
under way when the caller is killed is finished first.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import IO, Any, Literal

OUT_OF_MEMORY = "out of memory"
# Of a process that the system ended for its memory, as the exit codes of the two shells' conventions.
_KILLED = (-9, 137)
_TAIL_BYTES = 100_000
_LONGEST_WORDS = 200
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# This `lowmem`, wherever it lies.
_START = (
    "import sys; sys.path.insert(0, {root!r}); import lowmem; del sys.path[0]; "
    "from lowmem.isolate import serve; serve({path!r})"
)

Call = Callable[..., "CallResult"]  # as `run` is called


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """How a call ended. `answer`: what the function returned; `parts`: what it yielded before, whatever the end.

    `words`: where it did not answer, the exception's type and first line, else the last line that the process wrote.
    `code`: the exit code of a process that crashed, of one that was ended by a signal minus its number.
    """

    ended: Literal["answered", "out of memory", "crashed", "too long", "not started"]
    answer: Any = None
    parts: tuple[Any, ...] = ()
    words: str = ""
    code: int | None = None

    @property
    def refused(self) -> str | None:
        """Why there is no answer, in words; None if there is one."""
        if self.ended == "answered":
            return None
        if self.ended == "crashed":
            return f"crashed: {self.words or f'ended with code {self.code}'}" if self.code else "answered nothing"
        return OUT_OF_MEMORY if self.ended == "out of memory" else self.words

    @property
    def answer_or_refusal(self) -> Any:
        """For those whose answers are no texts."""
        return self.answer if self.refused is None else self.refused


def run(
    function: str, argument: Any = None, *, timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> CallResult:
    """`module:function` called with `argument`, which is a JSON value, in a process of its own. `environment`: the
    whole of it, None: this process's."""
    with Forks(None) as once:
        return once(function, argument, timeout_seconds=timeout_seconds, environment=environment)


class Forks:
    """Context manager; called as `run` is, one call after the other. `prepare`: a `module:function` without arguments
    that imports what is needed (None: each call has a process of its own). It must compute nothing: threads that exist
    before a fork are gone after it. What reads the environment when it is imported reads the caller's."""

    def __init__(self, prepare: str | None) -> None:
        self._prepare = prepare if sys.platform == "linux" else None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Forks:
        if self._prepare is not None:
            with suppress(OSError):  # what is wrong shows at the first call
                self._started(None)  # it takes seconds, in which the caller can do something else
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(
        self,
        function: str,
        argument: Any = None,
        *,
        timeout_seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> CallResult:
        asked = {"function": function, "argument": argument, "environment": environment and dict(environment)}
        request = json.dumps(asked).encode() + b"\n"
        try:
            process = self._started(environment)
        except OSError as error:
            return CallResult(ended="not started", words=f"could not be started ({error.strerror or error})")
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(timeout_seconds, end)
        timer.start()
        try:
            assert process.stdin is not None
            with suppress(OSError):  # it is gone already: its end says how
                process.stdin.write(request)
                process.stdin.flush()
            parts, said = _read(process)
        finally:
            timer.cancel()
        # Of a forked process the one that forks tells how it ended.
        code, errors = (said["ended"], said["errors"]) if "ended" in said else (process.wait(), _tail(self._errors))
        if "answer" in said:
            return CallResult(ended="answered", answer=said["answer"], parts=parts)
        if late.is_set():
            return CallResult(ended="too long", parts=parts, words=f"took longer than {timeout_seconds:,.0f} s")
        from lowmem.measure.out_of_memory import says_out_of_memory

        raised = said.get("error", "")
        words = (raised or "".join(errors.strip().splitlines()[-1:]))[:_LONGEST_WORDS]
        full = code in _KILLED or (code != 0 and says_out_of_memory(f"{errors}\n{raised}"))
        return CallResult(ended="out of memory" if full else "crashed", parts=parts, words=words, code=code)

    def _started(self, environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
        """The process that forks; without one, or if it is gone, a new one."""
        if self._prepare is not None and self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        start = _START.format(root=str(Path(__file__).resolve().parents[1]), path=sys.path)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", start, *([] if self._prepare is None else [self._prepare])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment if self._prepare is None else None,
            start_new_session=True,  # so that it and what it forked are ended together; Windows has none of this
        )
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        self._kill()
        with suppress(OSError), self._errors, self._process:
            self._process = None

    def _kill(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return  # its number may be another's by now
        kill_session(self._process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """One that was started with a session of its own, and with it what it has started; on Windows it alone."""
    if os.name == "nt":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _read(process: subprocess.Popen[bytes]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What was yielded, and the rest of what the child says until a call is over, or it is gone."""
    parts: list[Any] = []
    said: dict[str, Any] = {}
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(ValueError):  # cut off
            message = json.loads(line)
            if "part" in message:
                parts.append(message["part"])
            else:
                said |= message
        if "ended" in said:
            break
    return tuple(parts), said


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return file.read().decode("utf-8", errors="replace")


# -- in the child ------------------------------------------------------------------------------------------------------


def serve(path: Sequence[str]) -> None:
    """Answers one call on standard input and ends; with what to prepare as argument, forks for every call until there
    are no more. `path`: where the caller looks for modules."""
    given = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    sys.path[:] = dict.fromkeys((*given, *path, *sys.path))
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:  # what the function starts must not read of the pipe
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    if len(sys.argv) < 2:
        line = requests.readline()
        threading.Thread(target=_end_with_caller, args=(requests,), daemon=True).start()
        _answer(line, reply)
    resolve_name(sys.argv[1])()
    for line in requests:
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # not longer than the process that forks
                os.dup2(errors.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _answer(line, reply)
            _, status = os.waitpid(child, 0)
            reply(ended=os.waitstatus_to_exitcode(status), errors=_tail(errors))


def _answer(line: bytes, reply: Callable[..., None]) -> None:
    """Does what is asked, and ends the process: at once, so that nothing at its end can undo an answer."""
    code = 1
    try:
        request = json.loads(line)
        if request["environment"] is not None:
            os.environ.clear()
            os.environ.update(request["environment"])
        answer = resolve_name(request["function"])(request["argument"])
        while isinstance(answer, Iterator):
            try:
                reply(part=next(answer))
            except StopIteration as stop:
                answer = stop.value
        reply(answer=answer)
        code = 0
    except BaseException as error:
        with suppress(OSError):  # a full disk must not take the answer's place
            traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        with suppress(OSError):
            reply(error=f"{type(error).__name__}: {first}" if first else type(error).__name__)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _end_with_caller(requests: IO[bytes]) -> None:
    requests.read()  # until the other end is closed, or gone with its process
    os._exit(1)
