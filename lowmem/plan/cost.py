"""What a chain of stages costs, in bytes and seconds, per policy: the solver's only input.

Bytes come from the simulator's traces of the real executor, stage by stage; seconds from the card or, without
one, from a roofline. Every figure of a stage is counted above what the rest of the chain holds at that
moment:

- The stage's input (`input_bytes`) is held by whoever made it; no field of the stage includes it, except
where said.
- During a stage's forward nothing of it exists at first; at its end `kept_bytes` do.
- At the start of its backward its input, `kept_bytes`, the gradient of its output (the next stage's
`input_grad_bytes`) and the parameter gradients of all later stages exist; at its end its input,
`input_grad_bytes` and, in addition to the later stages' parameter gradients, its own `param_grad_bytes`.

The names x, g, f0, t0, S, f, b, tf, tb of the recurrence (Beaumont et al., "Optimal checkpointing for
heterogeneous chains", 2019) are given with each field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lowmem.plan.policy import BlockPolicy, PolicyKind

RATE_SHARE = 0.65  # of the card's fp32 rate: what convolutions of this family reach
BANDWIDTH_SHARE = 0.80  # of the card's bandwidth: what elementwise kernels reach


@dataclass(frozen=True)
class Operation:
    """One kernel: floating-point operations, and bytes with each operand read once and each result written
    once."""

    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class Rates:
    """Attainable rates of a card, per second."""

    flops_per_second: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if not (self.flops_per_second > 0 and self.bytes_per_second > 0):
            raise ValueError("rates are positive")

    @staticmethod
    def roofline(
        peak_flops_per_second: float,
        peak_bytes_per_second: float,
        rate_share: float = RATE_SHARE,
        bandwidth_share: float = BANDWIDTH_SHARE,
    ) -> Rates:
        """Datasheet figures of a card -> what is attained."""
        return Rates(peak_flops_per_second * rate_share, peak_bytes_per_second * bandwidth_share)

    def operation_seconds(self, operation: Operation) -> float:
        """The larger of computing and moving."""
        return max(operation.flops / self.flops_per_second, operation.moved_bytes / self.bytes_per_second)

    def seconds(self, operations: Iterable[Operation]) -> float:
        """One after the other."""
        return sum(self.operation_seconds(operation) for operation in operations)


@dataclass(frozen=True, kw_only=True)
class OptionCost:
    """One policy of one stage.

    The peak above everything else held (see the module) is `kept_bytes + forward_temp_bytes` in the forward
    and `kept_bytes + backward_temp_bytes` in the backward. `backward_temp_bytes` includes the new gradient of
    the input and the stage's own parameter gradients as they come to exist.

    A policy that drops its output: `kept_bytes` is without the output, `forward_temp_bytes` covers it while
    the stage runs, and `restore_*` is what making it again takes; the peak of that, above `kept_bytes`, is
    `restore_temp_bytes`, which includes the output itself. `restored_bytes` is what restoring leaves beside
    the output until the stage's own backward (z_n, if it was not kept: the backward needs it anyway), so it
    exists during the next stage's backward; `backward_temp_bytes` of the stage includes it.

    FUSED: forward figures and `kept_bytes` are zero, the whole work is in the backward.
    """

    policy: BlockPolicy
    forward_seconds: float  # f
    backward_seconds: float  # b
    kept_bytes: int  # S, with the output unless that is dropped
    forward_temp_bytes: int  # tf
    backward_temp_bytes: int  # tb
    forward_flops: int = 0
    backward_flops: int = 0
    restore_seconds: float = 0.0
    restore_temp_bytes: int = 0
    restore_flops: int = 0
    restored_bytes: int = 0

    def __post_init__(self) -> None:
        _check_not_negative(self, "forward_seconds", "backward_seconds", "restore_seconds")
        _check_bytes(self, "kept_bytes", "forward_temp_bytes", "backward_temp_bytes")
        _check_bytes(self, "restore_temp_bytes", "restored_bytes")
        if self.policy.kind is PolicyKind.FUSED and (
            self.forward_seconds or self.kept_bytes or self.forward_temp_bytes
        ):
            raise ValueError("FUSED has no forward and keeps nothing: its whole work is in the backward")

    @property
    def seconds(self) -> float:
        """Forward, backward and, if the output is dropped, restoring it."""
        return self.forward_seconds + self.backward_seconds + self.restore_seconds


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage: a stem, a block, a head. `options` hold each policy at most once, at least one that is not
    FUSED.

    `last_options`: what policies cost for the last stage of a segment, whose output is for nobody and is not
    computed: `kept_bytes` is without it. If there are any, solvers use only these and FUSED there; a schedule
    with another policy is taken to cost what `options` say, which is too much.
    """

    name: str
    input_bytes: int  # x[i]
    input_grad_bytes: int  # g[i]; 0 for the first stage, whose input needs none
    options: tuple[OptionCost, ...]
    fast_seconds: float  # f0: forward that saves nothing
    fast_temp_bytes: int  # t0: above input and output
    fast_flops: int = 0
    param_grad_bytes: int = 0  # come to exist at this stage's backward and stay
    last_options: tuple[OptionCost, ...] = ()

    def __post_init__(self) -> None:
        _check_not_negative(self, "fast_seconds")
        _check_bytes(self, "input_bytes", "input_grad_bytes", "fast_temp_bytes", "param_grad_bytes")
        policies = [option.policy for option in self.options]
        if len(set(policies)) != len(policies):
            raise ValueError(f"stage {self.name!r} has a policy twice")
        if all(policy.kind is PolicyKind.FUSED or policy.drop_output for policy in policies):
            raise ValueError(f"stage {self.name!r} has no policy that can be used anywhere in a chain")
        usable = {policy for policy in policies if policy.kind is not PolicyKind.FUSED and not policy.drop_output}
        last = [option.policy for option in self.last_options]
        if len(set(last)) != len(last) or not usable.issuperset(last):
            raise ValueError(f"stage {self.name!r}: last_options are some of the options' policies, each once")

    def option(self, policy: BlockPolicy) -> OptionCost:
        """Raises KeyError if the stage has no such policy."""
        for option in self.options:
            if option.policy == policy:
                return option
        raise KeyError(f"stage {self.name!r} has no option {policy}")

    def last_policies(self) -> tuple[BlockPolicy, ...]:
        """What a solver considers for the last stage of a segment, beside FUSED."""
        usual = self.last_options or self.options
        return tuple(
            option.policy
            for option in usual
            if option.policy.kind is not PolicyKind.FUSED and not option.policy.drop_output
        )

    def last_option(self, policy: BlockPolicy) -> OptionCost:
        """As the last stage of a segment. Raises KeyError if the stage has no such policy."""
        for option in self.last_options:
            if option.policy == policy:
                return option
        return self.option(policy)


