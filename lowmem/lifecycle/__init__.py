"""A run from its beginning to its end. What the commands do, from Python: `run_training`, `resume_training`,
`fork_run`, `extend_run`. Each makes a way to begin, and `execute` does the rest. A run that is there is looked at
first, so that what is mistyped is refused before torch is imported. The route of `lowmem train`, twelve rooms, each
called from above it only:

 1. `cli` makes settings of flags, by the schema and the order of precedence in 2. `config`, and calls
 3. `lifecycle`: `execute` takes a new run, a resume (`begin`) or a `fork` the same way, in this order. In
 4. `distributed` the processes that torchrun has started become one group; one process is a group of one.
    `open` makes one value of new, resume or fork, the settings as they are asked for, with what is recorded.
 5. `data` gives the pictures.
 6. `choose` decides once what is trained, precision, batch and plan, by what 7. `simulate` predicts and what
 8. `calibrate` has measured; 9. `trial` tries it in a process of its own. A run without a budget passes through.
10. `train` puts network, optimizer and batches together.
    `commit`: preflight and the first checkpoint; or rows cut back; or rows and state carried over. Then
    `train` trains, by 11. `step`, and saves by 12. `runs`, which keeps the folder under its lock.
Before the commit whatever goes wrong leaves nothing behind; after it the run can be resumed, whatever happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.config.networks import refuse_changed_files
from lowmem.config.paths import where_else
from lowmem.config.refusals import refuse_missing_pictures, refuse_unknown_cards
from lowmem.config.schema import Config, flatten, known_keys
from lowmem.config.settings import Settings, refuse_changes
from lowmem.core.errors import UsageError
from lowmem.core.reading import shorten
from lowmem.core.units import counted
from lowmem.distributed.launch import Launch, refuse_several
from lowmem.runs.folder import refuse_existing
from lowmem.runs.view import recorded_settings
from lowmem.train.observer import Observer

if TYPE_CHECKING:
    from lowmem.train.loop import Outcome

__all__ = [
    "extend_run", "fork_folder", "fork_run", "recorded_settings", "resume_training", "run_folder", "run_training",
]  # fmt: skip


def run_folder(config: Config) -> Path:
    """Where a new run is made, if nobody says where."""
    return Path("runs") / config.model.name


def fork_folder(source: Path) -> Path:
    """Where a fork of `source` is made, if nobody says where."""
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name(f"{source.name}-fork")


def run_training(
    config: Config | Settings, out: Path | str | None = None, observer: Observer | None = None, *, dry_run: bool = False
) -> Outcome:
    """What `lowmem train` does: load the data, make the run folder (default `runs/NETWORK`), preflight, train. Started
    by torchrun, the processes do it together; rank 0 writes.

    `dry_run`: all of that up to the first step, and then nothing of it stays. Raises LowmemError: UsageError if the
    folder exists, PreflightError before the first step, Interrupted after a signal with everything saved, DiskError,
    PeerLost.
    """
    settings = config if isinstance(config, Settings) else Settings(config, dict.fromkeys(known_keys(), "caller"))
    path, observer = Path(out) if out is not None else run_folder(settings.config), observer or Observer()
    if Launch.of_environment() is None:  # else rank 0 looks, when they have come together
        refuse_unknown_cards(settings.config)
        refuse_existing(path)
        refuse_missing_pictures(settings.config)
    with observer.loading("torch"):
        from lowmem.lifecycle.begin import New
        from lowmem.lifecycle.execute import execute

    return execute(New(settings, path, dry_run=dry_run), observer)


def resume_training(
    path: Path | str, changes: Settings | Mapping[str, object] | None = None, observer: Observer | None = None
) -> Outcome:
    """What `lowmem resume` does: go on from the newest checkpoint that verifies, in the middle of its epoch. Started by
    torchrun, the processes do it together, also of a run that another number of them began.

    `changes`: operational settings that are replaced (see `config.OPERATIONAL`), dotted name -> value, or the recorded
    settings with them. Raises UsageError if the folder is no run or anything else differs, CorruptCheckpoint if nothing
    can be resumed, PeerLost.
    """
    # Of several processes one has the folder, perhaps on another machine: they look together.
    recorded = recorded_settings(Path(path)) if Launch.of_environment() is None else None
    given = flatten(changes.config) if isinstance(changes, Settings) else dict(changes or {})
    if recorded is not None:
        before = flatten(recorded.config)
        given = {key: value for key, value in given.items() if key not in before or before[key] != value}
        wanted = recorded.replace(given, "resume").config
        decided = {key: value for key, value in given.items() if value != "auto"}  # the rest, when torch is there
        refuse_changes(recorded.config, recorded.replace(decided, "resume").config, str(path))
        refuse_missing_pictures(wanted, where_else(wanted, flags=True))
        refuse_changed_files(recorded.config.model.spec, recorded.config.model.sha256)

    observer = observer or Observer()
    with observer.loading("torch"):
        from lowmem.lifecycle.begin import Resume
        from lowmem.lifecycle.execute import execute

    return execute(Resume(Path(path), given, recorded), observer)


def fork_run(
    source: Path | str,
    *,
    at: int | str,
    changes: Mapping[str, object],
    out: Path | str | None = None,
    observer: Observer | None = None,
    dry_run: bool = False,
) -> Outcome:
    """What `lowmem fork` does: a new run (default `SOURCE-fork`) from a checkpoint of an old one, trained to its end.

    `at`: the end of an epoch by its number, `"step:4692"`, or `"last"`. `changes`: dotted names with their new values;
    see `lowmem.lifecycle.fork` for what becomes of the schedule and of an epoch that was begun. `dry_run`: as in
    `run_training`. Raises UsageError if nothing changes, the network would, or there is no such checkpoint; the old run
    is only read.
    """
    refuse_several("lowmem fork")
    source = Path(source)
    if source.name in ("", ".."):
        source = source.resolve()
    path = Path(out) if out is not None else fork_folder(source)
    if path.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"{path} lies inside of {source}, which a fork leaves as it is: choose another folder with --out"
        )
    recorded, observer = recorded_settings(source), observer or Observer()
    wanted = recorded.replace(changes, f"fork of {shorten(source.name)}").config
    refuse_missing_pictures(wanted, where_else(wanted, flags=False))
    refuse_existing(path)
    if "model.spec" not in changes:
        refuse_changed_files(recorded.config.model.spec, recorded.config.model.sha256)
    with observer.loading("torch"):
        from lowmem.lifecycle.execute import execute
        from lowmem.lifecycle.fork import Fork
        from lowmem.lifecycle.run_identity import as_trained

    return execute(Fork(source, as_trained(source, recorded)[0], at, changes, path, dry_run=dry_run), observer)


def extend_run(
    path: Path | str,
    *,
    epochs: int,
    changes: Mapping[str, object] | None = None,
    out: Path | str | None = None,
    observer: Observer | None = None,
) -> Outcome:
    """What `lowmem resume --epochs` does: a fork from the run's newest checkpoint that goes on to `epochs` epochs; an
    ordinary resume if that is what the run has anyway.

    `changes`: further settings, dotted name -> value. Raises as `fork_run` and `resume_training` do.
    """
    observer, path = observer or Observer(), Path(path)
    recorded = recorded_settings(path)
    with observer.loading("torch"):
        from lowmem.lifecycle.run_identity import as_trained

    before = as_trained(path, recorded)[0].config.train.epochs
    if epochs == before:
        if out is not None:
            raise UsageError(f"{path} is a run of {counted(epochs, 'epoch')}: leave --out out to go on with it")
        return resume_training(path, changes, observer)
    observer.note(
        f"{path} is a run of {counted(before, 'epoch')} and stays one: with --epochs {epochs} a new run forks off from "
        "its newest checkpoint"
    )
    return fork_run(path, at="last", changes={**(changes or {}), "train.epochs": epochs}, out=out, observer=observer)
