"""Everything in lowmem that reads a file, with an undamaged one to start from."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lowmem.calibrate.calibrator import Calibration, Identity
from lowmem.cli.terminal import describe_epoch
from lowmem.cli.watch import screen, to_json
from lowmem.config.cards import load_card
from lowmem.config.settings import from_yaml, gather, parse_set
from lowmem.core.errors import CorruptCheckpoint, Diverged, LowmemError
from lowmem.core.reading import profiles_folder
from lowmem.core.units import format_size
from lowmem.data import kept as kept_pictures
from lowmem.data import load
from lowmem.distributed.group import Group
from lowmem.lifecycle import recorded_settings, resume_training
from lowmem.lifecycle.fork import Fork
from lowmem.lifecycle.run_identity import begun_before, belongs_to, launcher, most_bytes, read_plan
from lowmem.lifecycle.verify import verify
from lowmem.models import build
from lowmem.plan.policy import LEAN, keep, uniform
from lowmem.plan.record import Candidate, Plan
from lowmem.remat import stage_names
from lowmem.reproduce.job import ALL, Job, read_job
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.lock import OWNER_NAME, RunLock, writer_of
from lowmem.runs.rows import EPOCH_TABLE, GRADIENT_TABLE, STEP_TABLE, RowTable
from lowmem.runs.store import RunFolder
from lowmem.runs.tables import cut_table
from lowmem.runs.view import list_runs, read_run
from lowmem.runs.watch import Live
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.train.metrics import measured_weights
from lowmem.train.replica import config_hash, restore
from lowmem.train.schedule import learning_rate
from tests.faults.fuzzing import ANY, JSON, TENSORS, Mutation, Reader, rehash, replace_in_json
from tests.tiny import Heard, copy_run


def readers(run: Path, work: Path) -> list[Reader]:
    """`run`: an undamaged one, which is copied; `work`: a folder to write to."""
    work.mkdir()
    parts = (
        _settings,
        _checkpoints,
        _rows,
        _looking_on,
        _others,
        _whole,
        _goes_on,
        _listed,
        _forked,
        _restarted,
        _owner,
    )
    return [reader for part in (*parts, _gradients) for reader in part(run, work)]


def _settings(run: Path, work: Path) -> list[Reader]:
    config, card = run / "config.yaml", profiles_folder("cards") / "gtx1060-6g.yaml"
    recipe = profiles_folder("recipes") / "report.yaml"

    def recorded(path: Path) -> object:
        settings = from_yaml(path)
        return (
            belongs_to(settings.config),
            most_bytes(settings.config),
            learning_rate(settings.config, 5, 7, low_start=False),
        )

    job = Job(work, gather(sets=["train.epochs=3"]), "abc", {"res20": 1.0, "cnn110": 6.5})
    job.write()
    recorded_job = job.file.read_bytes()

    def profile(path: Path) -> object:
        card = load_card(str(path))
        parts = (card.usable.windows, card.pcie_lane_bytes_per_second * card.pcie_lanes, card.amp_flops_per_second)
        return parts, card.capability_pair, format_size(card.memory_bytes)

    return [
        Reader("config.yaml", config.read_bytes(), _file(work / "config.yaml", recorded)),
        Reader("--config", config.read_bytes(), _file(work / "own.yaml", lambda path: gather(config_file=path))),
        Reader("recipe", recipe.read_bytes(), _file(work / "recipe.yaml", lambda path: gather(recipe=str(path)))),
        Reader("card profile", card.read_bytes(), _file(work / "card.yaml", profile)),
        Reader("job.json", recorded_job, _file(job.file, lambda path: read_job(path.parent).settings_of(ALL[0])), JSON),
        Reader("--set", b"optim.lr=0.01", lambda data: parse_set(data.decode("utf-8", errors="replace"))),
    ]  # fmt: skip


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def reading(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return reading


def _instead(file: Path, read: Callable[[], object], *, fits: bool = False) -> Callable[[bytes], object]:
    """Reads with other bytes in the file, which is then as it was. `fits`: the checkpoint that it is of has a commit
    record that fits."""
    seed = file.read_bytes()

    def write(data: bytes) -> None:
        file.write_bytes(data)
        if fits:
            rehash(file.parent)

    def reading(data: bytes) -> object:
        write(data)
        try:
            return read()
        finally:
            write(seed)

    return reading


def _checkpoints(run: Path, work: Path) -> list[Reader]:
    """The last three with a commit record that fits: made to be read."""
    copy = copy_run(run, work / "checkpoints-run")
    for path in checkpoints.checkpoint_folders(copy / "checkpoints")[1:]:
        shutil.rmtree(path)
    newest = checkpoints.checkpoint_folders(copy / "checkpoints")[0]
    config = from_yaml(run / "config.yaml").config
    accept, most = belongs_to(config), most_bytes(config)
    execution = Execution("cpu", "fp32", "contiguous")
    model = build(config.model.arch, config.model.block, width=config.model.width)
    identity = {"settings": config_hash(config)}

    def into_a_network() -> object:
        saved, _, _ = checkpoints.load_newest(copy / "checkpoints", accept, most)
        optimizer = make_optimizer(model, config.optim, execution.device)
        step = TrainStep(model, optimizer, make_scaler(execution), execution, None)
        return restore(saved, model, step, identity)

    def reader(name: str, mutations: tuple[Mutation, ...]) -> Reader:
        file, fits = newest / name, name != "manifest.json"
        reading = _instead(file, into_a_network, fits=fits)
        return Reader(f"{name}, hash made to fit" if fits else name, file.read_bytes(), reading, mutations)

    tensors = [reader(f"{name}.safetensors", TENSORS) for name in ("model", "optimizer")]
    return [reader("manifest.json", JSON), reader("state.json", JSON), *tensors]


def _rows(run: Path, work: Path) -> list[Reader]:
    def table(name: str, columns: RowTable[Any]) -> Reader:
        path = work / name
        return Reader(f"{name}, cut back", (run / name).read_bytes(), _file(path, lambda p: cut_table(p, columns, 5)))

    copy = copy_run(run, work / "history-run")

    def of_history(name: str, mutations: tuple[Mutation, ...] = ANY) -> Reader:
        file = copy / name
        return Reader(f"{name}, for a report", file.read_bytes(), _instead(file, lambda: read_run(copy)), mutations)

    return [
        table("metrics.csv", EPOCH_TABLE),
        table("steps.csv", STEP_TABLE),
        *map(of_history, ("config.yaml", "metrics.csv", "steps.csv", "events.jsonl", GRADIENT_TABLE.file_name)),
        of_history("env.json", JSON),
        of_history("weights/best.safetensors", TENSORS),
    ]


def _looking_on(run: Path, work: Path) -> list[Reader]:
    """`lowmem watch`, which refuses nothing: what it cannot read it leaves out, and what it read it can show."""
    copy = copy_run(run, work / "watched-run")
    (copy / "plan.json").write_text(json.dumps(small_plan(run).to_json()), encoding="utf-8")

    def read(watched: Live) -> object:
        live = watched.look()
        console = Console(file=io.StringIO(), width=40)
        console.print(screen(live, console))
        epochs = [describe_epoch(asdict(row), live.epochs) for row in live.rows]
        return epochs, json.dumps(to_json(live), allow_nan=False)

    def reader(name: str) -> Reader:
        file = copy / name

        def read_twice(data: bytes) -> object:
            watched = Live(copy)
            watched.look()
            return _instead(file, lambda: read(watched))(data)

        mutations = JSON if name == "plan.json" else ANY
        return Reader(f"{name}, by watch", file.read_bytes(), read_twice, mutations)

    return [reader(name) for name in ("config.yaml", "plan.json", "metrics.csv", "steps.csv", "events.jsonl")]


def small_plan(run: Path) -> Plan:
    """A plan that belongs to `run`."""
    config = from_yaml(run / "config.yaml").config
    stages = stage_names(build(config.model.arch, config.model.block, width=config.model.width))
    batch = config.train.batch
    plan = Plan(
        budget_bytes=10**8, batch=batch, micro_batch=batch, accumulation=1, precision="fp32",
        memory_format="contiguous", exact=True, stages=tuple(stages), schedule=uniform([LEAN] * len(stages)),
        candidates=(Candidate(what="all", peak_bytes=5, step_seconds=0.1),),
    )  # fmt: skip
    lower = Plan(**{**vars(plan), "schedule": uniform([keep("conv1")] * len(stages)), "ladder": ()})
    return Plan(**{**vars(plan), "ladder": (lower,)})


def _others(run: Path, work: Path) -> list[Reader]:
    config = from_yaml(run / "config.yaml").config
    planned, kept, pictures = work / "planned", work / "calibration", work / "pictures"
    for folder in (planned, kept, pictures):
        folder.mkdir()

    identity = Identity(device="cpu", name="c", driver=None, torch="2", library=None, threads=1)
    calibration = Calibration(identity, kept)
    calibration.put("seconds", "a", [1.0, 2.0, 0.0])
    calibration.put("mode", "b", [1.0, 1.0])
    calibration.put("bytes", "c", 5)
    calibration.save()
    assert calibration.path is not None

    def measured(path: Path) -> object:
        found = Calibration(identity, kept)
        return found.seconds("a"), found.mode("b"), found.size_bytes("c")

    import torch

    kept_pictures.write_cache(pictures, "x", {"a": torch.zeros(3)})
    manifest = pictures / "manifest.json"

    def decoded(_: Path) -> object:
        return kept_pictures.read_cache(pictures, "x")

    return [
        Reader(
            "plan.json", json.dumps(small_plan(run).to_json(), indent=1).encode(),
            _file(planned / "plan.json", lambda path: read_plan(planned, config)), JSON,
        ),
        Reader("calibration", calibration.path.read_bytes(), _file(calibration.path, measured), JSON),
        Reader("decoded pictures", manifest.read_bytes(), _file(manifest, decoded), JSON),
    ]  # fmt: skip


def _whole(run: Path, work: Path) -> list[Reader]:
    """`lowmem verify` of a run of which one file, any, is damaged: never an exception but "this is no run"."""
    copy = copy_run(run, work / "verify-run")
    (copy / "plan.json").write_text(json.dumps(small_plan(run).to_json()), encoding="utf-8")
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name not in {"run.lock"})

    def read(data: bytes) -> object:
        rng = random.Random(data)
        file = rng.choice(files)
        seed = file.read_bytes()
        file.write_bytes(rng.choice(TENSORS if file.suffix == ".safetensors" else JSON)(rng, seed))
        try:
            return verify(copy)
        finally:
            file.write_bytes(seed)

    return [Reader("a whole run, by verify", b"0" * 16, read, (any_bytes,))]


def _goes_on(run: Path, work: Path) -> list[Reader]:
    """What is accepted takes a real step, and `verify` has said the same as the resume does."""
    made = copy_run(run, work / "steps-run")
    for path in checkpoints.checkpoint_folders(made / "checkpoints")[2:]:
        shutil.rmtree(path)
    newest = checkpoints.checkpoint_folders(made / "checkpoints")[0].name

    def read(data: bytes) -> object:
        copy = copy_run(made, work / "steps-copy")
        (copy / "checkpoints" / newest / "state.json").write_bytes(data)
        rehash(copy / "checkpoints" / newest)
        said = verify(copy)
        settings = recorded_settings(copy).replace({"train.max_steps": (said.step or 0) + 1}, "test")
        try:
            result = resume_training(copy, settings)
        except CorruptCheckpoint as error:
            # How many steps an epoch has, and which pictures they are, only the data tells.
            if said.can_resume and not re.search("steps of [0-9]+ an epoch|made with other data", str(error)):
                raise AssertionError(f"verify said {said}, the resume {error}") from error
            raise
        except Diverged:
            return said  # a rate or a loss that can be, and that breaks the run
        events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
        (resumed,) = [event for event in events if event["event"] == "resume"]
        assert said.can_resume, said
        assert (resumed["checkpoint"], resumed["step"]) == (said.resumes_from, said.step)
        assert said.finished or result.state.step == resumed["step"] + 1
        return said

    return [
        Reader(
            "state.json, and a step",
            (made / "checkpoints" / newest / "state.json").read_bytes(),
            read,
            (plausible, plausible, plausible, replace_in_json),
            5,
        )
    ]


def plausible(rng: random.Random, data: bytes) -> bytes:
    """A number of the run's state becomes another one that a state may well hold."""
    try:
        state = json.loads(data)
        names = [name for name, value in state["run"].items() if type(value) in (int, float)]
        name = rng.choice(names)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # by a mutation before
        return data
    old = state["run"][name]
    others = (0, 1, 2, old + 1, 2**52) if type(old) is int else (0.0, 1e-300, 0.1, 3.0 * old, 1e30, 1e299, float("nan"))
    state["run"][name] = rng.choice(others)
    return json.dumps(state).encode()


