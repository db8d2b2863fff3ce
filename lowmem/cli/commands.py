"""The commands and their flags. Bodies import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from lowmem.settings import Settings

app = typer.Typer(
    help="Train deep networks on cards that are too small for them, and never lose a run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Text = Optional[str]  # noqa: UP045 (typer reads these at run time)
Number = Optional[int]  # noqa: UP045
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted name.")]
Device = Annotated[Text, typer.Option(help="auto, cuda or cpu.")]
OnStuck = Annotated[Text, typer.Option(help="When a run learns nothing: warn, or stop with code 6.")]
OnNan = Annotated[Text, typer.Option(help="When the loss breaks: rollback to half the rate, or stop with code 6.")]
DataRoot = Annotated[Text, typer.Option(help="Folder that holds, or receives, cifar10 and fashion-mnist.")]


def _version(wanted: bool) -> None:
    if wanted:
        from lowmem import __version__

        print(f"lowmem {__version__}")
        raise typer.Exit


def _batch(text: str | None) -> int | str | None:
    """A number, or what else was typed (`auto`) for the settings to judge."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    arch: Annotated[
        Text, typer.Option(help="res20 res34 res50 res56 res101 res110, or cnn… without shortcuts.")
    ] = None,
    block: Annotated[Text, typer.Option(help="basic or bottleneck; default: what the report used.")] = None,
    width: Annotated[Number, typer.Option(help="Channels of the stem (64).")] = None,
    data: Annotated[Text, typer.Option(help="cifar10, fashion-mnist, shapes or folder:PATH.")] = None,
    data_root: DataRoot = None,
    val_split: Annotated[
        Number, typer.Option(help="Hold back this many training pictures to choose weights on.")
    ] = None,
    batch: Annotated[Text, typer.Option(help="Effective batch (128), or auto: the fastest that fits.")] = None,
    micro_batch: Annotated[Number, typer.Option(help="Pictures at a time; gradients accumulate to the batch.")] = None,
    epochs: Annotated[Number, typer.Option(help="Epochs; the schedule is scaled to them.")] = None,
    recipe: Annotated[Text, typer.Option(help="A shipped recipe (report) or the path of a .yaml file.")] = None,
    precision: Annotated[Text, typer.Option(help="auto, fp32 or amp (fp16 on CUDA, bf16 on the CPU).")] = None,
    memory_format: Annotated[Text, typer.Option(help="auto, contiguous or channels-last.")] = None,
    vram: Annotated[
        Text, typer.Option(help="Memory to fit into, like 6G; on the CPU it bounds the step's tensors.")
    ] = None,
    card: Annotated[Text, typer.Option(help="Plan for this card's profile, like gtx1060-6g.")] = None,
    device: Device = None,
    seed: Annotated[Number, typer.Option(help="Seed of initial weights, order and augmentation.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/ARCH.")] = None,  # noqa: UP045
    on_stuck: OnStuck = None,
    on_nan: OnNan = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file of settings.")] = None,  # noqa: UP045
    set_: Sets = [],  # noqa: B006
) -> None:
    """Train a network. Ctrl-C saves and leaves; `lowmem resume` goes on exactly there."""
    from lowmem.settings import gather

    flags = {
        "model.arch": arch,
        "model.block": block,
        "model.width": width,
        "data.source": data,
        "data.root": data_root,
        "data.val_split": val_split,
        "train.batch": _batch(batch),
        "train.micro_batch": micro_batch,
        "train.epochs": epochs,
        "train.precision": precision,
        "train.memory_format": memory_format,
        "train.device": device,
        "memory.vram": vram,
        "memory.card": card,
        "train.on_stuck": on_stuck,
        "train.on_nan": on_nan,
        "seed": seed,
    }
    settings = gather(recipe=recipe, config_file=config, flags=flags, sets=set_)
    from lowmem.api import run_training
    from lowmem.cli.show import observer

    with observer() as shown:
        run_training(settings, out, shown)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run folder, like runs/res110.")],
    device: Device = None,
    vram: Annotated[Text, typer.Option(help="Another memory to fit into: plans again, for the same gradients.")] = None,
    data: Annotated[Text, typer.Option(help="Where the same pictures are now, like folder:PATH.")] = None,
    data_root: DataRoot = None,
    on_stuck: OnStuck = None,
    on_nan: OnNan = None,
    set_: Sets = [],  # noqa: B006
) -> None:
    """Go on exactly where a run stopped."""
    flags = {"train.device": device, "memory.vram": vram, "data.source": data, "data.root": data_root}
    flags |= {"train.on_stuck": on_stuck, "train.on_nan": on_nan}
    changed = _changed(run, flags, set_, "resume")
    from lowmem.api import resume_training
    from lowmem.cli.show import observer

    with observer() as shown:
        resume_training(run, changed, shown)


