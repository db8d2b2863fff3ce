"""A damaged checkpoint is never trained on: the newest that verifies is taken, and what was skipped is said; or the
command leaves with code 7 and a line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.config.settings import from_yaml
from lowmem.core.errors import CorruptCheckpoint, ExitCode, LowmemError, UsageError
from lowmem.lifecycle import resume_training
from lowmem.lifecycle.run_identity import belongs_to
from lowmem.runs import checkpoint as checkpoints
from tests.conftest import assert_same_tensors, environment, exact_rows
from tests.faults.damage import FILES, Damage, flip, flips, generations, judge, of_files, of_folders
from tests.tiny import Heard, copy_run, make_run

NOBODY = 65534
FOREIGN = "optim.lr=0.05"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("foreign") / "run", FOREIGN)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return copy_run(made, tmp_path / "run")


def _newest(run: Path) -> Path:
    return checkpoints.checkpoint_folders(run / "checkpoints")[0]


def _resume_ends_as_it_was(run: Path, made: Path) -> Heard:
    """Resumes a copy up to the step that the original was stopped at: wherever it went on, the end must be the same."""
    heard = Heard()
    resume_training(run, None, heard)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(_newest(run) / name, _newest(made) / name)
    assert _newest(run).name == _newest(made).name
    return heard


def test_every_damage_of_the_newest_is_noticed(made: Path, foreign: Path, tmp_path: Path) -> None:
    good, accept = generations(made), belongs_to(from_yaml(made / "config.yaml").config)
    damages = [*of_files(_newest(foreign)), *of_folders(_newest(foreign))]
    wrong = {}
    for damage in damages:
        copy = copy_run(made, tmp_path / "run")
        damage.inflict(_newest(copy))
        if (verdict := judge(copy, accept, good, at_most=6)) is not None:
            wrong[damage.name] = verdict
    assert len(damages) > 60
    assert not wrong


def test_no_flipped_bit_is_trained_on(made: Path, tmp_path: Path) -> None:
    good, run = generations(made), copy_run(made, tmp_path / "run")
    accept = belongs_to(from_yaml(made / "config.yaml").config)
    newest = _newest(run)
    for name, byte, bit in flips(run, 520, seed=5):
        flip(newest / name, byte, bit)
        assert judge(run, accept, good, at_most=6) is None, (name, byte, bit)
        flip(newest / name, byte, bit)
    assert judge(run, accept, good, at_most=7) is None


def test_all_generations_damaged_is_code_7_and_says_each(run: Path) -> None:
    before = _state_of(run)
    damaged = checkpoints.checkpoint_folders(run / "checkpoints")
    for path, name in zip(damaged, FILES, strict=True):
        flip(path / name, 40, 3)
    before = _state_of(run)
    with pytest.raises(CorruptCheckpoint, match="no usable checkpoint") as caught:
        resume_training(run, None, Heard())
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    assert all(path.name in str(caught.value) for path in damaged)
    assert _state_of(run) == before, "nothing may be changed by a resume that does not take place"


def _state_of(run: Path) -> dict[str, bytes]:
    left_out = {"run.lock", "run.owner.json"}
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in left_out}


@pytest.mark.parametrize("name", FILES)
def test_a_resume_from_the_one_before_ends_in_the_same_bits(name: str, run: Path, made: Path) -> None:
    flip(_newest(run) / name, 100, 5)
    heard = _resume_ends_as_it_was(run, made)
    assert any("skipped a damaged checkpoint" in said and "step-00000007" in said for said in heard.warnings)
    assert any("from step-00000006" in note for note in heard.notes)
    assert exact_rows(run) == exact_rows(made)
    assert (run / "steps.csv").read_text() == (made / "steps.csv").read_text()
    assert (run / "checkpoints/damaged-step-00000007").is_dir()


def test_two_names_of_one_step_are_one(run: Path, made: Path) -> None:
    newest = _newest(run)
    shutil.copytree(newest, newest.with_name("step-000000007"))  # one zero too many
    shutil.copytree(newest, newest.with_name("step-00000007.old"))
    flip(newest / "model.safetensors", 9000, 1)
    heard = _resume_ends_as_it_was(run, made)
    assert any("from step-00000007.old" in note for note in heard.notes)


@contextmanager
def _bound_by_permissions(run: Path) -> Iterator[Path]:
    """The run as a user has it whom permissions bind: root becomes nobody, in a folder that nobody may enter."""
    if os.getuid() != 0:
        yield run
        return
    with tempfile.TemporaryDirectory() as name:
        copy = copy_run(run, Path(name) / "run")
        for path in (Path(name), copy, *copy.rglob("*")):
            os.chown(path, NOBODY, -1)
        checkpoints.load_newest(copy / "checkpoints")  # what it imports, root alone may be able to read
        os.seteuid(NOBODY)
        try:
            yield copy
        finally:
            os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="permissions are others there")
def test_what_cannot_be_read_is_skipped_or_said(run: Path) -> None:
    with _bound_by_permissions(run) as copy:
        newest, second, third = checkpoints.checkpoint_folders(copy / "checkpoints")[:3]
        (newest / "state.json").chmod(0)
        second.chmod(0)
        _, where, skipped = checkpoints.load_newest(copy / "checkpoints")
        assert (where, set(skipped)) == (third, {newest, second})
        checkpoints.set_aside(skipped)
        assert checkpoints.checkpoint_folders(copy / "checkpoints")[0] == third
        for path in (newest, second):
            assert path.with_name(f"unreadable-{path.name}").is_dir(), "it may be whole"
        (copy / "checkpoints").chmod(0)
        with pytest.raises(CorruptCheckpoint, match="cannot be read"):
            checkpoints.load_newest(copy / "checkpoints")
        (copy / "checkpoints").chmod(0o755)


# -- the other files of a run --------------------------------------------------------------------------------------


def _edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


REFUSED = {
    "config emptied": (_edit("config.yaml", lambda data: b""), 2, "lacks seed"),
    "config cut off": (_edit("config.yaml", lambda data: data[: data.index(b"optim:")]), 2, "was cut off"),
    "config of another rate": (_edit("config.yaml", lambda d: d.replace(b"lr: 0.1", b"lr: 0.3", 1)), 2, "lr is 0.3"),
    "config of another width": (_edit("config.yaml", lambda d: d.replace(b"width: 2", b"width: 3")), 2, "width is 3"),
    "config no YAML": (_edit("config.yaml", lambda data: data.replace(b": ", b": [", 1)), 2, "YAML"),
    "config zeroed": (_edit("config.yaml", lambda data: bytes(len(data))), 2, "YAML"),
    "config deleted": (lambda run: (run / "config.yaml").unlink(), 2, "no run folder"),
    "checkpoints deleted": (lambda run: shutil.rmtree(run / "checkpoints"), 7, "no usable checkpoint"),
    "header of metrics flipped": (_edit("metrics.csv", lambda data: b"f" + data[1:]), 7, "other columns"),
    "header of steps lost": (_edit("steps.csv", lambda data: data.partition(b"\n")[2]), 7, "other columns"),
    "a plan of nothing": (lambda run: (run / "plan.json").write_text("{}"), 7, "holds no plan"),
    "a plan cut off": (lambda run: (run / "plan.json").write_text('{"format": 1, "bat'), 7, "holds no plan"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_run_whose_own_files_are_damaged_is_refused(what: str, run: Path) -> None:
    inflict, code, says = REFUSED[what]
    inflict(run)
    with pytest.raises(LowmemError, match=says) as caught:
        resume_training(run, None, Heard())
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


MENDED: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a row garbled": (_edit("steps.csv", lambda data: data.replace(b"\n2,", b"\n?,")), "1 damaged lines"),
    "rows doubled": (_edit("steps.csv", lambda data: data + data.partition(b"\n")[2]), "damaged lines"),
    "the last row cut off": (_edit("steps.csv", lambda data: data[:-3]), None),
    "metrics deleted": (lambda run: (run / "metrics.csv").unlink(), "2 of 2 rows are missing"),
    "an epoch beyond": (_edit("metrics.csv", lambda data: data.replace(b"\n1,", b"\n9,")), "1 of 2 rows are missing"),
    "steps deleted": (lambda run: (run / "steps.csv").unlink(), None),
    "a million in one line": (_edit("steps.csv", lambda data: data + b"9" * 10**6 + b"\n"), "1 damaged lines"),
    "weights emptied": (_edit("weights/last.safetensors", lambda data: b""), None),
    "weights deleted": (lambda run: shutil.rmtree(run / "weights"), None),
    "environment no JSON": (_edit("env.json", lambda data: data[1:]), None),
}


@pytest.mark.parametrize("what", MENDED)
def test_damage_that_does_not_touch_the_training_is_said_and_trained_past(what: str, run: Path, made: Path) -> None:
    inflict, says = MENDED[what]
    inflict(run)
    (run / "weights").mkdir(exist_ok=True)
    heard = _resume_ends_as_it_was(run, made)
    if says is None:
        assert heard.warnings == []
    else:
        assert any(says in warning for warning in heard.warnings)


def test_an_event_after_a_cut_off_line_has_a_line_of_its_own(run: Path) -> None:
    events = run / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-5])
    resume_training(run, None, Heard())
    assert sum(line.startswith('{"time"') for line in events.read_text().splitlines()) == len(
        events.read_text().splitlines()
    )


def test_a_lost_plan_is_missed(run: Path) -> None:
    _edit("config.yaml", lambda data: data.replace(b"vram: null", b"vram: 200000000"))(run)
    with pytest.raises(CorruptCheckpoint, match=r"plan\.json is missing"):
        resume_training(run, None, Heard())


def test_as_a_process(run: Path) -> None:
    flip(_newest(run) / "manifest.json", 30, 2)
    command = [sys.executable, "-m", "lowmem", "resume", str(run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "skipped a damaged checkpoint" in done.stderr
    assert "from step-00000006" in done.stdout


def test_as_a_command_that_cannot(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoints.checkpoint_folders(run / "checkpoints"):
        flip(path / "manifest.json", 30, 2)
    with pytest.raises(SystemExit) as leaving:
        main(["resume", str(run)])
    err = capsys.readouterr().err
    assert leaving.value.code == 7
    assert len(err.strip().splitlines()) == 1
    assert "no usable checkpoint" in err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        resume_training(tmp_path, None, Heard())


def test_the_damages_are_damages(made: Path, foreign: Path, tmp_path: Path) -> None:
    """Each leaves the newest checkpoint different from what it was: a trial of nothing would pass."""

    def content(path: Path) -> object:
        return (
            {p.name: (p.is_symlink(), p.is_file() and p.read_bytes()) for p in path.glob("*")} if path.is_dir() else 0
        )

    intact = content(_newest(made))
    damage: Damage
    for damage in [*of_files(_newest(foreign)), *of_folders(_newest(foreign))]:
        copy = copy_run(made, tmp_path / "run")
        newest = _newest(copy)
        damage.inflict(newest)
        assert newest.is_symlink() or content(newest) != intact, damage.name
