"""What a run is watched for while it goes on: gradient norms, learning nothing, a loss that breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lowmem.core.errors import Stuck
from lowmem.runs.store import RunFolder
from lowmem.train import stall as stuck
from lowmem.train.divergence import Recovery
from lowmem.train.gradients import GradientNorms, default_every

if TYPE_CHECKING:
    from lowmem.train.loop import Trainer


class Watch:
    """Told of steps and epochs by the loop. Changes nothing that is computed, but by `recovery.back`."""

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self._t = trainer
        self._folder = folder
        self._per_epoch = trainer.batches.steps_per_epoch
        every = trainer.config.train.grad_norms_every or default_every(self._per_epoch)
        self._norms = GradientNorms(trainer.model, trainer.step, every)
        self.chance = stuck.Chance.of(trainer.dataset.train.labels)
        self.recovery = Recovery(trainer, folder, self.chance.loss)
        self._found: stuck.Evidence | None = None
        self._tell = False  # the evidence is new
        self.begin()

    def begin(self) -> None:
        """At the start of the process and after going back: gradients.csv ends with the state's step."""
        self._norms.forget()
        damage = self._folder.begin_gradients(self._norms.names, step=self._t.state.step)
        if damage is not None:
            self._t.observer.warning(damage)
            self._folder.event("warning", what="gradient norms lost", reason=damage)

    def look(self) -> Callable[[], None] | None:
        """What the coming step is to do with its gradients."""
        return self._norms.measure if self._norms.due(self._t.state.step + 1) else None

    def stepped(self) -> None:
        """A step is done and counted."""
        self._norms.keep(self._t.state.step, self._t.state.epoch + 1)

    def settle(self, losses: Iterable[float]) -> None:
        """Fetches the norms that lie on the device, and writes them down. `losses`: of the steps logged since."""
        self.recovery.logged(losses)
        rows = self._norms.fetch()
        for _, _, norms in rows:
            stuck.note_share(self._t.state, norms)
        self._folder.append_gradients(rows)

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Counts a whole epoch in (its row of metrics.csv), before the state's sums are cleared."""
        state = self._t.state
        # Of several processes all judge by what rank 0 has measured.
        state.share_log_sum, state.share_count, state.gradient_share = self._t.group.share(
            [state.share_log_sum, state.share_count, state.gradient_share]
        )
        self._found = stuck.end_epoch(
            state,
            self.chance,
            epoch=row["epoch"],
            loss=row["train_loss"],
            error_pct=row["train_error_pct"],
            steps_per_epoch=self._per_epoch,
        )
        self._tell = self._found is not None and not state.told_stuck
        state.told_stuck = self._found is not None

    def tell_stuck(self, finish: Callable[[], None]) -> None:
        """Says what the last epoch showed, once. Raises Stuck if the run is to stop for it, after `finish`, which waits
        until all is on disk and raises DiskError if that cannot be."""
        found, state, config = self._found, self._t.state, self._t.config.train
        if found is None:
            return
        stop = config.on_stuck == "stop" and state.epoch < config.epochs
        if stop:
            finish()
        if self._tell or stop:
            self._folder.event("stuck", **found.fields, layers=self._ends(), stopped=stop)
        if stop:
            finish()
            raise Stuck(
                f"{found.words}; stopped as asked, saved at epoch {state.epoch}: {self._way_out()}, or go on with "
                f"`lowmem resume {self._folder.path} --on-stuck warn`"
            )
        if self._tell:
            self._t.observer.warning(f"{found.words}: {self._way_out()}, or end such runs with --on-stuck stop")

    def _ends(self) -> dict[str, list[str]]:
        names, count = self._norms.names, stuck.ends(len(self._norms.names))
        return {"first": list(names[:count]), "last": list(names[-count:])}

    def _way_out(self) -> str:
        arch = self._t.config.model.arch
        if arch.startswith("cnn"):
            return f"train the net with shortcuts (--arch res{arch[3:]}) or one of fewer layers"
        return "try another learning rate (--set optim.lr=...) or another seed"
