"""Broken and hostile input for every reader of a file, and the rule for all of them: a value or a LowmemError, soon."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lowmem.core.errors import LowmemError

Mutation = Callable[[random.Random, bytes], bytes]
SECONDS_FOR_ONE = 10.0  # far above what any takes on a busy machine, far below what a hang takes

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**40, 10**400, 0.5, -0.0, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), "", "0", "-1", "NaN", "\x00", "\ud800", "\u0663", "²", "a" * 5000,
    "../../../etc/passwd", "/etc/passwd", "step-99999999", "\x1b]0;owned\x07", "{}", [], {}, [[]], [{}], {"": None},
    [0] * 300, {"a": {"b": {"c": [1, 2, {"d": None}]}}}, "KEEP{conv1,conv1}", "KEEP{z999999999}", [[0, 10**9]],
)  # fmt: skip
TOKENS = tuple(
    text.encode()
    for text in (
        "{", "}", "[", "]", '"', "'", ":", ",", "\n", "\r\n", "\x00", "- ", "? ", "| ", "> ", "# ", "---\n", "...\n",
        "&a [1, 2]", "*a", "<<: {a: b}", "!!python/object/apply:os.system ['touch owned']", "!!binary x", "!!int x",
        "!!timestamp x", "2001-02-31", "!!float .", "!!bool x", "!!set {a}", "!!omap [a]", "0x" + "f" * 90, "1:60:60",
        "9" * 4000, "1" * 5000 + "e5", "1e999", "-1e999", ".nan", ".inf", "null", "true", "NaN", "Infinity", "é",
        "[" * 3000, "{a: " * 300, '{"a":' * 300, "- " * 300, "\t", "%YAML 9.9\n", "%TAG ! !\n", "@", "`", "x" * 70000,
        "width: 1000000000", "epochs: 1000000000000", "999999999999999999999", "-1", "0", "1_000", "\ufeff", "\u2028",
    )
)  # fmt: skip


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_off(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def take_out(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[min(end, begin + 40) :]


def put_in(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[begin:end] * rng.choice((2, 3, 20)) + data[end:]


def replace_value(rng: random.Random, data: bytes) -> bytes:
    """What stands after a colon or a comma becomes something else: still YAML, JSON or CSV, mostly."""
    spans = [match.span(1) for match in re.finditer(rb"[:,][ \t]*([^\s,:{}\[\]#]+)", data)]
    if not spans:
        return put_in(rng, data)
    begin, end = rng.choice(spans)
    value = rng.choice(NASTY) if rng.random() < 0.7 else None
    new = rng.choice(TOKENS) if value is None else json.dumps(value).encode()
    return data[:begin] + new + data[end:]


def noise(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.choice((1, 8, 100, 5000)))


def replace_in_json(rng: random.Random, data: bytes) -> bytes:
    """One value, one key or one item of the parsed value."""
    try:
        value = json.loads(data)
        places = list(_places(value))
    except (ValueError, RecursionError):  # made deeper than the library goes by a mutation before
        return put_in(rng, data)
    if not places:
        return json.dumps(rng.choice(NASTY)).encode()
    holder, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[str(rng.choice(NASTY))[:50]] = holder.pop(key)
    elif action == 1:
        holder.insert(key, holder[key])
    else:
        holder[key] = rng.choice(NASTY)
    try:
        return json.dumps(value, indent=1).encode()
    except (ValueError, RecursionError):  # a number of too many digits
        return data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


ANY: tuple[Mutation, ...] = (flip_bits, cut_off, take_out, put_in, repeat, replace_value, noise)
JSON: tuple[Mutation, ...] = (*ANY, replace_in_json, replace_in_json, replace_in_json)


def in_header(rng: random.Random, data: bytes) -> bytes:
    """The same for the header of a safetensors file, with its length set right or not."""
    length = int.from_bytes(data[:8], "little")
    header = rng.choice(JSON)(rng, data[8 : 8 + length])
    said = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2**20, 2**63, 2**64 - 1))
    return said.to_bytes(8, "little") + header + data[8 + length :]


TENSORS: tuple[Mutation, ...] = (flip_bits, cut_off, put_in, noise, in_header, in_header, in_header, in_header)


@dataclass(frozen=True)
class Reader:
    """`read(data)` is handed what was made of `seed`."""

    name: str
    seed: bytes
    read: Callable[[bytes], object]
    mutations: tuple[Mutation, ...] = ANY
    one_in: int = 1  # of the inputs asked for: trying one is dear


@dataclass
class Tried:
    """What came of a reader's inputs. `tracebacks`: the first of each kind, with the input."""

    name: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    hangs: int = 0
    slowest_seconds: float = 0.0
    tracebacks: dict[str, bytes] = field(default_factory=dict)


def fuzz(reader: Reader, inputs: int, seed: int, until: float | None = None) -> Tried:
    """Tries `inputs` mutations, or fewer if the clock (`time.monotonic`) comes to `until`."""
    rng, tried = random.Random(f"{reader.name} {seed}"), Tried(reader.name)
    for _ in range(-(-inputs // reader.one_in)):
        if until is not None and time.monotonic() > until:
            break
        data = reader.seed
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = rng.choice(reader.mutations)(rng, data)
        _one(reader, data[: 4 << 20], tried)
    return tried


def _one(reader: Reader, data: bytes, tried: Tried) -> None:
    tried.inputs += 1
    began = time.monotonic()
    try:
        with _limit(SECONDS_FOR_ONE):
            reader.read(data)
        tried.read += 1
    except LowmemError as error:
        tried.refused += 1
        if len(str(error)) > 20_000 or "Traceback" in str(error):
            tried.tracebacks[f"a message of {len(str(error))} characters"] = data
    except _Hang:
        tried.hangs += 1
        tried.tracebacks.setdefault("hang", data)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} {error}"[:300]
        tried.tracebacks.setdefault(where, data)
    tried.slowest_seconds = max(tried.slowest_seconds, time.monotonic() - began)


class _Hang(BaseException):
    pass


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Windows has no such timer: there the test's own time limit must do."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rehash(checkpoint: Path) -> None:
    """Makes the commit record fit what is there: somebody who means harm can do that too."""
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
        for data in [(checkpoint / name).read_bytes()]
    }
    step = int(checkpoint.name.partition("-")[2])
    manifest = {"format": "lowmem-checkpoint", "version": 1, "step": step, "files": files}
    (checkpoint / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode())
