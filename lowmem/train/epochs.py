"""The loop: epochs, evaluation, rows, checkpoints, signals. It is handed everything and decides nothing.

Of several processes each runs this loop, step by step the same way; rank 0 alone has a folder and a saver. What only
one of them may know (its clock, a signal, its memory) becomes common knowledge before anybody acts on it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lowmem.core.errors import Interrupted, PeerLost
from lowmem.data import Pictures, eval_batches
from lowmem.measure.out_of_memory import Failure
from lowmem.runs.checkpoint_state import Best, RunState
from lowmem.runs.saver import Save, Saver
from lowmem.runs.store import RunFolder
from lowmem.step.data_parallel import StepRequest
from lowmem.step.evaluate import Score, Sums, evaluate
from lowmem.step.undo import Undo
from lowmem.train.check import PlanCheck
from lowmem.train.checkpoint_interval import SaveInterval
from lowmem.train.eta import TimeLeft
from lowmem.train.observer import Progress
from lowmem.train.oom_fallback import Descent
from lowmem.train.schedule import learning_rate, next_low_start
from lowmem.train.signals import NAMES, StopSignals
from lowmem.train.watch import Watch

if TYPE_CHECKING:
    from lowmem.train.loop import Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, or stopped early by train.max_steps."""

    finished: bool
    state: RunState


class Loop:
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
        if trainer.step.joint is not None:
            trainer.step.joint.ask = self._asked

    def _take_state(self) -> None:
        """Begins with the trainer's state: at the start, and after going back to a checkpoint."""
        t = self.t
        self.state = t.state
        self.state.processes = t.group.size
        sums = [self.state.loss_sum, self.state.wrong]
        self.sums = torch.tensor(sums, dtype=torch.float64, device=t.execution.device)
        self.undo = Undo(t.step, t.model)
        self.pending: list[tuple[int, float, int, Tensor]] = []
        self.saved_at: tuple[int, int] | None = None
        self._plan_changed()

    def run(self) -> Outcome:
        """Trains to the end. Raises Interrupted after a signal, with everything saved; PeerLost."""
        try:
            with self.t.group.alike():
                return self._train()
        except PeerLost as lost:
            self._left_alone(lost)

    def _train(self) -> Outcome:
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
                self._give_up(self.descent.cause(done))
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
        images, labels, size = t.next_batch(state.epoch, state.step_in_epoch)
        with self.check.around(images, labels):
            return t.step(images, labels, lr, self.watch.look(), size), size

    def _asked(self) -> StepRequest:
        """What this process brings into a step of several."""
        name, leads = self.signals.requested, self.t.group.leads
        stop = 0 if name is None else 1 + NAMES.index(name)
        return StepRequest(stop, leads and self.interval.due(self.state.step + 1), self.descent.asks)

    def _stop_agreed(self) -> bool:
        """Whether to leave after this step. What one process heard all know by then."""
        joint = self.t.step.joint
        if joint is not None:
            return self._heard(joint.agreed.stop)
        return self.signals.requested is not None

    def _heard(self, stop: int) -> bool:
        if stop:
            self.signals.requested = self.signals.requested or NAMES[stop - 1]
        return stop > 0

    def _plan_changed(self) -> None:
        t = self.t
        t.meter.reset()  # the peaks of an epoch are those of the plan in force at its end
        self.check = PlanCheck(t.plan, t.model, t.optimizer, t.execution.device, self.undo.copies, t.meter.read)

    def _after_step(self) -> None:
        state, config = self.state, self.t.config
        self.saver.poll()
        if (found := self.check.finding()) is not None:
            everyone = self.t.group.gather({**found.fields, "within": found.within})
            others = {} if self.t.group.alone else {"processes": everyone}
            self.folder.event("measured", **found.fields, **others)
            within = all(one["within"] for one in everyone)
            (self.t.observer.note if within else self.t.observer.warning)(found.words_with(everyone[1:]))
        if state.step % config.train.log_every_steps == 0 or state.step_in_epoch == self.per_epoch:
            self._settle()
            if (wrong := self.watch.recovery.wrong()) is not None:
                self._go_back(wrong)
                return
            if self.t.group.alone and self.descent.under_pressure():
                self._plan_changed()
        joint = self.t.step.joint
        if joint is not None and joint.agreed.short:
            self.descent.under_pressure()
            self._plan_changed()  # in all processes, also where there was no smaller plan: they measure together
        if self._stop_agreed():
            self._leave()
        if state.step % config.train.log_every_steps == 0 or state.step_in_epoch == self.per_epoch:
            self._tell()
        due = self.interval.due(state.step) if joint is None else joint.agreed.save
        if state.step_in_epoch < self.per_epoch and due:
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
        if t.group.share(self.interval.due_before(self.time_left.evaluation_seconds)):
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
        t.keep_alike(self.folder)
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
        self.watch.tell_stuck(self._finish)
        if self._heard(t.group.most([self._asked().stop])[0]) and state.epoch < t.config.train.epochs:
            self._leave()

    def _score(self, pictures: Pictures) -> Score:
        """Of all processes together: each scores its part of the pictures."""
        t, place = self.t, (self.t.execution.device, self.t.execution.torch_memory_format)
        part = t.part_of(pictures)

        def summed(size: int) -> Sums | None:
            batches = eval_batches(part, size, t.dataset.mean, t.dataset.std, *place)
            return evaluate(t.model, batches, t.execution, lambda: self.signals.requested is not None)

        mine = self.descent.evaluated(summed)
        if isinstance(mine, Failure) and t.group.alone:
            self._give_up(mine)
        failed = mine.message if isinstance(mine, Failure) else None
        sums = [mine.loss, mine.wrong, mine.count] if isinstance(mine, Sums) else None
        everyone = t.group.gather([failed, sums, self._asked().stop])
        for rank, (words, _, _) in enumerate(everyone):
            if words is not None:
                self._give_up(Failure(f"evaluation of process {rank}", words, peer=rank != t.group.rank))
        if any(one is None for _, one, _ in everyone):
            # The state is still that of the last step: a resume begins with this evaluation.
            self._heard(max(stop for _, _, stop in everyone))
            self._off_the_clock()
            self._leave()
        loss, wrong, count = (sum(one[place] for _, one, _ in everyone) for place in range(3))
        return Sums(loss, wrong, count).score()

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
        if self.t.group.leads:
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
        self._finish()

    def _finish(self) -> None:
        """Until everything is on disk. Nobody leaves before that: a process that ends takes the others down."""
        self.saver.finish(self.hurried)
        self.t.group.most([0])

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
        if failure.final:
            self.saver.finish(self.hurried)
            if not self.t.group.leads:
                raise RuntimeError(str(error))  # of this process alone
        else:
            self._finish()
        raise error

    def _left_alone(self, lost: PeerLost) -> NoReturn:
        """Another process is gone. What failed with it is undone: whoever writes the run saves it as it is."""
        stands = "the last checkpoint stands"
        if self.t.group.leads and self.t.execution.device == "cpu":
            with suppress(PeerLost):
                self._save()
                self.folder.event("peer-lost", what=str(lost), epoch=self.state.epoch, step=self.state.step)
                self.saver.finish(lambda: True)
                stands = f"saved at epoch {self.state.epoch + 1}, step {self.state.step}"
        words = f"{lost}; {stands}: `lowmem resume {self.folder.path}` goes on from there"
        raise PeerLost(words, dismissed=self.signals.requested is not None) from None

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
