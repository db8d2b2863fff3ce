"""Gradients of planned steps against those of the untouched model, bit for bit (invariant 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.account import Account
from benchmarks.gpu.parts.asking import ask_side_by_side
from lowmem.bench.plan_checks import GRADIENTS
from lowmem.trial import WORK


def work(questions: list[dict[str, Any]], account: Account, artefacts: Path) -> None:
    """A question is one process that compares, with all of the card, or (`scarce`) two that digest."""
    asked: list[tuple[str, Mapping[str, Any]]] = []
    for one in questions:
        if one["kind"] == "scarce":
            asked += [(WORK, one["untouched"]), (WORK, one["planned"])]
        else:
            asked.append((GRADIENTS, one["question"]))
    answers = ask_side_by_side(account, asked)
    for one in questions:
        if one["kind"] == "scarce":
            _scarce(one, next(answers), next(answers), account)
        else:
            _ample(one, next(answers), account)


def _ample(one: dict[str, Any], answer: dict[str, Any] | str, account: Account) -> None:
    if isinstance(answer, str):
        account.row(one["name"], answer, met=False)
        return
    # With deterministic kernels: that is what is promised. `batch` says what of it the untouched model had room for.
    account.row(one["name"], answer, met=answer.get("deterministic_bitwise", answer["bitwise"]))


def _scarce(
    one: dict[str, Any], untouched: dict[str, Any] | str, planned: dict[str, Any] | str, account: Account
) -> None:
    """The planned step where the allocator may hold no more than its plan's budget, the untouched one where it may
    hold all: kernels that are chosen by what is free would show here."""
    for name, answer in (("untouched", untouched), ("planned", planned)):
        refused = answer if isinstance(answer, str) else answer.get("refused")
        if refused is not None:
            account.row(one["name"], f"{name}: {refused}", met=False)
            return
    assert isinstance(untouched, dict)
    assert isinstance(planned, dict)
    same = {what: untouched[what] == planned[what] for what in ("gradients", "buffers", "norm_updates")}
    found = {**same, "cap_bytes": one["planned"]["cap_bytes"], "untouched": untouched, "planned": planned}
    account.row(one["name"], found, met=all(same.values()))
