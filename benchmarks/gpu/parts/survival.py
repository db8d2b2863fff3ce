"""Out of memory in the middle of a run: injected and real, the step repeated, the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.account import Account
from benchmarks.gpu.parts.asking import ask
from lowmem.bench.plan_checks import SURVIVAL


def work(questions: list[dict[str, Any]], account: Account, artefacts: Path) -> None:
    for one in questions:
        question = one["question"]
        if question["real"] and account.record["device"] != "cuda":
            account.skip("memory can be taken away on a card only: the injected case alone ran")
            continue
        answer = ask(account, SURVIVAL, question)
        if isinstance(answer, str):
            account.row(one["name"], answer, met=False)
        else:
            account.row(one["name"], answer, met=answer["survived"] and answer["weights_bitwise"])
