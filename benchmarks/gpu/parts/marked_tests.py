"""The tests that need a card (`pytest -m gpu`), those that matter most first: a limit of time leaves out the last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.account import Account

_ROOT = Path(__file__).resolve().parents[3]
_LINE = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)")
_FINISH_SECONDS = 3.0


def work(questions: dict[str, Any], account: Account, artefacts: Path) -> None:
    """A row a test. Read line by line while pytest runs, so that those before the limit count."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-rA", "--tb=short"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    said = artefacts / "pytest.txt"
    with open(said, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *questions["files"]], cwd=_ROOT, env=environment, stdout=file, stderr=file
        )
        try:
            code: int | None = process.wait(max(1.0, account.seconds_left - _FINISH_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
    seen: dict[str, str] = {match[1]: match[2] for line in lines if (match := _LINE.match(line))}
    for name, outcome in seen.items():
        account.row(
            name, {"outcome": outcome.lower()}, met={"PASSED": True, "FAILED": False, "ERROR": False}.get(outcome)
        )
    if code not in (0, 1, 5, None) or not seen:
        account.row(
            "pytest", f"left with code {code}: {(said.read_text().strip().splitlines() or [''])[-1][:200]}", met=False
        )
    if account.record["device"] != "cuda":
        account.skip(f"no card: {sum(one == 'SKIPPED' for one in seen.values())} tests were collected and skipped")
    elif code is None:
        account.row("the rest of the tests", {"outcome": "not run: time"})
