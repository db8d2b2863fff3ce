"""When the gradients of each stage are there: a schedule's backward, stage by stage, in seconds.

The walk is `evaluate`'s own, in the order of the executor: what a segment computes again, forward and backward, and
what is restored, delays every stage before it in the chain.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.plan.cost import ChainCost
from lowmem.plan.evaluate import Walk
from lowmem.plan.policy import Schedule


@dataclass(frozen=True, kw_only=True)
class Ready:
    """`forward_seconds`: before the backward begins. `ends`: per stage, in forward order, the seconds from the
    beginning of the backward to the end of that stage's, when its parameters' gradients are complete. They fall from
    the first stage, with which the backward is over, to the last."""

    forward_seconds: float
    ends: tuple[float, ...]

    @property
    def backward_seconds(self) -> float:
        return self.ends[0]

    @property
    def seconds(self) -> float:
        """Forward and backward, as `Evaluation.seconds`."""
        return self.forward_seconds + self.backward_seconds


def ready(schedule: Schedule, chain: ChainCost) -> Ready:
    """Of a step under the cost model. Raises ValueError if it is not a schedule of this chain, KeyError if a stage has
    not got the policy."""
    schedule.check_covers(len(chain))
    walk = Walk(chain)
    walk.items(schedule.items)
    ends = tuple(walk.ended[stage] - walk.forward_seconds for stage in range(len(chain)))
    return Ready(forward_seconds=walk.forward_seconds, ends=ends)
