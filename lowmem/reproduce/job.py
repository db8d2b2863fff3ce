"""A job on disk: a folder with `job.json` (the settings that all runs share), a lock while somebody conducts it, and
the folder of each run. Which runs there are, what may differ from one call to the next, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem.config.paths import as_meant, started_in
from lowmem.config.schema import OPERATIONAL, OWN_NETWORK, flatten, known_keys
from lowmem.config.settings import UNUSED, Settings, from_yaml, of_older_run, validate
from lowmem.core.errors import DiskError, PreflightError, UsageError
from lowmem.core.reading import SETTINGS_LIMIT_BYTES, Unreadable, read_json, shorten
from lowmem.core.units import name_some
from lowmem.runs.atomic import PARTIAL, write_text_atomic
from lowmem.runs.folder import JOB as FILE_NAME
from lowmem.runs.folder import never_began
from lowmem.runs.lock import RunLock

_FILES = frozenset({FILE_NAME, "job.lock", "job.owner.json"})  # of the job itself
_PER_RUN = frozenset({"model.arch", "model.block", *OWN_NETWORK})  # what each run has of its own
# What a run decides for itself where the job says `auto`.
_DECIDED = ("train.precision", "train.memory_format")
_BY_AUTO_BATCH = frozenset({"memory.auto_batch", "train.batch", "optim.lr", "schedule.low_start_lr"})


@dataclass(frozen=True)
class Member:
    """A run of the job. `name` is that of its folder."""

    name: str
    arch: str
    block: str


# The cheapest first: what is wrong with the machine or the settings shows within the first hours.
REPORTED = tuple(Member(name, name, "basic") for name in ("res20", "cnn20", "res56", "cnn56", "res110", "cnn110"))
# Those that the homework report names and its author's card was too small for.
BOTTLENECK = tuple(Member(f"{arch}-bottleneck", arch, "bottleneck") for arch in ("res56", "res110"))
ALL = REPORTED + BOTTLENECK


def select(only: str | None, block: str | None) -> tuple[Member, ...]:
    """The runs asked for, in the job's order. `only`: names with commas between; `block`: `bottleneck` adds two.
    Raises UsageError for a name or a block that there is not."""
    if block not in (None, "basic", "bottleneck"):
        raise UsageError(f"there are no {block!r} blocks: --block bottleneck adds {_names(BOTTLENECK)} to the six runs")
    more = BOTTLENECK if block == "bottleneck" else ()
    if only is None:
        return REPORTED + more
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in {member.name for member in ALL}]
    if unknown or not names:
        wrong = f"the job has no run {unknown[0]!r}" if unknown else "--only names no run"
        raise UsageError(f"{wrong}: its runs are {_names(ALL)}, like --only res20,cnn20")
    return tuple(member for member in ALL if member.name in names or member in more)


def _names(members: Sequence[Member], between: str = ", ") -> str:
    return between.join(member.name for member in members)


@dataclass(frozen=True)
class Job:
    """The settings of all runs (`model.arch` and `model.block` mean nothing in them). `data`: the fingerprint of the
    pictures, None until they were read once. `weights`: by run, what a picture costs in training, in any unit that is
    the same for all; for estimates of time."""

    path: Path
    settings: Settings
    data: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    def settings_of(self, member: Member) -> Settings:
        """The settings with which the run begins."""
        return self.settings.replace({"model.arch": member.arch, "model.block": member.block}, "reproduce")

    @property
    def operational(self) -> dict[str, object]:
        """What somebody asked the job for, now or earlier, that may differ in runs that have begun with others."""
        return {key: value for key, value in asked_for(self.settings).items() if key in OPERATIONAL}

    @property
    def file(self) -> Path:
        return self.path / FILE_NAME

    def write(self) -> None:
        """Raises DiskError."""
        flat = {key: value for key, value in flatten(self.settings.config).items() if key not in _PER_RUN}
        sources = {key: source for key, source in self.settings.sources.items() if key in flat}
        values = {"format": 1, "settings": flat, "sources": sources, "data": self.data, "weights": self.weights}
        values["started_in"] = started_in(self.path)
        try:
            write_text_atomic(self.file, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise DiskError(f"{self.file} cannot be written ({error.strerror or error}): free some space") from None


def read_job(path: Path) -> Job:
    """The job recorded in the folder `path`. Raises UsageError if there is none or it cannot be used."""
    file = path / FILE_NAME
    if file.is_symlink():
        raise UsageError(f"{file} is a link, which no job of lowmem has: put what it leads to in its place")
    try:
        return _parse(path, read_json(file, SETTINGS_LIMIT_BYTES))
    except FileNotFoundError:
        raise UsageError(f"{path} is not the folder of a job (no {FILE_NAME} in it)") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error}): check its permissions") from None
    except (Unreadable, UsageError) as error:
        raise UsageError(f"{file} {error}: restore the file, or start another job with --out") from None


def _parse(path: Path, values: Any) -> Job:
    match values:
        case {"format": 1, "settings": dict(flat), "sources": dict(sources), "data": str() | None, "weights": dict(w)}:
            pass
        case _:
            raise Unreadable("holds no job of this version")
    there, flat = set(flat), of_older_run(flat, _device_of(path, flat))
    flat = {key: value for key, value in flat.items() if key in there or key not in _PER_RUN}
    expected, names = set(known_keys()) - _PER_RUN, {member.name for member in ALL}
    if strange := sorted(set(flat) ^ expected):
        raise Unreadable(f"{'has' if strange[0] in flat else 'lacks'} the setting {shorten(strange[0])}")
    if not all(isinstance(text, str) for text in sources.values()):
        raise Unreadable("has sources that are no text")
    if not all(name in names and type(value) in (int, float) and 0 < value < 1e30 for name, value in w.items()):
        raise Unreadable("has weights that are no numbers of its runs")
    sources = {"memory.tensors": sources.get("memory.vram", "default"), **sources}  # of an older job
    known = {key: shorten(text, 80) for key, text in sources.items() if key in expected}
    settings = Settings(validate(flat, dict.fromkeys(flat, FILE_NAME)), dict.fromkeys(known_keys(), "default") | known)
    settings = as_meant(settings, path, values.get("started_in"))
    return Job(path, settings, values["data"], {name: float(value) for name, value in w.items()})


def _device_of(path: Path, flat: Mapping[str, object]) -> object:
    """That of the job, or where it left it to its runs, the one that the first of them took."""
    if flat.get("train.device") == "auto" and "memory.tensors" not in flat:
        for member in ALL:
            with suppress(UsageError):
                return from_yaml(path / member.name / "config.yaml").config.train.device
    return flat.get("train.device")


# -- what was asked for this time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What this call of the command wants. `max_steps`: of a trial, for this call alone."""

    job: Job
    members: tuple[Member, ...]
    max_steps: int | None = None

    @property
    def again(self) -> str:
        """The command that goes on: the settings are recorded, which runs were asked for is not."""
        out = "" if self.job.path == Path("runs/reproduce") else f" --out {self.job.path}"
        which = {REPORTED: "", ALL: " --block bottleneck"}.get(self.members, f" --only {_names(self.members, ',')}")
        return f"lowmem reproduce{out}{which}"


