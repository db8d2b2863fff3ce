"""Networks that are not of the family: torchvision's, timm's, and a Python file's; what is refused, in one line."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowmem.config.networks import hash_of, refuse_changed_files
from lowmem.config.schema import ModelConfig
from lowmem.core.errors import PreflightError, UsageError
from lowmem.models import check_network, from_recipe, hashes_of, make_network, recipe_of, skeleton

PICTURE = (3, 16, 16)
NET = """
from torch import nn
from layers import act

class Net(nn.Module):
    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x))

def make(**kwargs):
    return Net(**kwargs)

def fixed():
    return Net(7)

made = Net(10)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "layers.py").write_text("from torch import nn\n\ndef act():\n    return nn.ReLU()\n")
    (tmp_path / "unused.py").write_text("raise SystemExit('nobody imports this')\n")
    return _written(tmp_path / "my_net.py", NET)


def _written(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def _model(file: Path, name: str = "Net", **args: object) -> ModelConfig:
    return ModelConfig(spec=f"{file}:{name}", args=args)


def test_a_class_of_a_file_is_made_with_classes_and_arguments(file: Path) -> None:
    net = make_network(_model(file, width=6), 5, seed=1)
    assert [list(one.shape) for one in net.parameters()] == [[6, 3, 3, 3], [6], [5, 6], [5]]
    assert make_network(_model(file, "make", width=6), 3, seed=1)(torch.zeros(2, *PICTURE)).shape == (2, 3)
    planned = make_network(_model(file, width=6), 5)
    assert {one.device.type for one in planned.state_dict().values()} == {"meta"}
    assert str(file.parent) not in sys.path
    assert not list(file.parent.rglob("*.pyc"))


def test_the_same_seed_gives_the_same_weights_in_any_process(file: Path) -> None:
    model = _model(file)
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    net = make_network(model, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]
    code = (
        "import json, sys, torch; from lowmem.models import from_recipe; torch.rand(7);"
        "net = from_recipe(json.loads(sys.argv[1]), seed=5);"
        "print([one.flatten().tolist() for one in net.parameters()])"
    )
    recipe = json.dumps(recipe_of(net))
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str([one.flatten().tolist() for one in net.parameters()])
    other = make_network(model, seed=6)
    assert not torch.equal(net.get_parameter("head.weight"), other.get_parameter("head.weight"))


def test_a_recipe_makes_any_network_again(file: Path) -> None:
    for net in (skeleton("res20", width=2, num_classes=3), make_network(_model(file, width=2), 3)):
        again = from_recipe(json.loads(json.dumps(recipe_of(net))), seed=0)
        shapes = {name: one.shape for name, one in net.state_dict().items()}
        assert {name: one.shape for name, one in again.state_dict().items()} == shapes
    with pytest.raises(ValueError, match="made by hand has no recipe"):
        recipe_of(nn.Linear(1, 1))


def test_the_files_beside_it_that_it_imports_are_hashed(file: Path) -> None:
    hashes = hashes_of(_model(file))
    assert hashes == {name: hash_of((file.parent / name).read_bytes()) for name in ("my_net.py", "layers.py")}
    assert hashes_of(ModelConfig(spec="torchvision:resnet18")) == hashes_of(ModelConfig()) == {}


@pytest.mark.parametrize("name", ["my_net.py", "layers.py"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_changed_file_is_refused_and_not_run(file: Path, tmp_path: Path, name: str, gone: bool) -> None:
    model, ran = _model(file), tmp_path / "ran"
    recorded = model.model_copy(update={"sha256": hashes_of(model)})
    assert make_network(recorded, seed=0)
    (tmp_path / name).write_text(f"open({str(ran)!r}, 'w')\n{(tmp_path / name).read_text()}")
    if gone:
        (tmp_path / name).unlink()
    for refuse in (lambda: make_network(recorded), lambda: refuse_changed_files(recorded.spec, recorded.sha256)):
        with pytest.raises(PreflightError, match=r"is gone|has changed") as refused:
            refuse()
        assert "put it back" in str(refused.value)
        assert "lowmem fork" in str(refused.value)
    assert not ran.exists()
    if not gone:  # the user names it
        make_network(model)
        assert ran.exists()


def test_a_file_is_read_anew_when_it_has_changed(file: Path) -> None:
    assert make_network(_model(file)).get_parameter("head.weight").shape[1] == 4
    _written(file, NET.replace("width=4", "width=5"))
    assert make_network(_model(file)).get_parameter("head.weight").shape[1] == 5


def test_two_files_may_have_neighbours_of_one_name(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "layers.py").write_text("from torch import nn\n\ndef act():\n    return nn.Tanh()\n")
    _written(other / "my_net.py", NET)
    kinds = [type(make_network(_model(one)).get_submodule("body.1")) for one in (file, other / "my_net.py", file)]
    assert kinds == [nn.ReLU, nn.Tanh, nn.ReLU]


def test_what_it_newly_imports_beside_it_was_not_recorded(file: Path) -> None:
    _written(file, NET.replace("from layers", "try:\n    import extra\nexcept ImportError:\n    pass\nfrom layers"))
    model = _model(file)
    recorded = model.model_copy(update={"sha256": hashes_of(model)})
    make_network(recorded)
    (file.parent / "extra.py").write_text("")
    code = f"import lowmem.models as m; m.from_recipe({dict(recipe_of(make_network(recorded)))!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "now imports extra.py beside it" in done.stderr


def test_module_level_tensors_have_values(tmp_path: Path) -> None:
    """Though the first network of the file is made on `meta`."""
    text = """
    import torch
    from torch import nn
    SCALE = torch.rand(1)
    class Net(nn.Module):
        def __init__(self, num_classes=10):
            super().__init__()
            self.head = nn.Linear(3, num_classes)
        def forward(self, x):
            return self.head(x.mean((2, 3)) * SCALE.to(x.device))
    """
    model = _model(_written(tmp_path / "scaled.py", text))
    make_network(model)
    assert make_network(model, seed=0)(torch.ones(2, *PICTURE)).isfinite().all()


def test_a_network_that_meta_cannot_make_is_made_with_values(tmp_path: Path) -> None:
    text = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self, num_classes=10):
            super().__init__()
            self.widths = [int(one.item()) for one in torch.linspace(3, 3, 1)]
            self.head = nn.Linear(self.widths[0], num_classes)
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.head(x.mean((2, 3)))
    """
    model = _model(_written(tmp_path / "looks.py", text))
    assert make_network(model).get_parameter("head.weight").is_meta
    check_network(model, 10, PICTURE)


REFUSED = {
    "it_returns_other_classes": ("fixed", {}, r"returns \[2, 7\] .* has 10 classes"),
    "no_such_name": ("Nett", {}, r"Nett is not in it: give --model my_net.py:NAME, where it has Net"),
    "already_made": ("made", {}, r"made is no class or function"),
    "no_such_argument": ("Net", {"depth": 3}, r"my_net.py:Net \(depth=3\) cannot be made so \(TypeError: .*depth"),
    "not_a_module": ("hash_of", {}, "hash_of is not in it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_line(file: Path, case: str) -> None:
    name, args, words = REFUSED[case]
    with pytest.raises((UsageError, PreflightError), match=words) as refused:
        check_network(_model(file, name, **args), 10, PICTURE)
    assert "\n" not in str(refused.value)


BODIES = {
    "gray": ("self.c = nn.Conv2d(1, 4, 3); self.h = nn.Linear(4, n)", "self.h(self.c(x).mean((2, 3)))",
             "takes pictures of 1 channel, and these have 3: .* or set data.channels"),
    "two": ("self.h = nn.Linear(3, n)", "(self.h(x.mean((2, 3))), x)", "returns a tuple in training"),
    "wide": ("self.h = nn.Linear(999, n)", "self.h(x.flatten(1))", "does not take pictures of 3x16x16"),
    "lazy": ("self.h = nn.LazyLinear(n)", "self.h(x.flatten(1))", "lazy layers"),
    "nothing": ("pass", "x.mean((2, 3))", "no parameters to train"),
    "broken": ("raise RuntimeError('not so\\nat all')", "x", r"cannot be made \(RuntimeError: not so\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_what_does_not_take_the_pictures_is_refused(tmp_path: Path, case: str) -> None:
    init, forward, words = BODIES[case]
    text = (
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, num_classes):\n"
        f"        super().__init__(); n = num_classes; {init}\n    def forward(self, x):\n        return {forward}\n"
    )
    with pytest.raises(PreflightError, match=words):
        check_network(_model(_written(tmp_path / f"{case}.py", text)), 10, PICTURE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nfrom torch import (\n", "line 2 cannot be run .SyntaxError"),
        ("x = 1\nimport nothing_of_this_name\n", "line 2 cannot be run .ModuleNotFoundError"),
        ("raise SystemExit(1)\n", "line 1 cannot be run .SystemExit"),
    ],
)
def test_a_file_that_fails_is_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PreflightError, match=words):
        make_network(_model(_written(tmp_path / "fails.py", text)))


def test_torchvision_has_its_networks_without_weights() -> None:
    model = ModelConfig(spec="torchvision:resnet18", args={"zero_init_residual": True})
    net = make_network(model, 7, seed=0)
    assert net.get_parameter("fc.weight").shape == (7, 512)
    assert not net.get_parameter("layer1.0.bn2.weight").any()
    assert torch.equal(net.get_parameter("conv1.weight"), make_network(model, 7, seed=0).get_parameter("conv1.weight"))
    check_network(model, 7, PICTURE)
    with pytest.raises(UsageError, match=r"no network 'resnet19' .*did you mean resnet18"):
        make_network(ModelConfig(spec="torchvision:resnet19"))
    with pytest.raises(UsageError, match="that classifies pictures"):
        make_network(ModelConfig(spec="torchvision:fcn_resnet50"))
    with pytest.raises(PreflightError, match=r"GoogLeNetOutputs in training.*aux_logits=False"):
        check_network(ModelConfig(spec="torchvision:googlenet", args={"init_weights": False}), 7, PICTURE)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_it_is_said_how_to_get_it() -> None:
    with pytest.raises(PreflightError, match="pip install timm"):
        make_network(ModelConfig(spec="timm:convnext_tiny"))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_has_its_networks_without_weights() -> None:
    net = make_network(ModelConfig(spec="timm:resnet10t", args={"drop_rate": 0.1}), 7)
    assert net(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
