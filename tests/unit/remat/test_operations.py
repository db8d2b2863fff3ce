"""Operations with kernels of their own: results and gradients have autograd's bits and layout, in place and not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.measure.tensors import TensorMeter
from lowmem.plan.policy import INPUT_ONLY, LEAN, SAVE_ALL, Keep, Schedule
from lowmem.remat import apply_plan, decompose
from lowmem.remat.autograd_operation import AutogradOperation
from lowmem.remat.elementwise import Add, InputActivation, Mul, OutputActivation
from lowmem.remat.layer_norm import GroupNorm, LayerNorm
from lowmem.remat.operation import Operation, PassState, dense, in_format
from lowmem.remat.pooling import MaxPool

CHANNELS_LAST = torch.channels_last
Case = tuple[Operation, Callable[..., Tensor], Sequence[tuple[int, ...]]]
IMAGE = (2, 6, 5, 4)


def _activation(kind: str, function: Callable[..., Tensor], *arguments: Any) -> Case:
    return OutputActivation("y", (0,), kind, arguments), function, [IMAGE]


def _input_activation(kind: str, function: Callable[..., Tensor], *arguments: tuple[str, Any]) -> Case:
    return InputActivation("y", (0,), kind, arguments), function, [IMAGE]


def _pool(size: Any, stride: Any, padding: Any, dilation: Any, up: bool) -> Case:
    function = nn.MaxPool2d(size, stride or None, padding, dilation, ceil_mode=up)
    return MaxPool("y", (0,), (size, stride, padding, dilation, up)), function, [(2, 6, 9, 8)]


CASES: dict[str, Case] = {
    "relu": _activation("relu", torch.relu),
    "relu6": _activation("relu6", F.relu6),
    "leaky relu": _activation("leaky_relu", lambda x: F.leaky_relu(x, 0.2), 0.2),
    "sigmoid": _activation("sigmoid", torch.sigmoid),
    "tanh": _activation("tanh", torch.tanh),
    "silu": _input_activation("silu", F.silu),
    "gelu": _input_activation("gelu", lambda x: F.gelu(x, approximate="tanh"), ("approximate", "tanh")),
    "add": (Add("y", (0, 1)), torch.add, [IMAGE, IMAGE]),
    "add, broadcast": (Add("y", (0, 1)), torch.add, [IMAGE, (2, 6, 1, 1)]),
    "mul": (Mul("y", (0, 1)), torch.mul, [IMAGE, IMAGE]),
    "mul, a number a channel": (Mul("y", (0, 1)), torch.mul, [IMAGE, (2, 6, 1, 1)]),
    "mul, the number first": (Mul("y", (0, 1)), torch.mul, [(2, 6, 1, 1), IMAGE]),
    "mul, a mask": (Mul("y", (0, 1)), torch.mul, [IMAGE, (5, 4)]),
    "mul, both broadcast": (Mul("y", (0, 1)), torch.mul, [(2, 6, 1, 4), (2, 1, 5, 4)]),
    "max pool": _pool((2,), (), (0,), (1,), False),
    "max pool of a stem": _pool((3,), (2,), (1,), (1,), False),
    "max pool, rounded up": _pool((3, 2), (2, 3), (1, 0), (1, 2), True),
    "layer norm": (LayerNorm("y", (0,), (5, 4), None, None, 1e-5), lambda x: F.layer_norm(x, (5, 4)), [IMAGE]),
    "group norm": (GroupNorm("y", (0,), 3, None, None, 1e-5), lambda x: F.group_norm(x, 3), [IMAGE]),
}
in_formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=["nchw", "nhwc"])
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def _operands(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, memory_format: Any) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    return [one.contiguous(memory_format=memory_format) if one.dim() == 4 else one for one in made]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype


@in_formats
@in_dtypes
@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_autograds(name: str, dtype: torch.dtype, memory_format: Any) -> None:
    operation, function, shapes = CASES[name]
    operands = _operands(shapes, dtype, memory_format)
    leaves = [one.clone().requires_grad_() for one in operands]
    wanted = function(*leaves)
    grad = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, leaves, grad)
    state = PassState()
    for into in (None, *operation.in_place):
        found = operation.forward([one.clone() for one in operands], state, into)
        assert _same(found, wanted.detach())
    ways = [(operands, wanted.detach() if operation.reads_output else None)]
    if operation.graphed:
        found, graph = operation.with_graph(operands, state, [True])
        assert _same(found, wanted.detach())
        ways.append(([], graph))
    for given, output in ways:
        for owned in (False, True):
            found_grads, _ = operation.backward(grad.clone(), given, output, state, [True] * len(operands), owned)
            assert all(_same(*pair) for pair in zip(found_grads, grads, strict=True))


def test_nobodys_gradient_is_not_changed() -> None:
    for name, (operation, function, shapes) in CASES.items():
        operands = _operands(shapes, torch.float32, torch.contiguous_format)
        state = PassState()
        output = operation.forward(operands, state)
        grad = torch.randn_like(output)
        before = grad.clone()
        operation.backward(
            grad, operands, output if operation.reads_output else None, state, [True] * len(shapes), False
        )
        assert torch.equal(grad, before), name
        assert torch.equal(output, function(*operands)), name


@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm((6, 5, 4)), nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.GroupNorm(2, 6)], ids=str
)
@in_formats
def test_norms_train_their_parameters(norm: nn.Module, frozen: Any, low: Any, memory_format: Any) -> None:
    for name, parameter in norm.named_parameters():
        parameter.requires_grad = name not in frozen
        parameter.data = torch.randn_like(parameter)
    x = _operands([IMAGE], torch.float32, memory_format)[0].requires_grad_()
    model = nn.Sequential(nn.Conv2d(6, 6, 1), norm, nn.Tanh())
    kinds = [type(one) for stage in decompose(model) for one in stage.operations]
    assert type(norm).__name__ in [kind.__name__ for kind in kinds]
    found = []
    for policy in (None, SAVE_ALL, INPUT_ONLY):
        model.zero_grad()
        x.grad = None
        net = model if policy is None else apply_plan(model, Schedule((Keep(0, policy),)))
        with torch.autocast("cpu", low, enabled=low is not None):
            y = net(x)
        y.backward(torch.ones_like(y))
        found.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class _Functional(nn.Module):
    """As torchvision's ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.leaky_relu(self.conv(x), 0.1), 2).permute(0, 2, 3, 1)
        x = F.layer_norm(x, (6,), self.weight, self.bias, 1e-6)
        return F.gelu(F.group_norm(x.permute(0, 3, 1, 2), 2), approximate="tanh")


