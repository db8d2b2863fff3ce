"""`lowmem COMMAND`: the commands (what each takes, its flags by the table, and what it calls), and the entry point.
Errors become one line and the exit code of `lowmem.core.errors`. Bodies import what they need when they run, so that
`--help` is there at once."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from lowmem.cli import completion
from lowmem.cli.failures import fail, tell_error
from lowmem.cli.flags import Given, takes_flags
from lowmem.cli.interrupts import NOTHING_TO_SAVE, interruptible, leaves_at_once
from lowmem.cli.streams import take_streams, unread_is_well
from lowmem.core.errors import ExitCode, Interrupted, LowmemError, OutputClosed, UsageError
from lowmem.distributed.launch import leave, refuse_several, report_failure

_JOINT = ("train", "resume")  # what several processes do together
# Threads wait for each other at every operation. That they spin meanwhile makes a step several times as long beside a
# busy program (benchmarks/LOG.md). The second is GNU's own, which the first would stop from spinning at all; both are
# read when torch is loaded, here and in children.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

app = typer.Typer(
    help="Train deep networks on cards that are too small for them, and never lose a run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command by the function's name, with the flags that the table has for it."""

    @functools.wraps(function)
    def told(**values: Any) -> None:
        try:
            function(**values)
        except KeyboardInterrupt:  # typer would leave without a word
            raise Interrupted(NOTHING_TO_SAVE, ExitCode.INTERRUPTED) from None

    return app.command()(takes_flags(told))


def _version(wanted: bool) -> None:
    if wanted:
        from lowmem import __version__

        print(f"lowmem {__version__}")
        raise typer.Exit


def _runs(text: str) -> Any:
    """An argument for run folders, which a shell can complete."""
    return typer.Argument(help=text, autocompletion=completion.runs)


@app.callback()
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in _JOINT:
        refuse_several(f"lowmem {context.invoked_subcommand}")


@command
def train(given: Given, out: Path | None, dry_run: bool, notify: str | None) -> None:
    """Train a network. Ctrl-C saves and leaves; `lowmem resume` goes on exactly there."""
    settings = given.settings()
    from lowmem.cli.notify import notifying
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import run_folder, run_training

    with notifying(None if dry_run else notify, out or run_folder(settings.config)) as ended, observer() as shown:
        ended(run_training(settings, out, shown, dry_run=dry_run))


@command
def resume(
    given: Given,
    run: Annotated[Path, _runs("The run folder, like runs/res110.")],
    epochs: int | None,
    out: Path | None,
    notify: str | None,
) -> None:
    """Go on exactly where a run stopped."""
    changes = given.changes()
    if out is not None and epochs is None:
        raise UsageError("--out is for the new run that --epochs makes: a resume goes on in the run's own folder")
    from lowmem.cli.notify import notifying
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import extend_run, fork_folder, resume_training

    with notifying(notify, run if epochs is None else out or fork_folder(run)) as ended, observer() as shown:
        if epochs is None:
            ended(resume_training(run, changes, shown))
        else:
            ended(extend_run(run, epochs=epochs, changes=changes, out=out, observer=shown))


@command
def fork(
    given: Given,
    run: Annotated[Path, _runs("The run to start from; it is only read.")],
    at: str,
    out: Path | None,
    dry_run: bool,
) -> None:
    """A new run from an old checkpoint with changed settings; says what changes and the learning rate before and after.

    With --set train.epochs=N the schedule's milestones stay at the epochs where they were; with --set
    schedule.reference_epochs=… too, they are scaled to the new length."""
    changes = given.changes()
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import fork_run

    with observer() as shown:
        fork_run(run, at=at, changes=changes, out=out, observer=shown, dry_run=dry_run)


@command
def ls(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"), *, json: bool
) -> None:
    """The runs in a folder: state, epoch, error, size, and the checkpoints that can be forked from."""
    from lowmem.cli.show import show_ls

    show_ls(folder, json)


@command
def verify(run: Annotated[Path, _runs("The run folder, like runs/res110; it is only read.")], json: bool) -> None:
    """Check a run folder: its checkpoints, settings, plan, rows and weights, and where a resume would go on."""
    from lowmem.cli.show import show_verify

    raise typer.Exit(show_verify(run, json))


