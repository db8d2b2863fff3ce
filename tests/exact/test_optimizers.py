"""The update under a plan: the bits of a plain PyTorch loop with the library's fused optimizer, its parameter groups,
`clip_grad_norm_` and `AveragedModel`, each as people write them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lowmem.config.optimization import OptimConfig
from lowmem.models import build
from lowmem.plan.policy import INPUT_ONLY, SAVE_ALL, uniform
from lowmem.remat import apply_plan, stage_names
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler, mean_weights
from tests.exact.compare import pictures

ROWS = {
    "nesterov": OptimConfig(nesterov=True),
    "sgd": OptimConfig(weight_decay=0.1, decay_norms=False, clip_norm=0.3),
    "adamw": OptimConfig(kind="adamw", weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
    "groups": OptimConfig(kind="adamw", weight_decay=0.1, decay_norms=False),
    "never clipped": OptimConfig(clip_norm=1e6),
    "all": OptimConfig(kind="adamw", weight_decay=0.1, decay_norms=False, clip_norm=0.3, ema=0.7),
}


def plain_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    groups = [{"params": model.parameters(), "weight_decay": optim.weight_decay}]
    if not optim.decay_norms:
        norms_and_biases = [p for p in model.parameters() if p.ndim <= 1]
        others = [p for p in model.parameters() if p.ndim > 1]
        groups = [
            {"params": others, "weight_decay": optim.weight_decay},
            {"params": norms_and_biases, "weight_decay": 0.0},
        ]
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.01, betas=optim.betas, eps=optim.eps, fused=True)
    return torch.optim.SGD(groups, lr=0.01, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)


@pytest.mark.parametrize(
    ("row", "precision", "layout"),
    [
        *((row, "fp32", torch.contiguous_format) for row in ROWS),
        *((row, "bf16", torch.channels_last) for row in ("sgd", "all")),
    ],
)
def test_four_steps(row: str, precision: str, layout: torch.memory_format) -> None:
    optim = ROWS[row]
    plain = build("res20", width=16).to(memory_format=layout)  # type: ignore[call-overload]
    ours = copy.deepcopy(plain)
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(optim.ema or 0.5))
    averaged.n_averaged += 1  # begins with the weights that training begins with
    optimizer = plain_optimizer(plain, optim)
    execution = Execution("cpu", precision, "contiguous")
    run = apply_plan(ours, uniform([INPUT_ONLY] * (len(stage_names(ours)) - 1) + [SAVE_ALL]))
    update = make_optimizer(ours, optim, "cpu")
    step = TrainStep(run, update, make_scaler(execution), execution, None, clip_norm=optim.clip_norm)
    for seed in range(4):
        images, labels = pictures(4, layout, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = plain(images)
        (F.cross_entropy(logits.float(), labels, reduction="sum") / 4).backward()
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(plain)
        step(images, labels, 0.01)
    assert_same(ours.state_dict(), plain.state_dict())
    if optim.ema is not None:
        with mean_weights(update):
            assert_same(dict(ours.named_parameters()), dict(averaged.module.named_parameters()))
        assert_same(ours.state_dict(), plain.state_dict())  # they are back


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_no_weight_decay_is_of_norms_and_biases_alone() -> None:
    model = build("res20", width=4)
    decayed, others = make_optimizer(model, OptimConfig(decay_norms=False), "cpu").param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    free = {id(parameter) for parameter in others["params"]}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in free}
    norms = [name for name, one in model.named_modules() if isinstance(one, nn.BatchNorm2d)]
    assert named == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")} | {"linear.bias"}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_network_of_norms_alone_has_one_group() -> None:
    (group,) = make_optimizer(nn.BatchNorm2d(3), OptimConfig(decay_norms=False), "cpu").param_groups
    assert group["weight_decay"] == 0.0


def test_scaled_gradients_are_clipped_by_their_own_norm() -> None:
    """What the scaler multiplied is divided before: as without it, bit for bit, where its factor is a power of two."""
    finals = []
    for enabled in (False, True):
        model = build("res20", width=4)
        optimizer = make_optimizer(model, OptimConfig(), "cpu")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        step = TrainStep(model, optimizer, scaler, Execution("cpu", "fp32", "contiguous"), None, clip_norm=0.01)
        for seed in range(3):
            step(*pictures(8, seed=seed), 0.1)
        finals.append(model.state_dict())
    assert_same(*finals)


@pytest.mark.parametrize("row", ["sgd", "all"])
def test_an_overflow_skips_the_step_but_not_the_next(row: str) -> None:
    """The scaler sees gradients that are no number before they are clipped."""
    optim = ROWS[row]
    model = build("res20", width=4)
    optimizer = make_optimizer(model, optim, "cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    execution = Execution("cpu", "fp32", "contiguous")
    step = TrainStep(model, optimizer, scaler, execution, None, clip_norm=optim.clip_norm)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    overflow = model.linear.bias.register_hook(lambda gradient: gradient * float("inf"))
    step(*pictures(8), 0.1)
    assert scaler.get_scale() == 512.0
    assert_same(dict(model.named_parameters()), before)
    overflow.remove()
    step(*pictures(8), 0.1)
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
