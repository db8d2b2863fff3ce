"""Where the convolution library corrupts memory: the rule, and the guard that keeps tests from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.config.optimization import OptimConfig
from lowmem.core.errors import PreflightError
from lowmem.models import build, skeleton
from lowmem.models.resnet import BasicBlock, Bottleneck, check_memory_format, is_safe, unsafe_convolutions
from lowmem.remat import apply_plan, decompose
from lowmem.simulate import StepRun, empty_copy, trace_steps
from lowmem.step.train_step import Execution, TrainStep, make_optimizer, make_scaler
from tests.exact.compare import small_net
from tests.exact.schedules import LEAN, uniform


@pytest.mark.parametrize(
    ("conv", "unsafe"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(15, 8, 1, stride=3), True),
        (nn.Conv2d(4, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), False),
        (nn.Conv2d(4, 8, (1, 3), stride=2), False),
    ],
    ids=str,
)
def test_the_rule_is_about_the_convolution(conv: nn.Conv2d, unsafe: bool) -> None:
    assert bool(unsafe_convolutions(nn.Sequential(conv))) == unsafe


@pytest.mark.parametrize(
    ("arch", "width", "unsafe"),
    [
        ("res20", 16, []),
        ("res20", 15, ["layer2.0.shortcut.0"]),
        ("res20", 4, ["layer2.0.shortcut.0", "layer3.0.shortcut.0"]),
        ("cnn20", 2, []),
        ("res50", 4, []),  # the strided ones have four times the width
        ("res50", 3, ["layer2.0.shortcut.0"]),
    ],
)
def test_networks_of_the_family(arch: str, width: int, unsafe: list[str]) -> None:
    assert list(unsafe_convolutions(skeleton(arch, width=width))) == unsafe


def test_only_fp32_in_channels_last_on_the_cpu_is_refused() -> None:
    thin = skeleton("res20", width=4)
    refused = {("cpu", "fp32", "channels-last"), ("cpu", "auto", "channels-last")}
    for device in ("cpu", "cuda"):
        for precision in ("fp32", "amp", "bf16", "auto"):
            for layout in ("contiguous", "channels-last"):
                assert is_safe(thin, device, precision, layout) == ((device, precision, layout) not in refused)
                check_memory_format(skeleton("res20", width=16), device, precision, layout)
    with pytest.raises(PreflightError, match=r"layer2.0.shortcut.0.*4 input channels.*--precision amp"):
        check_memory_format(thin, "cpu", "fp32", "channels-last")


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_exactness_is_tested_on_networks_that_are_safe_and_hardly_wider(block: type) -> None:
    net = small_net(block)
    strided = [one for one in net.modules() if isinstance(one, nn.Conv2d) and one.kernel_size == (1, 1) != one.stride]
    assert not unsafe_convolutions(net)
    assert min(conv.in_channels for conv in strided if conv.stride == (2, 2)) <= 32


@pytest.mark.parametrize("which", ["pictures", "weights"])
@pytest.mark.parametrize("engine", [False, True])
def test_a_test_cannot_run_one(engine: bool, which: str) -> None:
    model = build("res20", width=4)
    run = apply_plan(model, uniform(decompose(model), LEAN)) if engine else model
    x = torch.randn(2, 3, 32, 32)
    run(x).sum().backward()
    if which == "weights":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="corrupts memory"):
        run(x)
    with torch.autocast("cpu", torch.bfloat16):
        run(x)


def test_a_test_may_predict_one() -> None:
    """On outlines nothing is computed."""
    thin = skeleton("res20", width=4)

    def build() -> StepRun:
        execution = Execution("cpu", "fp32", "channels-last")
        model = empty_copy(thin, torch.channels_last)
        step = TrainStep(model, make_optimizer(model, OptimConfig(), "cpu"), make_scaler(execution), execution, None)
        images = torch.empty(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        return StepRun(step=step, images=images, labels=torch.zeros(2, dtype=torch.int64))

    assert trace_steps(build).flops() > 0
