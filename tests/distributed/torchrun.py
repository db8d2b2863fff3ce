"""`torchrun` as a user types it, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240.0  # for a loaded machine; what hangs for longer has failed


class Torchrun:
    """`torchrun --nproc-per-node=N -m ARGUMENTS` under way, its output in a file."""

    def __init__(self, folder: Path, processes: int, *arguments: str, max_restarts: int = 0) -> None:
        self.log = folder / "torchrun.log"
        self._file = open(self.log, "w", encoding="utf-8")  # noqa: SIM115
        head = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        head += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
        head += [f"--max-restarts={max_restarts}"]
        path = {"PYTHONPATH": str(ROOT)}
        if sys.platform == "linux":
            path["GLOO_SOCKET_IFNAME"] = "lo"
        self._process = subprocess.Popen(
            [*head, "-m", *arguments], cwd=folder, env=environment() | path, stdout=self._file, stderr=self._file
        )

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code: 0, or 1 whatever a process left with (torchrun's own summary has that)."""
        try:
            return self._process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGTERM)
            raise AssertionError(f"still there after {LIMIT_SECONDS:g} s:\n{self.output}") from None
        finally:
            self._file.close()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")


def torchrun(folder: Path, processes: int, *arguments: str, max_restarts: int = 0) -> tuple[int, str]:
    """(exit code, output) of a whole run."""
    run = Torchrun(folder, processes, *arguments, max_restarts=max_restarts)
    code = run.wait()
    return code, run.output


def wait_for(path: Path, what: str, count: int = 1) -> None:
    """Until the file has `what` so often."""
    began = time.monotonic()
    while time.monotonic() - began < LIMIT_SECONDS:
        if path.is_file() and path.read_text(encoding="utf-8").count(what) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never said {what!r}")
