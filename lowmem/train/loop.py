"""The loop over steps and epochs: each step, and each end of an epoch, gives the watchers' verdict; one `match` acts.

Of several processes each runs this loop, step by step the same way; rank 0 alone has a folder and a saver. What only
one of them may know (its clock, a signal, its memory) becomes common knowledge before anybody acts on it (`_agree`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lowmem.core.counter_rng import derive_seed
from lowmem.core.errors import Interrupted, PeerLost, Stuck
from lowmem.data import AnyPictures
from lowmem.measure.out_of_memory import Failure
from lowmem.runs.checkpoint_state import RunState
from lowmem.runs.event_files import EventFiles
from lowmem.runs.saver import Save, Saver
from lowmem.runs.store import RunFolder
from lowmem.runs.weights import WeightsInfo
from lowmem.step.train_step import Score
from lowmem.step.undo import Undo
from lowmem.train.loss_watchers import Chance, Divergence, Stall, roll_back, way_out
from lowmem.train.metrics import Metrics, exporting
from lowmem.train.oom_fallback import OomFallback
from lowmem.train.replica import Replica, weights_of
from lowmem.train.schedule import next_low_start
from lowmem.train.signals import StopSignals
from lowmem.train.watchers import (
    HOURS,
    MAX_STEPS,
    PATIENCE,
    STALLED,
    Act,
    CheckpointInterval,
    PlanCheck,
    TimeLimit,
    Verdict,
    is_finished,
    out_of_patience,
    strongest,
)


@dataclass(frozen=True)
class Outcome:
    """The folder of a run and how it ended: finished, or stopped as asked. `why`: the setting that ended it before its
    last epoch. `words`: the last ones that were said of it, by the process that leads."""

    path: Path
    finished: bool
    state: RunState
    why: str = ""
    words: str = ""


class Trainer(Replica):
    """One run in this process. It goes on from `state`, and from the weights that are there; `run` is called once."""

    def run(self, folder: RunFolder) -> Outcome:
        """Trains until the last epoch, or a setting ends it. Raises Interrupted after a signal, with everything saved;
        OutOfMemory, Diverged, Stuck, DiskError, PeerLost."""
        kept, observer = self.config.checkpoint, self.observer
        saver = Saver(folder, keep=kept.keep, keep_every=kept.keep_every, warn=observer.warning, note=observer.note)
        exports: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None)
        if self.config.train.tensorboard and self.group.leads:
            exports = exporting(EventFiles(folder.path), observer.warning)
        joint = self.step.joint
        with StopSignals() as signals, exports as export, saver:
            loop = Loop(self, folder, signals, saver, export)
            if joint is not None:
                joint.verdict = lambda: loop.look(loop.state.step + 1).code
            try:
                with self.group.alike():
                    return loop.train()
            except PeerLost as lost:
                raise loop.left_alone(lost) from None
            finally:
                if joint is not None:
                    joint.verdict = int


class Loop:
    """One call of `Trainer.run`: what lives only as long as this process."""

    def __init__(
        self, replica: Replica, folder: RunFolder, signals: StopSignals, saver: Saver, export: Callable[[], None]
    ) -> None:
        config = replica.config.train
        self.t, self.folder, self.signals, self.saver, self.export = replica, folder, signals, saver, export
        self.exports: dict[str, WeightsInfo] = {}  # weights to be written with the next save
        data = replica.dataset
        chance = Chance.of(data.train.labels, len(data.classes), config.label_smoothing)
        self.stall = Stall(chance, replica.batches.steps_per_epoch, stop=config.on_stuck == "stop")
        self.divergence = Divergence(chance.loss, config.log_every_steps)
        self.memory = OomFallback(replica, folder)
        self.interval = CheckpointInterval(replica.config.checkpoint, saver, replica.state.step)
        self.time = TimeLimit(config.hours, replica.state)
        self.metrics = Metrics(replica, folder)
        self._take_state()

    def _take_state(self) -> None:
        """Begins with the replica's state: at the start, and after going back to a checkpoint."""
        self.state = self.t.state
        self.state.processes = self.t.group.size
        self.saved_at: tuple[int, int] | None = None
        self.undo = Undo(self.t.step, self.t.model)
        self._plan_changed()

    def _plan_changed(self) -> None:
        self._pace_from = self._pace_due = self.state.step
        self.t.meter.reset()  # the peaks of an epoch are those of the plan in force at its end
        self.check = PlanCheck(self.t, self.undo.copies)

    def train(self) -> Outcome:
        """The loop. An epoch whose steps are done is evaluated, also by the process that goes on from there."""
        while self.state.epoch < self.t.config.train.epochs:
            done = self.state.step_in_epoch == self.t.batches.steps_per_epoch
            verdict = self.end_epoch() if done else self.step()
            match verdict.act:
                case Act.SAVE:
                    self._save()
                case Act.REPLAN:  # all take their next smaller plan, and if anybody has one, measure together again
                    if self.t.group.most([int(self.memory.replan(verdict.why))])[0]:
                        self._plan_changed()
                case Act.ROLLBACK:
                    self._roll_back(verdict.why)
                case Act.LEAVE:
                    return self._leave(verdict.why)
        self._finish("done", epoch=self.state.epoch, step=self.state.step)
        return Outcome(self.folder.path, True, self.state)

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def look(self, step: int) -> Verdict:
        """What this process may be the only one to know, after `step` steps."""
        if (signal := self.signals.requested) is not None:
            return Verdict(Act.LEAVE, signal)
        if not self.t.group.leads:
            return self.memory.verdict()
        return strongest(self.memory.verdict(), self.interval.look(step), self.time.look(self.metrics.elapsed_seconds))

    def _agree(self, code: int | None = None) -> Verdict:
        """The strongest verdict of all processes, which they have sent with the step (`code`), or send now."""
        mine = self.look(self.state.step)
        return Verdict.of(self.t.group.most([mine.code])[0] if code is None else code, mine)

    def _unless_broken(self, verdict: Verdict) -> Verdict:
        """`verdict`, unless the loss so far is broken, which all processes see alike."""
        self._settle()
        return strongest(verdict, self.divergence.look(self.state))

    def _over(self) -> str:
        """Why there is no next step, as far as all processes know it; "" if there is one."""
        config, state = self.t.config.train, self.state
        if out_of_patience(config, state):
            return PATIENCE
        if config.max_steps is not None and state.step >= config.max_steps:
            return MAX_STEPS
        return HOURS if self.time.was_over else ""

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self) -> Verdict:
        """Does a step, under smaller plans if it does not fit, and asks the watchers."""
        state, config = self.state, self.t.config.train
        if over := self._over():
            return self._unless_broken(Verdict(Act.LEAVE, over))
        self.interval.hold(state.step)
        lr = self.t.lr(state.step)
        self.t.observer.step(self.metrics.position(lr))
        while isinstance(result := self.undo.attempt(lambda: self._try_step(lr)), Failure):
            if (failure := self.memory.after(result)) is not None:
                self._give_up(failure)
            self._plan_changed()  # and the same step again
        self.metrics.count(*result, lr)
        self.saver.poll()
        self._check_plan()
        epoch_done = state.step_in_epoch == self.t.batches.steps_per_epoch
        logged = epoch_done or state.step % config.log_every_steps == 0
        if logged:
            self._settle()
        joint = self.t.step.joint
        verdict = self._agree(None if joint is None else joint.agreed)
        if epoch_done and (verdict.act is Act.SAVE or verdict.why == HOURS):
            verdict = Verdict()  # after the evaluation
        if logged or verdict.act is not Act.CONTINUE:
            verdict = self._unless_broken(verdict)
        if logged and verdict.act < Act.LEAVE:
            self.t.observer.progress(self.metrics.progress())
            if (throttled := self.metrics.card.throttled()) is not None:
                self.t.observer.recorded_warning(self.folder, throttled)
            self.export()
            if state.step >= self._pace_due:  # for who looks on, before an epoch has its row
                self._pace_due = 2 * state.step - self._pace_from
                self.folder.event("progress", **self.metrics.pace())
        return verdict

    def _try_step(self, lr: float) -> tuple[Tensor, int]:
        state, norms = self.state, self.metrics.norms
        images, labels, size, share = self.t.next_batch(state.epoch, state.step_in_epoch)
        # What the step draws (dropout) is a function of its place, also when it is made again (invariant 3).
        torch.manual_seed(derive_seed(self.t.config.seed, "step", state.step, self.t.group.rank))
        with self.check.around(images, labels):
            look = norms.measure if norms.due(state.step + 1) else None
            return self.t.step(images, labels, lr, look, size, share), size

    def _settle(self) -> None:
        if (settled := self.metrics.settle()) is not None:
            losses, seconds = settled
            self.divergence.logged(self.state, losses)
            self.memory.trained(self.state.step, seconds)

    def _check_plan(self) -> None:
        """Says once what the first steps under a plan took, in all processes."""
        if (peak := self.check.result()) is None:
            return
        everyone = self.t.group.gather({**vars(peak), "within": peak.within})
        others = {} if self.t.group.alone else {"processes": everyone}
        self.folder.event("measured", **vars(peak), **others)
        within = all(theirs["within"] for theirs in everyone)
        (self.t.observer.note if within else self.t.observer.warning)(peak.line(everyone[1:]))

    # -- an epoch ------------------------------------------------------------------------------------------------------

    def end_epoch(self) -> Verdict:
        """Evaluates, saves, and asks the watchers of whole epochs."""
        state, t, eta = self.state, self.t, self.metrics.eta
        self.saver.wait()
        if t.group.share(self.interval.due_before(eta.evaluation_seconds)):
            self._save()  # the evaluation would be lost beyond the interval; a resume begins with it
        self.interval.hold(state.step)
        began = time.monotonic()
        test = self._score(t.dataset.test)
        val = self._score(t.dataset.val) if t.dataset.val is not None and isinstance(test, Score) else None
        self.metrics.tick()
        if isinstance(test, Verdict):
            return test  # the state is that of the last step: a resume begins with this evaluation
        if isinstance(val, Verdict):
            return val
        eta.evaluated(time.monotonic() - began)
        broken = self.divergence.look_at_evaluation(test.loss, t.model.state_dict().values())
        if broken.act is Act.ROLLBACK:
            return broken
        row = self.metrics.row(test, val)
        t.keep_alike(self.folder)
        # Of several processes all judge by what rank 0 has measured.
        state.share_log_sum, state.share_count, state.gradient_share = t.group.share(
            [state.share_log_sum, state.share_count, state.gradient_share]
        )
        error_pct = row["train_error_pct"]
        stalled = self.stall.look(state, epoch=row["epoch"], loss=row["train_loss"], error_pct=error_pct)
        state.low_start = next_low_start(t.config, state.low_start, error_pct)
        self.exports |= self.metrics.end_epoch(row)
        self._save()
        t.observer.epoch(row, t.config.train.epochs)
        self.export()
        self.metrics.begin_epoch()
        verdict = Verdict() if is_finished(t.config.train, state) else strongest(stalled, self._agree())
        if (evidence := self.stall.evidence) is not None and self.stall.is_new and verdict.why != STALLED:
            self.folder.event("stuck", **vars(evidence), layers=self.metrics.norms.ends(), stopped=False)
            instead = f"{way_out(t.config.model)}, or end such runs with --on-stuck stop"
            t.observer.warning(f"{evidence.words}: {instead}")
        return verdict

    def _leaves_evaluation(self, total: int, done: int) -> bool:
        """Asked between two of its batches, where saves that the disk has refused are tried again, too."""
        self.t.observer.phase("evaluating", done, total)
        self.saver.poll()
        return self.signals.came()

    def _score(self, pictures: AnyPictures) -> Score | Verdict:
        """Of all processes together: each scores its part of the pictures. LEAVE if a signal came to any."""
        t, (first, past) = self.t, self.t.split.part(len(pictures))
        part = pictures.part(first, past)
        leaves = partial(self._leaves_evaluation, len(part))
        mine = self.memory.evaluated(lambda size: t.evaluate(part, size, leaves))
        failed = [mine.message, mine.asked_bytes] if isinstance(mine, Failure) else None
        sums = [mine.loss_sum, mine.wrong, mine.count] if isinstance(mine, Score) else None
        everyone = t.group.gather([failed, sums, self.look(self.state.step).code])
        for rank, (failure, _, _) in enumerate(everyone):
            if failure is not None:
                phase = "evaluation" if t.group.alone else f"evaluation of process {rank}"
                self._give_up(Failure(phase, failure[0], failure[1], peer=rank != t.group.rank))
        if any(theirs is None for _, theirs, _ in everyone):
            return Verdict.of(max(code for _, _, code in everyone), self.look(self.state.step))
        loss, wrong, count = (sum(theirs[index] for _, theirs, _ in everyone) for index in range(3))
        return Score(loss, wrong, count)

    # -- acts ----------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Hands over what the run is now, whose loss is sound; `_finish` waits until it is on disk."""
        position = (self.state.epoch, self.state.step)
        if self.saved_at == position:
            return
        self._settle()
        if self.t.group.leads:
            self.saver.wait()
            taken = self.memory.saved(self.t.checkpoint)
            weights = {name: (weights_of(taken), info) for name, info in self.exports.items()}
            self.saver.submit(Save(taken, self.state.epoch, weights))
        self.exports.clear()
        self.saved_at = position
        self.interval.submitted(self.state.step)
        self.metrics.tick()

    def _roll_back(self, why: str) -> None:
        """From a loss that broke to the last sound checkpoint. Raises Diverged if that is not to be."""
        self.saver.drop()
        self.exports.clear()  # of what is undone
        roll_back(self.t, self.folder, why)
        self.metrics.begin()
        self._take_state()
        self._save()  # with the rate that it goes on with: killed here, a resume does the same

    def _leave(self, why: str) -> Outcome:
        """With everything saved. Raises Interrupted after a signal, Stuck."""
        state, run = self.state, self.folder.path
        if why == STALLED:
            evidence = self.stall.evidence
            assert evidence is not None
            self._finish("stuck", **vars(evidence), layers=self.metrics.norms.ends(), stopped=True)
            instead = f"{way_out(self.t.config.model)}, or go on with `lowmem resume {run} --on-stuck warn`"
            raise Stuck(f"{evidence.words}; stopped as asked, saved at epoch {state.epoch}: {instead}")
        if why == PATIENCE:
            assert state.best is not None
            self._finish("done", epoch=state.epoch, step=state.step, reason=why, best_epoch=state.best.epoch)
            return Outcome(run, True, state, why)
        if why in (MAX_STEPS, HOURS):
            self._save()
            self._finish("stop", reason=why, step=state.step)
            return Outcome(run, False, state, why)
        name = self.signals.requested = self.signals.requested or why
        self._save()
        self._finish("signal", signal=name, epoch=state.epoch, step=state.step)
        saved = f"saved at epoch {state.epoch + 1}, step {state.step}; go on with `lowmem resume {run}`"
        raise Interrupted(f"{name}: {saved}", self.signals.exit_code)

    def _finish(self, last_event: str | None = None, **fields: object) -> None:
        """Until everything is on disk, and then a run's last words. Nobody leaves before that: a process that ends
        takes the others down. Raises DiskError."""
        self.t.observer.phase("saving")
        self.saver.finish(self.signals.came)
        if last_event is not None:
            self.folder.event(last_event, **fields)
            self.saver.finish(self.signals.came)
        self.t.group.most([0])

    def _give_up(self, failure: Failure) -> NoReturn:
        """The end of the ladder. What failed is undone: the run is saved as it was before it."""
        if failure.final:
            error = self.memory.at_the_end(failure)
            self.saver.finish(self.signals.came)
            raise error if self.t.group.leads else RuntimeError(str(error))  # of this process alone
        if (broken := self._unless_broken(Verdict())).act is Act.ROLLBACK:
            self._roll_back(broken.why)
        self._save()
        error = self.memory.at_the_end(failure)
        self._finish()
        raise error

    def left_alone(self, lost: PeerLost) -> PeerLost:
        """Another process is gone. What failed with it is undone: whoever writes the run saves it as it is."""
        stands, state = "the last checkpoint stands", self.state
        saves = self.t.group.leads and self.t.execution.device == "cpu"
        with suppress(PeerLost):
            if saves and self._unless_broken(Verdict()).act is not Act.ROLLBACK:
                self._save()
                self.folder.event("peer-lost", what=str(lost), epoch=state.epoch, step=state.step)
                self.saver.finish(lambda: True)
                stands = f"saved at epoch {state.epoch + 1}, step {state.step}"
        words = f"{lost}; {stands}: `lowmem resume {self.folder.path}` goes on from there"
        return PeerLost(words, dismissed=self.signals.came())
