"""The questions of each part: plain values, asked where the card is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.plans import LIBRARY, NATIVE, Network, Plans, Scale
from lowmem.bench.plan_checks import PlanQuestion
from lowmem.choose.planning import with_ladder
from lowmem.choose.request import Choice
from lowmem.core.units import format_size
from lowmem.plan.record import Predicted
from lowmem.trial import PER_BLOCK, PLAIN, PLANNED, Trial

# What matters most comes first; files that are not named here follow.
_TESTS = (
    *(
        "test_norm_kernels",
        "test_cuda",
        "test_gradients_cuda",
        "test_host_cuda",
        "test_trial",
        "test_preflight",
        "test_measure",
    ),
    "test_calibration",
)


def facts(scale: Scale, plans: Plans) -> list[dict[str, Any]]:
    """Those that the first seconds are for come first."""
    card, most = scale.device == "cuda", 1 if scale.brief else 3
    layers = [[64, 64, 3, 1, 32], [64, 256, 1, 1, 32], [256, 64, 1, 1, 32], [128, 128, 3, 2, 32], [256, 256, 3, 1, 8]]
    convolution = {"batch": scale.batch, "layers": layers if card else [[4, 8, 3, 2, 8]]}
    blas = {"batch": scale.batch, "features": 2048 if card else 16, "classes": 10}
    shape = [scale.batch, 256, 32, 32] if card else [4, 8, 5, 5]
    network = {"arch": scale.main.arch, "block": scale.main.block, "width": scale.width}
    step = {**network, "batches": [scale.batch, scale.busy_batch], "precisions": ["fp32", "amp"]}
    plan = replace(plans(scale.main, scale.budgets[-1]).plan, ladder=()).to_json()
    named = [
        *(
            ("convolutions, workspace cap " + (f"{cap} MiB" if cap else "not set"), "convolution", convolution,
             {"CUDNN_CONV_WSCAP_DBG": cap}, False)
            for cap in (None, "256", "8")[:most]
        ),
        *(
            (f"matrix library's workspace, {config or 'not configured'}", "blas", blas,
             {"CUBLAS_WORKSPACE_CONFIG": config}, False)
            for config in (None, ":16:8", ":4096:8")[:most]
        ),
        ("batch norm: bits, bytes, seconds", "norm", {"shape": shape}, {}, True),
        ("context after a tiny and a full step", "context", {**network, "batch": scale.batch}, {}, True),
        ("launching a step against its seconds", "launch", {**step, "plan": plan}, {}, True),
        ("TF32: switches, error, seconds", "tf32", {"channels": scale.width, "batch": scale.batch}, {}, False),
    ]  # fmt: skip
    keys = ("name", "probe", "arguments", "environment", "alone")
    return [{**dict(zip(keys, one, strict=True)), "device": scale.device} for one in named]


def gradients(scale: Scale, plans: Plans) -> list[dict[str, Any]]:
    """The plan for less memory, which differs most from the untouched model, first."""

    def ample(network: Network, budget: float, norms: str = LIBRARY, amp: bool = False) -> dict[str, Any]:
        choice = plans(network, budget, norms=norms, amp=amp)
        kernels = "native" if norms == NATIVE else "the library's"
        how = f"{'AMP channels-last' if amp else 'fp32'}, {kernels} batch norm"
        question = PlanQuestion(
            arch=network.arch,
            block=network.block,
            width=scale.width,
            batch=scale.batch,
            plan=replace(choice.plan, ladder=()).to_json(),
            device=scale.device,
        )
        name = f"{network.name}, plan for {format_size(choice.budget.total_bytes)}, {how}"
        return {"name": name, "kind": "ample", "question": asdict(question)}

    more, less = scale.budgets
    found = [
        *(ample(network, less) for network in reversed(scale.networks)),
        _scarce(scale, plans(scale.main, less)),
        ample(scale.main, less, norms=NATIVE),
        ample(scale.main, less, amp=True),
    ]
    if not scale.brief:
        found += [
            *(ample(network, more) for network in reversed(scale.networks)),
            *(ample(network, less, norms=NATIVE) for network in scale.networks[:-1]),
        ]
    return found


def _scarce(scale: Scale, choice: Choice) -> dict[str, Any]:
    """Two trials that digest their first step's gradients."""
    planned = _trial(scale, choice, PLANNED, detailed=True, steps=1, warmup=1, eval_batch=None)
    untouched = _trial(scale, choice, PLAIN, detailed=True, steps=1, warmup=1)
    name = f"{scale.main.name}, plan for {format_size(choice.budget.total_bytes)}, within its budget (scarce memory)"
    return {"name": name, "kind": "scarce", "planned": planned, "untouched": untouched}


def _trial(scale: Scale, choice: Choice, way: str, **changes: Any) -> dict[str, Any]:
    plan, planned = choice.plan, way == PLANNED
    values: dict[str, Any] = {
        "arch": scale.main.arch,
        "block": scale.main.block,
        "width": scale.width,
        "batch": plan.batch,
        "precision": plan.precision,
        "memory_format": plan.memory_format,
        "device": scale.device,
        "way": way,
        "plan": replace(plan, ladder=()).to_json() if planned else None,
        "pictures": scale.pictures,
        "eval_batch": plan.batch if planned else None,
        "cap_bytes": choice.budget.allocator_bytes if planned else None,
        "steps": scale.steps,
    }
    return asdict(Trial(**{**values, **changes}))


