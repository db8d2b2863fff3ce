"""The figures of a run: fetched from the device now and then, written as rows, and what of them a user is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lowmem
from lowmem.config.networks import describe
from lowmem.config.schema import Config
from lowmem.data import Dataset
from lowmem.runs.checkpoint_state import Best
from lowmem.runs.event_files import EventFiles
from lowmem.runs.store import RunFolder, run_bytes
from lowmem.runs.weights import WeightsInfo
from lowmem.step.train_step import Score, TrainStep
from lowmem.train.card_watch import CardWatch
from lowmem.train.loss_watchers import note_share, tenth
from lowmem.train.observer import Progress
from lowmem.train.replica import Replica


class Eta:
    """The time left, from what this process measured itself: after a resume nothing of an earlier process is divided
    in. Steps and evaluations are timed apart. Seconds are monotonic-clock seconds."""

    def __init__(self, epochs: int, steps_per_epoch: int, max_steps: int | None = None) -> None:
        self._steps = min(epochs * steps_per_epoch, max_steps or epochs * steps_per_epoch)
        self._evaluations = self._steps // steps_per_epoch
        self._mark: tuple[int, float] | None = None
        self._step_seconds: float | None = None
        self.evaluation_seconds: float | None = None  # of the last evaluation

    def trained(self, step: int, now: float) -> None:
        """Called after steps, with the count of steps done."""
        if self._mark is not None and step > self._mark[0]:
            latest = (now - self._mark[1]) / (step - self._mark[0])
            # A slow average follows a machine whose speed drifts and forgets the warm-up.
            self._step_seconds = latest if self._step_seconds is None else 0.8 * self._step_seconds + 0.2 * latest
        self._mark = (step, now)

    def evaluated(self, seconds: float) -> None:
        """Called after an epoch's evaluation, which is then not counted as the time of steps."""
        self.evaluation_seconds, self._mark = seconds, None

    def seconds(self, epochs_done: int, steps_done: int) -> float | None:
        """Seconds until the end of the run, or until it stops as asked; None until something was measured."""
        if self._step_seconds is None:
            return None
        steps = max(0, self._steps - steps_done)
        evaluations = max(0, self._evaluations - epochs_done)
        return steps * self._step_seconds + evaluations * (self.evaluation_seconds or 0.0)


