"""A run's last words: how it ended, what came of it and where that is, and the command that comes next."""

from __future__ import annotations

from lowmem.core.errors import LowmemError
from lowmem.core.units import counted, format_duration
from lowmem.data import Dataset
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.view import NEXT_COMMANDS, RunView
from lowmem.train.loop import Outcome, Trainer
from lowmem.train.watchers import HOURS, MAX_STEPS, PATIENCE


def last_words(trainer: Trainer, outcome: Outcome) -> tuple[str, str]:
    """What has come of it, and what to type next, of a run that is finished or was stopped as asked. For the process
    that has the run's folder, when everything is written."""
    run, state, train, why = outcome.path, outcome.state, trainer.config.train, outcome.why
    spent = format_duration(state.elapsed_seconds)
    if not outcome.finished:
        end = train.epochs * trainer.batches.steps_per_epoch
        done = f"{spent} of training" if why == HOURS else counted(state.step, "step")
        limit = f"{HOURS} = {train.hours:g}" if why == HOURS else f"{MAX_STEPS} = {train.max_steps}"
        best = _best(state) if why == HOURS else ""
        return (
            f"stopped after {done} as asked ({limit}); {run} is saved at epoch {state.epoch + 1}, step {state.step} of "
            f"{end}{best}",
            NEXT_COMMANDS["out of time" if why == HOURS else "stopped"].format(run=run),
        )
    epochs, early = f"{counted(state.epoch, 'epoch')} in {spent}", ""
    if train.hours is not None:
        epochs += f" of {format_duration(3600 * train.hours)} ({HOURS} = {train.hours:g})"
    if why == PATIENCE and state.best is not None:
        waited = counted(state.epoch - state.best.epoch, "epoch")
        early = (
            f" early, of {counted(train.epochs, 'epoch')}: {waited} without a better error ({why} = {train.patience})"
        )
    weights = ", ".join(str(run / "weights" / f"{name}.safetensors") for name in ("best", "last"))
    return (
        f"{run} is finished{early}: {epochs}; {_errors(trainer, outcome)}weights: {weights}",
        NEXT_COMMANDS["finished early" if early else "finished"].format(run=run),
    )


def _errors(trainer: Trainer, outcome: Outcome) -> str:
    """The best and the last error, and on which pictures."""
    best, dataset = outcome.state.best, trainer.dataset
    try:
        last = RunView(outcome.path).last
    except (LowmemError, OSError):  # somebody has been at the rows: only this line lacks them
        last = None
    on = "test" if best is None else best.chosen_on
    error = None if last is None else getattr(last, f"{on}_error_pct")
    chosen = _best(outcome.state)
    head = "" if error is None else f"error on {_pictures(dataset, on)} {error:.2f} % at the end{chosen}; "
    if on == "val" and last is not None and last.test_error_pct is not None:
        head += f"on {_pictures(dataset, 'test')} {last.test_error_pct:.2f} % at the end; "
    return head


def _best(state: RunState) -> str:
    return "" if state.best is None else f", best {state.best.error_pct:.2f} % in epoch {state.best.epoch}"


def _pictures(dataset: Dataset, on: str) -> str:
    held = dataset.val if on == "val" else None
    if held is not None:
        return f"{counted(len(held), 'held-back picture')} of {dataset.name}"
    return f"the {counted(len(dataset.test), 'test picture')} of {dataset.name}"
