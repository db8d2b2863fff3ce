"""Before a run: its plan and the runners-up tried by real steps in clean processes, so that what is trained with is
known to fit and not only predicted to.

A choice that takes more than its budget (training or evaluation), runs out of memory or computes something that is no
number is replaced by the next; among those that hold, the one with the most measured pictures per second wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lowmem.choose.batch_size import ALIKE
from lowmem.choose.execution import refuse_unsafe
from lowmem.choose.planning import Choice, Request, other_precision, rivals, smaller
from lowmem.choose.request import Budget
from lowmem.config.schema import Config
from lowmem.core.errors import Infeasible, PreflightError
from lowmem.core.phases import Phase, untold
from lowmem.core.units import counted, format_size
from lowmem.data.pictures import held_bytes, stored_side
from lowmem.plan.record import Candidate, Plan
from lowmem.trial import PLANNED, Trial, TrialResult, excess, run_trial, verdict

MOST_TRIALS = 4
_RUNG = 0.92  # of the budget, for the replacement of a choice that overshoots


@dataclass(frozen=True)
class Tried:
    """A choice and what a trial made of it. `refused_because`: None if it holds; `for_memory`: less budget may help;
    `timed`: whether the predicted time is of this device (on the CPU it usually is of a card)."""

    choice: Choice
    result: TrialResult
    refused_because: str | None
    for_memory: bool
    timed: bool

    @property
    def images_per_second(self) -> float:
        """Measured."""
        return self.choice.plan.batch / (self.result.step_seconds or float("inf"))

    def candidate(self, refused_because: str | None) -> Candidate:
        """For plan.json."""
        predicted = self.choice.plan.predicted
        return Candidate(
            what=describe_choice(self.choice),
            refused_because=refused_because,
            peak_bytes=predicted.peak_allocated_bytes,
            step_seconds=predicted.step_seconds,
            measured_peak_bytes=self.result.most_allocated_bytes,
            measured_step_seconds=self.result.step_seconds,
        )

    @property
    def fields(self) -> dict[str, Any]:
        """For events.jsonl."""
        predicted, result = self.choice.plan.predicted, self.result
        return {
            "what": describe_choice(self.choice),
            "refused_because": self.refused_because,
            "predicted_peak_bytes": predicted.peak_allocated_bytes,
            "measured_peak_bytes": result.peak_allocated_bytes,
            "peak_error": excess(result.peak_allocated_bytes, predicted.peak_allocated_bytes),
            "predicted_reserved_bytes": predicted.peak_reserved_bytes,
            "measured_reserved_bytes": result.peak_reserved_bytes,
            "measured_eval_peak_bytes": result.eval_peak_allocated_bytes,
            "device_used_bytes": result.device_used_bytes,
            "blas_workspace_bytes": result.blas_workspace_bytes,
            "predicted_step_seconds": predicted.step_seconds,
            "measured_step_seconds": result.step_seconds,
            "seconds_error": excess(result.step_seconds, predicted.step_seconds) if self.timed else None,
            "alloc_retries": result.alloc_retries,
        }

    @property
    def line(self) -> str:
        """One line: predicted against measured, and the verdict."""

        def against(measured: float | None, predicted: float | None, text: str) -> str:
            off = excess(measured, predicted)
            return f"(predicted {text}, {'unknown' if off is None else f'{off:+.1%}'})"

        result, predicted = self.result, self.choice.plan.predicted
        said = f"tried {describe_choice(self.choice)}: "
        if result.refused is None:
            peak, seconds = result.peak_allocated_bytes, result.step_seconds
            wanted = predicted.peak_allocated_bytes
            said += f"{format_size(peak)} at the peak of a step {against(peak, wanted, format_size(wanted))}"
            if result.eval_peak_allocated_bytes is not None:
                said += f", {format_size(result.eval_peak_allocated_bytes)} in evaluation"
            said += f"; {seconds or 0:.3f} s a step"
            if self.timed:
                said += f" {against(seconds, predicted.step_seconds, f'{predicted.step_seconds or 0:.3f}')}"
            said += ": "
        return said + (self.refused_because or "holds")


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """The choice that is trained with, its plan carrying what was measured of all of them; in order of trial."""

    choice: Choice
    trials: tuple[Tried, ...]

    @property
    def event(self) -> dict[str, Any]:
        """The fields of the event `confirmed`."""
        return {"chosen": describe_choice(self.choice), "trials": [tried.fields for tried in self.trials]}


def wants_confirmation(config: Config) -> bool:
    """By the setting `memory.confirm`; `auto` is on CUDA. The device is resolved."""
    wish = config.memory.confirm
    return wish == "always" or (wish == "auto" and config.train.device == "cuda")


def trial_of(config: Config, plan: Plan, budget: Budget, num_classes: int, train_pictures: int) -> Trial:
    """What a run with these settings and this plan does, for a few steps."""
    return Trial(
        **config.model.model_dump(),
        num_classes=num_classes,
        channels=config.data.channels,
        freeze=list(config.train.freeze),
        batch=plan.batch,
        precision=plan.precision,
        memory_format=plan.memory_format,
        device=config.train.device,
        deterministic=config.train.deterministic,
        tf32=config.train.tf32,
        way=PLANNED,
        plan=replace(plan, ladder=()).to_json(),
        image_size=config.data.image_size,
        stored_side=min(stored_side(config.data), config.data.image_size),
        pictures=train_pictures if held_bytes(config.data, train_pictures) else 0,
        eval_batch=config.train.eval_batch or plan.micro_batch,
        cap_bytes=budget.allocator_bytes,
        link_bytes_per_second=config.cpu_link_rate,
        optim=config.optim.model_dump(),
        label_smoothing=config.train.label_smoothing,
        mixup=config.data.mixup,
        seed=config.seed,
    )


def confirm_run(
    config: Config,
    request: Request,
    choices: list[Choice],
    *,
    num_classes: int,
    train_pictures: int,
    tell: Callable[[str], None],
    phase: Phase = untold,
    run: Callable[[Trial], TrialResult] = run_trial,
) -> Confirmed:
    """Tries `choices[0]` and its runners-up as a run with this configuration would do them; a line each to `tell`.

    Raises Infeasible with the least that was measured if none fits, PreflightError if no trial could be run at all.
    """
    refuse_unsafe(config)
    budget, device = request.budget, config.train.device

    def attempt(choice: Choice) -> Tried:
        phase(f"trying {describe_choice(choice)} by real steps")
        result = run(trial_of(config, choice.plan, budget, num_classes, train_pictures))
        tried = Tried(choice, result, *verdict(result, budget, device), device == "cuda" or choice.timed)
        tell(tried.line)
        return tried

    trials = [attempt(choice) for choice in (choices[0], *rivals(request, choices))]
    if not any(tried.refused_because is None for tried in trials):
        for choice in _replacements(request, trials):
            trials.append(attempt(choice))
            if trials[-1].refused_because is None:
                break
    best = _fastest(trials, budget)
    return Confirmed(choice=_with_record(best, trials, budget, choices[0]), trials=tuple(trials))


def _replacements(request: Request, trials: list[Tried]) -> Iterator[Choice]:
    """What to try when nothing held, until there are MOST_TRIALS: the first choice under less and less budget, and at
    last the other precision that `auto` leaves open."""
    other = other_precision(request, trials[0].choice) if len(trials) == 1 else None
    last, limit = trials[0], request.budget.tensor_bytes
    tensor_bytes = limit
    while last.for_memory and len(trials) + (other is not None) < MOST_TRIALS:
        measured = last.result.most_allocated_bytes
        over = 1.0 if measured is None else limit / max(measured, limit)
        tensor_bytes = int(tensor_bytes * min(_RUNG, over))
        rung = smaller(request, trials[0].choice, tensor_bytes)
        if rung is None:
            break
        yield rung
        last = trials[-1]
    if other is not None and len(trials) < MOST_TRIALS:
        yield other


def _fastest(trials: list[Tried], budget: Budget) -> Tried:
    """Of those that hold. Raises Infeasible, PreflightError."""
    best: Tried | None = None
    for tried in trials:
        if tried.refused_because is None and (best is None or tried.images_per_second > ALIKE * best.images_per_second):
            best = tried
    if best is not None:
        return best
    if not any(tried.for_memory for tried in trials):
        raise PreflightError(
            f"a trial of the first steps failed ({trials[0].refused_because}): mend that, or train without trials by "
            "--set memory.confirm=never"
        )
    sizes = [tried.result.most_allocated_bytes for tried in trials if tried.for_memory]
    least = min((size for size in sizes if size is not None), default=None)
    what = f"measured in {counted(len(trials), 'trial')}"
    if least is None:
        predicted = [tried.choice.plan.predicted.peak_allocated_bytes or 0 for tried in trials]
        least, what = min(predicted), f"as predicted, and {counted(len(trials), 'trial')} ran out of memory even so"
    raise Infeasible(budget.tensor_bytes, least, what, f"lower --batch, or {budget.more(least)}")


def _with_record(best: Tried, trials: list[Tried], budget: Budget, first: Choice) -> Choice:
    """The choice with all trials among its candidates, held to the budget that was given and not to a rung's."""
    plan = best.choice.plan
    refused: dict[str, Candidate] = {}
    for one in (*plan.candidates, *first.plan.candidates):
        if one.refused_because is not None:
            refused.setdefault(one.what, one)
    slower = f"measured {best.images_per_second:,.0f} pictures per second of the chosen one, this one "
    others = [
        tried.candidate(tried.refused_because or f"{slower}{tried.images_per_second:,.0f}")
        for tried in trials
        if tried is not best
    ]
    candidates = (*refused.values(), *others, best.candidate(None))
    return replace(best.choice, plan=replace(plan, budget_bytes=budget.tensor_bytes, candidates=candidates))


def describe_choice(choice: Choice) -> str:
    """A choice in a few words."""
    plan = choice.plan
    cut = "" if plan.accumulation == 1 else f" in micro-batches of {plan.micro_batch}"
    return (
        f"{plan.precision} at batch {plan.batch}{cut}, {plan.memory_format}, planned for "
        f"{format_size(choice.budget.tensor_bytes)}"
    )