class Metrics:
    """Counts the steps of one process's part in a run. `folder` takes the rows."""

    def __init__(self, replica: Replica, folder: RunFolder) -> None:
        self._t, self._folder = replica, folder
        config, self._per_epoch = replica.config.train, replica.batches.steps_per_epoch
        every = config.grad_norms_every or default_every(self._per_epoch)
        self.norms = GradientNorms(replica.model, replica.step, every)
        self.card = CardWatch()
        self._last_tick = time.monotonic()
        self._pending: list[tuple[int, float, int, Tensor]] = []
        self._norms_pending: list[tuple[int, int, Tensor]] = []
        self.begin()

    def begin(self) -> None:
        """With the replica's state: at the start of the process, and after going back."""
        t, state = self._t, self._t.state
        self._sums = torch.tensor([state.loss_sum, state.wrong], dtype=torch.float64, device=t.execution.device)
        self._settled = state.step
        self._pending.clear()
        self._norms_pending.clear()
        self.norms.take()  # of a step that was undone
        damage = self._folder.begin_gradients(self.norms.names, step=state.step)  # ends with the state's step
        if damage is not None:
            t.observer.recorded_warning(self._folder, damage, what="gradient norms lost", reason=damage)
        self.eta = Eta(t.config.train.epochs, self._per_epoch, t.config.train.max_steps)
        self._step_loss: float | None = None
        self._told: Progress | None = None
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """The state's sums are those of the epoch as it begins, or goes on."""
        self._t.meter.reset()
        self.card.begin_epoch()
        self.eta.trained(self._t.state.step, time.monotonic())

    def count(self, totals: Tensor, size: int, lr: float) -> None:
        """A step of `size` pictures is done; waits for nothing. `totals`: as `TrainStep` returns them."""
        state = self._t.state
        self._sums += totals
        state.step += 1
        state.step_in_epoch += 1
        state.seen += size
        if state.step % self._t.config.train.log_every_steps == 0:
            self._pending.append((state.step, lr, size, totals[0]))
        if (norms := self.norms.take()) is not None:
            self._norms_pending.append((state.step, state.epoch + 1, norms))

    def settle(self) -> tuple[list[float], float] | None:
        """Fetches what the steps left on the device: the only place that waits for it, once per `log_every_steps`.
        The logged losses of single steps, and seconds of training, since the last call; None: there was no step."""
        state = self._t.state
        if self._settled == state.step:
            return None
        self._settled = state.step
        if self._t.group.leads:
            self.card.look(self._t.meter.load())  # before waiting for it: at work
        state.loss_sum, state.wrong = self._sums.tolist()
        rows: list[dict[str, Any]] = [
            {"step": step, "epoch": state.epoch + 1, "lr": lr, "loss": float(loss) / size}
            for step, lr, size, loss in self._pending
        ]
        self._pending.clear()
        self._folder.append_steps(rows)
        norms = [(step, epoch, values.tolist()) for step, epoch, values in self._norms_pending]
        self._norms_pending.clear()
        for _, _, values in norms:
            note_share(state, values)
        self._folder.append_gradients(norms)
        seconds = self.tick()
        state.train_seconds += seconds
        self.eta.trained(state.step, self._last_tick)
        losses = [row["loss"] for row in rows]
        self._step_loss = losses[-1] if losses else self._step_loss
        return losses, seconds

    def tick(self) -> float:
        """Counts the seconds since the last call, which it returns, as elapsed: by itself not as training."""
        last, self._last_tick = self._last_tick, time.monotonic()
        self._t.state.elapsed_seconds += self._last_tick - last
        return self._last_tick - last

    @property
    def elapsed_seconds(self) -> float:
        """Of the run until now, by this process's clock."""
        return self._t.state.elapsed_seconds + time.monotonic() - self._last_tick

    def progress(self) -> Progress:
        """Where the run is, once its figures are fetched."""
        t, state, device = self._t, self._t.state, self._t.meter.read()
        self._told = Progress(
            epoch=state.epoch + 1,
            epochs=t.config.train.epochs,
            step_in_epoch=state.step_in_epoch,
            steps_per_epoch=self._per_epoch,
            lr=t.lr(state.step - 1),
            loss=state.loss_sum / max(state.seen, 1),
            error_pct=100 * state.wrong / max(state.seen, 1),
            images_per_second=self._images_per_second(),
            memory_bytes=device.peak_allocated_bytes or device.device_used_bytes,
            seconds_left=self.eta.seconds(state.epoch, state.step),
            step_loss=self._step_loss,
        )
        return self._told

    def position(self, lr: float) -> Progress:
        """The same before a step, with the figures that were fetched last: waits for nothing."""
        epochs, state = self._t.config.train.epochs, self._t.state
        at = self._told or Progress(1, epochs, 0, self._per_epoch, lr, *[None] * 5)
        if at.epoch != state.epoch + 1:  # the means were those of another epoch
            at = replace(at, loss=None, error_pct=None)
        return replace(at, epoch=state.epoch + 1, step_in_epoch=state.step_in_epoch, lr=lr)

    def _images_per_second(self) -> float | None:
        """Of training, in this epoch so far."""
        state = self._t.state
        return state.seen / state.train_seconds if state.train_seconds > 0 else None

    def pace(self) -> dict[str, Any]:
        """Speed and memory, before there is a row of an epoch."""
        device = self._t.meter.read()
        return {
            "step": self._t.state.step,
            "images_per_second": self._images_per_second(),
            "peak_allocated_bytes": device.peak_allocated_bytes,
            "device_used_bytes": device.device_used_bytes,
            **self.card.columns(),
        }

    def row(self, test: Score, val: Score | None) -> dict[str, Any]:
        """Of metrics.csv, for the epoch whose steps are done."""
        state, device = self._t.state, self._t.meter.read()
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": self._t.lr(state.step - 1),
            "train_loss": state.loss_sum / state.seen,
            "train_error_pct": 100 * state.wrong / state.seen,
            "test_loss": test.loss,
            "test_error_pct": test.error_pct,
            "images_per_second": self._images_per_second(),
            "peak_allocated_bytes": device.peak_allocated_bytes,
            "peak_reserved_bytes": device.peak_reserved_bytes,
            "device_used_bytes": device.device_used_bytes,
            "elapsed_seconds": state.elapsed_seconds,
            "val_loss": val.loss if val else None,
            "val_error_pct": val.error_pct if val else None,
            **self.card.columns(),
        }

    def end_epoch(self, row: dict[str, Any]) -> dict[str, WeightsInfo]:
        """The epoch is evaluated and judged: its row is written, the next one begins. What the weights that it ended
        with are exported as, by name, and what they say of themselves."""
        state = self._t.state
        state.epoch += 1
        state.start_epoch()
        self._sums.zero_()
        self._folder.append_metrics(row)
        chosen_on = "test" if row["val_error_pct"] is None else "val"
        error_pct = row[f"{chosen_on}_error_pct"]
        at = {"epoch": state.epoch, "step": state.step, "error_pct": error_pct, "error_on": chosen_on}
        last = describe_weights(self._t.config, self._t.dataset, **at)
        if state.best is not None and not error_pct < state.best.error_pct:
            return {"last": last}
        state.best = Best(state.epoch, state.step, error_pct, chosen_on)
        return {"best": last.model_copy(update={"chosen_on": chosen_on}), "last": last}


