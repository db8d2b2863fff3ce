"""lowmem: train deep networks on cards that are too small for them.

The names below are imported on first use, so that `import lowmem` (and `lowmem --help`) stays free of torch
(invariant 11).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "models": "lowmem.models",
    "make_plan": "lowmem.choose.planning",
    "apply_plan": "lowmem.remat",
    "load_run": "lowmem.inference",
    "Plan": "lowmem.plan.record",
    "Config": "lowmem.config.schema",
    **dict.fromkeys(("run_training", "fork_run", "extend_run", "resume_training"), "lowmem.lifecycle"),
}
__all__ = ["__version__", *_LAZY]


def __dir__() -> list[str]:
    return list(__all__)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    loaded = import_module(_LAZY[name])
    return loaded if name == "models" else getattr(loaded, name)
