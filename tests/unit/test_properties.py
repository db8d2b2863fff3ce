"""Everything that is written is read back as it was, for any values it may hold; anything else is one exception."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lowmem.calibrate.calibrator import Calibration, Identity, Mode, Seconds
from lowmem.config.cards import Card, load_card
from lowmem.config.networks import ARCHITECTURES, BLOCK_LAYOUT
from lowmem.config.schema import Config, flatten, known_keys, nest
from lowmem.config.settings import Settings, from_yaml, gather, read_recipe, to_yaml
from lowmem.core.errors import CorruptCheckpoint, LowmemError, UsageError
from lowmem.plan.policy import LEAN, SAVE_ALL, Keep, Schedule, Segment, keep
from lowmem.plan.record import Candidate, Plan, Predicted
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint_state import Best, RunState, read_state

IN_A_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12)
POSITIVE = st.floats(1e-9, 1e9)
SMALL = st.integers(1, 4096)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    arch = draw(st.sampled_from(ARCHITECTURES))
    block = draw(st.sampled_from([block for depth, block in BLOCK_LAYOUT if depth == int(arch[3:])]))
    batch = draw(SMALL)
    flat: dict[str, object] = {
        "recipe": draw(TEXT),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "model.arch": arch,
        "model.block": block,
        "model.width": draw(SMALL),
        "data.source": draw(st.sampled_from(["cifar10", "shapes"]) | TEXT.map(lambda path: f"folder:{path}")),
        "data.root": draw(TEXT),
        "data.cache": draw(st.none() | TEXT),
        "data.val_split": draw(st.integers(0, 10**6)),
        "optim.lr": draw(POSITIVE),
        "optim.momentum": draw(st.floats(0, 0.999)),
        "schedule.milestones": sorted(draw(st.sets(POSITIVE, max_size=4))),
        "train.epochs": draw(SMALL),
        "train.batch": batch,
        "train.micro_batch": draw(st.none() | st.integers(1, batch)),
        "train.precision": draw(st.sampled_from(["auto", "fp32", "amp"])),
        draw(st.sampled_from(["memory.vram", "memory.tensors"])): draw(st.none() | st.integers(2**26, 2**50)),
        "checkpoint.every_minutes": draw(st.none() | POSITIVE),
        "checkpoint.keep": draw(st.integers(2, 100)),
    }
    return Config.model_validate(nest(flat))


@given(configs(), st.sampled_from(["flag", "default", "--set", "a file.yaml"]))
@IN_A_FOLDER
def test_settings_come_back_with_their_sources(tmp_path: Path, config: Config, source: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(Settings(config, dict.fromkeys(known_keys(), source))), encoding="utf-8")
    back = from_yaml(path)
    assert back.config == config
    assert back.sources["optim.lr"] == source
    assert gather(config_file=path, flags={"recipe": None}, recipe="report").config.optim == config.optim


@given(st.dictionaries(st.sampled_from(known_keys()), PLAIN, max_size=4))
@IN_A_FOLDER
def test_any_values_are_settings_or_refused_in_a_line(tmp_path: Path, flat: dict[str, Any]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(flat, allow_unicode=True), encoding="utf-8")
    for read in (lambda: gather(config_file=path), lambda: gather(recipe=str(path)), lambda: from_yaml(path)):
        try:
            config = read().config
        except UsageError as error:
            _one_line(error)
        else:
            assert Config.model_validate(nest(flatten(config))) == config
    plain = {key: value for key, value in flat.items() if key != "recipe" and not isinstance(value, dict)}
    assert plain.keys() <= read_recipe(str(path)).keys()


def _one_line(error: LowmemError) -> None:
    assert str(error)
    assert "\n" not in str(error)


CARD = {
    "name": "A", "memory": "6G", "capability": "6.1", "bandwidth_gb_per_second": 192.0, "fp32_tflops": 4.38,
    "fp16": "1/64", "pcie": "3.0x16", "context": "300M",
    "usable": {"linux": 0.97, "linux_display": 0.9, "windows": 0.81},
}  # fmt: skip


@given(TEXT, st.integers(2**26, 2**40), POSITIVE.filter(lambda rate: rate <= 1e6), st.floats(0.01, 1))
@IN_A_FOLDER
def test_a_card_comes_back(tmp_path: Path, name: str, memory: int, rate: float, share: float) -> None:
    values = CARD | {
        "name": name,
        "memory": memory,
        "fp32_tflops": rate,
        "usable": dict.fromkeys(CARD["usable"], share),
    }
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    card = load_card(str(path))
    assert card == Card.model_validate(values)
    assert (card.name, card.memory_bytes, card.fp32_flops_per_second) == (name, memory, rate * 1e12)
    assert 0 <= int(card.memory_bytes * card.usable.windows) <= memory


@given(st.dictionaries(st.sampled_from([*CARD, "more"]), PLAIN, max_size=3))
@IN_A_FOLDER
def test_any_values_are_a_card_or_refused_in_a_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(CARD | changes, allow_unicode=True), encoding="utf-8")
    try:
        assert load_card(str(path)).usable.linux >= 0
    except UsageError as error:
        _one_line(error)


# -- plans -------------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn, start: int, end: int, depth: int = 0) -> Schedule:
    items: list[Keep | Segment] = []
    while start <= end:
        last = draw(st.integers(start, end))
        if depth < 3 and draw(st.booleans()):
            items.append(Segment(start, last, draw(schedules(start, last, depth + 1))))
            start = last + 1
        else:
            items.append(
                Keep(
                    start,
                    draw(st.sampled_from([SAVE_ALL, LEAN, keep(), keep("conv1", "shortcut.0"), keep("relu_2", "z10")])),
                )
            )
            start += 1
    return Schedule(tuple(items))


CANDIDATES = st.builds(Candidate, what=TEXT, step_seconds=st.none() | POSITIVE)


@st.composite
def plans(draw: st.DrawFn, ladder: bool = True) -> Plan:
    stages = draw(st.integers(1, 8))
    batch = draw(st.integers(1, 512))
    micro = draw(st.integers(1, batch))
    return Plan(
        budget_bytes=draw(st.none() | st.integers(1, 2**50)),
        batch=batch,
        micro_batch=micro,
        accumulation=-(-batch // micro),
        precision=draw(st.sampled_from(["fp32", "amp"])),
        memory_format=draw(st.sampled_from(["contiguous", "channels-last"])),
        batch_norm=draw(st.sampled_from(["library", "native"])),
        tf32=draw(st.none() | st.booleans()),
        allocator_bytes=draw(st.none() | st.integers(0, 2**50)),
        exact=draw(st.booleans()),
        stages=tuple(f"stage{n}" for n in range(stages)),
        schedule=draw(schedules(0, stages - 1)),
        predicted=Predicted(
            peak_allocated_bytes=draw(st.none() | st.integers(0, 2**50)), overhead=draw(st.none() | POSITIVE)
        ),
        candidates=tuple(draw(st.lists(CANDIDATES, max_size=2))),
        ladder=tuple(draw(st.lists(plans(ladder=False), max_size=2))) if ladder else (),
    )  # fmt: skip


@given(plans())
@settings(max_examples=30)
def test_a_plan_comes_back(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(plans(ladder=False), st.data())
@settings(max_examples=80)
def test_any_values_are_a_plan_or_refused(plan: Plan, data: st.DataObject) -> None:
    values = plan.to_json()
    holder = data.draw(st.sampled_from([values, values["predicted"], values["schedule"][0]]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(PLAIN)
    try:
        read = Plan.from_json(values)
    except ValueError:
        return
    assert Plan.from_json(json.loads(json.dumps(read.to_json()))).batch == read.batch
    assert all(type(number) is int for number in (read.batch, read.micro_batch, read.accumulation))


# -- checkpoints -------------------------------------------------------------------------------------------------------

COUNT = st.integers(0, 10**9)
STATES = st.builds(
    RunState,
    epoch=COUNT, step=st.integers(5, 10**9), step_in_epoch=st.just(5), seen=st.integers(1, 10**6),
    loss_sum=st.floats(-1e9, 1e9) | st.just(float("inf")), wrong=st.floats(0, 1e6), low_start=st.booleans(),
    best=st.none() | st.builds(Best, epoch=COUNT, step=COUNT, error_pct=st.floats(0, 100), chosen_on=TEXT),
    elapsed_seconds=st.floats(0, 1e9), train_seconds=st.floats(0, 1e9),
)  # fmt: skip


@given(STATES, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**32))
@IN_A_FOLDER
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, run: RunState, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = {
        "a": torch.randn(shape, generator=generator),
        "b": torch.tensor(seed),
        "c": torch.full(shape, float("nan")),
    }
    saved = checkpoints.Checkpoint(run.step, model, {}, {"run": asdict(run), "identity": {"data": "x"}})
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # later steps of another example would be kept instead
    back = checkpoints.load(checkpoints.save(tmp_path / "run", saved, keep=2))
    assert back.state == saved.state
    assert {name: tensor.numpy().tobytes() for name, tensor in back.model.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in model.items()
    }
    read_state(back.state, run.step)
    assert RunState(**{**back.state["run"], "best": run.best}) == run


@given(STATES, st.sampled_from([*asdict(RunState())]), PLAIN)
def test_any_state_is_a_state_or_refused(run: RunState, name: str, value: Any) -> None:
    values = asdict(run) | {name: value}
    try:
        read_state({"run": values, "identity": {}}, run.step)
    except CorruptCheckpoint as error:
        _one_line(error)
    else:
        assert type(values["step"]) is int
        assert values["step"] == run.step


@given(st.lists(st.sampled_from(["format", "version", "step", "files"]), min_size=1), PLAIN)
@IN_A_FOLDER
def test_any_manifest_is_refused(tmp_path: Path, keys: list[str], value: Any) -> None:
    """But the one that was written."""
    one = checkpoints.Checkpoint(4, {"a": torch.zeros(2)}, {}, {"run": {}, "identity": {}})
    folder = checkpoints.save(tmp_path, one, keep=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = manifest | dict.fromkeys(keys, value)
    if changed == manifest:
        return
    (folder / "manifest.json").write_text(json.dumps(changed, indent=1))
    with pytest.raises(CorruptCheckpoint):
        checkpoints.load(folder)


# -- calibrations ------------------------------------------------------------------------------------------------------

IDENTITY = Identity(device="cpu", name="c", driver=None, torch="2", library=None)
SPAN = st.floats(0, 1e6)


@given(st.dictionaries(TEXT, st.tuples(SPAN, SPAN, SPAN), max_size=4), SPAN, st.booleans(), st.integers(0, 2**50))
@IN_A_FOLDER
def test_a_calibration_comes_back(
    tmp_path: Path, times: dict[str, tuple[float, float, float]], span: float, finite: bool, size: int
) -> None:
    kept = Calibration(IDENTITY, tmp_path)
    kept.figures.clear()
    for key, values in times.items():
        kept.put("seconds", key, list(values))
    kept.put("mode", "m", [span, float(finite)])
    kept.put("bytes", "s", size)
    kept.save()
    back = Calibration(IDENTITY, tmp_path)
    assert {key: back.seconds(key) for key in times} == {key: Seconds(*values) for key, values in times.items()}
    assert (back.mode("m"), back.size_bytes("s")) == (Mode(span, finite), size)


@given(PLAIN, PLAIN)
@IN_A_FOLDER
def test_any_figures_are_figures_or_not_there(tmp_path: Path, figure: Any, whole: Any) -> None:
    kept = Calibration(IDENTITY, tmp_path)
    kept.put("seconds", "a", [1, 2, 0])
    kept.put("bytes", "b", 3)
    kept.figures = dict.fromkeys(kept.figures, figure)
    kept.save()
    back = Calibration(IDENTITY, tmp_path)
    seconds, size = back.seconds("a"), back.size_bytes("b")
    assert seconds is None or seconds.forward >= 0
    assert size is None or size >= 0
    assert kept.path is not None
    kept.path.write_text(json.dumps(whole))
    assert Calibration(IDENTITY, tmp_path).figures == {}


def test_bounds_are_bounds() -> None:
    """What a file may ask for, and one more."""
    for key, most in (("model.width", 4096), ("train.epochs", 10**6), ("train.batch", 1 << 24), ("seed", 2**64 - 1)):
        Config.model_validate(nest({key: most}))
        with pytest.raises(ValidationError):
            Config.model_validate(nest({key: most + 1}))
