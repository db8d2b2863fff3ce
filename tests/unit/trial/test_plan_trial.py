"""Confirmation before a run: what overshoots is replaced, and what is measured to be faster wins."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest

from lowmem.choose.batch_size import ALIKE, Planner
from lowmem.choose.execution import request_of
from lowmem.choose.planning import Choice, Request, other_precision, rivals, smaller
from lowmem.config.schema import Config
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import Infeasible, PreflightError
from lowmem.core.units import MIB
from lowmem.distributed.group import Group
from lowmem.isolate import OUT_OF_MEMORY
from lowmem.plan.record import Plan
from lowmem.trial import Trial, TrialResult, run_trial
from lowmem.trial.plan_trial import MOST_TRIALS, Confirmed, confirm_run, trial_of, wants_confirmation
from tests.isolated import call_here
from tests.tiny import tiny


def _settings(*sets: str, tensors: str = "8M") -> Settings:
    return tiny(
        "model.width=4", "data.train_subset=100", "data.test_subset=50", "train.batch=50", "train.epochs=1",
        f"memory.tensors={tensors}", *sets,
    )  # fmt: skip


@cache  # nothing of it is ever changed
def _chosen(*sets: str, tensors: str = "8M") -> tuple[Config, Request, list[Choice]]:
    settings = _settings("train.memory_format=contiguous", *sets, tensors=tensors)
    request = request_of(settings.config)
    planner = Planner({0: request}, Group())
    if settings.config.memory.auto_batch:
        splits = planner.divide_auto(settings.config.train.batch, 5000)
    else:
        splits = [planner.divide(settings.config.train.batch, may_accumulate=True)]
    return settings.config, request, [split.choices[0] for split in splits]


def _measured(trial: Trial, *, times: float = 1.0, seconds: float = 1.0, **more: object) -> TrialResult:
    """A result that is off the prediction by a factor."""
    assert trial.plan is not None
    predicted = Plan.from_json(trial.plan).predicted.peak_allocated_bytes
    assert predicted is not None
    values = {"peak_allocated_bytes": int(times * predicted), "step_seconds": seconds, "finite": True, **more}
    return TrialResult(**values)  # type: ignore[arg-type]


class Runner:
    """Stands for the process, and keeps what it was asked."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[Trial] = []

    def __call__(self, trial: Trial) -> TrialResult:
        self.asked.append(trial)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, TrialResult):
            return answer
        assert isinstance(answer, dict)
        return _measured(trial, **answer)


def _confirm(found: tuple[Config, Request, list[Choice]], run: object, lines: list[str] | None = None) -> Confirmed:
    config, request, choices = found
    tell = (lines if lines is not None else []).append
    return confirm_run(config, request, choices, num_classes=10, train_pictures=100, tell=tell, run=run)  # type: ignore[arg-type]


def test_a_doctored_budget_is_overshot_by_real_steps_and_replaced() -> None:
    config, request, choices = _chosen()
    honest = choices[0].plan
    # As if the prediction had been too low by an eighth: the same plan under a budget that it does not keep.
    budget_bytes = int(0.875 * (honest.predicted.peak_allocated_bytes or 0))
    budget = replace(request.budget, total_bytes=budget_bytes)
    lines: list[str] = []
    doctored = replace(choices[0], budget=budget)
    here = partial(run_trial, call=call_here)
    confirmed = _confirm((config, replace(request, budget=budget), [doctored]), here, lines)
    first, *_, last = confirmed.trials
    assert first.refused_because is not None
    assert "OVER: training takes" in first.refused_because
    assert last.refused_because is None
    assert confirmed.choice.plan.schedule == last.choice.plan.schedule != honest.schedule
    assert confirmed.choice.plan.budget_bytes == budget_bytes
    assert (last.result.most_allocated_bytes or 0) <= budget_bytes
    for tried in confirmed.trials:
        predicted = tried.choice.plan.predicted.peak_allocated_bytes
        # Predicted as the caching allocator counts, which rounds every tensor of this tiny net up to 512 bytes.
        assert tried.result.peak_allocated_bytes == pytest.approx(predicted, rel=0.03)
    assert len(lines) == len(confirmed.trials)
    assert "OVER" in lines[0]
    assert lines[-1].endswith("holds")


