"""The loop: epochs, evaluation, rows, checkpoints, signals. It is handed everything and decides nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowmem.config import Config
from lowmem.data import Dataset, Pictures, TrainBatches, eval_batches
from lowmem.errors import Interrupted
from lowmem.measure import Meter
from lowmem.plan.record import Plan
from lowmem.remat import apply_plan
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.saver import Save, Saver
from lowmem.runs.store import RunFolder
from lowmem.train.check import PlanCheck
from lowmem.train.descent import Descent
from lowmem.train.evaluate import Score, evaluate
from lowmem.train.interval import SaveInterval
from lowmem.train.observer import Observer, Progress
from lowmem.train.schedule import learning_rate, next_low_start
from lowmem.train.signals import StopSignals
from lowmem.train.state import Best, RunState, capture
from lowmem.train.step import Execution, TrainStep, make_optimizer, make_scaler
from lowmem.train.survive import Failure, Undo
from lowmem.train.timeleft import TimeLeft
from lowmem.train.watch import Watch


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, or stopped early by train.max_steps."""

    finished: bool
    state: RunState


class Trainer:
    """One run in this process. `restore` may be called before `run`; `run` may be called once."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        dataset: Dataset,
        execution: Execution,
        identity: dict[str, str],
        observer: Observer,
        plan: Plan | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.execution = execution
        self.identity = identity
        self.observer = observer
        self.dataset = dataset
        self.model = model.to(device=execution.device, memory_format=execution.torch_memory_format)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = make_optimizer(self.model, config.optim, execution.device)
        # Shares every parameter and buffer with the model, which evaluation runs as it is: without gradients there is
        # nothing to keep.
        self.planned = None if plan is None else apply_plan(self.model, plan)
        micro_batch = config.train.micro_batch if plan is None else plan.micro_batch
        run = self.planned or self.model
        self.step = TrainStep(run, self.optimizer, make_scaler(execution), execution, micro_batch)
        self.batches = TrainBatches(
            dataset.train,
            seed=config.seed,
            batch=config.train.batch,
            augment=config.data.augment,
            mean=dataset.mean,
            std=dataset.std,
            device=execution.device,
        )
        self.state = RunState()
        self.meter = Meter(execution.device)

    def take(self, plan: Plan) -> None:
        """Goes on under another plan that computes the same (the ladder's: same micro-batch, precision, format)."""
        assert self.planned is not None
        self.planned.set_schedule(plan.schedule)
        self.plan = plan

    def checkpoint(self) -> checkpoints.Checkpoint:
        """The run as it is now, on the CPU."""
        return capture(self.state, self.model, self.optimizer, self.step.scaler, self.identity)

    def run(self, folder: RunFolder) -> Outcome:
        """Trains until the last epoch or train.max_steps. Raises Interrupted after a signal, with everything saved."""
        kept, told = self.config.checkpoint, self.observer
        saver = Saver(folder, keep=kept.keep, keep_every=kept.keep_every, warn=told.warning, note=told.note)
        with StopSignals() as signals, saver:
            return _Loop(self, folder, signals, saver).run()


class _Loop:
    """One call of `Trainer.run`: what lives only as long as this process."""

    def __init__(self, trainer: Trainer, folder: RunFolder, signals: StopSignals, saver: Saver) -> None:
        self.t = trainer
        self.folder = folder
        self.signals = signals
        self.saver = saver
        self.exports: dict[str, dict[str, str]] = {}  # weights to be written with the next save: name -> metadata
        self.state = trainer.state
        self.per_epoch = trainer.batches.steps_per_epoch
        self.descent = Descent(trainer, folder)
        self.watch = Watch(trainer, folder)
        self._take_state()
        self.interval = SaveInterval(trainer.config.checkpoint, saver)
        self.last_tick = time.monotonic()
        self.time_left = TimeLeft(trainer.config.train.epochs, self.per_epoch)

    def _take_state(self) -> None:
        """Begins with the trainer's state: at the start, and after going back to a checkpoint."""
        t = self.t
        self.state = t.state
        sums = [self.state.loss_sum, self.state.wrong]
        self.sums = torch.tensor(sums, dtype=torch.float64, device=t.execution.device)
        self.undo = Undo(t.step, t.model)
        self.pending: list[tuple[int, float, int, Tensor]] = []
        self.saved_at: tuple[int, int] | None = None
        self._plan_changed()

    def run(self) -> Outcome:
        config = self.t.config.train
        while self.state.epoch < config.epochs:
            self.t.meter.reset()
            self.time_left.trained(self.state.step, time.monotonic())
            while self.state.step_in_epoch < self.per_epoch:
                if config.max_steps is not None and self.state.step >= config.max_steps:
                    return self._stop_early(config.max_steps)
                self.interval.hold(self.state.step)
                self._one_step()
                self._after_step()
            self._end_epoch()
        self._conclude("done", epoch=self.state.epoch, step=self.state.step)
        return Outcome(True, self.state)

    # -- a step ----------------------------------------------------------------------------------------------------

    def _lr(self, step: int) -> float:
        state = self.state
        return learning_rate(self.t.config, self.per_epoch, step, low_start=state.low_start) * state.lr_scale

    def _one_step(self) -> None:
        state, t = self.state, self.t
        lr = self._lr(state.step)
        while isinstance(done := self.undo.attempt(lambda: self._try_step(lr)), Failure):
            if not self.descent.after(done):
                self._give_up(done)
            self._plan_changed()  # and the same step again
        totals, size = done
        self.sums += totals
        state.step += 1
        state.step_in_epoch += 1
        state.seen += size
        if state.step % t.config.train.log_every_steps == 0:
            self.pending.append((state.step, lr, size, totals[0]))
        self.watch.stepped()

    def _try_step(self, lr: float) -> tuple[Tensor, int]:
        t, state = self.t, self.state
        layout = t.execution.torch_memory_format
        images, labels = t.batches.batch(state.epoch, state.step_in_epoch, memory_format=layout)
        with self.check.around(images, labels):
            return t.step(images, labels, lr, self.watch.look()), labels.shape[0]

    def _plan_changed(self) -> None:
        t = self.t
        t.meter.reset()  # the peaks of an epoch are those of the plan in force at its end
        self.check = PlanCheck(t.plan, t.model, t.optimizer, t.execution.device, self.undo.copies, t.meter.read)

    def _after_step(self) -> None:
        state, config = self.state, self.t.config
        self.saver.poll()
        if (found := self.check.finding()) is not None:
            self.folder.event("measured", **found.fields)
            (self.t.observer.note if found.within else self.t.observer.warning)(found.words)
        if state.step % config.train.log_every_steps == 0 or state.step_in_epoch == self.per_epoch:
            self._settle()
            if (wrong := self.watch.recovery.wrong()) is not None:
                self._go_back(wrong)
                return
            if self.descent.under_pressure():
                self._plan_changed()
        if self.signals.requested is not None:
            self._leave()
        if state.step % config.train.log_every_steps == 0 or state.step_in_epoch == self.per_epoch:
            self._tell()
        if state.step_in_epoch < self.per_epoch and self.interval.due(state.step):
            self._save()

    def _settle(self) -> None:
        """Fetches what the steps left on the device: the only place that waits for it, once per `log_every_steps`."""
        state = self.state
        state.loss_sum, state.wrong = self.sums.tolist()
        rows: list[dict[str, Any]] = [
            {"step": step, "epoch": state.epoch + 1, "lr": lr, "loss": float(loss) / size}
            for step, lr, size, loss in self.pending
        ]
        self.pending.clear()
        self.folder.append_steps(rows)
        self.watch.settle(row["loss"] for row in rows)
        now = time.monotonic()
        self.descent.interval(state.step, now - self.last_tick)
        state.train_seconds += now - self.last_tick
        state.elapsed_seconds += now - self.last_tick
        self.last_tick = now
        self.time_left.trained(state.step, now)

    def _off_the_clock(self) -> None:
        """Counts the time since the last tick as elapsed, but not as training."""
        now = time.monotonic()
        self.state.elapsed_seconds += now - self.last_tick
        self.last_tick = now

    def _tell(self) -> None:
        state, t = self.state, self.t
        snapshot = t.meter.read()
        seen = max(state.seen, 1)
        t.observer.progress(
            Progress(
                epoch=state.epoch + 1,
                epochs=t.config.train.epochs,
                step_in_epoch=state.step_in_epoch,
                steps_per_epoch=self.per_epoch,
                lr=self._lr(state.step - 1),
                loss=state.loss_sum / seen,
                error_pct=100 * state.wrong / seen,
                images_per_second=state.seen / state.train_seconds if state.train_seconds > 0 else None,
                memory_bytes=snapshot.peak_allocated_bytes or snapshot.device_used_bytes,
                seconds_left=self.time_left.seconds(state.epoch, state.step),
            )
        )

    # -- an epoch --------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        state, t = self.state, self.t
        self.saver.wait()
        if self.interval.due_before(self.time_left.evaluation_seconds):
            self._save()  # the evaluation would be lost beyond the interval; a resume begins with it
        self.interval.hold(state.step)
        began = time.monotonic()
        test = self._score(t.dataset.test)
        val = self._score(t.dataset.val) if t.dataset.val is not None else None
        self.time_left.evaluated(time.monotonic() - began)
        self._off_the_clock()
        snapshot = t.meter.read()
        train_error = 100 * state.wrong / state.seen
        if (wrong := self.watch.recovery.wrong_after(test.loss)) is not None:
            self._go_back(wrong)
            return
        row: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": self._lr(state.step - 1),
            "train_loss": state.loss_sum / state.seen,
            "train_error_pct": train_error,
            "test_loss": test.loss,
            "test_error_pct": test.error_pct,
            "images_per_second": state.seen / state.train_seconds if state.train_seconds > 0 else None,
            "peak_allocated_bytes": snapshot.peak_allocated_bytes,
            "peak_reserved_bytes": snapshot.peak_reserved_bytes,
            "device_used_bytes": snapshot.device_used_bytes,
            "elapsed_seconds": state.elapsed_seconds,
            "val_loss": val.loss if val else None,
            "val_error_pct": val.error_pct if val else None,
        }
        self.watch.end_epoch(row)
        state.low_start = next_low_start(t.config, state.low_start, train_error)
        state.epoch += 1
        chosen_on, score = ("val", val) if val else ("test", test)
        self._export(score, chosen_on)
        state.start_epoch()
        self.sums.zero_()
        self.folder.append_metrics(row)
        self._save()
        t.observer.epoch(row, t.config.train.epochs)
        self.watch.tell_stuck(lambda: self.saver.finish(self.hurried))
        if self.signals.requested is not None and state.epoch < t.config.train.epochs:
            self._leave()

    def _score(self, pictures: Pictures) -> Score:
        t, place = self.t, (self.t.execution.device, self.t.execution.torch_memory_format)

        def scored(size: int) -> Score | None:
            batches = eval_batches(pictures, size, t.dataset.mean, t.dataset.std, *place)
            return evaluate(t.model, batches, t.execution, lambda: self.signals.requested is not None)

        score = self.descent.evaluated(scored)
        if isinstance(score, Failure):
            self._give_up(score)
        if score is None:
            # The state is still that of the last step: a resume begins with this evaluation.
            self._off_the_clock()
            self._leave()
        assert score is not None
        return score

    def _export(self, score: Score, chosen_on: str) -> None:
        state = self.state
        metadata = {"arch": self.t.config.model.arch, "epoch": str(state.epoch), "step": str(state.step)}
        metadata |= {"error_pct": repr(score.error_pct), "error_on": chosen_on}
        if state.best is None or score.error_pct < state.best.error_pct:
            state.best = Best(state.epoch, state.step, score.error_pct, chosen_on)
            self.exports["best"] = {**metadata, "chosen_on": chosen_on}
        self.exports["last"] = metadata

    # -- saving and leaving ----------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Hands over what the run is now; `_conclude` waits until it is on disk."""
        position = (self.state.epoch, self.state.step)
        if self.saved_at == position:
            return
        if self.pending or self.state.step_in_epoch:
            self._settle()
        if (wrong := self.watch.recovery.wrong()) is not None:
            self._go_back(wrong)
            return
        self.saver.wait()
        taken = self.descent.saved(self.t.checkpoint)
        weights = {name: (taken.model, metadata) for name, metadata in self.exports.items()}
        self.saver.submit(Save(taken, self.state.epoch, weights))
        self.exports.clear()
        self.saved_at = position
        self.interval.submitted()
        self._off_the_clock()

    def _conclude(self, event: str, **fields: Any) -> None:
        """The last words of a run, once everything before them is on disk. Raises DiskError if it cannot be."""
        self.saver.finish(self.hurried)
        self.folder.event(event, **fields)
        self.saver.finish(self.hurried)

    def hurried(self) -> bool:
        """Whether somebody waits for this process to leave."""
        return self.signals.requested is not None

    def _go_back(self, wrong: str) -> None:
        """From a loss that broke to the last sound checkpoint. Raises Diverged if that is not to be."""
        self.saver.drop()
        self.exports.clear()  # of what is undone
        self.watch.recovery.back(wrong)
        self._take_state()
        self.watch.begin()
        self.time_left = TimeLeft(self.t.config.train.epochs, self.per_epoch)
        self._save()  # with the rate that it goes on with: killed here, a resume does the same

    def _give_up(self, failure: Failure) -> NoReturn:
        """The end of the ladder. What failed is undone: the run is saved as it was before it."""
        if not failure.final:
            self._save()
        error = self.descent.at_the_end(failure)
        self.saver.finish(self.hurried)
        raise error

    def _leave(self) -> None:
        name = self.signals.requested
        self._save()
        self._conclude("signal", signal=name, epoch=self.state.epoch, step=self.state.step)
        raise Interrupted(
            f"{name}: saved at epoch {self.state.epoch + 1}, step {self.state.step}; go on with "
            f"`lowmem resume {self.folder.path}`",
            self.signals.exit_code,
        )

    def _stop_early(self, max_steps: int) -> Outcome:
        self._save()
        self._conclude("stop", reason="train.max_steps", step=self.state.step)
        self.t.observer.note(f"stopped after {self.state.step} steps as asked (train.max_steps = {max_steps})")
        return Outcome(False, self.state)
