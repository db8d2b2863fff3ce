"""report.md: the table, the figures by relative path, and a section for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from lowmem.report.naming import NamedRun
from lowmem.report.published import ASSUMED, departures, describe_source, without_run
from lowmem.report.style import Picture
from lowmem.report.tables import (
    RESOURCES_EXPLAINED,
    UNKNOWN,
    elapsed,
    error_table,
    escape,
    image_rate,
    largest,
    percent,
    resource_table,
    times,
)
from lowmem.runs.view import RunView


def render(runs: Sequence[NamedRun], pictures: Sequence[Picture]) -> str:
    """The whole document."""
    parts = ["# Training report", "## Final test errors", error_table(runs).to_markdown(), *_explain_errors(runs)]
    parts.append("## What differs from the published setting")
    parts.append("\n".join(f"- {escape(whose)}: {escape(text)}" for whose, text in departures(runs)))
    parts += ["## Time and memory", resource_table(runs).to_markdown(), RESOURCES_EXPLAINED]
    parts.append("## Figures")
    if not pictures:
        parts.append("No run here has completed an epoch: there is nothing to draw yet.")
    empty = [escape(run.name) for run in runs if run.history.epochs_done == 0]
    if pictures and empty:
        parts.append(f"Without a curve, having completed no epoch yet: {', '.join(empty)}.")
    if pictures:
        parts.append(
            "Chance is what guessing among the classes gives: of 10 classes, 90 % errors and a loss of ln 10 = 2.303."
        )
    for picture in pictures:
        parts += [f"### {picture.title}", f"![{picture.title}]({picture.file_name})", picture.remark]
    parts.append("## Runs")
    for run in runs:
        parts += _run_section(run)
    return "\n\n".join(parts) + "\n"


def _explain_errors(runs: Sequence[NamedRun]) -> list[str]:
    parts = [
        "Final is the error after the last completed epoch, not the lowest on the way. *Published* are the "
        "final test errors of the report that these networks come from. It states SGD, momentum 0.9, weight "
        "decay 1e-4, cross-entropy and CIFAR-10 in colour; batch, epochs, learning rate and augmentation it "
        "does not state. For those the usual setting is assumed, and what departs from it is marked "
        f"{escape(ASSUMED)}. Only a run of which nothing differs compares with the published figure."
    ]
    missing = without_run(runs)
    if missing:
        listed = ", ".join(f"{name} {percent(error)}" for name, error in missing.items())
        parts.append(f"Published networks without a run here: {listed}.")
    return parts


# --- one run --------------------------------------------------------------------------------------


def _run_section(run: NamedRun) -> list[str]:
    history = run.history
    lines = [
        ("State", _state(history)),
        ("Settings", _settings(history)),
        ("Best weights", _best(history)),
        ("Lowest test error", _lowest(history)),
        ("Time", _time(history)),
        ("Peak memory", _memory(history)),
        ("Hardware", _from_env(history, ("device", "gpu", "card", "driver", "cpu", "cpu_threads", "platform"))),
        ("Versions", _from_env(history, ("lowmem", "git_commit", "python", "torch", "torchvision", "cuda", "cudnn"))),
        *(("Note", escape(note)) for note in history.notes),
    ]
    return [
        f"### {escape(run.name)} ({escape(run.network)})",
        "\n".join(f"- {title}: {text}" for title, text in lines),
    ]


def _state(history: RunView) -> str:
    done, asked, last = history.epochs_done, history.config.train.epochs, history.last
    if history.state == "finished":
        text = f"finished, {asked} epochs"
    elif last is None:
        text = f"no epoch of {asked} completed yet"
        logged = [row for row in history.steps if row.loss is not None]
        text += f"; newest logged step {logged[-1].step:,} with loss {logged[-1].loss:.4g}" if logged else ""
    else:
        text = f"at epoch {done} of {asked}"
    if history.state == "stopped":
        most = history.config.train.max_steps
        text += ", stopped as planned" + (f" (train.max\\_steps {most:,})" if most else "")
    elif history.state != "finished":
        text += ", not finished (interrupted, or still running)"
    if history.times_resumed:
        text += ", interrupted and resumed " + times(history.times_resumed)
    text += _trouble(history)
    if last is not None and last.train_loss is not None and not math.isfinite(last.train_loss):
        text += "; **diverged: the training loss is no number any more**"
    return text


def _trouble(history: RunView) -> str:
    """What the run itself noticed: going back from a broken loss, learning nothing, stopping for either."""
    kinds = [event.kind for event in history.events]
    text = ""
    if back := [event for event in history.events if event.kind == "rollback"]:
        scale = back[-1].detail.get("lr_scale")
        rate = f", at last with {scale:g} of the learning rate" if isinstance(scale, int | float) else ""
        why = escape(back[-1].detail.get("what", ""))
        text += f"; **went back to a checkpoint {times(len(back))}{rate}** ({why})"
    if "diverged" in kinds:
        text += "; **stopped because it diverged**"
    if found := [event for event in history.events if event.kind == "stuck"]:
        text += f"; **learns nothing: at chance up to epoch {escape(found[-1].detail.get('epoch', '?'))} and longer**"
    return text


def _settings(history: RunView) -> str:
    config = history.config
    model, data, train = config.model, config.data, config.train
    optim, schedule = config.optim, config.schedule
    scale = train.epochs / schedule.reference_epochs
    drops = ", ".join(f"{milestone * scale:.3g}" for milestone in schedule.milestones)
    said = [
        f"{model.block} blocks, width {model.width}",
        describe_source(data.source) + ("" if data.augment else ", not augmented"),
        f"{train.epochs} epochs",
        f"batch {train.batch}" + (f" in micro-batches of {train.micro_batch}" if train.micro_batch else ""),
        f"SGD, lr {optim.lr:g}, times {schedule.gamma:g} after epochs {drops}" if drops else f"SGD, lr {optim.lr:g}",
        f"momentum {optim.momentum:g}" + (" (Nesterov)" if optim.nesterov else ""),
        f"weight decay {optim.weight_decay:g}",
        f"precision {train.precision}",
        f"seed {config.seed}",
    ]
    if schedule.low_start == "always" or int(model.arch[3:]) >= 110:  # `auto` concerns no shallower net
        said.append(f"low start {schedule.low_start}")
    if data.train_subset is not None:
        said.append(f"{data.train_subset:,} training pictures")
    if data.test_subset is not None:
        said.append(f"{data.test_subset:,} test pictures")
    said.append(
        f"{data.val_split:,} training pictures held back" if data.val_split else "no training pictures held back"
    )
    return escape("; ".join(said))


def _best(history: RunView) -> str:
    best = history.best
    if best is None:
        return f"{UNKNOWN} (none saved)"
    where = "at an unknown epoch" if best.epoch is None else f"of epoch {best.epoch}"
    text = f"{where}, error {percent(best.error_pct)}"
    if best.chosen_on == "val":
        there = next((row.test_error_pct for row in history.epochs if row.epoch == best.epoch), None)
        beside = "" if there is None else f"; test error there {percent(there)}"
        return f"{text} on the held-back training pictures, on which they were chosen{beside}"
    if best.chosen_on == "test":
        return (
            f"{text} on the test set, **on which they were chosen: this error is optimistic** and no "
            "estimate for new pictures; hold back training pictures (--val-split) to avoid that"
        )
    return f"{text}; on what they were chosen is not recorded"


def _lowest(history: RunView) -> str:
    known = [(row.test_error_pct, row.epoch) for row in history.epochs if row.test_error_pct is not None]
    if not known:
        return UNKNOWN
    error, epoch = min(known)
    return f"{percent(error)} at epoch {epoch} (seen afterwards, so optimistic)"


def _time(history: RunView) -> str:
    rate = image_rate(history)
    return f"{elapsed(history)} in all; {rate} images/s" + (
        "" if rate == UNKNOWN else " in training (median over epochs)"
    )


def _memory(history: RunView) -> str:
    return (
        f"{largest(history.epochs, lambda row: row.peak_allocated_bytes)} allocated, "
        f"{largest(history.epochs, lambda row: row.peak_reserved_bytes)} reserved, "
        f"{largest(history.epochs, lambda row: row.device_used_bytes)} in use on the device"
    )


def _from_env(history: RunView, keys: Sequence[str]) -> str:
    """What env.json says, and what a resume found changed since."""
    resumes = [event.detail for event in history.events if event.kind == "resume"]
    said = []
    for key in keys:
        values = [_plain(source[key]) for source in (history.env, *resumes) if source.get(key) not in (None, "")]
        changes = [value for before, value in pairwise(["", *values]) if value != before]
        if changes:
            said.append(f"{key.replace('_', ' ')} {', then '.join(changes)}")
    return escape("; ".join(said)) or UNKNOWN


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
