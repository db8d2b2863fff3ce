"""The planner needs no torch, so that planning and `--help` start at once."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("solver", "evaluate", "picture", "record", "table")


def test_no_torch_is_imported() -> None:
    imports = ", ".join(f"lowmem.plan.{name}" for name in MODULES)
    code = f"import sys, lowmem.config.cards, {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
