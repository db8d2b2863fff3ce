"""No library at all: `torch.utils.checkpoint` around every block, and the batch doubled from 32 until a few steps no
longer run, as a careful script does it (out of the handler before the next try, momentum there from the first step)."""

from __future__ import annotations

import gc
import time

import torch
from torch import nn, optim

from benchmarks.peers.budget import Place
from benchmarks.peers.task import (
    TRIAL_STEPS,
    Found,
    Task,
    Trained,
    Trials,
    loader,
    network,
    out_of_memory,
    sgd,
    train_and_evaluate,
    train_steps,
    words,
)
from lowmem.trial import checkpointed

_FIRST = 32


def stepped(task: Task, place: Place, found: Found | None = None) -> tuple[nn.Module, optim.Optimizer]:
    net = checkpointed(network(task)).to(place.device)
    return net, sgd(net, task)


def runs(task: Task, place: Place, batch: int) -> bool:
    """Whether a few steps do, with a new network."""
    try:
        net, optimizer = stepped(task, place)
        train_steps(net, optimizer, place, loader(place, task.pictures, batch, shuffle=True), TRIAL_STEPS)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def find(task: Task, place: Place) -> Found:
    with place:
        trials, alive_bytes = Trials(place), place.live_bytes
        batch, began = _FIRST, time.perf_counter()
        while batch <= task.pictures:
            trials.began(batch)
            if not runs(task, place, batch):
                break
            batch *= 2
        trials.ended()
        release()
        seconds = time.perf_counter() - began
        if batch == _FIRST:
            raise RuntimeError(f"no steps at batch {_FIRST}, the smallest that is tried")
        return Found(
            batch=batch // 2,
            lr=task.lr,
            seconds=seconds,
            tried=trials.done,
            alive_before_bytes=alive_bytes,
            alive_after_bytes=place.live_bytes,
        )


def train(task: Task, place: Place, found: Found, eval_batch: int) -> Trained:
    with place:
        net, optimizer = stepped(task, place)
        try:
            return train_and_evaluate(net, optimizer, task, place, found.batch, eval_batch)
        except Exception as error:
            return Trained(survived=False, how=words(error, place))


def release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
