"""A stage's options, sorted and pruned for the dynamic programme."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lowmem.plan.cost import ChainCost, OptionCost, StageCost
from lowmem.plan.policy import PolicyKind


class Restore(NamedTuple):
    """What restoring a dropped output takes, in bytes: at its peak, and beside the output afterwards."""

    peak: int
    left: int

    def then(self, following: Restore, size: int) -> Restore:
        """Restoring first this output, of `size` bytes, and from it the next stage's."""
        left = size + self.left
        return Restore(max(self.peak, left + following.peak), left + following.left)


def restore_of(option: OptionCost) -> Restore:
    """Of an option that drops its output."""
    return Restore(option.restore_temp_bytes, option.restored_bytes)


@dataclass(frozen=True)
class StageOptions:
    """A stage's options after pruning, by how they can be used."""

    plain: tuple[OptionCost, ...]
    dropping: tuple[OptionCost, ...]
    last: tuple[OptionCost, ...]  # as the last stage of a segment, without FUSED
    fused: OptionCost | None
    restores: tuple[Restore, ...]  # the different ones of `dropping`


def _dominates(better: OptionCost, worse: OptionCost) -> bool:
    """Whether `worse` is never needed. An option that drops its output never replaces one that does not: what
    comes after it is restricted."""
    if better.policy.drop_output and not worse.policy.drop_output:
        return False
    return (
        better.seconds <= worse.seconds
        and better.kept_bytes <= worse.kept_bytes
        and better.kept_bytes + better.forward_temp_bytes <= worse.kept_bytes + worse.forward_temp_bytes
        and better.kept_bytes + better.backward_temp_bytes <= worse.kept_bytes + worse.backward_temp_bytes
        and (not better.policy.drop_output or _restores_in_less(better, worse))
    )


def _restores_in_less(better: OptionCost, worse: OptionCost) -> bool:
    return (
        better.kept_bytes + better.restore_temp_bytes <= worse.kept_bytes + worse.restore_temp_bytes
        and better.kept_bytes + better.restored_bytes <= worse.kept_bytes + worse.restored_bytes
    )


def prune(options: Iterable[OptionCost]) -> tuple[OptionCost, ...]:
    """The options that no other one beats or equals in time and in every peak."""
    kept: list[OptionCost] = []
    for option in options:
        if any(_dominates(other, option) for other in kept):
            continue
        kept = [other for other in kept if not _dominates(option, other)]
        kept.append(option)
    return tuple(kept)


def sort_out(stage: StageCost) -> StageOptions:
    """Pruned, by use."""
    usual = [option for option in stage.options if option.policy.kind is not PolicyKind.FUSED]
    pruned = prune(usual)
    dropping = tuple(option for option in pruned if option.policy.drop_output)
    return StageOptions(
        plain=tuple(option for option in pruned if not option.policy.drop_output),
        dropping=dropping,
        last=prune(map(stage.last_option, stage.last_policies())),
        fused=next((option for option in stage.options if option.policy.kind is PolicyKind.FUSED), None),
        restores=tuple(dict.fromkeys(restore_of(option) for option in dropping)),
    )


def useful_bytes(chain: ChainCost) -> int:
    """Above this, beside `fixed_bytes`, more memory changes nothing."""
    x, g, later = chain.boundary_bytes, chain.boundary_grad_bytes, chain.later_param_grad_bytes
    kept = sum(max(option.kept_bytes for option in stage.options) for stage in chain.stages)
    step = 0
    for index, stage in enumerate(chain.stages):
        temporary = max(
            max(o.forward_temp_bytes, o.backward_temp_bytes, o.restore_temp_bytes) + o.restored_bytes
            for o in (*stage.options, *stage.last_options)
        )
        around = x[index] + x[index + 1] + max(g) + later[0]
        step = max(step, around + max(temporary, stage.fast_temp_bytes))
    return kept + step
