"""What every way is given: the same network, pictures, optimizer, steps and evaluation; and what comes back of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.budget import Place
from lowmem.measure.out_of_memory import classify, says_out_of_memory
from lowmem.models import build
from lowmem.models.resnet import ResNet

CLASSES = 10
TRIAL_STEPS = 3  # of a search that leaves it to its user: what Lightning's finder does by default


@dataclass(frozen=True, kw_only=True)
class Task:
    """`batch` and `lr` are the recipe's. `steps` of training are followed by one evaluation of `eval_pictures`.
    `budget_bytes`: of tensors on the CPU, of an emulated card on CUDA."""

    arch: str
    block: str
    width: int
    device: str
    budget_bytes: int
    batch: int = 128
    lr: float = 0.1
    pictures: int = 4096
    eval_pictures: int = 512
    steps: int = 3
    momentum: float = 0.9
    weight_decay: float = 1e-4


@dataclass(kw_only=True)
class Found:
    """What a search came to. `tried`: {batch, ran, peak_bytes} of each trial in order; `seconds`: without loading
    libraries and starting processes. `alive_*_bytes`: tensors before the search and after it; `weights_kept`: whether
    parameters and buffers were after it what they were before; `goes_on`: how training went on in the search's own
    process (these three None where the search has a process of its own, or leaves nothing to go on with). `carry`: what
    else the way's training has to know."""

    batch: int
    lr: float
    seconds: float
    tried: list[dict[str, Any]] = field(default_factory=list)
    alive_before_bytes: int | None = None
    alive_after_bytes: int | None = None
    weights_kept: bool | None = None
    goes_on: str | None = None
    notes: list[str] = field(default_factory=list)
    carry: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Trained:
    """Training and evaluation under the budget. `how`: in words, of what happened on the way or of how it died."""

    survived: bool
    how: str = ""
    batch: int | None = None  # that it ended with
    train_peak_bytes: int | None = None
    eval_peak_bytes: int | None = None


class Way(Protocol):
    """A module of this folder: how one system finds its batch and trains with it. All may raise what they meet."""

    def find(self, task: Task, place: Place) -> Found: ...

    def train(self, task: Task, place: Place, found: Found, eval_batch: int) -> Trained: ...

    def stepped(self, task: Task, place: Place, found: Found) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What does a training step with what was found."""
        ...


class Impossible(Exception):
    """The way cannot do this network; in words."""


# -- the common parts --------------------------------------------------------------------------------------------------


def network(task: Task) -> ResNet:
    """lowmem's own net, a plain module that knows nothing of plans."""
    return build(task.arch, task.block, width=task.width, num_classes=CLASSES)


def sgd(net: nn.Module, task: Task) -> torch.optim.SGD:
    """The recipe's, as a user writes it."""
    return torch.optim.SGD(net.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Random float32 [3, 32, 32] with classes, on the host; a whole batch at a time."""

    def __init__(self, place: Place, count: int) -> None:
        self._place = place
        with place.host():
            self._images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            self._labels = torch.arange(count) % CLASSES

    def __len__(self) -> int:
        return self._labels.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index], self._labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        with self._place.host():
            chosen = torch.tensor(indices)
            return self._images[chosen], self._labels[chosen]


def whole(batch: Any) -> Any:
    """The loader's collation: `Pictures` makes batches itself."""
    return batch


def loader(place: Place, count: int, batch: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
    """Host batches of `count` pictures."""
    return DataLoader(Pictures(place, count), batch_size=batch, shuffle=shuffle, collate_fn=whole)


def train_steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, place: Place, batches: Iterable[Any], steps: int
) -> None:
    """A usual training loop, for a few steps."""
    net.train()
    for number, batch in zip(range(1, steps + 1), batches, strict=False):
        place.phase = f"training step {number}"
        images, labels = place.put(*batch)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(net: nn.Module, place: Place, batches: Iterable[Any]) -> float:
    """The share of pictures that are classified rightly."""
    place.phase = "evaluation"
    net.eval()
    right = count = 0
    for batch in batches:
        images, labels = place.put(*batch)
        right += int((net(images).argmax(1) == labels).sum())
        count += labels.shape[0]
    return right / count


def train_and_evaluate(
    net: nn.Module, optimizer: torch.optim.Optimizer, task: Task, place: Place, batch: int, eval_batch: int
) -> Trained:
    """In this process, as `lowmem`'s own loop does it: an epoch of `task.steps` steps, then one evaluation."""
    place.reset_peak()
    train_steps(net, optimizer, place, loader(place, task.pictures, batch, shuffle=True), task.steps)
    train_peak_bytes = place.peak_bytes
    optimizer.zero_grad()
    place.reset_peak()
    evaluate(net, place, loader(place, task.eval_pictures, eval_batch))
    return Trained(survived=True, batch=batch, train_peak_bytes=train_peak_bytes, eval_peak_bytes=place.peak_bytes)


class Stepper:
    """One way's training steps, timed one at a time."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, place: Place, batch: int) -> None:
        self.batch = batch
        self.seconds: list[float] = []
        self._net, self._optimizer, self._place = net, optimizer, place
        self._batches = [next(iter(loader(place, batch, batch)))]

    def step(self) -> None:
        began = time.perf_counter()
        train_steps(self._net, self._optimizer, self._place, self._batches, 1)
        if self._place.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        self._optimizer.zero_grad()


class Trials:
    """What a search tries, seen from inside of what it calls."""

    def __init__(self, place: Place) -> None:
        self.done: list[dict[str, Any]] = []
        self._place = place
        self._batch: int | None = None
        self._refusals = 0

    def began(self, batch: int) -> None:
        """With this batch; another trial than the last one, even if that had the same."""
        self.ended()
        self._batch, self._refusals = batch, self._place.refusals
        self._place.reset_peak()

    def ended(self) -> None:
        """The search has said what comes next."""
        if self._batch is not None:
            ran = self._place.refusals == self._refusals
            self.done.append({"batch": self._batch, "ran": ran, "peak_bytes": self._place.peak_bytes})
        self._batch = None


def out_of_memory(error: BaseException) -> bool:
    """Also where a peer has put an exception of its own around the library's."""
    return classify(error, "a step") is not None or says_out_of_memory(str(error))


def words(error: BaseException, place: Place) -> str:
    """How it died, in a few."""
    if out_of_memory(error):
        return f"out of memory in {place.phase}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__} in {place.phase}: {text[:160]}"


def snapshot(net: nn.Module, place: Place) -> list[Tensor]:
    """Parameters and buffers, copied to the host."""
    with place.host():
        return [tensor.detach().to("cpu", copy=True) for tensor in net.state_dict().values()]


def unchanged(net: nn.Module, before: list[Tensor], place: Place) -> bool:
    with place.host():
        now = net.state_dict().values()
        return all(torch.equal(one.cpu(), other) for one, other in zip(now, before, strict=True))
