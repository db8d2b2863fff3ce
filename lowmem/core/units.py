"""Bytes: parse what people type, format what people read. Elsewhere a size is an integer of bytes (invariant 6). And
other figures that people read: durations, counts, numbers of any size."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from decimal import Decimal

KIB = 1024
MIB = 1024**2
GIB = 1024**3
# Less is a forgotten unit: no card has so little; and the tensors of the family's smallest step (width 1, one picture)
# take 256 KiB. Below that lie the GiB that were typed without the G, and up to 65,535 MiB without the M.
LEAST_CARD_BYTES = 64 * MIB
LEAST_TENSORS_BYTES = 64 * KIB
_MOST_GIB = 512  # a bare number up to this was meant in GiB, one above in MiB
_MOST_DIGITS = 6  # of one that was not meant in bytes
LARGEST = 1 << 60  # more bytes than anything has; what is above is a mistake, and no float holds it exactly

_FACTORS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024**4}
_SIZE = re.compile(r"\s*(?P<number>-?\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """`"6G"`, `"1200M"`, `"1.5GiB"` or a plain count of bytes -> bytes. Units are binary: `6G` is 6 * 1024**3.

    Raises ValueError on anything else, zero and negative sizes included."""
    match = _SIZE.fullmatch(str(text))
    if match is None:
        wrong = "not a size"
    elif (size := min(Decimal(match["number"]) * _FACTORS[match["unit"].upper()], Decimal(2 * LARGEST))) > LARGEST:
        wrong = "more than any memory"
    elif size < 1:
        wrong = "not a positive size"
    else:
        return int(size)
    raise ValueError(f"{text!r} is {wrong}: write it like 6G, 1200M or a number of bytes")


def parse_memory(text: str | int, least_bytes: int) -> int:
    """`parse_size` of memory to fit into. Raises ValueError for less than `least_bytes` too: somebody forgot a unit."""
    size = parse_size(text)
    if size >= least_bytes:
        return size
    number, unit = re.sub(r"[^\d.]", "", str(text)), re.sub(r"[^KM]", "", str(text).upper())
    unit = {"K": "M", "M": "G"}.get(unit) or ("G" if float(number) <= _MOST_GIB else "M")
    accepted = len(number) <= _MOST_DIGITS and parse_size(f"{number}{unit}") >= least_bytes
    hint = f"did you mean {number}{unit}?" if accepted else "write it like 6G or 1200M"
    raise ValueError(f"{text!r} is {format_size(size)}, too little for anything: {hint}")


def format_size(size_bytes: int | None) -> str:
    """Bytes -> text for humans: `5,416 MiB`, `12.3 GiB` from 10 GiB on, `?` for an unknown size."""
    if size_bytes is None:
        return "?"
    if abs(size_bytes) < KIB:
        return f"{size_bytes} B"
    if abs(size_bytes) < MIB:
        return f"{size_bytes / KIB:,.0f} KiB"
    if abs(size_bytes) < 10 * GIB:
        return f"{size_bytes / MIB:,.0f} MiB"
    return f"{size_bytes / GIB:,.1f} GiB"


def format_duration(seconds: float | None) -> str:
    """Seconds -> `1:02:03` or `2:03`; `?` for unknown. Negative values are shown as zero."""
    if seconds is None:
        return "?"
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def counted(count: int, what: str) -> str:
    """`1 epoch`, `3,000 epochs`, `0 pictures`, `2 classes`."""
    return f"{count:,} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


def name_some(names: Sequence[str], most: int) -> str:
    """`a, b, c and 97 more`; empty for none."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def format_number(value: float, digits: int) -> str:
    """With that many digits, whatever its size: `0.0036`, `1.30`, `130`, `12,346`, `9.3e12`, `7.0e-9`; or
    `nan`, `inf`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def format_loss(loss: float) -> str:
    """Four decimals, as long as they say something: one that broke may have any size."""
    return f"{loss:.4f}" if abs(loss) < 1e3 else format_number(loss, 4)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of aligned cells, as wide as they are: what reads them from a pipe has no width. `right`: columns that are
    aligned at their end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'>' if column in right else '<'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
