"""Lightning's `BatchSizeFinder`, as its documentation has it: a callback of the trainer that then trains on."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.peers.budget import Place
from benchmarks.peers.task import Found, Task, Trained, Trials, loader, network, sgd, snapshot, unchanged, words

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Module(pl.LightningModule):
    """The task. The finder sets `batch_size`; evaluation follows it unless `eval_batch` is given."""

    def __init__(self, task: Task, place: Place, batch_size: int, eval_batch: int | None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.net = network(task)
        self.train_peak_bytes: int | None = None
        self.trials: Trials | None = None
        self._task, self._place, self._eval_batch = task, place, eval_batch

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self._place, self._task.pictures, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(self._place, self._task.eval_pictures, self._eval_batch or self.batch_size)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return self._place.put(*batch)

    def configure_optimizers(self) -> optim.Optimizer:
        return sgd(self.net, self._task)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trials is not None and batch_idx == 0:
            self.trials.began(self.batch_size)
        self._place.phase = f"training step {batch_idx + 1}"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def on_validation_start(self) -> None:
        checking = self.trainer.sanity_checking
        self._place.phase = "evaluation" + (", Lightning's check before the first step" if checking else "")
        if not checking:
            self.train_peak_bytes = self._place.peak_bytes
            self._place.reset_peak()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("right", (self.net(images).argmax(1) == labels).float().mean(), on_epoch=True)


class Watched(BatchSizeFinder):
    """The finder, and what it came to."""

    found: Found | None = None

    def scale_batch_size(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Module)
        place = pl_module._place
        trials = pl_module.trials = Trials(place)
        weights, alive_bytes = snapshot(pl_module.net, place), place.live_bytes
        began = time.perf_counter()
        super().scale_batch_size(trainer, pl_module)
        seconds = time.perf_counter() - began
        trials.ended()
        pl_module.trials = None
        assert self.optimal_batch_size is not None
        self.found = Found(
            batch=self.optimal_batch_size,
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            seconds=seconds,
            tried=trials.done,
            alive_before_bytes=alive_bytes,
            alive_after_bytes=place.live_bytes,
            weights_kept=unchanged(pl_module.net, weights, place),
        )


def trainer(task: Task, folder: str, *callbacks: pl.Callback) -> pl.Trainer:
    """Writes nothing, and checks evaluation before the first step, which is its default."""
    return pl.Trainer(
        accelerator="gpu" if task.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=task.steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def find(task: Task, place: Place, mode: str = "power") -> Found:
    finder = Watched(mode=mode)
    with tempfile.TemporaryDirectory() as folder, place:
        module = Module(task, place, batch_size=2, eval_batch=None)
        died = None
        try:
            trainer(task, folder, finder).fit(module)
        except Exception as error:
            if finder.found is None:
                raise
            died = words(error, place)
    assert finder.found is not None
    finder.found.goes_on = died or "trains and evaluates"
    return finder.found


def train(task: Task, place: Place, found: Found, eval_batch: int) -> Trained:
    with tempfile.TemporaryDirectory() as folder, place:
        module = Module(task, place, found.batch, eval_batch)
        place.reset_peak()
        try:
            trainer(task, folder).fit(module)
        except Exception as error:
            return Trained(survived=False, how=words(error, place), train_peak_bytes=module.train_peak_bytes)
        return Trained(
            survived=True,
            batch=module.batch_size,
            train_peak_bytes=module.train_peak_bytes,
            eval_peak_bytes=place.peak_bytes,
        )


def stepped(task: Task, place: Place, found: Found) -> tuple[nn.Module, optim.Optimizer]:
    net = network(task).to(place.device)
    return net, sgd(net, task)
