"""Output that cannot be written: a full disk is one line and code 8, a reader that has left is 141 without a word, and
a training goes on either way. In processes of their own, for the interpreter's end is part of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.runs.view import read_run
from tests.conftest import environment
from tests.tiny import make_run

FULL = Path("/dev/full")
LOWMEM = [sys.executable, "-m", "lowmem"]
TINY = ["--arch", "res20", "--width", "2", "--data", "shapes", "--batch", "50"]
STEPS = ["--set", "data.train_subset=100", "--set", "data.test_subset=50", "--set", "train.max_steps=40"]
Left = tuple[int, str]
OBSERVED = """
import warnings
from lowmem.cli.streams import take_streams, unread_is_well
from lowmem.cli.terminal import observer, say
from lowmem.distributed.launch import leave
take_streams()
with observer() as shown:
    shown.note("a note")
    shown.warning("a warning")
    warnings.warn("one of a library")
    shown.phase("decoding", 10, 10)
    print("x" * 100_000)
say("goes on", "stderr")
with open("done", "w"):
    pass
unread_is_well()
leave(5)
"""


def left(command: list[str], folder: Path, *, full: str = "", closed: str = "", unbuffered: str = "") -> Left:
    """The exit code, and what standard error said. `full`, `closed`: the stream that is a full disk, or a pipe whose
    reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | ({closed: writer} if closed else {})
    variables = environment() | {"PYTHONUNBUFFERED": unbuffered}
    try:
        with open(FULL if full else os.devnull, "wb") as device:
            streams |= {full: device.fileno()} if full else {}
            done = subprocess.run(command, cwd=folder, env=variables, timeout=300, **streams)  # type: ignore[call-overload]
    finally:
        os.close(writer)
    return done.returncode, (done.stderr or b"").decode()


needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
QUICK = (
    "--help",
    "--version",
    "train --help",
    "ls .",
    "ls . --json",
    "watch run",
    "watch run --once --json",
    "verify run",
)
SLOW = (
    "report run", "verify run --json", "doctor --data shapes", "doctor --data shapes --json",
    "plan --arch res20 --width 2 --vram 2G --card gtx1050ti",
)  # fmt: skip
SHOWS = [*QUICK, *(pytest.param(command, marks=pytest.mark.slow) for command in SLOW)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it."""
    made = tmp_path_factory.mktemp("streams")
    make_run(made / "run")
    return made


@needs_full
@pytest.mark.parametrize("command", SHOWS)
def test_a_full_disk_is_one_line_and_code_8(folder: Path, command: str) -> None:
    code, said = left([*LOWMEM, *command.split()], folder, full="stdout")
    assert (code, len(said.splitlines())) == (8, 1), said
    assert said.startswith("lowmem: the output cannot be written (No space left on device)")


@pytest.mark.parametrize("command", SHOWS)
def test_a_reader_that_has_left_is_code_141_without_a_word(folder: Path, command: str) -> None:
    assert left([*LOWMEM, *command.split()], folder, closed="stdout") == (141, "")


def test_unbuffered_output_is_no_other(folder: Path) -> None:
    assert left([*LOWMEM, "ls", "."], folder, closed="stdout", unbuffered="1") == (141, "")


@needs_full
@pytest.mark.parametrize("command", ["--bogus", "ls nowhere"])
def test_errors_that_cannot_be_written_keep_their_code(folder: Path, command: str) -> None:
    assert left([*LOWMEM, *command.split()], folder, full="stderr")[0] == 2


@pytest.mark.skipif(os.name == "nt", reason="a shell that closes streams")
def test_streams_that_were_closed_are_no_bug(folder: Path) -> None:
    """And no file that is opened gets their number."""
    shell = f'"{sys.executable}" -m lowmem ls . >&- 2>&- <&-'
    assert subprocess.run(shell, shell=True, cwd=folder, env=environment(), timeout=300).returncode == 0


@pytest.mark.parametrize("how", [pytest.param("full", marks=needs_full), "closed"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_whoever_tells_of_a_run_goes_on(tmp_path: Path, how: str, stream: str) -> None:
    code, said = left([sys.executable, "-c", OBSERVED], tmp_path, **{how: stream})  # type: ignore[arg-type]
    assert (tmp_path / "done").exists()
    assert code == 5
    assert not any(word in said for word in ("Traceback", "Exception"))
    assert (stream == "stderr") == ("a warning" not in said)


@needs_full
def test_a_log_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    program = (
        "import os; from lowmem.cli.streams import *; take_streams(); unread_is_well(); print('lost', flush=True); "
        "os.dup2(os.open('log', os.O_CREAT | os.O_WRONLY), 1); print('kept', flush=True)"
    )
    assert left([sys.executable, "-c", program], tmp_path, full="stdout") == (0, "")
    assert "kept" in (tmp_path / "log").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
def test_a_training_goes_on_when_its_terminal_is_closed(tmp_path: Path) -> None:
    """As under nohup: a hang-up is ignored, and what is written to the terminal fails from then on."""
    ours, theirs = os.openpty()
    log = tmp_path / "log"
    with open(log, "wb") as errors:
        training = subprocess.Popen(
            [*LOWMEM, "train", *TINY, *STEPS, "--out", str(tmp_path / "run")],
            stdin=theirs,
            stdout=theirs,
            stderr=errors,
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
    os.close(theirs)
    seen = b""
    while b"epoch 1/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert training.wait(timeout=300) == 0
    assert log.read_text() == ""
    assert read_run(tmp_path / "run").state == "stopped"
