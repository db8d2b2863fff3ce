"""The rows: which module does each, what it needs installed, and in words what it is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

INSTALL = "not installed: pip install -r benchmarks/peers/requirements.txt"


@dataclass(frozen=True, kw_only=True)
class Row:
    """`needs`: a distribution; `options`: of the module's `find`."""

    title: str
    module: str
    needs: str = "torch"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str | None:
        """Of what it needs; None if that is not installed."""
        try:
            return version(self.needs)
        except PackageNotFoundError:
            return None

    def load(self) -> ModuleType:
        """A `task.Way`. Raises ImportError."""
        return importlib.import_module(f"benchmarks.peers.{self.module}")


ROWS: dict[str, Row] = {
    "lightning-power": Row(
        title="Lightning `BatchSizeFinder`, power",
        module="lightning_finder",
        needs="lightning",
        options={"mode": "power"},
    ),
    "lightning-binsearch": Row(
        title="Lightning `BatchSizeFinder`, binsearch",
        module="lightning_finder",
        needs="lightning",
        options={"mode": "binsearch"},
    ),
    "accelerate": Row(
        title="Accelerate `find_executable_batch_size`, from the recipe's batch",
        module="accelerate_finder",
        needs="accelerate",
    ),
    "timm": Row(
        title="timm `set_grad_checkpointing`, `decay_batch_step` from 256", module="timm_checkpointing", needs="timm"
    ),
    "doubling": Row(title="`torch.utils.checkpoint` per block, doubling from 32", module="doubling"),
    "lowmem-auto": Row(title="`lowmem --batch auto`", module="lowmem_auto", needs="lowmem"),
    "lowmem-recipe": Row(
        title="`lowmem --batch 128` (the recipe's batch is kept)",
        module="lowmem_auto",
        needs="lowmem",
        options={"batch": 128},
    ),
}
