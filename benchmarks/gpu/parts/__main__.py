"""The process of one part."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.gpu.account import Account
from benchmarks.gpu.job import read_job

# Modules of this package: `work(questions, account, folder for what is written beside the figures)`.
MODULES = {
    "facts": "facts",
    "gradients": "exactness",
    "memory": "memory",
    "host": "host",
    "out-of-memory": "survival",
    "resume": "resume",
    "acceptance": "acceptance",
    "tests": "marked_tests",
}


def main() -> None:
    part, questions, path, artefacts, seconds, at_once = sys.argv[1:]
    account = Account(Path(path), part, read_job(Path(questions).parent).device, float(seconds), int(at_once))
    module = importlib.import_module(f"benchmarks.gpu.parts.{MODULES[part]}")
    module.work(json.loads(Path(questions).read_text(encoding="utf-8")), account, Path(artefacts))
    account.finish()


if __name__ == "__main__":
    main()
