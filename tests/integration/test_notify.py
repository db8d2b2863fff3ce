"""`--notify`: real commands, told how real runs ended; and that nothing of it changes how they end, or is kept."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.cli import notify
from lowmem.cli.main import main
from lowmem.core.errors import ExitCode
from lowmem.runs.view import RunView
from tests.conftest import environment
from tests.distributed.torchrun import torchrun, wait_for
from tests.tiny import arguments

posix = pytest.mark.skipif(sys.platform == "win32", reason="quoted for a POSIX shell")
pytestmark = posix
SCRIPT = """
import json, os, sys
with open(sys.argv[1], "a", encoding="utf-8") as file:
    file.write(json.dumps({key[7:]: value for key, value in os.environ.items() if key.startswith("LOWMEM_")}) + "\\n")
"""
SHORT = arguments("train.epochs=2")


@pytest.fixture
def teller(tmp_path: Path) -> str:
    """A command that writes down what it is told, a line each time."""
    (tmp_path / "teller.py").write_text(SCRIPT)
    return shlex.join([sys.executable, str(tmp_path / "teller.py"), str(tmp_path / "told")])


def told(folder: Path) -> list[dict[str, str]]:
    file = folder / "told"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def leave(*words: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_it_is_told_how_a_run_ended_and_stands_nowhere(tmp_path: Path, teller: str) -> None:
    run = tmp_path / "run"
    stop = ("--set", "train.max_steps=4")
    assert leave("train", *SHORT, *stop, "--out", str(run), "--notify", teller) == 0
    assert leave("resume", str(run), "--set", "train.max_steps=5") == 0, "for one call only"
    assert leave("resume", str(run), "--set", "train.max_steps=null", "--notify", teller) == 0
    stopped, done = told(tmp_path)
    assert (stopped["OUTCOME"], stopped["EXIT_CODE"], stopped["RUN"]) == ("stopped", "0", str(run))
    assert stopped["MESSAGE"].startswith("stopped after 4 steps as asked")
    assert (done["OUTCOME"], done["EXIT_CODE"]) == ("done", "0")
    assert f"{run} is finished: 2 epochs" in done["MESSAGE"]
    best = min(RunView(run).epochs, key=lambda row: row.test_error_pct or 0)
    assert (float(done["BEST_ERROR"]), int(done["BEST_EPOCH"])) == (best.test_error_pct, best.epoch)
    assert not [path for path in run.rglob("*") if path.is_file() and b"teller" in path.read_bytes()]


def test_of_a_failure_too_which_stays_what_it_was(
    tmp_path: Path, teller: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert leave("train", *SHORT, "--set", "train.max_steps=4", "--out", str(run)) == 0
    assert leave("train", *SHORT, "--out", str(run), "--notify", teller) == ExitCode.USAGE
    (failed,) = told(tmp_path)
    assert (failed["OUTCOME"], failed["EXIT_CODE"], failed["BEST_ERROR"]) == ("failed", "2", "")
    assert failed["MESSAGE"].startswith(f"{run} exists and is never overwritten")
    assert "never overwritten" in capsys.readouterr().err


def test_a_run_that_diverged_has_a_best_error(tmp_path: Path, teller: str) -> None:
    run, broken = tmp_path / "run", ("--set", "optim.lr=1e30", "--on-nan", "stop")
    assert leave("train", *SHORT, *broken, "--out", str(run), "--notify", teller) == ExitCode.DIVERGED
    (failed,) = told(tmp_path)
    assert (failed["OUTCOME"], failed["EXIT_CODE"]) == ("failed", "6")
    assert failed["BEST_ERROR"] == str(RunView(run).epochs[0].test_error_pct if RunView(run).epochs else "")


def test_what_a_stranger_wrote_runs_nothing() -> None:
    said = 'runs/a holds "x & calc" | %PATH%\nand more'
    assert notify._plain(said, windows=True) == "runs/a holds ?x ? calc? ? ?PATH? and more"
    assert notify._plain(said, windows=False) == 'runs/a holds "x & calc" | %PATH% and more'


def test_a_dry_run_tells_nobody(tmp_path: Path, teller: str) -> None:
    assert leave("train", *SHORT, "--out", str(tmp_path / "run"), "--notify", teller, "--dry-run") == 0
    assert told(tmp_path) == []


def test_a_command_that_goes_wrong_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_LIMIT_SECONDS", 1.0)
    run = tmp_path / "run"
    assert leave("train", *arguments("train.max_steps=1"), "--out", str(run)) == 0
    for command, words in (
        ("exit 3", "left with code 3"),
        ("no-such-command-anywhere", "left with code 127"),
        ("\0", "could not be started"),
        (f"sleep 60 & sleep 60; touch {tmp_path}/survived", "took longer than 1 s and was ended"),
    ):
        began = time.monotonic()
        assert leave("resume", str(run), "--notify", command) == 0
        assert f"warning: the command of --notify {words}" in capsys.readouterr().err
        assert time.monotonic() - began < 30
    assert not (tmp_path / "survived").exists()


def _started(tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "lowmem", "train", *more, "--out", str(tmp_path / "run")]
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_run(tmp_path: Path, teller: str) -> None:
    process = _started(tmp_path, *arguments("train.epochs=500"), "--notify", teller)
    wait_for(tmp_path / "run" / "steps.csv", "\n4,")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, errors
    (interrupted,) = told(tmp_path)
    assert (interrupted["OUTCOME"], interrupted["EXIT_CODE"]) == ("interrupted", "130")
    assert "SIGINT: saved at epoch" in interrupted["MESSAGE"]
    assert interrupted["MESSAGE"] in errors


def test_ctrl_c_ends_the_command_and_not_what_was_done(tmp_path: Path) -> None:
    command = f"echo begun > {tmp_path}/begun; sleep 60; touch {tmp_path}/survived"
    process = _started(tmp_path, *arguments("train.max_steps=1"), "--notify", command)
    wait_for(tmp_path / "begun", "begun")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "warning: the command of --notify was interrupted" in errors
    assert not (tmp_path / "survived").exists()


def test_of_two_processes_one_tells(tmp_path: Path, teller: str) -> None:
    code, output = torchrun(tmp_path, 2, "lowmem", "train", *SHORT, "--out", "run", "--notify", teller)
    assert code == 0, output
    assert [one["OUTCOME"] for one in told(tmp_path)] == ["done"]
