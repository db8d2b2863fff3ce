"""Gathers settings: defaults < recipe < --config < flags < --set, and remembers where each came from."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowmem.config.catalogue import catalogue, nearest
from lowmem.config.networks import vouched
from lowmem.config.schema import (
    BEFORE,
    OF_THE_WEIGHTS,
    OPERATIONAL,
    OWN_NETWORK,
    Config,
    dotted,
    flatten,
    known_keys,
    nest,
)
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

_BUDGETS = ("memory.vram", "memory.tensors")  # of which there is one at most


@dataclass(frozen=True)
class Settings:
    """A validated configuration, and for each dotted name where its value came from."""

    config: Config
    sources: Mapping[str, str]

    def replace(self, values: Mapping[str, object], source: str) -> Settings:
        """The same settings with some values replaced, validated again. Raises UsageError."""
        flat = {**flatten(self.config), **values}
        values = {**values, **dict.fromkeys(_outranked(flat, dict.fromkeys(values, 1)))}
        flat |= values
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
    for key in _outranked(flat, layer):
        del flat[key], sources[key]
    _one_network(flat, sources, layer)
    if layer.get("model.block", -1) < layer.get("model.arch", -1):
        flat.pop("model.block", None)  # one that a file chose for its own architecture is not forced on another
    return Settings(validate(flat, sources), {key: sources.get(key, "default") for key in known_keys()})


UNUSED = "means nothing beside model.spec"  # a source
_TYPED = 2  # the layer of flags; --set is above
_FAMILY = {"model.arch": "--arch", "model.block": "--block", "model.width": "--width"}


def _one_network(flat: dict[str, object], sources: dict[str, str], layer: Mapping[str, int]) -> None:
    """Of a network of the family and another the one of the higher layer stays; a run records both, and its own counts.
    Raises UsageError for two that are typed."""
    spec = layer["model.spec"] if flat.get("model.spec") is not None else -1
    highest = max((key for key in _FAMILY if key in flat), key=lambda key: layer[key], default=None)
    family = -1 if highest is None else layer[highest]
    if highest is not None and min(spec, family) >= _TYPED:
        raise UsageError(
            f"--model names a network of its own, and {_FAMILY[highest]} is for those of the family: give one of them"
        )
    if spec >= family and spec >= 0:
        unused = [*_FAMILY, *(key for key in ("model.args", "model.sha256") if layer.get(key, spec) < spec)]
    else:  # what is typed stays, to be refused
        unused = [key for key in OWN_NETWORK if layer.get(key, _TYPED) < _TYPED]
    for key in unused:
        flat.pop(key, None)
        sources.pop(key, None)
    if spec >= family and spec >= 0:
        sources.update(dict.fromkeys(_FAMILY, UNUSED))


def _outranked(flat: Mapping[str, object], layer: Mapping[str, int]) -> list[str]:
    """The budget whose place one of a higher layer takes. What is typed, from 2 on, is one layer: two budgets there are
    left, to be refused."""
    given = {min(layer.get(key, 0), 2): key for key in _BUDGETS if flat.get(key) is not None}
    return [given[min(given)]] if len(given) > 1 else []


def validate(flat: Mapping[str, object], sources: Mapping[str, str]) -> Config:
    """Dotted names -> Config. Raises UsageError of one line."""
    # YAML reads off, no, on and yes as booleans, and pydantic takes a boolean for a number.
    if flat.get("memory.host") is False:
        flat = {**flat, "memory.host": "off"}
    for key, value in flat.items():
        if isinstance(value, bool) and key in catalogue() and not isinstance(catalogue()[key].default, bool):
            shown = f"{key} = {str(value).lower()} (from {sources.get(key, 'caller')})"
            raise UsageError(f"{shown}: it takes {catalogue()[key].kind}")
    try:
        return Config.model_validate(nest(flat))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        # Of a setting that takes one of several kinds the rest names the kind.
        key = next((known for known in catalogue() if key.startswith(f"{known}.")), key)
        message = first["msg"].removeprefix("Value error, ")
        if key in catalogue() and first["type"] not in ("value_error", "extra_forbidden"):
            message = f"it takes {catalogue()[key].kind}"
        shown = f" = {shorten(repr(flat[key]))}" if key in flat else ""
        where = f" (from {sources[key]})" if key in sources else ""
        head = f"{shorten(key)}{shown}{where}: " if key else ""  # else it is of several settings, and names them
        raise UsageError(f"{head}{shorten(message[0].lower() + message[1:], 500)}") from None


def parse_set(text: str) -> tuple[str, object]:
    """`"optim.lr=0.01"` -> ("optim.lr", 0.01); the value is read as YAML, but what takes text has it as it is typed:
    `data.root=2024`. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {shorten(text)!r} is not of the form dotted.key=value, like --set optim.lr=0.01")
    _check_key(key.strip(), "--set")
    try:
        read = parse_yaml(value)
        typed = catalogue()[key.strip()].is_text and not isinstance(read, str | None | list | dict)
        return key.strip(), value.strip() if typed else read
    except yaml.YAMLError:
        raise UsageError(f"--set {shorten(text)!r}: the value cannot be read: quote it as YAML does") from None


