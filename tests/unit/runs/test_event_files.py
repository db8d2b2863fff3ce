"""Event files hold what the tables hold, by TensorBoard's own reader, however often the tables were cut back."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.config.settings import gather, to_yaml
from lowmem.core.errors import PreflightError
from lowmem.core.units import MIB
from lowmem.runs.event_files import EventFiles, read_points, require_tensorboard
from lowmem.runs.store import RunFolder
from lowmem.runs.view import read_run

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
LAYERS = ("conv1.weight", "linear.weight")


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), as TensorBoard loads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def same(curves: dict[str, list[tuple[int, float]]], run: Path) -> bool:
    """Whether the curves are those of the run's tables: every point once, in the order of steps."""
    history = read_run(run)
    wanted: dict[str, list[tuple[int, float]]] = {
        "loss/step": [(row.step, row.loss) for row in history.steps if row.loss is not None],
        "lr": [(row.step, row.lr) for row in history.steps if row.lr is not None],
    }
    columns = {
        "epoch": "epoch", "loss/train": "train_loss", "loss/test": "test_loss", "loss/val": "val_loss",
        "error_pct/train": "train_error_pct", "error_pct/test": "test_error_pct", "error_pct/val": "val_error_pct",
        "images_per_second": "images_per_second", "memory_mib/peak_allocated": "peak_allocated_bytes",
        "memory_mib/peak_reserved": "peak_reserved_bytes", "memory_mib/device_used": "device_used_bytes",
    }  # fmt: skip
    for tag, column in columns.items():
        unit = MIB if column.endswith("_bytes") else 1
        known = [(row.step, getattr(row, column)) for row in history.epochs]
        wanted[tag] = [(step, value / unit) for step, value in known if value is not None]
    for place, layer in enumerate(history.gradients.layers):
        tag = f"gradient_norm/{layer.removesuffix('.weight')}"
        wanted[tag] = [(row.step, row.norms[place]) for row in history.gradients.rows]
    wanted = {tag: points for tag, points in wanted.items() if points}
    assert curves.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in curves[tag]] == [step for step, _ in points], tag
        assert [value for _, value in curves[tag]] == pytest.approx([v for _, v in points], rel=1e-6, nan_ok=True), tag
    return True


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run", to_yaml(gather(sets=["train.epochs=9"])), {})
    run.event("start")
    run.begin_gradients(LAYERS, step=0)
    return run


def train(folder: RunFolder, first: int, last: int, *, offset: float = 0.0) -> None:
    """Rows of steps first … last: each step, gradients every second, an epoch every fourth."""
    for step in range(first, last + 1):
        epoch = (step - 1) // 4 + 1
        folder.append_steps([{"step": step, "epoch": epoch, "lr": 0.1, "loss": 3 / step + offset}])
        if step % 2 == 0:
            folder.append_gradients([(step, epoch, (step + offset, 2.0 * step))])
        if step % 4 == 0:
            row = {"epoch": epoch, "step": step, "train_loss": 2 / step + offset, "test_error_pct": 50.0 + offset}
            folder.append_metrics({**row, "elapsed_seconds": 1.5 * step, "peak_allocated_bytes": 7 * MIB + step})


def test_a_whole_run(folder: RunFolder, tmp_path: Path) -> None:
    train(folder, 1, 10)
    files = EventFiles(folder.path, tmp_path / "elsewhere")
    files.update()
    files.close()
    assert same(shown(tmp_path / "elsewhere"), folder.path)
    assert not (folder.path / "tensorboard").exists()


def test_follows_a_run_and_its_cut_backs(folder: RunFolder) -> None:
    files = EventFiles(folder.path)
    board = folder.path / "tensorboard"
    files.update()
    assert shown(board) == {}
    written = 0
    for first, last in ((1, 3), (4, 4), (5, 11)):
        train(folder, first, last)
        files.update()
        assert same(shown(board), folder.path)
        size = sum(path.stat().st_size for path in board.iterdir())
        files.update()
        assert size == sum(path.stat().st_size for path in board.iterdir()) > written  # nothing came, nothing written
        written = size
    # Back in the middle of an epoch, over the end of one; what is repeated comes out otherwise.
    folder.cut_back(epoch=1, step=6)
    folder.begin_gradients(LAYERS, step=6)
    files.update()
    assert same(shown(board), folder.path)
    train(folder, 7, 9, offset=0.25)
    files.update()
    assert same(shown(board), folder.path)
    # Cut back and grown past it again between two looks.
    folder.cut_back(epoch=1, step=5)
    folder.begin_gradients(LAYERS, step=5)
    train(folder, 6, 14, offset=0.5)
    files.update()
    assert same(shown(board), folder.path)
    assert len(list(board.iterdir())) == 1


