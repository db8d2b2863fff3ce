"""What is frozen, by patterns of names; what stays in evaluation mode; what is refused, in one line."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lowmem.config.schema import ModelConfig
from lowmem.config.settings import gather
from lowmem.core.errors import UsageError
from lowmem.models import from_recipe, make_network, recipe_of
from lowmem.models.freezing import freeze

KINDS = ("weight", "bias")
RES20 = ModelConfig(arch="res20", width=2)


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if not one.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("conv1", ["conv1.weight"]),
        ("linear.bias", ["linear.bias"]),
        ("layer1.0", [f"layer1.0.{name}{k}.{kind}" for name in ("conv", "bn") for k in "12" for kind in KINDS]),
        ("layer3.?.bn1.b*", [f"layer3.{number}.bn1.bias" for number in range(3)]),
        ("layer[4]*shortcut", ["layer4.0.shortcut.0.weight", "layer4.0.shortcut.1.weight", "layer4.0.shortcut.1.bias"]),
    ],
)  # fmt: skip
def test_patterns_are_of_modules_and_of_parameters(pattern: str, names: list[str]) -> None:
    model = make_network(RES20, freeze=[pattern])
    every = dict(model.named_parameters())
    assert _frozen(model) == {name for name in names if name in every}
    assert _frozen(model)


def test_a_frozen_batch_norm_stays_in_evaluation_whoever_says_train() -> None:
    model = make_network(RES20, seed=0, freeze=["bn1", "layer1.0.bn1.weight"])
    for other in (model, copy.deepcopy(model)):
        other.eval()
        other.train()
        assert {name for name, one in other.named_modules() if not one.training} == {"bn1"}
    before = model.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    model(torch.randn(4, 3, 32, 32))
    assert torch.equal(model.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("pattern", ["first", "last.weight"])
def test_a_weight_with_two_names_is_frozen_by_either(pattern: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "last": nn.Linear(3, 3)})
    model["last"].weight = model["first"].weight
    freeze(model, [pattern])
    assert _frozen(model) == {"first.weight"}


def test_the_recipe_makes_it_again() -> None:
    for config in (RES20, ModelConfig(spec="torchvision:mobilenet_v3_small")):
        patterns = ["features.1*", "classifier.0"] if config.spec else ["layer2*"]
        model = make_network(config, seed=1, freeze=patterns)
        again = from_recipe(json.loads(json.dumps(recipe_of(model))), seed=1)
        assert _frozen(again) == _frozen(model)
        assert [one.training for one in again.modules()] == [one.training for one in model.modules()]
        assert "freeze" not in recipe_of(make_network(config))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["laier1*"], "'laier1*' is like no name of a part of the network with parameters: did you mean layer1"),
        (["relu"], "is like no name"),
        (["conv1", "zzz"], "it has conv1, bn1, layer1, layer2, layer3, layer4, linear"),
        (["*"], "freezes every parameter, and nothing is left to train"),
        (["conv1", "bn1", "layer*", "linear"], "freezes every parameter"),
    ],
)
def test_what_is_refused(patterns: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("*", r"\*")):
        make_network(RES20, freeze=patterns)


def test_the_setting_is_one_pattern_or_a_list_of_them() -> None:
    assert gather(sets=["train.freeze=layer1*"]).config.train.freeze == ("layer1*",)
    assert gather(sets=["train.freeze=[layer1*, bn1]"]).config.train.freeze == ("layer1*", "bn1")
    with pytest.raises(UsageError, match=r"train\.freeze = 3 .*a list of patterns"):
        gather(sets=["train.freeze=3"])