def _check_key(key: str, source: str) -> None:
    if key not in known_keys():
        near = nearest(key)
        hint = f"did you mean {near!r}?" if near else "`lowmem settings` lists them"
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


def read_settings_file(path: Path, *, recorded: bool = False) -> tuple[dict[str, object], str]:
    """A YAML file of nested (or dotted) settings -> dotted names, and its text. `recorded`: by a run, though its first
    line may not say so. Raises UsageError."""
    loaded, text = read_yaml(path, "give --config the path of a YAML file of settings")
    if not isinstance(loaded, dict | None):
        raise UsageError(f"{path} holds no settings: write `section:` lines with `key: value` under them")
    flat = dotted(loaded or {})
    if recorded or text.startswith(_MARK):
        flat = of_older_run(flat, flat.get("train.device"))
    return flat, text


def of_older_run(flat: dict[str, object], device: object) -> dict[str, object]:
    """Recorded settings as they are written now: what came later is as it was before. Without `memory.tensors`,
    `memory.vram` bounded the tensors on a `device` that is the CPU, unless a card was named."""
    flat = {**BEFORE, **flat}
    if "memory.tensors" in flat:
        return flat
    of_tensors = device == "cpu" and flat.get("memory.card") is None
    moved = {"memory.tensors": flat.get("memory.vram"), "memory.vram": None}
    return flat | (moved if of_tensors else {"memory.tensors": None})


def read_recipe(name: str) -> dict[str, object]:
    """A shipped recipe by name or a user's own by path (`*.yaml`) -> dotted names. Raises UsageError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else profiles_folder("recipes") / f"{name}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(profile_names("recipes"))
        raise UsageError(f"unknown recipe {shorten(name)!r}: use one of {known}, or the path of a .yaml file")
    return {key: value for key, value in read_settings_file(path)[0].items() if key not in ("description", "recipe")}


_MARK = "# Every setting of this run,"  # begins all that any version wrote
_HEADER = f"{_MARK} and where it came from. `lowmem train --config THIS --out NEW` repeats it."


def to_yaml(settings: Settings) -> str:
    """config.yaml: every setting, nested, each with where it came from as a trailing comment."""
    lines = [_HEADER]
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
        flat, text = read_settings_file(path, recorded=True)
        for key in flat:
            _check_key(key, str(path))
        if missing := [key for key in _ALWAYS_RECORDED if key not in flat]:
            raise UsageError(f"{path} lacks {missing[0]}, which every run records: it was cut off, restore the file")
        config = validate(flat, dict.fromkeys(flat, str(path)))
        if config.model.spec is not None:
            found = vouched(str(flat["model.spec"]), config.model.sha256, path.parent)
            config = config if found == config.model.sha256 else validate({**flat, "model.sha256": found}, {})
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
    """Raises UsageError naming the settings that differ and are not operational (see `config.OPERATIONAL`)."""
    old, new = flatten(recorded), flatten(wanted)
    other = {key: value for key, value in new.items() if value != old[key] and key not in OPERATIONAL}
    if other:
        listed = ", ".join(
            f"{key} is {old[key]!r} in {run} and cannot become {value!r}" for key, value in other.items()
        )
        raise UsageError(f"{listed} on resume, which repeats the run exactly: {other_run(run, other)}")


def other_run(run: str, values: Mapping[str, object]) -> str:
    """What to do to go on from a run with other settings than it was computed with, in words."""
    if any(key.startswith("model.") or key in OF_THE_WEIGHTS for key in values):
        return "train another network with `lowmem train`"
    if set(values) == {"train.epochs"}:
        return f"`lowmem resume {run} --epochs {values['train.epochs']}` goes on from it in a new run"
    sets = [
        shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}") for key, value in values.items()
    ]
    return f"go on from it in a new run with `lowmem fork {run} --at last {' '.join(f'--set {each}' for each in sets)}`"
