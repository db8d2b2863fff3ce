"""The sums that batch norms make over all processes, in the executor's order (see `StagePass.total`)."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.remat.block import ConvBlock, Pair
from lowmem.remat.stage import Stage


def norm_sums(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Elements of every sum of one pass, forward then backward: 2C + 1 (sum, sum of squares, count) and 2C (of the
    gradient, and of it with the normalised input) for a norm of C channels.

    The order is the network's, whatever the schedule: stages forward, in a block the norms of its convolutions and then
    the shortcut's; backward stages from the last, the shortcut's first.
    """
    forward: list[int] = []
    backward: list[int] = []
    for stage in stages:
        norms = _norms(stage)
        forward += [2 * pair.bn.num_features + 1 for pair in norms]
        backward += [2 * pair.bn.num_features for pair in norms]
    return (*forward, *reversed(backward))


def _norms(stage: Stage) -> list[Pair]:
    if isinstance(stage, ConvBlock):
        return [*stage.pairs, *([stage.projection] if stage.projection else [])]
    return []
