"""Settings: frozen, validated when made, with a dotted name each. No torch, no defaults hidden elsewhere. How they are
gathered (recipe, file, flags, --set) is in `lowmem.config.settings`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from lowmem.core.errors import UsageError
from lowmem.core.units import parse_size

BLOCK_LAYOUT: dict[tuple[int, str], tuple[int, int, int, int]] = {
    (20, "basic"): (2, 2, 3, 2),
    (34, "basic"): (3, 4, 6, 3),
    (50, "bottleneck"): (3, 4, 6, 3),
    (56, "basic"): (6, 6, 9, 6),
    (56, "bottleneck"): (3, 4, 9, 3),  # really 59 layers; the homework report calls it 56
    (101, "bottleneck"): (3, 4, 23, 3),
    (110, "basic"): (9, 16, 20, 9),
    (110, "bottleneck"): (3, 4, 26, 3),
}
_DEPTHS = sorted({depth for depth, _ in BLOCK_LAYOUT})
ARCHITECTURES: tuple[str, ...] = tuple(f"{kind}{depth}" for kind in ("res", "cnn") for depth in _DEPTHS)


def resolve_block(arch: str, block: str | None) -> str:
    """The block of an architecture: the asked one if the family has it, else the homework report's for that depth.
    Raises UsageError for an unknown architecture or a block that the family does not have at that depth."""
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    depth = int(arch[3:])
    known = [name for d, name in BLOCK_LAYOUT if d == depth]
    if block is None:
        return known[0]
    if block not in known:
        raise UsageError(f"{arch} has no {block!r} blocks in this family: use --block {' or --block '.join(known)}")
    return block


def _check_source(source: str) -> str:
    if source in {"cifar10", "fashion-mnist", "shapes"} or (source.startswith("folder:") and len(source) > 7):
        return source
    raise ValueError(f"{source!r} is no data source: use cifar10, fashion-mnist, shapes or folder:PATH")


Size = Annotated[
    PositiveInt, BeforeValidator(lambda value: parse_size(value) if isinstance(value, int | str) else value)
]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Values of a file: frozen, and nothing that is not known."""


class ModelConfig(Section):
    """The network: a name of the family, its block (`basic`, `bottleneck`) and the stem's channels."""

    arch: str = "res20"
    block: Literal["basic", "bottleneck"] = "basic"
    width: Annotated[int, Field(gt=0, le=4096)] = 64

    @model_validator(mode="before")
    @classmethod
    def _fill_block(cls, values: object) -> object:
        if isinstance(values, dict):
            arch = values.get("arch", "res20")
            if not isinstance(arch, str):
                raise ValueError(f"{arch!r} is no architecture name")
            values = {**values, "block": resolve_block(arch, values.get("block"))}
        return values


class DataConfig(Section):
    """Where pictures come from. `root`: folder that holds (or receives) cifar10 and fashion-mnist files."""

    source: Annotated[str, AfterValidator(_check_source)] = "cifar10"
    root: str = "data"
    cache: str | None = Field(None, description="folder for decoded pictures; default: the user's cache folder")
    download: bool = True
    train_subset: PositiveInt | None = Field(
        None, description="train on this many pictures, the same share of every class, chosen by the seed"
    )
    test_subset: PositiveInt | None = Field(None, description="test on this many pictures, chosen likewise")
    val_split: int = Field(default=0, ge=0, description="hold back this many training pictures")
    augment: bool = Field(True, description="random crop with padding 4 and random horizontal flip")


class OptimConfig(Section):
    """SGD (Sutskever et al. form as in torch.optim.SGD); weight decay on every parameter."""

    lr: PositiveFloat = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    nesterov: bool = False


class ScheduleConfig(Section):
    """Step schedule. Milestones are epochs of a run of `reference_epochs`; a run of another length scales them.

    `low_start`: He et al. (2016, section 4.2) start the 110-layer net at lr 0.01 until its training error is under
    80 %. `auto`: for depths of 110 and more. It ends at the latest at the first milestone, and is decided at the end
    of an epoch, from that epoch's training error.
    """

    milestones: tuple[PositiveFloat, ...] = (81, 122)
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    reference_epochs: PositiveInt = 164
    low_start: Literal["auto", "always", "never"] = "auto"
    low_start_lr: PositiveFloat = 0.01
    low_start_until_error_pct: Annotated[float, Field(gt=0, lt=100)] = 80.0

    @model_validator(mode="after")
    def _rising(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} do not rise: write them in rising order, each once")
        return self


