"""`lowmem ls`: every state a run can be in, and folders that are broken in every way, without loading torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import main
from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import read_position
from lowmem.runs.lock import writer_of
from lowmem.runs.rows import Event
from lowmem.runs.store import RunFolder, most_checkpoints, run_bytes
from lowmem.runs.view import RunSummary, RunView, errors_of, list_runs, summarize
from tests.unit.report.fake_runs import write_run


def _save(run: Path, *, epoch: int, step: int, step_in_epoch: int = 0, keep_every: int | None = None) -> Path:
    state = {"run": {"epoch": epoch, "step": step, "step_in_epoch": step_in_epoch}}
    saved = Checkpoint(step=step, model={"w": torch.zeros(3)}, optimizer={}, state=state)
    return checkpoints.save(run / "checkpoints", saved, keep=2, keep_every=keep_every)


def _run(folder: Path, name: str, done: int, **settings: object) -> Path:
    run = write_run(folder / name, done=done, epochs=5, **settings)
    for epoch in range(done + 1):
        _save(run, epoch=epoch, step=391 * epoch)
    return run


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "config": lambda run: (run / "config.yaml").write_text("train: {epochs: -1}\n"),
    "yaml": lambda run: (run / "config.yaml").write_bytes(b"\xff\x00{"),
    "missing": lambda run: (run / "config.yaml").unlink(),
    "metrics": lambda run: (run / "metrics.csv").write_text("epoch,step\n1,2\nx,3\n"),
    "checkpoints": lambda run: [_truncate(path / "model.safetensors") for path in (run / "checkpoints").iterdir()],
    "lost": lambda run: shutil.rmtree(run / "checkpoints"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in each state, and what else lies about in such a folder."""
    path = tmp_path_factory.mktemp("runs")
    _run(path, "finished", 5)
    _save(_run(path, "interrupted", 2), epoch=2, step=800, step_in_epoch=18)
    _run(path, "new", 0)
    _run(path, "stopped", 2, train__max_steps=782)
    _run(path / "group", "deep", 1)
    write_run(path / "killed-at-once", done=0, epochs=5)
    write_run(path / "finished-pruned", done=5, epochs=5)
    for name, harm in DAMAGES.items():
        harm(_run(path, f"bad-{name}", 2))
    (path / "notes").mkdir()
    (path / "notes.txt").write_text("no run")
    return path


@pytest.fixture
def runs(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "runs"))


def test_every_state(runs: Path) -> None:
    listed = {run.path.relative_to(runs).as_posix(): run for run in list_runs(runs)}
    states = {name: run.state for name, run in listed.items()}
    assert states == {
        **{f"bad-{name}": "damaged" for name in DAMAGES},
        "finished": "finished",
        "finished-pruned": "finished",
        "group/deep": "interrupted",
        "interrupted": "interrupted",
        "killed-at-once": "never started",
        "new": "never started",
        "stopped": "stopped",
    }
    assert all(run.trouble for name, run in listed.items() if name.startswith("bad-"))
    assert not any(run.trouble for name, run in listed.items() if not name.startswith("bad-"))
    assert [kept.at for kept in listed["interrupted"].checkpoints] == ["2", "step:800"]
    assert (listed["interrupted"].epoch, listed["interrupted"].step) == (2, 800)


def test_errors_and_size(runs: Path) -> None:
    run = summarize(runs / "finished")
    with open(runs / "finished/metrics.csv") as file:
        header, *lines = (line.split(",") for line in file.read().splitlines())
    errors = [float(line[header.index("test_error_pct")]) for line in lines]
    assert (run.error_on, run.last_error_pct, run.best_error_pct) == ("test", errors[-1], min(errors))
    assert run.best_epoch == errors.index(min(errors)) + 1
    rows = RunView(runs / "finished").epochs
    fork = Event("fork", None, {"epoch": 1})  # the best weights are chosen anew from there on
    assert errors_of(rows, (fork,))["best_error_pct"] == min(errors[1:])
    assert errors_of(rows[:1], (fork,))["best_error_pct"] is None
    files = [path for path in (runs / "finished").rglob("*") if path.is_file()]
    assert run.size_bytes == sum(path.stat().st_size for path in files)


