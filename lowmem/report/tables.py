"""The table of final test errors: the published report's networks first, in its order, each beside its
figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.schema import ModelConfig, resolve_block
from lowmem.report.naming import run_names
from lowmem.report.palette import network_name, network_rank
from lowmem.report.published import PUBLISHED_ERROR_PCT, differences, published_error_pct
from lowmem.runs.view import RunView

UNKNOWN = "–"
TABLE_HEADER = (
    "Network",
    "Run",
    "Epochs",
    "Final test error",
    "Published",
    "What differs from the published setting",
)


@dataclass(frozen=True)
class TableRow:
    """A run's line. Errors in per cent, None if unknown or not published."""

    network: str
    run: str
    epochs_done: int
    epochs_asked: int
    final_error_pct: float | None
    published_error_pct: float | None
    differs: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """The texts under TABLE_HEADER."""
        complete = self.epochs_done >= self.epochs_asked
        return (
            self.network,
            self.run,
            f"{self.epochs_done}" if complete else f"{self.epochs_done} of {self.epochs_asked}",
            percent(self.final_error_pct),
            percent(self.published_error_pct),
            self._differs_text(),
        )

    def _differs_text(self) -> str:
        if self.published_error_pct is None:
            return "not among the published networks"
        return "; ".join(self.differs) or "nothing that the settings show"


def percent(value: float | None) -> str:
    """`7.46 %`, or a dash for an unknown value."""
    return UNKNOWN if value is None else f"{value:.2f} %"


def in_order(histories: Sequence[RunView]) -> list[RunView]:
    """Residual nets by depth, then plain nets; runs of one network by name."""
    return sorted(histories, key=lambda history: (*network_rank(history.config.model), history.name, str(history.path)))


def build_rows(histories: Sequence[RunView]) -> tuple[TableRow, ...]:
    """A row for each run, in the order given."""
    return tuple(_row(history, name) for history, name in zip(histories, run_names(histories), strict=True))


def _row(history: RunView, name: str) -> TableRow:
    config = history.config
    return TableRow(
        network=network_name(config.model),
        run=name,
        epochs_done=history.epochs_done,
        epochs_asked=config.train.epochs,
        final_error_pct=None if history.last is None else history.last.test_error_pct,
        published_error_pct=published_error_pct(config),
        differs=differences(history),
    )


def without_run(histories: Sequence[RunView]) -> dict[str, float]:
    """The published networks that no run here is of, with their errors."""
    present = {history.config.model.arch for history in histories if published_error_pct(history.config) is not None}
    return {
        network_name(ModelConfig(arch=arch, block=resolve_block(arch, None))): error
        for arch, error in PUBLISHED_ERROR_PCT.items()
        if arch not in present
    }
