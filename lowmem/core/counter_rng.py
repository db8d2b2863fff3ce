"""Randomness that is addressed, not streamed (invariant 3): a draw is a function of (seed, purpose, epoch, index …).

The mixing function is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014),
whose finaliser is a bijection with full avalanche; written out, so that no draw depends on the version of a library.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def derive_seed(seed: int, *address: str | int) -> int:
    """A 63-bit seed for (seed, *address); distinct addresses give unrelated seeds."""
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in address)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_uint64(key: int, indices: NDArray[np.integer]) -> NDArray[np.uint64]:
    """One uniform 64-bit word per index: a function of (key, index) alone. Shape and order follow `indices`."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (indices.astype(np.uint64) + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        return z ^ (z >> np.uint64(31))


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64 [n], as a function of (key, n): the indices sorted by their drawn words."""
    words = draw_uint64(key, np.arange(n, dtype=np.uint64))
    # Equal words are next to impossible; a stable sort still makes the result one function of the address.
    return np.argsort(words, kind="stable").astype(np.int64)
