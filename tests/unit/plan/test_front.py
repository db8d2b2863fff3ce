"""Sets worth keeping, against all sets there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

import pytest

from lowmem.plan.front import Result, front


def _random(rng: random.Random, count: int, *, chain: bool = False) -> list[Result]:
    """A chain in which everything is wanted, or a graph like a network's."""
    results = []
    for k in range(count):
        operands = (k,) if chain or rng.random() < 0.7 else tuple(sorted({k, rng.randint(0, k)}))
        wanted = chain or rng.random() < 0.6
        keepable = chain or rng.random() < 0.8
        results.append(Result(f"op{k}", operands, rng.randint(1, 9), float(rng.randint(1, 30)), keepable, wanted))
    return results


def _seconds(results: Sequence[Result], kept: frozenset[str]) -> float:
    """By the definition, one result after the other."""
    again: set[int] = set()

    def make(k: int) -> None:
        if results[k].name not in kept and k not in again:
            again.add(k)
            for value in results[k].operands:
                if value:
                    make(value - 1)

    for k, one in enumerate(results):
        if one.wanted:
            make(k)
    return sum(results[k].seconds for k in again)


def _size(results: Sequence[Result], kept: frozenset[str]) -> int:
    return sum(one.size_bytes for one in results if one.name in kept)


def _all(results: Sequence[Result]) -> list[tuple[int, float]]:
    names = [one.name for one in results if one.keepable]
    sets = [frozenset(some) for count in range(len(names) + 1) for some in combinations(names, count)]
    return [(_size(results, kept), _seconds(results, kept)) for kept in sets]


@pytest.mark.parametrize("seed", range(12))
def test_of_a_chain_the_sets_are_on_the_true_front(seed: int) -> None:
    results = _random(random.Random(seed), 9, chain=True)
    everything = _all(results)
    for kept in front(results, 100)[:10]:
        size, seconds = _size(results, kept), _seconds(results, kept)
        assert seconds == min(other for bytes_, other in everything if bytes_ <= size)


@pytest.mark.parametrize("seed", range(30))
def test_of_any_graph_they_are_near_it(seed: int) -> None:
    """Over all sizes: at most 8 % of the whole range of times worse on the mean than the convex front of all sets, and
    never more than a third of it."""
    results = _random(random.Random(seed), 11)
    everything = sorted(_all(results))
    found = [(_size(results, kept), _seconds(results, kept)) for kept in front(results, 100)]
    most, least = _seconds(results, frozenset()), min(seconds for _, seconds in everything)
    worse = []
    for size, seconds in found:
        best = min(other for bytes_, other in everything if bytes_ <= size)
        mine = min(other for bytes_, other in found if bytes_ <= size)
        assert mine <= seconds
        worse.append((mine - best) / (most - least))
    assert max(worse) <= 1 / 3
    assert sum(worse) / len(worse) <= 0.08
    assert min(seconds for _, seconds in found) == least
    assert min(size for size, _ in found) == 0


def test_no_more_sets_than_asked_for_and_both_ends() -> None:
    results = _random(random.Random(1), 40, chain=True)
    found = front(results, 7)
    assert found[0] == frozenset()
    assert found[6] == frozenset(one.name for one in results)
    assert 7 <= len(found) <= 13


def test_parts_that_are_made_again_one_after_the_other() -> None:
    """In two halves: the ninth result is all that the second half is made of; with a skip from the fourth that too, or,
    where it cannot be kept, the third."""
    results = [Result(f"op{k}", (k,), 1, 1.0, True, True) for k in range(18)]
    assert frozenset({"op8"}) in front(results, 2)
    results[-1] = results[-1]._replace(operands=(4, 17))
    assert frozenset({"op3", "op8"}) in front(results, 2)
    results[3] = results[3]._replace(keepable=False)
    assert frozenset({"op2", "op9"}) in front(results, 2)
