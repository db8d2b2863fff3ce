"""Before the first step: outputs that read back differently stop a run, the trial step leaves no bit changed, and a dry
run leaves nothing at all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.choose.decide import DataSize, decide
from lowmem.cli.main import main
from lowmem.config.settings import Settings, gather, to_yaml
from lowmem.core.errors import ExitCode, OutOfMemory, PreflightError
from lowmem.data import load
from lowmem.lifecycle import execute as pipe
from lowmem.lifecycle import preflight as preflight_module
from lowmem.lifecycle.api import run_training
from lowmem.lifecycle.preflight import _time_line, preflight
from lowmem.plan.record import Plan
from lowmem.runs.store import RunFolder
from lowmem.runs.view import RunView
from lowmem.step.evaluate import Score
from lowmem.train.loop import Trainer
from lowmem.train.observer import Observer
from lowmem.train.trial_step import StepTrial, try_step
from tests.conftest import assert_same_run, environment
from tests.faults.injection import Scarce, events, make_trainer, recorded_plan, run

SETS = ("data.train_subset=120", "data.test_subset=50", "train.log_every_steps=1")
FLAGS = {
    "model.arch": "res20",
    "model.width": 2,
    "data.source": "shapes",
    "train.batch": 50,
    "train.epochs": 2,
    "train.memory_format": "contiguous",
    "train.precision": "fp32",
}
ARGUMENTS = [
    *("train", "--arch", "res20", "--width", "2", "--data", "shapes", "--batch", "50", "--epochs", "2"),
    *(argument for text in SETS for argument in ("--set", text)),
]


def _settings(*sets: str, **flags: object) -> Settings:
    return gather(flags={**FLAGS, **{key.replace("__", "."): v for key, v in flags.items()}}, sets=(*SETS, *sets))


def _trainer(settings: Settings, plan: Plan | None = None) -> Trainer:
    return make_trainer(settings, load(settings.config.data, settings.config.seed), plan)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """With at least two smaller ones below it."""
    plan = decide(_settings("memory.vram=6M"), DataSize(10, 120)).plan
    assert plan is not None
    assert len(plan.ladder) >= 2
    return plan


@contextmanager
def _folder(path: Path, settings: Settings) -> Iterator[RunFolder]:
    with RunFolder.create(path, to_yaml(settings), {}) as folder:
        yield folder


def _bits(trainer: Trainer) -> dict[str, Any]:
    """Everything that a step may change."""
    optimizer = trainer.optimizer
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {
        "model": {name: _frozen(tensor) for name, tensor in trainer.model.state_dict().items()},
        "slots": {
            names[parameter]: {slot: _frozen(value) for slot, value in own.items()}
            for parameter, own in optimizer.state.items()
        },
        "rates": [group["lr"] for group in optimizer.param_groups],
        "scaler": trainer.step.scaler.state_dict(),
        "notes": [hasattr(optimizer, note) for note in ("grad_scale", "found_inf")],
        "gradients": [parameter.grad for parameter in trainer.model.parameters()],
        "state": vars(trainer.state).copy(),
        "training": [module.training for module in trainer.model.modules()],
    }


def _frozen(value: object) -> object:
    return (value.stride(), value.numpy().tobytes()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("optim.momentum=0.0",),
        ("train.memory_format=channels-last", "model.width=16", "optim.nesterov=true"),
        ("memory.vram=6M",),
        ("train.precision=amp",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_step_is_undone_to_the_last_bit(
    tmp_path: Path, plan: Plan, sets: tuple[str, ...], steps_before: int
) -> None:
    settings = _settings(*sets)
    trainer = _trainer(settings, plan if settings.config.memory.vram is not None else None)
    # fp16 needs a card, its scaler does not; with every step the scale doubles.
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step in range(steps_before):
        trainer.step(*trainer.batches.batch(0, step), 0.05)
    trainer.state.step_in_epoch = trainer.state.step = steps_before
    before = _bits(trainer)
    with _folder(tmp_path / "run", settings) as folder:
        tried = try_step(trainer, folder)
    assert _bits(trainer) == before
    assert (tried.step_pictures, tried.score.count) == (20 if steps_before else 50, 50)
    assert tried.step_seconds > 0 < tried.evaluation_seconds


def test_a_run_with_preflight_is_the_run_without(tmp_path: Path) -> None:
    settings = _settings()
    with_it = run_training(settings, tmp_path / "with").path
    without = run(tmp_path / "without", settings, _trainer(settings))
    assert_same_run(with_it, without)
    assert not (with_it / ".preflight").exists()


# -- out of memory -----------------------------------------------------------------------------------------------------


def _scarce(trainer: Trainer, scarce: Scarce, failures: int) -> None:
    """Armed whenever a batch is fetched, until it has failed so often."""
    fetch = trainer.batches.batch

    def batch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if scarce.failures < failures:
            scarce.arm()
        return fetch(*args, **kwargs)

    trainer.batches.batch = batch  # type: ignore[method-assign]


@pytest.mark.parametrize("in_update", [False, True])
def test_out_of_memory_takes_the_next_plan(tmp_path: Path, plan: Plan, in_update: bool) -> None:
    settings = _settings("memory.vram=6M")
    trainer = _trainer(settings, plan)
    before = _bits(trainer)
    scarce = Scarce(set() if in_update else {30})
    scarce.fail_update = in_update
    _scarce(trainer, scarce, failures=2)
    with _folder(tmp_path / "run", settings) as folder, scarce:
        try_step(trainer, folder)
    assert scarce.failures == 2
    assert _bits(trainer) == before
    assert trainer.plan is not None
    assert trainer.plan.budget_bytes == plan.ladder[1].budget_bytes
    assert recorded_plan(tmp_path / "run").to_json() == trainer.plan.to_json()
    assert [event["phase"] for event in events(tmp_path / "run", "out-of-memory")] == [
        "update" if in_update else "forward"
    ] * 2


def test_out_of_memory_without_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, scarce = pipe.make_trainer, Scarce({30})

    def scarce_trainer(*args: Any) -> Trainer:
        trainer = make(*args)
        _scarce(trainer, scarce, failures=1)
        return trainer

    monkeypatch.setattr(pipe, "make_trainer", scarce_trainer)
    with pytest.raises(OutOfMemory, match=r"trial before the first step.*nothing was started.*--vram"), scarce:
        run_training(_settings(), tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_does_not_fit_is_tried_with_half_the_batch(tmp_path: Path) -> None:
    settings = _settings()
    trainer = _trainer(settings)
    scarce, fetch = Scarce({10}), trainer.dataset.test.take

    def take(*args: Any) -> Any:
        if scarce.failures < 1:
            scarce.arm()
        return fetch(*args)

    object.__setattr__(trainer.dataset.test, "take", take)
    with _folder(tmp_path / "run", settings) as folder, scarce:
        tried = try_step(trainer, folder)
    assert (scarce.failures, tried.score.count) == (1, 25)


# -- outputs -----------------------------------------------------------------------------------------------------------


def _harm(monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], None]) -> None:
    """A disk that gives back something else of one file, once it is in its place or is about to be read."""
    replace, read = os.replace, preflight_module.read_run

    def replacing(source: Any, target: Any) -> None:
        replace(source, target)
        if ".preflight" in str(target) and Path(target).name == name and not name.endswith(("csv", "jsonl")):
            harm(Path(target))

    def reading(path: Path) -> RunView:
        if name.endswith(("csv", "jsonl")):
            harm(path / name)
        return read(path)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(preflight_module, "read_run", reading)


def _other_digit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\n", 0, -1) + 1] ^= 1  # the first of the last line; the last ones of a float may mean nothing
    path.write_bytes(bytes(data))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("metrics.csv", _other_digit),
        ("steps.csv", _other_digit),
        ("gradients.csv", _other_digit),
        ("events.jsonl", _halve),
        ("best.safetensors", _flip),
        ("best.safetensors", _halve),
        ("report.md", _halve),
        ("step-00000000", lambda path: _flip(path / "optimizer.safetensors")),
    ],
)
def test_an_output_that_reads_back_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], None]
) -> None:
    _harm(monkeypatch, name, harm)
    with pytest.raises(PreflightError, match=name.partition(".")[0]):
        run_training(_settings(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_could_not_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(PreflightError, match=r"no matplotlib.*with pip"):
        run_training(_settings(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_start_is_spared_what_it_does_not_need(tmp_path: Path) -> None:
    """Two seconds of import each (torch 2.14)."""
    probe = (
        "import sys\n"
        "from lowmem.cli.main import main\n"
        "try:\n"
        f"    main({[*ARGUMENTS, '--out', str(tmp_path / 'run'), '--dry-run']!r})\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        "heavy = {'matplotlib', 'torchvision', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_plan_that_reads_back_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    settings = _settings("memory.vram=6M")
    _harm(monkeypatch, "plan.json", _halve)
    with _folder(tmp_path / "run", settings) as folder, pytest.raises(PreflightError, match=r"plan\.json"):
        preflight(_trainer(settings, plan), folder)


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_the_time_is_steps_evaluations_and_saves() -> None:
    trainer = _trainer(_settings("train.epochs=100", "data.val_split=20"))  # 100 pictures: 2 steps of 50 an epoch
    tried = StepTrial(6.0, 50, 3.0, Score(1.0, 50.0, 10), 2.0, 80.0, ("w",), (1.0,))
    # Evaluation: 3 s for 10 pictures, there are 50 and 20 held back: 21 s.
    assert _time_line(trainer, tried, 3.0).startswith("time: about 1:00:00 for 100 epochs of 2 steps: 6.000 s")
    trainer.state.epoch, trainer.state.step, trainer.state.step_in_epoch = 98, 197, 1
    assert _time_line(trainer, tried, 3.0).startswith("time: about 1:06 for 2 epochs")


def test_the_time_until_max_steps() -> None:
    trainer = _trainer(_settings("train.max_steps=3"))
    tried = StepTrial(10.0, 50, 5.0, Score(1.0, 50.0, 50), 2.0, 80.0, ("w",), (1.0,))
    # 120 pictures at 0.2 s are the three steps of the first epoch, which is evaluated and saved.
    assert _time_line(trainer, tried, 1.0).startswith("time: about 0:30 for 3 steps (train.max_steps)")


class Listener(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_disk_must_have_room_for_the_kept_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    listener = Listener()
    settings = _settings("train.epochs=400", "train.max_steps=1")
    run_training(settings, tmp_path / "roomy", listener)
    assert any(line.startswith("disk: ") and "3 checkpoints of " in line for line in listener.notes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2 * 2**20))
    run_training(settings, tmp_path / "tight")
    with pytest.raises(PreflightError, match=r"42 checkpoints of .*2 MiB free: .*keep fewer"):
        run_training(_settings("train.epochs=400", "checkpoint.keep_every=10"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- the dry run -------------------------------------------------------------------------------------------------------


def _leave(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.mark.parametrize("there", [(), ("runs",), ("runs", "runs/deep", "runs/deep/run")])
def test_a_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / name).mkdir()
    planned = [] if there else ["--vram", "6M"]
    assert _leave([*ARGUMENTS, *planned, "--out", "runs/deep/run", "--dry-run"]) == ExitCode.DONE
    out = capsys.readouterr().out
    for begins in ("preflight: ", "time: about ", "disk: ", "dry run: "):
        assert sum(line.startswith(begins) for line in out.splitlines()) == 1, out
    assert ("smaller plans" in out) == bool(planned)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == sorted(there)


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 0\n")
    assert _leave([*ARGUMENTS, "--out", str(tmp_path / "run"), "--dry-run"]) == ExitCode.USAGE
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"


def test_rows_of_the_trial_are_not_in_the_run(tmp_path: Path) -> None:
    path = run_training(_settings("train.max_steps=1"), tmp_path / "run").path
    assert len((path / "metrics.csv").read_text().splitlines()) == 1
    kinds = [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["start", "checkpoint", "stop"]
