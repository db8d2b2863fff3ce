"""No input of any reader ends in a traceback or does not end (`python -m benchmarks.corruption` tries thousands)."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.faults.fuzzing import Mutation, Reader, fuzz
from tests.faults.readers import readers
from tests.tiny import make_run


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    folder = tmp_path_factory.mktemp("fuzz")
    return readers(make_run(folder / "run"), folder / "work")


def test_what_is_undamaged_is_read(all_readers: list[Reader]) -> None:
    """A reader that refuses everything would pass what follows."""
    for reader in all_readers:
        undamaged = replace(reader, mutations=(lambda rng, data: data,))
        assert fuzz(undamaged, 1, seed=0).read == 1, reader.name


@pytest.mark.parametrize("inputs", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_no_traceback_and_no_hang(inputs: int, all_readers: list[Reader]) -> None:
    tried = [fuzz(reader, inputs, seed=1) for reader in all_readers]
    assert {one.name: one.tracebacks for one in tried if one.tracebacks} == {}
    assert sum(one.hangs for one in tried) == 0
    assert sum(one.inputs for one in tried) == sum(-(-inputs // reader.one_in) for reader in all_readers) > 20 * inputs
    assert sum(one.refused for one in tried) > 6 * inputs


def test_no_number_is_too_large(all_readers: list[Reader]) -> None:
    """Each whole number of what they read, one after the other, becomes one that no float can hold."""

    def mutations(data: bytes) -> tuple[Mutation, ...]:
        spans = [match.span() for match in re.finditer(rb"(?<![\w.])\d+(?![\w.])", data[: 1 << 20])]
        made = [data[:begin] + b"1" + b"0" * 400 + data[end:] for begin, end in spans]
        return tuple(lambda rng, data, one=one: one for one in made)

    tried = []
    for reader in all_readers:
        for one in mutations(reader.seed)[:20]:
            tried.append(fuzz(replace(reader, mutations=(one,)), 1, seed=0))
    assert {one.name: one.tracebacks for one in tried if one.tracebacks} == {}
    assert len(tried) > 200


def test_a_bug_would_be_seen() -> None:
    """The rule of the game itself: an exception of Python counts, one of lowmem does not."""

    def read(data: bytes) -> object:
        raise KeyError("bug")

    tried = fuzz(Reader("broken", b"x", read), 5, seed=0)
    assert (tried.inputs, tried.refused, len(tried.tracebacks)) == (5, 0, 1)
