"""The tables of a report: final test errors, beside them the published ones where a run has their setting and else what
it does otherwise; and what each run took.

`HOMEWORK` states SGD, momentum 0.9, weight decay 1e-4, cross-entropy, colour pictures of CIFAR-10 and the blocks of
each network. It does not state batch, schedule, epochs or augmentation: there the usual setting of these nets stands
in, which is what the default settings are, and a difference from it is marked with `ASSUMED`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from lowmem.config.schema import Config
from lowmem.config.sources import CSV, path_in
from lowmem.core.reading import escape_markdown, shorten
from lowmem.core.units import counted, format_duration, format_size
from lowmem.report.naming import NamedRun
from lowmem.runs.view import RunView

UNKNOWN = "–"
RESOURCES_EXPLAINED = (
    "Time is that in which the run was worked on, evaluation and saving included. Images/s: in training, median over "
    "epochs. Memory is the peak. Planned: of a step's tensors, as the plan predicts it, if the run has one. Allocated: "
    "what tensors took. Reserved: what the allocator held for them. Device: the card with everything on it, or without "
    "a card the process. Resumed: how often the run was interrupted and gone on with."
)
# By network; with another block than the usual one it has another name, and is not published.
PUBLISHED_ERROR_PCT: dict[str, float] = {
    "Res20": 8.08,
    "Res56": 7.74,
    "Res110": 7.46,
    "CNN20": 8.92,
    "CNN56": 39.03,
    "CNN110": 89.66,  # never left chance
}
HOMEWORK = "a student's homework report on ResNet against plain nets, trained on a 6 GB GTX 1060"
ASSUMED = "*"
_SOURCES = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion-mnist": "Fashion-MNIST", "shapes": "generated shapes",
}  # fmt: skip
_NOT_PUBLISHED = "not among the networks of the homework report"
_NEVER_TRAINED = "named in the homework report, whose author could not train it: no figure to hold it against"
_NAMED = {"Res56-bottleneck", "Res110-bottleneck"}
_NOTHING = "nothing that the settings show"


@dataclass(frozen=True)
class ReportTable:
    """Texts under texts, a row a run. The columns from `names` to `numbers` are numbers, the others words."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int
    numbers: int

    def to_markdown(self) -> str:
        numbers = range(self.names, self.numbers)
        rule = "|" + "".join("---:|" if column in numbers else "---|" for column in range(len(self.header)))
        rows = [" | ".join(escape_markdown(cell) for cell in row) for row in self.rows]
        return "\n".join(["| " + " | ".join(self.header) + " |", rule, *(f"| {row} |" for row in rows)])


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f} %"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def error_table(runs: Sequence[NamedRun]) -> ReportTable:
    """The published figure stands only beside what was trained as it was; where no run could be, nothing does."""
    header = ("Network", "Run", "Epochs", "Final test error", "Homework report")
    beside = any(map(of_family, runs))
    rows = []
    for run in runs:
        done, asked, last = run.history.epochs_done, run.history.config.train.epochs, run.history.last
        epochs = f"{done}" if done >= asked else f"{done} of {asked}"
        error = percent(None if last is None else last.test_error_pct)
        rows.append((run.network, run.name, epochs, error, *([_published(run)] if beside else [])))
    return ReportTable(header if beside else header[:-1], tuple(rows), 2, 4)


def of_family(run: NamedRun) -> bool:
    """Whether its network is of the family that the homework report is about."""
    return run.history.config.model.spec is None


def _published(run: NamedRun) -> str:
    """The figure, or in a word or two each why it is none for this run."""
    known = PUBLISHED_ERROR_PCT.get(run.network)
    differs = [] if known is not None else ["network"]
    differs += [word for word, _ in _departing(run.history)]
    return f"other {', '.join(dict.fromkeys(differs))}" if differs else percent(known)


def compares(run: NamedRun) -> bool:
    """Whether the published figure of its network is one for it."""
    return run.network in PUBLISHED_ERROR_PCT and not _departing(run.history)