def ask(path: Path, settings: Settings, members: tuple[Member, ...]) -> Asked:
    """The job in `path` with what is asked for this time, or a new one if no run of it has begun.
    Raises UsageError if its settings would not be those that its runs were begun with."""
    if settings.config.train.hours is not None:
        raise UsageError("train.hours is for one run, and a job's are all of one length: lower --epochs instead")
    # The limit of a trial is not recorded, or every later call would take the job for done there.
    max_steps, settings = settings.config.train.max_steps, settings.replace({"train.max_steps": None}, "default")
    job, given = Job(path, settings), asked_for(settings)
    if begun(path):
        job = read_job(path)
        refuse_other_settings(job, given)
        settled = job.settings.replace({"train.max_steps": None}, "default")
        for key in OPERATIONAL & given.keys():
            settled = settled.replace({key: given[key]}, settings.sources[key])
        job = replace(job, settings=settled)
    return Asked(job, members, max_steps)


def asked_for(settings: Settings) -> dict[str, object]:
    """Of gathered settings those that somebody gave: by a flag, --set, a file, or a recipe other than by default.
    Raises UsageError for a setting that is each run's own."""
    sources, flat = settings.sources, flatten(settings.config)
    quiet = {"default", UNUSED, *([f"recipe {settings.config.recipe}"] if sources["recipe"] == "default" else [])}
    given = {key: flat[key] for key, source in sources.items() if source not in quiet}
    if own := sorted(_PER_RUN & set(given)):
        raise UsageError(
            f"{own[0]} = {given[own[0]]} (from {sources[own[0]]}): the job trains its own networks: leave it out, and "
            "choose among them with --only"
        )
    if "train.batch" in given:
        given.setdefault("memory.auto_batch", False)  # a batch that is named is not to be chosen
    return given


