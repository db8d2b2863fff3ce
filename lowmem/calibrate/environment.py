"""Where a run ran: versions and hardware, for env.json."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lowmem
from lowmem.core.reading import shorten
from lowmem.measure.meter import processor_name


def describe(device: str) -> dict[str, Any]:
    """Versions, processor, card and the git commit of a source checkout; unknown is None. No path, no user name. On
    CUDA which kernels the libraries may take, as this process is set (`lowmem.remat.libraries`)."""
    import torch

    from lowmem.remat.libraries import convolutions_in_tf32

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
    if said is not None and said.is_file():
        for line in said.read_text(encoding="utf-8").splitlines():
            if match := re.fullmatch(r"__version__ = [\'\"](.+)[\'\"]", line):
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
