"""Stages timed for real on the CPU, and plans that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from lowmem.calibrate import stage_timer
from lowmem.calibrate.calibrator import Calibration, Calibrator, StageTimes
from lowmem.calibrate.device import cpu_identity
from lowmem.calibrate.measuring import Figures, Job, ask, smallest_busy
from lowmem.calibrate.stage_timer import FAST, PLAIN, ChainClock, Mode, Seconds
from lowmem.choose.costs import ChainMeasure, measure_costs, price
from lowmem.choose.decide import Silence, decide
from lowmem.choose.execution import by_measurement, calibrator_of
from lowmem.config.schema import Config
from lowmem.config.settings import gather
from lowmem.core.errors import PreflightError
from lowmem.measure.timing import Timing
from lowmem.models import recipe_of, skeleton
from lowmem.plan.cost import Rates
from lowmem.plan.policy import SAVE_ALL
from lowmem.remat import decompose
from lowmem.remat.libraries import Numerics
from lowmem.simulate import StepShape
from lowmem.simulate.stage import Option, StageMeasure
from lowmem.step.train_step import Execution
from tests.step_shapes import shape_of

MODEL = skeleton("res20", "basic", width=4)
SHAPE = shape_of(MODEL, 4)
RATES = Rates(1e9, 1e9)


@pytest.fixture(scope="module")
def measured() -> ChainMeasure:
    return measure_costs(SHAPE)


@pytest.fixture(scope="module")
def calibration(measured: ChainMeasure) -> Calibration:
    """Everything that the tests below look up, measured in a process of its own as on CUDA."""
    made = Calibration(cpu_identity(), None)

    def apart(jobs: Sequence[Job], device: str, numerics: Numerics) -> Figures:
        task = {"device": device, "numerics": asdict(numerics), "jobs": list(jobs)}
        figures: Figures = ask("lowmem.calibrate.measuring:perform", task)
        return figures

    _times(Calibrator("cpu", made, measure=apart), measured)
    return made


def _times(calibrator: Calibrator, measured: ChainMeasure):
    return calibrator.times(SHAPE, measured.stages)


def _of(times: StageTimes, stage: StageMeasure, what: str) -> float:
    found = times.seconds(stage, what)
    assert found is not None
    return found.forward if what == FAST else found.backward


@pytest.mark.slow  # like the others of this calibration; the quick one is a plan, below
def test_every_policy_of_every_distinct_block_is_timed_once(measured: ChainMeasure, calibration: Calibration) -> None:
    def forbidden(jobs: Sequence[Job], device: str, numerics: Numerics) -> Figures:
        raise AssertionError("measured again")

    told: list[str] = []
    times = _times(Calibrator("cpu", calibration, told.append, measure=forbidden), measured)
    assert told == []
    assert times.outside_seconds > 0
    for stage in measured.stages:
        assert _of(times, stage, FAST) > 0
        assert _of(times, stage, PLAIN) > 0
        for option in stage.options:
            found = times.seconds(stage, option.option)
            assert found is not None
            assert found.backward > 0
            assert (found.forward == 0) == option.option.policy.fused
            assert (found.restore > 0) <= option.option.policy.drop_output


@pytest.mark.slow
def test_prices_are_the_measured_ones(measured: ChainMeasure, calibration: Calibration) -> None:
    times = _times(Calibrator("cpu", calibration), measured)
    chain = price(measured, RATES, times)
    stage, cost = measured.stages[2], chain.stages[2]
    for option in stage.options:
        found = times.seconds(stage, option.option)
        priced = cost.option(option.option.policy, option.option.last)
        assert found == Seconds(priced.forward_seconds, priced.backward_seconds, priced.restore_seconds)
    assert chain.outside_seconds == times.outside_seconds
    assert chain.plain_seconds == pytest.approx(sum(_of(times, one, PLAIN) for one in measured.stages))
    assert price(measured, RATES).plain_seconds != chain.plain_seconds


@pytest.mark.slow
def test_what_could_not_be_measured_is_scaled_like_the_rest(measured: ChainMeasure, calibration: Calibration) -> None:
    partial = Calibration(cpu_identity(), None)
    partial.figures.update(calibration.figures)
    times = _times(Calibrator("cpu", partial), measured)
    whole = price(measured, RATES, times)
    guess = price(measured, RATES)
    # Everything but the plain times is gone: what is left is the roofline in the measured proportion.
    kept = Calibration(cpu_identity(), None)
    plain = {stage.key: _of(times, stage, PLAIN) for stage in measured.stages}
    for stage in measured.stages:
        kept.put("seconds", times.key(stage, PLAIN), [0.0, plain[stage.key], 0.0])
    scaled = price(measured, RATES, StageTimes(kept, SHAPE, SHAPE.batch))
    assert whole.plain_seconds is not None
    assert guess.plain_seconds is not None
    factor = whole.plain_seconds / guess.plain_seconds
    assert scaled.stages[1].fast_seconds == pytest.approx(factor * guess.stages[1].fast_seconds)


@pytest.mark.slow
def test_larger_batches_are_scaled(measured: ChainMeasure, calibration: Calibration) -> None:
    large_shape = shape_of(MODEL, 3 * SHAPE.batch)
    once, thrice = (StageTimes(calibration, shape, SHAPE.batch) for shape in (SHAPE, large_shape))
    larger = measure_costs(large_shape)
    for small, large in zip(measured.stages, larger.stages, strict=True):
        assert _of(thrice, large, FAST) == pytest.approx(3 * _of(once, small, FAST))


def _clock(precision: str = "fp32") -> ChainClock:
    execution = Execution("cpu", precision, "contiguous")
    return ChainClock(network=recipe_of(MODEL), input_shape=(4, 3, 32, 32), execution=execution)


def test_clock_covers_stem_blocks_and_head() -> None:
    clock = _clock(precision="amp")
    mode = clock.mode()
    assert mode.finite
    assert mode.seconds > 0


def _timed(seconds: dict[str, float], host_share: float) -> Callable[..., Timing]:
    """Seconds by the name of what is called: the whole pass of a stage, the copy of its gradient, or nothing at all."""

    def time_call(call: Callable[[], object], device: str, **settings: object) -> Timing:
        call()
        took = seconds[call.__name__]
        launching = host_share * took
        return Timing(
            median_seconds=took,
            least_seconds=took,
            launch_seconds=launching,
            inner=1,
        )

    return time_call


@pytest.mark.parametrize(("host_share", "engine"), [(1.0, 0.25), (0.9, 0.25), (0.5, 0.0)])
def test_the_engine_is_taken_off_where_the_host_is_what_a_stage_waits_for(
    monkeypatch: pytest.MonkeyPatch, host_share: float, engine: float
) -> None:
    timed = _timed({"whole": 4.0, "clone": 1.0, "identity": 0.25}, host_share)
    monkeypatch.setattr(stage_timer, "time_calls", timed)
    stages, clock = len(decompose(MODEL)), _clock()
    assert clock.mode().seconds == pytest.approx(stages * (4.0 - 1.0 - engine))
    assert clock.bound_by_host() is (host_share > 0.8)


def test_calling_the_engine_for_nothing_is_real_work() -> None:
    clock = _clock()
    assert clock.engine_seconds > 0
    assert clock.engine_seconds == clock.engine_seconds, "measured once"


@pytest.mark.parametrize(
    ("bound", "found"),
    [
        ({128: False}, 128),
        ({128: True, 256: True, 512: False}, 512),
        ({128: True, 256: True, 512: True, 1024: True}, 1024),
        ({128: True, 256: None}, 128),
        ({128: None}, 128),
    ],
)
def test_the_smallest_batch_that_keeps_a_card_busy(bound: dict[int, bool | None], found: int) -> None:
    assert smallest_busy(bound.__getitem__) == found


def test_a_fast_card_is_timed_at_a_batch_that_keeps_it_busy() -> None:
    """What the jobs find is given: 256 pictures, a second for every pass under autograd."""
    asked: list[Job] = []

    def measure(jobs: Sequence[Job], device: str, numerics: Numerics) -> Figures:
        asked.extend(jobs)
        figures = Figures()
        for job in jobs:
            match job["kind"]:
                case "busy":
                    figures[job["figure"]] = 256
                case "stages":
                    figures |= {name: [0.0, 1.0, 0.0] for name in job["wanted"]}
                case "update":
                    figures[job["figure"]] = [0.0, 0.0, 0.0]
        return figures

    calibrator = Calibrator("cuda", Calibration(cpu_identity(), None), measure=measure)

    def times(batch: int) -> tuple[int, float, list[str]]:
        """Pictures that were timed, seconds of a block, and the jobs that it took."""
        asked.clear()
        shape = shape_of(MODEL, batch)
        stages = measure_costs(shape, options=lambda stage: [Option(SAVE_ALL)]).stages
        found = calibrator.times(shape, stages)
        for job in asked:
            assert job["kind"] != "stages" or job["input_shape"] == [found.timed_batch, 3, 32, 32]
        return found.timed_batch, _of(found, stages[1], PLAIN), [job["kind"] for job in asked]

    assert times(512) == (256, 2.0, ["busy", "stages", "update"])
    assert times(1024) == (256, 4.0, []), "the same stages, timed at the same batch"
    assert times(192) == (192, 1.0, ["stages"]), "never more pictures than were asked for"
    assert calibrator.timed_batch(shape_of(MODEL, 64, "amp")) == 64
    assert Calibrator("cpu", calibrator.calibration).timed_batch(shape_of(MODEL, 512)) == 128


def test_modes_are_compared_at_the_largest_batch_that_all_have_room_for() -> None:
    """AMP is busy with 512 pictures, fp32 with 128 and has no room for 512."""

    def measure(jobs: Sequence[Job], device: str, numerics: Numerics) -> Figures:
        figures = Figures()
        for job in jobs:
            if job["kind"] == "busy":
                figures[job["figure"]] = 512 if job["precision"] == "amp" else 128
            elif job["precision"] == "amp" or job["input_shape"][0] == 128:
                figures[job["figure"]] = [float(job["input_shape"][0]), 1.0]
        return figures

    calibrator = Calibrator("cuda", Calibration(cpu_identity(), None), measure=measure)
    fp32, amp = shape_of(MODEL, 512), shape_of(MODEL, 512, "amp")
    both = {("fp32", "contiguous"): Mode(128.0, True), ("amp", "contiguous"): Mode(128.0, True)}
    assert calibrator.modes([fp32, amp]) == both
    assert calibrator.modes([amp]) == {("amp", "contiguous"): Mode(512.0, True)}


class _Scripted:
    """A calibrator that knows modes without measuring."""

    def __init__(self, device: str, modes: dict[tuple[str, str], Mode]) -> None:
        self.device, self.known = device, modes
        self.facts = None

    def modes(self, shapes: Sequence[StepShape]):
        asked = [(shape.precision, shape.memory_format) for shape in shapes]
        return {pair: mode for pair, mode in self.known.items() if pair in asked}


def _modes(fp32: tuple[float, float], amp: tuple[float, float], finite: bool = True) -> dict[tuple[str, str], Mode]:
    return {
        ("fp32", "contiguous"): Mode(fp32[0], True),
        ("fp32", "channels-last"): Mode(fp32[1], True),
        ("amp", "contiguous"): Mode(amp[0], finite),
        ("amp", "channels-last"): Mode(amp[1], finite),
    }


def _config(**flags: object) -> Config:
    return gather(flags={"model.width": 64, **{key.replace("__", "."): value for key, value in flags.items()}}).config


def test_auto_follows_what_was_measured() -> None:
    def decided(device: str, modes: dict[tuple[str, str], Mode], **flags: object):
        return by_measurement(_config(**flags), MODEL, _Scripted(device, modes))  # type: ignore[arg-type]

    fast, reasons = decided("cuda", _modes((1.0, 1.2), (0.6, 0.4)))
    assert list(fast.items()) == [("amp", "channels-last"), ("fp32", "contiguous")]
    assert "2.50 times" in reasons["train.precision"]
    assert "1.20 times the speed in fp32" in reasons["train.memory_format"]
    # A GTX 1060: halves are no faster, they only save memory.
    slow, _ = decided("cuda", _modes((1.0, 1.2), (0.98, 1.4)))
    assert list(slow) == ["fp32", "amp"]
    # A GTX 1660: fp16 convolutions that are no numbers.
    broken, reasons = decided("cuda", _modes((1.0, 1.2), (0.5, 0.5), finite=False))
    assert list(broken) == ["fp32"]
    assert "not finite" in reasons["train.precision"]
    with pytest.raises(PreflightError, match=r"not finite.*--precision fp32"):
        decided("cuda", _modes((1.0, 1.2), (0.5, 0.5), finite=False), train__precision="amp")
    assert list(decided("cpu", _modes((1.0, 0.5), (0.1, 0.1)))[0]) == ["fp32", "amp"]
    nothing, _ = decided("cuda", {("fp32", "contiguous"): Mode(1.0, True)})
    assert list(nothing.items()) == [("fp32", "contiguous"), ("amp", "contiguous")], "not even a block fitted"
    fixed, reasons = decided("cuda", _modes((1.0, 1.2), (0.6, 0.4)), train__memory_format="contiguous")
    assert set(fixed.values()) == {"contiguous"}
    assert "train.memory_format" not in reasons


def test_what_corrupts_memory_is_not_timed() -> None:
    """A thin net in fp32 and channels-last on the CPU, however fast it may be."""
    scripted = _Scripted("cpu", _modes((1.0, 0.5), (0.3, 0.2)))
    thin, _ = by_measurement(_config(), MODEL, scripted)  # type: ignore[arg-type]
    assert thin == {"fp32": "contiguous", "amp": "channels-last"}
    wide, _ = by_measurement(_config(), skeleton("res20", width=16), scripted)  # type: ignore[arg-type]
    assert set(wide.values()) == {"channels-last"}
    calibrator = Calibrator("cpu", Calibration(cpu_identity(), None))
    with pytest.raises(PreflightError, match="corrupts memory"):
        calibrator.modes([shape_of(MODEL, 4, layout="channels-last")])


def test_a_plan_by_what_this_processor_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {"model.arch": "res20", "model.width": 4, "train.batch": 4, "memory.tensors": "2M", "train.device": "cpu"}
    mode = ("train.precision=fp32", "train.memory_format=contiguous")  # otherwise all are timed
    settings = gather(flags=flags, sets=["memory.calibrate=always", *mode])
    told: list[str] = []
    phases: list[tuple[str, int | None, int | None]] = []

    class Progress(Silence):
        def note(self, text: str) -> None:
            told.append(text)

        def phase(self, what: str, done: int | None = None, total: int | None = None) -> None:
            phases.append((what, done, total))

    planned = decide(settings, tell=Progress(), on_paper=True).planned
    assert planned is not None
    choice = planned.choices[0]
    assert choice.timed
    assert choice.seconds_from == "measured on this device"
    assert any(line.startswith("measured the processor, once") for line in told)
    assert any(what.startswith("measuring the processor, once") for what, *_ in phases)
    stages = len(choice.plan.stages)
    costs = [(done, total) for what, done, total in phases if what.startswith("planning: costs")]
    assert costs == [(done, stages) for done in range(stages + 1)]
    assert any(what.startswith("planning: the fastest") for what, *_ in phases)
    assert choice.plan.predicted.step_seconds == pytest.approx(
        choice.plain_seconds * (1 + (choice.plan.predicted.overhead or 0))
    )
    told.clear()
    again = decide(settings, tell=Progress(), on_paper=True)
    assert told == [], "kept in the cache"
    assert again.plan == choice.plan
    assert list(tmp_path.glob("lowmem/calibration/*.json"))
    assert calibrator_of(gather(flags=flags).config) is None, "auto measures on CUDA only"
    assert (
        calibrator_of(gather(flags={**flags, "memory.card": "gtx1060-6g"}, sets=["memory.calibrate=always"]).config)
        is None
    )
    fresh = calibrator_of(settings.config, fresh=True)
    assert fresh is not None
    assert fresh.calibration.figures == {}, "measured again when asked to"