def _listed(run: Path, work: Path) -> list[Reader]:
    """`lowmem ls` refuses nothing: it tells what is wrong."""
    copy = copy_run(run, work / "listed-run")
    newest = checkpoints.checkpoint_folders(copy / "checkpoints")[0]

    def read() -> object:
        (listed,) = list_runs(copy)
        assert all(len(words) < 2000 for words in listed.trouble), listed
        return json.dumps(listed.to_json())

    def reader(file: Path, mutations: tuple[Mutation, ...] = JSON) -> Reader:
        return Reader(f"{file.name}, by ls", file.read_bytes(), _instead(file, read), mutations)

    names = ("manifest.json", "state.json")
    return [*(reader(newest / name) for name in names), reader(copy / "config.yaml"), reader(copy / "metrics.csv", ANY)]


def _forked(run: Path, work: Path) -> list[Reader]:
    """A checkpoint with a commit record that fits, found by its place and carried over into other settings."""
    copy = copy_run(run, work / "forked-run")
    settings = from_yaml(run / "config.yaml")
    dataset = load(settings.config.data, settings.config.seed)
    changes = {"optim.lr": 0.05, "train.max_steps": None}
    newest = checkpoints.checkpoint_folders(copy / "checkpoints")[0]
    file = newest / "state.json"

    def read() -> object:
        heard, begin = Heard(), Fork(copy, settings, "step:7", changes, work / "forked")
        with ExitStack() as stack:
            new, _ = begin.open(Group(), heard, stack)
            begin.checkpoint(new, dataset, heard)
        return heard.notes, heard.warnings

    return [Reader("state.json, for a fork", file.read_bytes(), _instead(file, read, fits=True), JSON)]


