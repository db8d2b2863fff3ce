"""The planned step with and without host memory: time and bytes against the prediction, the bits of its gradients, the
link's rates; and what it takes where the system does not pin memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.account import Account
from benchmarks.gpu.parts.asking import ask
from lowmem.choose.request import Budget
from lowmem.trial import WORK, TrialResult, excess, result_of, verdict

_HERE = "benchmarks.gpu.parts.host"


def work(questions: list[dict[str, Any]], account: Account, artefacts: Path) -> None:
    """`questions`: the untouched step first, then the planned one without host memory; all others are held against
    these two."""
    on_card = account.record["device"] == "cuda"
    if on_card:
        account.row("the link's rates, both ways busy", ask(account, f"{_HERE}:rates", {}))
    plain: TrialResult | None = None
    alone: TrialResult | None = None
    for one in questions:
        if not one["pinned"] and not on_card:
            continue
        result = result_of(ask(account, WORK if one["pinned"] else f"{_HERE}:unpinned", one["trial"]))
        plain, alone = plain or result, alone or (result if one["budget"] else None)
        if result.refused is not None:
            account.row(one["name"], result.refused, met=False if one["budget"] else None)
            continue
        within, same = None, None
        if one["budget"]:
            within = verdict(result, Budget(**one["budget"]), account.record["device"])[0] is None
        if alone is not None and result is not alone:
            same = result.gradients == alone.gradients
        found = {
            "over_plain": excess(result.step_seconds, plain.step_seconds),
            "predicted_over_plain": one["predicted"]["overhead"],
            "step_seconds": result.step_seconds,
            "peak_allocated_bytes": result.peak_allocated_bytes,
            "predicted_allocated_bytes": one["predicted"]["peak_allocated_bytes"],
            "host_bytes": one["predicted"]["host_bytes"],
            "within_budget": within,
            "same_gradients": same,
        }
        account.row(one["name"], found, met=within and same is not False)
    if not on_card:
        account.skip("pinned memory and the link's rates are a card's: the steps only ran, to see that they do")


def rates(_: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
    from lowmem.remat.links_cuda import measured_rates

    out, back = measured_rates()
    return {"out_gb_per_second": out / 1e9, "back_gb_per_second": back / 1e9}


def unpinned(trial: dict[str, Any]) -> dict[str, Any]:
    """The trial, where the system refuses to pin memory."""
    import torch

    from lowmem.trial.worker import work

    torch._C._cudart.cudaHostRegister = lambda *_: 2  # cudaErrorMemoryAllocation
    return work(trial)
