"""A worker of pytest-xdist that dies ends the whole run, at once and with a failure.

Left to itself xdist starts another worker and hands on all that the dead one had, what is done too: whoever gets a file
in which nothing is left to do never answers, and the run waits for ever (3.8, `LoadScopeScheduling.remove_node`). What
aborts, aborts the next worker as well. And a worker's death is noticed by its pipe, which a process that it has forked
holds open for as long as it lives: so its own process is watched too. These are hooks, for conftest.py.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import pytest

_DIED = pytest.StashKey[bool]()
PATIENCE_SECONDS = 30.0  # for the pipe to tell; at the end of a run workers are ended, and the run is over by then


@pytest.hookimpl(optionalhook=True)
def pytest_testnodeready(node: Any) -> None:
    threading.Thread(target=_watch, args=(node,), daemon=True).start()


def _watch(node: Any) -> None:
    code = node.gateway._io.popen.wait()
    if code == 0:
        return
    time.sleep(PATIENCE_SECONDS)
    print(f"\nworker {node.gateway.id} died ({code}), and what it has forked lives on", file=sys.stderr, flush=True)
    os._exit(pytest.ExitCode.TESTS_FAILED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """`error`: of a worker that died; it may have died outside of any test."""
    if error is not None:
        node.config.stash[_DIED] = True


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport, sched: Any) -> None:
    """The test that it died in: the others need not end theirs."""
    pytest.exit(str(report.longrepr), returncode=pytest.ExitCode.TESTS_FAILED)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What a dead worker did not run has not passed."""
    if _DIED in session.config.stash and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
