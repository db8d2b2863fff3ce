"""A trial: what a run does, for a few steps, in a clean process of its own.

`run_trial` starts `python -m lowmem.trial.trial`, which reads one JSON object from its standard input, does the work
(`lowmem.trial.worker`) and prints one JSON line. Whatever goes wrong in it is a refusal, never an exception here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lowmem.measure.out_of_memory import says_out_of_memory
from lowmem.remat.libraries import Numerics, environment_for

OUT_OF_MEMORY = "out of memory"
_TIMEOUT_SECONDS = 600.0
# Signals of a process that the system ended for its memory (SIGKILL), or that a library aborted (SIGABRT) for want of
# it, as the exit codes of the two shells' conventions.
_KILLED = (-9, 137)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to do. `way` is one of `lowmem.trial.ways`; `plan` is a `Plan` as JSON for the planned one. `optimizer`:
    `fused` as a run's, or `default`: the form of SGD that the library takes if one says nothing.

    `pictures`: training pictures that the run holds on the device (only held on CUDA). `eval_batch`: pictures at a
    time in evaluation; None: no evaluation. `cap_bytes`: the most that the allocator may hold (CUDA only). `detailed`:
    digest the first step's gradients (needs a warm-up), count the operations of another step, and of plain autograd on
    CUDA profile a third. `deterministic`, `tf32`: see `lowmem.remat.libraries`.
    """

    arch: str
    block: str
    batch: int
    width: int = 64
    num_classes: int = 10
    micro_batch: int | None = None
    precision: str = "fp32"
    memory_format: str = "contiguous"
    device: str = "cpu"
    deterministic: bool = True
    tf32: Literal["auto", "never"] = "auto"
    way: str = "plain autograd"
    optimizer: str = "fused"
    plan: dict[str, Any] | None = None
    pictures: int = 0
    eval_batch: int | None = None
    cap_bytes: int | None = None
    steps: int = 5
    warmup: int = 2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    seed: int = 0
    detailed: bool = False


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What came out; bytes and seconds, None where it is not known. `refused` says why there is nothing at all.

    `peak_allocated_bytes` and `peak_reserved_bytes`: of the training steps after the warm-up, without what lies on the
    device beside the step (the training pictures): the tensors that a plan predicts, and on CUDA the convolution
    library's workspace, which comes from the same allocator. On the CPU tensors are counted and nothing is reserved.
    `eval_*`: the same of evaluation. `beside_bytes`: what was taken off, `blas_workspace_bytes` (cuBLAS's and
    cublasLt's) in it. `device_used_bytes`: on CUDA all that
    this process has on the card, context and pictures included; on the CPU its peak resident memory. `step_seconds`
    (median), `least_seconds`, `most_seconds`: of a step without its batch's augmentation, nothing else measured in it.
    `alloc_retries`: how often the allocator had to give back what it had cached. `losses`: the mean loss of every step
    from the first.
    `resident_growth_bytes`: on the CPU, by how much the process's resident memory grew at its peak, from before the
    network was made. `gradients`, `buffers`: SHA-256 of those of the first step, before its update; `norm_updates`: how
    often it moved batch norm's statistics. `flops`: floating-point operations of a step, counted where they are
    dispatched. `busy_share`: of `step_seconds`, those in which the card computes (plain autograd on CUDA; None
    where the profiler does not tell).
    """

    refused: str | None = None
    out_of_memory: bool = False
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    eval_peak_allocated_bytes: int | None = None
    eval_peak_reserved_bytes: int | None = None
    beside_bytes: int | None = None
    blas_workspace_bytes: int | None = None
    device_used_bytes: int | None = None
    context_bytes: int | None = None
    step_seconds: float | None = None
    least_seconds: float | None = None
    most_seconds: float | None = None
    alloc_retries: int | None = None
    finite: bool | None = None
    capped: bool = False
    losses: tuple[float, ...] = ()
    resident_growth_bytes: int | None = None
    gradients: str | None = None
    buffers: str | None = None
    norm_updates: int | None = None
    flops: int | None = None
    busy_share: float | None = None

    @property
    def most_allocated_bytes(self) -> int | None:
        """The larger peak of training and evaluation."""
        known = [one for one in (self.peak_allocated_bytes, self.eval_peak_allocated_bytes) if one is not None]
        return max(known, default=None)

    @property
    def most_reserved_bytes(self) -> int | None:
        """The larger peak of training and evaluation."""
        known = [one for one in (self.peak_reserved_bytes, self.eval_peak_reserved_bytes) if one is not None]
        return max(known, default=None)


def run_trial(
    trial: Trial, timeout_seconds: float = _TIMEOUT_SECONDS, command: Sequence[str] | None = None
) -> TrialResult:
    """The trial in a process of its own: nothing of another is cached, fragmented or still allocated.

    Out of memory, a crash, or taking longer than `timeout_seconds` is a refusal. `command`: what to start instead of
    this Python's own `-m lowmem.trial.trial`.
    """
    command = list(command or (sys.executable, "-m", "lowmem.trial.trial"))
    environment = environment_for(Numerics(trial.deterministic, trial.tf32))
    return result_of(answer_of(command, json.dumps(asdict(trial)), timeout_seconds, environment))


def result_of(outcome: dict[str, Any] | str) -> TrialResult:
    """Of a trial process's answer (see `answer_of`)."""
    if isinstance(outcome, str):
        return TrialResult(refused=outcome, out_of_memory=outcome == OUT_OF_MEMORY)
    known = {field.name for field in fields(TrialResult)}
    if not set(outcome) <= known:
        return TrialResult(refused=f"answered with unknown keys: {', '.join(sorted(set(outcome) - known))}")
    return TrialResult(**{**outcome, "losses": tuple(outcome.get("losses", ()))})


def answer_of(
    command: Sequence[str], question: str, timeout_seconds: float, environment: Mapping[str, str] = os.environ
) -> dict[str, Any] | str:
    """The JSON object in the last line that a process prints, given `question` on its standard input; or in words why
    there is none."""
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            list(command), input=question, capture_output=True, text=True, timeout=timeout_seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout_seconds:,.0f} s"
    except OSError as error:
        return f"could not be started ({error.strerror or error})"
    return understood(done.returncode, done.stdout, done.stderr)


def understood(code: int, output: str, errors: str) -> dict[str, Any] | str:
    """The same of a process that has ended, by its code and what it wrote."""
    lines = output.strip().splitlines()
    if code == 0 and lines:
        try:
            answer = json.loads(lines[-1])
        except ValueError:
            answer = None
        return answer if isinstance(answer, dict) else f"answered with {lines[-1][:80]!r}"
    last = (errors.strip().splitlines() or [f"ended with code {code}"])[-1]
    if code in _KILLED or says_out_of_memory(errors):
        return OUT_OF_MEMORY
    return f"crashed: {last[:200]}" if code else "answered nothing"


def main() -> None:
    """The child."""
    from lowmem.trial.worker import work

    print(json.dumps(work(Trial(**json.loads(sys.stdin.read())))), flush=True)


if __name__ == "__main__":
    main()
