"""Settings: frozen, validated when made, with a dotted name each. No torch, no defaults hidden elsewhere. How they are
gathered (recipe, file, flags, --set) is in `lowmem.config.settings`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from lowmem.config import networks
from lowmem.config.optimization import OptimConfig, ScheduleConfig
from lowmem.config.sections import CheckpointConfig, DataConfig, MemoryConfig, Section
from lowmem.config.sources import SOURCE_SIDE


class ModelConfig(Section):
    """The network: of the family (`arch`, `block`, `width`); or another, where `spec` is set, and these three then mean
    nothing."""

    arch: str = Field("res20", description=f"the network: {', '.join(networks.ARCHITECTURES)} (cnn: without shortcuts)")
    block: Literal["basic", "bottleneck"] = Field(
        "basic", description="kind of residual block; default: what the report used at that depth"
    )
    width: int = Field(64, gt=0, le=4096, description="channels of the stem; later stages have 2, 4 and 8 times them")
    spec: Annotated[str, AfterValidator(networks.canonical_spec)] | None = Field(
        None, description=f"another network, in place of arch, block and width: {networks.FORMS}"
    )
    args: Annotated[dict[str, Any], AfterValidator(networks.check_args)] = Field(
        {}, description="what the network of spec is made with, by name, beside the number of classes"
    )
    sha256: dict[str, str] = Field(
        {}, description="recorded by a run: hashes of spec's file and of those beside it that it imports"
    )

    @property
    def name(self) -> str:
        """Short, for folders and labels: `res110`, `resnet50`, `my_net-Net`."""
        return self.arch if self.spec is None else networks.short_name(self.spec)

    @property
    def words(self) -> str:
        """`res110 (bottleneck, width 64)`, `torchvision:resnet50`."""
        if self.spec is not None:
            return networks.describe(self.spec, self.args)
        return f"{self.arch} ({self.block}, width {self.width})"

    @property
    def given(self) -> dict[str, Any]:
        """What it is made by, by name: the other fields mean nothing."""
        names = {"arch", "block", "width"} if self.spec is None else {"spec", "args", "sha256"}
        return self.model_dump(include=names)

    @property
    def depth(self) -> int | None:
        """Layers of a network of the family; None: another network."""
        return int(self.arch[3:]) if self.spec is None else None

    @model_validator(mode="before")
    @classmethod
    def _fill_block(cls, values: object) -> object:
        if isinstance(values, dict):
            arch = values.get("arch", "res20")
            if not isinstance(arch, str):
                raise ValueError(f"{arch!r} is no architecture name")
            arch = networks.canonical_arch(arch)
            values = {**values, "arch": arch, "block": networks.resolve_block(arch, values.get("block"))}
            if values.get("args") and values.get("spec") is None:
                raise ValueError("arguments are for a network that is named by model.spec (--model): give it too")
        return values


class TrainConfig(Section):
    """The step, its kernels, and what is done about a run that goes wrong."""

    epochs: int = Field(164, gt=0, le=1_000_000, description="length of the run; the schedule is scaled to it")
    batch: int = Field(
        128, gt=0, le=1 << 24, description="pictures of a step of the optimizer; auto: the fastest that fits"
    )
    micro_batch: PositiveInt | None = Field(
        None,
        description="pictures at a time through the network; gradients accumulate to the batch; default: as planned",
    )
    max_steps: PositiveInt | None = Field(None, description="stop after this many steps (trials)")
    patience: PositiveInt | None = Field(
        None, description="end the run after this many epochs without a better error, by which the best weights go"
    )
    hours: float | None = Field(
        None,
        gt=0,
        le=1e5,
        description="hours of training in all: a new run takes no more epochs than fit, as measured before its first "
        "step; when they are over, it stops and is saved",
    )
    precision: Literal["auto", "fp32", "amp", "bf16"] = Field(
        "auto",
        description="amp: mixed precision, fp16 on CUDA and bf16 on the CPU; bf16: that on CUDA too, from Ampere on; "
        "auto: fp32, or amp where it is faster or needed",
    )
    memory_format: Literal["auto", "contiguous", "channels-last"] = Field(
        "auto", description="order of the axes of pictures and weights in memory; auto: what is faster there"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto: cuda where it works")
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
    log_every_steps: PositiveInt = Field(20, description="steps between two rows of steps.csv")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of every training label that is spread evenly over all classes, as cross_entropy does it; "
        "the training loss that is recorded is then the smoothed one",
    )
    grad_norms_every: PositiveInt | None = Field(
        None,
        description="steps between two records of the layers' gradient norms; default: an epoch's tenth, at most 100",
    )
    on_stuck: Literal["warn", "stop"] = Field("warn", description="what a run that learns nothing does")
    on_nan: Literal["rollback", "stop"] = Field(
        "rollback", description="what a run does whose loss is no number any more, or has exploded"
    )
    sync_bn: bool = Field(
        False,
        description="several processes: batch norm over the whole batch, as in one process, not over each one's part",
    )
    init: Annotated[str, AfterValidator(networks.canonical_init)] | None = Field(
        None,
        description="the weights to begin with: a file of them (.safetensors, .pt), a run (its best), or torchvision: "
        "the library's pretrained ones, with model.spec torchvision:NAME; null: new ones, by the seed",
    )
    init_sha256: str | None = Field(None, description="recorded by a run: hash of the file that init led to")
    freeze: Annotated[tuple[str, ...], BeforeValidator(networks.patterns)] = Field(
        (), description="what is not trained: patterns of names of modules or parameters, like layer1* or features.*"
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


class Config(Section):
    """Every setting, by section."""

    recipe: str = Field(
        "report", description="settings to begin with: a shipped recipe (report, modern) or a .yaml file"
    )
    seed: int = Field(0, ge=0, lt=1 << 64, description="of initial weights, order of the pictures and augmentation")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _warmup_ends(self) -> Config:
        warmup, epochs = self.schedule.warmup_epochs, self.train.epochs
        if warmup is not None and warmup >= epochs:
            raise ValueError(
                f"schedule.warmup_epochs {warmup:g} leaves nothing of a run of train.epochs {epochs}: lower it, or "
                "train longer"
            )
        return self

    @model_validator(mode="after")
    def _pretrained(self) -> Config:
        spec = self.model.spec
        if self.train.init == networks.PRETRAINED and not (spec or "").startswith(f"{networks.PRETRAINED}:"):
            raise ValueError(
                f"--init torchvision takes the library's weights of its own network, and this one is {self.model.words}"
                ": give --model torchvision:NAME, or --init a file or a run"
            )
        return self

    @property
    def cpu_link_rate(self) -> float | None:
        """Bytes per second, each way, that copies to host memory are held to where the device is the CPU; None: they
        are not, or the device has a link of its own."""
        rate = self.memory.link
        return rate * 1e9 if self.train.device == "cpu" and rate != "auto" else None


# What may differ on resume: it changes where, how often and how long, not what is computed.
_OPERATIONAL = {
    "train": "device max_steps patience hours log_every_steps grad_norms_every on_stuck on_nan tensorboard "
    "peer_timeout_minutes",
    "data": "source root cache download",  # a moved folder; the pictures themselves are checked by their fingerprint
    "memory": "vram tensors card platform host link calibrate allow_accumulation confirm",
    "checkpoint": "every_minutes every_steps keep keep_every",
}
OPERATIONAL = frozenset(f"{section}.{name}" for section, names in _OPERATIONAL.items() for name in names.split())
# What a fork cannot change, beside the network: it decides other settings when a run is begun.
ONLY_AT_THE_BEGINNING = frozenset({"recipe", "memory.auto_batch", "train.init", "train.init_sha256"})
# Of the network, what a fork can change where its tensors stay: the weights go on in the code that is named.
OWN_NETWORK = ("model.spec", "model.args", "model.sha256")
# What is not of the network, and its weights are made for all the same.
OF_THE_WEIGHTS = frozenset({"data.channels"})


# Settings that came later, with what runs had before: what a run recorded without them was computed so.
BEFORE: Mapping[str, object] = {
    "optim.kind": "sgd",
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.decay_norms": True,
    "optim.clip_norm": None,
    "optim.ema": None,
    "model.spec": None,
    "model.args": {},
    "model.sha256": {},
    "train.sync_bn": False,
    "train.init": None,
    "train.init_sha256": None,
    "train.freeze": [],
    "train.deterministic": True,
    "train.tf32": "auto",
    "train.batch_norm": "auto",
    "train.patience": None,
    "train.hours": None,
    "data.image_size": SOURCE_SIDE,
    "data.channels": 3,
    "data.fit": "stretch",
    "data.test_split": None,
    "memory.host": "off",
    "memory.link": "auto",
    "data.val_folder": False,
    "data.skip_damaged": False,
    "data.cutout": None,
    "data.random_erasing": 0.0,
    "data.mixup": 0.0,
    "schedule.kind": "steps",
    "schedule.warmup_epochs": None,
    "schedule.final_share": 0.0,
    "train.label_smoothing": 0.0,
}


def flatten(config: Config) -> dict[str, object]:
    """`{"model.arch": "res20", ...}` in the order of the classes above; tuples become lists."""
    return dotted(config.model_dump(mode="json"))


def dotted(nested: Mapping[Any, object]) -> dict[str, object]:
    """Nested dictionaries -> dotted names."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        if isinstance(value, dict) and "." not in str(name):
            flat |= {f"{name}.{key}": v for key, v in value.items()}
        else:
            flat[str(name)] = value
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
