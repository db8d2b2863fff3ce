"""What may crash or hang, asked stage by stage in a process of its own: torch, the card, the data.

A stage is a function of the settings; it returns facts under the names of `Facts`, and whatever it raises is why they
are not known. The only network traffic is one connection, opened and closed, to the host of a download.
"""

from __future__ import annotations

import socket
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lowmem import isolate
from lowmem.core.errors import PreflightError, first_line

if TYPE_CHECKING:
    from lowmem.config.settings import Settings

# Of each stage what it found, or in words why it did not: an exception, the end of the process, or the time.
Answers = dict[str, dict[str, Any] | str]

_CONNECT_SECONDS = 3.0
_MOST_ERROR = 1e-3
_PROBE_SECONDS = 120.0  # the first use of a card by a new build may compile for a minute


def torch(settings: Settings) -> dict[str, Any]:
    import torch

    from lowmem.measure.cuda import torch_build

    return {**torch_build(), "threads": torch.get_num_threads()}


def allocator(settings: Settings) -> dict[str, Any]:
    """Torch's own judgement of the allocator settings in the environment, which it otherwise reads at the first
    allocation on a card."""
    import torch

    names = ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings")
    judge = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), lambda settings: None)
    try:
        judge("")
    except Exception as error:
        return {"allocator_trouble": first_line(error)}
    return {}


def cuda(settings: Settings) -> dict[str, Any]:
    """Whether torch finds a card, and which one it would use."""
    import torch

    if not torch.cuda.is_available():
        return {"cuda_available": False}
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return {"cuda_available": True, "device_uuid": None if uuid is None else str(uuid)}


def network(settings: Settings) -> dict[str, Any]:
    """Bytes on disk that a run of the network takes; without making it."""
    from lowmem.models import network_of
    from lowmem.runs.store import run_bytes

    config = settings.config
    net = network_of(config)
    parameter_bytes = sum(tensor.nbytes for tensor in net.parameters())
    # Parameters and buffers, and what the optimizer keeps of those that are trained.
    trained_bytes = sum(tensor.nbytes for tensor in net.parameters() if tensor.requires_grad)
    saved_bytes = sum(tensor.nbytes for tensor in net.state_dict().values()) + config.optim.copies * trained_bytes
    return {"disk_needed_bytes": run_bytes(config, checkpoint_bytes=saved_bytes, parameter_bytes=parameter_bytes)}


def execution(settings: Settings) -> dict[str, Any]:
    """Device, precision and memory format as a run would resolve them, and whether it would refuse to start so."""
    from lowmem.choose.execution import refuse_size, refuse_unsafe, resolve_execution

    resolved = resolve_execution(settings).config
    refuse_size(resolved)
    refuse_unsafe(resolved)
    return {"execution": resolved.train.model_dump(include={"device", "precision", "memory_format"})}


def torchvision(settings: Settings) -> dict[str, Any]:
    """A torchvision of another torch fails when it is imported, or at its first own operator."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    return {"torchvision_version": torchvision.__version__}


def data(settings: Settings) -> dict[str, Any]:
    """Whether the pictures are there, and what is wrong with them, or can be had."""
    from lowmem.data import find_pictures

    found = find_pictures(settings.config.data, settings.config.seed)
    if found.url is None:
        return {"data_there": True, "data_words": found.words, "data_warnings": list(found.warnings)}
    parts = urlsplit(found.url)
    host, port = parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)
    answers = host_answers(host, port)
    return {"data_there": False, "data_words": f"{found.words} from {host}", "data_host_answers": answers}


def host_answers(host: str, port: int) -> bool | None:
    """Whether a connection can be opened; None behind a proxy, and if the answer takes too long."""
    if urllib.request.getproxies():
        return None
    answer: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            answer.append(True)
        except OSError:
            answer.append(False)

    # Looking up the name knows no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return answer[0] if answer else None


def kernel(settings: Settings) -> dict[str, Any]:
    error = largest_error("cuda")
    if not error < _MOST_ERROR:  # nor NaN
        raise PreflightError(f"wrong results, off by up to {error:g}")
    return {}


def largest_error(device: str) -> float:
    """A product of matrices, and the gradient of a convolution, on the device: how far off the CPU's they are, which
    are of the order of 1; NaN if the device gives any."""
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
    stage.__name__: stage for stage in (torch, allocator, network, torchvision, data, cuda, execution, kernel)
}


def probe(asked: dict[str, Any]) -> Iterator[str | Answers]:
    """The stages `asked["stages"]` with the settings `asked["values"]`, by dotted name. Yields the name of the one that
    begins, so that it is known in which stage the process died, and then its answer."""
    from lowmem.config.settings import Settings, validate

    settings = Settings(validate(asked["values"], {}), dict.fromkeys(asked["values"], "doctor"))
    warnings.simplefilter("ignore")  # torch's own warning about an unfit build has no command that mends it
    for stage in asked["stages"]:
        yield stage
        try:
            yield {stage: STAGES[stage](settings)}
        except Exception as error:
            yield {stage: first_line(error)}


def ask(values: Mapping[str, object], stages: Sequence[str], *, timeout_seconds: float = _PROBE_SECONDS) -> Answers:
    """Runs the stages in one process; if it dies in one, the rest in another, but none without torch. Never raises.
    `values`: dotted name -> setting."""
    answers: Answers = {}
    left = list(stages)
    while left and not isinstance(answers.get("torch"), str):
        asked = {"values": values, "stages": left}
        outcome = isolate.run("lowmem.doctor.probe:probe", asked, timeout_seconds=timeout_seconds)
        begun = [part for part in outcome.parts if isinstance(part, str)]
        for part in outcome.parts:
            answers |= {} if isinstance(part, str) else part
        for stage in {*(begun or left[:1])} - answers.keys():
            answers[stage] = _how_it_ended(outcome, timeout_seconds)
        if not begun:  # it did not even start: it will not start again either
            break
        left = [stage for stage in left if stage not in begun]
    return answers


def _how_it_ended(outcome: isolate.CallResult, timeout_seconds: float) -> str:
    if outcome.ended == "too long":
        return f"no answer within {timeout_seconds:g} seconds"
    if outcome.code is None:
        return f"the process {outcome.words}"
    ended = f"was killed by signal {-outcome.code}" if outcome.code < 0 else f"ended with code {outcome.code}"
    return f"the process {ended}: {outcome.words}" if outcome.words else f"the process {ended}"
