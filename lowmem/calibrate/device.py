"""The device at hand: what it is called, what of its memory is free, what a process costs before its first tensor; and
where a run ran, for env.json.

A CUDA device is asked in a process of its own, so that the one that plans has no context. A card for which there is no
profile is described by its driver and by two short measurements.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.nn import functional as F

import lowmem
from lowmem.calibrate.measuring import ask
from lowmem.config.cards import Card, UsableShare, has_tensor_cores
from lowmem.core.reading import shorten
from lowmem.core.units import MIB
from lowmem.measure import Meter
from lowmem.measure.cuda import device_uuid
from lowmem.measure.meter import processor_name
from lowmem.measure.nvml import read_driver
from lowmem.models import build
from lowmem.plan.policy import LEAN, SAVE_ALL, uniform
from lowmem.remat import apply_plan, stage_names
from lowmem.remat.libraries import Numerics, convolutions_in_tf32, prepare_libraries
from lowmem.remat.links_cuda import measured_rates
from lowmem.step.train_step import amp_dtype

CONTEXT = ("context",)  # its key in a calibration
# What a context can be; anything else is somebody else's memory coming or going in the same moment.
_LEAST_CONTEXT_BYTES, _MOST_CONTEXT_BYTES = 32 * MIB, 2048 * MIB


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a figure is of. `device` is `cuda` or `cpu`; `threads` matter on the CPU only, `numerics` (which kernels the
    libraries may take) on CUDA only; `library` is cuDNN's version, on the CPU its capability."""

    device: str
    name: str
    driver: str | None
    torch: str
    library: str | None
    threads: int | None = None
    numerics: str | None = None

    @property
    def file_name(self) -> str:
        """Readable, and different for different identities."""
        threads = "" if self.threads is None else f"t{self.threads}"
        words = f"{self.name} {self.driver or ''} torch {self.torch} {threads}"
        slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.")[:80]
        return f"{slug}-{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}.json"


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """Bytes of the current CUDA device: `free_bytes` is what one process can have beside its context of `context_bytes`
    (None: it could not be told). `blas_workspace_bytes`: what cuBLAS and cublasLt took for a matrix product. `link`:
    PCIe generation and lanes, the most that card and slot can do."""

    name: str
    capability: tuple[int, int]
    driver: str | None
    cudnn: str | None
    total_bytes: int
    free_bytes: int
    context_bytes: int | None
    blas_workspace_bytes: int | None
    link: tuple[int | None, int | None]

    def identity(self, numerics: Numerics) -> Identity:
        return Identity(
            device="cuda",
            name=self.name,
            driver=self.driver,
            torch=torch.__version__,
            library=self.cudnn,
            numerics=repr(numerics),
        )


def cpu_identity() -> Identity:
    return Identity(
        device="cpu",
        name=processor_name() or "processor",
        driver=None,
        torch=torch.__version__,
        library=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
    )


def ask_device(numerics: Numerics) -> DeviceFacts:
    """Of the current CUDA device, by a process of its own. Raises PreflightError if that fails."""
    return TypeAdapter(DeviceFacts).validate_python(ask(f"{__name__}:measure_memory", asdict(numerics)))


@cache
def ask_link() -> tuple[float, float]:
    """Bytes per second to host memory and back, of the current CUDA device, likewise."""
    out, back = ask(f"{__name__}:measure_link", {})
    return out, back


def measure_link(_: Mapping[str, Any]) -> tuple[float, float]:
    """Here and now, making a context."""
    return measured_rates()


