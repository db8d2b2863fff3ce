"""lowmem: train deep networks on cards that are too small for them.

The names below are imported on first use, so that `import lowmem` (and `lowmem --help`) stays free of torch
(invariant 11).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "models": ("lowmem.models", None),
    "make_plan": ("lowmem.choose.planning", "make_plan"),
    "apply_plan": ("lowmem.remat", "apply_plan"),
    "Plan": ("lowmem.plan.record", "Plan"),
    "Config": ("lowmem.config.schema", "Config"),
    "run_training": ("lowmem.lifecycle", "run_training"),
    "fork_run": ("lowmem.lifecycle", "fork_run"),
    "extend_run": ("lowmem.lifecycle", "extend_run"),
    "resume_training": ("lowmem.lifecycle", "resume_training"),
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}") from None
    loaded = import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