def resource_table(runs: Sequence[NamedRun]) -> ReportTable:
    header = ("Run", "Time", "Images/s", "Planned", "Allocated", "Reserved", "Device", "Resumed")
    rows = []
    for run in runs:
        history = run.history
        allocated, reserved, device = peaks(history)
        if allocated == UNKNOWN:  # on the CPU nobody counts but the check of the plan
            allocated = _checked(history, "measured_peak_bytes")
        planned = _checked(history, "predicted_peak_bytes")
        resumed = times(history.times_resumed) if history.times_resumed else "no"
        took = (elapsed(history), image_rate(history))
        rows.append((run.name, *took, planned, allocated, reserved, device, resumed))
    return ReportTable(header, tuple(rows), 1, 8)


def details(history: RunView, kind: str) -> list[Mapping[str, Any]]:
    return [event.detail for event in history.events if event.kind == kind]


def elapsed(history: RunView) -> str:
    seconds = None if history.last is None else history.last.elapsed_seconds
    return UNKNOWN if seconds is None else format_duration(seconds)


def image_rate(history: RunView) -> str:
    """Pictures a second in training, the median over epochs."""
    rates = [row.images_per_second for row in history.epochs if row.images_per_second is not None]
    return f"{median(rates):,.0f}" if rates else UNKNOWN


def peaks(history: RunView) -> list[str]:
    """The most of all epochs: allocated, reserved, in use on the device; dashes for what is not known of any."""
    rows = [(row.peak_allocated_bytes, row.peak_reserved_bytes, row.device_used_bytes) for row in history.epochs]
    known = [[size for size in column if size is not None] for column in zip((None,) * 3, *rows, strict=True)]
    return [format_size(max(sizes)) if sizes else UNKNOWN for sizes in known]


def _checked(history: RunView, name: str) -> str:
    """Of the plan in force at last: its first steps are held against the prediction."""
    sizes = [detail.get(name) for detail in details(history, "measured")]
    known = [size for size in sizes if type(size) is int and 0 < size < 1 << 60]
    return format_size(known[-1]) if known else UNKNOWN


def describe_source(source: str) -> str:
    """The data set in words; of a folder only its own name, since where it lies is nobody's business."""
    if source in _SOURCES:
        return _SOURCES[source]
    path = path_in(source).replace("\\", "/")
    return f"pictures {'listed in' if source.startswith(CSV) else 'of folder'} {PurePath(path).name or path}"


def differences(history: RunView) -> tuple[str, ...]:
    """In words, all that is known to set the run apart from the published setting; empty if nothing is."""
    return tuple(text for _, text in _departing(history))


def regularisation(config: Config) -> list[str]:
    """What else is done to pictures and labels, beside crop and flip."""
    data, smoothing = config.data, config.train.label_smoothing
    said = [
        (smoothing, f"label smoothing {smoothing:g} (in the training loss)"),
        (data.cutout, f"cutout of {data.cutout} pixels"),
        (data.random_erasing, f"random erasing of {data.random_erasing:g} of the pictures"),
        (data.mixup, f"mixup, alpha {data.mixup:g} (its training errors are against the larger share)"),
    ]
    return [text for given, text in said if given]


