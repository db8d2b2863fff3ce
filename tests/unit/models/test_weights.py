"""Weights to begin with: which files are read and which are not run, what of them fits a network, and torchvision's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowmem.core.errors import PreflightError, UsageError
from lowmem.models.weights import place, pretrained_file, read_initial


def _net(classes: int = 3) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def _state(classes: int = 3) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _net(classes).state_dict().items()}


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
@pytest.mark.parametrize("ending", ["safetensors", "st", "pt", "pth"])
def test_files_of_weights(tmp_path: Path, ending: str, wrapped: str | None) -> None:
    file, state = tmp_path / f"net.{ending}", _state()
    if ending in ("safetensors", "st"):  # an export may have any name
        save_file(state, file)
    else:
        torch.save(state if wrapped is None else {"epoch": 3, wrapped: state, "lr": 0.1}, file)
    found = read_initial(file)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())


class _Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return Path.touch, (self.mark,)


def test_nothing_of_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    torch.save({"weight": torch.zeros(1), "more": _Runs(mark)}, tmp_path / "evil.pt")
    torch.save(_net(), tmp_path / "module.pt")
    for name in ("evil.pt", "module.pt"):
        with pytest.raises(PreflightError, match="is no file of weights alone, and nothing else is run"):
            read_initial(tmp_path / name)
    assert not mark.exists()


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.csv").write_text("picture,class\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name, words in {
        "gone.pt": "cannot be read (No such file",
        "text.safetensors": "no file of weights alone",
        "text.csv": "is run (it cannot be read, or wants code run): give --init",  # torch has advice to run it
        "empty.pt": "no file of weights alone",
        "list.pt": "holds no tensors by name",
    }.items():
        with pytest.raises(PreflightError, match=re.escape(words)) as refused:
            read_initial(tmp_path / name)
        assert refused.value.exit_code == 3
        assert "\n" not in str(refused.value)


def test_the_head_of_other_classes_stays_new() -> None:
    model, given = _net(5), _state(3)
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del given["1.num_batches_tracked"]
    given["aux.weight"] = torch.zeros(2)
    placed = place(given, model, "them")
    assert placed.reshaped == ("3.weight", "3.bias")
    assert placed.missing == ("1.num_batches_tracked",)
    assert placed.unused == ("aux.weight",)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[name] if name in placed.loaded else new[name]), name
    assert placed.lines() == [
        "  loaded                         6  0, 1",
        "  of another shape there: new    2  3",
        "  not there: new                 1  1",
        "  there, but not in the network  1  aux",
    ]


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod."])
def test_a_prefix_of_all_names_is_taken_off(prefix: str) -> None:
    model, given = _net(), {f"{prefix}{name}": tensor + 1 for name, tensor in _state().items()}
    placed = place(given, model, "them")
    assert (placed.stripped, len(placed.loaded), placed.missing) == (prefix, len(given), ())
    assert f"begins with {prefix!r}, which was taken off" in placed.lines()[-1]
    with pytest.raises(PreflightError, match=r"nothing of them fits this network: it has names like 'm\.0\.weight'"):
        place({f"m.{name}": tensor for name, tensor in _state().items()}, model, "them")


def test_other_formats_and_digits_are_the_networks() -> None:
    model = _net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in _state().items()}
    place(given, model, "them")
    kernel = model.state_dict()["0.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel, given["0.weight"].float())


# -- torchvision's -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of torch hub."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def test_what_is_in_the_cache_is_taken(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").touch()
    assert pretrained_file("torchvision:resnet18", print) == hub / "resnet18-f37072fd.pth"


def test_what_cannot_be_downloaded(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    said: list[str] = []
    with pytest.raises(
        PreflightError, match=r"resnet18-f37072fd\.pth cannot be downloaded .*put that file at"
    ) as error:
        pretrained_file("torchvision:resnet18", said.append)
    assert error.value.exit_code == 3
    assert said == ["downloading https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    assert not list(hub.glob("*"))
    with pytest.raises(UsageError, match="torchvision has no network 'resnet19'"):
        pretrained_file("torchvision:resnet19", said.append)
