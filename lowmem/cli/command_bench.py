"""The command `lowmem bench`: its flags, and which of them go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

Text = Optional[str]  # noqa: UP045 (typer reads these at run time)
Number = Optional[int]  # noqa: UP045

_BENCH_ONLY = ("--rounds", "--budgets", "--quick")


def bench(
    arch: Annotated[
        Text, typer.Option(help="A network of the family (on the CPU res20, quick: res56; on a card res110).")
    ] = None,
    block: Annotated[
        Text,
        typer.Option(help="basic or bottleneck; default: the report's, for the default res56 and res110 bottleneck."),
    ] = None,
    width: Annotated[Number, typer.Option(min=1, help="Channels of the stem (64; quick: 16).")] = None,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=1, help="Batch size (128; on the CPU 32; quick: 16)."),
    ] = None,
    steps: Annotated[
        Number, typer.Option(min=1, help="Measured steps of each trial (5; quick: 3; acceptance: 10).")
    ] = None,
    rounds: Annotated[Number, typer.Option(min=1, help="How often each cell is measured, in turns (3).")] = None,
    budgets: Annotated[
        Text,
        typer.Option(
            metavar="LIST",
            help="Memory of the engine's rows: sizes, shares of plain's peak, or least, like 1200M,0.5,least.",
        ),
    ] = None,
    vram: Annotated[
        Text,
        typer.Option(
            help="Memory that the largest batches are to fit (the card's; on the CPU half of plain's; acceptance: 6G)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A small network and all tables, in two minutes on two CPU cores.")
    ] = False,
    suite: Annotated[Text, typer.Option(help="acceptance: all that is promised, against real steps.")] = None,
    cells: Annotated[
        Text,
        typer.Option(
            metavar="LIST",
            help="Of the suite, only these: memory, time, gradients, out of memory, largest, format, comma-separated.",
        ),
    ] = None,
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Limit of time (60; quick: 2; acceptance: 6); what no longer fits is left out."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the results (bench/NETWORK); what is in it already is not measured again."),
    ] = None,
) -> None:
    """Memory and time of a training step in every way, the largest batches, AMP, memory formats; or a suite of checks.

    Each measurement in a clean process. Ctrl-C keeps what was measured; the same command goes on from there."""
    from lowmem.core.errors import UsageError

    if len(batch or ()) > 1:
        raise UsageError("there is one batch: give --batch once")
    one_batch = batch[0] if batch else None
    if suite is None:
        if cells is not None:
            raise UsageError("--cells are those of a suite: give --suite acceptance, or leave --cells out")
        from lowmem.cli.show_bench import show_bench

        show_bench(
            arch=arch,
            block=block,
            width=width,
            batch=one_batch,
            steps=steps,
            rounds=rounds,
            budgets=budgets,
            vram=vram,
            device=device,
            quick=quick,
            minutes=minutes,
            out=out,
        )
        return
    if suite != "acceptance":
        raise UsageError(f"there is no suite {suite!r}: use --suite acceptance")
    given: dict[str, Any] = {"--rounds": rounds, "--budgets": budgets, "--quick": quick or None}
    ignored = [name for name in _BENCH_ONLY if given[name] is not None]
    if ignored:
        raise UsageError(f"{', '.join(ignored)}: not of the suite; leave it out, or leave --suite out")
    if out is None:
        raise UsageError("a suite writes its results: give --out a folder, like --out acceptance")
    from lowmem.cli.show_acceptance import show_acceptance

    show_acceptance(
        arch=arch or "res110",
        block=block or (None if arch else "bottleneck"),
        width=width or 64,
        batch=one_batch or 128,
        vram=vram or "6G",
        device=device,
        minutes=minutes,
        steps=steps or 10,
        cells=cells,
        out=out,
    )
