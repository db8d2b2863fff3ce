"""Subsets with the same share of every class, chosen by an addressed permutation (invariant 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowmem.core import counter_rng as addressed


def class_shares(class_counts: list[int], count: int) -> list[int]:
    """How many of each class make `count` in all: the largest remainder method; ties go to the lower class.

    Raises ValueError if there are fewer than `count`.
    """
    total = sum(class_counts)
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} pictures cannot be chosen")
    shares = [count * n // total for n in class_counts] if total else [0] * len(class_counts)
    remainders = [count * n % total for n in class_counts] if total else []
    by_remainder = sorted(range(len(remainders)), key=lambda c: -remainders[c])
    for cls in by_remainder[: count - sum(shares)]:
        shares[cls] += 1
    return shares


def choose(labels: NDArray[np.int64], classes: int, count: int, key: int) -> NDArray[np.int64]:
    """Rising indices (int64 [count]) of a class-balanced choice: a function of the arguments alone."""
    shuffled = addressed.permutation(key, len(labels))
    shares = class_shares(np.bincount(labels, minlength=classes).tolist(), count)
    picked = [shuffled[labels[shuffled] == cls][:share] for cls, share in enumerate(shares)]
    return np.sort(np.concatenate(picked))
