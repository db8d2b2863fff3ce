"""What differs from the published setting, in words: what all runs have in common once, then what is one run's own."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.report.tables import TableRow

NOT_PUBLISHED = "not among the published networks"
NEVER_TRAINED = "named in the report, whose author could not train it: there is no figure to hold it against"
_NAMED = {"Res56-bottleneck", "Res110-bottleneck"}
NOTHING = "nothing that the settings show"


def departures(rows: Sequence[TableRow]) -> list[tuple[str, str]]:
    """(which runs, what differs), from what concerns most runs to what concerns one; a pair for each text."""
    if not rows:
        return []
    shared = [text for text in rows[0].differs if all(text in row.differs for row in rows)] if len(rows) > 1 else []
    found: list[tuple[str, str]] = []
    if shared:
        found.append(("both runs" if len(rows) == 2 else f"all {len(rows)} runs", "; ".join(shared)))
    groups: dict[str, list[str]] = {}
    for row in rows:
        own = [text for text in row.differs if text not in shared]
        if row.published_error_pct is None:
            own.append(NEVER_TRAINED if row.network in _NAMED else NOT_PUBLISHED)
        if own or not shared:
            groups.setdefault("; ".join(own) or NOTHING, []).append(row.run)
    also = " also" if shared else ""
    found += [(f"{', '.join(names)}{also}", text) for text, names in groups.items()]
    return found
