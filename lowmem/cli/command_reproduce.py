"""`lowmem reproduce`: the report's runs as one job, and the hidden command that is one of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.commands import DataRoot, Device, DryRun, Number, OnNan, OnStuck, Sets, Text, _batch, app
from lowmem.reproduce.process import COMMAND


@app.command()
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder of the job; each run and the report are folders in it.")] = Path(
        "runs/reproduce"
    ),
    only: Annotated[Text, typer.Option(metavar="RUN,RUN", help="Only these runs this time, like res20,cnn110.")] = None,
    block: Annotated[
        Text, typer.Option(help="bottleneck adds res56-bottleneck and res110-bottleneck to the six runs.")
    ] = None,
    width: Annotated[Number, typer.Option(help="Channels of the stem (64).")] = None,
    data: Annotated[Text, typer.Option(help="cifar10, fashion-mnist, shapes or folder:PATH.")] = None,
    data_root: DataRoot = None,
    batch: Annotated[Text, typer.Option(help="Effective batch (128), or auto: the fastest that fits.")] = None,
    epochs: Annotated[Number, typer.Option(help="Epochs of each run; the schedule is scaled to them.")] = None,
    recipe: Annotated[Text, typer.Option(help="A shipped recipe (report) or the path of a .yaml file.")] = None,
    precision: Annotated[Text, typer.Option(help="auto, fp32 or amp (fp16 on CUDA, bf16 on the CPU).")] = None,
    memory_format: Annotated[Text, typer.Option(help="auto, contiguous or channels-last.")] = None,
    vram: Annotated[
        Text, typer.Option(help="Memory to fit into, like 6G; on the CPU it bounds the step's tensors.")
    ] = None,
    card: Annotated[Text, typer.Option(help="Plan for this card's profile, like gtx1060-6g.")] = None,
    device: Device = None,
    seed: Annotated[Number, typer.Option(help="Seed of initial weights, order and augmentation.")] = None,
    on_stuck: OnStuck = None,
    on_nan: OnNan = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Sets = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """The report's six runs (Res and CNN of 20, 56 and 110 layers) as one job, then the report.

    The same command goes on with it after Ctrl-C, a kill or a power cut, at the right run and step; what is finished is
    skipped. Settings that are left out are those the job began with.
    """
    from lowmem.config.settings import gather

    flags = {
        "model.width": width,
        "data.source": data,
        "data.root": data_root,
        "train.batch": _batch(batch),
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
    from lowmem.cli.show_reproduce import reproduce_job

    raise typer.Exit(reproduce_job(out, settings, only, block, dry_run))


@app.command(COMMAND, hidden=True)
def reproduce_run() -> None:
    """A process of a job: what it is to do comes over standard input."""
    from lowmem.reproduce.process import read_request

    request = read_request()
    from lowmem.cli.job_process import work

    raise typer.Exit(work(request))
