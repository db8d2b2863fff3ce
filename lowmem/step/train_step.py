"""One optimizer step: micro-batches, mixed precision, the optimizer; nothing of it waits for the device. And loss and
error on pictures the network is not trained on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.config.optimization import OptimConfig
from lowmem.step.data_parallel import DataParallelStep

FUSED: Mapping[str, bool] = {"fused": True}


def amp_dtype(precision: str, device: str) -> torch.dtype | None:
    """Of autocast: fp16 on CUDA, bf16 on the CPU (which has no fast fp16) and wherever it is asked for, None in
    fp32."""
    if precision == "fp32":
        return None
    return torch.float16 if device == "cuda" and precision == "amp" else torch.bfloat16


@dataclass(frozen=True)
class Execution:
    """How the arithmetic is done: device type, precision, `contiguous` or `channels-last`, all resolved."""

    device: str
    precision: str
    memory_format: str

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return amp_dtype(self.precision, self.device)

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.memory_format == "channels-last" else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """The autocast context of the forward pass; does nothing in fp32."""
        dtype = self.amp_dtype
        return torch.autocast(self.device, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class _UncompiledSGD(torch.optim.SGD):
    """The library's, without what its decorators do for torch.compile: they import torch._dynamo, over a second of
    every start (benchmarks/LOG.md, 2026-11-27)."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class _UncompiledAdamW(torch.optim.AdamW):
    """The library's, likewise."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


# What an optimizer may keep of a parameter. The mean of the weights (`OptimConfig.ema`) is kept beside the rest.
EMA = "ema"
SLOTS = frozenset({"momentum_buffer", "step", "exp_avg", "exp_avg_sq", EMA})


def make_optimizer(
    model: nn.Module, config: OptimConfig, device: str, form: Mapping[str, bool] = FUSED
) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters, in the library's fused form and with a state that exists from the
    start: its update, which moves the mean of the weights too, allocates nothing, so a step that runs out of memory
    does so before it and can be undone. `form`: another one, as the optimizers' own keywords say it."""
    if device == "cuda":
        # A kernel is loaded when it is first launched, and that takes memory: here, not in the middle of a full step.
        tiny = nn.Parameter(torch.zeros(1, device=device))
        tiny.grad = torch.zeros_like(tiny)
        _optimizer([tiny], config, form).step()
    return _optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], config, form)


def _optimizer(parameters: list[nn.Parameter], config: OptimConfig, form: Mapping[str, bool]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_norms:
        decay = {True: config.weight_decay, False: 0.0}  # by whether it has several dimensions
        of_each = {many: [one for one in parameters if (one.dim() > 1) == many] for many in decay}
        groups = [{"params": of_each[many], "weight_decay": decay[many]} for many in decay if of_each[many]]
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, **form}
    optimizer: torch.optim.Optimizer
    if config.kind == "adamw":
        optimizer = _UncompiledAdamW(groups, betas=config.betas, eps=config.eps, **shared)
    else:
        nesterov = config.nesterov and config.momentum > 0
        optimizer = _UncompiledSGD(groups, momentum=config.momentum, nesterov=nesterov, **shared)
    for parameter in parameters:
        if slots := _first_slots(parameter, config, form):
            optimizer.state[parameter] = slots
    if config.ema is not None:
        optimizer.register_step_post_hook(partial(_move_means, 1 - config.ema))
    return optimizer


def _first_slots(parameter: nn.Parameter, config: OptimConfig, form: Mapping[str, bool]) -> dict[str, Tensor]:
    """Left to itself the fused step makes momentum without values and, when the scaler found an overflow (the first
    step often has one), leaves before it writes them. From zeros the first step is the same."""
    slots: dict[str, Tensor] = {}
    if config.kind == "adamw":
        # Where the library counts steps: beside the parameter for its fused form only.
        slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if form.get("fused") else "cpu")
        slots |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    elif config.momentum > 0:
        slots["momentum_buffer"] = torch.zeros_like(parameter)
    if config.ema is not None:
        slots[EMA] = parameter.detach().clone()
    return slots


@torch.no_grad()
def _move_means(share: float, optimizer: torch.optim.Optimizer, *_: object) -> None:
    """As `torch.optim.swa_utils.get_ema_multi_avg_fn` does, in place."""
    means = [slots[EMA] for slots in optimizer.state.values()]
    torch._foreach_lerp_(means, list(optimizer.state), share)


@torch.no_grad()
def restart_means(optimizer: torch.optim.Optimizer) -> None:
    """Of weights that have other values now, from these on."""
    for parameter, slots in optimizer.state.items():
        if EMA in slots:
            slots[EMA].copy_(parameter)


@contextmanager
def mean_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside it the parameters have their running means for values, if there are any, and these have theirs: they
    change places, which takes no memory. No step may be made meanwhile."""

    def swap() -> None:
        for parameter, slots in optimizer.state.items():
            if EMA in slots:
                parameter.data, slots[EMA] = slots[EMA], parameter.data

    swap()
    try:
        yield
    finally:
        swap()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer keeps between steps: momentum, or AdamW's means and counts; and the mean of the weights."""
    return [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]


