"""What is read of a run before it goes on: its settings, the newest checkpoint that verifies, what was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowmem.choose import resolve_execution
from lowmem.choose.execution import require_device
from lowmem.config.schema import Config, known_keys
from lowmem.config.settings import Settings, from_yaml, refuse_changes
from lowmem.core.errors import UsageError
from lowmem.core.reading import RECORD_LIMIT_BYTES, read_json, shorten
from lowmem.distributed.group import Group
from lowmem.lifecycle.run_identity import belongs_to, most_bytes
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.setup import never_began, start_again
from lowmem.runs.store import RunFolder, require_run
from lowmem.train.metrics import check_tensorboard
from lowmem.train.observer import Observer
from lowmem.train.state import share_checkpoint

# The checkpoint, where it lies, and those that were skipped: why.
Found = tuple[Checkpoint, Path, dict[Path, str]]


def device_only(given: Mapping[str, object]) -> Config:
    """What joining the other processes takes, of the settings given: the run's own are not at hand yet."""
    wanted: dict[str, object] = {
        key: given[key] for key in ("train.device", "train.peer_timeout_minutes") if key in given
    }
    alone = Settings(Config(), dict.fromkeys(known_keys(), "default"))
    return resolve_execution(alone.replace(wanted, "resume")).config


def recorded_settings(path: Path) -> Settings:
    """The settings of an existing run. Raises UsageError if it is none."""
    require_run(path)
    return from_yaml(path / "config.yaml")


def changed_settings(recorded: Settings, changed: Settings, path: Path) -> Settings:
    settings = resolve_execution(changed)
    refuse_changes(recorded.config, settings.config, str(path))
    require_device(settings.config.train.device)
    check_tensorboard(settings.config)
    return settings


def newest(folder: RunFolder, config: Config, observer: Observer) -> Found:
    """The checkpoint to go on from, and what was skipped. Raises UsageError, CorruptCheckpoint."""
    if never_began(folder.path):
        raise UsageError(start_again(folder.path))
    if folder.taken_over is not None:
        observer.note(f"{folder.path} is taken over from {folder.taken_over}, which ended without leaving it")
    saved, where, skipped = checkpoints.load_newest(folder.checkpoints, belongs_to(config), most_bytes(config))
    for reason in skipped.values():
        observer.warning(f"skipped a damaged checkpoint: {reason}")
        folder.event("warning", what="checkpoint skipped", reason=reason)
    return saved, where, skipped


# What decides the last bits of the arithmetic, as `environment.describe` calls it.
_ARITHMETIC = ("torch", "device", "card", "cuda", "cudnn", "tf32", "cpu_capability", "cpu_threads")


def elsewhere(path: Path, now: Mapping[str, object]) -> str | None:
    """What is not as it was where the run began, if that can change the last bits of its arithmetic, in words. `now`:
    see `environment.describe`. An env.json that cannot be read tells nothing."""
    try:
        then = read_json(path / "env.json", RECORD_LIMIT_BYTES)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(then, dict):
        return None
    on_cpu = now.get("device") == "cpu" and then.get("device") == "cpu"
    names = [name for name in _ARITHMETIC if name in then and (on_cpu or not name.startswith("cpu_"))]
    changed = [f"{name} {shorten(then[name])} -> {now[name]}" for name in names if then[name] != now[name]]
    if not changed:
        return None
    return f"not as where the run began ({', '.join(changed)}): from here on the last bits may differ"


def tidy(folder: RunFolder, skipped: dict[Path, str], config: Config) -> None:
    checkpoints.set_aside(skipped)
    folder.tidy(keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)


def keeping(recorded: Settings, settings: Settings) -> Settings:
    """The recorded settings with which checkpoints are kept: the next resume would delete what this one was told to
    keep."""
    kept = settings.config.checkpoint
    return recorded.replace({"checkpoint.keep": kept.keep, "checkpoint.keep_every": kept.keep_every}, "resume")


def shared_checkpoint(group: Group, found: Found | None) -> tuple[Checkpoint, Path]:
    """What rank 0 has found, in every process."""
    shared = share_checkpoint(group, None if found is None else found[:2])
    assert shared is not None
    return shared
