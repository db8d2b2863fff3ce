"""Facts of the library on this card: one row a probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.account import Account
from benchmarks.gpu.parts.asking import ask, ask_side_by_side

_PROBES = "benchmarks.gpu.probes:answer"


def work(questions: list[dict[str, Any]], account: Account, artefacts: Path) -> None:
    """Those whose seconds, or whose share of the card, matter are asked alone."""
    together = [one for one in questions if not one["alone"]]
    for one, answer in zip(together, ask_side_by_side(account, [(_PROBES, one) for one in together]), strict=True):
        account.row(one["name"], answer)
    for one in questions:
        if one["alone"]:
            account.row(one["name"], ask(account, _PROBES, one))
    if account.record["device"] != "cuda":
        account.skip("bytes, workspaces, TF32 and cuDNN are a card's: the probes only ran, to see that they do")
