"""What is known of the functions, methods and modules of torch that networks are made of."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

OUTPUT_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), "tanh"),
}
INPUT_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), "hardsigmoid"),
}

# The result may be the operand's memory under another shape.
VIEWS: set[Any] = {
    *("view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "chunk", "split"),
    *("unbind", "unflatten", "narrow", "select", "contiguous", "to", "float", "type", "movedim", "view_as", "detach"),
    *(torch.flatten, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.reshape, torch.chunk),
    *(torch.split, torch.unbind, torch.movedim, torch.narrow, torch.select, operator.getitem),
    *(nn.Flatten, nn.Unflatten, nn.Identity),
}
# Views of all of it, each element once: gradients of several uses may be summed before or after.
RESHAPING = {
    *("view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "unflatten", "movedim"),
    *("view_as", "contiguous"),
}
# Autograd saves shapes and numbers at most.
LIGHT: set[Any] = {
    *VIEWS,
    *("mean", "sum", "add", "sub", "neg", "roll", "repeat", "flip"),
    *(torch.mean, torch.sum, torch.cat, torch.concat, torch.stack, torch.add, torch.sub, torch.neg, torch.roll),
    *(operator.add, operator.sub, operator.neg, F.pad, F.pixel_shuffle, F.interpolate, torch.flip),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d, nn.Upsample, nn.UpsamplingNearest2d),
}
# Of one tensor; the backward makes a new one.
FRESH: set[Any] = {
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
DEAR_FUNCTIONS: set[Any] = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward, F.embedding, F.bilinear),
    *(torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.einsum, torch.baddbmm, operator.matmul),
}
DEAR_METHODS = {"matmul", "bmm", "mm", "addmm", "baddbmm", "__matmul__"}

# They move buffers that they are given.
MOVING: set[Any] = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}

SCALAR_METHODS = {
    "size",
    "dim",
    "numel",
    "stride",
    "nelement",
    "ndimension",
    "element_size",
    "is_contiguous",
    "get_device",
}
SCALAR_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "itemsize", "layout"}
SCALAR_FUNCTIONS: set[Any] = {getattr, len, math.sqrt, math.floor, math.ceil, torch.numel}

RANDOM = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "bernoulli", "rand"),
    *("randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "multinomial", "normal", "poisson"),
    *("rrelu", "gumbel_softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "uniform_", "normal_"),
    *("bernoulli_", "fractional_max_pool2d", "fractional_max_pool3d", "stochastic_depth", "native_dropout"),
    *("feature_dropout", "binomial"),
}

# Modules that draw no random numbers and whose result is soon made again.
QUIET_MODULES: set[type[nn.Module]] = {
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.Softmax, nn.LogSoftmax, nn.LeakyReLU, nn.ELU, nn.SELU),
    *(nn.CELU, nn.PReLU, nn.Mish, nn.Softplus, nn.Hardtanh, nn.GELU, nn.SiLU, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample, nn.UpsamplingNearest2d),
    *(nn.UpsamplingBilinear2d, nn.LPPool2d, nn.Softmax2d, nn.Threshold, nn.GLU, nn.Softsign, nn.LogSigmoid),
}