@command
def watch(
    run: Annotated[Path, _runs("A run folder, or one that holds runs: then whichever is being trained.")],
    interval: float,
    once: bool,
    json: bool,
) -> None:
    """Follow a running job from another terminal; it is only read. Leaves when the run ends, or with Ctrl-C."""
    from lowmem.cli.watch import show_watch

    interruptible()
    show_watch(run, interval=interval, once=once, as_json=json)


@command
def report(
    runs: Annotated[list[Path], _runs("Run folders, or folders that hold runs.")],
    out: Path | None,
    html: bool,
    tensorboard: bool,
) -> None:
    """Final errors, loss curves, test-error curves, and pairs with and without shortcuts."""
    from lowmem.cli.show import show_report
    from lowmem.cli.terminal import observer
    from lowmem.report import write_report

    with observer("stderr") as shown:
        result = write_report(runs, out, html=html, tensorboard=tensorboard, phase=shown.phase)
    show_report(result)


@command
def evaluate(
    given: Given,
    runs: Annotated[list[Path], _runs("Run folders; a run may be in training meanwhile.")],
    weights: str,
    out: Path | None,
    json: bool,
) -> None:
    """Loss, error and classes of runs on their test pictures, or on others: the figures of metrics.csv.

    Beside the tables evaluation.json, predictions.csv, confusion.png and worst.png are written to RUN/evaluate."""
    from lowmem.cli.show_inference import show_evaluation

    show_evaluation(runs, weights, given.changes(), out, json)


@command
def predict(
    given: Given,
    run: Annotated[Path, _runs("A run folder, or a .safetensors file of weights.")],
    pictures: Annotated[list[str], typer.Argument(help="Files, folders with all below, or -: paths by line on stdin.")],
    weights: str,
    top: int,
    format: str,
) -> None:
    """The classes of pictures, the most probable first, as table, CSV or JSON lines.

    A picture that cannot be used is told on standard error, the others are done, and the exit code is 3."""
    from lowmem.cli.show_inference import show_predictions

    raise typer.Exit(show_predictions(run, pictures, weights, given.flags["train.device"], top, format))


@command
def export(
    run: Annotated[Path, _runs("A run folder, or a .safetensors file of its weights.")],
    format: str,
    out: Path,
    weights: str,
    raw_uint8: bool,
) -> None:
    """Write a trained network for other programs: ONNX, TorchScript or safetensors, compared before it is there."""
    from lowmem.cli.show import show_export

    show_export(run, format, out, weights, raw_uint8)


@command
def plan(given: Given, recalibrate: bool, json: bool, curve: Path | None) -> None:
    """What would be chosen for a budget and why; needs no GPU."""
    settings = given.settings()
    from lowmem.cli.show import show_plan

    show_plan(settings, json, curve, recalibrate)


@command
def doctor(given: Given, out: Path | None, json: bool) -> None:
    """Card, driver, torch, memory, disk, data: what is wrong, and the command that mends it."""
    settings = given.settings()
    from lowmem.cli.show import show_doctor

    raise typer.Exit(show_doctor(settings.config, out, json))


@command
def settings(
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a name or meaning, like lr or memory.*; default: all.")
    ] = None,
    *,
    json: bool,
) -> None:
    """What can be set: name, default, what it takes, what may still change it, its flag; and what it means."""
    from lowmem.cli.listing import show_settings

    show_settings(pattern, json)


@command
def cards(json: bool) -> None:
    """The cards that can be planned for: memory, compute capability and rates, by their makers' datasheets."""
    from lowmem.cli.listing import show_cards

    show_cards(json)


@command
def cache(clear: bool, json: bool) -> None:
    """What lowmem keeps between runs: where, how large, what kinds of things."""
    from lowmem.cli.listing import show_cache

    show_cache(clear, json)