def measure_memory(numerics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of `DeviceFacts`, here and now, making a context: to be run where CUDA was not used before.
    `numerics`: the fields of a run's `Numerics`, which the libraries are then set to."""
    if numerics is not None:
        prepare_libraries(Numerics(**numerics))
    with closing(Meter("cuda")) as meter:
        warm_up("cuda")
        gc.collect()
        allocated = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        blas = allocated - torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        seen = meter.read()
    free, total = seen.device_free_bytes, seen.device_total_bytes
    if free is None or total is None:
        free, total = torch.cuda.mem_get_info()
    context = seen.context_bytes
    if context is not None and not _LEAST_CONTEXT_BYTES <= context <= _MOST_CONTEXT_BYTES:
        context = None
    report = read_driver()
    device = report.device(device_uuid())
    link = None if device is None else device.link
    cudnn = torch.backends.cudnn.version()
    return asdict(
        DeviceFacts(
            name=torch.cuda.get_device_name(),
            capability=torch.cuda.get_device_capability(),
            driver=report.driver_version,
            cudnn=None if cudnn is None else str(cudnn),
            total_bytes=total,
            free_bytes=free + (seen.reserved_bytes or 0),
            context_bytes=context,
            blas_workspace_bytes=blas or None,
            link=(None, None) if link is None else (link.most_generation, link.most_lanes),
        )
    )


def warm_up(device: str) -> None:
    """Steps of a thin network of each block, plain and planned, in both precisions: kernels are loaded when first used,
    and are a part of what a process takes. A full-sized network loads a few more."""
    for (arch, block), precision in product((("res20", "basic"), ("res56", "bottleneck")), ("fp32", "amp")):
        net = build(arch, block, width=16).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        low = amp_dtype(precision, device)
        images, labels = torch.randn(8, 3, 32, 32, device=device), torch.zeros(8, dtype=torch.int64, device=device)
        policies = [LEAN] * (len(stage_names(net)) - 1) + [SAVE_ALL]  # the head is no block
        for run in (net, apply_plan(net, uniform(policies), library_norm=True)):
            with torch.autocast(device, low, enabled=low is not None, cache_enabled=False):
                logits = run(images)
            with torch.autograd.set_multithreading_enabled(False):
                F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def describe_card(facts: DeviceFacts, rates: tuple[float, float, float], usual_context_bytes: int) -> Card:
    """A profile of a card that has none: the kind of its fp16 follows from the measured `rates` (see
    `Calibrator.rates`), the usable share is that of other cards. `usual_context_bytes`: where its own is not known."""
    bandwidth, fp32, low = rates
    generation, lanes = facts.link
    speed = f"{min(max(generation or 3, 3), 5)}.0"
    width = lanes if lanes in (1, 2, 4, 8, 16) else 16
    tensor_cores = has_tensor_cores(facts.name, facts.capability)
    return Card(
        name=facts.name,
        memory=facts.total_bytes,
        capability=f"{facts.capability[0]}.{min(facts.capability[1], 9)}",
        bandwidth_gb_per_second=bandwidth / 1e9,
        fp32_tflops=fp32 / 1e12,
        fp16="tensor-cores" if tensor_cores else ("2:1" if low > 1.2 * fp32 else "1/64"),
        pcie=f"{speed}x{width}",
        context=usual_context_bytes if facts.context_bytes is None else facts.context_bytes,
        usable=UsableShare(linux=0.98, linux_display=0.92, windows=0.81),
    )


def describe(device: str) -> dict[str, Any]:
    """Versions, processor, card and the git commit of a source checkout; unknown is None. No path, no user name. On
    CUDA which kernels the libraries may take, as this process is set (`lowmem.remat.libraries`)."""
    on_cuda = device == "cuda"
    return {
        "lowmem": lowmem.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "card": torch.cuda.get_device_name() if on_cuda else None,
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "deterministic": torch.backends.cudnn.deterministic if on_cuda else None,
        "tf32": convolutions_in_tf32(torch.cuda.get_device_capability()) if on_cuda else None,
    }


def _version(package: str) -> str | None:
    """Without importing it, which takes seconds for some. With the build (`+cu130`) where the module says it: the
    installed package's metadata have none."""
    spec = importlib.util.find_spec(package)
    said = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    text = said.read_text(encoding="utf-8") if said is not None and said.is_file() else ""
    if match := re.search(r"^__version__ = ['\"](.+)['\"]$", text, re.MULTILINE):
        return match[1]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# What decides the last bits of the arithmetic, as `describe` calls it.
_ARITHMETIC = ("torch", "device", "card", "cuda", "cudnn", "tf32", "cpu_capability", "cpu_threads")


def elsewhere(then: Mapping[str, object], now: Mapping[str, object]) -> str | None:
    """What is not as it was where a run began, if that can change the last bits of its arithmetic, in words. Both: see
    `describe`; what is not known of `then` tells nothing."""
    on_cpu = now.get("device") == "cpu" and then.get("device") == "cpu"
    names = [name for name in _ARITHMETIC if name in then and (on_cpu or not name.startswith("cpu_"))]
    changed = [f"{name} {shorten(then[name])} -> {now[name]}" for name in names if then[name] != now[name]]
    where = f"not as where the run began ({', '.join(changed)}): from here on the last bits may differ"
    return where if changed else None
