"""The commands: what each takes beside the flags of the table, and what it calls. Bodies import what they need when
they run, so that `--help` is there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.flags import Given, takes_flags
from lowmem.distributed.launch import refuse_several

app = typer.Typer(
    help="Train deep networks on cards that are too small for them, and never lose a run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JOINT = ("train", "resume")  # what several processes do together

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Plan, try every output and a step, say time and disk; leave nothing behind."),
]
NewRun = Annotated[Path | None, typer.Option(help="Run folder; default runs/ARCH.")]
Forked = Annotated[Path | None, typer.Option(help="Run folder; default RUN-fork.")]


def _version(wanted: bool) -> None:
    if wanted:
        from lowmem import __version__

        print(f"lowmem {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in JOINT:
        refuse_several(f"lowmem {context.invoked_subcommand}")


# -- runs --------------------------------------------------------------------------------------------------------------


@app.command()
@takes_flags
def train(given: Given, out: NewRun = None, dry_run: DryRun = False) -> None:
    """Train a network. Ctrl-C saves and leaves; `lowmem resume` goes on exactly there."""
    settings = given.settings()
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import run_training

    with observer() as shown:
        run_training(settings, out, shown, dry_run=dry_run)


@app.command()
@takes_flags
def resume(
    given: Given,
    run: Annotated[Path, typer.Argument(help="The run folder, like runs/res110.")],
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Go on to this many epochs in a new run: a fork, with the schedule where it was."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --epochs: the new run's folder; default RUN-fork.")] = None,
) -> None:
    """Go on exactly where a run stopped."""
    changes = given.changes()
    if out is not None and epochs is None:
        from lowmem.core.errors import UsageError

        raise UsageError("--out is for the new run that --epochs makes: a resume goes on in the run's own folder")
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import extend_run, resume_training

    with observer() as shown:
        if epochs is None:
            resume_training(run, changes, shown)
        else:
            extend_run(run, epochs=epochs, changes=changes, out=out, observer=shown)


@app.command()
@takes_flags
def fork(
    given: Given,
    run: Annotated[Path, typer.Argument(help="The run to start from; it is only read.")],
    at: Annotated[
        str,
        typer.Option(
            metavar="EPOCH|step:STEP|last",
            help="12: the end of epoch 12. step:4692: that step, in the middle of an epoch (then batch, seed and data "
            "stay). last: the newest checkpoint. `lowmem ls` lists what there is.",
        ),
    ],
    out: Forked = None,
    dry_run: DryRun = False,
) -> None:
    """A new run from an old checkpoint with changed settings; says what changes and the learning rate before and after.

    With --set train.epochs=N the schedule's milestones stay at the epochs where they were; with --set
    schedule.reference_epochs=… too, they are scaled to the new length."""
    changes = given.changes()
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import fork_run

    with observer() as shown:
        fork_run(run, at=at, changes=changes, out=out, observer=shown, dry_run=dry_run)


# -- what is there -----------------------------------------------------------------------------------------------------


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything known as JSON.")] = False,
) -> None:
    """The runs in a folder: state, epoch, error, size, and the checkpoints that can be forked from."""
    from lowmem.cli.show import show_ls

    show_ls(folder, as_json)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="The run folder, like runs/res110; it is only read.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a run folder: its checkpoints, settings, plan, rows and weights, and where a resume would go on."""
    from lowmem.cli.show import show_verify

    raise typer.Exit(show_verify(run, as_json))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, or one that holds runs: then whichever is being trained.")],
    interval: Annotated[float, typer.Option(min=0.05, max=3600.0, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Say how it stands, and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: as JSON.")] = False,
) -> None:
    """Follow a running job from another terminal; it is only read. Leaves when the run ends, or with Ctrl-C."""
    from lowmem.cli.watch import show_watch

    show_watch(run, interval=interval, once=once, as_json=as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None,
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


# -- before a run ------------------------------------------------------------------------------------------------------


@app.command()
@takes_flags
def plan(
    given: Given,
    recalibrate: Annotated[bool, typer.Option(help="Measure this machine's card again, and plan by that.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    curve: Annotated[Path | None, typer.Option(help="Draw memory against time to this PNG.")] = None,
) -> None:
    """What would be chosen for a budget and why; needs no GPU."""
    settings = given.settings()
    from lowmem.cli.show_plan import show_plan

    show_plan(settings, as_json, curve, recalibrate)


@app.command()
@takes_flags
def doctor(
    given: Given,
    out: NewRun = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Card, driver, torch, memory, disk, data: what is wrong, and the command that mends it."""
    settings = given.settings()
    from lowmem.cli.show import show_doctor

    raise typer.Exit(show_doctor(settings.config, out, as_json))


@app.command()
@takes_flags
def bench(
    given: Given,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Measured steps of each trial (5; quick: 3; acceptance: 10).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each cell is measured, in turns (3).")] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Memory of the engine's rows: sizes, shares of plain's peak, or least, like 1200M,0.5,least.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small network and all tables, in two minutes on two CPU cores.")
    ] = False,
    suite: Annotated[str | None, typer.Option(help="acceptance: all that is promised, against real steps.")] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Of the suite, only these: memory, time, gradients, out of memory, largest, format, comma-separated.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Limit of time (60; quick: 2; acceptance: 6); what no longer fits is left out."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results (bench/NETWORK); what is in it already is not measured again."),
    ] = None,
) -> None:
    """Memory and time of a training step in every way, the largest batches, AMP, memory formats; or a suite of checks.

    Each measurement in a clean process. Ctrl-C keeps what was measured; the same command goes on from there."""
    from lowmem.core.errors import UsageError

    batch: list[int] = given.flags.get("train.batch", [])
    if len(batch) > 1:
        raise UsageError("there is one batch: give --batch once")
    flags = {**given.flags, "train.batch": batch[0] if batch else None}
    if suite is None and cells is not None:
        raise UsageError("--cells are those of a suite: give --suite acceptance, or leave --cells out")
    if suite is None:
        from lowmem.cli.show_bench import show_bench

        show_bench(flags, steps=steps, rounds=rounds, budgets=budgets, quick=quick, minutes=minutes, out=out)
        return
    if suite != "acceptance":
        raise UsageError(f"there is no suite {suite!r}: use --suite acceptance")
    not_of_it = {"--rounds": rounds, "--budgets": budgets, "--quick": quick or None}
    if ignored := [name for name, value in not_of_it.items() if value is not None]:
        raise UsageError(f"{', '.join(ignored)}: not of the suite; leave it out, or leave --suite out")
    if out is None:
        raise UsageError("a suite writes its results: give --out a folder, like --out acceptance")
    from lowmem.cli.show_acceptance import show_acceptance

    show_acceptance(flags, steps=steps or 10, cells=cells, minutes=minutes, out=out)


# -- the report's runs as a job ----------------------------------------------------------------------------------------


@app.command()
@takes_flags
def reproduce(
    given: Given,
    out: Annotated[Path, typer.Option(help="Folder of the job; each run and the report are folders in it.")] = Path(
        "runs/reproduce"
    ),
    only: Annotated[
        str | None, typer.Option(metavar="RUN,RUN", help="Only these runs this time, like res20,cnn110.")
    ] = None,
    block: Annotated[
        str | None, typer.Option(help="bottleneck adds res56-bottleneck and res110-bottleneck to the six runs.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """The report's six runs (Res and CNN of 20, 56 and 110 layers) as one job, then the report.

    The same command goes on with it after Ctrl-C, a kill or a power cut, at the right run and step; what is finished is
    skipped. Settings that are left out are those the job began with.
    """
    settings = given.settings()
    from lowmem.cli.job import reproduce_job

    raise typer.Exit(reproduce_job(out, settings, only, block, dry_run))


@app.command("reproduce-run", hidden=True)
def reproduce_run() -> None:
    """A process of a job: what it is to do comes over standard input."""
    from lowmem.reproduce.conduct import read_request

    request = read_request()
    from lowmem.cli.job import work

    raise typer.Exit(work(request))
