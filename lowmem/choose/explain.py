"""A choice in words, for somebody who never heard of rematerialization."""

from __future__ import annotations

from dataclasses import replace

from lowmem.choose.request import INSIDE, Choice
from lowmem.core.units import counted, format_size
from lowmem.models.freezing import thawed
from lowmem.plan import picture
from lowmem.plan.hosting import HostSolver
from lowmem.plan.record import Plan
from lowmem.simulate import simulate_step

_KINDS = {
    "params": "parameters and buffers",
    "grads": "gradients",
    "optimizer": "what the optimizer keeps",
    "activations": "activations, the batch included",
    "temporary": "temporary tensors",
    "workspace": "convolution workspace (measured)",
}
_NO_TIME = 0.0005  # a share of a step's
_STEP = """\
A training step keeps what every layer computed until the way back through the network has used it; that is
what fills a card. This plan """
_REMATERIALIZATION = """\
keeps a part of it and computes the rest again when it is needed
(rematerialization: {:,.0f} GFLOP more a step). Loss and gradients stay the same."""
_ALL_KEPT = "keeps all of it. Loss and gradients stay the same."


def explain(choice: Choice) -> list[str]:
    """What had to be refused, what the step takes against plain PyTorch, and how: a line each."""
    plan, plain = choice.plan, choice.plain.estimate
    cut = "" if plan.accumulation == 1 else f" in {plan.accumulation} micro-batches of {plan.micro_batch}"
    whole = [one for one in plan.candidates if one.what.startswith(INSIDE)]
    refused = [one for one in plan.candidates if one.refused_because and "least that fits" in one.refused_because]
    return [
        *(f"not {one.what}: {one.refused_because}" for one in whole),
        *(f"does not fit: {one.what} ({one.refused_because})" for one in refused),
        f"plan: batch {plan.batch}{cut}, {_arithmetic(plan)}: "
        f"{format_size(plan.predicted.peak_allocated_bytes)} of tensors under a budget of "
        f"{format_size(plan.budget_bytes)}; plain PyTorch takes {format_size(plain.peak_allocated_bytes)}",
        f"cost: {cost(plan)}; {picture.in_short(plan.schedule)}{_waiting(choice)}",
        *(f"frozen: {line}" for line in _frozen(choice)),
    ]


def _frozen(choice: Choice) -> list[str]:
    """What is not trained, and what keeps nothing for that."""
    parameters, names, count = list(choice.shape.model.parameters()), choice.plan.stages, choice.chain.unreached
    frozen = sum(one.numel() for one in parameters if not one.requires_grad)
    if not frozen:
        return []
    said = f"{frozen:,} of {sum(one.numel() for one in parameters):,} parameters, without gradient and momentum"
    if not count:
        return [f"{said}; the backward pass goes through all stages"]
    first = names[0] if count == 1 else f"{names[0]} to {names[count - 1]}"
    return [f"{said}; {first}, {count} of {len(names)} stages, keep nothing: the backward pass does not come there"]


def _waiting(choice: Choice) -> str:
    there, solver = choice.plan.predicted.host_bytes, choice.solver
    if not there or not isinstance(solver, HostSolver):
        return ""
    return f"; {format_size(there)} wait in host memory, {solver.terms.rates}"


def _in_host_memory(choice: Choice) -> list[str]:
    """What waits there, how fast it gets there, and what time that takes; or why nothing does."""
    predicted, solver = choice.plan.predicted, choice.solver
    if not isinstance(solver, HostSolver):
        return []
    limit, rates = format_size(solver.terms.limit_bytes), solver.terms.rates
    if not predicted.host_bytes:
        nothing_to_win = predicted.overhead is not None and predicted.overhead < _NO_TIME
        why = "the step fits without it" if nothing_to_win else f"no plan with {limit} of it, {rates}, is faster"
        return [f"Host memory is not used: {why}."]
    waiting, seconds = predicted.waiting_seconds or 0.0, predicted.step_seconds
    stands = "never stands still for that"
    if seconds and waiting >= _NO_TIME * seconds:
        hidden = f"{predicted.hidden_share or 0.0:.0%} of the transfer is hidden"
        stands = f"stands still for that for {waiting / seconds:.1%} of the step ({hidden})"
    return [
        f"{format_size(predicted.host_bytes)} of what it keeps wait in host memory (up to {limit} may), {rates},",
        f"beside the computing, which {stands}.",
    ]


def _arithmetic(plan: Plan) -> str:
    """Precision, what fp32 may not be on a card, and memory format: `fp32 (convolutions in TF32), contiguous`."""
    return f"{plan.precision}{' (convolutions in TF32)' if plan.tf32 else ''}, {plan.memory_format}"


def cost(plan: Plan) -> str:
    overhead = plan.predicted.overhead
    if overhead is None:
        return "unknown"
    if overhead < _NO_TIME:
        return "no more time than plain PyTorch"
    return f"{overhead:.1%} more time than plain PyTorch (predicted)"


