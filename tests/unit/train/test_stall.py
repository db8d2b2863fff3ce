"""Scripted epochs: what learns nothing is found by the third epoch, what learns slowly never is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from lowmem.runs.checkpoint_state import RunState
from lowmem.train.loss_watchers import Chance, Evidence, Stall, gradient_share, note_share
from lowmem.train.watchers import STALLED, Act, Verdict

TEN = Chance(math.log(10), 90.0, 50_000)
VANISHED, FLOWING = 1e-6, 0.1


def judge(
    epochs: Sequence[tuple[float, float, float | None]], chance: Chance = TEN, steps: int = 391
) -> list[Evidence | None]:
    """(loss, error, gradient share) of each epoch -> what was found at its end."""
    state, stall, found = RunState(), Stall(chance, steps, stop=False), []
    for number, (loss, error_pct, share) in enumerate(epochs, start=1):
        if share is not None:
            note_share(state, [share, *[1.0] * 9])
        stall.look(state, epoch=number, loss=loss, error_pct=error_pct)
        found.append(stall.evidence)
        state.start_epoch()
    return found


def first_found(epochs: Sequence[tuple[float, float, float | None]], **conditions: object) -> int | None:
    """The epoch, from 1."""
    return next((n for n, one in enumerate(judge(epochs, **conditions), start=1) if one), None)  # type: ignore[arg-type]


# The small report's runs at width 16 on 10,000 pictures (benchmarks/results/small_report): training loss and error.
CNN110 = [(2.31286, 90.22), (2.30898, 90.22), (2.30865, 90.44), (2.30661, 90.12), (2.30689, 90.43), (2.30480, 90.54)]
CNN56 = [(2.32840, 89.53), (2.30024, 89.69), (2.29958, 89.51), (2.29397, 89.00), (2.28682, 88.71), (2.26671, 87.33)]
RES110 = [(2.45883, 88.85), (2.09623, 79.97), (2.37645, 88.70), (2.24586, 86.44), (2.03377, 78.07), (1.95838, 75.02)]
SMALL = Chance(math.log(10), 90.0, 10_000)


def test_what_was_seen_of_real_runs() -> None:
    def at(epochs: list[tuple[float, float]], share: float) -> int | None:
        return first_found([(*one, share) for one in epochs], chance=SMALL, steps=79)

    assert at(CNN110, VANISHED) == 3
    assert at(CNN56, VANISHED) is None  # even if its gradients had vanished: its loss is below chance
    assert at(RES110, VANISHED) is None
    assert at(CNN110, FLOWING) is None


def test_the_evidence() -> None:
    found = judge([(2.3104, 90.1, VANISHED)] * 4)
    assert found[:2] == [None, None]  # the first epoch is not judged, one alone is not enough
    assert found[2] is not None
    assert found[3] is not None
    assert (found[2].epochs_at_chance, found[3].epochs_at_chance) == (2, 3)
    assert found[2].first_to_last_gradient == pytest.approx(VANISHED)
    assert found[2].chance_loss == math.log(10)
    for said in ("2.3104", "2.3026", "90.10 %", "1.0e-06", "9e-05", "0.40"):
        assert said in found[2].words


def wandering(seed: int, pictures: int, epochs: int) -> list[tuple[float, float, float | None]]:
    """A guesser whose logits follow its last batches: simulated picture by picture, as the docstring has it."""
    generator = torch.Generator().manual_seed(seed)
    out: list[tuple[float, float, float | None]] = []
    labels = torch.arange(pictures) % 10
    logits = torch.zeros(10)
    for _ in range(epochs):
        loss, wrong = 0.0, 0
        for batch in labels[torch.randperm(pictures, generator=generator)].split(100):
            logp = torch.log_softmax(logits, 0)
            loss -= logp[batch].sum().item()
            wrong += int((batch != logp.argmax()).sum())
            logits = 0.9 * logits + 0.3 * (torch.bincount(batch, minlength=10) / 10 - 1)
        out.append((loss / pictures, 100 * wrong / pictures, VANISHED))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_a_guesser_is_found_by_the_third_epoch(seed: int) -> None:
    epochs = wandering(seed, 4000, 4)
    assert all(loss != math.log(10) for loss, _, _ in epochs)
    assert first_found(epochs, chance=Chance(math.log(10), 90.0, 4000), steps=40) == 3


@pytest.mark.parametrize("seed", range(10))
def test_what_learns_slowly_is_never_found(seed: int) -> None:
    """Ten series that leave chance by a thousandth of a nat and a hundredth of a percent an epoch, or a little more,
    with the noise of 50,000 pictures, and with gradients that would have vanished."""
    draw = random.Random(seed)
    slope = 0.001 * (1 + seed)
    series: list[tuple[float, float, float | None]] = []
    for epoch in range(1, 165):
        loss = math.log(10) - slope * epoch + draw.gauss(0, 0.0001)
        series.append((loss, 90 - 100 * slope * epoch / 10 + draw.gauss(0, 0.13), VANISHED))
    assert first_found(series) is None


def test_the_low_start_at_chance_with_gradients_that_flow() -> None:
    """Res110 at width 8, 3,000 pictures and lr 0.01: at chance for two epochs, then it learns."""
    series = [(2.4254, 90.03, FLOWING), (2.3568, 89.40, FLOWING), (2.3300, 89.00, FLOWING), (2.3151, 86.73, FLOWING)]
    assert first_found(series, chance=Chance(math.log(10), 90.0, 3000), steps=47) is None


def test_a_good_epoch_between_starts_the_count_anew() -> None:
    bad, good = (2.31, 90.0, VANISHED), (2.31, 85.0, VANISHED)
    assert first_found([bad, bad, good, bad, good, bad]) is None
    assert first_found([bad, bad, good, bad, bad]) == 5


def test_a_few_steps_are_no_evidence() -> None:
    assert first_found([(2.31, 90.0, VANISHED)] * 8, chance=Chance(math.log(10), 90.0, 640), steps=10) == 6


def test_without_any_gradient_recorded_nothing_is_said() -> None:
    assert first_found([(2.31, 90.0, None)] * 8) is None
    # One that was recorded in an earlier epoch holds until there is a newer one.
    assert first_found([(2.31, 90.0, VANISHED), (2.31, 90.0, None), (2.31, 90.0, None)]) == 3


def test_the_share_is_of_the_first_and_last_tenth() -> None:
    assert gradient_share([2.0, *[9.0] * 8, 4.0]) == 0.5
    assert gradient_share([1.0, 3.0, *[9.0] * 16, 4.0, 6.0]) == 0.4
    assert gradient_share([0.0, *[9.0] * 8, 4.0]) == 0.0
    assert gradient_share([0.0] * 10) == 0.0
    assert gradient_share([1.0, *[9.0] * 8, 0.0]) == math.inf
    assert gradient_share([math.inf, *[9.0] * 8, 4.0]) is None  # a step that the scaler skipped
    assert gradient_share([1.0, *[9.0] * 8, math.nan]) is None


def test_a_spike_does_not_hide_what_vanished() -> None:
    state = RunState()
    for share in [1e-7] * 9 + [math.inf, 0.01]:
        note_share(state, [share, *[1.0] * 9])
    assert state.share_count == 10
    assert math.exp(state.share_log_sum / 10) == pytest.approx(1e-7**0.9 * 0.01**0.1)


def test_chance_is_that_of_the_labels() -> None:
    even = Chance.of(torch.arange(1000) % 10)
    assert even.loss == pytest.approx(math.log(10))
    assert even.error_pct == pytest.approx(90)
    assert even.loss_noise == pytest.approx(0.0045)
    assert even.error_noise_pct == pytest.approx(3 * 100 * math.sqrt(0.09 / 1000))
    odd = Chance.of(torch.tensor([0] * 75 + [2] * 25))  # a class without pictures counts for nothing
    assert odd.error_pct == pytest.approx(25)
    assert odd.loss == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_chance_of_smoothed_labels_is_the_least_loss_of_one_answer_for_all() -> None:
    labels = torch.tensor([0] * 70 + [2] * 30)
    answer = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS([answer], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        best.zero_grad()
        out = F.cross_entropy(answer.expand(100, 4), labels, label_smoothing=0.2)
        out.backward()
        return out

    best.step(loss)  # type: ignore[arg-type]
    assert Chance.of(labels, 4, 0.2).loss == pytest.approx(loss().item(), rel=1e-9)
    assert Chance.of(labels, 4).loss == Chance.of(labels).loss


@pytest.mark.parametrize("stop", [False, True])
def test_it_is_new_once_and_asks_to_leave_only_if_asked(stop: bool) -> None:
    state, stall, seen = RunState(), Stall(TEN, 391, stop=stop), []
    for epoch in range(1, 5):
        note_share(state, [VANISHED, *[1.0] * 9])
        seen.append((stall.look(state, epoch=epoch, loss=2.31, error_pct=90.0), stall.is_new))
        state.start_epoch()
    asked = Verdict(Act.LEAVE, STALLED) if stop else Verdict()
    assert seen == [(Verdict(), False), (Verdict(), False), (asked, True), (asked, False)]
    resumed = Stall(TEN, 391, stop=stop)
    resumed.look(state, epoch=5, loss=2.31, error_pct=90.0)
    assert not resumed.is_new  # it was said by the process before
