"""Who this process is, by torchrun's environment."""

from __future__ import annotations

import pytest

from lowmem.cli.main import _run
from lowmem.core.errors import PreflightError, UsageError
from lowmem.distributed.launch import Launch, is_led

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip


def test_by_torchrun_and_alone() -> None:
    assert Launch.of_environment(TORCHRUN) == Launch(rank=3, size=4, local_rank=1, restarts=2)
    assert Launch.of_environment({"PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_PORT": ""}, "not MASTER_PORT"),
        ({"LOCAL_RANK": ""}, "not LOCAL_RANK"),
        ({"RANK": "four"}, "are numbers"),
        ({"RANK": "4"}, "cannot be"),
        ({"LOCAL_RANK": "5"}, "cannot be"),
    ],
)
def test_half_of_it_is_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Launch.of_environment({**TORCHRUN, **change})


@pytest.mark.parametrize(
    ("visible", "taken"),
    [(None, "1"), ("4,7", "7"), ("GPU-aa, GPU-bb", "GPU-bb"), ("", "")],
)
def test_each_process_has_a_device_of_its_own(visible: str | None, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # so that it is as before afterwards
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    Launch(rank=1, size=2, local_rank=1).take_device()
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(PreflightError, match="no more processes than there are cards"):
        Launch(rank=1, size=2, local_rank=1).take_device()


def test_what_one_process_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for command in (["reproduce"], ["bench"], ["fork", "runs/x", "--at", "1"], ["report", "runs/x"], ["ls"]):
        assert _run(command) == 2
        assert "is done by one process: leave torchrun out" in capsys.readouterr().err


def test_rank_0_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_led()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert not is_led()
    monkeypatch.setenv("RANK", "1")
    assert is_led()