def _restarted(run: Path, work: Path) -> list[Reader]:
    """Whether torchrun has started this run's processes again, told from its folder right after a death."""
    copy, group = copy_run(run, work / "restarted-run"), Group()
    group.restarts = 1
    config = from_yaml(run / "config.yaml").config
    known = {"asked": config_hash(config), "launcher": launcher()}
    (copy / "env.json").write_text(json.dumps(known), encoding="utf-8")

    def reader(name: str) -> Reader:
        file = copy / name
        reading = _instead(file, lambda: begun_before(group, copy, config))
        return Reader(f"{name}, by a restart", file.read_bytes(), reading, JSON)

    return [reader("env.json"), reader("events.jsonl")]


def _owner(run: Path, work: Path) -> list[Reader]:
    folder = work / "owned"
    folder.mkdir()
    (folder / "run.lock").touch()
    seed = json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "since": "2026-01-01"}).encode()

    def read(data: bytes) -> object:
        (folder / OWNER_NAME).write_bytes(data)
        writer = writer_of(folder)
        assert writer is None, "nobody holds the lock"
        lock = RunLock(folder)
        try:
            return str(lock.taken_over)
        finally:
            lock.release()

    return [Reader("run.owner.json", seed, read, JSON)]


def _gradients(run: Path, work: Path) -> list[Reader]:
    """A diagnostic, of which nothing can stop a run; for a report it is read by `of_history`."""
    copy = copy_run(run, work / "gradients-run")
    config = from_yaml(run / "config.yaml").config
    layers = tuple(measured_weights(build(config.model.arch, config.model.block, width=config.model.width)))

    def read(data: bytes) -> object:
        for aside in copy.glob("damaged-*"):
            aside.unlink()
        (copy / GRADIENT_TABLE.file_name).write_bytes(data)
        with RunFolder.open(copy) as folder:
            try:
                folder.begin_gradients(layers, step=5)
                folder.append_gradients([(6, 2, [0.5] * len(layers))])
            except LowmemError as error:
                raise AssertionError(f"it stopped the run: {error}") from error
        assert read_run(copy).gradients.rows[-1].step == 6
        return None

    return [Reader("gradients.csv, to go on with", (run / GRADIENT_TABLE.file_name).read_bytes(), read)]


def any_bytes(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(16)
