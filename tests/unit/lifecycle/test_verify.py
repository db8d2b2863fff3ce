"""`lowmem verify` says what is wrong with a run, where a resume would go on, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from lowmem.cli.main import main
from lowmem.core.errors import UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES
from lowmem.lifecycle import recorded_settings, resume_training
from lowmem.lifecycle.verify import FileFinding, verify
from lowmem.report import write_report
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.view import read_run
from tests.faults.damage import flip
from tests.faults.disk import tiny_disk
from tests.faults.fuzzing import rehash
from tests.faults.readers import small_plan
from tests.tiny import Heard, copy_run, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return copy_run(made, tmp_path / "run")


def _command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(["verify", *arguments])
    captured = capsys.readouterr()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, captured.out, captured.err


def _content(run: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}


def _bad(run: Path) -> list[FileFinding]:
    return [finding for finding in verify(run).findings if finding.status == "damaged"]


def test_an_intact_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _content(run)
    code, out, err = _command(capsys, str(run))
    assert (code, err) == (0, "")
    assert "can be resumed exactly, from step-00000007: epoch 3, step 1 of it" in out
    assert "damaged" not in out
    assert _content(run) == before, "it only reads"
    assert sorted(path.name for path in run.iterdir()) == sorted(
        {Path(name).relative_to(run).parts[0] for name in before}
    )
    found = verify(run)
    assert (found.resumes_from, found.epoch, found.step, found.step_in_epoch) == ("step-00000007", 2, 7, 1)
    assert [finding.where for finding in found.findings if finding.where.startswith("checkpoints/")] == [
        f"checkpoints/step-0000000{step}" for step in (7, 6, 4, 3)
    ]


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoints.checkpoint_folders(run / "checkpoints")[0] / "state.json", 9, 1)
    code, out, _ = _command(capsys, str(run), "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["can_resume"], values["resumes_from"], values["step"]) == (True, "step-00000006", 6)
    assert any(one["status"] == "damaged" and one["where"] == "checkpoints/step-00000007" for one in values["findings"])


def test_no_checkpoint_is_code_7(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoints.checkpoint_folders(run / "checkpoints"):
        (path / "manifest.json").unlink()
    code, out, _ = _command(capsys, str(run))
    assert code == 7
    assert out.count("its writing was cut off") == 4
    assert "cannot be resumed: no checkpoint verifies" in out
    shutil.rmtree(run / "checkpoints")
    assert _command(capsys, str(run))[0] == 7


def test_no_run_is_code_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _command(capsys, str(tmp_path / "none"))[0] == 2
    assert _command(capsys, str(tmp_path))[0] == 2
    (run / "config.yaml").write_text("nonsense")
    code, out, err = _command(capsys, str(run))
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    with pytest.raises(UsageError):
        verify(tmp_path / "none")


def _edit(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(change((run / name).read_text()))


FOUND: dict[str, tuple[Callable[[Path], object], str, str, bool]] = {
    "row garbled": (_edit("metrics.csv", lambda t: t.replace("\n1,", "\n?,")), "metrics.csv", "1 damaged lines", True),
    "row lost": (_edit("metrics.csv", lambda t: t.rpartition("\n2,")[0] + "\n"), "metrics.csv", "1 of 2 rows", True),
    "other header": (_edit("steps.csv", lambda t: "x" + t), "steps.csv", "other columns", False),
    "rows of lost checkpoints": (
        _edit("metrics.csv", lambda t: t + "".join(f"{n},{3 * n},0.1,,,,,,,,,,,,,,,,,\n" for n in (3, 4))),
        "metrics.csv", "newer checkpoints", True,
    ),
    "weights cut off": (
        lambda run: (run / "weights/last.safetensors").write_bytes(b"x" * 50), "weights/last", "header", True
    ),
    "a weight flipped": (
        lambda run: flip(run / "weights/best.safetensors", 30_000, 2), "weights/best.safetensors", "is not what", True
    ),
    "no plan": (lambda run: (run / "plan.json").write_text("{}"), "plan.json", "holds no plan", False),
    "another's plan": (
        lambda run: (run / "plan.json").write_text(json.dumps(small_plan(run).to_json()).replace("20", "40")),
        "plan.json", "plan of another run", False,
    ),
    "settings": (
        _edit("config.yaml", lambda t: t.replace("lr: 0.1", "lr: 0.2", 1)), "config.yaml", "optim.lr 0.2 (was 0.1)",
        False,
    ),
    "width": (
        _edit("config.yaml", lambda t: t.replace("width: 2", "width: 4")), "config.yaml", "model.width 4 (was 2)",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_what_is_damaged_is_said_and_whether_it_can_be_resumed(what: str, run: Path) -> None:
    inflict, where, says, can = FOUND[what]
    inflict(run)
    assert any(finding.where.startswith(where) and says in finding.what for finding in _bad(run)), verify(run).findings
    assert verify(run).can_resume is can


def test_what_a_crash_leaves_is_no_damage(run: Path) -> None:
    with open(run / "steps.csv", "a") as file:
        file.write("8,3,0.1,2.3\n9,3,0.")
    (run / "checkpoints/.aside-step-00000008").mkdir()
    assert _bad(run) == []
    notes = [finding.what for finding in verify(run).findings if finding.where == "steps.csv"]
    assert notes == ["7 rows up to the checkpoint, 1 after it, the last line was cut off"]


def test_a_plan_of_its_own(run: Path) -> None:
    (run / "plan.json").write_text(json.dumps(small_plan(run).to_json()))
    assert any("1 smaller plan in reserve" in finding.what for finding in verify(run).findings)


def test_a_writer_is_seen(run: Path) -> None:
    if not Path("/proc/locks").exists():
        pytest.skip("who holds a lock is known on Linux only")
    with FileLock(run / "run.lock"):
        held = [finding for finding in verify(run).findings if finding.where == "run.lock"]
    free = [finding for finding in verify(run).findings if finding.where == "run.lock"]
    assert held[0].status == "note"
    assert "writes this run now" in held[0].what
    assert free[0].status == "ok"


@pytest.mark.parametrize("how", ["header", "size", "line", "gone"])
def test_gradient_norms_never_stop_a_resume(how: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "gradients.csv"
    if how == "header":
        flip(file, 3, 1)
    elif how == "size":
        os.truncate(file, 5 << 30)
    elif how == "line":
        file.write_text(file.read_text().replace("\n2,", "\n?,"))
    else:
        file.unlink()
    found = verify(run)
    assert found.can_resume
    assert [one.status for one in found.findings if one.where == "gradients.csv"] == ["note"]
    heard = Heard()
    resume_training(run, recorded_settings(run).replace({"train.max_steps": 8}, "test"), heard)
    said = [text for text in heard.warnings if "gradients.csv" in text]
    assert len(said) == (0 if how == "gone" else 1), heard.warnings
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event.get("what") == "gradient norms lost"] == said
    assert (run / "damaged-gradients.csv").exists() == (how != "gone")
    assert all(one.status == "ok" for one in verify(run).findings if one.where == "gradients.csv")
    assert [row.step for row in read_run(run).gradients.rows][-1] == 8


def test_a_file_of_the_same_number_on_another_disk_is_another_file(run: Path, tmp_path: Path) -> None:
    if not Path("/proc/locks").exists():
        pytest.skip("who holds a lock is known on Linux only")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with tiny_disk(tmp_path / "a", 1 << 20) as ours, tiny_disk(tmp_path / "b", 1 << 20) as other:
        (ours / "run.lock").touch()
        (other / "some.lock").touch()
        assert (ours / "run.lock").stat().st_ino == (other / "some.lock").stat().st_ino
        for name in ("config.yaml", "checkpoints"):
            shutil.copytree(run / name, ours / name) if name == "checkpoints" else shutil.copy(run / name, ours)
        with FileLock(other / "some.lock"):
            (found,) = [finding for finding in verify(ours).findings if finding.where == "run.lock"]
        assert found.status == "ok"
        with FileLock(ours / "run.lock"):
            (found,) = [finding for finding in verify(ours).findings if finding.where == "run.lock"]
        assert found.status == "note"


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_a_name_that_is_no_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown without what a terminal would obey, and no command fails on it."""
    named = run.with_name(os.fsdecode(b"r\xff\x1b[31m\nx"))
    run.rename(named)
    shown = _command(capsys, str(named))[1]
    assert "r??[31m?x can be resumed exactly" in shown
    result = write_report([named])
    assert "r?" in result.markdown.read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as leaving:
        main(["fork", str(named), "--at", "1", "--set", "optim.lr=0.05", "--dry-run"])
    captured = capsys.readouterr()
    assert leaving.value.code == 0, captured.err
    assert all(line.isprintable() for line in [*captured.out.splitlines(), *captured.err.splitlines()])


def test_a_field_that_this_version_does_not_know(run: Path) -> None:
    """Of a later one, or damage: a resume could not carry it on, and verify says so."""
    newest = checkpoints.checkpoint_folders(run / "checkpoints")[0]
    state = json.loads((newest / "state.json").read_text())
    state["run"]["momentum_of_tomorrow"] = 1
    (newest / "state.json").write_text(json.dumps(state))
    rehash(newest)
    assert any("does not know" in finding.what for finding in _bad(run))
    assert verify(run).resumes_from == "step-00000006"
    heard = Heard()
    resume_training(run, observer=heard)
    assert any("step-00000006" in text for text in heard.notes)


@pytest.mark.parametrize("name", ["gradients.csv", "steps.csv"])
def test_rows_too_many_for_a_report_are_left_out_of_it_and_nothing_else(name: str, run: Path) -> None:
    os.truncate(run / name, TABLE_LIMIT_BYTES + 1)
    found = read_run(run)
    assert any(name in note and "left out" in note for note in found.notes)
    assert len(found.epochs) == 2
    assert verify(run).can_resume
    resume_training(run, recorded_settings(run).replace({"train.max_steps": 8}, "test"))
    assert read_run(run).steps[-1].step == 8
