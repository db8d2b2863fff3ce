"""A job of real runs, killed and interrupted in the middle of its second one: the same command goes on, and all ends
with the bits of a job that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from lowmem.reproduce.job import read_job
from tests.conftest import assert_same_run
from tests.faults.processes import Served, reproduce

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes with fork")

SMALL = (
    "--only", "res20,cnn20", "--width", "2", "--data", "shapes", "--epochs", "2", "--batch", "20",
    "--set", "data.train_subset=200", "--set", "data.test_subset=20", "--set", "train.log_every_steps=1",
    "--set", "checkpoint.every_steps=3",
)  # fmt: skip
STEPS = 20  # of a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    job = reproduce(folder / "job", folder / "log", *SMALL)
    assert job.wait() == 0, job.said
    return folder / "job"


def first_run_done(whole: Path, out: Path) -> Path:
    """A job whose first run is finished and whose second has not begun. Returns the second one's folder."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "cnn20")
    shutil.rmtree(out / "report")
    return out / "cnn20"


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_for_steps(run: Path, steps: int, job: Served) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = run / "steps.csv"
        if file.is_file() and len(file.read_text().splitlines()) > steps:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run did not get going: {job.said}")


def trained_by(run: Path) -> int:
    return int(json.loads((run / "run.owner.json").read_text())["pid"])


def assert_same_job(out: Path, whole: Path) -> None:
    for name in ("res20", "cnn20"):
        assert_same_run(out / name, whole / name)
    text = (out / "report" / "report.md").read_text()
    assert "| Res20 | res20 | 2 |" in text
    assert "| CNN20 | cnn20 | 2 |" in text
    figures = {path.name for path in (whole / "report").iterdir()}
    assert {"loss.png", "test_error.png", "pair_20.png", "gradients_res20.png", "gradients_cnn20.png"} <= figures
    assert {path.name for path in (out / "report").iterdir()} == figures


def test_a_job_that_is_left_alone(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {"job.json", "job.lock", "res20", "cnn20", "report"}
    job = read_job(whole)
    assert job.settings.config.train.epochs == 2
    assert set(job.weights) == {"res20", "cnn20"}
    # A run of it is a run like any other.
    assert "train.epochs" not in (whole / "report" / "report.md").read_text()
    assert "epochs: 2  # flag" in (whole / "cnn20" / "config.yaml").read_text()


@pytest.mark.slow
def test_killed_in_the_second_run(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "job"
    run = first_run_done(whole, out)
    job = reproduce(out, tmp_path / "log", *SMALL)
    wait_for_steps(run, 7, job)
    trains = trained_by(run)
    # As in a power cut: nobody is left to save anything.
    os.kill(job.pid, signal.SIGKILL)
    os.kill(trains, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    before = files_of(out / "res20")
    again = reproduce(out, tmp_path / "again", *SMALL)
    assert again.wait() == 0, again.said
    assert "is taken over from process" in again.said
    assert "run 1 of 2: res20 is finished (2 epochs), skipped" in again.said
    assert "run 2 of 2: cnn20 goes on" in again.said
    assert f"resuming {run} from step-" in again.said
    assert files_of(out / "res20") == before
    assert_same_job(out, whole)


def test_interrupted_in_the_second_run(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "job"
    run = first_run_done(whole, out)
    job = reproduce(out, tmp_path / "log", *SMALL)
    wait_for_steps(run, 7, job)
    job.signal(signal.SIGINT)
    assert job.wait() == 130
    last = job.said.strip().splitlines()[-1]
    assert last.startswith("lowmem: SIGINT: cnn20 is saved at epoch ")
    go_on = f"lowmem reproduce --out {out} --only res20,cnn20"
    assert last.endswith(f"; go on with `{go_on}`")
    assert "lowmem resume" not in job.said  # one command, not two
    event = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["signal"]) == ("signal", "SIGINT")
    assert not (run / "run.owner.json").exists()
    # What it says is enough: the settings are recorded.
    again = reproduce(out, tmp_path / "again", *go_on.split()[4:])
    assert again.wait() == 0, again.said
    assert_same_job(out, whole)


@pytest.mark.slow
def test_from_its_first_run_on(whole: Path, tmp_path: Path) -> None:
    """Interrupted by another signal in the first run, killed in the second."""
    out = tmp_path / "job"
    for name, step, number, code in (("res20", 5, signal.SIGTERM, 143), ("cnn20", 12, signal.SIGKILL, -9)):
        job = reproduce(out, tmp_path / "log", *SMALL)
        wait_for_steps(out / name, step, job)
        job.signal(number)
        assert job.wait() == code, job.said
    again = reproduce(out, tmp_path / "again", *SMALL)
    assert again.wait() == 0, again.said
    assert_same_job(out, whole)


@pytest.mark.slow
def test_without_its_conductor_a_run_saves_and_leaves(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "job"
    first_run_done(whole, out)
    job = reproduce(out, tmp_path / "log", *SMALL, "--set", "checkpoint.every_steps=1000")
    wait_for_steps(out / "cnn20", 3, job)
    job.signal(signal.SIGKILL)
    job.wait()
    # At once, while the other process may still be saving.
    again = reproduce(out, tmp_path / "again", *SMALL)
    assert again.wait() == 0, again.said
    kinds = [json.loads(line)["event"] for line in (out / "cnn20" / "events.jsonl").read_text().splitlines()]
    assert kinds.count("signal") == 1
    assert kinds.count("resume") == 1
    assert_same_job(out, whole)


def test_other_settings_are_refused(whole: Path, tmp_path: Path) -> None:
    before = files_of(whole)
    job = reproduce(whole, tmp_path / "log", *SMALL, "--epochs", "3", "--set", "optim.lr=0.2")
    assert job.wait() == 2
    (line,) = job.said.strip().splitlines()
    assert "train.epochs 2 (now 3)" in line
    assert "optim.lr 0.1 (now 0.2)" in line
    assert "--out" in line
    del before["job.lock"]
    after = files_of(whole)
    del after["job.lock"]
    assert after == before


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_paused_and_continued(tmp_path: Path) -> None:
    """Ctrl-Z reaches the process that conducts; the one that trains must not go on alone."""
    out = tmp_path / "job"
    # Long enough for a busy machine to bring the signal to it before its end.
    job = reproduce(out, tmp_path / "log", *SMALL, "--only", "res20", "--epochs", "15")
    wait_for_steps(out / "res20", 2, job)
    trains = trained_by(out / "res20")
    job.signal(signal.SIGTSTP)
    for pid in (job.pid, trains):
        wait_until_stopped(pid)
    rows = (out / "res20" / "steps.csv").read_text()
    time.sleep(0.3)
    assert (out / "res20" / "steps.csv").read_text() == rows
    job.signal(signal.SIGCONT)
    assert job.wait() == 0, job.said
