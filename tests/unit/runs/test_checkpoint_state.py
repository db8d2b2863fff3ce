"""The header of a safetensors file: what the library writes is read, what it would misread is refused."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lowmem.core.reading import Unreadable
from lowmem.runs.checkpoint_state import parse_header, read_header

TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=10).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.lists(st.integers(0, 3), max_size=3),
    min_size=1,  # of no tensors and with metadata, safetensors 0.8 writes a header that it cannot read itself
    max_size=5,
)


@given(
    TENSORS,
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    st.sampled_from(["float32", "int64", "bool"]),
)
def test_what_the_library_writes_is_read(shapes: dict[str, list[int]], metadata: dict[str, str], dtype: str) -> None:
    data = save({name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}, metadata)
    found, said = parse_header(io.BytesIO(data), len(data))
    assert {name: list(shape) for name, shape in found.items()} == shapes
    assert said == metadata


@given(st.binary(max_size=60), st.integers(0, 2**64 - 1))
def test_any_bytes_are_a_header_or_refused(tail: bytes, length: int) -> None:
    for data in (tail, length.to_bytes(8, "little") + tail, len(tail).to_bytes(8, "little") + tail):
        with suppress(Unreadable):
            parse_header(io.BytesIO(data), len(data))


WRONG = {
    "an unknown type": {"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}},
    "a negative size": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "truth for a size": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "another size than its shape": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "a hole": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}},
    "more than the file": {"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}},
    "less than the file": {},
    "an overlap": {name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"},
    "no entry": {"a": 5},
    "a foreign key": {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], "pickle": ""}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
    "metadata of nothing": {"__metadata__": None, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_header_that_says_impossible_things(what: str, tmp_path: Path) -> None:
    header = json.dumps(WRONG[what]).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(Unreadable):
        read_header(file)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + (1 << 40))
    assert read_header(file)[0]["a"] == (1 << 40,)


def test_no_tensors_at_all() -> None:
    """What a run without momentum saves of its optimizer."""
    data = save({})
    assert parse_header(io.BytesIO(data), len(data))[0] == {}
