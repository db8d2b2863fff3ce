"""Before the first step: every output really written, read back and compared, a step and an evaluation run and undone,
so that no run fails at hour 13 for its format; and what the run will take, in time and on disk."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.config.settings import from_yaml
from lowmem.core.errors import CorruptCheckpoint, DiskError, OutOfMemory, PreflightError, UsageError
from lowmem.core.units import counted, format_duration, format_size
from lowmem.distributed.group import Group
from lowmem.lifecycle.hours import measure_step
from lowmem.lifecycle.run_identity import read_plan
from lowmem.measure.out_of_memory import Failure, release
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.atomic import write_text_atomic
from lowmem.runs.event_files import EventFiles, read_points
from lowmem.runs.rows import EPOCH_TABLE, STEP_TABLE, csv_line, gradient_line
from lowmem.runs.store import RunFolder, most_checkpoints
from lowmem.runs.view import RunView, read_run
from lowmem.step.train_step import Score
from lowmem.step.undo import Before, Undo
from lowmem.train.loop import Trainer
from lowmem.train.metrics import GradientNorms, describe_weights, disk_bytes
from lowmem.train.oom_fallback import OomFallback, memory_words
from lowmem.train.replica import weights_of

_QUICK_SECONDS = 10.0  # what takes longer is not run a second time for a better measurement
OUTPUTS = "settings, checkpoint, weights, metrics, gradients, events and report"


def preflight(trainer: Trainer, folder: RunFolder) -> float:
    """Tries a step, in all processes, and every output, in the one that writes, in a folder of its own inside the run,
    which goes again. The trainer is as before, but perhaps for a smaller plan (see `try_step`). Raises PreflightError
    if anything cannot be written or does not read back, or if the disk has no room for all of the run; OutOfMemory.
    Returns the seconds that an epoch will take, by rank 0's measurements."""
    began = time.monotonic()
    trainer.observer.phase("trying a step and an evaluation")
    tried, hours = try_step(trainer, folder), trainer.config.train.hours
    if hours is not None and trainer.state.step == 0:
        tried = replace(tried, step_seconds=measure_step(trainer, hours))
    seconds = trainer.group.lead(lambda: _try_rest(trainer, folder, tried, began), 0.0)
    return float(trainer.group.share(seconds))


def _try_rest(trainer: Trainer, folder: RunFolder, tried: StepTrial, began: float) -> float:
    trial = folder.path / ".preflight"
    trainer.observer.phase("writing every output and reading it back")
    try:
        checkpoint_bytes, saving_seconds = _try_outputs(trainer, folder, trial, tried)
        disk = _check_space(trainer, folder.path, checkpoint_bytes)
    except OSError as error:
        raise PreflightError(
            f"{folder.path} cannot take the run's outputs ({error.strerror or error}): choose another folder with --out"
        ) from None
    except (CorruptCheckpoint, DiskError, UsageError) as error:
        raise PreflightError(f"a trial output failed: {error}: choose another folder with --out") from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    seconds = time.monotonic() - began
    note = trainer.observer.note
    note(f"preflight: {OUTPUTS} written and read back, a step and an evaluation run and undone, in {seconds:.1f} s")
    note(_time_line(trainer, tried, saving_seconds))
    note(disk)
    if not math.isfinite(tried.step.loss):
        trainer.observer.warning(f"the loss of the trial step is {tried.step.loss}: this run would diverge at once")
    step_seconds, evaluation_seconds = _costs(trainer, tried)
    return trainer.batches.steps_per_epoch * step_seconds + evaluation_seconds + saving_seconds


# -- outputs -----------------------------------------------------------------------------------------------------------


def _try_outputs(trainer: Trainer, folder: RunFolder, trial: Path, tried: StepTrial) -> tuple[int, float]:
    """All of them by the code that will write them and that will read them, in a run folder like the real one. Returns
    the bytes of a checkpoint, and the seconds that saving takes at the end of an epoch."""
    settings = folder.path / "config.yaml"
    _same(from_yaml(settings).config == trainer.config, settings)
    with RunFolder.create(trial, settings.read_text(encoding="utf-8"), {}) as run:
        began = time.perf_counter()
        checkpoint_bytes = _try_checkpoint(trainer, run)
        saving_seconds = time.perf_counter() - began
        if trainer.plan is not None:
            run.write_plan(trainer.plan.to_json())
            back = read_plan(run.path, trainer.config)
            _same(back is not None and back.to_json() == trainer.plan.to_json(), run.path / "plan.json")
        _try_rows(trainer, run, tried)
        if trainer.config.train.tensorboard:
            with closing(EventFiles(run.path)) as files:
                files.update()
            _same({step for _, step, _ in read_points(files.folder)} == {1, 2}, files.folder)
        _try_report(run)
    return checkpoint_bytes, saving_seconds


