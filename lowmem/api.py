"""What the commands do, from Python: `run_training`, `resume_training`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lowmem import fork
from lowmem.choose import resolve_execution
from lowmem.choose.budget import ASSUMED_CONTEXT_BYTES
from lowmem.choose.execution import require_device
from lowmem.choose.explain import explain, inexact
from lowmem.choose.planning import Choice, choose
from lowmem.choose.session import plan_run, replan, request_of, wants_plan
from lowmem.config import Config, known_keys
from lowmem.data import Dataset, load
from lowmem.environment import describe
from lowmem.errors import CorruptCheckpoint, LowmemError, UsageError
from lowmem.models import build
from lowmem.plan.record import Plan
from lowmem.preflight import preflight
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.store import RunFolder, require_run
from lowmem.settings import Settings, from_yaml, refuse_changes, to_yaml
from lowmem.train.loop import Outcome, Trainer
from lowmem.train.observer import Observer
from lowmem.train.schedule import starts_low
from lowmem.train.state import config_hash, restore
from lowmem.train.step import Execution


@dataclass(frozen=True)
class RunResult:
    """The folder of a run and how it ended."""

    path: Path
    outcome: Outcome


def run_training(
    config: Config | Settings, out: Path | str | None = None, observer: Observer | None = None
) -> RunResult:
    """What `lowmem train` does: load the data, make the run folder (default `runs/<arch>`), preflight, train.

    Raises LowmemError: UsageError if the folder exists, PreflightError before the first step, Interrupted after a
    signal with everything saved, DiskError.
    """
    observer = observer or Observer()
    settings = config if isinstance(config, Settings) else Settings(config, dict.fromkeys(known_keys(), "caller"))
    planned = wants_plan(resolve_execution(settings).config)
    settings = resolve_execution(settings, leave_precision=planned)
    if settings.config.memory.auto_batch and not planned:
        raise UsageError("--batch auto needs something to fit into: give --vram, like --vram 6G")
    path = Path(out) if out is not None else Path("runs") / settings.config.model.arch
    _refuse_existing(path)
    dataset = _load_data(settings.config, observer)
    choice: Choice | None = None
    if planned:
        settings, choice = plan_run(settings, len(dataset.classes), len(dataset.train.labels))
        for line in explain(choice):
            observer.note(line)
        if not choice.plan.exact:
            observer.warning(inexact(choice.plan))
    plan = choice.plan if choice else None
    environment = describe(settings.config.train.device)
    with RunFolder.create(path, to_yaml(settings), environment) as folder:
        try:
            trainer = _make_trainer(settings.config, dataset, observer, plan)
            preflight(trainer, folder)
            if plan is not None:
                folder.write_plan(plan.to_json())
            trainer.state.low_start = starts_low(settings.config)
            # From here on a run can be resumed, however early it is killed.
            checkpoints.save(folder.checkpoints, trainer.checkpoint(), keep=settings.config.checkpoint.keep)
        except (LowmemError, KeyboardInterrupt):
            folder.discard()
            raise
        folder.event("start", **environment)
        if plan is not None and not plan.exact:
            folder.event("warning", what=inexact(plan))
        observer.note(_headline(settings.config, dataset, path))
        _cap_emulated(settings.config)
        return RunResult(path, trainer.run(folder))


def resume_training(path: Path | str, changes: Settings | None = None, observer: Observer | None = None) -> RunResult:
    """What `lowmem resume` does: go on from the newest checkpoint that verifies, in the middle of its epoch.

    `changes`: the recorded settings with operational ones replaced (see `config.OPERATIONAL`). Raises UsageError if
    the folder is no run or anything else differs, CorruptCheckpoint if nothing can be resumed.
    """
    observer = observer or Observer()
    path = Path(path)
    recorded = recorded_settings(path)
    settings = resolve_execution(changes or recorded)
    refuse_changes(recorded.config, settings.config, str(path))
    require_device(settings.config.train.device)
    with RunFolder.open(path) as folder:
        if not checkpoints.found(folder.checkpoints):
            raise CorruptCheckpoint(
                f"{path} was stopped before its first checkpoint, nothing is lost: delete it and start again"
            )
        saved, where, skipped = checkpoints.load_newest(folder.checkpoints)
        for reason in skipped:
            observer.warning(f"skipped a damaged checkpoint: {reason}")
            folder.event("warning", what="checkpoint skipped", reason=reason)
        dataset = _load_data(settings.config, observer)
        plan = _recorded_plan(folder, recorded.config, settings.config, len(dataset.classes), observer)
        trainer = _make_trainer(settings.config, dataset, observer, plan)
        trainer.state = restore(saved, trainer.model, trainer.optimizer, trainer.scaler, trainer.identity)
        state = trainer.state
        folder.cut_back(epoch=state.epoch, step=state.step)
        folder.event(
            "resume",
            checkpoint=where.name,
            epoch=state.epoch,
            step=state.step,
            **describe(settings.config.train.device),
        )
        if state.epoch >= settings.config.train.epochs:
            observer.note(f"{path} is finished: all {state.epoch} epochs are done")
        else:
            observer.note(f"resuming {path} from {where.name}: epoch {state.epoch + 1}, step {state.step_in_epoch}")
        _cap_emulated(settings.config)
        return RunResult(path, trainer.run(folder))


def fork_run(
    source: Path | str,
    *,
    at: int,
    changes: Settings,
    out: Path | str | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """What `lowmem fork` does: a new run (default `SOURCE-fork`) from the end of epoch `at`, trained to its end.

    `changes`: the recorded settings with some replaced. Raises UsageError if nothing changes, the network would, or
    there is no such checkpoint; the old run is only read.
    """
    observer = observer or Observer()
    source = Path(source)
    path = Path(out) if out is not None else source.with_name(f"{source.name}-fork")
    _refuse_existing(path)
    old, settings = recorded_settings(source).config, resolve_execution(changes)
    differing = fork.check(old, settings.config)
    saved, where = fork.find(source, at)
    dataset = _load_data(settings.config, observer)
    carried = fork.carry_over(saved, old, settings.config, dataset)
    for line in fork.explain(differing, old, settings.config, at, fork.steps_per_epoch(settings.config, dataset)):
        observer.note(line)
    with RunFolder.create(path, to_yaml(settings), describe(settings.config.train.device)) as folder:
        fork.write(carried, source, settings, folder, where)
    return resume_training(path, None, observer)


def recorded_settings(path: Path) -> Settings:
    """The settings of an existing run. Raises UsageError if it is none."""
    require_run(path)
    return from_yaml(path / "config.yaml")


def _refuse_existing(path: Path) -> None:
    """The same refusal as `RunFolder.create`, before minutes are spent on decoding pictures."""
    if path.is_dir() and any(path.iterdir()):
        RunFolder.create(path, "", {})
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another folder with --out")


def _load_data(config: Config, observer: Observer) -> Dataset:
    return load(config.data, config.seed, progress=observer.data_progress)


def _recorded_plan(folder: RunFolder, old: Config, new: Config, num_classes: int, observer: Observer) -> Plan | None:
    """The plan the run recorded; another only if another budget is asked for, and then as a logged event (invariant 7).

    Raises CorruptCheckpoint for a damaged plan.json, Infeasible.
    """
    recorded = folder.read_plan()
    if recorded is None and not wants_plan(new):
        return None
    try:
        plan = None if recorded is None else Plan.from_json(recorded)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{folder.path / 'plan.json'} holds no plan ({error}): restore it") from None
    if plan is not None and (old.memory.vram, old.memory.card) == (new.memory.vram, new.memory.card):
        return plan
    if plan is None:
        # The run was unplanned: what it computes is the plain step at its own micro-batch.
        request = request_of(new, num_classes)
        choice = choose(replace(request, allow_accumulation=False, micro_batch=new.train.micro_batch))
    else:
        choice = replan(new, plan, num_classes)
    folder.write_plan(choice.plan.to_json())
    folder.event("replan", budget_bytes=choice.plan.budget_bytes)
    for line in explain(choice):
        observer.note(line)
    return choice.plan


def _cap_emulated(config: Config) -> None:
    """A larger card made to behave like one of --vram: the allocator's segments and the context stay within it."""
    if config.train.device == "cuda" and config.memory.vram is not None:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        share = (config.memory.vram - ASSUMED_CONTEXT_BYTES) / total
        if 0 < share < 1:
            torch.cuda.set_per_process_memory_fraction(share)


def _make_trainer(config: Config, dataset: Dataset, observer: Observer, plan: Plan | None) -> Trainer:
    model = build(
        config.model.arch,
        config.model.block,
        width=config.model.width,
        num_classes=len(dataset.classes),
        seed=config.seed,
    )
    execution = Execution(config.train.device, config.train.precision, config.train.memory_format)
    identity = {"settings": config_hash(config), "data": dataset.fingerprint}
    return Trainer(config, model, dataset, execution, identity, observer, plan)


def _headline(config: Config, dataset: Dataset, path: Path) -> str:
    model, train = config.model, config.train
    held = f", {len(dataset.val.labels):,} held back" if dataset.val is not None else ""
    return (
        f"{model.arch} ({model.block}, width {model.width}) on {dataset.name}: {len(dataset.train.labels):,} pictures "
        f"to train on{held}, {len(dataset.test.labels):,} to test; {train.epochs} epochs, batch {train.batch}, "
        f"{train.precision}, {train.memory_format}, {train.device}; run folder {path}"
    )
