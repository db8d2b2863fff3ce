"""The exceptions a user can meet. Each has the exit code of the command line and a message of one line that carries
both sides and the way out."""

from __future__ import annotations

from enum import IntEnum

from lowmem.core.units import format_size

_OF_TENSORS = "a step's tensors take at least {least}, and {budget} are left for them"


class ExitCode(IntEnum):
    DONE = 0
    BUG = 1
    USAGE = 2
    PREFLIGHT = 3
    NO_PLAN = 4
    OUT_OF_MEMORY = 5
    DIVERGED = 6
    CHECKPOINT = 7
    DISK = 8
    INTERRUPTED = 130  # 128 + SIGINT
    OUTPUT_CLOSED = 141  # 128 + SIGPIPE
    TERMINATED = 143  # 128 + SIGTERM


class LowmemError(Exception):
    """Base of all errors whose message is meant for the user; `exit_code` is what the command leaves with."""

    exit_code: ExitCode = ExitCode.BUG

    def __init_subclass__(cls, exit_code: ExitCode | None = None) -> None:
        cls.exit_code = exit_code or cls.exit_code

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.BUG


def first_line(error: BaseException) -> str:
    """The error in one line; a LowmemError is a sentence already."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, LowmemError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class UsageError(LowmemError, exit_code=ExitCode.USAGE):
    """Something typed or configured wrongly; nothing was changed."""


class PreflightError(LowmemError, exit_code=ExitCode.PREFLIGHT):
    """Data, disk or environment are not fit to start; nothing was changed."""


class DataError(PreflightError):
    """The data set is missing, truncated or something else than it should be."""


class Infeasible(LowmemError, exit_code=ExitCode.NO_PLAN):
    """No plan fits the budget (invariant 10): the budget, the least that would fit, and what takes it, in bytes.
    `sides`: least and budget in words; `who`: whom it does not fit. The message is for people, a line for both sides
    and one for the way out: what was tried and what takes the least is in `record`."""

    def __init__(
        self, budget_bytes: int, least_bytes: int, what: str, way_out: str, sides: str = _OF_TENSORS, who: str = ""
    ) -> None:
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.what = what
        self.way_out = way_out
        budget, least = format_size(budget_bytes), format_size(least_bytes)
        if budget == least:  # rounded for humans, and no message
            budget, least = f"{budget_bytes:,} B", f"{least_bytes:,} B"
        self.both_sides = f"no plan fits{who and f' for {who}'}: {sides.format(least=least, budget=budget)}"
        super().__init__(f"{self.both_sides}: {way_out}")

    @property
    def record(self) -> dict[str, object]:
        """Plain values, for programs."""
        return {name: getattr(self, name) for name in ("budget_bytes", "least_bytes", "what", "way_out")}


class OutOfMemory(LowmemError, exit_code=ExitCode.OUT_OF_MEMORY):
    """Out of memory and no smaller plan left; the run was saved."""


class Diverged(LowmemError, exit_code=ExitCode.DIVERGED):
    """The loss is no number any more, or has exploded, and the run was to stop, or nothing was left to try."""


class Stuck(LowmemError, exit_code=ExitCode.DIVERGED):
    """The run learns nothing and was to stop; it was saved."""


class CorruptCheckpoint(LowmemError, exit_code=ExitCode.CHECKPOINT):
    """A checkpoint does not verify, or belongs to something else."""


class ForeignCheckpoint(CorruptCheckpoint):
    """A checkpoint that is whole, but was made with other settings than the run has now."""


class UnreadableCheckpoint(CorruptCheckpoint):
    """A checkpoint that the system does not let be read: what it holds is not known to be damaged."""


class DiskError(LowmemError, exit_code=ExitCode.DISK):
    """The disk is full or refuses to write; what was saved before is intact."""


class OutputClosed(LowmemError, exit_code=ExitCode.OUTPUT_CLOSED):
    """Nobody reads standard output any more (`| head`): nobody is there to be told."""


class PeerLost(LowmemError, exit_code=ExitCode.TERMINATED):
    """Another process of the run is gone, or does not answer. `dismissed`: torchrun has told this one to leave."""

    def __init__(self, message: str, *, dismissed: bool = False) -> None:
        super().__init__(message)
        self.dismissed = dismissed


class PeerError(LowmemError):
    """What another process of the run failed with, and says; this one leaves with the same code."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"process {rank}: {message}", exit_code)


class PeerFailed(RuntimeError):
    """Not the user's: the step has to be undone, because another process could not make it."""


class Interrupted(LowmemError):
    """A signal asked the run to stop, and it was saved. It comes with the signal's code."""