def _try_checkpoint(trainer: Trainer, run: RunFolder) -> int:
    """And the weights of the best epoch: they carry all that others do, and are written the same way. Returns the
    checkpoint's bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    written = trainer.checkpoint()
    path = checkpoints.save(run.checkpoints, written, keep=trainer.config.checkpoint.keep)
    back = checkpoints.load(path)
    for read, given in ((back.model, written.model), (back.optimizer, written.optimizer)):
        _same(tensor_bits(read) == tensor_bits(given), path)
    _same(json.dumps(back.state) == json.dumps(written.state), path / "state.json")
    at = {"epoch": 1, "step": 2, "error_pct": 12.5, "error_on": "test", "chosen_on": "test"}
    info = describe_weights(trainer.config, trainer.dataset, **at)
    exported = weights_of(written)
    run.save_weights("best", exported, info)
    weights = run.path / "weights" / "best.safetensors"
    _same(RunView(run.path).best == info, weights)
    try:
        _same(tensor_bits(load(weights.read_bytes())) == tensor_bits(exported), weights)
    except SafetensorError:
        _same(False, weights)
    return sum(file.stat().st_size for file in path.iterdir())


def _try_rows(trainer: Trainer, run: RunFolder, tried: StepTrial) -> None:
    """metrics.csv, steps.csv, gradients.csv and events.jsonl by their readers; of a loss that is no number, one."""
    lr, used_bytes = trainer.config.optim.lr, trainer.meter.read().device_used_bytes
    train_loss, test_loss = (one.loss if math.isfinite(one.loss) else 1.0 for one in (tried.step, tried.evaluation))
    row: dict[str, Any] = {"epoch": 1, "step": 2, "lr": lr, "elapsed_seconds": tried.step_seconds}
    row |= {"train_loss": train_loss, "train_error_pct": tried.step.error_pct}
    row |= {"test_loss": test_loss, "test_error_pct": tried.evaluation.error_pct}
    row |= {"images_per_second": tried.step.count / tried.step_seconds, "device_used_bytes": used_bytes}
    steps = [{"step": at, "epoch": 1, "lr": lr, "loss": train_loss} for at in (1, 2)]
    told = {"what": "größer", "seconds": tried.step_seconds, "unknown": None, "values": [1, 2.5, True]}
    run.append_metrics(row)
    run.append_steps(steps)
    run.begin_gradients(tried.layers, step=0)
    run.append_gradients([(1, 1, tried.gradient_norms)])
    run.event("preflight", **told)
    back = read_run(run.path)
    line, lines = csv_line(EPOCH_TABLE.names, row), [csv_line(STEP_TABLE.names, step) for step in steps]
    _same([csv_line(EPOCH_TABLE.names, vars(read)) for read in back.epochs] == [line], run.metrics_file)
    _same([csv_line(STEP_TABLE.names, vars(read)) for read in back.steps] == lines, run.steps_file)
    norms = (back.gradients.layers, [gradient_line(read.step, read.epoch, read.norms) for read in back.gradients.rows])
    _same(norms == (tried.layers, [gradient_line(1, 1, tried.gradient_norms)]), run.gradients_file)
    _same([(event.kind, dict(event.detail)) for event in back.events] == [("preflight", told)], run.events_file)


def _try_report(run: RunFolder) -> None:
    """That the report can be written: its folder takes a file, its library is there, and (see `_try_rows`) its rows
    read back. It is not drawn: matplotlib takes two seconds of every start, and a figure that fails costs nothing, as
    `lowmem report` draws it from the rows whenever it is asked to."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PreflightError("the report cannot be drawn (no matplotlib): install what is missing with pip")
    path = run.path / "report" / "report.md"
    path.parent.mkdir()
    write_text_atomic(path, f"{run.path.name}\n")
    _same(path.read_text(encoding="utf-8") == f"{run.path.name}\n", path)


def _same(same: bool, path: Path) -> None:
    if not same:
        raise PreflightError(f"{path} reads back differently from what was written: check the disk")


