"""What the commands do, from Python: `run_training`, `resume_training`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowmem import fork
from lowmem.choose import resolve_execution
from lowmem.choose.execution import require_device
from lowmem.config import Config, known_keys
from lowmem.data import Dataset, load
from lowmem.environment import describe
from lowmem.errors import CorruptCheckpoint, LowmemError, UsageError
from lowmem.models import build
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
    settings = resolve_execution(settings)
    path = Path(out) if out is not None else Path("runs") / settings.config.model.arch
    _refuse_existing(path)
    dataset = _load_data(settings.config, observer)
    environment = describe(settings.config.train.device)
    with RunFolder.create(path, to_yaml(settings), environment) as folder:
        try:
            trainer = _make_trainer(settings.config, dataset, observer)
            preflight(trainer, folder)
        except (LowmemError, KeyboardInterrupt):
            folder.discard()
            raise
        trainer.state.low_start = starts_low(settings.config)
        folder.event("start", **environment)
        observer.note(_headline(settings.config, dataset, path))
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
        trainer = _make_trainer(settings.config, _load_data(settings.config, observer), observer)
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


def _make_trainer(config: Config, dataset: Dataset, observer: Observer) -> Trainer:
    model = build(
        config.model.arch,
        config.model.block,
        width=config.model.width,
        num_classes=len(dataset.classes),
        seed=config.seed,
    )
    execution = Execution(config.train.device, config.train.precision, config.train.memory_format)
    identity = {"settings": config_hash(config), "data": dataset.fingerprint}
    return Trainer(config, model, dataset, execution, identity, observer)


def _headline(config: Config, dataset: Dataset, path: Path) -> str:
    model, train = config.model, config.train
    held = f", {len(dataset.val.labels):,} held back" if dataset.val is not None else ""
    return (
        f"{model.arch} ({model.block}, width {model.width}) on {dataset.name}: {len(dataset.train.labels):,} pictures "
        f"to train on{held}, {len(dataset.test.labels):,} to test; {train.epochs} epochs, batch {train.batch}, "
        f"{train.precision}, {train.memory_format}, {train.device}; run folder {path}"
    )
