"""The published report's final test errors, and what a run does otherwise than it.

The report states SGD, momentum 0.9, weight decay 1e-4, cross-entropy, colour pictures of CIFAR-10 and the
blocks of each network. It does not state batch, schedule, epochs or augmentation: there the usual setting of
these nets stands in, which is what the default settings are, and a difference from it is marked with
`ASSUMED`.
"""

from __future__ import annotations

from pathlib import PurePath

from lowmem.config.schema import Config, resolve_block
from lowmem.runs.view import RunView

PUBLISHED_ERROR_PCT: dict[str, float] = {
    "res20": 8.08,
    "res56": 7.74,
    "res110": 7.46,
    "cnn20": 8.92,
    "cnn56": 39.03,
    "cnn110": 89.66,  # never left chance
}
ASSUMED = "*"
_SOURCES = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "shapes": "generated shapes"}


def published_error_pct(config: Config) -> float | None:
    """The published final test error if the report has this architecture with this block, else None."""
    arch = config.model.arch
    if arch not in PUBLISHED_ERROR_PCT or config.model.block != resolve_block(arch, None):
        return None
    return PUBLISHED_ERROR_PCT[arch]


def describe_source(source: str) -> str:
    """The data set in words; of a folder only its own name, since where it lies is nobody's business."""
    if source in _SOURCES:
        return _SOURCES[source]
    path = source.removeprefix("folder:").replace("\\", "/")
    return f"pictures of folder {PurePath(path).name or path}"


def differences(history: RunView) -> tuple[str, ...]:
    """In words, all that is known to set the run apart from the published setting; empty if nothing is."""
    config = history.config
    return (
        *_progress(history),
        *_model_and_data(config),
        *_optimizer(config),
        *_step(config),
        *_rescued(history),
    )


def _progress(history: RunView) -> list[str]:
    done, asked = history.epochs_done, history.config.train.epochs
    if done >= asked:
        return []
    return [f"only {done} of its {asked} epochs done" if done else "no epoch done yet"]


def _model_and_data(config: Config) -> list[str]:
    found = []
    if config.model.width != 64:
        found.append(f"width {config.model.width} instead of 64")
    if config.data.source != "cifar10":
        found.append(f"{describe_source(config.data.source)} instead of the original CIFAR-10")
    if config.data.train_subset is not None:
        found.append(f"trained on {config.data.train_subset:,} pictures instead of 50,000")
    if config.data.test_subset is not None:
        found.append(f"tested on {config.data.test_subset:,} pictures instead of 10,000")
    if config.data.val_split:
        found.append(f"{config.data.val_split:,} training pictures held back")
    if not config.data.augment:
        found.append(f"no augmentation instead of crop and flip{ASSUMED}")
    return found


def _optimizer(config: Config) -> list[str]:
    usual = Config()
    found = []
    if config.optim.momentum != usual.optim.momentum:
        found.append(f"momentum {config.optim.momentum:g} instead of {usual.optim.momentum:g}")
    if config.optim.weight_decay != usual.optim.weight_decay:
        found.append(f"weight decay {config.optim.weight_decay:g} instead of {usual.optim.weight_decay:g}")
    if config.optim.nesterov:
        found.append("Nesterov momentum")
    if config.optim.lr != usual.optim.lr:
        found.append(f"lr {config.optim.lr:g} instead of {usual.optim.lr:g}{ASSUMED}")
    if config.schedule != usual.schedule:
        found.append(f"another learning-rate schedule{ASSUMED}")
    return found


def _step(config: Config) -> list[str]:
    usual = Config().train
    train = config.train
    found = []
    if train.epochs != usual.epochs:
        found.append(f"{train.epochs} epochs instead of {usual.epochs}{ASSUMED}")
    if train.batch != usual.batch:
        found.append(f"batch {train.batch} instead of {usual.batch}{ASSUMED}")
    if train.micro_batch is not None and train.micro_batch < train.batch:
        found.append(f"batch norm over micro-batches of {train.micro_batch}")
    if train.precision == "amp":
        found.append(f"mixed precision instead of fp32{ASSUMED}")
    return found


def _rescued(history: RunView) -> list[str]:
    """What was done to a run whose loss broke."""
    back = [event.detail.get("lr_scale") for event in history.events if event.kind == "rollback"]
    scales = [scale for scale in back if isinstance(scale, int | float)]
    return [f"{scales[-1]:g} of the learning rate after its loss broke"] if scales else []
