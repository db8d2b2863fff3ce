"""Memory and time of training steps: planned ones against their prediction, and against the other ways."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.account import Account
from benchmarks.gpu.parts.asking import ask
from lowmem.choose.request import Budget
from lowmem.trial import PLAIN, WORK, TrialResult, excess, result_of, verdict


def work(questions: list[dict[str, Any]], account: Account, artefacts: Path) -> None:
    """`questions` has the untouched step of a batch before the others of it: their overhead is against that one."""
    plain_seconds: dict[int, float | None] = {}
    for one in questions:
        trial = one["trial"]
        result = result_of(ask(account, WORK, trial))
        if trial["way"] == PLAIN:
            plain_seconds[trial["batch"]] = result.step_seconds
        if result.refused is not None:
            account.row(one["name"], result.refused, met=False if one["budget"] else None)
            continue
        found = _found(one, result, plain_seconds.get(trial["batch"]))
        account.row(one["name"], found, met=found["within_budget"])


def _found(one: dict[str, Any], result: TrialResult, plain_seconds: float | None) -> dict[str, Any]:
    """The trial beside its prediction; of what was not planned only plain autograd has one. Shares: 0.01 is 1 % more
    than predicted, or than the untouched step takes."""
    predicted, device = one["predicted"] or {}, one["trial"]["device"]
    over, within = None, None
    if one["budget"]:
        over, _ = verdict(result, Budget(**one["budget"]), device)
        within = over is None
    seconds = result.step_seconds
    return {
        "batch": one["trial"]["batch"],
        "way": one["trial"]["way"],
        "vram_bytes": one["vram_bytes"],
        "predicted": predicted,
        "measured": {name: value for name, value in asdict(result).items() if name != "losses"},
        "allocated_error": excess(result.peak_allocated_bytes, predicted.get("peak_allocated_bytes")),
        "reserved_error": excess(result.peak_reserved_bytes, predicted.get("peak_reserved_bytes")),
        "overhead": excess(seconds, plain_seconds),
        "within_budget": within,
        "over": over,
    }
