"""What a trained network makes of pictures: of those whose classes are known as tables, of others a row each."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.layout import fold, room, table
from lowmem.cli.terminal import observer, printable
from lowmem.core.errors import ExitCode, UsageError
from lowmem.core.phases import untold
from lowmem.core.reading import shorten
from lowmem.core.units import counted, format_duration, format_loss
from lowmem.runs.folder import refuse_unwritable
from lowmem.runs.view import RunView, recorded_settings

if TYPE_CHECKING:
    from lowmem.inference.evaluation import Evaluation
    from lowmem.inference.prediction import Prediction

_MOST_CLASSES, _WORST_CLASSES = 40, 20  # of a table; all are in evaluation.json
_LONGEST_CLASS = 30
FORMS = ("table", "csv", "jsonl")


def show_evaluation(
    runs: Sequence[Path], weights: str, changes: Mapping[str, object], out: Path | None, as_json: bool
) -> None:
    """Evaluates each run, writes its folder, prints tables of all of them."""
    for run in runs:
        recorded_settings(run)  # refused before torch is loaded
    folders = _folders(runs, out)
    for folder in folders:
        refuse_unwritable(folder, "give another --out")
    with observer("stderr") as shown:
        with shown.loading("torch"):
            from lowmem.inference.evaluation import evaluate_runs
            from lowmem.inference.writing import write_evaluation
        found = evaluate_runs(runs, weights, changes, shown)
        for evaluation, folder in zip(found, folders, strict=True):
            write_evaluation(evaluation, folder, shown.phase)
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=1))
        return
    columns = room()
    lines = [*_summary(found, columns), ""]
    if len({one.classes for one in found}) == 1:
        lines += [*_by_class(found, columns), ""]
    lines += [printable(f"{one.run.path}: {_difference(one)}") for one in found if one.as_recorded is False]
    lines += [
        printable(f"written: {folder}/: evaluation.json, predictions.csv, confusion.png, worst.png")
        for folder in folders
    ]
    print("\n".join(fold(lines, columns)))


def _folders(runs: Sequence[Path], out: Path | None) -> list[Path]:
    if out is None:
        return [run / "evaluate" for run in runs]
    if len(runs) == 1:
        return [out]
    from lowmem.report.naming import name_runs

    return [out / named.file_name for named in name_runs([RunView(run) for run in runs])]


def _summary(found: Sequence[Evaluation], columns: int | None) -> list[str]:
    top = any(one.top_error_pct is not None for one in found)
    rows = [("run", "weights", "on", "pictures", "loss", "error", *(["top-5 error"] if top else []))]
    for one in found:
        epoch = "" if one.network.info.epoch is None else f", epoch {one.network.info.epoch}"
        figures = [f"{one.score.count:,}", format_loss(one.score.loss), f"{one.score.error_pct:.2f} %"]
        figures += [("" if one.top_error_pct is None else f"{one.top_error_pct:.2f} %")] if top else []
        rows.append((one.run.name, f"{one.network.weights.stem}{epoch}", one.tests.name, *figures))
    return table([tuple(map(printable, row)) for row in rows], {3, 4, 5, 6}, columns)


def _by_class(found: Sequence[Evaluation], columns: int | None) -> list[str]:
    """A row a class, beside each other what the runs do on it; of many classes those that are found least."""
    classes = [one.by_class() for one in found]
    order = range(len(classes[0]))
    few = len(order) <= _MOST_CLASSES
    shown = order if few else sorted(order, key=lambda row: classes[0][row]["recall"] or 0.0)[:_WORST_CLASSES]
    heads = [
        (f"{what}" if len(found) == 1 else f"{what} {one.run.name}")
        for one in found
        for what in ("precision", "recall")
    ]
    rows = [("class", "pictures", *heads)]
    for row in shown:
        figures = [of_run[row][what] for of_run in classes for what in ("precision", "recall")]
        percents = ["–" if share is None else f"{100 * share:.1f} %" for share in figures]
        rows.append((shorten(classes[0][row]["name"], _LONGEST_CLASS), f"{classes[0][row]['count']:,}", *percents))
    lines = table([tuple(map(printable, row)) for row in rows], range(1, 2 + len(heads)), columns)
    more = f"the {_WORST_CLASSES} of {len(order):,} classes with the least recall; all are in evaluation.json"
    return lines if few else [*lines, more]


def _difference(one: Evaluation) -> str:
    assert one.row is not None
    then, now = f"{one.row.test_loss} and {one.row.test_error_pct} %", f"{one.score.loss} and {one.score.error_pct} %"
    why = "another device, machine or number of threads adds up in another order"
    return f"loss and error are {now}, in metrics.csv {then}: {why}"


# -- pictures whose classes nobody knows -------------------------------------------------------------------------------


def show_predictions(run: Path, pictures: Sequence[str], weights: str, device: str, top: int, form: str) -> ExitCode:
    """Prints a row a picture, as soon as its batch is done. PREFLIGHT if some cannot be used, which standard error
    tells, DONE otherwise."""
    if form not in FORMS:
        raise UsageError(f"--format {shorten(form)}: use {', '.join(FORMS)}")
    began, done, broken = time.monotonic(), 0, 0
    with ExitStack() as stack:
        shown = stack.enter_context(observer("stderr"))
        with shown.loading("torch"):
            from lowmem.data.tree import picture_files
            from lowmem.inference.loading import load_run
            from lowmem.inference.prediction import predict
        shown.phase(f"loading {run.name}")
        network = load_run(run, weights, device)
        shown.phase("counting pictures")
        total = None if "-" in pictures else sum(1 for _ in picture_files(pictures))
        phase = shown.phase
        if sys.stdout.isatty():  # rows tell how it goes, and a live line would be among them
            stack.close()
            phase = untold
        say = _rows_as(form, network.info.classes or (), min(top, len(network.info.classes or ())))
        for batch in predict(network, run, picture_files(_paths(pictures)), top, shown, phase, total):
            for one in batch:
                if one.trouble:
                    shown.warning(f"{one.picture}: {one.trouble}")
                else:
                    say(one)
            sys.stdout.flush()
            done, broken = done + len(batch), broken + sum(bool(one.trouble) for one in batch)
        if not done:
            raise UsageError(
                f"there is no picture in {shorten(', '.join(pictures))}: name files, or folders that hold some"
            )
        took = time.monotonic() - began
        if took >= 1:
            shown.note(f"{counted(done, 'picture')} in {format_duration(took)}")
        if broken:
            shown.note(f"{broken:,} of {counted(done, 'picture')} cannot be used")
    return ExitCode.PREFLIGHT if broken else ExitCode.DONE


def _paths(pictures: Sequence[str]) -> Iterator[str]:
    for one in pictures:
        if one == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        else:
            yield one


def _rows_as(form: str, classes: Sequence[str], top: int) -> Callable[[Prediction], None]:
    """What prints a row; the head is printed at once."""
    if form == "jsonl":
        return _print_json
    if form == "csv":
        rows = csv.writer(sys.stdout, lineterminator="\n")
        more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "probability")]
        rows.writerow(["picture", "class", "probability", *more])
        return lambda one: rows.writerow([_name(one), *(cell for pair in _pairs(one) for cell in pair)])
    width, columns = min(max(map(len, classes)), _LONGEST_CLASS), room()

    def cells(pairs: Sequence[tuple[str, str]], picture: str) -> None:
        likely = "  ".join(f"{shorten(name, width):<{width}} {probability:>7}" for name, probability in pairs)
        print("\n".join(fold([f"{likely}  {picture}"], columns)))

    cells([("class" if rank == 0 else "or", "") for rank in range(top)], "picture")
    return lambda one: cells(
        [(name, f"{100 * likely:.1f} %") for name, likely in zip(one.classes, one.probabilities, strict=True)],
        printable(one.picture),
    )


def _pairs(one: Prediction) -> list[tuple[str, float]]:
    """Probabilities with the digits that a float32 has."""
    return [(name, float(f"{likely:.7g}")) for name, likely in zip(one.classes, one.probabilities, strict=True)]


def _name(one: Prediction) -> str:
    return os.fsencode(one.picture).decode("utf-8", "backslashreplace")


def _print_json(one: Prediction) -> None:
    named = [{"class": name, "probability": likely} for name, likely in _pairs(one)]
    print(json.dumps({"picture": _name(one), **named[0], "top": named}, ensure_ascii=False))
