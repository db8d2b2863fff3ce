"""How settings name networks: those of the family (`res110`), and any other (`torchvision:resnet50`,
`timm:convnext_tiny`, `my_net.py:Net`) with what it is made with. What can be said of them without running anything: no
torch.

A file is code. A run records a hash of it and of the files beside it that it imports, and `refuse_changed_files` is
asked before any of them is run again. Known limitation: a hash tells that a file is the one that was recorded, not who
wrote it: resuming, verifying or evaluating a run that somebody else made runs the file that it names, if there is one
at that path. What no run records names none: a relative path, and a file in the run's own folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.reading import Unreadable, read_limited, shorten

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

LIBRARIES = ("torchvision", "timm")
PRETRAINED = "torchvision"  # the weights to begin with are the library's
FORMS = "torchvision:NAME, timm:NAME or FILE.py:NAME"
# What decides outputs and weights: these follow the data, and what train.init says.
_TAKEN = {
    "num_classes": "follows the data",
    **dict.fromkeys(("weights", "pretrained", "checkpoint_path"), "would load weights, which --init does"),
    **dict.fromkeys(("weights_backbone", "pretrained_backbone"), "would load weights, which --init does"),
}
_FILE_LIMIT_BYTES = 16 << 20


# -- the family --------------------------------------------------------------------------------------------------------


def canonical_arch(name: str) -> str:
    """`ResNet-110`, `resnet110` and `RES110` are `res110`, `plain-20` is `cnn20`; others come back as they are."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    short = re.sub(r"^(resnet|plainnet|plain)(?=\d)", lambda found: "res" if found[1] == "resnet" else "cnn", plain)
    return short if short in ARCHITECTURES else name


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


# -- others ------------------------------------------------------------------------------------------------------------


def split_spec(spec: str) -> tuple[str, str]:
    """`torchvision:resnet50` -> (`torchvision`, `resnet50`), `C:/nets/my_net.py:Net` -> (`C:/nets/my_net.py`, `Net`).
    Raises ValueError for what has none of these forms."""
    place, colon, name = spec.rpartition(":")
    if place in LIBRARIES and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        return place, name
    if colon and place.endswith(".py") and name.isidentifier():
        return place, name
    hint = f", like torchvision:{spec}" if re.fullmatch(r"[a-z][a-z0-9_]*", spec) else ""
    hint = f", like {spec}:Net for a class Net in it" if spec.endswith(".py") else hint
    raise ValueError(f"{shorten(spec)!r} names no network: write {FORMS}{hint}")


def canonical_spec(spec: str) -> str:
    """With a file's path absolute: a run goes on from any folder. Raises ValueError."""
    place, name = split_spec(spec)
    if place in LIBRARIES:
        return spec
    if "\0" in place or place != place.encode("utf-8", "replace").decode():
        raise ValueError(f"{place!r} is no path in UTF-8, and a run records it as text: rename it")
    return f"{os.path.abspath(os.path.expanduser(place))}:{name}"


def canonical_init(text: str) -> str:
    """The weights to begin with: a path is made absolute, for what is recorded. Raises ValueError."""
    if not text or "\0" in text or text != text.encode("utf-8", "replace").decode():
        raise ValueError(f"{text!r} is no path in UTF-8: give a file, a run's folder or {PRETRAINED}")
    return text if text == PRETRAINED else os.path.abspath(os.path.expanduser(text))


def patterns(value: object) -> object:
    """One pattern alone is a list of one."""
    return (value,) if isinstance(value, str) else value


def file_of(spec: str | None) -> Path | None:
    """The file that has the network; None for a library's, and for none."""
    place = None if spec is None else split_spec(spec)[0]
    return None if place is None or place in LIBRARIES else Path(place)


def vouched(spec: str, sha256: Mapping[str, str], run: Path) -> dict[str, str]:
    """The hashes in a `run` that says it is of `spec`; an empty one of the network's file, which no file has, where it
    has none, and where lowmem would not have recorded that: a relative path, or a file in the run's own folder. Whoever
    made the folder could bring that along."""
    if (file := file_of(spec)) is None:
        return dict(sha256)
    inside = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(run))
    return {file.name: "", **({} if inside or not os.path.isabs(file) else sha256)}


def short_name(spec: str) -> str:
    """For folders and labels: `resnet50`, `my_net-Net`."""
    place, name = split_spec(spec)
    return name if place in LIBRARIES else f"{Path(place).stem}-{name}"


def describe(spec: str, args: Mapping[str, object]) -> str:
    """`torchvision:resnet50`, `my_net.py:Net (depth=3)`: in a file only its own name, where it lies is nobody's
    business."""
    place, name = split_spec(spec)
    said = ", ".join(f"{key}={value!r}" for key, value in args.items())
    return shorten(f"{place if place in LIBRARIES else Path(place).name}:{name}" + (f" ({said})" if said else ""), 200)


def parse_args(texts: Iterable[str]) -> dict[str, object]:
    """`["depth=3", "act=relu"]` -> {"depth": 3, "act": "relu"}: values are Python literals, else text. Raises
    UsageError."""
    args: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UsageError(f"--model-args {shorten(text)!r} is not of the form name=value, like depth=3")
        if key.strip() in args:
            raise UsageError(f"--model-args gives {key.strip()} twice: give it once")
        try:
            args[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            args[key.strip()] = value
    try:
        return check_args(args)
    except ValueError as error:
        raise UsageError(f"--model-args: {error}") from None


def check_args(args: Mapping[str, object]) -> dict[str, object]:
    """As JSON has them (tuples become lists), since a run records them. Raises ValueError."""
    for key, value in args.items():
        if not key.isidentifier():
            raise ValueError(f"{shorten(key)!r} is no name of an argument")
        if key in _TAKEN:
            raise ValueError(f"{key} {_TAKEN[key]}: leave it out")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"{key}={shorten(repr(value))} cannot be recorded: give numbers, text, true or false, null, lists and "
                "dictionaries of them"
            ) from None
    plain: dict[str, object] = json.loads(json.dumps(dict(args)))
    return plain


# -- files -------------------------------------------------------------------------------------------------------------


def read_file(file: Path) -> bytes:
    """The text of a network's file, or of one beside it. Raises PreflightError."""
    try:
        return read_limited(file, _FILE_LIMIT_BYTES)
    except (OSError, Unreadable) as error:
        why = error.strerror or error if isinstance(error, OSError) else error
        raise PreflightError(f"the network's file {file} cannot be read ({why}): give --model the path of it") from None


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refuse_changed_files(spec: str | None, sha256: Mapping[str, str]) -> None:
    """Raises PreflightError unless the file of a recorded network, and those beside it (`sha256`: by their paths from
    its folder), are what was recorded. Nothing of them is run."""
    if (file := file_of(spec)) is None or spec is None:
        return
    way_out = f"put it back, or go on in a new run with `lowmem fork` and --model FILE.py:{split_spec(spec)[1]}"
    if not sha256.get(file.name):
        raise PreflightError(f"no hash of {file} is recorded, and it is not run without: {way_out}")
    for name, recorded in sha256.items():
        path = file.parent / name
        try:
            found = hash_of(read_limited(path, _FILE_LIMIT_BYTES))
        except FileNotFoundError:
            raise PreflightError(f"{path}, of the trained network, is gone: {way_out}") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise PreflightError(f"{path}, of the trained network, cannot be read ({why}): {way_out}") from None
        if found != recorded:
            raise PreflightError(
                f"{path} has changed since the network was trained (SHA-256 {found[:12]}, recorded "
                f"{shorten(recorded[:12])}), and is not run: {way_out}"
            )