@app.command()
def fork(
    run: Annotated[Path, typer.Argument(help="The run to start from; it is only read.")],
    at: Annotated[int, typer.Option(min=1, help="From the end of this epoch.")],
    set_: Sets = [],  # noqa: B006
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default RUN-fork.")] = None,  # noqa: UP045
) -> None:
    """A new run from an old checkpoint with changed settings."""
    changed = _changed(run, {}, set_, f"fork of {run.name}")
    from lowmem.api import fork_run
    from lowmem.cli.show import observer

    with observer() as shown:
        fork_run(run, at=at, changes=changed, out=out, observer=shown)


def _changed(run: Path, flags: dict[str, str | None], sets: list[str], source: str) -> Settings:
    """The settings recorded in a run, with flags and --set on top."""
    from lowmem.runs.store import require_run
    from lowmem.settings import from_yaml, parse_set

    require_run(run)
    values: dict[str, object] = {key: value for key, value in flags.items() if value is not None}
    values |= dict(parse_set(text) for text in sets)
    return from_yaml(run / "config.yaml").replace(values, source)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the report; default RUN/report for one run, report/ for several."),
    ] = None,
) -> None:
    """Final errors, loss curves, test-error curves, and pairs with and without shortcuts."""
    from lowmem.cli.show import show_report
    from lowmem.report import write_report

    show_report(write_report(runs, out if out is not None or len(runs) == 1 else Path("report")))


@app.command()
def bench(
    arch: Annotated[str, typer.Option(help="A network of the family.")] = "res20",
    block: Annotated[Text, typer.Option(help="basic or bottleneck.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Channels of the stem.")] = 64,
    batch: Annotated[list[int], typer.Option(min=1, help="A batch size; may be given several times.")] = [32, 128],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Measured steps a cell, after two warm-up steps.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Optional[Path], typer.Option(help="Folder for bench.md and bench.json.")] = None,  # noqa: UP045
) -> None:
    """Memory and throughput of a training step: batch size, precision and memory format, each in a clean process."""
    from lowmem.cli.show import show_bench

    show_bench(arch, block, width, batch, steps, device, out)


@app.command()
def plan(
    arch: Annotated[Text, typer.Option(help="A network of the family.")] = None,
    block: Annotated[Text, typer.Option(help="basic or bottleneck.")] = None,
    width: Annotated[Number, typer.Option(help="Channels of the stem (64).")] = None,
    batch: Annotated[Text, typer.Option(help="Effective batch (128), or auto.")] = None,
    micro_batch: Annotated[Number, typer.Option(help="Pictures at a time.")] = None,
    vram: Annotated[
        Text, typer.Option(help="Memory, like 6G: of the card, or for the step's tensors without --card.")
    ] = None,
    card: Annotated[Text, typer.Option(help="A card profile, like gtx1060-6g, or the path of a .yaml file.")] = None,
    precision: Annotated[Text, typer.Option(help="auto, fp32 or amp.")] = None,
    memory_format: Annotated[Text, typer.Option(help="auto, contiguous or channels-last.")] = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file of settings.")] = None,  # noqa: UP045
    set_: Sets = [],  # noqa: B006
    device: Device = None,
    recalibrate: Annotated[bool, typer.Option(help="Measure this machine's card again, and plan by that.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    curve: Annotated[Optional[Path], typer.Option(help="Draw memory against time to this PNG.")] = None,  # noqa: UP045
) -> None:
    """What would be chosen for a budget and why; needs no GPU."""
    from lowmem.settings import gather

    flags = {
        "model.arch": arch,
        "model.block": block,
        "model.width": width,
        "train.batch": _batch(batch),
        "train.micro_batch": micro_batch,
        "train.precision": precision,
        "train.memory_format": memory_format,
        "train.device": device,
        "memory.vram": vram,
        "memory.card": card,
    }
    settings = gather(config_file=config, flags=flags, sets=set_)
    from lowmem.cli.show_plan import show_plan

    show_plan(settings, as_json, curve, recalibrate)


@app.command()
def doctor(
    arch: Annotated[Text, typer.Option(help="The network of the run, for the room it takes on disk.")] = None,
    block: Annotated[Text, typer.Option(help="basic or bottleneck.")] = None,
    width: Annotated[Number, typer.Option(help="Channels of the stem (64).")] = None,
    data: Annotated[Text, typer.Option(help="cifar10, fashion-mnist, shapes or folder:PATH.")] = None,
    data_root: DataRoot = None,
    precision: Annotated[Text, typer.Option(help="auto, fp32 or amp.")] = None,
    memory_format: Annotated[Text, typer.Option(help="auto, contiguous or channels-last.")] = None,
    device: Device = None,
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/ARCH.")] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="YAML file of settings.")] = None,  # noqa: UP045
    set_: Sets = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Card, driver, torch, memory, disk, data: what is wrong, and the command that mends it."""
    from lowmem.settings import gather

    flags = {
        "model.arch": arch,
        "model.block": block,
        "model.width": width,
        "data.source": data,
        "data.root": data_root,
        "train.precision": precision,
        "train.memory_format": memory_format,
        "train.device": device,
    }
    settings = gather(config_file=config, flags=flags, sets=set_)
    from lowmem.cli.show_doctor import show_doctor

    raise typer.Exit(show_doctor(settings.config, out, as_json))
