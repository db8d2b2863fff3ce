"""Gathers settings: defaults < recipe < --config < flags < --set, and remembers where each came from."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowmem.config.schema import OPERATIONAL, Config, dotted, flatten, known_keys, nest
from lowmem.core.errors import LowmemError, UsageError
from lowmem.core.reading import (
    SETTINGS_LIMIT_BYTES,
    Unreadable,
    parse_yaml,
    profile_names,
    profiles_folder,
    read_limited,
    shorten,
)
from lowmem.core.units import counted


@dataclass(frozen=True)
class Settings:
    """A validated configuration, and for each dotted name where its value came from."""

    config: Config
    sources: Mapping[str, str]

    def replace(self, values: Mapping[str, object], source: str) -> Settings:
        """The same settings with some values replaced, validated again. Raises UsageError."""
        flat = {**flatten(self.config), **values}
        sources = {**self.sources, **dict.fromkeys(values, source)}
        return Settings(validate(flat, sources), sources)


def gather(
    *,
    recipe: str | None = None,
    config_file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    sets: Sequence[str] = (),
) -> Settings:
    """Settings from all places, in order of precedence. `flags`: dotted name -> value, None meaning "not given".

    Raises UsageError naming the key, the value, where it was written and what would be right."""
    from_file = read_settings_file(config_file)[0] if config_file is not None else {}
    chosen = recipe or str(from_file.get("recipe", "report"))
    layers: list[tuple[str, Mapping[str, object]]] = [
        (f"recipe {chosen}", read_recipe(chosen)),
        (str(config_file), from_file),
        ("flag", {key: value for key, value in (flags or {}).items() if value is not None}),
        ("--set", dict(parse_set(text) for text in sets)),
    ]
    flat: dict[str, object] = {}
    sources: dict[str, str] = {}
    layer: dict[str, int] = {}
    for number, (source, values) in enumerate(layers):
        for key, value in values.items():
            _check_key(key, source)
            if key == "train.batch" and value == "auto":
                # The recipe's batch stays, as what the linear rule for the learning rate starts from.
                key, value = "memory.auto_batch", True
            elif key == "train.batch":
                flat.pop("memory.auto_batch", None)
            flat[key], sources[key], layer[key] = value, source, number
    flat["recipe"] = chosen
    sources["recipe"] = "flag" if recipe else (str(config_file) if "recipe" in from_file else "default")
    if layer.get("model.block", -1) < layer.get("model.arch", -1):
        flat.pop("model.block", None)  # one that a file chose for its own architecture is not forced on another
    return Settings(validate(flat, sources), {key: sources.get(key, "default") for key in known_keys()})


def validate(flat: Mapping[str, object], sources: Mapping[str, str]) -> Config:
    """Dotted names -> Config. Raises UsageError of one line."""
    defaults = flatten(Config())
    for key, value in flat.items():
        if isinstance(value, bool) and key in defaults and not isinstance(defaults[key], bool):
            raise UsageError(f"{key} = {str(value).lower()} (from {sources.get(key, 'caller')}): is no yes or no")
    try:
        return Config.model_validate(nest(flat))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        message = first["msg"].removeprefix("Value error, ")
        shown = f" = {shorten(repr(flat[key]))}" if key in flat else ""
        where = f" (from {sources[key]})" if key in sources else ""
        raise UsageError(f"{shorten(key)}{shown}{where}: {shorten(message[0].lower() + message[1:], 500)}") from None


def parse_set(text: str) -> tuple[str, object]:
    """`"optim.lr=0.01"` -> ("optim.lr", 0.01); the value is read as YAML. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {shorten(text)!r} is not of the form dotted.key=value, like --set optim.lr=0.01")
    _check_key(key.strip(), "--set")
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {shorten(text)!r}: the value cannot be read: quote it as YAML does") from None


# What other trainers call it; spelling alone would lead elsewhere.
_OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.batch",
    "wd": "optim.weight_decay",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "dataset": "data.source",
    "random_seed": "seed",
}


def _check_key(key: str, source: str) -> None:
    valid = known_keys()
    if key in valid:
        return
    last = key.rpartition(".")[2]
    near = [_OTHER_NAMES[last]] if last in _OTHER_NAMES else []
    near += difflib.get_close_matches(key[:100], valid, n=1, cutoff=0.5)
    near += [name for name in valid if name.rpartition(".")[2] == last]
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(valid)}"
    raise UsageError(f"unknown setting {shorten(key)!r} (from {source}): {hint}")


