"""Where a network that is not of the family comes from: torchvision's registry, timm's, or a Python file, which is run.
Nothing is downloaded: weights begin new (others: `lowmem.models.weights`).

A file is run with its folder first on the path, as `python FILE` would have it, and only while it is run and its
network made: what it imports later, in `forward`, is not found beside it, and not in the hash that a run records.
"""

from __future__ import annotations

import difflib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from lowmem.config.networks import describe, file_of, hash_of, read_file, refuse_changed_files, split_spec
from lowmem.core.errors import PreflightError, UsageError, first_line
from lowmem.core.reading import shorten

_PREFIX = "lowmem_network_"  # of the names of modules that are files of networks
_IN_CHANNELS = ("in_channels", "in_chans")  # how networks name the channels of their pictures


def construct(
    spec: str, args: Mapping[str, Any], num_classes: int, sha256: Mapping[str, str] | None = None, in_channels: int = 3
) -> nn.Module:
    """The network by its own initialisation, on the device that is the default. `sha256`: as a run recorded it, of the
    file and of those beside it; empty: the user names it now. `in_channels`: of the pictures; it is told of others than
    three, where it takes that. `args` have the last word.

    Raises UsageError for a name or arguments that there are not, PreflightError for a file that is not as it was
    recorded (it is not run then) or that fails."""
    said = describe(spec, args)
    with torch.device("cpu"):  # what a module makes when it is imported is there for all networks of it
        make = _maker(spec, dict(sha256 or {}), in_channels)
    with _beside(file_of(spec)):
        try:
            made = make(num_classes, dict(args))
        except TypeError as error:  # what is not taken, in Python's own words
            raise UsageError(f"{said} cannot be made so ({first_line(error)}): change --model-args") from None
        except Exception as error:
            raise PreflightError(f"{said} cannot be made ({first_line(error)}): mend it, or --model-args") from None
    if not isinstance(made, nn.Module):
        raise UsageError(f"{said} makes a {type(made).__name__}, and a network is a torch.nn.Module: name another")
    if (file := file_of(spec)) is not None:
        loaded = _LOADED[file]
        loaded.note_beside()
        if sha256 and (new := sorted(loaded.sha256.keys() - sha256.keys())):
            raise PreflightError(
                f"{file} now imports {new[0]} beside it, which it did not when the network was trained: put "
                f"{file.parent} back as it was, or go on in a new run with `lowmem fork` and --model"
            )
    return made


def file_hashes(spec: str) -> dict[str, str]:
    """SHA-256 by path from its folder, of the file of a network that was constructed in this process and of the files
    beside it that it imports; empty for a library's network."""
    file = file_of(spec)
    return {} if file is None else dict(_LOADED[file].sha256)


def _maker(spec: str, sha256: Mapping[str, str], channels: int) -> Callable[[int, dict[str, Any]], object]:
    place, name = split_spec(spec)
    if place == "torchvision":
        return of_torchvision(name)
    if place == "timm":
        return _of_timm(name, channels)
    if sha256:
        refuse_changed_files(spec, sha256)
    return _of_file(Path(place), name, channels)


@contextmanager
def generators_at(seed: int) -> Iterator[None]:
    """While it lasts, the generators that initialisation draws from begin at the seed; then they are as before."""
    generator = torch.default_generator
    before = generator.get_state(), random.getstate(), np.random.get_state()
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


# -- libraries ---------------------------------------------------------------------------------------------------------


def of_torchvision(name: str) -> Callable[[int, dict[str, Any]], object]:
    from torchvision import models

    known = models.list_models(module=models)  # those that classify
    _refuse_unknown("torchvision", name, known)
    return lambda classes, args: models.get_model(name, weights=None, num_classes=classes, **args)


