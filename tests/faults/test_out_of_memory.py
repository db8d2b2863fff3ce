"""Out of memory at any allocation of a step: the run goes on under a smaller plan and ends with the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.choose.decide import decide
from lowmem.cli.main import main
from lowmem.config.settings import Settings
from lowmem.core.errors import ExitCode, OutOfMemory
from lowmem.data import Dataset, load
from lowmem.lifecycle import resume_training, run_training
from lowmem.measure import Snapshot
from lowmem.measure.tensors import TensorMeter
from lowmem.plan.record import Plan
from lowmem.remat.links import cpu_link
from lowmem.train.loop import Trainer
from lowmem.train.watchers import Act, MemoryPressure, Verdict
from tests.conftest import assert_same_run
from tests.exact.compare import in_use
from tests.faults.injection import Scarce, events, make_trainer, recorded_plan, run, scarce_from, scarce_step
from tests.tiny import arguments, tiny

FAILING = 1  # the step, of three
THRASHING = Verdict(Act.REPLAN, "thrashing")
MODES = {
    "fp32": ["memory.tensors=3200K"],
    "bf16": ["memory.tensors=2200K", "train.precision=amp"],
    "micro-batches": ["memory.tensors=2200K", "train.micro_batch=8"],
    "host": ["memory.tensors=3M", "memory.host=64M", "memory.link=12"],
}


@cache
def _settings(mode: str) -> Settings:
    return tiny(
        "model.width=4", "data.train_subset=40", "data.test_subset=12", "train.batch=16", "train.epochs=1",
        "train.memory_format=contiguous", *MODES[mode],
    )  # fmt: skip


@cache
def _dataset() -> Dataset:
    config = _settings("fp32").config
    return load(config.data, config.seed)


@cache
def _plan(mode: str) -> Plan:
    plan = decide(_settings(mode)).plan
    assert plan is not None
    assert plan.exact is (mode != "micro-batches")
    assert plan.schedule.hosts is (mode == "host")
    return plan


def _trainer(mode: str = "fp32", plan: Plan | None = None) -> Trainer:
    return make_trainer(_settings(mode), _dataset(), plan or _plan(mode))


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int]]:
    """mode -> (a run in which nothing failed, allocations of its second step)."""

    @cache
    def make(mode: str) -> tuple[Path, int]:
        scarce = Scarce()
        path = tmp_path_factory.mktemp(mode) / "run"
        run(path, _settings(mode), _trainer(mode), lambda trainer: scarce_step(trainer, scarce, FAILING))
        assert scarce.seen > 100
        return path, scarce.seen

    return make


def _survives(
    mode: str, points: Sequence[int], untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path
) -> set[str]:
    """Fails once at each of the points, each in a run of its own -> the phases that were hit."""
    plain, _ = untroubled(mode)
    phases = set()
    for point in points:
        path = tmp_path / str(point)
        scarce = Scarce({point})
        run(path, _settings(mode), _trainer(mode), lambda t, scarce=scarce: scarce_step(t, scarce, FAILING))
        assert scarce.failures == 1
        assert_same_run(path, plain)
        (event,) = events(path, "out-of-memory")
        assert (event["step"], event["new_budget_bytes"]) == (FAILING, _plan(mode).ladder[0].budget_bytes)
        assert event["asked_bytes"] > 0
        assert [one["budget_bytes"] for one in events(path, "replan")] == [_plan(mode).ladder[0].budget_bytes]
        assert recorded_plan(path) == _plan(mode).next_rung()
        phases.add(event["phase"])
    return phases


@pytest.mark.parametrize(
    ("mode", "quick"), [("fp32", True), *(pytest.param(mode, False, marks=pytest.mark.slow) for mode in MODES)]
)
def test_a_step_that_ran_out_of_memory_is_done_again(
    mode: str, quick: bool, untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path
) -> None:
    count = untroubled(mode)[1]
    points: Sequence[int] = range(1, count + 1, count // (10 if mode == "fp32" else 5))
    if quick:
        points = [points[at] for at in (0, 1, 2, 8)]  # of the batch, of the forward pass, of the backward pass
    assert _survives(mode, points, untroubled, tmp_path) >= {"data", "forward", "backward"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_at_every_allocation(mode: str, untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path) -> None:
    """One step fails at its first allocation, then at its second, and so on to its last, on a ladder without end.

    What undoing gets wrong stays wrong: every try begins with new copies of what it found.
    """
    plain, _ = untroubled(mode)
    scarce, rungs = Scarce(), (replace(_plan(mode), ladder=()), _plan(mode).ladder[-1])

    @contextmanager
    def during(trainer: Trainer) -> Any:
        fetch, take = trainer.batches.batch, trainer.take

        def batch(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.step == FAILING:
                scarce.fail_at = {scarce.failures // 2 + 1}  # twice in each place, under either plan
                scarce.arm()
            return fetch(*args, **kwargs)

        def endless(plan: Plan) -> None:
            take(plan)
            trainer.plan = replace(plan, ladder=(rungs[scarce.failures % 2],) * 2)

        trainer.batches.batch, trainer.take = batch, endless  # type: ignore[method-assign]
        with scarce:
            yield

    path = run(tmp_path / "run", _settings(mode), _trainer(mode), during)
    assert_same_run(path, plain)
    assert len(events(path, "out-of-memory")) == scarce.failures
    # The failing point went past the end of the shorter of the two.
    assert scarce.failures // 2 >= untroubled(mode)[1] - 1


def test_several_in_a_row_go_down_several_rungs(untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path) -> None:
    plain, _ = untroubled("fp32")
    assert len(_plan("fp32").ladder) >= 3
    path = run(
        tmp_path / "run", _settings("fp32"), _trainer(), lambda t: scarce_step(t, Scarce({60}), FAILING, failures=3)
    )
    assert_same_run(path, plain)
    budgets = [event["new_budget_bytes"] for event in events(path, "out-of-memory")]
    assert budgets == [rung.budget_bytes for rung in _plan("fp32").ladder[:3]]
    assert recorded_plan(path).schedule == _plan("fp32").ladder[2].schedule
    # What the last rung takes was held against its own prediction.
    assert events(path, "measured")[-1]["budget_bytes"] == budgets[-1]


def test_the_second_micro_batch(untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path) -> None:
    """When the first one's gradients are there already."""
    plain, count = untroubled("micro-batches")
    scarce, seen = Scarce({count - 5}), []
    path = tmp_path / "run"

    @contextmanager
    def during(trainer: Trainer) -> Any:
        original = trainer.step.optimizer.zero_grad

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            seen.append(all(p.grad is not None for p in trainer.model.parameters()))
            original(*args, **kwargs)

        trainer.step.optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        with scarce_step(trainer, scarce, FAILING):
            yield

    run(path, _settings("micro-batches"), _trainer("micro-batches"), during)
    assert seen == [True] * 4  # three steps and the failed one
    assert_same_run(path, plain)


