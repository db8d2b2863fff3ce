"""`lowmem watch`: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.commands import app


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, or one that holds runs: then whichever is being trained.")],
    interval: Annotated[float, typer.Option(min=0.05, max=3600.0, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Say how it stands, and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: as JSON.")] = False,
) -> None:
    """Follow a running job from another terminal; it is only read. Leaves when the run ends, or with Ctrl-C."""
    from lowmem.cli.show_watch import show_watch

    show_watch(run, interval=interval, once=once, as_json=as_json)