def tensor_bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    """To be compared: the weights of a run that has diverged are not equal to themselves."""
    return {name: (tensor.shape, tensor.dtype, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


# -- a step and an evaluation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTrial:
    """Seconds and score of a step and of an evaluation batch, warmed up where that was quick, and the norm of every
    layer's gradient in that step."""

    step_seconds: float
    step: Score
    evaluation_seconds: float
    evaluation: Score
    layers: tuple[str, ...]
    gradient_norms: tuple[float, ...]


def try_step(trainer: Trainer, folder: RunFolder) -> StepTrial:
    """Runs the next step of the run and evaluates its first test pictures, and leaves the trainer as it was to the last
    bit. Unlike with a failed step (`step.undo.Undo`) the update is made here too: everything is copied first.

    Out-of-memory takes the next smaller plan, as it does later in the run; the folder's events tell it. Raises
    OutOfMemory if there is none.
    """
    before, group = Before(trainer.step), trainer.group
    fallback, undo = OomFallback(trainer, folder), Undo(trainer.step, trainer.model)
    norms = GradientNorms(trainer.model, trainer.step, every=1)
    try:
        while isinstance(done := _twice_if_quick(group, lambda: _step(trainer, undo, norms)), Failure):
            if done.final and not group.alone:
                raise _out_of_memory(trainer, done)  # the others wait for what this process does not do
            before.restore()  # even where the update had begun
            release()
            if (cause := fallback.after(replace(done, final=False))) is not None:
                fallback.record(cause)
                with group.alike():
                    raise _out_of_memory(trainer, cause)
        scored = _twice_if_quick(Group(), lambda: fallback.evaluated(lambda size: _score(trainer, size)))
        if isinstance(scored, Failure):
            raise _out_of_memory(trainer, scored)
    finally:
        before.restore()
    measured = norms.take()
    assert measured is not None
    return StepTrial(done[0], done[1], scored[0], scored[1], norms.names, tuple(measured.tolist()))


def _step(trainer: Trainer, undo: Undo, norms: GradientNorms) -> Score | Failure:
    state = trainer.state

    def work() -> tuple[Tensor, int]:
        # A checkpoint may be of the end of an epoch whose evaluation was still to come.
        at = min(state.step_in_epoch, trainer.batches.steps_per_epoch - 1)
        images, labels, size, share = trainer.next_batch(state.epoch, at)
        return trainer.step(images, labels, trainer.lr(state.step), norms.measure, size, share), size

    done = undo.attempt(work)
    if isinstance(done, Failure):
        return done
    loss, wrong = done[0].tolist()  # waits for the device: the time is that of the work, not of its launch
    return Score(loss, wrong, done[1])


def _score(trainer: Trainer, size: int) -> Score:
    test = trainer.dataset.test
    score = trainer.evaluate(test.take(torch.arange(min(size, len(test))).numpy()), size)
    assert score is not None  # nobody asks it to stop
    return score


def _twice_if_quick(group: Group, work: Callable[[], Any]) -> Any:
    """(seconds, result) of the second call if the first was quick (it has what libraries make once), else of the first;
    or the Failure of either. `group`: the processes that do it together."""
    for _ in range(2):
        began = time.perf_counter()
        result = work()
        if isinstance(result, Failure):
            return result
        seconds = time.perf_counter() - began
        if group.most([int(seconds > _QUICK_SECONDS)])[0]:
            break
    return seconds, result


def _out_of_memory(trainer: Trainer, failure: Failure) -> OutOfMemory:
    memory = memory_words(trainer.meter.read())
    less = "less to fit into (--vram, --tensors)" if trainer.plan else "a plan with --vram, like --vram 4G"
    return OutOfMemory(
        f"{failure.words} ({failure.message}) in the trial before the first step, and no smaller plan is left{memory}; "
        f"nothing was started: free what others use, or give the run {less}"
    )


# -- what the run will take --------------------------------------------------------------------------------------------


def _costs(trainer: Trainer, tried: StepTrial) -> tuple[float, float]:
    """Seconds of a step and of an epoch's evaluation."""
    dataset = trainer.dataset
    # The last step of an epoch has fewer pictures: steps are weighed by them.
    step_seconds = tried.step_seconds * len(dataset.train) / (trainer.batches.steps_per_epoch * tried.step.count)
    scored = len(dataset.test) + (len(dataset.val) if dataset.val is not None else 0)
    return step_seconds, tried.evaluation_seconds * scored / tried.evaluation.count / trainer.group.size


def _time_line(trainer: Trainer, tried: StepTrial, saving_seconds: float) -> str:
    config, state = trainer.config.train, trainer.state
    per_epoch = trainer.batches.steps_per_epoch
    to_the_end = (config.epochs - state.epoch) * per_epoch - state.step_in_epoch
    steps = to_the_end if config.max_steps is None else min(to_the_end, max(0, config.max_steps - state.step))
    epochs = (state.step_in_epoch + steps) // per_epoch
    step_seconds, evaluation_seconds = _costs(trainer, tried)
    total = steps * step_seconds + epochs * (evaluation_seconds + saving_seconds)
    whole = f"{counted(epochs, 'epoch')} of {counted(per_epoch, 'step')}"
    left = whole if steps == to_the_end else f"{counted(steps, 'step')} (train.max_steps)"
    return (
        f"time: about {format_duration(total)} for {left}: {tried.step_seconds:.3f} s a step of {tried.step.count} "
        f"pictures, {evaluation_seconds:.1f} s for evaluation and {saving_seconds:.1f} s for saving an epoch"
    )


def _check_space(trainer: Trainer, path: Path, checkpoint_bytes: int) -> str:
    """The line on disk. Raises PreflightError if there is too little."""
    needed = disk_bytes(trainer.config, trainer.model, trainer.batches.steps_per_epoch, checkpoint_bytes)
    free = shutil.disk_usage(path).free
    most = f"{counted(most_checkpoints(trainer.config), 'checkpoint')} of {format_size(checkpoint_bytes)}"
    takes = f"{format_size(needed)} at the most ({most}"
    if free < needed:
        raise PreflightError(
            f"the run needs {takes} and the weights), {path} has {format_size(free)} free: free some space, keep fewer "
            "checkpoints, or choose another folder with --out"
        )
    return f"disk: {takes}, weights, rows); {format_size(free)} free in {path}"
