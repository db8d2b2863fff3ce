"""The allocator's model: its published rules, and that it never loses or doubles a byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.core.units import KIB, MIB
from lowmem.simulate.allocator import Allocator, DeviceFull, round_block, segment_bytes


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded(asked: int, taken: int) -> None:
    assert round_block(asked) == taken


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (128 * MIB, 128 * MIB),
    ],
)
def test_segments(block: int, segment: int) -> None:
    assert segment_bytes(block) == segment


def test_small_requests_share_a_segment() -> None:
    allocator = Allocator()
    for key in range(4):
        allocator.allocate(key, 512 * KIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB, 2 * MIB)
    allocator.allocate(4, 1)
    assert allocator.reserved_bytes == 4 * MIB


def test_freed_neighbours_merge_and_are_used_again() -> None:
    allocator = Allocator()
    for key in range(4):
        allocator.allocate(key, 5 * MIB)
    for key in (1, 2):
        allocator.free(key)
    allocator.allocate(9, 10 * MIB - 512)
    assert allocator.reserved_bytes == 20 * MIB


def test_large_rest_up_to_one_mib_is_not_split_off() -> None:
    allocator = Allocator()
    allocator.allocate(1, 21 * MIB)
    assert allocator.allocated_bytes == 22 * MIB  # the segment's last MiB is too little for a block of its own
    allocator.free(1)
    allocator.allocate(2, 20 * MIB)
    assert allocator.allocated_bytes == 20 * MIB


def test_best_fit_takes_the_smallest_that_fits() -> None:
    allocator = Allocator()
    allocator.allocate(1, 40 * MIB)
    allocator.allocate(2, 30 * MIB)
    allocator.free(1)
    allocator.free(2)
    allocator.allocate(3, 29 * MIB)
    allocator.allocate(4, 40 * MIB)
    assert allocator.reserved_bytes == 70 * MIB


def test_pools_are_apart() -> None:
    allocator = Allocator()
    allocator.allocate(1, 15 * MIB)
    allocator.free(1)
    allocator.allocate(2, 100)
    assert allocator.reserved_bytes == 18 * MIB


def test_cached_segments_are_returned_before_giving_up() -> None:
    allocator = Allocator(capacity_bytes=50 * MIB)
    allocator.allocate(1, 30 * MIB)
    allocator.free(1)
    allocator.allocate(2, 40 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    with pytest.raises(DeviceFull):
        allocator.allocate(3, 12 * MIB)
    allocator.free(2)
    allocator.allocate(3, 12 * MIB)
    assert allocator.peak_reserved_bytes == 40 * MIB


def test_fragmentation_shows() -> None:
    """A segment that is partly in use cannot be returned, however much of it is free."""
    allocator = Allocator(capacity_bytes=100 * MIB)
    allocator.allocate(1, 60 * MIB)
    allocator.free(1)
    allocator.allocate(2, 10 * MIB)
    with pytest.raises(DeviceFull):
        allocator.allocate(3, 52 * MIB)


def test_requests_of_nothing_take_nothing() -> None:
    allocator = Allocator()
    allocator.allocate(1, 0)
    allocator.free(1)
    assert allocator.reserved_bytes == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30 * MIB)), max_size=60))
def test_nothing_is_lost(requests: list[tuple[bool, int]]) -> None:
    allocator = Allocator()
    live: dict[int, int] = {}
    for key, (release, size) in enumerate(requests):
        if release and live:
            oldest = next(iter(live))
            allocator.free(oldest)
            del live[oldest]
        else:
            allocator.allocate(key, size)
            live[key] = size
        least = sum(round_block(size) for size in live.values() if size)
        slack = MIB * sum(size > MIB for size in live.values())  # rests that were not split off
        slack += 512 * len(live)
        assert least <= allocator.allocated_bytes <= least + slack
        assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    for key in live:
        allocator.free(key)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