def _of_timm(name: str, channels: int) -> Callable[[int, dict[str, Any]], object]:
    try:
        import timm
    except ImportError:
        raise PreflightError(f"timm:{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        _refuse_unknown("timm", name, timm.list_models())
    told = {} if channels == 3 else {"in_chans": channels}
    return lambda classes, args: timm.create_model(name, pretrained=False, num_classes=classes, **{**told, **args})


def _refuse_unknown(library: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, like {known[0]}"
    raise UsageError(f"{library} has no network {shorten(name)!r} that classifies pictures: {hint}")


# -- a file ------------------------------------------------------------------------------------------------------------


@dataclass
class _LoadedFile:
    """A file that was run. `sha256`: of it and of what it imports beside it; `names`: of the modules that came so."""

    file: Path
    module: ModuleType
    sha256: dict[str, str]
    names: set[str]

    def note_beside(self) -> None:
        """What of its folder is imported by now."""
        for name, path in _modules_in(self.file.parent).items():
            self.sha256.setdefault(path.relative_to(self.file.parent).as_posix(), hash_of(read_file(path)))
            self.names.add(name)

    @property
    def is_current(self) -> bool:
        return all(_hash_if_there(self.file.parent / name) == known for name, known in self.sha256.items())


_LOADED: dict[Path, _LoadedFile] = {}


def _of_file(file: Path, name: str, channels: int) -> Callable[[int, dict[str, Any]], object]:
    loaded = _LOADED.get(file)
    if loaded is None or not loaded.is_current:
        loaded = _LOADED[file] = _run_file(file)
    target = getattr(loaded.module, name, None)
    if isinstance(target, nn.Module) or not callable(target):
        networks = [key for key, value in vars(loaded.module).items() if _is_network(value, loaded.module)]
        has = f"it has {', '.join(networks)}" if networks else "it defines no subclass of torch.nn.Module"
        wrong = "is no class or function" if hasattr(loaded.module, name) else "is not in it"
        raise UsageError(f"{file}: {name} {wrong}: give --model {file.name}:NAME, where {has}")
    parameters = inspect.signature(target).parameters.values()
    takes = any(one.name == "num_classes" or one.kind is one.VAR_KEYWORD for one in parameters)
    named = [one.name for one in parameters if one.name in _IN_CHANNELS and (channels != 3 or one.default is one.empty)]
    told = dict.fromkeys(named, channels)
    return lambda classes, args: target(**({"num_classes": classes} if takes else {}), **{**told, **args})


def _is_network(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__


def _run_file(file: Path) -> _LoadedFile:
    """Runs it anew. What other files of networks had imported beside them is forgotten: both may have a `layers.py`."""
    for name in {name for other in _LOADED.values() for name in other.names}:
        sys.modules.pop(name, None)
    data = read_file(file)  # once: what is hashed is what is run
    module = ModuleType(_PREFIX + file.stem)
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses and pickles look for it
    before = set(sys.modules)
    with _beside(file), generators_at(0):
        try:
            exec(compile(data, str(file), "exec", dont_inherit=True), module.__dict__)
        except (Exception, SystemExit) as error:
            at = _line_in(error, file)
            raise PreflightError(f"{file}{at} cannot be run ({first_line(error)}): mend it") from None
    loaded = _LoadedFile(file, module, {file.name: hash_of(data)}, set())
    loaded.note_beside()
    loaded.names &= set(sys.modules) - before  # what the caller had imported itself stays
    return loaded


@contextmanager
def _beside(file: Path | None) -> Iterator[None]:
    """While it lasts, modules are looked for in the file's folder first, and nothing is written there."""
    if file is None:
        yield
        return
    folder, written = str(file.parent), sys.dont_write_bytecode
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = written
        if folder in sys.path:
            sys.path.remove(folder)


def _modules_in(folder: Path) -> dict[str, Path]:
    """Name -> file of the modules that were imported from the folder by its being on the path: not what lies deeper in
    it for other reasons, like an environment's packages."""
    found = {}
    for name, module in list(sys.modules.items()):
        file, parts = getattr(module, "__file__", None), name.split(".")
        if not isinstance(file, str) or not file.endswith(".py") or parts[0] == "lowmem":
            continue
        place = folder.joinpath(*parts)
        if Path(file) in (place.with_suffix(".py"), place / "__init__.py"):
            found[name] = Path(file)
    return found


def _hash_if_there(path: Path) -> str | None:
    try:
        return hash_of(read_file(path))
    except PreflightError:
        return None


def _line_in(error: BaseException, file: Path) -> str:
    """`, line 3`, of the file itself."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    at, trace = None, error.__traceback__
    while trace is not None:
        at = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(file) else at
        trace = trace.tb_next
    return "" if at is None else f", line {at}"
