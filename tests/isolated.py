"""Functions that tests run in processes of their own (`tests/unit/test_isolate.py`), and how to stay in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lowmem.isolate import CallResult


def call_here(function: str, argument: Any, **_: object) -> CallResult:
    """As `lowmem.isolate.run`, in this process: what is done is tested, not where."""
    module, _colon, name = function.partition(":")
    answer = getattr(import_module(module), name)(json.loads(json.dumps(argument)))
    return CallResult(ended="answered", answer=json.loads(json.dumps(answer)))


def nothing_to_prepare() -> None:
    pass


def double(number: int) -> dict[str, Any]:
    return {"number": 2 * number, "pid": os.getpid(), "modules": sorted({"torch", "lowmem.measure"} & set(sys.modules))}


def parent(_: object) -> int:
    return os.getppid()


def chatter(_: object) -> str:
    print('{"answer": "printed"}', flush=True)
    os.write(1, b'{"answer": "written to the descriptor"}\n')
    subprocess.run([sys.executable, "-c", "print('{\"answer\": 3}')"], check=True)
    print("unfinished", end="")
    return "returned"


def environment(name: str) -> str | None:
    return os.environ.get(name)


def read_input(_: object) -> str:
    return sys.stdin.read()


def crash(how: str) -> object:
    if how == "exception":
        raise ValueError("no such kernel\nset CUDA_LAUNCH_BLOCKING=1")
    if how == "leaves":
        raise SystemExit("no card")
    if how == "library":
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
    if how == "abort":
        os.write(2, b"terminate called\n")
        os.abort()
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "silent":
        os._exit(0)
    return {1, 2}  # no JSON


def sleep(seconds: float) -> Iterator[str]:
    yield "before"
    time.sleep(seconds)


def steps(count: int) -> Iterator[int]:
    for number in range(count):
        if number == 3:
            os._exit(9)
        yield number
    return "done"


def allocate(spare_bytes: int) -> int:
    import resource

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + spare_bytes, -1))
    return len(bytearray(10 * spare_bytes))


def outlive(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)