def memory(scale: Scale, plans: Plans) -> list[dict[str, Any]]:
    """The untouched step of a batch first: the others' overhead is against it."""
    rows = []
    batches = ((scale.batch, scale.budgets), (scale.busy_batch, scale.budgets[:1]))
    for batch, budgets in batches[: 1 if scale.brief else 2]:
        for way, budget in ((PLAIN, None), *((PLANNED, one) for one in budgets), (PER_BLOCK, None)):
            choice = plans(scale.main, budget or budgets[0], batch)
            planned = way == PLANNED
            predicted = choice.plan.predicted if planned else choice.plain.estimate if way == PLAIN else None
            named = ("peak_allocated_bytes", "peak_reserved_bytes")
            limit = f" for {format_size(choice.budget.total_bytes)}" if planned else ""
            rows.append(
                {
                    "name": f"{scale.main.name}, batch {batch}, {way}{limit}",
                    "trial": _trial(scale, choice, way),
                    "vram_bytes": choice.budget.total_bytes if planned else None,
                    "budget": asdict(choice.budget) if planned else None,
                    "predicted": {name: getattr(predicted, name) for name in named} if predicted else None,
                }
            )
    return rows


def host(scale: Scale, plans: Plans) -> list[dict[str, Any]]:
    """The untouched step, the planned one, and that with host memory; its gradients are those of the planned one."""
    budget = scale.budgets[-1]
    alone, there = plans(scale.main, budget), plans(scale.main, budget, host=True)
    limit = format_size(alone.budget.total_bytes)
    rows = [
        ("untouched", alone, PLAIN, True),
        (f"planned for {limit}", alone, PLANNED, True),
        (f"planned for {limit}, with host memory", there, PLANNED, True),
        (f"planned for {limit}, with host memory that is not pinned", there, PLANNED, False),
    ]
    return [
        {
            "name": f"{scale.main.name}, {what}",
            "trial": _trial(scale, choice, way, detailed=True, eval_batch=None),
            "pinned": pinned,
            "budget": asdict(choice.budget) if way == PLANNED else None,
            "predicted": asdict(
                choice.plan.predicted
                if way == PLANNED
                else Predicted(overhead=0.0, peak_allocated_bytes=choice.plain.estimate.peak_allocated_bytes)
            ),
        }
        for what, choice, way, pinned in rows
    ]


def survival(scale: Scale, plans: Plans) -> list[dict[str, Any]]:
    choice = with_ladder(plans(scale.main, scale.budgets[0]))
    rows = []
    for real in (False, True):
        question = PlanQuestion(
            arch=scale.main.arch,
            block=scale.main.block,
            width=scale.width,
            batch=scale.batch,
            plan=choice.plan.to_json(),
            device=scale.device,
            cap_bytes=choice.budget.allocator_bytes,
            real=real,
        )
        rows.append({"name": f"{scale.main.name}, {'real' if real else 'injected'}", "question": asdict(question)})
    return rows


def resume(scale: Scale, plans: Plans) -> dict[str, Any]:
    """As many pictures as make an epoch that neither run ends."""
    steps = scale.resume_steps
    sets: dict[str, object] = {"data.train_subset": scale.batch * steps * 5 // 4, "data.test_subset": scale.batch}
    # Planned by the datasheet alone: what measuring and trying take, other parts show.
    sets |= {"memory.calibrate": "never", "memory.confirm": "never"}
    arguments = [*_network(scale), *_memory(scale, plans)]
    arguments += ["--data", "shapes", "--precision", "fp32", "--memory-format", "contiguous"]
    arguments += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    return {"arguments": arguments, "steps": steps, "stop_at": steps // 2}


def acceptance(scale: Scale, plans: Plans) -> dict[str, Any]:
    cells = ["--cells", "memory,time,gradients"]
    arguments = [*_network(scale), *_memory(scale, plans), "--steps", str(scale.steps), *cells]
    return {"arguments": arguments, "minutes": scale.suite_minutes}


def _memory(scale: Scale, plans: Plans) -> list[str]:
    flag = "--vram" if scale.device == "cuda" else "--tensors"
    return [flag, str(plans(scale.main, scale.budgets[0]).budget.total_bytes)]


def _network(scale: Scale) -> list[str]:
    named: dict[str, object] = {
        "arch": scale.main.arch,
        "block": scale.main.block,
        "width": scale.width,
        "batch": scale.batch,
        "device": scale.device,
    }
    return [part for key, value in named.items() for part in (f"--{key}", str(value))]


def marked_files() -> Sequence[str]:
    folder = Path(__file__).resolve().parents[2] / "tests/gpu"
    names = sorted(path.stem for path in folder.glob("test_*.py"))
    ordered = [name for name in _TESTS if name in names] + [name for name in names if name not in _TESTS]
    return [f"tests/gpu/{name}.py" for name in ordered]