def read_yaml(path: Path, hint: str) -> tuple[Any, str]:
    """The values of a YAML file, and its text. Raises UsageError; `hint`: what to do where it cannot be read."""
    try:
        text = read_limited(path, SETTINGS_LIMIT_BYTES).decode("utf-8")
        return parse_yaml(text), text
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: {hint}") from None
    except Unreadable as error:
        raise UsageError(f"{path} {error}: {hint}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = shorten(getattr(error, "problem", None) or "check it")
        raise UsageError(f"{path}{line} is no valid YAML: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error.__class__.__name__}): {hint}") from None


def read_settings_file(path: Path) -> tuple[dict[str, object], str]:
    """A YAML file of nested (or dotted) settings -> dotted names, and its text. Raises UsageError."""
    loaded, text = read_yaml(path, "give --config the path of a YAML file of settings")
    if not isinstance(loaded, dict | None):
        raise UsageError(f"{path} holds no settings: write `section:` lines with `key: value` under them")
    return dotted(loaded or {}), text


def read_recipe(name: str) -> dict[str, object]:
    """A shipped recipe by name or a user's own by path (`*.yaml`) -> dotted names. Raises UsageError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else profiles_folder("recipes") / f"{name}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(profile_names("recipes"))
        raise UsageError(f"unknown recipe {shorten(name)!r}: use one of {known}, or the path of a .yaml file")
    return {key: value for key, value in read_settings_file(path)[0].items() if key not in ("description", "recipe")}


def to_yaml(settings: Settings) -> str:
    """config.yaml: every setting, nested, each with where it came from as a trailing comment."""
    lines = ["# Every setting of this run, and where it came from. `lowmem train --config THIS --out NEW` repeats it."]
    section = ""
    for key, value in flatten(settings.config).items():
        head, _, name = key.rpartition(".")
        if head != section:
            section = head
            lines.append(f"{head}:")
        # The dumper of the library that reads it back knows how to quote; it ends scalars with a document mark.
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        text = text.removesuffix("...\n").strip(" \n")  # and no other blank: it may be a value
        indent = "  " if head else ""
        lines.append(f"{indent}{name}: {text}  # {settings.sources.get(key, 'default')}")
    return "\n".join(lines) + "\n"


# From the beginning to the end of the file: defaults must not stand in for what was cut off.
_ALWAYS_RECORDED = ("seed", "model.arch", "optim.lr", "train.epochs", "train.precision", "checkpoint.keep")


def from_yaml(path: Path) -> Settings:
    """The settings a run recorded. Raises UsageError if the file is missing or does not validate."""
    try:
        flat, text = read_settings_file(path)
        for key in flat:
            _check_key(key, str(path))
        if missing := [key for key in _ALWAYS_RECORDED if key not in flat]:
            raise UsageError(f"{path} lacks {missing[0]}, which every run records: it was cut off, restore the file")
        config = validate(flat, dict.fromkeys(flat, str(path)))
    except LowmemError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UsageError(f"the run's settings cannot be used: {where}{shorten(error, 500)}") from None
    # The trailing comments of `to_yaml`: lost only for lines that somebody wrote by hand.
    sources, section = dict.fromkeys(known_keys(), str(path)), ""
    for indent, key, source in re.findall(r"^( *)(\w+):(?:.*  # (.+))?$", "\n".join(text.splitlines()), re.MULTILINE):
        if not source:
            section = key
        elif (name := f"{section}.{key}" if indent else key) in sources:
            sources[name] = source
    return Settings(config, sources)


def refuse_changes(recorded: Config, wanted: Config, run: str) -> None:
    """Raises UsageError naming the first setting that differs and is not operational (see `config.OPERATIONAL`)."""
    old = flatten(recorded)
    for key, value in flatten(wanted).items():
        if value == old[key] or key in OPERATIONAL:
            continue
        if key == "train.epochs":
            raise UsageError(
                f"{run} is a run of {counted(recorded.train.epochs, 'epoch')} and stays one: "
                f"`lowmem resume {run} --epochs {value}` goes on from it in a new run"
            )
        way_out = (
            ": train another network with `lowmem train`"
            if key.startswith("model.")
            else f" on resume, which repeats the run exactly: start another with `lowmem fork {run} --at EPOCH --set "
            f"{key}={value}`"
        )
        raise UsageError(f"{key} is {old[key]!r} in {run} and cannot become {value!r}{way_out}")
