"""Questions to clean processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu.account import NO_TIME, Account
from lowmem.isolate import run

_LEAST_SECONDS = 5.0  # torch alone takes that long to load


def ask(account: Account, function: str, question: Mapping[str, Any]) -> dict[str, Any] | str:
    """The answer of a `module:function` in a clean process within what is left of the part's time; or in words why
    there is none."""
    if account.seconds_left < _LEAST_SECONDS:
        return NO_TIME
    found: dict[str, Any] | str = run(function, question, timeout_seconds=account.seconds_left).answer_or_refusal
    return found


def ask_side_by_side(
    account: Account, asked: Sequence[tuple[str, Mapping[str, Any]]]
) -> Iterator[dict[str, Any] | str]:
    """The answers in order, `account.at_once` at a time: for what measures neither seconds nor how full the card is.
    Bits, and the bytes of a process's own allocator, are the same beside others."""
    with ThreadPoolExecutor(account.at_once) as pool:
        yield from pool.map(lambda one: ask(account, *one), asked)
