"""The process of one probe."""

from __future__ import annotations

import importlib
import json
import os
import sys
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


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.stdin.read()))), flush=True)
