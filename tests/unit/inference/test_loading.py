"""A run and a file of its weights alone give the trained module, and pictures as training evaluates them; what is not
the run's network, or a file that has changed since, is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import lowmem
from lowmem.config.networks import hash_of
from lowmem.config.settings import Settings, gather
from lowmem.core.errors import CorruptCheckpoint, DataError, LowmemError, PreflightError, UsageError
from lowmem.data import eval_batches, load
from lowmem.inference import LoadedRun, load_run
from lowmem.lifecycle import resume_training, run_training
from lowmem.models import make_network
from tests.tiny import Heard, sets, tiny

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.append(nn.Flatten()).append(nn.Linear(width, num_classes))
"""


def other(*changes: str) -> Settings:
    """The tiny run of a network that is not of the family."""
    return gather(sets=[text for text in sets(*changes) if not text.startswith(("model.arch", "model.width"))])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading") / "run"
    run_training(tiny("train.epochs=1"), path, Heard())
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network of a file, on pictures in a folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_net.py").write_text(NET)
    rng = np.random.default_rng(0)
    for part, name in (("train", "cats"), ("train", "dogs"), ("test", "cats"), ("test", "dogs")):
        (folder / "pets" / part / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (70 + number, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pets" / part / name / f"{number}.{'jpg' if number else 'png'}")
    changes = [f"model.spec={folder / 'my_net.py'}:Net", "model.args={width: 5}", "train.epochs=1", "train.batch=4"]
    changes += [f"data.source=folder:{folder / 'pets'}", f"data.cache={folder / 'cache'}", "data.image_size=64"]
    run_training(other(*changes, "data.train_subset=null", "data.test_subset=null"), folder / "run", Heard())
    return folder / "run"


def _evaluated(loaded: LoadedRun) -> torch.Tensor:
    """The test pictures, as training evaluated them."""
    assert loaded.config is not None
    data = load(loaded.config.data, loaded.config.seed)
    (only,) = eval_batches(data.test, len(data.test), data.mean, data.std, "cpu")
    return only[0]


@pytest.mark.parametrize("name", ["best", "last"])
def test_it_is_the_trained_module(run: Path, name: str) -> None:
    loaded, alone = load_run(run, name), lowmem.load_run(run / f"weights/{name}.safetensors")
    assert loaded.config is not None
    trained = make_network(loaded.config.model, 10, seed=1)
    trained.load_state_dict({key: torch.from_numpy(one) for key, one in load_file(loaded.weights).items()})
    images = _evaluated(loaded)
    logits = trained.eval()(images)
    assert torch.equal(loaded.model(images), logits)
    assert torch.equal(alone.model(images), logits)
    assert (alone.config, alone.info) == (None, loaded.info)
    assert not any(module.training for module in alone.model.modules())


def test_tensors_are_prepared_as_in_evaluation(run: Path) -> None:
    loaded = load_run(run, device="cpu")
    assert loaded.config is not None
    test = load(loaded.config.data, loaded.config.seed).test
    assert torch.equal(loaded.prepare(test.images), _evaluated(loaded))
    assert torch.equal(loaded.squares(test.images), test.images)


def test_small_pictures_are_enlarged_as_in_evaluation(tmp_path: Path) -> None:
    changes = ["model.spec=torchvision:mobilenet_v3_small", "data.image_size=48", "train.epochs=1"]
    run_training(other(*changes, "train.max_steps=1"), tmp_path / "a", Heard())
    run_training(other(*changes, "data.train_subset=20"), tmp_path / "b", Heard())
    loaded, alone = load_run(tmp_path / "b"), load_run(tmp_path / "b/weights/best.safetensors")
    assert loaded.config is not None
    small = load(loaded.config.data, loaded.config.seed).test.images
    assert small.shape[-1] == 32
    images = _evaluated(loaded)
    assert images.shape[-1] == 48
    assert torch.equal(loaded.prepare(small), images)
    assert torch.equal(alone.prepare([Image.fromarray(one.permute(1, 2, 0).numpy()) for one in small]), images)
    assert torch.equal(alone.model(images), loaded.model(images))
    with pytest.raises(UsageError, match=r"best.safetensors is not there: a run writes"):
        load_run(tmp_path / "a")


def test_files_are_prepared_as_in_evaluation(own: Path) -> None:
    """Larger than the network sees them, decoded, and of that the middle."""
    loaded = load_run(own)
    files = [own.parent / "pets/test" / name / f"{number}" for name in ("cats", "dogs") for number in range(6)]
    paths = [next(file.parent.glob(f"{file.name}.*")) for file in files]
    images = loaded.prepare(paths)
    assert images.shape == (12, 3, 64, 64)
    assert torch.equal(images, _evaluated(loaded))
    for at in (0, 7):
        assert torch.equal(loaded.prepare(str(paths[at])), images[at : at + 1])
    with Image.open(paths[0]) as picture:
        assert torch.equal(loaded.prepare(picture), images[:1])
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0)
    assert torch.equal(loaded.prepare(pixels), images[:1])


def test_how_files_become_square_is_told_by_the_weights(own: Path, tmp_path: Path) -> None:
    file = tmp_path / "stretched.safetensors"
    info = load_run(own).info
    assert info.fit == "crop"
    save_file(
        load_file(own / "weights/best.safetensors"), file, info.model_copy(update={"fit": "stretch"}).to_metadata()
    )
    picture = Image.fromarray(np.arange(70 * 140 * 3, dtype=np.uint8).reshape(70, 140, 3))
    squeezed = load_run(own, file).squares(picture.resize((73, 73), Image.Resampling.BICUBIC))
    assert torch.equal(load_run(own, file).squares(picture), squeezed)
    assert not torch.equal(load_run(own).squares(picture), squeezed)


def test_a_changed_file_is_not_run(own: Path, tmp_path: Path) -> None:
    file = own.parent / "my_net.py"
    ran = tmp_path / "ran"
    try:
        file.write_text(f"{NET}\nopen({str(ran)!r}, 'w').close()\n")
        with pytest.raises(PreflightError, match=r"my_net.py has changed since the network was trained") as refused:
            load_run(own)
    finally:
        file.write_text(NET)
    assert refused.value.exit_code == 3
    assert not ran.exists()
    assert load_run(own).model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("where", ["beside", "inside", "no hash"])
def test_a_file_that_came_with_the_run_is_not_run(
    where: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative path, or in the run's folder: whoever made that made it too, and its hash."""
    run, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(own, run)
    file = tmp_path / "my_net.py" if where == "beside" else run / "my_net.py"
    file.write_text(f"{NET}\nopen({str(ran)!r}, 'w').close()\n")
    config, old = (run / "config.yaml").read_text(), own.parent / "my_net.py"
    config = config.replace(hash_of(old.read_bytes()), hash_of(file.read_bytes()))
    config = config.replace(str(old), "my_net.py" if where == "beside" else str(file))
    if where == "no hash":
        file, config = file.rename(tmp_path / "my_net.py"), config.replace(str(file), str(tmp_path / "my_net.py"))
        config = re.sub(r"(?m)^  sha256: .*", "  sha256: {}", config)
    config = re.sub("memory_format: .*", "memory_format: auto", config)  # which looks at the network
    (run / "config.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PreflightError, match=r"no hash of \S*my_net.py is recorded, and it is not run without"):
        load_run(run)
    with pytest.raises(LowmemError):
        resume_training(run, {"train.epochs": 2})
    with pytest.raises(LowmemError):
        resume_training(run)
    assert not ran.exists()


def test_a_file_of_weights_runs_no_code(own: Path) -> None:
    with pytest.raises(PreflightError, match=r"only that my_net.py makes it, and no code runs on that"):
        load_run(own / "weights/best.safetensors")


def _grey(tensors: dict[str, np.ndarray], run: Path, file: Path) -> Path:
    """Weights of the same network for grey pictures."""
    info = load_run(run).info.model_copy(update={"mean": (0.5,), "std": (0.2,)})
    save_file({**tensors, "conv1.weight": tensors["conv1.weight"][:, :1].copy()}, file, info.to_metadata())
    return file


def _refusals(run: Path, own: Path, folder: Path) -> list[tuple[type[LowmemError], str, tuple[Path, ...]]]:
    tensors, info = load_file(run / "weights/best.safetensors"), load_run(run).info
    odd = {"text": {}, "unknown": info.model_copy(update={"arch": "res21"}).to_metadata()}
    odd["none"] = info.model_copy(update={"arch": None}).to_metadata()
    odd["wider"] = info.model_copy(update={"width": 4096}).to_metadata()
    odd["constant"] = info.model_copy(update={"std": (0.2, 0.2, 0.0)}).to_metadata()
    odd["grey"] = info.model_copy(update={"mean": (0.5,)}).to_metadata()
    odd["large"] = info.model_copy(update={"image_size": 1 << 40}).to_metadata()
    odd["small"] = info.model_copy(update={"image_size": 16}).to_metadata()
    for name, metadata in odd.items():
        save_file(tensors, folder / name, metadata)
    (folder / "cut").write_bytes((run / "weights/best.safetensors").read_bytes()[:-1])
    return [
        (PreflightError, r"does not say its data, classes, picture size, mean and deviation", (folder / "text",)),
        (CorruptCheckpoint, r"says of itself what cannot be", (folder / "unknown",)),
        (PreflightError, r"does not say what network it is of", (folder / "none",)),
        (CorruptCheckpoint, r"is another network's than res20 \(basic, width 4096\)", (folder / "wider",)),
        (CorruptCheckpoint, r"and deviation \(0.2, 0.2, 0.0\)", (folder / "constant",)),
        (CorruptCheckpoint, r"have mean \(0.5,\) and deviation", (folder / "grey",)),
        (CorruptCheckpoint, r"pictures of side 1099511627776", (folder / "large",)),
        (CorruptCheckpoint, r"cut cannot be used \(has [\d,]+ bytes", (folder / "cut",)),
        (CorruptCheckpoint, r"another network's than my_net.py:Net", (own, run / "weights/best.safetensors")),
        (CorruptCheckpoint, r"for RGB pictures of 16x16, and \S+ has RGB pictures of 32x32", (run, folder / "small")),
        (CorruptCheckpoint, r"for grey pictures of 32x32, and \S+ has RGB", (run, _grey(tensors, run, folder / "one"))),
        (UsageError, r"is a file of weights already", (folder / "wider", folder / "cut")),
        (UsageError, r"does not exist", (folder / "nowhere",)),
    ]


def test_what_cannot_be_loaded_is_refused(run: Path, own: Path, tmp_path: Path) -> None:
    for error, said, given in _refusals(run, own, tmp_path):
        with pytest.raises(error, match=said):
            load_run(*given)
    with pytest.raises(UsageError, match=r"there is no device 'gpu'"):
        load_run(run, device="gpu")


def test_pictures_that_cannot_be_used_are_named(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png cannot be used: no picture"):
        loaded.prepare(tmp_path / "text.png")
    for wrong in (torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(UsageError, match=r"a tensor of them is uint8 \[N, 3, H, W\]"):
            loaded.prepare(wrong)
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match=r"text.png cannot be used"):
        loaded.prepare(tmp_path / "text.png")
    assert loaded.prepare([]).shape == (0, 3, 32, 32)