def test_the_memory_is_free_before_the_step_is_repeated(tmp_path: Path) -> None:
    scarce = Scarce({100})
    meter = TensorMeter()
    levels: list[int] = []
    alive: list[int] = []

    @contextmanager
    def during(trainer: Trainer) -> Any:
        momentum = (slots["momentum_buffer"] for slots in trainer.optimizer.state.values())
        meter.adopt([*trainer.model.parameters(), *trainer.model.buffers(), *momentum])
        with meter, scarce_step(trainer, scarce, FAILING):
            fetch = trainer.batches.batch

            def batch(*args: Any, **kwargs: Any) -> Any:
                levels.append(meter.live_bytes)
                alive.append(sum(made() is not None for made in scarce.made))
                return fetch(*args, **kwargs)

            trainer.batches.batch = batch  # type: ignore[method-assign]
            yield

    run(tmp_path / "run", _settings("fp32"), _trainer(), during)
    assert scarce.failures == 1
    assert len(levels) == 4
    # Fetched for the second time: what the first try had made is gone, all of it.
    assert levels[2] == levels[1]
    assert alive[2] == 0
    assert len(alive) == 4


def test_nothing_waits_in_host_memory_when_the_step_is_repeated(
    untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path
) -> None:
    """Nor moves; wherever the step failed, in the fetch of what waits there too."""
    plain, count = untroubled("host")
    waited, link = list[int](), cpu_link(12e9)
    for point in range(count // 3, count, count // 4):
        scarce, trainer = Scarce({point}), _trainer("host")
        fail, fetch = scarce._fail, trainer.batches.batch

        def failing(size: int, fail: Any = fail) -> None:
            waited.append(in_use(link))
            fail(size)

        def batch(*args: Any, fetch: Any = fetch, **kwargs: Any) -> Any:
            assert in_use(link) == 0
            return fetch(*args, **kwargs)

        scarce._fail, trainer.batches.batch = failing, batch  # type: ignore[method-assign]
        step = lambda t, scarce=scarce: scarce_step(t, scarce, FAILING)  # noqa: E731
        path = run(tmp_path / str(point), _settings("host"), trainer, step)
        assert scarce.failures == 1
        assert trainer.plan == _plan("host").next_rung()
        assert trainer.planned is not None
        assert trainer.planned.lowmem.link is link
        assert in_use(link) == 0
        assert_same_run(path, plain)
    assert 0 <= min(waited) < max(waited)


def test_evaluation_goes_on_with_fewer_pictures(untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path) -> None:
    plain, _ = untroubled("fp32")

    trainer = _trainer()

    def room_for_four(module: Any, args: Any) -> None:
        if not module.training and args[0].shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 is full.")

    trainer.model.register_forward_pre_hook(room_for_four)
    path = run(tmp_path / "run", _settings("fp32"), trainer)
    told = events(path, "out-of-memory")
    assert [event["evaluation_batch"] for event in told] == [8, 4]
    assert {(event["phase"], event["asked_bytes"]) for event in told} == {("evaluation", 20 * 2**20)}
    assert recorded_plan(path) == _plan("fp32")  # training is not to blame
    ours, theirs = (next((one / "checkpoints").glob("step-00000003")) for one in (path, plain))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_no_room_to_save_once(untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path) -> None:
    plain, _ = untroubled("fp32")
    failed: list[bool] = []
    trainer = _trainer()
    original = trainer.checkpoint

    def checkpoint() -> Any:
        if not failed:
            failed.append(True)
            raise MemoryError
        return original()

    trainer.checkpoint = checkpoint  # type: ignore[method-assign]
    path = run(tmp_path / "run", _settings("fp32"), trainer)
    assert [event["phase"] for event in events(path, "out-of-memory")] == ["saving"]
    assert_same_run(path, plain)


def test_just_before_the_update_is_not_too_late(untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path) -> None:
    plain, _ = untroubled("fp32")
    scarce = Scarce()
    scarce.fail_update = True
    path = run(tmp_path / "run", _settings("fp32"), _trainer(), lambda t: scarce_step(t, scarce, FAILING))
    assert [event["phase"] for event in events(path, "out-of-memory")] == ["update"]
    assert_same_run(path, plain)


def test_a_begun_update_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    trainer = _trainer()

    def fail(*args: Any) -> None:
        if trainer.state.step == FAILING:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.optimizer.register_step_post_hook(fail)
    with pytest.raises(OutOfMemory, match=r"cannot be undone.*last checkpoint stands"):
        run(tmp_path / "run", _settings("fp32"), trainer)
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
    (event,) = events(tmp_path / "run", "out-of-memory")
    assert event["phase"] == "update"


def test_pressure_takes_a_rung_between_two_steps(
    untroubled: Callable[[str], tuple[Path, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pressure is, is tested on scripted readings elsewhere; here it is after the first step."""
    plain, _ = untroubled("fp32")
    script = [False, False, False, True]
    monkeypatch.setattr(MemoryPressure, "look", lambda *given: THRASHING if script.pop() else Verdict())
    path = run(tmp_path / "run", _settings("fp32"), _trainer())
    (event,) = events(path, "pressure")
    below = _plan("fp32").next_rung()
    assert below is not None
    assert (event["what"], event["step"]) == ("thrashing", 1)
    assert (event["old_budget_bytes"], event["new_budget_bytes"]) == (_plan("fp32").budget_bytes, below.budget_bytes)
    assert recorded_plan(path) == below
    assert not events(path, "out-of-memory")
    assert_same_run(path, plain)


def test_the_allocators_retries_are_an_event(tmp_path: Path) -> None:
    """On the CPU nobody counts them: the readings are scripted, the run is real."""
    counts = itertools.count()
    trainer = _trainer()

    def read() -> Snapshot:
        return Snapshot(alloc_retries=next(counts), device_free_bytes=2_000, device_total_bytes=6_000)

    trainer.meter.read = read  # type: ignore[method-assign]
    path = run(tmp_path / "run", _settings("fp32"), trainer)
    found = events(path, "allocator-retries")
    assert found
    assert [event["count"] for event in found] == sorted({event["count"] for event in found})
    assert found[0]["step"] == 1


def test_pressure_on_the_last_rung_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryPressure, "look", lambda *given: THRASHING)
    last = _plan("fp32").ladder[-1]
    path = run(tmp_path / "run", _settings("fp32"), _trainer(plan=last))
    assert [event["new_budget_bytes"] for event in events(path, "pressure")] == [None]
    assert recorded_plan(path) == last


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    trainer = _trainer()

    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    trainer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path / "run", _settings("fp32"), trainer)
    assert not (tmp_path / "run/events.jsonl").exists()


# Four steps an epoch.
SHORT = ("model.width=4", "data.train_subset=80", "train.epochs=2", "train.memory_format=contiguous")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run_training(tiny(*SHORT), path)
    return path


def test_without_a_smaller_plan_the_run_is_saved_and_can_be_resumed(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with scarce_from(5, Scarce({50})), pytest.raises(SystemExit) as leaving:
        main(["train", *arguments(*SHORT), "--tensors", "3M", "--out", str(path)])
    said = capsys.readouterr().err
    assert leaving.value.code == ExitCode.OUT_OF_MEMORY, said
    error = said.strip().splitlines()[-1]
    assert "no smaller plan left (this process holds" in error
    assert f"saved at epoch 2, step 5: free what others use and go on with `lowmem resume {path}`" in error
    told = events(path, "out-of-memory")
    assert len(told) > 1
    assert [event["old_budget_bytes"] for event in told[1:]] == [event["new_budget_bytes"] for event in told[:-1]]
    assert told[-1]["new_budget_bytes"] is None
    assert recorded_plan(path).ladder == ()
    resume_training(path)
    assert_same_run(path, whole)


def test_an_unplanned_run_is_saved_too(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with scarce_from(5, Scarce({50})), pytest.raises(OutOfMemory, match=r"saved at epoch 2, step 5.*--vram 4G"):
        run_training(tiny(*SHORT), path)
    resume_training(path)
    assert_same_run(path, whole)