class TrainConfig(Section):
    """The step. `batch` is the effective batch; `micro_batch` pictures at a time go through the network."""

    epochs: Annotated[int, Field(gt=0, le=1_000_000)] = 164
    batch: Annotated[int, Field(gt=0, le=1 << 24)] = 128
    micro_batch: PositiveInt | None = None
    max_steps: PositiveInt | None = Field(None, description="stop after this many steps (trials)")
    precision: Literal["auto", "fp32", "amp"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(
        True, description="CUDA: kernels that give the same bits every time, so that a resumed run has them too"
    )
    tf32: Literal["auto", "never"] = Field(
        "auto", description="fp32 convolutions on Ampere and later: as torch is set (TF32), or true fp32"
    )
    batch_norm: Literal["auto", "library", "native"] = Field(
        "auto",
        description="kernels of a planned step on CUDA: the library's choice (the bits of plain PyTorch), or native "
        "ones (in place, another rounding); auto: the library's",
    )
    eval_batch: PositiveInt | None = Field(None, description="pictures at a time in evaluation; default: batch")
    log_every_steps: PositiveInt = 20
    grad_norms_every: PositiveInt | None = Field(
        None,
        description="steps between two records of the layers' gradient norms; default: an epoch's tenth, at most 100",
    )
    on_stuck: Literal["warn", "stop"] = Field("warn", description="what a run that does not learn does")
    on_nan: Literal["rollback", "stop"] = Field(
        "rollback", description="what a run does whose loss is no number any more, or has exploded"
    )
    sync_bn: bool = Field(
        False,
        description="several processes: batch norm over the whole batch, as in one process, not over each one's part",
    )
    peer_timeout_minutes: PositiveFloat = Field(
        10.0, description="several processes: give up one that does not answer for so long; a resume wants it again"
    )
    tensorboard: bool = Field(False, description="write TensorBoard event files while the run is trained")

    @model_validator(mode="after")
    def _micro_fits(self) -> TrainConfig:
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} is larger than batch {self.batch}: lower it or leave it out"
            )
        return self


class MemoryConfig(Section):
    """What the step must fit into. Without any of these the CPU trains unplanned, and a CUDA device has what is free.

    `vram`: bytes, or text like `6G`; on the CPU it bounds the step's tensors, with a card or on CUDA it is the memory
    of the (then emulated) card. `card`: a profile by name or path, or for several processes one each, with commas
    between; `platform`: the machine it is in, for the share of its memory that is usable. `auto_batch`: choose the
    batch with the most pictures per second that fits; written `train.batch: auto`. `calibrate`: predict time and
    workspace by what was measured on this device (`auto`: on CUDA), measuring what was not measured yet. `confirm`:
    whether a plan is tried with real steps in a process of its own before the run (`auto`: on CUDA).
    """

    vram: Size | None = None
    card: str | None = None
    platform: Literal["auto", "linux", "linux-display", "windows"] = "auto"
    calibrate: Literal["auto", "always", "never"] = "auto"
    allow_accumulation: bool = True
    auto_batch: bool = False
    confirm: Literal["auto", "always", "never"] = "auto"


class CheckpointConfig(Section):
    """When to save: after every epoch, and so often that a kill loses no more than N minutes and N steps if set.
    `keep` good generations stay."""

    every_minutes: PositiveFloat | None = 10.0
    every_steps: PositiveInt | None = None
    keep: Annotated[int, Field(ge=2)] = 2
    keep_every: PositiveInt | None = Field(None, description="keep those of every N-th epoch too, to fork from")

    @property
    def steps_between_saves(self) -> int | None:
        """Half of `every_steps`: the other half is for writing one, while training goes on (`train.watchers`)."""
        return None if self.every_steps is None else max(1, self.every_steps // 2)


class Config(Section):
    recipe: str = "report"
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


# What may differ on resume: it changes where, how often and how long, not what is computed.
_OPERATIONAL = {
    "train": "device max_steps log_every_steps grad_norms_every on_stuck on_nan tensorboard peer_timeout_minutes",
    "data": "source root cache download",  # a moved folder; the pictures themselves are checked by their fingerprint
    "memory": "vram card platform calibrate allow_accumulation confirm",
    "checkpoint": "every_minutes every_steps keep keep_every",
}
OPERATIONAL = frozenset(f"{section}.{name}" for section, names in _OPERATIONAL.items() for name in names.split())


def for_process(config: Config, rank: int, size: int) -> Config:
    """The settings of one of `size` processes: of several cards named in `memory.card` its own, by rank.
    Raises UsageError unless there is one card for all, or one for each."""
    cards = cards_of(config)
    if len(cards) <= 1:
        return config
    if len(cards) != size:
        process = "process" if size == 1 else "processes"
        raise UsageError(
            f"--card names {len(cards)} cards, for {size} {process}: name one for all (--set memory.card={cards[0]}), "
            f"or start one process for each with `torchrun --nproc-per-node={len(cards)} -m lowmem …`"
        )
    memory = config.memory.model_copy(update={"card": cards[rank]})
    return config.model_copy(update={"memory": memory})


def cards_of(config: Config) -> tuple[str, ...]:
    """The cards named in `memory.card`, by rank: none, one for all processes, or one for each."""
    named = config.memory.card
    return () if named is None else tuple(part.strip() for part in named.split(",") if part.strip())


def flatten(config: Config) -> dict[str, object]:
    """`{"model.arch": "res20", ...}` in the order of the classes above; tuples become lists."""
    return dotted(config.model_dump(mode="json"))


def dotted(nested: Mapping[Any, object]) -> dict[str, object]:
    """Nested dictionaries -> dotted names."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {str(name): value}
    return flat


@cache
def known_keys() -> tuple[str, ...]:
    return tuple(flatten(Config()))


def nest(flat: Mapping[str, object]) -> dict[str, Any]:
    """The inverse of `flatten` on plain values: dotted names -> nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