@pytest.mark.slow
def test_a_runner_up_that_is_measured_to_be_faster_wins_beyond_the_noise() -> None:
    found = _chosen("train.batch=auto", tensors="40M")
    first, second = found[2][0].plan.batch, rivals(found[1], found[2])[0].plan.batch
    fast = {"seconds": first / 100}
    noise = Runner(fast, {"seconds": second / 101}, {"seconds": 1e6})
    assert _confirm(found, noise).choice.plan.batch == first
    faster = Runner(fast, {"seconds": second / 110}, {"seconds": 1e6})
    confirmed = _confirm(found, faster)
    assert confirmed.choice.plan.batch == second
    lost = next(one for one in confirmed.choice.plan.candidates if f"batch {first}," in one.what)
    assert "of the chosen one" in (lost.refused_because or "")
    assert lost.measured_step_seconds == fast["seconds"]
    chosen = confirmed.choice.plan.candidates[-1]
    assert (chosen.refused_because, chosen.measured_step_seconds) == (None, second / 110)
    assert Plan.from_json(confirmed.choice.plan.to_json()) == confirmed.choice.plan


def test_trials_go_by_predicted_time_and_are_few() -> None:
    found = _chosen("train.batch=auto", tensors="40M")
    runner = Runner({})
    confirmed = _confirm(found, runner)
    predicted = [tried.choice.images_per_second for tried in confirmed.trials]
    chosen, *others = predicted
    assert others == sorted(others, reverse=True)
    assert chosen * ALIKE >= max(predicted)
    assert 1 < len(runner.asked) <= 3


def test_out_of_memory_takes_the_next_rung_and_evaluation_counts() -> None:
    found = _chosen()
    out = TrialResult(refused=OUT_OF_MEMORY, out_of_memory=True)
    runner = Runner(out, {"eval_peak_allocated_bytes": 9 * MIB}, {})
    confirmed = _confirm(found, runner)
    assert "evaluation takes 9" in (confirmed.trials[1].refused_because or "")
    budgets = [tried.choice.budget.tensor_bytes for tried in confirmed.trials]
    assert budgets[1] == int(0.92 * budgets[0])
    assert budgets[2] < budgets[1]
    assert confirmed.choice.plan.budget_bytes == budgets[0]


def test_a_loss_that_is_no_number_takes_the_other_precision_and_no_smaller_plan() -> None:
    found = _chosen("train.precision=auto")
    runner = Runner({"finite": False}, {})
    confirmed = _confirm(found, runner)
    assert [trial.precision for trial in runner.asked] == ["fp32", "amp"]
    assert confirmed.trials[0].refused_because == "the loss is not finite"
    assert confirmed.choice.plan.precision == "amp"


def test_mixed_precision_does_not_win_by_speed_where_auto_prefers_fp32() -> None:
    _, request, choices = _chosen("train.precision=auto")
    assert rivals(request, choices) == []
    preferred = replace(request, modes=dict(reversed(request.modes.items())))
    mixed = other_precision(request, choices[0])
    assert mixed is not None
    assert rivals(preferred, [mixed]) == []  # predicted to be far slower
    near = replace(mixed, plan=replace(mixed.plan, predicted=choices[0].plan.predicted))
    assert [one.plan.precision for one in rivals(preferred, [near])] == ["fp32"]


def test_nothing_that_holds_is_infeasible_with_the_measured_least() -> None:
    found = _chosen()
    runner = Runner({"times": 2.0})
    with pytest.raises(Infeasible) as caught:
        _confirm(found, runner)
    assert len(runner.asked) <= MOST_TRIALS
    assert caught.value.least_bytes > found[1].budget.tensor_bytes
    assert "measured" in caught.value.what


def test_trials_that_cannot_run_are_no_matter_of_memory() -> None:
    with pytest.raises(PreflightError, match=r"no such kernel.*memory\.confirm=never"):
        _confirm(_chosen(), Runner(TrialResult(refused="crashed: no such kernel")))


def test_a_smaller_plan_computes_the_same_within_less() -> None:
    _, request, choices = _chosen()
    rung = smaller(request, choices[0], 7 * MIB)
    assert rung is not None
    assert rung.plan.exact
    assert (rung.plan.predicted.peak_allocated_bytes or 0) <= 7 * MIB
    assert smaller(request, choices[0], 100) is None


def test_a_trial_waits_for_the_link_as_the_run_would() -> None:
    _, request, (choice,) = _chosen("memory.host=64M", "memory.link=12")
    waiting = choice.plan.predicted.host_bytes
    assert waiting
    slow = _settings("memory.link=0.02").config
    trial = trial_of(slow, choice.plan, request.budget, 10, 100)
    result = run_trial(replace(trial, steps=1, warmup=1), call=call_here)
    assert result.step_seconds is not None
    assert result.step_seconds > waiting / 0.02e9  # each way


@pytest.mark.parametrize(
    ("wish", "device", "wanted"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("always", "cpu", True), ("never", "cuda", False)],
)
def test_when_a_plan_is_confirmed(wish: str, device: str, wanted: bool) -> None:
    config = gather(sets=[f"memory.confirm={wish}", f"train.device={device}"]).config
    assert wants_confirmation(config) == wanted
