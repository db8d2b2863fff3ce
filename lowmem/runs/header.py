"""The header of a safetensors file: names, types and shapes, without torch and without reading the tensors.

The format (huggingface/safetensors, README): eight bytes with the header's length, the header as JSON, the tensors one
after the other without holes. Stricter than the library, and before it, so that what it is handed is known to be sane.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lowmem.core.reading import Unreadable, parse_json, shorten

_HEADER_LIMIT_BYTES = 4 << 20
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8,
    "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """`dtype` in the format's own words (`F32`, `I64`)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says it holds. `metadata`: what its writer added, text to text."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Of a file on disk; reads no more than the header. Raises Unreadable, OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("is no regular file")
    with open(path, "rb") as file:
        first = file.read(8)
        return parse_header(first + file.read(_length(first, status.st_size)), status.st_size)


def parse_header(data: bytes, file_bytes: int) -> Header:
    """`data`: at least the first eight bytes and the header of a file of `file_bytes`. Raises Unreadable."""
    length = _length(data[:8], file_bytes)
    values = parse_json(data[8 : 8 + length])
    if not isinstance(values, dict):
        raise Unreadable("has no header of names")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Unreadable("has metadata that is no text")
    tensors, spans = {}, []
    for name, entry in values.items():
        tensors[name], span = _entry(name, entry)
        spans.append(span)
    end = 0
    for begin, following in sorted(spans):
        if begin != end:
            raise Unreadable("has tensors that overlap or leave holes")
        end = following
    if 8 + length + end != file_bytes:
        raise Unreadable(f"has {file_bytes:,} bytes, its header says {8 + length + end:,}")
    return Header(tensors, metadata)


def _length(first: bytes, file_bytes: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(_HEADER_LIMIT_BYTES, file_bytes - 8):
        raise Unreadable("has no header of a safetensors file")
    return length


def _entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            if dtype in _ITEM_BYTES and len(shape) <= 8 and all(_is_size(n) for n in [*shape, begin, end]):
                if end - begin != prod(shape) * _ITEM_BYTES[dtype]:
                    raise Unreadable(f"gives {shorten(name)} another size than its shape has")
                return TensorInfo(dtype, tuple(shape)), (begin, end)
    raise Unreadable(f"describes {shorten(name)} in a way that is no tensor's")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