def test_only_one_table_is_cut(folder: RunFolder) -> None:
    """What the others have from there on still holds, and must survive the session start."""
    train(folder, 1, 8)
    files = EventFiles(folder.path)
    files.update()
    folder.begin_gradients(LAYERS, step=3)
    files.update()
    assert same(shown(files.folder), folder.path)


def test_repeated_bit_for_bit(folder: RunFolder) -> None:
    """A table that was replaced by the same rows changes nothing."""
    train(folder, 1, 8)
    files = EventFiles(folder.path)
    files.update()
    before = next(files.folder.iterdir()).read_bytes()
    folder.cut_back(epoch=2, step=8)
    files.update()
    assert next(files.folder.iterdir()).read_bytes() == before


def test_the_next_process(folder: RunFolder) -> None:
    """Takes the place of the last one's file, killed in the middle of a record or not; other files are left alone."""
    train(folder, 1, 8)
    EventFiles(folder.path).update()
    board = folder.path / "tensorboard"
    first = next(board.iterdir())
    first.write_bytes(first.read_bytes()[:-5])
    (board / "notes.txt").write_text("mine", encoding="utf-8")
    folder.cut_back(epoch=1, step=5)
    folder.begin_gradients(LAYERS, step=5)
    train(folder, 6, 9, offset=1.0)
    EventFiles(folder.path).update()
    names = sorted(path.name for path in board.iterdir())
    assert first.name < names[0]
    assert names[1:] == ["notes.txt"]
    assert same(shown(board), folder.path)


def test_both_files_for_a_moment(folder: RunFolder) -> None:
    """Where the older file cannot be deleted (open in a TensorBoard on Windows), the newer one outdates it."""
    train(folder, 1, 12)
    EventFiles(folder.path).update()
    board = folder.path / "tensorboard"
    first = next(board.iterdir())
    kept = first.read_bytes()
    folder.cut_back(epoch=1, step=5)
    folder.begin_gradients(LAYERS, step=5)
    EventFiles(folder.path).update()
    first.write_bytes(kept)
    assert len(list(board.iterdir())) == 2
    assert same(shown(board), folder.path)
    assert {step for _, step, _ in read_points(board)} == {1, 2, 3, 4, 5}


def test_a_diverged_run(folder: RunFolder) -> None:
    train(folder, 1, 2)
    folder.append_steps(
        [{"step": 3, "epoch": 1, "lr": 0.1, "loss": math.nan}, {"step": 4, "epoch": 1, "loss": math.inf}]
    )
    files = EventFiles(folder.path)
    files.update()
    assert same(shown(files.folder), folder.path)
    folder.cut_back(epoch=0, step=4)
    before = next(files.folder.iterdir()).stat().st_size
    files.update()
    assert next(files.folder.iterdir()).stat().st_size == before  # NaN is itself


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk(folder: RunFolder) -> None:
    train(folder, 1, 4)
    files = EventFiles(folder.path)
    files.update()
    assert files._file is not None
    files._file.close()
    files._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    train(folder, 5, 6)
    with pytest.raises(OSError, match="No space"):
        files.update()
    train(folder, 7, 8)
    files.update()
    assert same(shown(files.folder), folder.path)
    assert len(list(files.folder.iterdir())) == 1


def test_times_are_the_runs_own(folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(folder, 1, 10)
    files = EventFiles(folder.path)
    files.update()
    accumulator = EventAccumulator(str(files.folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    times = [event.wall_time for event in accumulator.Scalars("loss/step")]
    assert [time - times[0] for time in times] == pytest.approx([1.5 * n for n in range(10)], abs=1e-3)


def test_rows_of_a_stranger(folder: RunFolder) -> None:
    folder.steps_file.write_bytes(
        b"step,epoch,lr,loss\n1,1,0.1,1e300\n-3,1,0.1,2\n2,1\nx,1,0.1,2\ninf,1,1,1\n3,1,,0.5\n"
    )
    files = EventFiles(folder.path)
    files.update()
    points = read_points(files.folder)
    assert ("loss/step", 3, 0.5) in points
    assert {step for _, step, _ in points} == {1, 3}


def test_without_the_package(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    for ask in (require_tensorboard, lambda: EventFiles(folder.path)):
        with pytest.raises(PreflightError, match=r'pip install "lowmem\[tensorboard\]"') as found:
            ask()
        assert found.value.exit_code == 3
        assert "\n" not in str(found.value)


def test_needs_no_torch(folder: RunFolder) -> None:
    train(folder, 1, 4)
    probe = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lowmem.runs.event_files import EventFiles\n"
        "assert 'tensorboard' not in sys.modules\n"
        f"EventFiles(Path({str(folder.path)!r})).update()\n"
        "heavy = {'torch', 'tensorflow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert same(shown(folder.path / "tensorboard"), folder.path)
