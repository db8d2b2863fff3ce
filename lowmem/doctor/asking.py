"""Asks the probe (`lowmem.doctor.probe`) in processes of its own, so that nothing in them can kill the doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 120.0  # the first use of a card by a new build may compile for a minute


@dataclass(frozen=True)
class Answers:
    """What each stage found, and why the others did not: an exception, the end of the process, or the time."""

    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)


def ask(values: Mapping[str, object], stages: Sequence[str], *, timeout_seconds: float = _TIMEOUT_SECONDS) -> Answers:
    """Runs the stages in one process; if it dies in one, the rest in another. Never raises.

    `values`: dotted name -> setting. Without torch none of the later stages is tried.
    """
    results: dict[str, Mapping[str, Any]] = {}
    troubles: dict[str, str] = {}
    left = list(stages)
    while left:
        answered, died = _ask_once(values, left, timeout_seconds)
        for line in answered:
            if "result" in line:
                results[line["stage"]] = line["result"]
            elif "trouble" in line:
                troubles[line["stage"]] = line["trouble"]
        begun = [line["begin"] for line in answered if "begin" in line]
        unfinished = [stage for stage in begun if stage not in results and stage not in troubles]
        if unfinished:
            troubles[unfinished[0]] = died
        elif not begun:  # it did not even start: it will not start again either
            troubles[left[0]] = died
            break
        if "torch" in troubles:
            break
        left = [stage for stage in left if stage not in begun]
    return Answers(results, troubles)


def _ask_once(
    values: Mapping[str, object], stages: Sequence[str], timeout_seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """(its lines, what ended it)."""
    # -P: not what lies in the current folder, which `lowmem train` would not import either. Last on the path: this
    # lowmem, which need not be installed.
    here = str(Path(__file__).resolve().parents[2])
    start = f"import sys; sys.path.append({here!r}); from lowmem.doctor.probe import run; run()"
    command = [sys.executable, "-P", "-c", start, *stages]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(values),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired as error:
        return _lines(_text(error.stdout)), f"no answer within {timeout_seconds:g} seconds"
    except OSError as error:
        return [], f"no process could be started ({error.strerror or error})"
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
    ended = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
    return _lines(done.stdout), f"the process {ended}: {last[0]}" if last else f"the process {ended}"


def _lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # cut off
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _text(value: bytes | str | None) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value or ""
