"""The engine against the library's own checkpointing, on the CPU: seconds and bytes of a training step.

    python -m benchmarks.engine [--arch res110] [--batch 32] [--rounds 5] [--threads 1]

Cases: plain autograd; `torch.utils.checkpoint` around every block; the same, selective, saving
convolutions only; the engine under uniform policies, and under the solver's plans for the budgets that
the library's two ways need. Time: all cases on one model in one process, a step each in turn, median of
the rounds, the first not counted. Bytes: each case in a process of its own, peak of the tensors that two
steps make (gradients, momentum and parameters included) and the growth of the process's peak resident
memory over what it had with the model built. Writes `results/engine.json` and `.md` beside this file and
prints the table.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

from lowmem.choose.costs import chain_cost
from lowmem.models import build
from lowmem.plan import INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, Keep, Schedule, keep
from lowmem.plan.cost import Rates
from lowmem.plan.solver import Solver
from lowmem.remat import apply_plan, decompose
from lowmem.simulate import Loop, Recorder
from lowmem.simulate.trace import Kind

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
RATES = Rates(flops_per_second=8e10, bytes_per_second=1e10)  # one core with wide vectors, roughly
UNIFORM = {
    "engine SAVE_ALL": SAVE_ALL,
    "engine LEAN": LEAN,
    "engine KEEP{z1,z2}": keep("z1", "z2"),
    "engine KEEP{}": INPUT_ONLY,
}
LIBRARY = ("checkpoint, convolutions saved", "checkpoint per block")


def _saves_convolutions(_: Any, op: Any, *__: Any, **___: Any) -> checkpoint.CheckpointPolicy:
    wanted = op in (torch.ops.aten.convolution.default, torch.ops.aten.mm.default)
    policies = checkpoint.CheckpointPolicy
    return policies.MUST_SAVE if wanted else policies.PREFER_RECOMPUTE


def _library(model: Any, selective: bool) -> Callable[[Tensor], Tensor]:
    contexts: dict[str, Any] = {}
    if selective:
        make = checkpoint.create_selective_checkpoint_contexts
        contexts["context_fn"] = functools.partial(make, _saves_convolutions)

    def run(x: Tensor) -> Tensor:
        out = F.relu(model.bn1(model.conv1(x)))
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in layer:
                out = checkpoint.checkpoint(block, out, use_reentrant=False, **contexts)
        return model.linear(F.avg_pool2d(out, 4).flatten(1))

    return run


def runner(case: str, model: nn.Module, batch: int, budgets: dict[str, int]) -> Callable[[Tensor], Tensor]:
    """What a case runs; `plan …` needs the library's peak in `budgets`."""
    if case == "plain autograd":
        return model
    if case in LIBRARY:
        return _library(model, selective=case == LIBRARY[0])
    if case in UNIFORM:
        return apply_plan(model, _uniform(model, UNIFORM[case]))
    chain = chain_cost(model, input_shape=(batch, 3, 32, 32), rates=RATES)
    return apply_plan(model, Solver(chain).solve(budgets[case.removeprefix("engine, at most ")]).schedule)


def _uniform(model: nn.Module, policy: BlockPolicy) -> Schedule:
    count = len(decompose(model))
    inside = (Keep(index, policy) for index in range(1, count - 1))
    return Schedule((Keep(0, LEAN), *inside, Keep(count - 1, SAVE_ALL)))


def _loop(arch: str, case: str, batch: int, budgets: dict[str, int]) -> Loop:
    model = build(arch, "bottleneck")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=False)
    data = [(torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))]
    return Loop(runner(case, model, batch, budgets), model, optimizer, data)


class _Quiet(Recorder):
    """A recorder that is not entered: the loop's marks go nowhere."""

    def adopt(self, tensors: Any, kind: Kind) -> None: ...


def measure_bytes(arch: str, case: str, batch: int, budgets: dict[str, int]) -> dict[str, int]:
    """Of two steps, in this process."""
    loop = _loop(arch, case, batch, budgets)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(2):
        loop.step(_Quiet())
    after = resource.getrusage(resource.RUSAGE_SELF)
    recorder = Recorder()
    with recorder:
        state = [value for one in loop.optimizer.state.values() for value in one.values()]  # type: ignore[union-attr]
        recorder.adopt((*loop.model.parameters(), *loop.model.buffers(), *state), Kind.PARAMS)
        recorder.adopt((tensor for pair in loop.micro_batches for tensor in pair), Kind.ACTIVATIONS)
        loop.model.zero_grad(set_to_none=True)
        loop.step(recorder)
    return {
        "peak_tensor_bytes": recorder.trace.peak_bytes(),
        "resident_growth_bytes": (after.ru_maxrss - before.ru_maxrss) * 1024,
    }


def measure_seconds(arch: str, cases: list[str], batch: int, budgets: dict[str, int], rounds: int) -> dict[str, Any]:
    """Median processor seconds of a step per case, the cases in turn: with one thread what the clock
    shows on a machine of one's own, whatever else runs."""
    loops = {case: _loop(arch, case, batch, budgets) for case in cases}
    taken: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(rounds + 1):
        for case, loop in loops.items():
            loop.model.zero_grad(set_to_none=True)
            start = time.process_time()
            loop.step(_Quiet())
            taken[case].append(time.process_time() - start)
            loop.model.zero_grad(set_to_none=True)
    return {case: statistics.median(seconds[1:]) for case, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="res110")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--budgets", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure_bytes(args.arch, args.case, args.batch, json.loads(args.budgets))))
        return
    bytes_of: dict[str, dict[str, int]] = {}
    budgets: dict[str, int] = {}
    plans = [f"engine, at most {name}" for name in LIBRARY]
    for case in ("plain autograd", *LIBRARY, *UNIFORM, *plans):
        command = [
            sys.executable,
            "-m",
            "benchmarks.engine",
            "--case",
            case,
            "--budgets",
            json.dumps(budgets),
        ]
        command += ["--arch", args.arch, "--batch", str(args.batch), "--threads", str(args.threads)]
        bytes_of[case] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if case in LIBRARY:
            budgets[case] = bytes_of[case]["peak_tensor_bytes"]
    seconds = measure_seconds(args.arch, list(bytes_of), args.batch, budgets, args.rounds)
    _report(vars(args), {case: {**bytes_of[case], "seconds": seconds[case]} for case in bytes_of})


def _report(settings: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    plain = rows["plain autograd"]["seconds"]
    conditions = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        **{name: value for name, value in settings.items() if name in ("arch", "batch", "rounds", "threads")},
    }
    lines = [
        f"Bottleneck {settings['arch']}, batch {settings['batch']}, fp32, CPU, {settings['threads']} thread, "
        f"torch {torch.__version__}; median of {settings['rounds']} rounds, seconds of "
        "processor time. `python -m benchmarks.engine`.",
        "",
        "| case | tensors, MiB | resident growth, MiB | step, s | over plain |",
        "|---|---|---|---|---|",
    ]
    for case, row in rows.items():
        lines.append(
            f"| {case} | {row['peak_tensor_bytes'] / MIB:,.0f} | {row['resident_growth_bytes'] / MIB:,.0f} "
            f"| {row['seconds']:.2f} | {100 * (row['seconds'] / plain - 1):+.1f} % |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    (RESULTS / "engine.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