@dataclass(frozen=True, kw_only=True)
class ChainCost:
    """Stages in forward order, and what is there beside them.

    `fixed_bytes` exist all through the step: parameters, momentum, buffers, the input batch and whatever else
    the caller holds (with accumulation also the parameter gradients: then every `param_grad_bytes` is 0).
    `outside_peak_bytes` is the step's peak outside of forward and backward (the optimizer's), in all, for
    comparison with a budget. `plain_*` is the untouched step under autograd, forward and backward, to which
    overhead is relative.
    """

    stages: tuple[StageCost, ...]
    output_bytes: int = 0  # x[n]: of the last stage's output
    output_grad_bytes: int = 0  # g[n]
    fixed_bytes: int = 0
    outside_peak_bytes: int = 0
    outside_seconds: float = 0.0  # the optimizer's step and whatever no schedule changes
    plain_seconds: float | None = None  # without outside_seconds
    plain_flops: int | None = None
    # g and x of all boundaries 0..n, derived
    boundary_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    boundary_grad_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    later_param_grad_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a chain needs at least one stage")
        _check_bytes(self, "output_bytes", "output_grad_bytes", "fixed_bytes", "outside_peak_bytes")
        _check_not_negative(self, "outside_seconds")
        boundary = (*(stage.input_bytes for stage in self.stages), self.output_bytes)
        gradients = (*(stage.input_grad_bytes for stage in self.stages), self.output_grad_bytes)
        later = [0]
        for stage in reversed(self.stages):
            later.append(later[-1] + stage.param_grad_bytes)
        object.__setattr__(self, "boundary_bytes", boundary)
        object.__setattr__(self, "boundary_grad_bytes", gradients)
        object.__setattr__(self, "later_param_grad_bytes", tuple(reversed(later)))

    def __len__(self) -> int:
        return len(self.stages)


def _check_bytes(cost: object, *names: str) -> None:
    """Bytes are integers (invariant 6)."""
    for name in names:
        value = getattr(cost, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is a count of bytes, not {value!r}")


def _check_not_negative(cost: object, *names: str) -> None:
    for name in names:
        value = getattr(cost, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is a number of seconds, not {value!r}")
