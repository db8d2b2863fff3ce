"""The conductor of a prepared run, with real processes: parts that die, hang or are not begun; what is kept of them."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.account import NO_TIME, read_accounts, shortcomings
from benchmarks.gpu.job import PARTS, Job, Part, read_job, select, write_job
from lowmem.core.errors import PreflightError, UsageError

NAMES = tuple(part.name for part in PARTS)

# A part's process, by what its questions say. It notes that it ran, and writes its account as a real one does.
_CHILD = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.account import Account
part, questions, path, artefacts, seconds, at_once = sys.argv[1:]
asked = json.loads(Path(questions).read_text())
with open(asked["ran"], "a") as file:
    file.write(part + "\\n")
account = Account(Path(path), part, "cpu", float(seconds))
account.row("first", {"figure": 1, "odd": float("nan")}, met=True)
print("said", part, flush=True)
if asked["does"] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if asked["does"] == "fails":
    raise SystemExit("it cannot be done")
if asked["does"] == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(artefacts, "child.txt").write_text(str(child.pid))
    Path(asked["ran"]).with_name("child.txt").write_text(str(child.pid))
    time.sleep(600)
account.row("second", "not found out" if asked["does"] == "lacks" else {"figure": 2}, met=asked["does"] != "breaks")
account.finish()
"""


def _command(part: Part, questions: Path, account: Path, artefacts: Path, seconds: float, at_once: int) -> list[str]:
    values = (questions, account, artefacts, seconds, at_once)
    return [sys.executable, "-c", _CHILD, part.name, *map(str, values)]


@pytest.fixture(autouse=True)
def _this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that asking torch takes; children find the package."""
    monkeypatch.setattr(run, "_environment", lambda device: {"card": None, "cpu": "a processor", "torch": "2"})
    monkeypatch.setattr(run, "_LEAST_SECONDS", 0.5)
    monkeypatch.setattr(run, "_PACKING_SECONDS", 0.0)
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def _prepared(folder: Path, limits: dict[str, float] | None = None, **does: str) -> Path:
    """A job whose parts do what is said of them, and nothing special otherwise."""
    ran = str(folder / "ran.txt")
    asked = {name: {"does": does.get(name.replace("-", "_"), "well"), "ran": ran} for name in NAMES}
    job = Job(device="cpu", limits=dict.fromkeys(NAMES, 60.0) | (limits or {}), conditions={"revision": "abc"})
    write_job(folder / "prepared", job, asked)
    return folder / "prepared"


def _ran(folder: Path) -> list[str]:
    return (folder / "ran.txt").read_text().split()


def test_a_part_that_dies_takes_nothing_with_it(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, gradients="dies", memory="fails", resume="lacks")
    wrong = run.conduct(prepared, tmp_path / "out", select("facts,gradients,memory,resume"), 5, _command)
    found = read_accounts(tmp_path / "out", NAMES)
    assert list(found) == ["facts", "gradients", "memory", "resume"]
    assert {name: one["outcome"] for name, one in found.items()} == {
        "facts": "done",
        "gradients": "was ended by signal 9: said gradients",
        "memory": "left with code 1: it cannot be done",
        "resume": "done",
    }
    assert found["gradients"]["rows"][0]["found"] == {"figure": 1, "odd": None}
    assert not found["gradients"]["finished"]
    assert wrong == [
        "gradients: was ended by signal 9: said gradients",
        "memory: left with code 1: it cannot be done",
        "resume: second: not found out",
    ]
    assert _ran(tmp_path) == ["facts", "gradients", "memory", "resume"]


def test_what_comes_back_is_three_files(tmp_path: Path) -> None:
    assert run.conduct(_prepared(tmp_path), tmp_path / "out", PARTS, 5, _command) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [run.ARTEFACTS, run.LOG, run.RESULTS]
    with tarfile.open(tmp_path / "out" / run.ARTEFACTS) as archive:
        assert f"{NAMES[0]}/said.txt" in archive.getnames()
    record = json.loads((tmp_path / "out" / run.RESULTS).read_text())
    assert record["prepared"] == {"revision": "abc"}
    assert record["parts"]["facts"]["environment"]["cpu"] == "a processor"
    log = (tmp_path / "out" / run.LOG).read_text()
    for name in NAMES:
        assert f"{name}: begins" in log


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, {"gradients": 4.0}, gradients="hangs")
    wrong = run.conduct(prepared, tmp_path / "out", select("gradients,memory"), 5, _command)
    assert wrong == ["gradients: took longer than 4 s"]
    assert _ran(tmp_path) == ["gradients", "memory"]
    child = int((tmp_path / "child.txt").read_text())
    deadline = time.monotonic() + 10
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_the_total_limit_leaves_out_the_last(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, gradients="hangs")
    wrong = run.conduct(prepared, tmp_path / "out", select("facts,gradients,memory"), 8 / 60, _command)
    found = read_accounts(tmp_path / "out", NAMES)
    assert found["facts"]["outcome"] == "done"
    assert found["gradients"]["outcome"].startswith("took longer than")
    assert found["memory"]["outcome"] == NO_TIME
    assert len(wrong) == 2


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    prepared, parts = _prepared(tmp_path, gradients="dies"), select("facts,gradients")
    assert run.conduct(prepared, tmp_path / "out", parts, 5, _command)
    _prepared(tmp_path)
    assert run.conduct(prepared, tmp_path / "out", select("facts,gradients,memory"), 5, _command) == []
    assert _ran(tmp_path) == ["facts", "gradients", "gradients", "memory"]
    assert list(read_accounts(tmp_path / "out", NAMES)) == ["facts", "gradients", "memory"]
    with tarfile.open(tmp_path / "out" / run.ARTEFACTS) as archive:
        assert "facts/said.txt" in archive.getnames()


def test_a_run_that_was_cut_off_leaves_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the conductor, each part's file is there as soon as it has begun."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prepared = _prepared(tmp_path)
    conductor = run.Conductor(read_job(prepared), prepared, tmp_path / "out", 5, _command)
    (tmp_path / "out").mkdir()
    conductor.do(PARTS[0])
    assert json.loads((tmp_path / "out" / "facts.json").read_text())["outcome"] == "done"
    assert list(read_accounts(tmp_path / "out", NAMES)) == ["facts"]


def test_a_broken_promise_is_a_shortcoming(tmp_path: Path) -> None:
    wrong = run.conduct(_prepared(tmp_path, facts="breaks"), tmp_path / "out", select("facts"), 5, _command)
    assert wrong == ["facts: second: not as promised"]
    account: dict[str, Any] = read_accounts(tmp_path / "out", NAMES)["facts"]
    assert shortcomings({**account, "rows": account["rows"][:1]}) == []


def test_questions_side_by_side_only_where_there_is_room() -> None:
    sizes = {None: 2, 6 << 30: 1, 24 << 30: 2, 80 << 30: 4}
    assert {size: run._at_once({"card_bytes": size}) for size in sizes} == sizes


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no part 'everything'"):
        select("facts,everything")
    with pytest.raises(UsageError, match="prepare --out"):
        run.conduct(tmp_path, tmp_path / "out", PARTS, 5, _command)
    _prepared(tmp_path)
    (tmp_path / "prepared/job.json").write_text('{"format": 0}')
    with pytest.raises(UsageError, match="another version"):
        read_job(tmp_path / "prepared")


def test_the_device_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_job(tmp_path / "prepared", Job(device="cuda", limits={}, conditions={}), {})
    with pytest.raises(PreflightError, match="sees no CUDA device"):
        run.conduct(tmp_path / "prepared", tmp_path / "out", PARTS, 5, _command)
