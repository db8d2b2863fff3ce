"""What is measured on a device, on CUDA in a process of its own (`lowmem.isolate`): whoever plans keeps no context,
which would take some hundred MiB of a small card from the trial that confirms the plan.

A task is a JSON object: `device`, `numerics` and a list of jobs. A job has its `kind`, what that function takes, and
the names that its figures have in a calibration. The answer is figures by name; what did not fit is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem import isolate
from lowmem.calibrate.stage_timer import ChainClock, if_it_fits
from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import PreflightError
from lowmem.core.units import MIB
from lowmem.measure.timing import time_calls
from lowmem.models import from_recipe
from lowmem.plan.policy import BlockPolicy
from lowmem.remat.libraries import Numerics, prepare_libraries
from lowmem.simulate import Call
from lowmem.simulate.allocator import round_block
from lowmem.simulate.stage import Option
from lowmem.step.train_step import Execution, amp_dtype, make_optimizer

Job = Mapping[str, Any]
Figures = dict[str, Any]
_TIMEOUT_SECONDS = 1800
# Pictures that blocks are timed with; a processor computes from the first picture on and needs no more than the least.
BUSY_BATCHES = (128, 256, 512, 1024)


def ask(function: str, argument: Any) -> Any:
    """What `module:function` answers in a process of its own. Raises PreflightError."""
    outcome = isolate.run(function, argument, timeout_seconds=_TIMEOUT_SECONDS)
    if outcome.ended == "answered":
        return outcome.answer
    if outcome.ended == "too long":
        raise PreflightError(f"measuring the device {outcome.words}: plan without by --set memory.calibrate=never")
    why = outcome.refused
    if outcome.ended == "out of memory" and outcome.words:
        why = f"{why}: {outcome.words}"  # which says who has the card's memory
    raise PreflightError(
        f"measuring the device failed ({why}): `lowmem doctor` looks for the cause; --set "
        "memory.calibrate=never plans without"
    )


def measure(jobs: Sequence[Job], device: str, numerics: Numerics) -> Figures:
    """Does the jobs, on a card in a process of its own. Raises PreflightError if that fails."""
    task = {"device": device, "numerics": asdict(numerics), "jobs": list(jobs)}
    if device != "cuda":
        return perform(task)
    figures: Figures = ask(f"{__name__}:perform", task)
    return figures


def perform(task: Mapping[str, Any]) -> Figures:
    device, figures = task["device"], Figures()
    if device == "cuda":
        prepare_libraries(Numerics(**task["numerics"]))
    for job in task["jobs"]:
        arguments = {name: value for name, value in job.items() if name != "kind"}
        figures |= _KINDS[job["kind"]](device, **arguments)
        if device == "cuda":
            torch.cuda.empty_cache()
    return figures


def _clock(device: str, precision: str, memory_format: str, **chain: Any) -> ChainClock:
    return ChainClock(execution=Execution(device, precision, memory_format), **chain)


def _stages(device: str, *, wanted: Mapping[str, Sequence[Any]], **chain: Any) -> Figures:
    """Stages of a chain. `wanted`: the place of one and what is timed of it; of a policy its name and whether it is of
    a segment's last stage."""
    timed = {
        name: (index, Option(BlockPolicy.parse(what), *last) if last else what)
        for name, (index, what, *last) in wanted.items()
    }
    return {name: list(astuple(seconds)) for name, seconds in _clock(device, **chain).measure(timed).items()}


def _mode(device: str, *, figure: str, **chain: Any) -> Figures:
    """One plain pass of all stages of a chain: seconds, and whether every result was finite."""
    mode = if_it_fits(_clock(device, **chain).mode)
    return {} if mode is None else {figure: [mode.seconds, float(mode.finite)]}


def _busy(device: str, *, figure: str, image_shape: Sequence[int], **chain: Any) -> Figures:
    return {
        figure: smallest_busy(
            lambda batch: if_it_fits(_clock(device, input_shape=(batch, *image_shape), **chain).bound_by_host)
        )
    }


