"""Accelerate's `find_executable_batch_size`, as its documentation has it: around the whole training function, which
begins again with a tenth less whenever memory runs out in it."""

from __future__ import annotations

import time
from typing import Any

from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn, optim
from torch.nn import functional as F

from benchmarks.peers.budget import Place
from benchmarks.peers.task import Found, Task, Trained, Trials, evaluate, loader, network, sgd, words


class Training:
    """The documentation's training function. `eval_batch` None: as the training's."""

    def __init__(self, task: Task, place: Place, eval_batch: int | None) -> None:
        self._task, self._place, self._eval_batch = task, place, eval_batch
        self._accelerator = Accelerator(cpu=task.device == "cpu")
        self.trials = Trials(place)
        self.attempt_began = 0.0
        self.lr = 0.0
        self.train_peak_bytes: int | None = None
        self.eval_peak_bytes: int | None = None

    def run(self, starting_batch_size: int) -> int:
        """The batch with which it ran through. Raises RuntimeError if none did."""

        @find_executable_batch_size(starting_batch_size=starting_batch_size)
        def inner_training_loop(batch_size: int) -> int:
            self._attempt(batch_size)
            return batch_size

        batch = inner_training_loop()
        self.trials.ended()
        return int(batch)

    def _attempt(self, batch_size: int) -> None:
        task, place, accelerator = self._task, self._place, self._accelerator
        accelerator.free_memory()
        self.attempt_began = time.perf_counter()
        self.trials.began(batch_size)
        net: Any = network(task)
        optimizer: Any = sgd(net, task)
        batches: Any = loader(place, task.pictures, batch_size, shuffle=True)
        eval_batches: Any = loader(place, task.eval_pictures, self._eval_batch or batch_size)
        net, optimizer, batches, eval_batches = accelerator.prepare(net, optimizer, batches, eval_batches)
        net.train()
        for number, batch in zip(range(1, task.steps + 1), batches, strict=False):
            place.phase = f"training step {number}"
            images, labels = place.put(*batch)
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(net(images), labels))
            optimizer.step()
        self.train_peak_bytes = place.peak_bytes
        optimizer.zero_grad()
        place.reset_peak()
        evaluate(net, place, eval_batches)
        self.eval_peak_bytes = place.peak_bytes
        self.lr = optimizer.param_groups[0]["lr"]


def find(task: Task, place: Place) -> Found:
    with place:
        training = Training(task, place, eval_batch=None)
        alive_bytes, began = place.live_bytes, time.perf_counter()
        batch = training.run(task.batch)
        alive_after_bytes = place.live_bytes
    tried = training.trials.done
    tried[-1]["peak_bytes"] = training.train_peak_bytes
    return Found(
        batch=batch,
        lr=training.lr,
        seconds=training.attempt_began - began,
        tried=tried,
        alive_before_bytes=alive_bytes,
        alive_after_bytes=alive_after_bytes,
        goes_on="trains and evaluates",  # the search is the training
    )


def train(task: Task, place: Place, found: Found, eval_batch: int) -> Trained:
    with place:
        training = Training(task, place, eval_batch)
        try:
            batch = training.run(found.batch)
        except Exception as error:
            training.trials.ended()
            tried = [str(one["batch"]) for one in training.trials.done]
            began = f"began {len(tried)} times, with batches from {tried[0]} down to {tried[-1]}"
            return Trained(survived=False, how=f"{began}; {words(error, place)}")
    restarts = len(training.trials.done) - 1
    return Trained(
        survived=True,
        how=f"after {restarts} new beginnings" if restarts else "",
        batch=batch,
        train_peak_bytes=training.train_peak_bytes,
        eval_peak_bytes=training.eval_peak_bytes,
    )


def stepped(task: Task, place: Place, found: Found) -> tuple[nn.Module, optim.Optimizer]:
    net = network(task).to(place.device)
    return net, sgd(net, task)
