"""timm's own ResNet with `set_grad_checkpointing()`, and the batch by `timm.utils.decay_batch`, as timm's benchmark
script searches it: from 256 down in its steps until it runs.

timm has no CIFAR form of the network, so its stem is replaced as users of its ResNets do (3x3, no pooling). Given
lowmem's parameters it gives lowmem's logits, which is checked before anything is searched.
"""

from __future__ import annotations

import time

import torch
from timm.models import resnet
from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step
from torch import Tensor, nn, optim

from benchmarks.peers.budget import Place
from benchmarks.peers.doubling import release
from benchmarks.peers.task import (
    CLASSES,
    TRIAL_STEPS,
    Found,
    Impossible,
    Task,
    Trained,
    Trials,
    loader,
    network,
    sgd,
    train_and_evaluate,
    train_steps,
    words,
)
from lowmem.models import layout

_FIRST = 256  # what timm's benchmark script begins with unless it is told


def timm_network(task: Task) -> resnet.ResNet:
    """The same layers, with lowmem's initial weights. Raises Impossible for plain nets and odd widths."""
    if task.arch.startswith("cnn"):
        raise Impossible("timm's ResNet has no form without shortcuts")
    if task.width % 2:
        raise Impossible("timm's deep stem, by which the first width is chosen, is two equal halves")
    net = resnet.ResNet(
        block=resnet.Bottleneck if task.block == "bottleneck" else resnet.BasicBlock,
        layers=layout(task.arch, task.block),
        num_classes=CLASSES,
        stem_type="deep",
        stem_width=task.width // 2,
        channels=tuple(task.width * 2**stage for stage in range(4)),
        # timm's base_width is that of a network whose first stage has 64 planes: the ratio is 1 here too.
        base_width=64,
    )
    net.conv1 = nn.Conv2d(3, task.width, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.load_state_dict({timm_name(name): value for name, value in network(task).state_dict().items()})
    return net


def timm_name(name: str) -> str:
    return name.replace("shortcut", "downsample").replace("linear", "fc")


@torch.no_grad()
def difference(task: Task) -> float:
    """The largest between timm's logits and lowmem's in training mode, relative to the largest logit."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours: Tensor = network(task).train()(images)
    theirs: Tensor = timm_network(task).train()(images)
    return float((ours - theirs).abs().max() / ours.abs().max())


def stepped(task: Task, place: Place, found: Found | None = None) -> tuple[nn.Module, optim.Optimizer]:
    net = timm_network(task).to(place.device)
    net.set_grad_checkpointing()
    return net, sgd(net, task)


def find(task: Task, place: Place) -> Found:
    off = difference(task)
    if off > 1e-4:
        raise Impossible(f"timm's network is another one: its logits differ by {off:.1e} of the largest")
    with place:
        trials, alive_bytes, began = Trials(place), place.live_bytes, time.perf_counter()
        batch = _FIRST
        while batch:
            trials.began(batch)
            if not (died := _dies(task, place, batch)):
                break
            if not check_batch_size_retry(died):
                raise RuntimeError(died)
            batch = decay_batch_step(batch)
            release()
        trials.ended()
        release()
        seconds = time.perf_counter() - began
        if not batch:
            raise RuntimeError("no batch ran, down to 1")
        note = f"the same function as lowmem's network: logits differ by {off:.0e} of the largest"
        return Found(
            batch=batch,
            lr=task.lr,
            seconds=seconds,
            tried=trials.done,
            alive_before_bytes=alive_bytes,
            alive_after_bytes=place.live_bytes,
            notes=[note],
        )


def _dies(task: Task, place: Place, batch: int) -> str:
    """The error of a few steps with a new network; empty if they run."""
    try:
        net, optimizer = stepped(task, place)
        train_steps(net, optimizer, place, loader(place, task.pictures, batch, shuffle=True), TRIAL_STEPS)
    except RuntimeError as error:
        return str(error)
    return ""


def train(task: Task, place: Place, found: Found, eval_batch: int) -> Trained:
    with place:
        net, optimizer = stepped(task, place)
        try:
            return train_and_evaluate(net, optimizer, task, place, found.batch, eval_batch)
        except Exception as error:
            return Trained(survived=False, how=words(error, place))