def smallest_busy(bound_by_host: Callable[[int], bool | None]) -> int:
    """The smallest of BUSY_BATCHES with which a plain pass of a network's blocks waits for the card rather than for the
    launching of its kernels: from there on seconds grow with the batch. The largest that fits (for one that does not,
    `bound_by_host` answers None) if none is enough."""
    largest = BUSY_BATCHES[0]
    for batch in BUSY_BATCHES:
        bound = bound_by_host(batch)
        if bound is not None:
            largest = batch
        if not bound:
            break
    return largest


def _update(device: str, *, figure: str, network: Mapping[str, Any], optim: Mapping[str, Any]) -> Figures:
    model = from_recipe(network, seed=0).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    config = OptimConfig(**optim)
    optimizer = make_optimizer(model, config, device)

    def update() -> None:
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()

    return {figure: [time_calls(update, device, warmup=2, rounds=3).median_seconds, 0.0, 0.0]}


# -- convolutions ------------------------------------------------------------------------------------------------------

_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


def _convolutions(device: str, *, calls: Mapping[str, Sequence[Any]], precision: str) -> Figures:
    """The workspace of each call, in the dtype that autocast takes on the card, where alone it can be measured."""
    low = amp_dtype(precision, device)
    sizes = {figure: if_it_fits(partial(_workspace, call_of(fields), device, low)) for figure, fields in calls.items()}
    return {figure: size for figure, size in sizes.items() if size is not None}


def call_of(fields: Sequence[Any]) -> Call:
    """As JSON has its fields."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Call(*tuples(list(fields)))


def _workspace(call: Call, device: str, low: torch.dtype | None) -> int:
    """It comes out of torch's own caching allocator, so it counts as allocated while the kernel runs."""
    backward = call.operation == str(_BACKWARD)
    operation = _BACKWARD if backward else _FORWARD
    tensors = [None if spec is None else _tensor(spec, device, low) for spec in call.tensors]
    # no bias: its sizes are "none"
    arguments = (*tensors, None, *call.rest) if backward else (*tensors, *call.rest)
    operation(*arguments)  # chooses the algorithm
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = operation(*arguments)
    torch.cuda.synchronize()
    made = [results] if isinstance(results, Tensor) else [one for one in results if one is not None]
    held = sum(round_block(one.untyped_storage().nbytes()) for one in made)
    return max(0, torch.cuda.max_memory_allocated() - before - held)


def _tensor(spec: tuple[tuple[int, ...], tuple[int, ...], str], device: str, low: torch.dtype | None) -> Tensor:
    """The simulation's outlines are on the CPU, whose low dtype is bf16; the card's own takes its place."""
    shape, strides, name = spec
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    if low is not None and dtype is torch.bfloat16:
        dtype = low
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).normal_()


# -- raw rates ---------------------------------------------------------------------------------------------------------

_COPIED_BYTES, _SIDE = 256 * MIB, 4096
# Bytes of a copy, which reads and writes; operations of a product of n x n matrices (2 n^3), in fp32 and in the low
# dtype of autocast.
RATED = {"copy": 2.0 * _COPIED_BYTES, "fp32": 2.0 * _SIDE**3, "low": 2.0 * _SIDE**3}


def _rates(device: str, *, copy: str, fp32: str, low: str) -> Figures:
    source = torch.zeros(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = {copy: time_calls(lambda: target.copy_(source), device).median_seconds}
    for figure, dtype in ((fp32, torch.float32), (low, amp_dtype("amp", device))):
        a = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
        seconds[figure] = time_calls(partial(torch.mm, a, a, out=torch.empty_like(a)), device).median_seconds
    return {figure: [taken, 0.0, 0.0] for figure, taken in seconds.items()}


_JOBS: tuple[Callable[..., Figures], ...] = (_stages, _mode, _busy, _update, _convolutions, _rates)
_KINDS = {job.__name__.removeprefix("_"): job for job in _JOBS}