def refuse_other_settings(job: Job, given: Mapping[str, object]) -> None:
    """Raises UsageError if anything asked for differs from what the job's runs are computed with."""
    recorded = flatten(job.settings.config)
    differing = [key for key, value in given.items() if value != recorded[key] and key not in OPERATIONAL]
    if differing:
        listed = [f"{key} {_shown(recorded[key])} (now {_shown(given[key])})" for key in differing]
        raise UsageError(
            f"{job.path} is a job with {name_some(listed, 4)}, and all of its runs are computed alike: leave them out "
            "to go on with it, or start another job with --out"
        )


def refuse_foreign(job: Job, member: Member) -> None:
    """Raises UsageError if the run's folder is of a run with other settings than the job's."""
    folder, expected = job.path / member.name, flatten(job.settings_of(member).config)
    recorded = flatten(from_yaml(folder / "config.yaml").config)
    free = OPERATIONAL | {key for key in _DECIDED if expected[key] == "auto"}
    free |= _BY_AUTO_BATCH if expected["memory.auto_batch"] else frozenset()
    for key, value in expected.items():
        if recorded[key] != value and key not in free:
            raise UsageError(
                f"{folder} is no run of this job: {key} is {_shown(recorded[key])} there and {_shown(value)} in the "
                "job: move it away, or start another job with --out"
            )


def _shown(value: object) -> str:
    return shorten("none" if value is None else str(value), 60)


# -- the folder --------------------------------------------------------------------------------------------------------


@contextmanager
def held(path: Path) -> Iterator[RunLock]:
    """The job's folder, made and under its lock. If no run was begun in it when this is left, nothing of it stays.
    Raises UsageError if it is another's, PreflightError if it cannot be read or written."""
    with reading(path):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: choose another folder with --out")
        inside = {entry.name.removesuffix(PARTIAL) for entry in path.iterdir()} if path.exists() else set()
        if not (path / FILE_NAME).is_file() and inside - _FILES:
            raise UsageError(f"{path} exists and is not the folder of a job: choose another with --out")
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path, "job")
    except OSError as error:
        raise PreflightError(
            f"{path} cannot be written ({error.strerror or error}): choose another folder with --out"
        ) from None
    try:
        yield lock
    finally:
        with suppress(PreflightError, OSError):
            if not begun(path):
                for name in (FILE_NAME, f"{FILE_NAME}{PARTIAL}"):
                    (path / name).unlink(missing_ok=True)
                lock.release(remove=True)
                for folder in made:
                    folder.rmdir()  # only if nothing else is in it
        lock.release()


def begun(path: Path) -> bool:
    """Whether any run of the job was begun: from then on its settings are settled. Raises PreflightError."""
    for folder in (path / member.name for member in ALL):
        with reading(folder):
            if folder.is_dir() and any(folder.iterdir()) and not never_began(folder):
                return True
    return False


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises PreflightError where `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise PreflightError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from None
