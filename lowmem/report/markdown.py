"""report.md: the tables, the figures by relative path, and a section for each run; and report.html, the same as one
page that needs nothing beside it, on a screen, a phone and paper.

The page is made from the Markdown, so that the two cannot drift, by the library that Rich renders Markdown with. Raw
HTML in it stays text, and the page's own policy forbids scripts and loads of any kind: what a stranger's run folder
says (names, settings, versions) is shown and never executed. Figures are inlined as PNG: as SVG they would be larger
(thousands of logged steps are a path each), and their labels, placed by one font, would run into each other in another.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from itertools import pairwise

from markdown_it import MarkdownIt

from lowmem.core.reading import escape_markdown
from lowmem.core.units import counted, format_loss
from lowmem.report import tables
from lowmem.report.naming import NamedRun, common_classes
from lowmem.report.style import Picture
from lowmem.report.tables import UNKNOWN, percent, times
from lowmem.runs.view import RunView

_FINAL_EXPLAINED = "Final is the error after the last completed epoch, not the lowest on the way."
_ERRORS_EXPLAINED = (
    f"{_FINAL_EXPLAINED} The *homework report* is "
    f"{tables.HOMEWORK}, from which these networks and their recipe come. Its final test error stands beside a run "
    "that was trained as it was, and beside any other what is other about that. It states SGD, momentum 0.9, weight "
    "decay 1e-4, cross-entropy and CIFAR-10 in colour; batch, epochs, learning rate and augmentation it does not "
    "state. For those the usual setting is assumed, and what departs from it is marked "
    f"{escape_markdown(tables.ASSUMED)}."
)


def render(runs: Sequence[NamedRun], pictures: Sequence[Picture]) -> str:
    departures = tables.departures(runs)  # none: there is nothing to compare these networks with
    parts = ["# Training report", "## Final test errors", tables.error_table(runs).to_markdown()]
    parts.append(_ERRORS_EXPLAINED if departures else _FINAL_EXPLAINED)
    there = {run.network for run in runs}
    missing = [f"{name} {percent(error)}" for name, error in tables.PUBLISHED_ERROR_PCT.items() if name not in there]
    if missing and any(map(tables.compares, runs)):
        parts.append(f"The homework report's networks without a run here: {', '.join(missing)}.")
    if departures:
        parts.append("## What differs from the homework report's setting")
        parts.append("\n".join(f"- {escape_markdown(whose)}: {escape_markdown(text)}" for whose, text in departures))
    parts += ["## Time and memory", tables.resource_table(runs).to_markdown(), tables.RESOURCES_EXPLAINED]
    parts.append("## Figures")
    if not pictures:
        parts.append("No run here has completed an epoch: there is nothing to draw yet.")
    elif empty := [escape_markdown(run.name) for run in runs if run.history.epochs_done == 0]:
        parts.append(f"Without a curve, having completed no epoch yet: {', '.join(empty)}.")
    if pictures:
        many = common_classes(runs) or 10
        rates = f"{100 * (1 - 1 / many):.4g} % errors and a loss of ln {many} = {math.log(many):.3f}"
        parts.append(f"Chance is what guessing among the classes gives: of {counted(many, 'class')}, {rates}.")
    for picture in pictures:
        title = escape_markdown(picture.title)
        parts += [f"### {title}", f"![{title}]({picture.file_name})", picture.remark]
    parts.append("## Runs")
    for run in runs:
        parts += _run_section(run)
    return "\n\n".join(parts) + "\n"


def _run_section(run: NamedRun) -> list[str]:
    history, rate = run.history, tables.image_rate(run.history)
    allocated, reserved, device = tables.peaks(history)
    median = "" if rate == UNKNOWN else " in training (median over epochs)"
    errors = [(row.test_error_pct, row.epoch) for row in history.epochs if row.test_error_pct is not None]
    error, at = min(errors, default=(None, 0))
    lowest = f"{percent(error)} at epoch {at} (seen afterwards, so optimistic)" if errors else UNKNOWN
    lines = [
        ("State", _state(history)),
        ("Settings", _settings(history)),
        ("Best weights", _best(history)),
        ("Lowest test error", lowest),
        ("Time", f"{tables.elapsed(history)} in all; {rate} images/s{median}"),
        ("Peak memory", f"{allocated} allocated, {reserved} reserved, {device} in use on the device"),
        ("Hardware", _from_env(history, ("device", "gpu", "card", "driver", "cpu", "cpu_threads", "platform"))),
        ("Versions", _from_env(history, ("lowmem", "git_commit", "python", "torch", "torchvision", "cuda", "cudnn"))),
        *(("Note", escape_markdown(note)) for note in history.notes),
    ]
    listed = "\n".join(f"- {title}: {text}" for title, text in lines)
    return [f"### {escape_markdown(run.name)} ({escape_markdown(run.network)})", listed]


def _state(history: RunView) -> str:
    done, asked, last = history.epochs_done, history.config.train.epochs, history.last
    if history.state == "finished":
        text = f"finished, {counted(asked, 'epoch')}"
    elif history.state == "finished early":
        text = f"finished early, {done} of {counted(asked, 'epoch')}: no better error (train.patience)"
    elif last is None:
        text = f"no epoch of {asked} completed yet"
        logged = [(row.step, row.loss) for row in history.steps if row.loss is not None]
        text += "".join(f"; newest logged step {at:,} with loss {format_loss(loss)}" for at, loss in logged[-1:])
    else:
        text = f"at epoch {done} of {asked}"
    if history.state == "stopped":
        most = history.config.train.max_steps
        text += ", stopped as planned" + (f" (train.max\\_steps {most:,})" if most else "")
    elif history.state == "out of time":
        text += ", stopped as planned (train.hours)"
    elif not history.state.startswith("finished"):
        text += ", not finished (interrupted, or still running)"
    if history.times_resumed:
        text += ", interrupted and resumed " + times(history.times_resumed)
    # What the run itself noticed: going back from a broken loss, learning nothing, stopping for either.
    if back := tables.details(history, "rollback"):
        scale = back[-1].get("lr_scale")
        rate = f", at last with {scale:g} of the learning rate" if isinstance(scale, int | float) else ""
        why = escape_markdown(back[-1].get("what", ""))
        text += f"; **went back to a checkpoint {times(len(back))}{rate}** ({why})"
    if tables.details(history, "diverged"):
        text += "; **stopped because it diverged**"
    if stuck := tables.details(history, "stuck"):
        text += f"; **learns nothing: at chance up to epoch {escape_markdown(stuck[-1].get('epoch', '?'))} and longer**"
    if last is not None and last.train_loss is not None and not math.isfinite(last.train_loss):
        text += "; **diverged: the training loss is no number any more**"
    return text


def _settings(history: RunView) -> str:
    config = history.config
    model, data, train, optim, schedule = config.model, config.data, config.train, config.optim, config.schedule
    scale = train.epochs / schedule.reference_epochs
    drops = ", ".join(f"{milestone * scale:.3g}" for milestone in schedule.milestones)
    steps, warmup = schedule.kind == "steps", schedule.warmup_epochs
    # `auto` concerns no shallower net.
    low_start = steps and (schedule.low_start == "always" or (model.depth or 0) >= 110)
    goes = f", times {schedule.gamma:g} after epochs {drops}" if drops else ""
    if not steps:
        goes = f" at most, {schedule.kind} to {schedule.final_share:g} of it"
    if warmup:
        goes += f", warm-up of {warmup:g} epochs"
    said = [
        f"{model.block} blocks, width {model.width}" if model.spec is None else model.words,
        tables.describe_source(data.source) + ("" if data.augment else ", not augmented"),
        f"seen at {data.image_size}x{data.image_size}",
        counted(train.epochs, "epoch"),
        f"batch {train.batch}" + (f" in micro-batches of {train.micro_batch}" if train.micro_batch else ""),
        f"{'SGD' if optim.kind == 'sgd' else 'AdamW'}, lr {optim.lr:g}{goes}",
        f"momentum {optim.momentum:g}" + (" (Nesterov)" if optim.nesterov else "") if optim.kind == "sgd" else "",
        f"betas {optim.betas[0]:g} and {optim.betas[1]:g}" if optim.kind == "adamw" else "",
        f"weight decay {optim.weight_decay:g}" + ("" if optim.decay_norms else ", not of norms and biases"),
        "" if optim.clip_norm is None else f"gradients clipped to a norm of {optim.clip_norm:g}",
        "" if optim.ema is None else f"tested with a running mean of the weights (decay {optim.ema:g})",
        *tables.regularisation(config),
        f"precision {train.precision}",
        f"seed {config.seed}",
        f"low start {schedule.low_start}" if low_start else "",
        "" if data.train_subset is None else counted(data.train_subset, "training picture"),
        "" if data.test_subset is None else counted(data.test_subset, "test picture"),
        f"{counted(data.val_split, 'training picture') if data.val_split else 'no training pictures'} held back",
    ]
    return escape_markdown("; ".join(filter(None, said)))


def _best(history: RunView) -> str:
    best = history.best
    if best is None:
        return f"{UNKNOWN} (none saved)"
    where = "at an unknown epoch" if best.epoch is None else f"of epoch {best.epoch}"
    text = f"{where}, error {percent(best.error_pct)}"
    if best.chosen_on == "val":
        text += " on the held-back training pictures, on which they were chosen"
        there = next((row.test_error_pct for row in history.epochs if row.epoch == best.epoch), None)
        return text if there is None else f"{text}; test error there {percent(there)}"
    if best.chosen_on == "test":
        return (
            f"{text} on the test set, **on which they were chosen: this error is optimistic** and no "
            "estimate for new pictures; hold back training pictures (--val-split) to avoid that"
        )
    return f"{text}; on what they were chosen is not recorded"


def _from_env(history: RunView, keys: Sequence[str]) -> str:
    """What env.json says, and what a resume found changed since."""
    sources, said = [history.env, *tables.details(history, "resume")], []
    for key in keys:
        values = [_plain(source[key]) for source in sources if source.get(key) not in (None, "")]
        changes = [value for before, value in pairwise(["", *values]) if value != before]
        if changes:
            said.append(f"{key.replace('_', ' ')} {', then '.join(changes)}")
    return escape_markdown("; ".join(said)) or UNKNOWN


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1d; --soft: #555; --line: #d8d8d8; --paper: #fff; --head: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --line: #444; --paper: #181818; --head: #242424 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 1rem; max-width: 54rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem }
h2 { font-size: 1.3rem; margin: 2.2rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.4rem }
p, li { max-width: 44rem }
ul { padding-left: 1.2rem }
figure { margin: 0.6rem 0 1.2rem }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; background: #fff; border-radius: 4px }
.wide { overflow-x: auto; margin: 0.8rem 0 }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
thead th { background: var(--head) }
td[style] { white-space: nowrap }
@media (max-width: 30rem) {
  table { font-size: 0.82rem }
  th, td { padding: 0.3rem 0.3rem }
  td:not([style]) { overflow-wrap: anywhere; min-width: 5.5em }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --line: #bbb; --paper: #fff; --head: #eee }
  @page { margin: 15mm }
  body { max-width: none; padding: 0; font-size: 10pt }
  p, li { max-width: none }
  h2, h3 { break-after: avoid }
  figure, tr { break-inside: avoid }
  figure img { max-width: 125mm }
  .wide { overflow: visible }
  thead { display: table-header-group }
}
""".strip()


def to_page(markdown: str, pictures: Sequence[Picture], title: str) -> str:
    """The whole page. An image of the document that is none of `pictures` becomes its words."""
    inlined = {one.file_name: f"data:image/png;base64,{base64.b64encode(one.png).decode()}" for one in pictures}

    def image(match: re.Match[str]) -> str:
        data = inlined.get(html.unescape(match["src"]))
        return match["alt"] if data is None else f'<img src="{data}" alt="{match["alt"]}">'

    # What is a tag here was made by the library: in texts and attributes it writes no angle brackets and no quotes.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r"<p>(<img [^>]*>)</p>", r"<figure>\1</figure>", body)
    body = re.sub(r'<img src="(?P<src>[^"]*)" alt="(?P<alt>[^"]*)"[^>]*>', image, body)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table>\n</div>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        "</body>\n</html>\n"
    )
