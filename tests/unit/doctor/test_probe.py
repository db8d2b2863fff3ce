"""The probe as real processes: broken installations are stubs that stand first on PYTHONPATH."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import Config, OptimConfig, flatten
from lowmem.doctor import probe as stages
from lowmem.doctor.probe import Answers, ask, host_answers, largest_error, probe
from lowmem.models import build

TINY = Config.model_validate({"model": {"width": 4}, "data": {"source": "shapes"}})


def stub(folder: Path, module: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is found before the real one, by child processes only."""
    (folder / f"{module}.py").write_text(code)
    rest = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), rest] if rest else [str(folder)]))


TORCH = """
import types
__version__ = "2.15.0"
version, cuda, _C = types.SimpleNamespace(cuda=None), types.SimpleNamespace(get_arch_list=list), None
def get_num_threads(): return 1
"""


def all_found(answers: Answers) -> set[str]:
    """The stages asked, none of which failed."""
    assert all(isinstance(answer, dict) for answer in answers.values())
    return set(answers)


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What lies in the current folder is not imported.
    (tmp_path / "torch.py").write_text("raise ImportError('from the current folder')")
    monkeypatch.chdir(tmp_path)
    answers = ask(flatten(TINY), ["torch", "allocator", "network", "torchvision", "data", "cuda", "execution"])
    found = {stage: answer for stage, answer in answers.items() if isinstance(answer, dict)}
    assert found == answers
    assert found["torch"]["torch_version"] == torch.__version__
    assert found["torch"]["torch_cuda"] == torch.version.cuda
    assert found["allocator"] == {}
    assert found["cuda"]["cuda_available"] == torch.cuda.is_available()
    assert found["data"]["data_there"] is True


def test_what_a_run_takes_on_disk() -> None:
    net = build("res20", width=4)
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    state = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    # Two kept and one being written, each with parameters and momentum; weights three times.
    assert answered(TINY, "network") == {"disk_needed_bytes": 3 * (state + parameters) + 3 * parameters}
    more = TINY.model_copy(update={"optim": OptimConfig(kind="adamw", ema=0.9)})
    assert answered(more, "network") == {"disk_needed_bytes": 3 * (state + 3 * parameters) + 3 * parameters}


def test_a_torchvision_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "torch", TORCH, monkeypatch)
    stub(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')", monkeypatch)
    answers = ask(flatten(TINY), ["torch", "torchvision", "allocator"])
    assert answers.pop("torchvision") == "RuntimeError: operator torchvision::nms does not exist"
    assert all_found(answers) == {"torch", "allocator"}


def test_a_torchvision_that_takes_the_process_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages after it are asked again, in another process."""
    code = "import os, sys; print('undefined symbol: _ZN3c10', file=sys.stderr, flush=True); os._exit(9)"
    stub(tmp_path, "torch", TORCH, monkeypatch)
    stub(tmp_path, "torchvision", code, monkeypatch)
    answers = ask(flatten(TINY), ["torch", "torchvision", "allocator"])
    assert answers.pop("torchvision") == "the process ended with code 9: undefined symbol: _ZN3c10"
    assert all_found(answers) == {"torch", "allocator"}


def test_without_torch_nothing_else_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')", monkeypatch)
    answers = ask(flatten(TINY), ["torch", "network"])
    assert answers["torch"] == "ImportError: libcudart.so.13: cannot open shared object file"
    assert all(isinstance(answer, str) for answer in answers.values())


def test_a_probe_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "torch", "import time; time.sleep(600)", monkeypatch)
    answers = ask(flatten(TINY), ["torch"], timeout_seconds=3)
    assert answers == {"torch": "no answer within 3 seconds"}


def test_a_probe_that_cannot_even_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(tmp_path, "pydantic", "raise ImportError('no pydantic')", monkeypatch)
    answers = ask(flatten(TINY), ["torch", "network"])
    assert answers == {"torch": "the process ended with code 1: ImportError: no pydantic"}


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA and reads no allocator settings")
def test_allocator_settings_are_judged_by_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "nonsense:1")
    assert "nonsense" in str(ask(flatten(TINY), ["allocator"])["allocator"])


def answered(config: Config, stage: str) -> Any:
    """What a stage finds, or its trouble, in this process."""
    with warnings.catch_warnings():
        begins, found = probe({"values": flatten(config), "stages": [stage]})
    assert begins == stage
    assert isinstance(found, dict)
    return found[stage]


def test_what_train_would_refuse_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"device": "cpu", "memory_format": "channels-last", "precision": "fp32"}
    thin = Config.model_validate({"model": {"width": 8}, "train": train})
    trouble = answered(thin, "execution")
    assert trouble.startswith("channels-last in fp32 corrupts memory on the CPU")
    assert "--memory-format contiguous" in trouble
    wide = Config.model_validate({"train": train})
    assert answered(wide, "execution") == {"execution": train}
    large = Config.model_validate({"train": train, "data": {"image_size": 224}})
    assert answered(large, "execution").startswith("res20 takes no pictures of 224x224")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trouble = answered(Config.model_validate({"train": {"device": "cuda"}}), "execution")
    assert trouble.startswith("device cuda was asked for")


def test_libraries_that_print_do_not_disturb_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('{\"part\": {\"torch\": {}}}')\nraise ImportError('noisy')"
    stub(tmp_path, "torch", code, monkeypatch)
    assert ask(flatten(TINY), ["torch"]) == {"torch": "ImportError: noisy"}


def test_every_stage_is_announced_before_it_runs() -> None:
    with warnings.catch_warnings():
        said = list(probe({"values": flatten(TINY), "stages": ["torch", "network"]}))
    assert [part if isinstance(part, str) else all_found(part) for part in said] == [
        "torch",
        {"torch"},
        "network",
        {"network"},
    ]


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_card_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(stages, "largest_error", lambda device: error)
    assert answered(TINY, "kernel") == f"wrong results, off by up to {error:g}"


def test_the_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    found = answered(Config.model_validate({"data": {"root": str(tmp_path)}}), "data")
    words = f"CIFAR-10 is not in {tmp_path}: 163 MiB would be downloaded from www.cs.toronto.edu"
    assert found == {"data_there": False, "data_words": words, "data_host_answers": None}


def test_whether_a_host_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert host_answers("127.0.0.1", port) is True
    assert host_answers("127.0.0.1", port) is False
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert host_answers("127.0.0.1", port) is None


def test_the_kernels_agree_with_themselves_on_the_cpu() -> None:
    assert largest_error("cpu") == 0.0


def test_a_device_that_cannot_compute_is_an_error() -> None:
    """Stood in for by shapes without values."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        largest_error("meta")


def test_the_doctor_imports_no_torch() -> None:
    probe = "import sys, lowmem.cli.show, lowmem.doctor; assert not {'torch', 'torchvision'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
