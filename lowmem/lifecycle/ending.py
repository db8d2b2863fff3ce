"""A run's last words: how it ended, what came of it and where that is, and the command that comes next."""

from __future__ import annotations

from lowmem.core.errors import LowmemError
from lowmem.core.units import counted, format_duration
from lowmem.data import Dataset
from lowmem.runs.view import NEXT_COMMANDS, RunView
from lowmem.train.loop import Outcome, Trainer


def last_words(trainer: Trainer, outcome: Outcome) -> tuple[str, str]:
    """What has come of it, and what to type next, of a run that is finished or that `train.max_steps` has stopped.
    For the process that has the run's folder, when everything is written."""
    run, state, train = outcome.path, outcome.state, trainer.config.train
    if not outcome.finished:
        end = train.epochs * trainer.batches.steps_per_epoch
        place = f"saved at epoch {state.epoch + 1}, step {state.step} of {end}"
        return (
            f"stopped after {counted(state.step, 'step')} as asked (train.max_steps = {train.max_steps}); "
            f"{run} is {place}",
            NEXT_COMMANDS["stopped"].format(run=run),
        )
    epochs = f"{counted(state.epoch, 'epoch')} in {format_duration(state.elapsed_seconds)}"
    weights = ", ".join(str(run / "weights" / f"{name}.safetensors") for name in ("best", "last"))
    return (
        f"{run} is finished: {epochs}; {_errors(trainer, outcome)}weights: {weights}",
        NEXT_COMMANDS["finished"].format(run=run),
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
    chosen = "" if best is None else f", best {best.error_pct:.2f} % in epoch {best.epoch}"
    head = "" if error is None else f"error on {_pictures(dataset, on)} {error:.2f} % at the end{chosen}; "
    if on == "val" and last is not None and last.test_error_pct is not None:
        head += f"on {_pictures(dataset, 'test')} {last.test_error_pct:.2f} % at the end; "
    return head


def _pictures(dataset: Dataset, on: str) -> str:
    held = dataset.val if on == "val" else None
    if held is not None:
        return f"{counted(len(held), 'held-back picture')} of {dataset.name}"
    return f"the {counted(len(dataset.test), 'test picture')} of {dataset.name}"
