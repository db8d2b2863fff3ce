"""One optimizer step: micro-batches, mixed precision, the optimizer. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config import OptimConfig


@dataclass(frozen=True)
class Execution:
    """How the arithmetic is done: device type, `fp32` or `amp`, `contiguous` or `channels-last`, all resolved."""

    device: str
    precision: str
    memory_format: str

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """fp16 on CUDA, bf16 on the CPU (which has no fast fp16), None in fp32."""
        if self.precision != "amp":
            return None
        return torch.float16 if self.device == "cuda" else torch.bfloat16

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels-last" else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """The autocast context of the forward pass; does nothing in fp32."""
        dtype = self.amp_dtype
        return torch.autocast(self.device, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def make_optimizer(model: nn.Module, config: OptimConfig, device: str) -> torch.optim.SGD:
    """SGD over all trainable parameters. Never the multi-tensor form: it makes a copy of the parameters' size."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    form = {"fused": True} if device == "cuda" else {"foreach": False}
    optimizer = torch.optim.SGD(
        trainable,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
        **form,
    )
    if device == "cuda" and config.momentum > 0:
        # The fused step makes its momentum without values and, when the scaler found an overflow (the first step
        # often has one), leaves before it writes them. From zeros the first step is the same.
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(execution: Execution) -> torch.amp.GradScaler:
    """Gradient scaling for fp16; disabled (and stateless) otherwise, bf16 has the range of fp32."""
    return torch.amp.GradScaler(execution.device, enabled=execution.amp_dtype is torch.float16)


class TrainStep:
    """Forward, backward and update for one effective batch, in micro-batches.

    The gradient is that of the mean loss over the effective batch, however large that batch is and however it is cut
    (invariant 4); batch-norm statistics are per micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        execution: Execution,
        micro_batch: int | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.execution = execution
        self.micro_batch = micro_batch

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """images float [B, C, 32, 32], labels int64 [B] -> (sum of losses, wrong predictions), float64 on device."""
        size = labels.shape[0]
        micro = self.micro_batch or size
        loss_sum = torch.zeros((), dtype=torch.float64, device=images.device)
        wrong = torch.zeros((), dtype=torch.float64, device=images.device)
        for x, y in zip(images.split(micro), labels.split(micro), strict=True):
            with self.execution.autocast():
                logits = self.model(x)
            # In fp32 outside autocast, and as a sum: the last micro-batch may be smaller than the others.
            loss = F.cross_entropy(logits.float(), y, reduction="sum")
            self.scaler.scale(loss / size).backward()
            loss_sum += loss.detach().double()
            wrong += (logits.detach().argmax(1) != y).sum()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum, wrong