def test_a_run_that_is_being_trained(runs: Path) -> None:
    with RunFolder.open(runs / "interrupted"):
        held = summarize(runs / "interrupted")
        # As seen from another machine, by the name of the owner's host.
        owner = runs / "interrupted/run.owner.json"
        owner.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
        assert writer_of(runs / "interrupted") == "pid 7 on elsewhere"
        owner.write_text("garbage")
        assert writer_of(runs / "interrupted") == "another process"
    assert (held.state, held.writer) == ("training", f"pid {os.getpid()}")
    assert summarize(runs / "interrupted").state == "interrupted"


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_counts(runs: Path) -> None:
    _truncate(runs / "interrupted/checkpoints/step-00000800/optimizer.safetensors")
    run = summarize(runs / "interrupted")
    assert (run.state, run.step) == ("interrupted", 782)
    assert "optimizer.safetensors" in run.trouble[0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": {}}', '{"files": {"../../config.yaml": {"bytes": 1}}}', "{"])
def test_a_commit_record_of_somebody_elses_making(runs: Path, text: str) -> None:
    (runs / "interrupted/checkpoints/step-00000800/manifest.json").write_text(text)
    assert summarize(runs / "interrupted").step == 782


def test_positions_that_are_none(tmp_path: Path) -> None:
    for value in (-1, True, "1", 1.0, None):
        path = _save(tmp_path, epoch=value, step=3)  # type: ignore[arg-type]
        with pytest.raises(checkpoints.CorruptCheckpoint, match="no position"):
            read_position(path)


def test_every_second_epoch_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for epoch in range(8):
        _save(tmp_path, epoch=epoch, step=10 * epoch, keep_every=2)
        _save(tmp_path, epoch=epoch, step=10 * epoch + 5, step_in_epoch=5, keep_every=2)
    kept = [read_position(path).at for path in reversed(checkpoints.checkpoint_folders(tmp_path / "checkpoints"))]
    assert kept == ["2", "4", "6", "7", "step:75"]
    # While one is written there is one more: the disk must have room for that many.
    config = gather(sets=["train.epochs=8", "checkpoint.keep_every=2"]).config
    assert most_checkpoints(config) == len(kept) + 1
    assert run_bytes(config, checkpoint_bytes=10, parameter_bytes=1) == 10 * (len(kept) + 1) + 3
    for every in ("null", "8"):
        assert most_checkpoints(gather(sets=["train.epochs=8", f"checkpoint.keep_every={every}"]).config) == 3


def test_the_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["ls", str(runs), "--json"])
    assert leaving.value.code == 0
    values = json.loads(capsys.readouterr().out)
    assert [value["path"] for value in values] == [str(run.path) for run in list_runs(runs)]
    with pytest.raises(SystemExit):
        main(["ls", str(runs)])
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("interrupted"))
    assert line.split()[1:3] == ["interrupted", "2/5"]
    assert line.endswith("2, step:800")
    assert any(line.startswith("bad-missing: ") for line in lines)


def test_no_folder_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        list_runs(tmp_path / "none")
    with pytest.raises(SystemExit):
        main(["ls", str(tmp_path)])
    assert "no runs" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="names with control characters")
def test_a_name_that_would_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a\x1b[2J", done=0)
    with pytest.raises(SystemExit):
        main(["ls", str(tmp_path)])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_not_followed(tmp_path: Path) -> None:
    write_run(tmp_path / "outside/run", done=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside/run")
    (tmp_path / "runs/loop").symlink_to(tmp_path / "runs")
    assert list_runs(tmp_path / "runs") == []


def test_no_torch(runs: Path) -> None:
    probe = (
        "import sys\n"
        "from lowmem.cli.main import main\n"
        "try:\n"
        f"    main(['ls', {str(runs)!r}])\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_listed_without_anything_known_is_still_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(RunSummary(path=tmp_path, state="damaged").to_json()))["epoch"] is None


# The system's owner reads everything: what a mode forbids is only seen without that right.
_MAY_READ_ALL = "-dac_override,-dac_read_search"
PLAIN_USER = ["setpriv", f"--bounding-set={_MAY_READ_ALL}", f"--inh-caps={_MAY_READ_ALL}"]


def _as_plain_user(*arguments: str) -> subprocess.CompletedProcess[str]:
    if os.name == "nt" or (os.geteuid() == 0 and shutil.which("setpriv") is None):
        pytest.skip("needs file modes that hold for this user")
    plain = PLAIN_USER if os.geteuid() == 0 else []
    command = [*plain, sys.executable, "-m", "lowmem", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "mode"), [("interrupted", 0o000), ("interrupted", 0o444), ("interrupted/checkpoints", 0o000)]
)
def test_a_folder_that_cannot_be_looked_into_hides_no_other(runs: Path, name: str, mode: int) -> None:
    names = {path.relative_to(runs).as_posix() for path in (run.path for run in list_runs(runs))}
    (runs / name).chmod(mode)
    try:
        done = _as_plain_user("ls", str(runs), "--json")
    finally:
        (runs / name).chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    listed = {Path(value["path"]).relative_to(runs).as_posix(): value for value in json.loads(done.stdout)}
    assert listed.keys() == names
    assert listed["interrupted"]["state"] == "damaged"
    assert "Permission denied" in str(listed["interrupted"]["trouble"])
    assert listed["finished"]["state"] == "finished"


def test_a_folder_that_may_not_be_looked_at_is_code_3(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    flags = ("--arch", "res20", "--data", "shapes", "--epochs", "1", "--device", "cpu")
    done = _as_plain_user("train", *flags, "--out", str(tmp_path / "closed/x"))
    assert done.returncode == 3
    assert "Permission denied" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_strangers_text_is_told_in_a_line(runs: Path) -> None:
    newest = runs / "interrupted/checkpoints/step-00000800"
    for entry in ({"x" * 500_000: {"bytes": 1}}, {"model.safetensors": {"bytes": "\x1b" + "9" * 500_000}}):
        (newest / "manifest.json").write_text(json.dumps({"files": entry}))
        with pytest.raises(checkpoints.CorruptCheckpoint) as raised:
            read_position(newest)
        assert len(str(raised.value)) < 1000
        assert str(raised.value).isprintable()
    config = runs / "interrupted/config.yaml"
    config.write_text(config.read_text().replace("block: ", f"block: {'x' * 5000}"))
    assert len(summarize(runs / "interrupted").trouble[0]) < 1000