def explain_ladder(plan: Plan) -> str:
    """What there is for when memory runs out all the same."""
    if not plan.ladder:
        return "if memory runs out all the same: this is the smallest plan, the run would be saved and end"
    last, plans = plan.ladder[-1], counted(len(plan.ladder), "smaller plan")
    return f"if memory runs out all the same: {plans}, down to {format_size(last.budget_bytes)} ({cost(last)})"


def inexact(plan: Plan) -> str:
    """What must be said of accumulation (invariant 4)."""
    tried = any(one.refused_because and f"batch {plan.batch}" in one.what for one in plan.candidates)
    why = f"no plan fits at the full batch of {plan.batch}" if tried else "micro-batches were asked for"
    way_out = "; --set memory.allow_accumulation=false refuses it" if tried else ""
    return f"{accumulated(why, plan.batch, plan.micro_batch)}{way_out}"


def accumulated(why: str, batch: int, micro_batch: int) -> str:
    """The same, of a step without a plan too."""
    return (
        f"{why}: gradients are accumulated over {-(-batch // micro_batch)} micro-batches of {micro_batch}. Batch norm "
        f"then sees {counted(micro_batch, 'picture')} at a time, which is NOT the same computation as the recipe's"
    )


def memory_table(choice: Choice) -> list[tuple[str, int]]:
    """Where the memory goes, (term, bytes): the whole first, then parts that add up to it. The step's parts are those
    at the moment of its peak."""
    budget, taken = choice.budget, choice.simulated.estimate
    rows = [(budget.source, budget.total_bytes), *budget.terms()]
    rows += [(_KINDS.get(kind, kind), size) for kind, size in taken.at_peak_bytes.items() if size]
    step = sum(taken.at_peak_bytes.values())
    if budget.on_card:
        # Rounding of sizes, gaps between blocks, and segments that are cached for another size.
        rows.append(("fragmentation", taken.peak_reserved_bytes - step))
        step = taken.peak_reserved_bytes
    return [*rows, ("free", budget.tensor_bytes - step)]


def memory_lines(choice: Choice) -> list[str]:
    (source, total), *parts = memory_table(choice)
    lines = [f"Where {format_size(total)} go ({source})"]
    lines += [_row(name, size) for name, size in parts]
    if choice.budget.emulated:
        # The convolution library chooses by what is really free (pytorch/pytorch#69688).
        lines.append("  emulated: a real card of this size may take other algorithms, and another time")
    return lines


def in_full(choice: Choice) -> str:
    """The whole of `lowmem plan`: where the memory goes, what is chosen and why, the blocks, what was refused."""
    plan, plain = choice.plan, choice.plain.estimate
    predicted, flops = plan.predicted, plan.predicted.extra_flops or 0
    sizes = {
        "tensors at the peak of a step": predicted.peak_allocated_bytes,
        "plain PyTorch, for comparison": plain.peak_allocated_bytes,
    }
    if frozen := _frozen(choice):
        shape = replace(choice.shape, model=thawed(choice.shape.model))
        whole = simulate_step(shape, None, choice.rates, workspace=choice.steps.workspace)
        sizes["plain PyTorch, with nothing frozen"] = whole.estimate.peak_allocated_bytes
    if predicted.host_bytes:
        sizes["wait in host memory meanwhile"] = predicted.host_bytes
    if predicted.device_bytes is not None:
        sizes["the allocator holds (reserved)"] = predicted.peak_reserved_bytes
        sizes["on the card in all"] = predicted.device_bytes
    lines = [*memory_lines(choice), "", *map(_row, sizes, sizes.values()), ""]
    lines.append(f"Batch {plan.batch}, {_arithmetic(plan)}: {cost(plan)}; seconds are {choice.seconds_from}.")
    fits = plain.peak_allocated_bytes <= choice.budget.tensor_bytes
    unneeded = fits and not flops and plan.exact
    if not unneeded:
        lines.append(_STEP + (_REMATERIALIZATION.format(flops / 1e9) if flops else _ALL_KEPT))
    lines += [f"Frozen: {line}." for line in frozen]
    lines += _in_host_memory(choice)
    if fits:
        the = "The" if unneeded else "Here the"
        lines.append(f"{the} plain step fits too: nothing has to be computed again for the memory's sake.")
    if not plan.exact:
        lines.append(f"CAUTION: {inexact(plan)}.")
    lines += ["", picture.text(plan.schedule, plan.stages), "", "Candidates"]
    for candidate in plan.candidates:
        verdict = f"refused: {candidate.refused_because}" if candidate.refused_because else "chosen"
        seconds = f", {candidate.step_seconds:.3f} s a step" if candidate.step_seconds is not None else ""
        lines.append(f"  {candidate.what}: {format_size(candidate.peak_bytes)}{seconds}: {verdict}")
    return "\n".join(lines)


def _row(name: str, size: int | None) -> str:
    return f"  {name:<36}{format_size(size):>12}"
