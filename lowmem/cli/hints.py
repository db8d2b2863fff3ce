"""What to write instead of a flag that a command has not: settings that have none, and what other trainers call one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lowmem.cli.flags import rows_of
from lowmem.config.catalogue import catalogue, nearest

_OUT = ("output", "output-dir", "save-dir", "log-dir", "name")
_RESUME, _WORKERS = (
    "`lowmem resume RUN` goes on with a run",
    "no worker loads pictures, they are kept in memory: leave it out",
)
_SEVERAL = "`torchrun --nproc-per-node=N -m lowmem train …` trains on several cards"
_OTHER_WAYS = {
    **dict.fromkeys(("resume", "ckpt", "checkpoint"), _RESUME),
    **dict.fromkeys(("workers", "num-workers"), _WORKERS),
    **dict.fromkeys(("gpus", "nproc"), _SEVERAL),
}


def explain(error: Any, arguments: Sequence[str]) -> str:
    """An error of the library under typer in words; for a flag that a command has not, with what to write instead."""
    flag, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    instead = None if flag is None or context is None else _instead_of(flag, context.info_name, arguments)
    return instead or str(error.format_message())


def _instead_of(flag: str, command: str, arguments: Sequence[str]) -> str | None:
    """A line for a `flag` that the command has not, with the value it was typed with; None if nothing is near."""
    name, has = flag.removeprefix("--"), {row.name: row for row, _ in rows_of(command).values()}
    if "--set" not in has:
        return None
    if name in _OTHER_WAYS:
        return f"there is no {flag}: {_OTHER_WAYS[name]}"
    value = _typed_after(flag, arguments)
    if name in _OUT and "--out" in has:
        return f"there is no {flag}: write `--out {value or '…'}`"
    off = name.startswith("no-")
    if (near := nearest(name.removeprefix("no-"))) is None:
        return None
    key, _, says = near.partition("=")
    setting = catalogue()[key]
    if isinstance(setting.default, bool):
        value = "false" if off or value == "false" else "true"
    elif says:
        value = "" if off else says
    own = next((row.name for row in has.values() if row.setting == key and row.kind is not bool), None)
    write = f"{own} {value or '…'}" if own else f"--set {key}={value or '…'}"
    if command in ("resume", "fork") and not setting.on_fork:
        return f"a {command} keeps {key}: `lowmem train {write}` begins a new run with another"
    if command == "resume" and not setting.on_resume:
        return f"a resume keeps {key}: `lowmem fork RUN --at last {write}` begins a new run with another"
    return f"`lowmem {command}` has no {flag}: write `{write}`"


def _typed_after(flag: str, arguments: Sequence[str]) -> str:
    after = [value for before, value in pairwise(arguments) if before == flag and not value.startswith("-")]
    typed = next((one.partition("=")[2] for one in arguments if one.startswith(f"{flag}=")), after[0] if after else "")
    return shlex.quote(typed) if typed else ""
