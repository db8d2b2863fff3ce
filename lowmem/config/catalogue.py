"""What there is to set: each setting with its default, what it takes and means, and where it may still be changed. Read
off the schema; `lowmem settings` prints it, and a refusal says by it what would be right."""

from __future__ import annotations

import difflib
import fnmatch
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lowmem.config.schema import OF_THE_WEIGHTS, ONLY_AT_THE_BEGINNING, OPERATIONAL, OWN_NETWORK, Config
from lowmem.config.sections import CardMemory, Size, TensorMemory

_CLOSE = 0.75  # of two spellings, from which on one may be meant by the other

# What other trainers call it, with the value where the name says one; spelling alone would lead elsewhere.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    **dict.fromkeys(("optimizer", "opt"), "optim.kind"),
    "wd": "optim.weight_decay",
    "batch_size": "train.batch",
    "bs": "train.batch",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    **dict.fromkeys(("amp", "fp16", "mixed_precision"), "train.precision=amp"),
    "bf16": "train.precision=bf16",
    **dict.fromkeys(("gpu", "cuda"), "train.device=cuda"),
    "cpu": "train.device=cpu",
    **dict.fromkeys(("model", "net", "network"), "model.arch"),
    "model_args": "model.args",
    "dataset": "data.source",
    "data": "data.source",
    "random_seed": "seed",
    **dict.fromkeys(("memory", "gpu_memory"), "memory.vram"),
    "save_every": "checkpoint.every_minutes",
    **dict.fromkeys(("early_stopping", "early_stopping_patience"), "train.patience"),
    **dict.fromkeys(("max_time", "max_hours", "time_limit"), "train.hours"),
}


@dataclass(frozen=True)
class Setting:
    """`kind`: what it takes, in words. `choices`: all that it takes, if these are few. `on_resume`, `on_fork`: whether
    they may change it."""

    name: str
    default: object
    kind: str
    choices: tuple[str, ...]
    meaning: str
    on_resume: bool
    on_fork: bool

    @property
    def is_text(self) -> bool:
        return self.kind.startswith("text")

    @property
    def last(self) -> str:
        """The part of the name that is its own: `lr`."""
        return self.name.rpartition(".")[2]


@cache
def catalogue() -> dict[str, Setting]:
    """Every setting by its dotted name, in the order of the schema."""
    defaults = Config().model_dump(mode="json")
    return {setting.name: setting for setting in _settings(Config, "", defaults)}


def _settings(section: type[BaseModel], prefix: str, defaults: dict[str, Any]) -> Iterator[Setting]:
    for own, field in section.model_fields.items():
        kind, name = field.annotation, prefix + own
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{name}.", defaults[own])
            continue
        fixed = name.startswith("model.") or name in ONLY_AT_THE_BEGINNING | OF_THE_WEIGHTS
        on_fork = name in OWN_NETWORK[:2] or not fixed
        choices = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
        meaning, words = field.description or "", _kind(field)
        yield Setting(name, defaults[own], words, choices, meaning, name in OPERATIONAL, on_fork)


def _kind(field: FieldInfo) -> str:
    """`a whole number > 0, or null`."""
    kind: Any = field.annotation
    several = get_origin(kind) in (Union, types.UnionType)
    words = []
    for option in get_args(kind) if several else (kind,):
        if option is type(None):
            words.append("null")
        elif get_origin(option) is Literal:
            words.append(either([str(value) for value in get_args(option)]))
        elif get_origin(option) is dict:
            words.append("a mapping like {name: value}")
        elif get_origin(option) is tuple:
            many, names = Ellipsis in get_args(option), str in get_args(option)
            listed = "a list of patterns" if names else "a rising list of numbers > 0"
            words.append(listed if many else f"numbers like {list(field.default)}")
        elif option in (Size, CardMemory, TensorMemory):
            words.append("a size like 6G")
        else:
            limits = [*field.metadata, *getattr(option, "__metadata__", ())]
            words.append(_plain(getattr(option, "__origin__", option), limits))
    return ", or ".join(words)


def _plain(kind: type | types.UnionType, limits: list[object]) -> str:
    names: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    name = {**names, int | float: "a number"}[kind]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    said = [f"{sign} {getattr(one, name)}" for one in limits for name, sign in signs.items() if hasattr(one, name)]
    return " ".join([name, " and ".join(said)]).strip()


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def nearest(key: str) -> str | None:
    """The setting that a name which is none may mean: by what others call it (`amp` is `train.precision=amp`), else the
    one whose last part is spelt most like it, where it is like it at all; one of the same section is nearer."""
    section, _, last = key[:100].lower().replace("-", "_").rpartition(".")
    names = {**OTHER_NAMES, **{setting.last: setting.name for setting in reversed(catalogue().values())}}
    if last in names and (not section or names[last].startswith(f"{section}.") or last in OTHER_NAMES):
        return names[last]

    def likeness(setting: Setting) -> float:
        alike = difflib.SequenceMatcher(None, last, setting.last).ratio()
        if len(last) >= 3 and setting.last.startswith(last):
            alike = max(alike, _CLOSE)
        return alike + 0.1 * setting.name.startswith(f"{section}.") * (alike >= _CLOSE)

    best = max(catalogue().values(), key=likeness)
    if likeness(best) >= _CLOSE:
        return best.name
    other = difflib.get_close_matches(last, OTHER_NAMES, n=1, cutoff=0.8)
    return OTHER_NAMES[other[0]] if other else None


def find(pattern: str) -> list[Setting]:
    """The settings with `pattern` in their name or meaning, or whose name is like `optim.*`; else what it may mean."""
    wanted = pattern.lower()
    found = [
        one
        for one in catalogue().values()
        if fnmatch.fnmatch(one.name, wanted) or wanted in one.name or wanted in one.meaning.lower()
    ]
    near = None if found else nearest(wanted)
    return [catalogue()[near.partition("=")[0]]] if near else found
