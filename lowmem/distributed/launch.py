"""How this process was started: alone, or by `torchrun` as one of several (its environment variables say so).

Source: https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables".
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from lowmem.core.errors import PreflightError, UsageError
from lowmem.core.units import counted

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One of `size` processes, numbered `rank` over all machines and `local_rank` on this one. `restarts`: how often
    torchrun has started all of them again after a failure."""

    rank: int
    size: int
    local_rank: int
    restarts: int = 0

    @staticmethod
    def of_environment(environment: Mapping[str, str] = os.environ) -> Launch | None:
        """None for a process that torchrun did not start. Raises UsageError for half of what it sets."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return None
        if missing := [name for name in _NEEDED if not environment.get(name)]:
            raise UsageError(
                f"RANK or WORLD_SIZE is set, but not {', '.join(missing)}: start several processes with "
                "`torchrun --nproc-per-node=2 -m lowmem …`, or unset them to train in one"
            )
        try:
            rank, size, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
            restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)
        except ValueError:
            raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK are numbers: let torchrun set them") from None
        if not (0 <= rank < size and 0 <= local <= rank):
            raise UsageError(f"RANK={rank} LOCAL_RANK={local} WORLD_SIZE={size} cannot be: let torchrun set them")
        return Launch(rank, size, local, restarts)

    def take_device(self) -> None:
        """Gives this process one CUDA device of its own, its only one and so device 0: for itself and for the
        processes it starts to measure. To be called before CUDA is used. Raises PreflightError if there are too few."""
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        if given is None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(self.local_rank)
            return
        devices = [name.strip() for name in given.split(",") if name.strip()]
        if not devices or devices[0] == "-1":
            return  # CUDA is switched off
        if self.local_rank >= len(devices):
            raise PreflightError(
                f"CUDA_VISIBLE_DEVICES={given} names {counted(len(devices), 'device')}, and this is process "
                f"{self.local_rank + 1} on this machine: start no more processes than there are cards "
                "(--nproc-per-node)"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[self.local_rank]


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes of the run this machine has. Whoever starts them without torchrun may not say it: then all of
    them count."""
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or 1)


def refuse_several(command: str) -> None:
    """Raises UsageError if torchrun has started several processes for what one does."""
    launch = Launch.of_environment()
    if launch is not None and launch.size > 1:
        raise UsageError(f"`{command}` is done by one process: leave torchrun out (it is for train and resume)")


def is_led() -> bool:
    """Whether another process of the run does the talking: torchrun started this one with a rank above 0."""
    rank = os.environ.get("RANK", "0")
    return "WORLD_SIZE" in os.environ and rank.isdigit() and int(rank) > 0


def leave(code: int) -> NoReturn:
    """Ends this process. One of several ends on the spot: the library's own end waits for what other processes owe."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def linger(seconds: float) -> None:
    """Before this process leaves although another one has the say: torchrun looks for the first to have failed, and
    ends all others as soon as it has found one. It ends this process when it has found the right one."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(seconds)


def report_failure(error: BaseException) -> None:
    """Leaves the cause where torchrun looks for it, for its summary of a failed run. Does nothing without torchrun."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
