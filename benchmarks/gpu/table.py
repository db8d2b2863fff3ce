"""The results of a card as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.account import shortcomings
from benchmarks.gpu.job import PARTS
from lowmem.core.units import MIB, format_size

Accounts = Mapping[str, Mapping[str, Any]]
_KEPT = {None: "", True: "yes", False: "**no**"}


def page(accounts: Accounts, trained: Sequence[Mapping[str, Any]], prepared: Mapping[str, Any]) -> str:
    """Conditions first, then a table a part, then the networks that were trained."""
    environment = next(iter(accounts.values()))["environment"] if accounts else trained[0]["environment"]
    lines = [f"# Measured on an {environment['card']}", "", _conditions(environment, accounts, prepared), ""]
    if accounts:
        lines += _parts(accounts)
        wrong = [line for account in accounts.values() for line in shortcomings(account)]
        lines += ["", "## Not as it should be", "", *([f"- {line}" for line in wrong] or ["Nothing."])]
        for part in PARTS:
            if part.name in accounts:
                lines += ["", f"## {part.name}: {part.tells}", "", *_rows(accounts[part.name], environment)]
    if trained:
        lines += ["", "## The homework report's networks on real pictures", "", *_trained(trained)]
    return "\n".join(lines) + "\n"


def _conditions(environment: Mapping[str, Any], accounts: Accounts, prepared: Mapping[str, Any]) -> str:
    said = [
        f"{environment['card']} ({format_size(environment['card_bytes'])})" if environment.get("card_bytes") else "",
        f"driver {environment['driver']}" if environment.get("driver") else "",
        f"torch {environment['torch']}, CUDA {environment['cuda']}, cuDNN {environment['cudnn']}",
        f"Python {environment['python']}, {environment['cpu']}",
        f"plans and questions of revision {prepared['revision']}" if prepared.get("revision") else "",
        ", ".join(sorted({account["date"] for account in accounts.values()})),
    ]
    emulated = (
        " A budget smaller than the card is emulated: the allocator is capped, the card's speed and its choice of"
        " kernels stay its own."
    )
    return "; ".join(one for one in said if one) + "." + emulated


def _parts(accounts: Accounts) -> list[str]:
    rows = []
    for part in PARTS:
        account = accounts.get(part.name)
        if account is None:
            rows.append([part.name, "did not run", "", ""])
            continue
        kept = [row["met"] for row in account["rows"] if row["met"] is not None]
        rows.append([part.name, account["outcome"], f"{sum(kept)} of {len(kept)}", f"{account['seconds']:.0f}"])
    return _table(("part", "outcome", "promises kept", "seconds"), rows)


def _rows(account: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    if account["part"] == "memory":
        rows = [_memory(row, environment) for row in account["rows"]]
        return _table(_MEMORY, rows)
    rows = [[row["name"], row["refused"] or _short(row["found"]), _KEPT[row["met"]]] for row in account["rows"]]
    return _table(("what", "found", "as promised"), rows)


_MEMORY = (
    "what", "card", "allocated MiB (predicted)", "reserved MiB (predicted)", "step, ms", "over plain", "within budget",
)  # fmt: skip


def _memory(row: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    found = row["found"]
    if found is None:
        return [row["name"], "", row["refused"], "", "", "", _KEPT[row["met"]]]
    measured, predicted, vram = found["measured"], found["predicted"], found["vram_bytes"]
    emulated = bool(vram) and vram < 0.98 * (environment.get("card_bytes") or 0)
    size = f"{format_size(vram)}{' (emulated)' if emulated else ''}" if vram else "no limit"
    over, seconds = found["overhead"], measured["step_seconds"]
    return [
        row["name"],
        size,
        _against(measured["peak_allocated_bytes"], predicted.get("peak_allocated_bytes")),
        _against(measured["peak_reserved_bytes"], predicted.get("peak_reserved_bytes")),
        "" if seconds is None else f"{1000 * seconds:,.1f}",
        "" if over is None else f"{over:+.1%}",
        _KEPT[row["met"]],
    ]


def _against(measured: int | None, predicted: int | None) -> str:
    if measured is None:
        return ""
    return f"{measured / MIB:,.0f}" + (f" ({predicted / MIB:,.0f})" if predicted else "")


def _short(found: Mapping[str, Any]) -> str:
    """The scalars of a row; the rest stands in the JSON."""
    said = [f"{name} {_value(value)}" for name, value in found.items() if isinstance(value, bool | int | float | str)]
    return ", ".join(said[:8]) or "see results.json"


def _value(value: bool | int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")[:80]


def _trained(trained: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            one["network"],
            f"{one['epochs_done']} of {one['epochs']}",
            "" if one["test_error_pct"] is None else f"{one['test_error_pct']:.2f}",
            "" if one["least_test_error_pct"] is None else f"{one['least_test_error_pct']:.2f}",
            "" if one["train_seconds"] is None else f"{one['train_seconds']:,.0f}",
            "" if one["images_per_second"] is None else f"{one['images_per_second']:,.0f}",
        ]
        for one in trained
    ]
    header = ("network", "epochs", "test error, %", "least, %", "seconds", "images/s")
    return ["Batch 128, AMP, channels-last, the recipe's schedule scaled to the epochs.", "", *_table(header, rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]
