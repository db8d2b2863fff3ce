"""What a trained network makes of pictures: of those whose classes are known as tables, of others a row each."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.layout import fold, room, table
from lowmem.cli.terminal import observer, printable
from lowmem.core.errors import ExitCode, UsageError
from lowmem.core.phases import untold
from lowmem.core.reading import shorten
from lowmem.core.units import counted, format_duration, format_loss
from lowmem.runs.folder import refuse_unwritable
from lowmem.runs.view import recorded_settings

if TYPE_CHECKING:
    from lowmem.inference.evaluation import Evaluation

_LONGEST_CLASS = 30
_SHARES = ("precision", "recall")
_FORMS = ("table", "csv", "jsonl")


def show_evaluation(
    runs: Sequence[Path], weights: str, changes: Mapping[str, object], out: Path | None, as_json: bool
) -> None:
    """Evaluates each run, writes its folder, prints tables of all of them."""
    for run in runs:
        recorded_settings(run)  # refused before torch is loaded
    if out is not None and len(runs) > 1:
        raise UsageError("--out is the folder of one run's results: leave it out, or evaluate one run after the other")
    folders = [out or run / "evaluate" for run in runs]
    for folder in folders:
        refuse_unwritable(folder, "give another --out")
    with observer("stderr") as shown:
        with shown.loading("torch"):
            from lowmem.inference.evaluation import evaluate_runs
            from lowmem.inference.figures import write_evaluation
        found = []
        for evaluation, folder in zip(evaluate_runs(runs, weights, changes, shown), folders, strict=True):
            write_evaluation(evaluation, folder, shown.phase)
            found.append(evaluation)
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=1))
        return
    columns = room()
    lines = [*_summary(found, columns), "", *_by_class(found, columns), ""]
    lines += [printable(f"{one.run.path}: {_difference(one)}") for one in found if one.as_recorded is False]
    written = "evaluation.json, predictions.csv, confusion.png, worst.png"
    lines += [printable(f"written: {folder}/: {written}") for folder in folders]
    print("\n".join(fold(lines, columns)))


def _summary(found: Sequence[Evaluation], columns: int | None) -> list[str]:
    top = any(one.top_error_pct is not None for one in found)
    rows = [("run", "weights", "on", "pictures", "loss", "error", *["top-5 error"] * top)]
    for one in found:
        own = one.weights.parent == one.run.path / "weights"
        weights = f"{one.weights.stem if own else one.weights}, epoch {one.info.epoch or '?'}"
        errors = [_percent(error, 2) for error in (one.score.error_pct, one.top_error_pct)][: 1 + top]
        rows.append(
            (one.run.name, weights, one.tests.name, f"{one.score.count:,}", format_loss(one.score.loss), *errors)
        )
    return table([tuple(map(printable, row)) for row in rows], {3, 4, 5, 6}, columns)


def _by_class(found: Sequence[Evaluation], columns: int | None) -> list[str]:
    """A row a class, beside each other what the runs do on it."""
    if len({one.classes for one in found}) > 1:
        return ["the runs tell apart different classes: each one's are in its evaluation.json"]
    runs = ["" if len(found) == 1 else f" {one.run.name}" for one in found]
    by_class = [one.by_class() for one in found]
    counts = [[one["count"] for one in classes] for classes in by_class]
    alike = 1 if all(one == counts[0] for one in counts) else len(counts)  # columns of them
    heads = ["pictures"] if alike == 1 else [f"pictures{run}" for run in runs]
    rows = [("class", *heads, *(f"{what}{run}" for run in runs for what in _SHARES))]
    for of_runs in zip(*by_class, strict=True):
        name, sizes = shorten(of_runs[0]["name"], _LONGEST_CLASS), (f"{one['count']:,}" for one in of_runs[:alike])
        shares = (of_run[what] for of_run in of_runs for what in _SHARES)
        rows.append((name, *sizes, *(_percent(share and 100 * share, 1) for share in shares)))
    return table([tuple(map(printable, row)) for row in rows], range(1, len(rows[0])), columns)


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f} %"


def _difference(one: Evaluation) -> str:
    assert one.row is not None
    then, now = f"{one.row.test_loss} and {one.row.test_error_pct} %", f"{one.score.loss} and {one.score.error_pct} %"
    why = "another device, machine or number of threads adds up in another order, or the pictures are others now"
    return f"loss and error are {now}, in metrics.csv {then}: {why}"


# -- pictures whose classes nobody knows -------------------------------------------------------------------------------


def show_predictions(run: Path, pictures: Sequence[str], weights: str, device: str, top: int, form: str) -> ExitCode:
    """Prints a row a picture, as soon as its batch is done. PREFLIGHT if some cannot be used, which standard error
    tells, DONE otherwise."""
    if form not in _FORMS:
        raise UsageError(f"--format {shorten(form)}: use {', '.join(_FORMS)}")
    with ExitStack() as stack:
        shown = stack.enter_context(observer("stderr"))
        with shown.loading("torch"):
            from lowmem.data.tree import picture_files
            from lowmem.inference.loading import load_run
            from lowmem.inference.prediction import predict
        shown.phase(f"loading {run.name}")
        network = load_run(run, weights, device)
        total = None if "-" in pictures else sum(1 for _ in picture_files(pictures))
        if total == 0:
            there = shorten(", ".join(pictures))
            raise UsageError(f"there is no picture in {there}: name files, or folders that hold some")
        phase = shown.phase
        if sys.stdout.isatty():  # rows tell how it goes, and a live line would be among them
            stack.close()
            phase = untold
        say = _rows_as(form, network.info.classes or (), top)
        began, done, broken = time.monotonic(), 0, 0
        for batch in predict(network, run, picture_files(_paths(pictures)), top, shown, phase, total):
            for name, likely in batch:
                if isinstance(likely, str):
                    shown.warning(f"{name}: {likely}")
                    broken += 1
                else:
                    say(name, likely)
            sys.stdout.flush()
            done += len(batch)
        if (took := time.monotonic() - began) >= 1:
            shown.note(f"{counted(done, 'picture')} in {format_duration(took)}, {done / took:,.0f} images/s")
        if broken:
            shown.note(f"{broken:,} of {counted(done, 'picture')} cannot be used")
    return ExitCode.PREFLIGHT if broken else ExitCode.DONE


def _paths(pictures: Sequence[str]) -> Iterator[str]:
    for one in pictures:
        if one == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        else:
            yield one


def _rows_as(form: str, classes: Sequence[str], top: int) -> Callable[[str, list[tuple[str, float]]], None]:
    """What prints a row, of a picture's path and its most probable classes; the head is printed at once."""
    ranks, rows = range(2, min(top, len(classes)) + 1), csv.writer(sys.stdout, lineterminator="\n")
    width, columns = min(max(map(len, ("class", *classes))), _LONGEST_CLASS), room()

    def line(picture: str, pairs: list[tuple[str, str]]) -> None:
        cells = (f"{shorten(name, width):<{width}}  {share:>7}" for name, share in pairs)
        print("\n".join(fold(["  ".join((*cells, printable(picture)))], columns)))

    def row(picture: str, likely: list[tuple[str, float]]) -> None:
        path = os.fsencode(picture).decode("utf-8", "backslashreplace")
        pairs = [(name, float(f"{share:.7g}")) for name, share in likely]  # the digits that a float32 has
        if form == "table":
            line(picture, [(name, f"{100 * share:.1f} %") for name, share in pairs])
        elif form == "csv":
            rows.writerow([path, *chain.from_iterable(pairs)])
        else:
            named = [{"class": name, "probability": share} for name, share in pairs]
            print(json.dumps({"picture": path, **named[0], "top": named}))

    if form == "csv":
        more = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
        rows.writerow(["picture", "class", "probability", *more])
    elif form == "table":
        line("picture", [("class", ""), *(("or", "") for _ in ranks)])
    return row