def test_functions_have_kernels_too() -> None:
    (stage,) = decompose(_Functional())
    kinds = [type(one) for one in stage.operations if not one.view]
    assert kinds[1:] == [OutputActivation, MaxPool, LayerNorm, GroupNorm, InputActivation]


def test_what_has_hooks_runs_as_the_module_it_is() -> None:
    called = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[1].register_forward_hook(lambda *_: called.append(1))
    stages = decompose(model)
    assert [type(one) for stage in stages for one in stage.operations][1] is AutogradOperation
    apply_plan(model, Schedule(tuple(Keep(i, LEAN) for i in range(len(stages)))))(torch.randn(2, 3, 4, 4))
    assert called == [1]


# -- a ReLU in front of a max pool -------------------------------------------------------------------------------------


def _stem(window: int, inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(window), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("seed", range(20))
def test_a_relu_commutes_with_a_max_pool(seed: int) -> None:
    torch.manual_seed(seed)
    z = torch.randn(2, 3, 9, 9).mul(3).round().div(3)  # ties; windows without a positive value
    z[torch.rand_like(z) < 0.02] = float("nan")
    z[torch.rand_like(z) < 0.02] = -float("inf")
    z[:, 0] -= 2.0
    window = [(2, 2, 0), (3, 2, 1), (3, 1, 1)][seed % 3]
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    one = F.max_pool2d(leaves[0].relu(), *window)
    other = F.max_pool2d(leaves[1], *window).relu()
    grad = torch.randn_like(one)
    one.backward(grad)
    other.backward(grad)
    assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert torch.equal(*grads)


@pytest.mark.parametrize("inplace", [False, True])
def test_it_comes_after_the_pool(inplace: bool) -> None:
    model = _stem(2, inplace)
    stage = decompose(model)[0]
    assert [type(one) for one in stage.operations[1:3]] == [MaxPool, OutputActivation]
    used_twice = nn.Sequential(nn.Conv2d(3, 3, 1), _Twice())
    kinds = [type(one) for stage in decompose(used_twice) for one in stage.operations]
    assert kinds.index(OutputActivation) < kinds.index(MaxPool)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return F.max_pool2d(y, 3, 1, 1) + y


def test_a_stem_never_holds_the_relus_result() -> None:
    """What is kept of 64 KiB of convolution: that, indices (twice a quarter), and the pooled ReLU (a quarter)."""
    model = _stem(2, False)
    x = torch.randn(8, 3, 16, 16)
    full = 8 * 8 * 16 * 16 * 4
    meter = TensorMeter()
    planned = apply_plan(model, Schedule(tuple(Keep(i, SAVE_ALL) for i in range(len(decompose(model))))))
    with meter:
        y = planned(x)
    out = y.numel() * 4
    assert meter.live_bytes - out == pytest.approx(full // 4 * 3, abs=64)  # LEAN and SAVE_ALL: no convolution's result
    del y


def test_layouts() -> None:
    x = torch.randn(2, 6, 5, 4)
    assert dense(x)
    assert dense(x.permute(0, 2, 3, 1))
    assert not dense(x[:, :3])
    assert not dense(x.expand(2, 2, 6, 5, 4))
    pixel = torch.randn(2, 6, 1, 1).contiguous(memory_format=CHANNELS_LAST)
    assert not dense(torch.empty_strided((2, 6, 1, 1), (6, 1, 6, 6)))
    assert dense(pixel) == (pixel.stride() == pixel.relu().stride())
    assert in_format(x)
    assert in_format(x.contiguous(memory_format=CHANNELS_LAST))
    assert not in_format(x.transpose(2, 3))


# -- what the random networks found ------------------------------------------------------------------------------------


def _bits(make: Callable[[], nn.Module], x: Tensor, low: torch.dtype | None = None) -> None:
    """Gradients, and x's, of the plain model and of three schedules."""
    torch.manual_seed(0)
    model = make()
    found = []
    for policy in (None, SAVE_ALL, LEAN, INPUT_ONLY):
        model.zero_grad()
        given = x.clone().requires_grad_()
        stages = decompose(model)
        schedule = None if policy is None else Schedule(tuple(Keep(i, policy) for i in range(len(stages))))
        torch.manual_seed(1)
        with torch.autocast("cpu", low, enabled=low is not None):
            y = (model if schedule is None else apply_plan(model, schedule))(given)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        found.append([y.detach(), given.grad, *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        assert all(
            a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(found[0], other, strict=True)
        )


class _Of(nn.Module):
    def __init__(self, function: Callable[[_Of, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def test_a_linear_layer_of_what_is_not_contiguous() -> None:
    for bias in (False, True):
        for trained in (False, True):
            linear = nn.Linear(6, 6, bias)
            linear.weight.requires_grad = trained
            _bits(
                lambda linear=linear: _Of(  # type: ignore[misc]
                    lambda self, x: self.parts["linear"](self.parts["conv"](x).permute(0, 2, 3, 1)),
                    conv=nn.Conv2d(6, 6, 1),
                    linear=linear,
                ),
                torch.randn(IMAGE),
            )


def test_a_value_used_twice_in_one_operation() -> None:
    def forward(self: _Of, x: Tensor) -> Tensor:
        y = self.parts["conv"](x)
        return torch.cat([y, torch.maximum(y, y), y, y.sigmoid()], 1) * 3

    _bits(lambda: _Of(forward, conv=nn.Conv2d(6, 6, 1)), torch.randn(IMAGE))


def test_operators_in_place_are_in_place() -> None:
    def forward(self: _Of, x: Tensor) -> Tensor:
        y = self.parts["conv"](x)
        z = y
        z += 1.0
        z *= x
        return y * z

    _bits(lambda: _Of(forward, conv=nn.Conv2d(6, 6, 1)), torch.randn(IMAGE))


@pytest.mark.parametrize(
    "module", [nn.ELU(inplace=True), nn.Dropout(0.3, inplace=True), nn.Hardtanh(inplace=True)], ids=str
)
def test_modules_in_place_are_in_place(module: nn.Module) -> None:
    _bits(lambda: nn.Sequential(nn.Conv2d(6, 6, 1), module, nn.Conv2d(6, 6, 1)), torch.randn(IMAGE))


def test_a_shared_weight_under_autocast_sums_in_low_precision() -> None:
    def forward(self: _Of, x: Tensor) -> Tensor:
        conv = self.parts["conv"]
        return conv(conv(conv(x)).tanh())

    _bits(lambda: _Of(forward, conv=nn.Conv2d(6, 6, 1)), torch.randn(IMAGE), torch.bfloat16)


def test_norms_without_parameters_in_low_precision() -> None:
    norms = [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, affine=False, track_running_stats=False)]
    for norm in (*norms, nn.LayerNorm((5, 4), elementwise_affine=False)):
        _bits(lambda norm=norm: nn.Sequential(nn.Conv2d(6, 6, 1), norm, nn.Tanh()), torch.randn(IMAGE), torch.bfloat16)  # type: ignore[misc]


def test_pixels_in_channels_last() -> None:
    """Strides of no extent: results written in place keep them, new ones do not, and the next convolution looks."""
    x = torch.randn(3, 16, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    for inplace in (False, True):
        made = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.LeakyReLU(inplace=inplace), nn.BatchNorm2d(16)]
        made += [nn.SiLU(inplace), nn.Conv2d(16, 16, 1)]
        _bits(lambda made=made: nn.Sequential(*made).to(memory_format=CHANNELS_LAST), x)  # type: ignore[misc]


def test_a_view_with_other_uses_changed_in_place() -> None:
    def forward(self: _Of, x: Tensor) -> Tensor:
        y = self.parts["conv"](x)
        view = y.flatten(2)
        early = view.sigmoid() + view.exp()
        return view.relu_() + early

    _bits(lambda: _Of(forward, conv=nn.Conv2d(6, 6, 1)), torch.randn(IMAGE))
    model = _Of(lambda self, x: self.parts["conv"](x.permute(0, 1, 3, 2).relu_()), conv=nn.Conv2d(6, 6, 1))
    planned = apply_plan(model, Schedule((Keep(0, SAVE_ALL),)))
    with pytest.raises(ValueError, match="changes its input in place"):
        planned(torch.randn(IMAGE))
