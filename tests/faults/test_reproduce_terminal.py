"""`lowmem reproduce` with real processes in a real terminal: Ctrl-C reaches the one that trains exactly once."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "forkpty"), reason="needs a pseudo-terminal"),
]
SMALL = (
    "--only", "res20", "--width", "2", "--data", "shapes", "--epochs", "40", "--batch", "20",
    "--set", "data.train_subset=200", "--set", "data.test_subset=20", "--set", "train.log_every_steps=1",
)  # fmt: skip


@pytest.mark.parametrize("tostop", [False, True])
def test_ctrl_c(tmp_path: Path, tostop: bool) -> None:
    """`tostop`: a terminal that stops who writes to it from the background."""
    import termios

    out = tmp_path / "job"
    command = [sys.executable, "-m", "lowmem", "reproduce", "--out", str(out), *SMALL]
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execve(sys.executable, command, environment())
    if tostop:
        modes = termios.tcgetattr(terminal)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
    said, pressed, deadline = b"", False, time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # the last of them has left
            break
        if not pressed and said.count(b"left in all") > 5:
            pressed = True
            os.write(terminal, b"\x03")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, said.decode(errors="replace")
    text = said.decode(errors="replace")
    assert "lowmem: SIGINT: res20 is saved at epoch " in text
    assert "stopped at once" not in text
    events = [json.loads(line) for line in (out / "res20" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] == "signal"] == ["signal"]
    assert events[-1]["event"] == "signal"
