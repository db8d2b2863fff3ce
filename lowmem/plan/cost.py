"""What a chain of stages costs, in bytes and seconds, per policy: the solver's only input.

Bytes come from the simulator's traces of the real executor, stage by stage; seconds from the card or, without one, from
a roofline. Every figure of a stage is counted above what the rest of the chain holds at that moment:

- The stage's input (`input_bytes`) is held by whoever made it; no field includes it, except where said.
- During a stage's forward nothing of it exists at first; at its end `kept_bytes` do.
- At the start of its backward its input, `kept_bytes`, the gradient of its output (the next stage's `input_grad_bytes`)
and the later stages' parameter gradients exist; at its end its input, `input_grad_bytes` and, beside the later stages',
its own `param_grad_bytes`.

The names x, g, f0, t0, S, f, b, tf, tb of the recurrence (see `lowmem.plan.table`) are given with each field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

from lowmem.plan.policy import BlockPolicy

RATE_SHARE = 0.65  # of the card's fp32 rate: what convolutions of this family reach
BANDWIDTH_SHARE = 0.80  # of the card's bandwidth: what elementwise kernels reach


@dataclass(frozen=True, slots=True)
class KernelWork:
    """One kernel, which an operation launched in a phase of a step."""

    flops: int
    moved_bytes: int  # each operand read once, each result written once
    operation: str = ""
    phase: str = ""


@dataclass(frozen=True)
class Rates:
    """Attainable rates of a card, per second."""

    flops_per_second: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if not (self.flops_per_second > 0 and self.bytes_per_second > 0):
            raise ValueError("rates are positive")

    @staticmethod
    def roofline(peak_flops_per_second: float, peak_bytes_per_second: float) -> Rates:
        """Datasheet figures of a card -> what is attained."""
        return Rates(peak_flops_per_second * RATE_SHARE, peak_bytes_per_second * BANDWIDTH_SHARE)

    def seconds(self, work: Iterable[KernelWork]) -> float:
        """One kernel after the other, each as long as the larger of computing and moving."""
        return sum(max(one.flops / self.flops_per_second, one.moved_bytes / self.bytes_per_second) for one in work)


@dataclass(frozen=True, kw_only=True)
class OptionCost:
    """One policy of one stage.

    The peak above everything else held (see the module) is `kept_bytes + forward_temp_bytes` in the forward and
    `kept_bytes + backward_temp_bytes` in the backward, which includes the new gradient of the input and the stage's
    own parameter gradients as they come to exist.

    A policy that drops its output: `kept_bytes` is without the output, `forward_temp_bytes` covers it while the stage
    runs, and `restore_*` is what making it again takes, with a peak of `restore_temp_bytes`, output included, above
    `kept_bytes`. `restored_bytes` is what restoring leaves beside the output until the stage's own backward (z_n, if it
    was not kept), so it exists during the next stage's backward; the stage's `backward_temp_bytes` includes it.
    `restore_reads_input`: whether that takes the stage's input, which has to be there then (or is restored before).

    `host_tensors`: what of `kept_bytes` may wait in host memory, by name: dense tensors whose memory nothing else that
    is kept shares. `sends_output`, `frees_input`: whether that holds of the output, and of the input.
    """

    policy: BlockPolicy
    forward_seconds: float = 0.0  # f
    backward_seconds: float = 0.0  # b
    kept_bytes: int  # S, with the output unless that is dropped
    forward_temp_bytes: int  # tf
    backward_temp_bytes: int  # tb
    restore_seconds: float = 0.0
    restore_temp_bytes: int = 0
    restored_bytes: int = 0
    restore_reads_input: bool = True
    host_tensors: tuple[tuple[str, int], ...] = ()
    sends_output: bool = False
    frees_input: bool = False

    def __post_init__(self) -> None:
        _check_figures(self)
        if self.policy.fused and (self.forward_seconds or self.kept_bytes or self.forward_temp_bytes):
            raise ValueError("FUSED has no forward and keeps nothing: its whole work is in the backward")

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds + self.restore_seconds


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage: a stem, a block, a head. `options` hold each policy at most once, at least one that is not FUSED.

    `last_options`: for the last stage of a segment, whose output is for nobody and is not computed: `kept_bytes` is
    without it. If there are any, solvers use only these and FUSED there; a schedule with another policy is taken to
    cost what `options` say, which is too much.

    `reached`: whether the backward comes to it. It does not come to stages before the first that is trained: these keep
    nothing, and free their inputs, which are then no part of any `kept_bytes` (but the last one's output is).
    """

    name: str
    input_bytes: int  # x[i]
    input_grad_bytes: int  # g[i]; 0 for the first stage, whose input needs none
    options: tuple[OptionCost, ...]
    fast_seconds: float  # f0: forward that saves nothing
    fast_temp_bytes: int  # t0: above input and output
    param_grad_bytes: int = 0  # come to exist at this stage's backward and stay
    host_grad_bytes: int = 0  # those of them that may wait in host memory until the whole backward is over
    last_options: tuple[OptionCost, ...] = ()
    reached: bool = True

    def __post_init__(self) -> None:
        _check_figures(self)
        policies = [option.policy for option in self.options]
        if len(set(policies)) != len(policies):
            raise ValueError(f"stage {self.name!r} has a policy twice")
        usable = {option.policy for option in self.anywhere}
        if not usable:
            raise ValueError(f"stage {self.name!r} has no policy that can be used anywhere in a chain")
        last = [option.policy for option in self.last_options]
        if len(set(last)) != len(last) or not usable.issuperset(last):
            raise ValueError(f"stage {self.name!r}: last_options are some of the options' policies, each once")

    @property
    def anywhere(self) -> tuple[OptionCost, ...]:
        return tuple(option for option in self.options if option.policy.anywhere)

    def option(self, policy: BlockPolicy, last: bool = False) -> OptionCost:
        """`last`: as the last stage of a segment. Raises KeyError if the stage has no such policy."""
        for option in (*self.last_options, *self.options) if last else self.options:
            if option.policy == policy:
                return option
        raise KeyError(f"stage {self.name!r} has no option {policy}")