@command
def bench(
    given: Given,
    steps: int | None,
    rounds: int | None,
    budgets: str | None,
    quick: bool,
    suite: str | None,
    cells: str | None,
    minutes: float | None,
    out: Path | None,
) -> None:
    """Memory and time of a training step in every way, the largest batches, AMP, memory formats; or a suite of checks.

    Each measurement in a clean process. Ctrl-C keeps what was measured; the same command goes on from there."""
    unread_is_well()
    batch: list[int] = given.flags.get("train.batch", [])
    if len(batch) > 1:
        raise UsageError("there is one batch: give --batch once")
    flags = {**given.flags, "train.batch": batch[0] if batch else None}
    from lowmem.cli.terminal import loading_torch
    from lowmem.config.settings import gather
    from lowmem.runs.folder import refuse_unwritable

    gather(flags=flags)  # refused before torch is loaded
    if out is not None:
        refuse_unwritable(out)
    if suite is None:
        if cells is not None:
            raise UsageError("--cells are those of a suite: give --suite acceptance, or leave --cells out")
        with loading_torch():
            from lowmem.cli.show_bench import show_bench

        show_bench(flags, steps=steps, rounds=rounds, budgets=budgets, quick=quick, minutes=minutes, out=out)
        return
    if suite != "acceptance":
        raise UsageError(f"there is no suite {suite!r}: use --suite acceptance")
    host = given.flags.get("memory.host")
    not_of_it = {"--rounds": rounds, "--budgets": budgets, "--quick": quick or None, "--host": host}
    if ignored := [name for name, value in not_of_it.items() if value is not None]:
        raise UsageError(f"{', '.join(ignored)}: not of the suite; leave it out, or leave --suite out")
    if out is None:
        raise UsageError("a suite writes its results: give --out a folder, like --out acceptance")
    with loading_torch():
        from lowmem.cli.show_bench import show_acceptance

    show_acceptance(flags, steps=steps or 10, cells=cells, minutes=minutes, out=out)


@command
def reproduce(given: Given, out: Path, only: str | None, block: str | None, dry_run: bool) -> None:
    """The six runs of a student's homework report on ResNet against plain nets (on a 6 GB GTX 1060), then a report.

    Res and CNN of 20, 56 and 110 layers, as one job. The same command goes on with it after Ctrl-C, a kill or a power
    cut, at the right run and step; what is finished is skipped. Settings that are left out are those the job began
    with.
    """
    unread_is_well()
    settings = given.settings()
    from lowmem.cli.show import show_report
    from lowmem.cli.terminal import say
    from lowmem.reproduce.conduct import reproduce_job
    from lowmem.reproduce.job import select

    interruptible()
    raise typer.Exit(reproduce_job(out, settings, select(only, block), say, show_report, dry_run=dry_run))


@app.command("reproduce-run", hidden=True)
def reproduce_run() -> None:
    """A process of a job: what it is to do comes over standard input."""
    from lowmem.reproduce.conduct import read_request

    request = read_request()
    from lowmem.cli.terminal import observer
    from lowmem.lifecycle import resume_training, run_training

    with observer() as shown:
        with shown.loading("torch"):
            from lowmem.reproduce.check import work
        raise typer.Exit(work(request, shown, run_training, resume_training))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command and leaves with its code. A traceback is only shown for a bug (code 1)."""
    if not {*_WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.update(_WAITING)
    take_streams()
    try:
        with leaves_at_once():  # until a command begins its work
            code = _run(arguments)
    except Exception:
        traceback.print_exc()
        code = ExitCode.BUG
    unread_is_well()
    leave(code)


def _run(arguments: list[str] | None) -> int:
    try:
        code = get_command(app).main(args=arguments, prog_name="lowmem", standalone_mode=False)
        sys.stdout.flush()
        return int(code or ExitCode.DONE)
    except OutputClosed as error:
        return int(error.exit_code)
    except LowmemError as error:
        return tell_error(error)
    except typer.Exit as leaving:
        return leaving.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return fail(NOTHING_TO_SAVE, ExitCode.INTERRUPTED)
    except Exception as error:
        # The usage errors of the library under typer: unknown options, missing arguments.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if not error.format_message():  # the help was shown
                return int(error.exit_code)
            command_path = getattr(getattr(error, "ctx", None), "command_path", "lowmem")
            from lowmem.cli.hints import explain

            words = explain(error, sys.argv[1:] if arguments is None else arguments)
            return tell_error(UsageError(f"{words} (see `{command_path} --help`)"))
        report_failure(error)
        raise