def describe_weights(config: Config, dataset: Dataset, **at: Any) -> WeightsInfo:
    """What weights of this run say of themselves; `at`: of which epoch and step, and the error they have there."""
    model = config.model
    if model.spec is None:
        network: dict[str, Any] = model.given | {"shortcuts": model.arch.startswith("res")}
    else:
        network = {"spec": describe(model.spec, {}), "args": model.args}
    at |= {"fit": config.data.fit, "ema": config.optim.ema, "version": lowmem.__version__}
    return WeightsInfo.model_validate({**network, **dataset.describe(), **at})


# -- gradient norms ----------------------------------------------------------------------------------------------------


def default_every(steps_per_epoch: int) -> int:
    """Steps between two records where the settings leave it open: ten an epoch, or every 100 steps if that is more."""
    return min(100, max(1, steps_per_epoch // 10))


def disk_bytes(config: Config, model: nn.Module, steps_per_epoch: int, checkpoint_bytes: int | None = None) -> int:
    """`run_bytes` of a run of `model`. `checkpoint_bytes`: of one that was written (None: of its tensors)."""
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if checkpoint_bytes is None:
        trained_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        kept_bytes = config.optim.copies * trained_bytes
        checkpoint_bytes = kept_bytes + sum(tensor.nbytes for tensor in model.state_dict().values())
    return run_bytes(
        config,
        checkpoint_bytes=checkpoint_bytes,
        parameter_bytes=parameter_bytes,
        steps_per_epoch=steps_per_epoch,
        layers=len(measured_weights(model)),
        norms_every=config.train.grad_norms_every or default_every(steps_per_epoch),
    )


def measured_weights(model: nn.Module) -> dict[str, Tensor]:
    """All trainable convolution and linear weights by name, in the order of the forward pass; without any, all that is
    trained."""
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    found: dict[str, Tensor] = {f"{name}.weight": one.weight for name, one in layers if one.weight.requires_grad}
    return found or {name: one for name, one in model.named_parameters() if one.requires_grad}


class GradientNorms:
    """L2 norms of the gradients of `measured_weights`. Computed on the device after the last backward of a step and
    before its update, so that running out of memory here is undone like any other failure of a step; fetched with the
    other figures of the steps, so that nothing waits.

    They are those of the mean loss over the effective batch: after all micro-batches, and without the scaler's factor.
    Where the scaler found an overflow (fp16; the step is then skipped) they are infinite or no number.
    """

    def __init__(self, model: nn.Module, step: TrainStep, every: int) -> None:
        """Records step 1, whose gradients are those of the initial weights, and every `every`-th step."""
        weights = measured_weights(model)
        self.names, self._weights = tuple(weights), tuple(weights.values())
        self._step, self._every = step, every
        self._latest: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether the `step`-th step (from 1) is recorded."""
        return bool(self.names) and (step == 1 or step % self._every == 0)

    @torch.no_grad()
    def measure(self) -> None:
        """Called between backward and update; allocates, and waits for nothing."""
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._weights]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self._step.scaler.is_enabled():
            # The scale lies on the device and only the scaler knows it: what it makes of one.
            norms = norms / self._step.scaler.scale(torch.ones((), device=norms.device))
        self._latest = norms

    def take(self) -> Tensor | None:
        """The norm of each layer in the latest step, once, on the device; None if it was not measured."""
        latest, self._latest = self._latest, None
        return latest

    def ends(self) -> dict[str, list[str]]:
        """The names of the first layers and of the last ones, whose norms are compared."""
        count = tenth(len(self.names))
        return {"first": list(self.names[:count]), "last": list(self.names[-count:])}


# -- TensorBoard -------------------------------------------------------------------------------------------------------


@contextmanager
def exporting(files: EventFiles, warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """What to call whenever rows have come: brings a run's event files up to date with them (see `runs.event_files`),
    and at the end with the last ones. Nothing of it can stop or change the run: what goes wrong is said once, to
    `warn`, and the tables have everything all the same."""
    warned = False

    def update() -> None:
        nonlocal warned
        try:
            files.update()
        except Exception as error:  # a full disk, or a file that somebody else holds, is no reason to stop a run
            files.close()
            if not warned:
                warned = True
                reason = getattr(error, "strerror", None) or error
                warn(
                    f"{files.folder} cannot be written ({reason}): training goes on, and TensorBoard's curves are made "
                    "up for as soon as it can"
                )

    update()
    try:
        yield update
    finally:
        update()
        files.close()
