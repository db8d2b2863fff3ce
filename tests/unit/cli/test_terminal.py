"""What goes on, as a terminal and a file show it; and Ctrl-C while libraries are imported."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli.terminal import TerminalObserver, describe_progress
from lowmem.train.observer import Progress
from tests.conftest import environment
from tests.tiny import make_run

AT = Progress(1, 3, 4, 10, 0.1, 2.25, 50.0, 100.0, 1 << 20, 9.0, step_loss=1.5)


class Screen(io.StringIO):
    """A terminal, by its own word."""

    def isatty(self) -> bool:
        return True


def _screen(monkeypatch: pytest.MonkeyPatch, stream: str = "stdout", kind: str = "xterm") -> Screen:
    """In the place of `stream`."""
    made = Screen()
    monkeypatch.setattr(sys, stream, made)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "150")
    return made


def _since(screen: Screen, observer: TerminalObserver, at: int) -> str:
    """What was drawn since, with the live line once more as it is now."""
    observer.draw()
    return screen.getvalue()[at:]


def test_the_live_line_is_of_what_goes_on_now(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _screen(monkeypatch)
    observer = TerminalObserver()
    observer.phase("decoding pictures", 600, 600)
    assert "decoding pictures: 600 of 600" in screen.getvalue()
    at = len(screen.getvalue())
    observer.note("a sentence")
    after = _since(screen, observer, at)
    assert "a sentence" in after
    assert "decoding" not in after, "nothing stale stays"
    observer.step(AT)
    assert "epoch 1/3 [4/10]" in _since(screen, observer, at)
    at = len(screen.getvalue())
    observer.warning("while it trains")
    after = _since(screen, observer, at)
    assert "while it trains" in after
    assert "epoch 1/3 [4/10]" in after, "training goes on under it"
    at = len(screen.getvalue())
    observer.phase("saving")
    after = _since(screen, observer, at)
    assert "saving" in after
    assert "[4/10]" not in after
    at = len(screen.getvalue())
    observer.close()
    assert "saving" not in screen.getvalue()[at:]


def test_which_loss_is_which() -> None:
    said = describe_progress(AT)
    assert "step loss 1.5000" in said
    assert "epoch so far: loss 2.2500, error 50.00 %" in said


def test_a_file_has_a_line_of_each_phase_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    observer = TerminalObserver()
    for done in range(1, 5):
        observer.phase("decoding pictures", done, 4)
    observer.phase("planning: costs", 1, 2)
    observer.phase("planning: smaller plans", 1, 2)
    observer.step(AT)
    observer.progress(AT)  # by time only
    observer.phase("evaluating", 0, 10)
    observer.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == ["decoding pictures: 1 of 4", "planning: costs: 1 of 2"]
    assert not err


def test_beside_a_result_nothing_comes_into_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = _screen(monkeypatch, "stderr")
    observer = TerminalObserver("stderr")
    observer.phase("planning")
    observer.note("measured")
    print("the result")
    observer.close()
    assert capsys.readouterr().out == "the result\n"
    assert "planning" in screen.getvalue()
    assert "measured" in screen.getvalue()


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _screen(monkeypatch, kind="dumb")
    observer = TerminalObserver()
    observer.phase("planning")
    observer.close()
    assert screen.getvalue() == "planning\n"


# In the place of torch: Ctrl-C comes in the middle of it, and what it makes of that is another exception.
_INTERRUPTED_LIBRARY = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("half of a library") from None
"""


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


_COMMANDS = ("train --data shapes --out new", "resume RUN", "fork RUN --at 1 --set optim.lr=0.01", "plan --vram 1G",
             "bench", "verify RUN")  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="a signal there ends the process")
@pytest.mark.parametrize("command", _COMMANDS)
def test_ctrl_c_in_an_import_is_one_line(command: str, a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(_INTERRUPTED_LIBRARY, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = [str(a_run) if word == "RUN" else word for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-m", "lowmem", *words],
        env={**environment(), "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr == "lowmem: interrupted before anything was to be saved\n"
    assert not done.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "forkpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("command", _COMMANDS)
def test_the_first_word_comes_before_torch(command: str, a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(77)", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = [str(a_run) if word == "RUN" else word for word in command.split()]
    pid, terminal = os.forkpty()
    if pid == 0:
        os.chdir(tmp_path)
        env = {**environment(), "PYTHONPATH": path, "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-m", "lowmem", *words], env)
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77, said.decode(errors="replace")
    assert b"loading torch" in said
