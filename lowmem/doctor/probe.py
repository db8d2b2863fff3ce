"""Runs in a process of its own (`lowmem.doctor.asking`): stages as arguments, settings as JSON on standard input.

Each stage prints one line before it begins and one with its result, both JSON, so that whoever reads them knows in
which stage the process died. Nothing else may write to standard output: libraries that do are sent to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from lowmem.config.settings import Settings


def torch_build(settings: Settings) -> dict[str, Any]:
    """Importing torch; what it was built for."""
    import torch

    # get_arch_list() is empty on older releases where no card is found; the build itself is asked then.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or ""
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "archs": torch.cuda.get_arch_list() or flags.split(),
        "threads": torch.get_num_threads(),
    }


def allocator(settings: Settings) -> dict[str, Any]:
    """Torch's own judgement of the allocator settings in the environment, which it otherwise reads at the first
    allocation on a card."""
    import torch

    for name in ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings"):
        if hasattr(torch._C, name):
            try:
                getattr(torch._C, name)("")
            except Exception as error:
                return {"refused": _first_line(error)}
            break
    return {"refused": None}


def cuda(settings: Settings) -> dict[str, Any]:
    """Whether torch finds a card, and which one it would use."""
    import torch

    if not torch.cuda.is_available():
        return {"available": False, "uuid": None}
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return {"available": True, "uuid": None if uuid is None else str(uuid)}


def network(settings: Settings) -> dict[str, Any]:
    """Bytes of the network in a checkpoint, and of its parameters; without making it."""
    from lowmem.models import skeleton

    model = settings.config.model
    net = skeleton(model.arch, model.block, width=model.width)
    return {
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values()),
        "parameter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in net.parameters()),
    }


def execution(settings: Settings) -> dict[str, Any]:
    """Device, precision and memory format as a run would resolve them, and whether it would refuse to start so."""
    from lowmem.choose.execution import refuse_unsafe, resolve_execution

    resolved = resolve_execution(settings).config
    refuse_unsafe(resolved)
    train = resolved.train
    return {"device": train.device, "precision": train.precision, "memory_format": train.memory_format}


def torchvision(settings: Settings) -> dict[str, Any]:
    """A torchvision of another torch fails when it is imported, or at its first own operator."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    return {"version": torchvision.__version__}


def data(settings: Settings) -> dict[str, Any]:
    """Whether the pictures are there, without reading them all."""
    from lowmem.data.load import find_pictures

    return asdict(find_pictures(settings.config.data))


def kernel(settings: Settings) -> dict[str, Any]:
    """Real kernels on the card, see `largest_error`."""
    error = largest_error("cuda")
    return {"right": error < 1e-3, "largest_error": error}


def largest_error(device: str) -> float:
    """A product of matrices, and the gradient of a convolution, on the device: how far off the CPU's they are.

    All results are of the order of 1; NaN if the device gives any.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def results(where: str) -> list[torch.Tensor]:
        left = torch.linspace(-1, 1, 64, device="cpu").reshape(8, 8).to(where)
        pictures = torch.linspace(-1, 1, 2 * 3 * 8 * 8, device="cpu").reshape(2, 3, 8, 8).to(where)
        weights = torch.linspace(-1, 1, 4 * 3 * 3 * 3, device="cpu").reshape(4, 3, 3, 3).to(where).requires_grad_()
        convolved = torch.nn.functional.conv2d(pictures, weights, padding=1)
        (gradient,) = torch.autograd.grad(convolved.square().mean(), weights)
        return [(left @ left).cpu(), gradient.cpu()]

    off = [(ours - theirs).abs().max() for ours, theirs in zip(results("cpu"), results(device), strict=True)]
    return float(torch.stack(off).sum())  # a sum, unlike a maximum, never hides a NaN


# In this order: what the later ones need comes first, what is likeliest to take the process down last.
STAGES: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "torch": torch_build,
    "allocator": allocator,
    "network": network,
    "torchvision": torchvision,
    "data": data,
    "cuda": cuda,
    "execution": execution,
    "kernel": kernel,
}


def _first_line(error: BaseException) -> str:
    """The error in one line; a LowmemError is a sentence already."""
    from lowmem.core.errors import LowmemError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if isinstance(error, LowmemError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def main(stages: list[str], given: TextIO, out: TextIO) -> None:
    """Runs the stages; a failure of one is its result."""
    from lowmem.config.settings import Settings, validate

    values = json.loads(given.read())
    settings = Settings(validate(values, {}), dict.fromkeys(values, "doctor"))
    warnings.simplefilter("ignore")  # torch's own warning about an unfit build has no command that mends it

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    for stage in stages:
        say({"begin": stage})
        try:
            say({"stage": stage, "result": STAGES[stage](settings)})
        except Exception as error:
            say({"stage": stage, "trouble": _first_line(error)})


def run() -> None:
    """`main` on the process's own arguments and streams."""
    # A copy of standard output for the report alone; whatever else is printed goes to standard error.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.argv[1:], sys.stdin, report)
