"""Runs in a process of its own: `python -m lowmem.doctor.probe STAGE…`, settings as JSON on standard input.

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
    from lowmem.settings import Settings


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
    from lowmem.data.present import find

    return asdict(find(settings.config.data))


def kernel(settings: Settings) -> dict[str, Any]:
    """Real kernels on the card: a product of matrices, a convolution and its gradients, compared with the CPU's."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    left, right = torch.arange(64.0).reshape(8, 8) / 64, torch.eye(8) + 1
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    picture = torch.ones(2, 3, 8, 8)
    conv(picture).square().mean().backward()
    assert conv.weight.grad is not None
    expected = [left @ right, conv.weight.grad.clone()]
    conv.zero_grad()
    conv.to("cuda")
    conv(picture.to("cuda")).square().mean().backward()
    found = [left.to("cuda") @ right.to("cuda"), conv.weight.grad]
    torch.cuda.synchronize()
    off = [float((a - b.cpu()).abs().max()) for a, b in zip(expected, found, strict=True)]
    right_answer = all(torch.allclose(a, b.cpu(), rtol=1e-3, atol=1e-4) for a, b in zip(expected, found, strict=True))
    return {"right": right_answer, "largest_error": max(off)}


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
    from lowmem.errors import LowmemError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if isinstance(error, LowmemError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def main(stages: list[str], given: TextIO, out: TextIO) -> None:
    """Runs the stages; a failure of one is its result."""
    from lowmem.settings import Settings, validate

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


if __name__ == "__main__":
    # A copy of standard output for the report alone; whatever else is printed goes to standard error.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.argv[1:], sys.stdin, report)
