"""A pure model of the caching allocator of CUDA devices: what is reserved for a stream of allocations and frees.

Two pools, small and large blocks. Best fit; a block is split if what is left is at least 512 bytes (small) or more than
1 MiB (large); neighbours that are free merge. If the device has no room for a new segment, fully free segments are
returned and the request is tried once more. The rules are those of c10/cuda/CUDACachingAllocator.cpp with default
settings; `expandable_segments` is not modelled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lowmem.core.units import MIB

MIN_BLOCK_BYTES = 512
SMALL_SIZE_BYTES = MIB  # the largest request that the small pool serves
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_LARGE_BYTES = 10 * MIB  # from here on a request has a segment of its own
ROUND_LARGE_BYTES = 2 * MIB


def round_block(size_bytes: int) -> int:
    """What a request of that size occupies."""
    return max(MIN_BLOCK_BYTES, -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


def segment_bytes(block_bytes: int) -> int:
    """The segment that is fetched from the device for a rounded request."""
    if block_bytes <= SMALL_SIZE_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class DeviceFull(Exception):
    """The model's own out-of-memory: the request does not fit the capacity."""


@dataclass(eq=False)
class _Block:
    """A piece of a segment; neighbours are linked so that they can merge."""

    address: int
    size_bytes: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


@dataclass
class Allocator:
    """One device, one stream; with `capacity_bytes` None it never says no. `allocated_bytes` counts rounded requests,
    `reserved_bytes` segments, both as `torch.cuda` does."""

    capacity_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    _live: dict[int, _Block] = field(default_factory=dict)
    _cached: dict[bool, list[tuple[int, int, _Block]]] = field(default_factory=lambda: {True: [], False: []})
    _next_address: int = 0

    def allocate(self, key: int, size_bytes: int) -> None:
        """Raises DeviceFull. `key` names the request for `free`; requests of 0 bytes take nothing."""
        if size_bytes == 0:
            return
        size = round_block(size_bytes)
        cached = self._cached[size <= SMALL_SIZE_BYTES]
        fit = bisect_left(cached, (size,))
        block = cached.pop(fit)[2] if fit < len(cached) else self._new_segment(size)
        self._split(block, size)
        block.free = False
        self._live[key] = block
        self.allocated_bytes += block.size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def free(self, key: int) -> None:
        """Back to the cache; unknown keys (requests of 0 bytes) are ignored."""
        block = self._live.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.size_bytes
        if block.after is not None and block.after.free:
            self._join(block, self._uncache(block.after))
        if block.before is not None and block.before.free:
            block = self._join(self._uncache(block.before), block)
        self._cache(block)

    def empty_cache(self) -> None:
        """Returns the segments that are wholly free."""
        for *_, block in (*self._cached[True], *self._cached[False]):
            if block.before is None and block.after is None:
                self._uncache(block)
                self.reserved_bytes -= block.size_bytes

    def _new_segment(self, size: int) -> _Block:
        wanted = segment_bytes(size)
        if self.capacity_bytes is not None and self.reserved_bytes + wanted > self.capacity_bytes:
            self.empty_cache()
            if self.reserved_bytes + wanted > self.capacity_bytes:
                raise DeviceFull(f"{wanted} bytes more than {self.reserved_bytes} of {self.capacity_bytes}")
        self.reserved_bytes += wanted
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = _Block(self._next_address, wanted, size <= SMALL_SIZE_BYTES)
        self._next_address += wanted
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size_bytes - size
        if rest < MIN_BLOCK_BYTES or (not block.small and rest <= SMALL_SIZE_BYTES):
            return
        tail = _Block(block.address + size, rest, block.small, before=block, after=block.after)
        if tail.after is not None:
            tail.after.before = tail
        block.after, block.size_bytes = tail, size
        self._cache(tail)

    def _cache(self, block: _Block) -> None:
        block.free = True
        insort(self._cached[block.small], (block.size_bytes, block.address, block))

    def _uncache(self, block: _Block) -> _Block:
        block.free = False
        cached = self._cached[block.small]
        del cached[bisect_left(cached, (block.size_bytes, block.address))]
        return block

    @staticmethod
    def _join(block: _Block, after: _Block) -> _Block:
        block.size_bytes += after.size_bytes
        block.after = after.after
        if block.after is not None:
            block.after.before = block
        return block
