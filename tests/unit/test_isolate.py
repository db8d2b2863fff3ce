"""A function in a clean process: whatever happens to it there is an outcome here, and nothing but the answer is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.core.units import MIB
from lowmem.isolate import OUT_OF_MEMORY, Call, Forks, run

HERE = "tests.isolated"


@pytest.fixture(scope="module", params=["of its own", "forked"])
def call(request: pytest.FixtureRequest) -> Iterator[Call]:
    if request.param == "of its own":
        yield run
        return
    with Forks(f"{HERE}:nothing_to_prepare") as forks:
        yield forks


def test_an_answer(call: Call) -> None:
    outcome = call(f"{HERE}:double", 21, timeout_seconds=60)
    assert (outcome.ended, outcome.refused) == ("answered", None)
    assert outcome.answer["number"] == 42
    assert outcome.answer["pid"] != os.getpid()


def test_what_is_printed_spoils_no_answer(call: Call) -> None:
    assert call(f"{HERE}:chatter", timeout_seconds=60).answer == "returned"


def test_there_is_nothing_to_read(call: Call) -> None:
    assert call(f"{HERE}:read_input", timeout_seconds=60).answer == ""


@pytest.mark.parametrize(
    ("how", "refused", "code"),
    [
        ("exception", "crashed: ValueError: no such kernel", 1),
        ("leaves", "crashed: SystemExit: no card", 1),
        ("library", OUT_OF_MEMORY, 1),
        ("abort", "crashed: terminate called", -6),
        ("killed", OUT_OF_MEMORY, -9),
        ("silent", "answered nothing", 0),
        ("unknown", "crashed: TypeError: Object of type set is not JSON serializable", 1),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_call_that_goes_wrong(call: Call, how: str, refused: str, code: int) -> None:
    outcome = call(f"{HERE}:crash", how, timeout_seconds=60)
    assert (outcome.refused, outcome.code) == (refused, code)
    assert outcome.ended == ("out of memory" if refused == OUT_OF_MEMORY else "crashed")
    assert outcome.answer_or_refusal == refused
    assert call(f"{HERE}:double", 1, timeout_seconds=60).answer["number"] == 2


def test_a_function_that_is_not_there(call: Call) -> None:
    assert "no attribute 'nobody'" in (call(f"{HERE}:nobody", timeout_seconds=60).refused or "")
    assert "No module named" in (call("no_such_module:f", timeout_seconds=60).refused or "")


def test_a_limit_of_time(call: Call) -> None:
    began = time.monotonic()
    outcome = call(f"{HERE}:sleep", 600, timeout_seconds=2)
    assert time.monotonic() - began < 60
    assert (outcome.ended, outcome.refused) == ("too long", "took longer than 2 s")
    assert outcome.parts == ("before",)
    assert call(f"{HERE}:double", 1, timeout_seconds=60).answer["number"] == 2


def test_what_was_yielded_before_a_crash_is_known(call: Call) -> None:
    whole = call(f"{HERE}:steps", 2, timeout_seconds=60)
    assert (whole.answer, whole.parts) == ("done", (0, 1))
    broken = call(f"{HERE}:steps", 5, timeout_seconds=60)
    assert (broken.refused, broken.parts) == ("crashed: ended with code 9", (0, 1, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by /proc")
def test_out_of_memory(call: Call) -> None:
    assert call(f"{HERE}:allocate", 100 * MIB, timeout_seconds=60).ended == "out of memory"


def test_nothing_is_imported_that_is_not_asked_for() -> None:
    assert (
        run("os:getcwd", timeout_seconds=60).refused
        == "crashed: TypeError: posix.getcwd() takes no arguments (1 given)"
    )
    assert run(f"{HERE}:double", 1, timeout_seconds=60).answer["modules"] == []


def test_the_current_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert run(f"{HERE}:double", 1, timeout_seconds=60).refused is None


def test_modules_are_the_callers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is installed by the same name, and where PYTHONPATH says before all."""
    (tmp_path / "json_of_mine.py").write_text("def where(_): return 'the caller'")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("json_of_mine:where", timeout_seconds=60).answer == "the caller"
    (tmp_path / "first").mkdir()
    (tmp_path / "first/json_of_mine.py").write_text("def where(_): return 'PYTHONPATH'")
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "first"), os.environ.get("PYTHONPATH", "")])}
    assert run("json_of_mine:where", timeout_seconds=60, environment=given).answer == "PYTHONPATH"


def test_the_environment_is_what_is_given(call: Call) -> None:
    given = {**os.environ, "LOWMEM_SOMETHING": "there"}
    assert call(f"{HERE}:environment", "LOWMEM_SOMETHING", timeout_seconds=60, environment=given).answer == "there"
    assert call(f"{HERE}:environment", "LOWMEM_SOMETHING", timeout_seconds=60).answer is None


def test_a_python_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    outcome = run(f"{HERE}:double", 1, timeout_seconds=60)
    assert outcome.ended == "not started"
    assert outcome.refused == "could not be started (No such file or directory)"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_call_ends_with_its_caller(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"from lowmem.isolate import run; run('{HERE}:outlive', {str(file)!r}, timeout_seconds=600)"
    with subprocess.Popen([sys.executable, "-c", code]) as caller:
        number = _pid_in(file)
        caller.kill()
    _wait_for_the_end(number)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_the_call_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"from lowmem.isolate import run; run('{HERE}:outlive', {str(file)!r}, timeout_seconds=600)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as caller:
        number = _pid_in(file)
        caller.send_signal(signal.SIGINT)
    _wait_for_the_end(number)


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
class TestForks:
    def test_nothing_is_left_behind(self) -> None:
        with Forks(f"{HERE}:nothing_to_prepare") as forks:
            number = forks(f"{HERE}:parent", timeout_seconds=60).answer
        assert not Path(f"/proc/{number}").exists()

    def test_it_ends_with_its_caller(self) -> None:
        code = (
            "import os, signal\n"
            "from lowmem.isolate import Forks\n"
            f"forks = Forks('{HERE}:nothing_to_prepare').__enter__()\n"
            f"print(forks('{HERE}:parent', timeout_seconds=60).answer, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL
        _wait_for_the_end(int(done.stdout))

    def test_a_process_that_forks_and_is_killed_is_taken_for_out_of_memory(self, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        with Forks(f"{HERE}:nothing_to_prepare") as forks:
            number = forks(f"{HERE}:parent", timeout_seconds=60).answer

            def kill() -> None:
                _pid_in(file)
                os.kill(number, signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            outcome = forks(f"{HERE}:outlive", str(file), timeout_seconds=300)
            killer.join()
            assert outcome.refused == OUT_OF_MEMORY
            _wait_for_the_end(_pid_in(file))
            assert forks(f"{HERE}:double", 1, timeout_seconds=60).answer["number"] == 2


def _pid_in(file: Path) -> int:
    for _ in range(600):
        if file.exists() and (text := file.read_text()):
            return int(text)
        time.sleep(0.1)
    raise AssertionError("the call did not begin")


def _wait_for_the_end(number: int) -> None:
    for _ in range(600):
        status = Path(f"/proc/{number}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {number} still runs")
