"""The commands and their flags. Bodies import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lowmem.cli.command_bench import bench
from lowmem.distributed.launch import is_led, refuse_several

if TYPE_CHECKING:
    from lowmem.config.settings import Settings

app = typer.Typer(
    help="Train deep networks on cards that are too small for them, and never lose a run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JOINT = ("train", "resume")  # what several processes do together

Text = Optional[str]  # noqa: UP045 (typer reads these at run time)
Number = Optional[int]  # noqa: UP045
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted name.")]
Device = Annotated[Text, typer.Option(help="auto, cuda or cpu.")]
KeepEvery = Annotated[
    Number, typer.Option(metavar="N", help="Keep the checkpoint of every N-th epoch too, to fork from.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Plan, try every output and a step, say time and disk; leave nothing behind."),
]
OnStuck = Annotated[Text, typer.Option(help="When a run learns nothing: warn, or stop with code 6.")]
OnNan = Annotated[Text, typer.Option(help="When the loss breaks: rollback to half the rate, or stop with code 6.")]
Board = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--tensorboard/--no-tensorboard", help="Write TensorBoard event files to RUN/tensorboard."),
]
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in JOINT:
        refuse_several(f"lowmem {context.invoked_subcommand}")


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
    sync_bn: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--sync-bn", help="Started by torchrun: batch norm over the whole batch, as in one process."),
    ] = None,
    epochs: Annotated[Number, typer.Option(help="Epochs; the schedule is scaled to them.")] = None,
    recipe: Annotated[Text, typer.Option(help="A shipped recipe (report) or the path of a .yaml file.")] = None,
    precision: Annotated[Text, typer.Option(help="auto, fp32 or amp (fp16 on CUDA, bf16 on the CPU).")] = None,
    memory_format: Annotated[Text, typer.Option(help="auto, contiguous or channels-last.")] = None,
    vram: Annotated[
        Text, typer.Option(help="Memory to fit into, like 6G; on the CPU it bounds the step's tensors.")
    ] = None,
    card: Annotated[
        Text, typer.Option(help="Plan for this card's profile, like gtx1060-6g; A,B: for processes of torchrun.")
    ] = None,
    device: Device = None,
    seed: Annotated[Number, typer.Option(help="Seed of initial weights, order and augmentation.")] = None,
    keep_every: KeepEvery = None,
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/ARCH.")] = None,  # noqa: UP045
    on_stuck: OnStuck = None,
    on_nan: OnNan = None,
    tensorboard: Board = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file of settings.")] = None,  # noqa: UP045
    set_: Sets = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """Train a network. Ctrl-C saves and leaves; `lowmem resume` goes on exactly there."""
    from lowmem.config.settings import gather

    flags = {
        "model.arch": arch,
        "model.block": block,
        "model.width": width,
        "data.source": data,
        "data.root": data_root,
        "data.val_split": val_split,
        "train.batch": _batch(batch),
        "train.micro_batch": micro_batch,
        "train.sync_bn": sync_bn,
        "train.epochs": epochs,
        "train.precision": precision,
        "train.memory_format": memory_format,
        "train.device": device,
        "memory.vram": vram,
        "memory.card": card,
        "train.on_stuck": on_stuck,
        "train.on_nan": on_nan,
        "train.tensorboard": tensorboard,
        "seed": seed,
        "checkpoint.keep_every": keep_every,
    }
    settings = gather(recipe=recipe, config_file=config, flags=flags, sets=set_)
    from lowmem.cli.show import observer
    from lowmem.lifecycle.api import run_training

    with observer() as shown:
        run_training(settings, out, shown, dry_run=dry_run)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run folder, like runs/res110.")],
    epochs: Annotated[
        Number,
        typer.Option(min=1, help="Go on to this many epochs in a new run: a fork, with the schedule where it was."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="With --epochs: the new run's folder; default RUN-fork.")] = None,  # noqa: UP045
    device: Device = None,
    vram: Annotated[Text, typer.Option(help="Another memory to fit into: plans again, for the same gradients.")] = None,
    data: Annotated[Text, typer.Option(help="Where the same pictures are now, like folder:PATH.")] = None,
    data_root: DataRoot = None,
    keep_every: KeepEvery = None,
    on_stuck: OnStuck = None,
    on_nan: OnNan = None,
    tensorboard: Board = None,
    set_: Sets = [],  # noqa: B006
) -> None:
    """Go on exactly where a run stopped."""
    from lowmem.core.errors import UsageError

    values = _values(set_)
    named: dict[str, object] = {
        "train.device": device,
        "memory.vram": vram,
        "data.source": data,
        "data.root": data_root,
    }
    named |= {"train.on_stuck": on_stuck, "train.on_nan": on_nan, "train.tensorboard": tensorboard}
    values |= {key: value for key, value in named.items() if value is not None and key not in values}
    if keep_every is not None:
        values.setdefault("checkpoint.keep_every", keep_every)
    if out is not None and epochs is None:
        raise UsageError("--out is for the new run that --epochs makes: a resume goes on in the run's own folder")
    if not is_led():  # the run's folder may be on another machine
        _recorded(run).replace(values, "resume")
    from lowmem.cli.show import observer
    from lowmem.lifecycle.api import extend_run, resume_training

    with observer() as shown:
        if epochs is None:
            resume_training(run, values, shown)
        else:
            extend_run(run, epochs=epochs, changes=values, out=out, observer=shown)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="The run folder, like runs/res110; it is only read.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a run folder: its checkpoints, settings, plan, rows and weights, and where a resume would go on."""
    from lowmem.cli.show_verify import show_verify

    raise typer.Exit(show_verify(run, as_json))


