"""An exported file is the network, for any number of pictures, and says what it is; what is not the network, or would
replace something, is refused and not written."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lowmem
from lowmem.cli.main import _run
from lowmem.config.settings import gather
from lowmem.data import shapes
from lowmem.inference import load_run
from lowmem.inference.export import TOLERANCE
from lowmem.lifecycle import run_training
from lowmem.runs.weights import read_weights
from tests.tiny import Heard, sets, tiny

# What is exported in odd ways: `Net` has a layer that torch fuses in evaluation, `Counts` and `Branches` do with two
# pictures what they do not with others.
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

class Counts(Net):
    def forward(self, x):
        return self.head(self.patches(x).mean((2, 3))).reshape(int(x.shape[0]), -1)

class Branches(Net):
    def forward(self, x):
        return self.head(self.patches(x).mean((2, 3))) + (1 if x.shape[0] == 2 else 0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "run"
    run_training(tiny("train.epochs=1"), path, Heard())
    return path


def _other(spec: str, out: Path, *changes: str) -> None:
    few = [text for text in sets("train.epochs=1", *changes) if not text.startswith(("model.arch", "model.width"))]
    run_training(gather(flags={"model.spec": spec}, sets=few), out, Heard())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each network of a file, one of them on pictures in a folder, of which it sees the
    middle."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(NETS)
    for part, name, number in product(("train", "test"), ("cats", "dogs"), range(5)):
        (folder / "pets" / part / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pets" / part / name / f"{number}.png")
    pets = [f"data.source=folder:{folder / 'pets'}", f"data.cache={folder / 'cache'}", "data.image_size=64"]
    pets += ["data.train_subset=null", "data.test_subset=null", "train.batch=5"]
    for name, changes in {"Net": pets, "Counts": [], "Branches": []}.items():
        _other(f"{folder / 'nets.py'}:{name}", folder / name, *changes)
    return folder


def _export(run: Path, form: str, out: Path, *more: str) -> int:
    return _run(["export", str(run), "--format", form, "--out", str(out), *more])


def _logits(file: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """By the program that reads the file, and what it says of itself."""
    if file.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map["lowmem"]
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), json.loads(told)
    extra = {"lowmem.json": ""}
    with torch.no_grad():
        logits = torch.jit.load(file, _extra_files=extra)(images)
    return logits, json.loads(extra["lowmem.json"])


def _needs_onnx(form: str) -> None:
    if form == "onnx":
        for library in ("onnx", "onnxruntime"):
            pytest.importorskip(library, reason=f'needs {library}: pip install "lowmem[onnx]"')


def _is_the_network(trained: Path, form: str, folder: Path, pictures: Tensor) -> dict[str, Any]:
    """The graph of pictures that were prepared, and that of bytes, by any number; what the file says of itself."""
    loaded = load_run(trained, device="cpu")
    plain, raw = folder / f"plain.{form}", folder / f"raw.{form}"
    assert _export(trained, form, plain) == 0
    assert _export(trained, form, raw, "--raw-uint8") == 0
    for count in (1, 2, 7, 10):
        part = pictures[:count]
        images = loaded.prepare(part)
        with torch.no_grad():
            expected = loaded.model(images)
        logits, told = _logits(plain, images)
        of_bytes, raw_told = _logits(raw, part)
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
        assert torch.equal(of_bytes, logits)
    assert "uint8" in raw_told["takes"]
    info = loaded.info.model_dump(exclude_none=True, mode="json")
    assert {key: told[key] for key in info} == info
    return told


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_a_graph_is_the_network(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    _needs_onnx(form)
    told = _is_the_network(run, form, tmp_path, shapes.generate().train.take(np.arange(10)).images)
    assert "8 of the run's test pictures" in capsys.readouterr().out
    assert told["takes"] == "images: float32 [N, 3, 32, 32], RGB, (x / 255 - mean) / std by channel"
    assert told["gives"] == "logits: float32 [N, 10], by class"
    assert told["prepared"] == "the middle square of a picture, resized to 32x32 (bicubic)"
    assert told["exported_by"] == f"lowmem {lowmem.__version__}, torch {torch.__version__}"


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_a_network_of_a_file(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    _needs_onnx(form)
    pictures = load_run(own / "Net").squares(sorted((own / "pets/test").glob("*/*.png")))
    told = _is_the_network(own / "Net", form, tmp_path, pictures)
    assert "8 of the run's test pictures" in capsys.readouterr().out
    assert (told["spec"], told["classes"]) == ("nets.py:Net", ["cats", "dogs"])
    assert told["takes"] == "images: float32 [N, 3, 64, 64], RGB, (x / 255 - mean) / std by channel"
    assert told["prepared"].endswith("resized to 73x73 (bicubic), of that the middle 64x64")


def test_a_network_of_grey_pictures(tmp_path: Path) -> None:
    run_training(tiny("train.epochs=1", "data.channels=1"), tmp_path / "run", Heard())
    pictures = torch.randint(0, 256, (10, 1, 32, 32), dtype=torch.uint8)
    told = _is_the_network(tmp_path / "run", "torchscript", tmp_path, pictures)
    assert told["takes"] == "images: float32 [N, 1, 32, 32], grey, (x / 255 - mean) / std by channel"


def test_the_same_network_is_the_same_file(run: Path, tmp_path: Path) -> None:
    _needs_onnx("onnx")
    for name in ("a", "b"):
        assert _export(run, "onnx", tmp_path / name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_alone(run: Path, tmp_path: Path) -> None:
    assert _export(run, "safetensors", tmp_path / "net.safetensors", "--weights", "last") == 0
    assert (tmp_path / "net.safetensors").read_bytes() == (run / "weights/last.safetensors").read_bytes()
    assert read_weights(tmp_path / "net.safetensors")[1].classes == load_run(run).info.classes
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(load_run(tmp_path / "net.safetensors").model(images), load_run(run, "last").model(images))


def test_a_file_of_weights_is_exported_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There are no pictures of the run at hand then."""
    assert _export(run / "weights/last.safetensors", "torchscript", tmp_path / "a.pt") == 0
    assert "8 random pictures, as the run's own are not at hand" in capsys.readouterr().out
    assert _export(run, "torchscript", tmp_path / "b.pt", "--weights", str(run / "weights/last.safetensors")) == 0
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(_logits(tmp_path / "a.pt", images)[0], _logits(tmp_path / "b.pt", images)[0])


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize(
    ("name", "said"),
    [("Counts", "of 1 picture it gives logits"), ("Branches", "gives logits that differ by 1 in")],
)
def test_what_is_not_the_network_is_not_written(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, name: str, said: str
) -> None:
    _needs_onnx(form)
    assert _export(own / name, form, tmp_path / "net") == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert name == "Counts" or "and 0.0001 is the most that may be" in told.err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "class Odd(Net):\n    def forward(self, x):\n        if torch.jit.is_tracing():\n"
    odd += "            raise ValueError('no\\nway')\n        return self.head(self.patches(x).mean((2, 3)))\n"
    (tmp_path / "nets.py").write_text(f"{NETS}\n{odd}")
    _other(f"{tmp_path / 'nets.py'}:Odd", tmp_path / "run")
    capsys.readouterr()
    assert _export(tmp_path / "run", "torchscript", tmp_path / "net.pt") == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lowmem: nets.py:Odd cannot be written as torchscript for torch.jit (ValueError: no): mend")
    assert not (tmp_path / "net.pt").exists()


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("x")
    best = (run / "weights/best.safetensors").read_bytes()
    odd = {
        "there is no format 'onxx': use --format onnx, torchscript, safetensors": ("onxx", tmp_path / "a"),
        "there exists, and is not replaced": ("torchscript", tmp_path / "there"),
        "best.safetensors exists": ("safetensors", run / "weights/best.safetensors", "--weights", "last"),
        f"{tmp_path.name} exists": ("torchscript", tmp_path),
        "safetensors holds weights and no graph": ("safetensors", tmp_path / "a", "--raw-uint8"),
        "a is no folder": ("torchscript", tmp_path / "a" / "b"),
    }
    for said, (form, out, *more) in odd.items():
        assert _export(run, form, out, *more) == (3 if "no folder" in said else 2)
        assert said in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "x"
    assert (run / "weights/best.safetensors").read_bytes() == best
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_without_the_extra(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "onnxruntime":
        _needs_onnx("onnx")
    monkeypatch.setitem(sys.modules, library, None)  # as Python has it for what cannot be imported
    assert _export(run, "onnx", tmp_path / "net.onnx") == 3
    told = capsys.readouterr().err
    assert f"--format onnx needs {library}" in told
    assert 'pip install "lowmem[onnx]"' in told
    assert list(tmp_path.iterdir()) == []