def _departing(history: RunView) -> list[tuple[str, str]]:
    """(what, in words) of each difference."""
    config, usual = history.config, Config()
    model, data, optim, train = config.model, config.data, config.optim, config.train
    done, side, size = history.epochs_done, usual.data.image_size, f"{data.image_size}x{data.image_size}"
    # What was done to a run whose loss broke.
    back = [detail.get("lr_scale") for detail in details(history, "rollback")]
    scales = [scale for scale in back if isinstance(scale, int | float)]
    epochs = f"{counted(train.epochs, 'epoch')} instead of {usual.train.epochs}{ASSUMED}"
    micro = f"batch norm over micro-batches of {train.micro_batch}"
    said = [
        (0 < done < train.epochs, "epochs", f"only {done} of its {train.epochs} epochs done"),
        (done == 0, "epochs", "no epoch done yet"),
        (model.spec is not None, "network", f"{model.words} instead of a network of that report"),
        (model.spec is None and model.width != 64, "width", f"width {model.width} instead of 64"),
        (data.source != "cifar10", "data", f"{describe_source(data.source)} instead of the original CIFAR-10"),
        (data.image_size != side, "data", f"pictures seen at {size} instead of {side}x{side}"),
        (data.channels == 1, "data", "pictures seen as grey instead of in colour"),
        (data.train_subset is not None, "data", f"trained on {_pictures(data.train_subset)} instead of 50,000"),
        (data.test_subset is not None, "data", f"tested on {_pictures(data.test_subset)} instead of 10,000"),
        (data.val_split, "data", f"{counted(data.val_split, 'training picture')} held back"),
        (not data.augment, "augmentation", f"no augmentation instead of crop and flip{ASSUMED}"),
        (train.init is not None, "weights", "begun with weights that were trained before"),
        (train.freeze, "weights", f"not trained: {shorten(', '.join(train.freeze), 100)}"),
        (optim.kind != "sgd", "optimizer", "AdamW instead of SGD"),
        (not optim.decay_norms, "weight decay", "no weight decay of norms and biases"),
        (optim.clip_norm is not None, "clipping", f"gradients clipped to a norm of {optim.clip_norm or 0:g}"),
        (optim.ema is not None, "mean", f"tested with a running mean of the weights (decay {optim.ema or 0:g})"),
        (optim.momentum != 0.9, "momentum", f"momentum {optim.momentum:g} instead of 0.9"),
        (optim.weight_decay != 1e-4, "weight decay", f"weight decay {optim.weight_decay:g} instead of 0.0001"),
        (optim.nesterov, "momentum", "Nesterov momentum"),
        (optim.lr != usual.optim.lr, "lr", f"lr {optim.lr:g} instead of {usual.optim.lr:g}{ASSUMED}"),
        (config.schedule != usual.schedule, "schedule", f"another learning-rate schedule{ASSUMED}"),
        (train.epochs != usual.train.epochs, "epochs", epochs),
        (train.batch != usual.train.batch, "batch", f"batch {train.batch} instead of {usual.train.batch}{ASSUMED}"),
        (0 < (train.micro_batch or 0) < train.batch, "batch norm", micro),
        (train.precision in ("amp", "bf16"), "precision", f"mixed precision instead of fp32{ASSUMED}"),
    ]
    said += [(True, "augmentation", text) for text in regularisation(config)]
    rescued = [("lr", f"{scales[-1]:g} of the learning rate after its loss broke")] if scales else []
    return [(word, text) for differs, word, text in said if differs] + rescued


def _pictures(count: int | None) -> str:
    return counted(count or 0, "picture")


def departures(runs: Sequence[NamedRun]) -> tuple[tuple[str, str], ...]:
    """(which runs, what differs): what all have in common once, then what is one run's own; a pair for each text.
    Nothing if no run's network is of the family."""
    if not any(map(of_family, runs)):
        return ()
    differs = [differences(run.history) for run in runs]
    shared = [text for text in differs[0] if all(text in texts for texts in differs)] if len(runs) > 1 else []
    pairs: list[tuple[str, str]] = []
    if shared:
        pairs.append(("both runs" if len(runs) == 2 else f"all {len(runs)} runs", "; ".join(shared)))
    groups: dict[str, list[str]] = {}
    for run, texts in zip(runs, differs, strict=True):
        own = [text for text in texts if text not in shared]
        if run.network not in PUBLISHED_ERROR_PCT:
            own.append(_NEVER_TRAINED if run.network in _NAMED else _NOT_PUBLISHED)
        if own or not shared:
            groups.setdefault("; ".join(own) or _NOTHING, []).append(run.name)
    also = " also" if shared else ""
    return (*pairs, *((f"{', '.join(names)}{also}", text) for text, names in groups.items()))