def make_scaler(execution: Execution) -> torch.amp.GradScaler:
    """Gradient scaling for fp16; disabled (and stateless) otherwise, bf16 has the range of fp32."""
    return torch.amp.GradScaler(execution.device, enabled=execution.amp_dtype is torch.float16)


@dataclass(eq=False)
class TrainStep:
    """Forward, backward and update for one effective batch, in micro-batches. The gradient is that of the mean loss
    over the batch, however it is cut (invariant 4); batch-norm statistics are per micro-batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    execution: Execution
    micro_batch: int | None
    joint: DataParallelStep | None = None  # with whom the step is made; None: by this process alone
    phase: str = "data"  # or forward, backward, reduction, gradient norms, update: for who has to say where it failed
    clip_norm: float | None = None  # see `OptimConfig`
    label_smoothing: float = 0.0

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        lr: float,
        look: Callable[[], None] | None = None,
        size: int | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """images float [B, C, 32, 32], labels int64 [B] -> (sum of losses, wrong predictions), float64 [2] on the
        device. Everything that allocates comes before the update, so `look` does, which may look at the gradients as
        the backward pass left them.

        `size`: of the effective batch, if these pictures are this process's slice of it (B may be 0 then); the result
        is of all of it. Of mixed pictures the labels are int64 [B, 2], and the loss is `share` of the first one's and
        the rest of the other's; wrong is what is not the label with the larger share."""
        size = labels.shape[0] if size is None else size
        totals = torch.zeros(2, dtype=torch.float64, device=images.device)
        if self.joint is not None:
            pieces = self.joint.cut(images, labels)
        else:
            micro = self.micro_batch or size
            pieces = list(zip(images.split(micro), labels.split(micro), strict=True))
        for count, (x, y) in enumerate(pieces, start=1):
            if self.joint is not None and count == len(pieces):
                self.joint.last_pass()
            self._forward_backward(x, y, size, totals, share)
        if self.joint is not None:
            self.phase = "reduction"
            if not pieces:
                self.joint.last_pass()
                self.scaler.scale(torch.zeros((), device=images.device))  # its scale comes to exist with the first use
            self.joint.finish(totals)
        if look is not None:
            self.phase = "gradient norms"
            look()
        if self.clip_norm is not None:
            self.phase = "gradient norms"
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if self.joint is not None:
            self.joint.agree()
        self.phase = "update"
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    def _forward_backward(self, x: Tensor, y: Tensor, size: int, totals: Tensor, share: float) -> None:
        self.phase = "forward"
        with self.execution.autocast():
            logits = self.model(x)
        if y.dim() == 2:
            y, other = y.T.contiguous()
            loss = share * self._loss(logits, y) + (1 - share) * self._loss(logits, other)
            y = y if share >= 0.5 else other
        else:
            loss = self._loss(logits, y)
        self.phase = "backward"
        # In this thread: cuDNN's choice of engines and cuBLAS's handle and workspace are a thread's own, and what is
        # computed again has to come from the engines that computed it first.
        with torch.autograd.set_multithreading_enabled(False):
            self.scaler.scale(loss / size).backward()
        totals[0] += loss.detach().double()
        logits, y = _for_every_position(logits, y)
        totals[1] += (logits.detach().argmax(1) != y).sum()

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """In fp32 at least, and as a sum: the last micro-batch may be smaller than the others."""
        logits, y = _for_every_position(logits, y)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, y, reduction="sum", label_smoothing=self.label_smoothing)


def _for_every_position(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Dense outputs [N, C, ...] are trained on the picture's label at each position; [N] is one class, [N, 1]."""
    if logits.dim() == 2:
        return logits, labels
    if logits.dim() == 1:
        logits = logits[:, None]
    positions = logits.shape[2:]
    return logits, labels.view(-1, *(1 for _ in positions)).expand(-1, *positions)


@dataclass(frozen=True)
class Score:
    """Sums of cross-entropy (nats) and of wrong predictions over `count` pictures; those of several sets add up."""

    loss_sum: float
    wrong: float
    count: int

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count

    @property
    def error_pct(self) -> float:
        return 100.0 * self.wrong / self.count


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    execution: Execution,
    should_stop: Callable[[int], bool] = lambda done: False,
    look: Callable[[Tensor, Tensor], None] = lambda logits, labels: None,
) -> Score | None:
    """Scores the model in eval mode, and puts it back as it was. None if `should_stop` said so in between, which hears
    how many pictures are done; `look` sees the logits [B, C] and labels of each batch. Changes no parameter and no
    buffer, so that an evaluation that was cut off can simply be done again."""
    was_training = model.training
    model.eval()
    loss_sum: Tensor | float = 0.0
    wrong: Tensor | float = 0.0
    count = 0
    try:
        for images, labels in batches:
            if should_stop(count):
                return None
            with execution.autocast():
                logits = model(images)
            loss_sum = loss_sum + F.cross_entropy(logits.float(), labels, reduction="sum").double()
            wrong = wrong + (logits.argmax(1) != labels).sum()
            look(logits, labels)
            count += labels.shape[0]
    finally:
        model.train(was_training)
    return Score(float(loss_sum), float(wrong), count)
