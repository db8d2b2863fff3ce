"""What a checkpoint says of itself, without torch and without reading its tensors: the state of the run, where in it
the checkpoint is, and the names, types and shapes of what a safetensors file holds.

Everything is checked before anything is made of it. Only what a run could not go on from is refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import field, fields
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import RECORD_LIMIT_BYTES, Unreadable, parse_json, read_json, read_limited, shorten

# -- state.json --------------------------------------------------------------------------------------------------------

_LARGEST_LOG = 745.2  # of a positive double, either way


def _sane(value: float) -> float:
    if math.isfinite(value) and abs(value) >= 1e300:
        raise ValueError("too large")
    return value


Whole = Annotated[int, Field(ge=0, lt=1 << 53)]  # a float holds it exactly
Count = Annotated[Whole, Field(strict=True)]
Number = Annotated[float, Field(strict=True), AfterValidator(_sane)]  # a loss is not finite once a run has diverged
Amount = Annotated[float, Field(strict=True, ge=0, lt=1e300, allow_inf_nan=False)]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Best:
    """The best epoch so far, by error on the validation pictures if there are any, else on the test pictures."""

    epoch: Count
    step: Count
    error_pct: Number
    chosen_on: StrictStr


@validated(config=ConfigDict(extra="forbid"))
class RunState:
    """A run between two steps, as state.json holds it: position and running sums. Checked when it is made, not when it
    is changed. Floats go through JSON unchanged (shortest round-trip form)."""

    epoch: Count = 0  # completed
    step: Count = 0
    step_in_epoch: Count = 0
    loss_sum: Number = 0.0  # over the epoch so far
    wrong: Amount = 0.0
    seen: Count = 0
    low_start: StrictBool = False
    best: Best | None = None
    elapsed_seconds: Amount = 0.0
    train_seconds: Amount = 0.0  # of this epoch, evaluation and saving not counted
    scaler: dict[str, Any] = field(default_factory=dict)  # empty where nothing is scaled
    # Older versions did not keep track of what follows.
    share_log_sum: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 0.0  # of the gradient shares recorded
    share_count: Count = 0  # in this epoch (see train.loss_watchers)
    gradient_share: Amount | None = None  # of the last epoch that has any
    chance_epochs: Count = 0  # at chance, up to the last one
    told_stuck: StrictBool = False
    exploded_losses: Count = 0  # logged ones far above chance, one after the other, to the last (train.loss_watchers)
    rollbacks: Count = 0
    lr_scale: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0  # what rollbacks made of the learning rate
    processes: Annotated[int, Field(strict=True, gt=0, lt=1 << 53)] = 1  # that took the last step

    def start_epoch(self) -> None:
        """Clears what belongs to one epoch."""
        self.step_in_epoch = self.seen = 0
        self.loss_sum = self.wrong = self.train_seconds = self.share_log_sum = 0.0
        self.share_count = 0


_ALWAYS_RECORDED = [one.name for one in fields(RunState)][:11]
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_RUN_STATE = TypeAdapter(RunState)


def read_state(state: Mapping[str, Any], step: int) -> RunState:
    """What a run goes on with, of the state.json of the checkpoint of `step`. Raises CorruptCheckpoint naming the first
    field that cannot be: of another type, out of its range, not of this step, or of a version that is not this one."""
    run, lacks = state.get("run"), f"state.json of step {step} lacks what a run needs"
    if not isinstance(run, dict) or not isinstance(state.get("identity"), dict):
        raise CorruptCheckpoint(f"{lacks}: its position and its identity")
    wrong = [name for name in _ALWAYS_RECORDED if name not in run]
    unknown = sorted(run.keys() - {one.name for one in fields(RunState)})
    try:
        read = _RUN_STATE.validate_python(run)
        scaler: list[Any] = [read.scaler.get(name) for name in _SCALER] if read.scaler else []
        sound = {
            "step": read.step == step and read.step_in_epoch <= step,
            "seen": (read.seen > 0) == (read.step_in_epoch > 0),
            "share_log_sum": abs(read.share_log_sum) <= _LARGEST_LOG * read.share_count,
            "scaler": all(type(value) in (int, float) and 0 <= value < 1e300 for value in scaler),
        }
        wrong += [name for name, good in sound.items() if not good]
    except ValidationError as error:
        places = [str(one["loc"][0]) for one in error.errors(include_url=False, include_input=False)]
        wrong += [name for name in places if name not in unknown]
    if wrong:
        raise CorruptCheckpoint(f"{lacks}: {wrong[0]!r} is missing or impossible")
    if unknown:
        raise CorruptCheckpoint(
            f"state.json of step {step} holds {shorten(unknown[0])!r}, which this lowmem does not know: "
            "use the one that wrote it"
        )
    return read


# -- where in the run --------------------------------------------------------------------------------------------------


class Position(BaseModel, frozen=True):
    """A checkpoint that looks whole: `epoch` epochs are completed, `step_in_epoch` steps of the next are done."""

    path: Path
    epoch: Count
    step: Count
    step_in_epoch: Count
    exploded_losses: Any = 0
    identity: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}  # that it was made with; older versions did not say

    @property
    def at(self) -> str:
        """As `lowmem fork --at` takes it: `12` for the end of an epoch, `step:4692` in the middle of one."""
        return f"step:{self.step}" if self.step_in_epoch else f"{self.epoch}"


def read_position(path: Path) -> Position:
    """Of the checkpoint `path`, if its commit record is there and all files have the recorded size. Its hashes are not
    checked (that reads hundreds of MiB); whoever goes on from it verifies it. Raises CorruptCheckpoint."""
    try:
        manifest = read_manifest(path)
        for name in FILES:
            check_size(path / name, manifest["files"][name])
        state = read_json(path / "state.json")
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({error.strerror or error})") from None
    except Unreadable as error:
        raise CorruptCheckpoint(f"{path / 'state.json'} is damaged: it {error}") from None
    run = state.get("run") if isinstance(state, dict) else None
    made = {name: state[name] for name in ("identity", "settings") if isinstance(state, dict) and name in state}
    try:
        return Position.model_validate({**run, **made, "path": path} if isinstance(run, dict) else None)
    except ValidationError:
        raise CorruptCheckpoint(f"{path}: state.json holds no position") from None


# -- the commit record -------------------------------------------------------------------------------------------------

FORMAT, VERSION = "lowmem-checkpoint", 1
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
FILES = (*TENSOR_FILES, "state.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """With an entry for each of `FILES`. Raises CorruptCheckpoint, OSError."""
    file = path / "manifest.json"
    try:
        if file.is_symlink():
            raise CorruptCheckpoint(f"{file} is no commit record")
        data = read_limited(file, RECORD_LIMIT_BYTES)
        manifest = parse_json(data)
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} has no commit record (manifest.json): its writing was cut off") from None
    except Unreadable as error:
        raise CorruptCheckpoint(f"{file} is damaged: it {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptCheckpoint(f"{file} is no commit record of lowmem")
    if manifest.get("version") != VERSION:
        raise CorruptCheckpoint(
            f"{file} is of format version {shorten(manifest.get('version'))}, this lowmem reads {VERSION}: "
            "use the lowmem that wrote it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise CorruptCheckpoint(f"{path}: the commit record does not list exactly {', '.join(FILES)}")
    if not all(isinstance(entry, dict) for entry in files.values()):
        raise CorruptCheckpoint(f"{file} is damaged: it does not say what the files are")
    # The record has no hash of its own; what it must be, byte for byte, is known all the same.
    if data != manifest_bytes(manifest):
        raise CorruptCheckpoint(f"{file} is damaged: it is not as it was written")
    return manifest


def manifest_bytes(manifest: object) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def check_size(file: Path, entry: Mapping[str, Any]) -> int:
    """Bytes of one of `FILES`. Raises CorruptCheckpoint unless it is there, with the size of its entry; OSError."""
    if file.is_symlink() or not file.is_file():
        raise CorruptCheckpoint(f"{file} is missing")
    size = file.stat().st_size
    if size != entry.get("bytes"):
        raise CorruptCheckpoint(f"{file} has {size} bytes, the commit record says {shorten(entry.get('bytes'), 40)}")
    return size


# -- what a safetensors file holds -------------------------------------------------------------------------------------

_HEADER_LIMIT_BYTES = 4 << 20
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8,
    "I64": 8, "U64": 8,
}  # fmt: skip


Shapes = dict[str, tuple[int, ...]]


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Of a safetensors file on disk, of which no more is read: shapes by name, and what its writer added, text to text.
    Raises Unreadable, OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("is no regular file")
    with open(path, "rb") as file:
        return parse_header(file, status.st_size)


def parse_header(file: BinaryIO, file_bytes: int) -> tuple[Shapes, dict[str, str]]:
    """Of a file of `file_bytes`, from its beginning. Raises Unreadable, OSError. The format (huggingface/safetensors,
    README): eight bytes with the header's length, the header as JSON, the tensors one after the other without holes.
    Stricter than the library, and before it, so that what it is handed is sane."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(_HEADER_LIMIT_BYTES, file_bytes - 8):
        raise Unreadable("has no header of a safetensors file")
    values = parse_json(file.read(length))
    if not isinstance(values, dict):
        raise Unreadable("has no header of names")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Unreadable("has metadata that is no text")
    tensors = {name: _shape_and_span(name, entry) for name, entry in values.items()}
    end = 0
    for begin, following in sorted(span for _, span in tensors.values()):
        if begin != end:
            raise Unreadable("has tensors that overlap or leave holes")
        end = following
    if 8 + length + end != file_bytes:
        raise Unreadable(f"has {file_bytes:,} bytes, its header says {8 + length + end:,}")
    return {name: shape for name, (shape, _) in tensors.items()}, metadata


def _shape_and_span(name: str, entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            sizes = all(type(size) is int and 0 <= size < 1 << 48 for size in [*shape, begin, end])
            if dtype in _ITEM_BYTES and len(shape) <= 8 and sizes:
                if end - begin != prod(shape) * _ITEM_BYTES[dtype]:
                    raise Unreadable(f"gives {shorten(name)} another size than its shape has")
                return tuple(shape), (begin, end)
    raise Unreadable(f"describes {shorten(name)} in a way that is no tensor's")
