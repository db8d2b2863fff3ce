"""What only a card can tell of the library, each in a clean process (`answer`).

A question names the probe, the device and the environment that it wants: variables to set (or, null, to unset) before
torch is loaded. On the CPU the same code runs as far as there is anything to see; what is left out says so.
"""

from __future__ import annotations

import importlib
import os
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """`probe`: a module of this package, whose `look(device, **arguments)` answers."""
    for name, value in question.get("environment", {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    module = importlib.import_module(f"benchmarks.gpu.probes.{question['probe']}")
    found: dict[str, Any] = module.look(question["device"], **question.get("arguments", {}))
    return found