@dataclass(frozen=True, kw_only=True)
class ChainCost:
    """Stages in forward order, and what is there beside them.

    `fixed_bytes` exist all through the step: parameters, what the optimizer keeps, buffers, the input batch and what
    else the caller holds (with accumulation also the parameter gradients: then every `param_grad_bytes` is 0).
    `outside_peak_bytes` is the step's peak outside of forward and backward (the optimizer's), in all. `plain_seconds`:
    of the untouched step under autograd, forward and backward, to which overhead is relative.
    """

    stages: tuple[StageCost, ...]
    output_bytes: int = 0  # x[n]: of the last stage's output
    output_grad_bytes: int = 0  # g[n]
    fixed_bytes: int = 0
    outside_peak_bytes: int = 0
    outside_seconds: float = 0.0  # the optimizer's step and whatever no schedule changes
    plain_seconds: float | None = None  # without outside_seconds
    # x and g of all boundaries 0..n, and the parameter gradients of the stages behind them, derived
    boundary_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    boundary_grad_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    later_param_grad_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a chain needs at least one stage")
        _check_figures(self)
        later = accumulate((stage.param_grad_bytes for stage in reversed(self.stages)), initial=0)
        derived = {
            "boundary_bytes": (*(stage.input_bytes for stage in self.stages), self.output_bytes),
            "boundary_grad_bytes": (*(stage.input_grad_bytes for stage in self.stages), self.output_grad_bytes),
            "later_param_grad_bytes": tuple(later)[::-1],
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def unreached(self) -> int:
        """How many stages there are before the first that is trained."""
        return sum(not stage.reached for stage in self.stages)


def _check_figures(cost: Any) -> None:
    """Bytes are integers (invariant 6), seconds are finite."""
    for figure in fields(cost):
        value: Any = getattr(cost, figure.name, None)
        if figure.type == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{figure.name} is a count of bytes, not {value!r}")
        if figure.type == "float" and not 0 <= value < float("inf"):
            raise ValueError(f"{figure.name} is a number of seconds, not {value!r}")
