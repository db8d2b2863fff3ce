"""`lowmem watch`: follows a real training process, draws on a terminal, prints lines anywhere else."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lowmem.cli.main import _run
from lowmem.cli.terminal import describe_event
from lowmem.cli.watch import _conducted, screen, sparkline
from lowmem.config.settings import gather, to_yaml
from lowmem.runs.rows import Event
from lowmem.runs.store import RunFolder
from lowmem.runs.watch import Live

LOWMEM = (sys.executable, "-m", "lowmem")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_leaves_the_run_alone(tmp_path: Path) -> None:
    with small_run(tmp_path / "run") as folder:
        folder.event("start")
        watching = subprocess.Popen(
            [*LOWMEM, "watch", str(folder.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=60)
        assert (watching.returncode, said.strip()) == (0, b"left; the run was not touched")


def small_run(path: Path) -> RunFolder:
    return RunFolder.create(path, to_yaml(gather(sets=["train.epochs=3"])), {})


def test_a_run_that_is_given_up_before_its_first_step(tmp_path: Path) -> None:
    """What a failed preflight does to its folder."""
    run = small_run(tmp_path / "run")
    command = [*LOWMEM, "watch", str(run.path), "--interval", "0.05"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert watching.stdout is not None
    assert watching.stdout.readline() == f"{run.path}\n"
    assert "getting ready" in watching.stdout.readline()
    run.discard()
    assert watching.stdout.read().splitlines()[-1].startswith(f"{run.path} is gone")
    assert watching.wait(60) == 0


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_run(tmp_path / "run") as folder:
        folder.event("start", steps_per_epoch=7)
        folder.append_steps([{"step": 2, "epoch": 1, "lr": 0.1, "loss": float("nan")}])
        assert _run(["watch", str(folder.path), "--once"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"state   training \(process \d+ on .* since ", said)
        assert "host memory" not in said
        folder.write_plan({"predicted": {"host_bytes": 3 << 30, "hidden_share": 0.957}})
        assert _run(["watch", str(folder.path), "--once"]) == 0
        assert "3,072 MiB wait in host memory, moved out and back each step; 96% of the" in capsys.readouterr().out
        assert _run(["watch", str(folder.path), "--once", "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["state"], told["running"], told["step"], told["steps_per_epoch"]) == ("training", True, 2, 7)
    assert (told["loss"], told["epochs"], told["writer"]["pid"]) == (None, 3, os.getpid())


def test_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that is trained; if none is, the one that was touched last."""
    runs = tmp_path / "runs"
    for name in ("a", "b", "c"):
        with small_run(runs / name) as folder:
            folder.event("start")
    os.utime(runs / "a" / "events.jsonl", (time.time() + 5,) * 2)
    assert _run(["watch", str(runs), "--once"]) == 0
    assert capsys.readouterr().out.startswith(f"{runs / 'a'}\n")
    with RunFolder.open(runs / "b"):
        assert _run(["watch", str(runs), "--once"]) == 0
    assert capsys.readouterr().out.startswith(f"{runs / 'b'}\n")


def test_the_runs_of_a_job_one_after_the_other(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = small_run(runs / "first")
    first.event("start")
    command = [*LOWMEM, "watch", str(runs), "--interval", "0.05"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert watching.stdout is not None
    lines = iter(watching.stdout.readline, "")
    assert next(lines) == f"{runs / 'first'}\n"
    first.event("done", epoch=3, step=3)
    first.close()
    assert any(line.startswith("waiting for the next run") for line in lines)
    with small_run(runs / "second") as second:
        second.event("start")
        assert any(line == f"{runs / 'second'}\n" for line in lines)
        second.event("signal", signal="SIGINT")
    assert any(line.startswith(f"{runs / 'second'}: interrupted, saved") for line in lines)
    assert watching.wait(60) == 0


def test_a_job_before_its_first_run_and_after_its_last(tmp_path: Path) -> None:
    """As long as somebody holds the job there may be a next run, and not a moment longer."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026-11-25T08:00:00+0000"}
    (tmp_path / "job.owner.json").write_text(json.dumps(owner), encoding="utf-8")
    command = [*LOWMEM, "watch", str(tmp_path), "--interval", "0.05"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert watching.stdout is not None
    lines = iter(watching.stdout.readline, "")
    assert next(lines).startswith("waiting for the next run")
    with small_run(tmp_path / "first") as run:
        run.event("start")
        assert next(lines) == f"{tmp_path / 'first'}\n"
    assert any(line.startswith("waiting for the next run") for line in lines)
    (tmp_path / "job.owner.json").unlink()
    assert list(lines) == [f"the job in {tmp_path} has ended\n"]
    assert watching.wait(60) == 0


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["watch", str(tmp_path / "nowhere")]) == 2
    assert _run(["watch", str(tmp_path)]) == 2
    small_run(tmp_path / "run").close()
    assert _run(["watch", str(tmp_path / "run"), "--json"]) == 2
    assert "--once" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_strangers_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_run(tmp_path / "run") as folder:
        folder.event("\x1b[31mred", what="\x1b]0;title\x07", reason="[bold]x[/bold]")
        folder.event("warning", what="\x1b[2Jgone")
        folder.event("checkpoint", step="\x1b[31m")
    with folder.events_file.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "warning", "what": "x", "time": "2026-11-25T\x1b[31m!!"}) + "\n")
    console = Console(file=io.StringIO(), width=60)
    console.print(screen(Live(folder.path).look(), console))
    assert isinstance(console.file, io.StringIO)
    assert "\x1b" not in console.file.getvalue()
    assert max(map(len, console.file.getvalue().splitlines())) <= 60
    assert "[bold]" in console.file.getvalue()
    (folder.path / "steps.csv").unlink()
    (folder.path / "steps.csv").symlink_to(tmp_path / "other")
    assert _run(["watch", str(folder.path), "--once"]) == 2
    assert "is a link" in capsys.readouterr().err


def test_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5.0, 5.0], 5) == "▁▁"
    assert sparkline([0, float("inf"), 7], 3, ascii_only=True) == "_!@"
    assert len(sparkline(range(1000), 40)) == 40


def test_starts_without_torch() -> None:
    probe = (
        "import sys\n"
        "from lowmem.cli.main import _run\n"
        "assert _run(['watch', 'no such folder']) == 2\n"
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("size", "said"), [(2 << 20, "2 MiB"), (None, "?"), ("many", "?")])
def test_a_size_that_is_none_is_unknown(size: object, said: str) -> None:
    event = Event(kind="replan", time="2026-11-27T08:34:12", detail={"budget_bytes": size})
    assert describe_event(event) == f"another plan: {said} for the step's tensors"


def test_a_job_of_a_container_that_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.lock").touch()
    owner = {"pid": 7, "host": "0c1f5e2a9b7d", "boot": "1"}
    (tmp_path / "job.owner.json").write_text(json.dumps(owner))
    for boot, waits in (("2", True), ("1", False)):
        monkeypatch.setattr("lowmem.runs.lock._boot", lambda boot=boot: boot)
        assert _conducted(tmp_path) == waits
