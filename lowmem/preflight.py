"""Before the first step: really write, read back and compare one of each output, so that no run fails at hour 13."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowmem.errors import CorruptCheckpoint, DiskError, PreflightError
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs import columns
from lowmem.runs.atomic import append_lines, write_bytes_atomic
from lowmem.runs.space import most_checkpoints, run_bytes
from lowmem.runs.store import RunFolder, csv_line
from lowmem.train.loop import Trainer
from lowmem.train.state import cpu_tensors
from lowmem.units import format_size


def preflight(trainer: Trainer, folder: RunFolder) -> None:
    """Tries every output in a folder of its own inside the run, and removes it.

    Raises PreflightError if anything cannot be written or does not read back, or if the disk has no room for the
    checkpoints the run will keep.
    """
    trial = folder.path / ".preflight"
    try:
        trial.mkdir()
        saved = _try_checkpoint(trainer, trial)
        _try_weights(trainer, trial)
        _try_rows(trial)
        _try_plot(trial)
        _check_space(trainer, folder.path, sum(file.stat().st_size for file in saved.iterdir()))
    except OSError as error:
        raise PreflightError(
            f"{folder.path} cannot take the run's outputs ({error.strerror or error}): choose another folder with --out"
        ) from None
    except (CorruptCheckpoint, DiskError) as error:
        raise PreflightError(f"a trial checkpoint failed: {error}: choose another folder with --out") from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _try_checkpoint(trainer: Trainer, trial: Path) -> Path:
    import torch

    written = trainer.checkpoint()
    path = checkpoints.save(trial / "checkpoints", written, keep=trainer.config.checkpoint.keep)
    back = checkpoints.load(path)
    same = all(torch.equal(back.model[name], tensor) for name, tensor in written.model.items())
    if not same or back.state != written.state:
        raise PreflightError(f"a checkpoint written under {trial.parent} reads back differently: check the disk")
    return path


def _try_weights(trainer: Trainer, trial: Path) -> None:
    from safetensors.torch import load, save

    tensors = cpu_tensors(trainer.model)
    file = trial / "weights.safetensors"
    write_bytes_atomic(file, save(tensors))
    if load(file.read_bytes()).keys() != tensors.keys():
        raise PreflightError(f"weights written under {trial.parent} read back differently: check the disk")


def _try_rows(trial: Path) -> None:
    line = csv_line(columns.METRICS, dict.fromkeys(columns.METRICS, 0.1))
    file = trial / "rows.csv"
    append_lines(file, [line])
    append_lines(file, [line])
    if file.read_text(encoding="utf-8") != f"{line}\n{line}\n":
        raise PreflightError(f"rows appended under {trial.parent} read back differently: check the disk")


def _try_plot(trial: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0, 1])
    file = trial / "plot.png"
    figure.savefig(file)
    if not file.read_bytes().startswith(b"\x89PNG"):
        raise PreflightError(f"a plot written under {trial.parent} is no PNG: check matplotlib")


def _check_space(trainer: Trainer, path: Path, checkpoint_bytes: int) -> None:
    parameters = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    kept = trainer.config.checkpoint
    most = most_checkpoints(keep=kept.keep, keep_every=kept.keep_every, epochs=trainer.config.train.epochs)
    needed = run_bytes(checkpoint_bytes=checkpoint_bytes, parameter_bytes=parameters, checkpoints=most)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise PreflightError(
            f"the run needs {format_size(needed)} on disk ({most} checkpoints and the weights), {path} has "
            f"{format_size(free)} free: free some space or choose another folder with --out"
        )