@app.command()
def fork(
    run: Annotated[Path, typer.Argument(help="The run to start from; it is only read.")],
    at: Annotated[
        str,
        typer.Option(
            metavar="EPOCH|step:STEP|last",
            help="12: the end of epoch 12. step:4692: that step, in the middle of an epoch (then batch, seed and data "
            "stay). last: the newest checkpoint. `lowmem ls` lists what there is.",
        ),
    ],
    set_: Sets = [],  # noqa: B006
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default RUN-fork.")] = None,  # noqa: UP045
    keep_every: KeepEvery = None,
    dry_run: DryRun = False,
) -> None:
    """A new run from an old checkpoint with changed settings; says what changes and the learning rate before and after.

    With --set train.epochs=N the schedule's milestones stay at the epochs where they were; with --set
    schedule.reference_epochs=… too, they are scaled to the new length."""
    values = _values(set_)
    if keep_every is not None:
        values.setdefault("checkpoint.keep_every", keep_every)
    _recorded(run)
    from lowmem.cli.show import observer
    from lowmem.lifecycle.api import fork_run

    with observer() as shown:
        fork_run(run, at=at, changes=values, out=out, observer=shown, dry_run=dry_run)


def _values(sets: list[str]) -> dict[str, object]:
    from lowmem.config.settings import parse_set

    return dict(parse_set(text) for text in sets)


def _recorded(run: Path) -> Settings:
    """The settings recorded in a run. Raises UsageError."""
    from lowmem.config.settings import from_yaml
    from lowmem.runs.store import require_run

    require_run(run)
    return from_yaml(run / "config.yaml")


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything known as JSON.")] = False,
) -> None:
    """The runs in a folder: state, epoch, error, size, and the checkpoints that can be forked from."""
    from lowmem.cli.show_ls import show_ls

    show_ls(folder, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the report; default RUN/report for one run, report/ for several."),
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Also report.html: the same in one file, figures inlined.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also TensorBoard event files of the runs, beside the report.")
    ] = False,
) -> None:
    """Final errors, loss curves, test-error curves, and pairs with and without shortcuts."""
    from lowmem.cli.show import show_report
    from lowmem.report import write_report

    out = out if out is not None or len(runs) == 1 else Path("report")
    show_report(write_report(runs, out, html=html, tensorboard=tensorboard))


app.command()(bench)


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
    card: Annotated[
        Text,
        typer.Option(help="A card profile, like gtx1060-6g, or the path of a .yaml file; A,B: one process on each."),
    ] = None,
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
    from lowmem.config.settings import gather

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
    from lowmem.config.settings import gather

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
